"""Runs the first prompts of a new engine, before it accepts requests.

The first step of each kind compiles kernels and allocates memory, which would slow down the first
requests. The first prompt fills a whole step, so that a lack of memory is found during the load.
Prompts of several sizes give `StepCost` its first measurements.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from serve_app.engine.sampling_params import SamplingParams
from serve_app.errors import ModelLoadFailed, OutOfMemory, ServeError

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine
    from serve_app.engine.engine_config import EngineConfig


def prompt_sizes(config: "EngineConfig", few_tokens: int = 0) -> list[int]:
    """Returns the lengths of the first prompts, in tokens.

    They are a full step twice, because the first one compiles, then a quarter and a sixteenth of a
    full step. Steps of up to `few_tokens` tokens use other kernels (`Runner.few_prompt_tokens`), so
    `few_tokens` and a quarter of it follow. Example with steps of 512 tokens and `few_tokens` 64:
    512, 512, 128, 32, 64, 16.
    """
    full = min(config.max_num_batched_tokens, config.max_model_len - 2)
    few = min(few_tokens, full)
    sizes = [full, full, max(full // 4, 1), max(full // 16, 1)]
    return [*sizes, few, max(few // 4, 1)] if few else sizes


def run_prompts(engine: "Engine", vocab_size: int, free_bytes: int) -> None:
    """Runs prompts of `prompt_sizes`, each with two decode steps.

    `free_bytes` is the device's free memory, for the error. Raises `ModelLoadFailed` if the memory
    is not enough, or the engine fails.
    """
    sizes = prompt_sizes(engine.config, engine.runner.few_prompt_tokens)
    for number, num_tokens in enumerate(sizes):
        # The prompts begin with different tokens, so none is found in the prefix cache.
        prompt_ids = [(i + number) % vocab_size for i in range(num_tokens)]
        _run(engine, prompt_ids, 2, free_bytes)


def first_token(engine: "Engine", prompt_ids: list[int], free_bytes: int) -> None:
    """Runs a short prompt up to its first token. Raises the errors of `run_prompts`."""
    _run(engine, prompt_ids, 1, free_bytes)


def _run(engine: "Engine", prompt_ids: list[int], max_tokens: int, free_bytes: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)

    async def generate() -> None:
        async for _ in engine.generate(prompt_ids, params):
            pass

    # In a thread, because a constructor may run inside an event loop.
    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            thread.submit(lambda: asyncio.run(generate())).result()
        except OutOfMemory as error:
            raise ModelLoadFailed(
                f"A prompt of {len(prompt_ids)} tokens needs more memory than the "
                f"{free_bytes / 1e9:.2f} GB that are free beside weights and KV cache; lower "
                "`engine.max_num_batched_tokens` or `engine.kv_cache_tokens`, or take a larger GPU."
            ) from error
        except ServeError as error:
            raise ModelLoadFailed(
                f"The model is loaded, but its first prompt failed: {error.message}"
            ) from error
