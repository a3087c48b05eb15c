"""The plan of a start: made once, and handed over to whatever needs it."""

import os
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from serve_app.api.server import MixtralServer
from serve_app.cold_start.check import check
from serve_app.cold_start.cold_start import ColdStart
from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed
from serve_app.loading.load import load
from serve_app.loading.load_log import LoadLog
from serve_app.model.footprint import (
    decode_bytes,
    kernel_step_bytes,
    logits_bytes,
    torch_step_bytes,
    trial_bytes,
)
from serve_app.node import fitness
from serve_app.start_plan.hub import Repository
from serve_app.start_plan.memory import UNPLANNED_BYTES
from serve_app.start_plan.plan import StartPlan, plan_start
from serve_app.tiny import CHECKPOINT
from tools.random_model import config_of

DECISIONS = ("inspect", "find_local", "find_folder", "copy_folder", "plan_start", "choose_device")

opened: Counter[str] = Counter()


def count_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        opened[os.path.basename(arguments[0])] += 1


sys.addaudithook(count_open)  # cannot be removed, and only counts


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Counts the calls of our functions, by name, in all threads while the block runs."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "/serve_app/" in frame.f_code.co_filename:
            calls[frame.f_code.co_name] += 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def settings(name: str = "tiny", **model: Any) -> Settings:
    return Settings(model={"name": name, "quantization": "none", **model})


