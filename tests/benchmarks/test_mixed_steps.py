"""Prompts beside streams on one engine, and the cost table that is made from its steps."""

import asyncio
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import device
from benchmarks.engine_streams import EngineStreams
from benchmarks.mixed_steps import REPEATS, MixedSteps, Step, step_times
from benchmarks.step_times import DEVICES, StepTimes
from serve_app.engine.engine import Engine
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.step_cost import StepShape
from serve_app.start_plan import memory
from tests.engine.fake import FakeRunner
from tests.engine.mixtral import OverlappingRunner
from tools.random_model import config_of, random_model

CONFIG = EngineConfig(
    max_model_len=4096,
    max_num_seqs=8,
    max_waiting=8,
    block_size=16,
    num_blocks=512,
    max_num_batched_tokens=64,
    eos_token_ids=frozenset(),
)
# Imports the benchmark where only torch, triton, numpy and what these need can be imported.
ALONE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages}:
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
import benchmarks.gpu
"""
PACKAGES = [
    *("pydantic", "pydantic_settings", "ray", "fastapi", "starlette", "transformers", "tokenizers"),
    *(
        "safetensors",
        "huggingface_hub",
        "aiohttp",
        "yaml",
        "psutil",
        "orjson",
        "runpod",
        "requests",
    ),
]
"""Packages of the server and of other benchmarks, which a bare GPU machine lacks."""


def test_a_prompt_is_cut_as_the_server_cuts_it() -> None:
    """A prompt of 150 tokens takes three steps of at most 64 tokens, alone and beside streams."""
    mixed = MixedSteps(FakeRunner(), CONFIG)
    rows = []

    async def work() -> None:
        for streams in (0, 2):
            rows.append(await mixed.prompts(150, streams, 20))

    mixed.run(0, work)
    alone, beside = rows
    assert alone["cuts"] == [64, 64, 22]
    assert sum(beside["cuts"]) == 150
    assert max(beside["cuts"]) <= 62
    assert "longest_gap_ms" not in alone
    assert beside["longest_gap_ms"] > 0
    assert beside["gap_ms"] > 0
    whole = [step for step in mixed.steps if step.shape.num_prompt_tokens == 22]
    assert len(whole) == REPEATS


def test_steps_that_overlap_are_recorded() -> None:
    """On a device that overlaps steps, decodes and prefill chunks are steps of their own, and each
    has the time that the device worked on it."""
    cpu = torch.device("cpu")
    model = random_model(config_of(tiny=True, layers=1), None, torch.float32, cpu)
    sizes = (CONFIG.num_blocks, CONFIG.block_size)
    mixed = MixedSteps(OverlappingRunner(model, *sizes, torch.float32, cpu), CONFIG)
    rows = []

    async def work() -> None:
        rows.append(await mixed.prompts(150, 2, 20))

    mixed.run(0, work)
    assert sum(rows[0]["cuts"]) == 150
    assert len(rows[0]["cuts"]) == 3
    assert rows[0]["device_ms"] > 0
    assert all(step.seconds > 0 for step in mixed.steps)
    assert {bool(s.shape.num_decodes) + bool(s.shape.num_prompt_tokens) for s in mixed.steps} == {1}


def test_gaps_that_overlap_a_prompt_are_its_own() -> None:
    """A gap belongs to a prompt if any part of it lies between its request and first token."""
    streams = EngineStreams(Engine(FakeRunner(), CONFIG), [])
    streams._times = [[0.0, 1.0, 2.0, 4.0, 4.5], [0.0, 3.0]]
    assert streams.gaps([(1.5, 2.0), (3.5, 3.75)]) == ([1.0, 2.0, 3.0], [1.0, 0.5])


def test_a_stream_that_ends_is_an_error() -> None:
    """Streams that end before their first deliveries raise instead of letting the run wait."""
    engine = Engine(FakeRunner(), replace(CONFIG, max_model_len=24))
    engine.start()

    async def run() -> None:
        async with EngineStreams(engine, [[1] * 20]):
            pass

    try:
        with pytest.raises(RuntimeError, match="ended before"):
            asyncio.run(run())
    finally:
        engine.stop()


TWO_FORMS = DEVICES["h200"]._replace(few_tokens=496, few=5.0, few_token=0.09)
"""A device whose steps with few prompt tokens have a small fixed part and a large rate."""
SIZES = (16, 64, 256, 450, 512, 1500, 4096)
"""Prompt tokens of measured steps; each form has more sizes than coefficients."""


@pytest.mark.parametrize("known", [*(DEVICES[n] for n in ("h200", "small gpu", "cpu")), TWO_FORMS])
def test_the_table_predicts_the_device(known: StepTimes) -> None:
    """A table made from a known device's steps gives the device's times for other sizes."""
    config = replace(CONFIG, max_num_batched_tokens=known.max_num_batched_tokens)

    def decodes(count: int, context: int) -> StepShape:
        return StepShape(count, count * context, 0, 0)

    def prompt(tokens: int) -> StepShape:
        return StepShape(0, 0, tokens, tokens * (tokens + 1) // 2)

    measured = {
        batch: (1e3 * known.seconds(decodes(batch, 16)), 1e3 * known.seconds(decodes(batch, 512)))
        for batch, _ in known.decodes
    }
    steps = [Step(prompt(n), known.seconds(prompt(n))) for n in SIZES * 3]
    table = step_times(
        *("a test", config, measured, 512, steps),
        is_gpu=known.is_gpu,
        few_tokens=known.few_tokens,
    )
    shapes = [decodes(16, 100), decodes(128, 2000)]
    shapes += [prompt(num_tokens) for num_tokens in (30, 200, 490, 3000, 8000)]
    for shape in shapes:
        assert table.seconds(shape) == pytest.approx(known.seconds(shape), rel=0.03)
    assert table.rate > 0


def test_the_steps_have_the_servers_size() -> None:
    """The sizes of a step that the benchmark takes are the server's defaults."""
    assert device.SMALL_EXPERTS_AT_ONCE == memory.SMALL_EXPERTS_AT_ONCE
    assert device.BATCHED_TOKENS == memory.BATCHED_TOKENS
    assert device.LARGE_GPU_BYTES == memory.LARGE_GPU_BYTES


def test_it_imports_on_a_bare_gpu_machine() -> None:
    """The GPU benchmark needs none of the server's packages but torch, triton, numpy and CUDA's."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE.replace("{packages}", repr(PACKAGES))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
