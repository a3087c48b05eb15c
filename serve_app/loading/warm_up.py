"""The first prompts of a new engine, run before anybody waits for one.

They make the device do for the first time what it does for every request, so that no user pays
for it, and fill one whole step, so that what does not fit is known at the load. Knows no text.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from serve_app.engine.sampling_params import SamplingParams
from serve_app.errors import ModelLoadFailed, OutOfMemory, ServeError

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine


def fill_a_step(engine: "Engine", vocab_size: int, free_bytes: int) -> None:
    """A prompt as long as one step takes, and two tokens after it.

    `free_bytes` is what the device has left. Raises `ModelLoadFailed` where it is not enough, or
    where the device computes nonsense.
    """
    num_tokens = min(engine.config.max_num_batched_tokens, engine.config.max_model_len - 2)
    _run(engine, [i % vocab_size for i in range(num_tokens)], 2, free_bytes)


def first_token(engine: "Engine", prompt_ids: list[int], free_bytes: int) -> None:
    """A short prompt up to its first token; raises as `fill_a_step`."""
    _run(engine, prompt_ids, 1, free_bytes)


def _run(engine: "Engine", prompt_ids: list[int], max_tokens: int, free_bytes: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)

    async def generate() -> None:
        async for _ in engine.generate(prompt_ids, params):
            pass

    # A thread of its own: a constructor may run inside somebody's event loop.
    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            thread.submit(lambda: asyncio.run(generate())).result()
        except OutOfMemory as error:
            raise ModelLoadFailed(
                f"A prompt of {len(prompt_ids)} tokens needs more memory than the "
                f"{free_bytes / 1e9:.2f} GB that the weights and the KV cache leave; lower "
                "`engine.max_num_batched_tokens` or `engine.kv_cache_tokens`, or take a larger GPU."
            ) from error
        except ServeError as error:
            raise ModelLoadFailed(
                f"The model is loaded, and its first prompt failed: {error.message}"
            ) from error
