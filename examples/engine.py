"""Use the engine offline: load the tiny model and answer three prompts in one batch.

python examples/engine.py
"""

import asyncio

from serve_app.config.settings import Settings
from serve_app.engine.sampling_params import SamplingParams
from serve_app.loading.load import Loaded, load
from serve_app.loading.load_log import LoadLog

PROMPTS = ["What is 2 + 3?", "What is the capital of France?", "Count from 1 to 5."]


async def answer(loaded: Loaded, prompt: str) -> str:
    """Returns the model's answer; requests that run at the same time share the engine's steps."""
    prompt_ids = loaded.tokenizer.render([{"role": "user", "content": prompt}])
    ids: list[int] = []
    async for delta in loaded.engine.generate(
        prompt_ids, SamplingParams(max_tokens=30, temperature=0)
    ):
        ids += delta.token_ids
    return loaded.tokenizer.decode(ids)


async def main() -> None:
    loaded = load(Settings.from_yaml("configs/tiny.yaml"), LoadLog())
    answers = await asyncio.gather(*(answer(loaded, prompt) for prompt in PROMPTS))
    for prompt, text in zip(PROMPTS, answers, strict=True):
        print(f"{prompt}  ->  {text}")
    loaded.engine.stop()


asyncio.run(main())
