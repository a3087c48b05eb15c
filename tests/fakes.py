"""A fake engine that follows a script, and a server with it.

The fake checks requests as the real engine does.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator
from collections.abc import Sequence as ListLike
from functools import cache
from typing import Any, cast

import numpy as np

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from serve_app.engine.admission import admit
from serve_app.engine.delta import Delta, FinishReason, TokenLogprob
from serve_app.engine.engine import Engine, EngineStats
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.retry_after import Places
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduling_class import DEFAULT_CLASS, SchedulingClass
from serve_app.engine.sequence import SharedPrompt
from serve_app.errors import DeadlinePassed, EngineDead, QueueFull
from serve_app.loading.load import Loaded
from serve_app.loading.load_log import LoadLog
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.tiny import CHECKPOINT

MAX_MODEL_LEN = 1024
VOCAB_SIZE = 768
CONFIG = EngineConfig(
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=32,
    max_waiting=32,
    block_size=16,
    num_blocks=32 * MAX_MODEL_LEN // 16,
    max_num_batched_tokens=512,
    eos_token_ids=frozenset(),
)
"""The fake engine's limits."""
MAX_TAKEN = CONFIG.max_num_seqs + CONFIG.max_waiting


@cache
def tokenizer() -> Tokenizer:
    """Returns the tiny model's; read once."""
    return Tokenizer(CHECKPOINT)


class FakeEngine:
    """Answers every request with `text` in deltas of `size` tokens, then fails or never ends."""

    config = CONFIG

    def __init__(
        self,
        text: str = "Hello there.",
        *,
        size: int = 1,
        reason: FinishReason = "stop",
        error: Exception | None = None,
        is_endless: bool = False,
        logprob: float = -0.5,
    ) -> None:
        self.token_ids = tokenizer().encode(text, add_special_tokens=False)
        self.is_alive = True
        self.requests: list[tuple[list[int], SamplingParams]] = []
        self.scheduling_classes: list[SchedulingClass] = []
        self.num_running = 0
        self.max_num_seqs = 0
        self.begun = threading.Event()
        """Set when a request has begun."""
        self.left = threading.Event()
        """Set when a request ended, however it did."""
        self._size, self._reason, self._error = size, reason, error
        self._is_endless, self._logprob = is_endless, logprob
        self.num_taken = 0
        """Places of the queue that are taken; from `MAX_TAKEN` on new requests are refused."""

    def require_room(self, group: str = "") -> None:
        if not self.is_alive:
            raise EngineDead("The engine has failed.")
        if self.num_taken >= MAX_TAKEN:
            raise QueueFull("Too many requests are waiting.", retry_after_s=3)

    def places(self) -> Places:
        return Places(MAX_TAKEN, 0.0064, 0.05, 3)

    def take_place(self, group: str = "") -> None:
        self.require_room()
        self.num_taken += 1

    def free_place(self, group: str = "") -> None:
        self.num_taken -= 1

    def end_if_hung(self) -> None:
        """Does nothing: the fake's steps always return."""

    def check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        admit(prompt_ids, params, CONFIG, VOCAB_SIZE)

    async def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        deadline: float | None = None,
        scheduling_class: SchedulingClass = DEFAULT_CLASS,
        *,
        is_list_item: bool = False,
        shared_prompt: SharedPrompt | None = None,
    ) -> AsyncGenerator[Delta, None]:
        self.check(prompt_ids, params)
        if not is_list_item:
            self.require_room()
        self.requests.append((prompt_ids, params))
        self.scheduling_classes.append(scheduling_class)
        self.num_running += 1
        self.num_taken += not is_list_item
        self.begun.set()
        self.max_num_seqs = max(self.max_num_seqs, self.num_running)
        try:
            ids = self.token_ids
            for start in range(0, len(ids), self._size):
                await asyncio.sleep(0)
                group = ids[start : start + self._size]
                yield Delta(group, self._logprobs(group, params))
            while self._is_endless:
                await asyncio.sleep(0.001)
                if deadline is not None and asyncio.get_running_loop().time() > deadline:
                    raise DeadlinePassed("Too late.")
                yield Delta(ids[:1], self._logprobs(ids[:1], params))
            if self._error is not None:
                raise self._error
            yield Delta([], [], self._reason)
        finally:
            self.num_running -= 1
            self.num_taken -= not is_list_item
            self.left.set()

    def _logprobs(self, ids: ListLike[int], params: SamplingParams) -> list[TokenLogprob]:
        if params.logprobs is None:
            return []
        top_ids = np.array([5, 6][: params.logprobs])
        top = top_ids, np.array([-0.25, -np.inf], np.float32)[: params.logprobs]
        return [TokenLogprob(token_id, self._logprob, *top) for token_id in ids]

    def stats(self) -> EngineStats:
        return EngineStats(self.num_running, 0, self.num_running, 64, 0, 0, 0, 0, 0, 0, 0.0)

    def stop(self) -> None:
        self.is_alive = False


def server(engine: FakeEngine | None = None, /, **args: Any) -> MixtralServer:
    """Returns a server of a model called "tiny" whose engine is the given fake; `args` are
    settings."""
    model = {"name": "tiny", "quantization": "none"}
    settings = Settings(**{"model": model, **args})
    fake = engine or FakeEngine()

    def load(settings: Settings, load_log: LoadLog) -> Loaded:
        memory = dict.fromkeys(("experts", "attention", "head", "other", "kv_cache"), 0)
        return Loaded(
            tokenizer(), cast(Engine, fake), MAX_MODEL_LEN, VOCAB_SIZE, "float32", None, memory, []
        )

    return MixtralServer(settings, load)


async def items(server: MixtralServer, path: str, body: Any) -> list[dict[str, Any]]:
    """Returns everything that `MixtralServer.call` yields for a POST."""
    yielded = [item async for item in server.call("POST", path, body, "r1")]
    return cast(list[dict[str, Any]], yielded)


async def answer(server: MixtralServer, path: str, body: Any) -> dict[str, Any]:
    """Returns the body of a POST that is not streamed, or the error body."""
    last = (await items(server, path, body))[-1]
    return cast(dict[str, Any], last["error"] if "error" in last else last["body"])


async def chunks(server: MixtralServer, path: str, body: Any) -> list[dict[str, Any]]:
    """Returns the response chunks of a POST that is streamed and does not fail."""
    return [item["chunk"] for item in await items(server, path, {**body, "stream": True})]