def test_one_start_decides_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check, fitness, forecast, crash guard and load share one look at the checkpoint."""
    monkeypatch.setenv("BASE_PATH", str(tmp_path))  # where the crash guard keeps its records
    opened.clear()
    with counted_calls() as calls:
        checked = check("configs/tiny-nf4.yaml")
        for each in fitness.checks(checked.settings, None):
            each()
        with ColdStart(checked.settings, checked.plan).watch():
            server = MixtralServer(checked.settings, partial(load, plan=checked.plan))
    server.close()
    assert {name: calls[name] for name in DECISIONS} == {
        "inspect": 1,
        "find_local": 0,  # the tiny model is in this package
        "find_folder": 1,
        "copy_folder": 1,
        "plan_start": 1,
        "choose_device": 2,  # by the plan, and by the fitness checks, which a plan may lack
    }
    assert opened["config.json"] == 1


def test_a_replica_without_a_plan_makes_one(tmp_path: Path) -> None:
    """A replica of `serve run` finds its checkpoint by name and looks at it once."""
    chosen = settings(str(CHECKPOINT), device="cpu")
    opened.clear()
    with counted_calls() as calls:
        load(chosen, LoadLog()).engine.stop()
    assert (calls["inspect"], calls["find_local"], opened["config.json"]) == (1, 1, 1)


def test_a_start_that_writes_a_copy_looks_at_each_folder_once(tmp_path: Path) -> None:
    """The source is inspected for the plan, the copy once it is written."""
    chosen = settings(device="cpu", quantization="nf4", cache_dir=str(tmp_path))
    opened.clear()
    with counted_calls() as calls:
        load(chosen, LoadLog()).engine.stop()
    assert (calls["inspect"], calls["copy_folder"]) == (2, 1)


def test_a_plan_can_be_handed_to_another_process() -> None:
    """A plan crosses Ray with the deployment, and holds no secret."""
    plan = plan_start(Settings.from_yaml("configs/tiny-nf4.yaml"))
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize(
    ("model", "device", "dtype", "notes"),
    [
        ({}, "cpu", "float32", ["device cpu: the tiny model needs no GPU", "float32"]),
        ({"device": "cuda"}, "cuda", "bfloat16", ["dtype bfloat16: the default on cuda"]),
        ({"name": str(CHECKPOINT)}, "cuda", "bfloat16", ["device cuda: the default", "bfloat16"]),
        ({"device": "cpu", "dtype": "bfloat16"}, "cpu", "bfloat16", []),
    ],
)
def test_the_settings_decide_device_and_dtype(
    model: dict[str, Any], device: str, dtype: str, notes: list[str]
) -> None:
    """Not the machine: Ray must know which replica needs a GPU. What auto chose is noted."""
    plan = plan_start(settings(**model))
    assert (plan.device, plan.dtype) == (device, dtype)
    assert len(plan.notes) == len(notes)
    assert all(words in note for words, note in zip(notes, plan.notes, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_does_not_see_is_an_error(device: str) -> None:
    """The replica does not fall back to the CPU in silence."""
    chosen = settings(str(CHECKPOINT), device=device)
    with pytest.raises(
        ModelLoadFailed, match=f"`model.device` is {device}, but torch finds no GPU"
    ):
        load(chosen, LoadLog())


@pytest.mark.parametrize(
    ("free_gb", "utilization", "room_gb"),
    [(50, 1.0, 50), (50, 0.9, 42), (8, 0.9, 0), (1, 0.5, -39)],
)
def test_the_kv_cache_takes_what_a_gpu_leaves(
    free_gb: int, utilization: float, room_gb: int
) -> None:
    """On 80 GB: free memory, less the unused share of the whole, less what activations need."""
    gb = 10**9
    memory = plan_start(settings(device="cuda")).memory
    memory = replace(memory, gpu_memory_utilization=utilization)
    room = memory.kv_room_bytes(free_gb * gb, 80 * gb)
    assert room == pytest.approx(room_gb * gb - memory.reserved_bytes(80 * gb), abs=1)


@pytest.mark.parametrize(
    ("device", "total_gb", "num_tokens"),
    [("cuda", 141, 8192), ("cuda", 80, 8192), ("cuda", 32, 2048), ("cpu", 0, 512)],
)
def test_the_size_of_a_step_follows_the_device(device: str, total_gb: int, num_tokens: int) -> None:
    """Large GPUs compute 8,192 tokens a step; the setting and `max_num_seqs` have the last word."""
    total = total_gb * 10**9
    memory = plan_start(settings(device=device)).memory
    assert memory.max_num_batched_tokens(total) == num_tokens
    assert replace(memory, max_num_seqs=9000).max_num_batched_tokens(total) == 9000
    assert replace(memory, asked_batched_tokens=64).max_num_batched_tokens(total) == 64


def test_memory_is_reserved_for_the_largest_step() -> None:
    """Mixtral 8x7B in 4 bits, contexts of 32,768: the larger of what kernels and plain torch take,
    or of what the trial of kernels takes, and what decodes and logits take beside it."""
    config = config_of(tiny=False, layers=1)
    plain = torch_step_bytes(config, 2, 32_768, is_quantized=True)
    keys_and_values, expert = 2 * 32_768 * 4096 * 2, 2 * 14_336 * 4096 * 2
    assert plain.base == keys_and_values + expert == 771_751_936
    assert plain.token == (10 * 4096 + 4 * 14_336) * 2 + 32_768 * 3 == 294_912
    kernels = kernel_step_bytes(config, 2, 8)
    weights = 8 * 3 * 14_336 * 4096 + 6144 * 4096 + 4096 * 4096
    assert kernels.base == 2 * weights == 2_902_458_368
    assert kernels.token == 2 * (9 * 4096 + 2 * 14_336) == 131_072
    memory = plan_start(settings(device="cuda")).memory
    shape: dict[str, Any] = {"config": config, "item_bytes": 2, "max_num_seqs": 32}
    full = replace(memory, **shape, is_quantized=True, max_model_len=32_768)
    others = UNPLANNED_BYTES + decode_bytes(config, 2, 32, 1 + 2 + 4 + 8 + 16 + 24 + 32)
    scored = logits_bytes(config, 2, 32, 512, 128)
    assert full.reserved_bytes(80 * 10**9) == kernels.of(8192) + others + scored
    assert full.reserved_bytes(32 * 10**9) == plain.of(2048) + others + scored
    short = replace(full, max_model_len=8192)
    trial = trial_bytes(config, 2, 2)
    assert short.experts_at_once(32 * 10**9) == 2
    assert short.reserved_bytes(32 * 10**9) == trial + others + scored
    fewer = replace(short, asked_batched_tokens=64).reserved_bytes(32 * 10**9)
    assert fewer == trial + others + logits_bytes(config, 2, 32, 64, 64)


def test_experts_in_floats_are_computed_together() -> None:
    """Their products take as many rows a token as it has experts; nothing is dequantized."""
    config = config_of(tiny=False, layers=1)
    assert torch_step_bytes(config, 2, 0, is_quantized=False) == (0, 2 * (10 * 4096 + 8 * 14_336))


def test_the_kv_cache_is_counted_in_tokens() -> None:
    """A token of the tiny model takes 2,048 bytes in float32; where there is no room, none fits."""
    memory = plan_start(settings(device="cuda", dtype="float32")).memory
    assert (memory.kv_cache_tokens, memory.token_bytes) == (None, 4 * 2 * 2 * 32 * 4)
    free = memory.reserved_bytes(80 * 10**9) + 10 * memory.token_bytes
    assert memory.fitting_kv_tokens(free + 1, 80 * 10**9) == 10
    assert memory.fitting_kv_tokens(free - 1, 80 * 10**9) == 9
    assert memory.fitting_kv_tokens(0, 80 * 10**9) == 0


def test_what_has_been_downloaded_since_is_not_downloaded_again(tmp_path: Path) -> None:
    """A replica that replaces another one has the plan from before the download."""
    chosen = settings("o/m", device="cpu").model_copy(deep=True)
    old = plan_start(settings())
    repository = Repository("o/m", None, None, {}, 1, 1)
    plan = StartPlan(**{**vars(old), "repository": repository})
    runpod = chosen.runpod.model_copy(update={"volume": str(tmp_path)})
    chosen = chosen.model_copy(update={"runpod": runpod})
    folder = tmp_path / "huggingface-cache" / "hub" / "models--o--m" / "snapshots" / "abc"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(CHECKPOINT)
    loaded = load(chosen, LoadLog(), plan)
    loaded.engine.stop()
    assert loaded.vocab_size == 768
