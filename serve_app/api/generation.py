"""From a request's text to a running answer: tokenise, check the limits, ask the engine.

Where protocol and engine meet. Knows no routes, no JSON shapes and no Ray.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from serve_app.api.metrics import Metrics
from serve_app.config.sections import ApiSettings
from serve_app.engine.delta import Delta
from serve_app.engine.sampling_params import SamplingParams
from serve_app.errors import ContextLengthExceeded, InternalError, InvalidRequest
from serve_app.protocol import messages
from serve_app.protocol.answer import Generation
from serve_app.protocol.fields import Sampling, printable
from serve_app.protocol.messages import Message
from serve_app.protocol.text import Detokenizer, Piece, TextStream, TokenScore
from serve_app.protocol.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine

T = TypeVar("T")

CHARS_ON_LOOP = 4_000
"""Longer texts are tokenised in a thread, so that the event loop does not wait for them."""

CHARS_PER_MESSAGE = 20
"""What rendering one message costs, in characters to tokenise."""


@dataclass(frozen=True, slots=True)
class Generator:
    """Starts answers on one engine. Every method raises `InvalidRequest` for what cannot be."""

    engine: "Engine"
    tokenizer: Tokenizer
    limits: ApiSettings
    max_model_len: int
    """Tokens of prompt and answer together."""
    vocab_size: int
    metrics: Metrics

    async def conversation_ids(
        self, turns: list[Message], field: str = "messages", *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The token ids of a conversation, through the chat template; `field` is for errors."""
        self._check_chars(messages.num_chars(turns), field)
        return await self._tokenised(
            messages.num_chars(turns) + CHARS_PER_MESSAGE * len(turns),
            lambda: self.tokenizer.render(
                messages.plain(turns), add_generation_prompt=add_generation_prompt
            ),
        )

    async def text_ids(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of raw text."""
        self._check_chars(len(prompt), "prompt")
        return await self._tokenised(
            len(prompt),
            lambda: self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens),
        )

    async def decoded(
        self, token_ids: Sequence[int], field: str, *, skip_special_tokens: bool = True
    ) -> str:
        """The text of a client's token ids; `field` is where they came from."""
        self.check_ids(token_ids, field)
        return await self._tokenised(
            len(token_ids),
            lambda: self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens),
        )

    def check_prompt(self, token_ids: Sequence[int], field: str) -> None:
        """That a prompt's ids fit into the context, which is looked at first, and exist."""
        self._room(len(token_ids), field)
        self.check_ids(token_ids, field)

    def check_ids(self, token_ids: Sequence[int], field: str) -> None:
        if not all(0 <= token_id < self.vocab_size for token_id in token_ids):
            raise InvalidRequest(
                f"`{field}` has a token id outside 0 to {self.vocab_size - 1}.", param=field
            )

    def start(
        self,
        request: Sampling,
        ids: list[int],
        field: str,
        *,
        default: int | None,
        arrived: float,
        continues: bool = False,
    ) -> Generation:
        """The answer to the prompt `ids`, which runs once its pieces are asked for.

        `field` is where the prompt came from. `default` stands for an absent limit of tokens, as
        far as the context allows; None is all of it. `arrived` is `Call.arrived`.
        `continues`: the answer is more of the prompt's text, so its leading space counts.
        """
        params = self._params(request, self._room(len(ids), field), default)
        detokenizer = self.tokenizer.detokenizer(
            ids if continues else (), skip_special_tokens=request.skip_special_tokens
        )
        return Generation(len(ids), self._pieces(request, ids, params, detokenizer, arrived))

    async def _pieces(
        self,
        request: Sampling,
        ids: list[int],
        params: SamplingParams,
        detokenizer: Detokenizer,
        arrived: float,
    ) -> AsyncGenerator[Piece, None]:
        """One piece for each delta. Leaving it at any point frees the request's KV blocks."""
        text = TextStream(detokenizer, request.stop, min_tokens=request.min_tokens)
        # An event loop's clock is `time.monotonic`, so the arrival gives the deadline on it.
        deadline = arrived + self.limits.request_timeout_s
        with self.metrics.request(len(ids), arrived) as seen:
            async with aclosing(self.engine.generate(ids, params, deadline)) as deltas:
                async for delta in deltas:
                    seen.delta(delta)
                    piece = text.push(delta.token_ids, _scores(delta))
                    if piece.finish_reason is None and delta.finish_reason is not None:
                        end = text.finish(_reason(delta))
                        piece = Piece(
                            piece.text + end.text,
                            piece.scores + end.scores,
                            end.finish_reason,
                            end.num_tokens,
                        )
                    if piece.finish_reason is not None:
                        break
                    yield piece
                else:
                    raise InternalError("The answer ended without a reason.")
            seen.ended(piece.finish_reason, piece.num_tokens)
        # Outside, so that the blocks are free before the client hears of the end.
        yield piece

    def _params(self, request: Sampling, room: int, default: int | None) -> SamplingParams:
        self.check_ids(request.stop_token_ids, "stop_token_ids")
        self.check_ids(list(request.bias), "logit_bias")
        limit = self._max_tokens(request, room, default)
        return SamplingParams(
            max_tokens=limit,
            min_tokens=min(request.min_tokens, limit),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=max(request.top_k, 0),
            min_p=request.min_p,
            seed=request.seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=request.bias,
            stop_token_ids=frozenset(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            logprobs=request.num_logprobs,
        )

    def _room(self, num_prompt: int, field: str) -> int:
        """Tokens that the context has left for the answer; at least 1."""
        room = self.max_model_len - num_prompt
        if room < 1:
            raise ContextLengthExceeded(
                f"The prompt has {num_prompt} tokens and the context holds {self.max_model_len}, "
                "the answer included; send a shorter prompt.",
                param=field,
            )
        return room

    def _max_tokens(self, request: Sampling, room: int, default: int | None) -> int:
        asked, field = request.limit
        most = self.limits.max_tokens_limit
        if asked is None:
            return min(room, default or room, most or room)
        if most is not None and asked > most:
            raise InvalidRequest(f"`{field}` may be {most} at most.", param=field)
        if asked > room:
            raise ContextLengthExceeded(
                f"The prompt has {self.max_model_len - room} tokens and `{field}` is "
                f"{printable(asked)}, but the context holds {self.max_model_len} together; ask for "
                f"{room} at most.",
                param=field,
            )
        return asked

    def _check_chars(self, num_chars: int, field: str) -> None:
        if num_chars > self.limits.max_prompt_chars:
            raise InvalidRequest(
                f"`{field}` has {num_chars} characters; {self.limits.max_prompt_chars} are "
                "allowed.",
                param=field,
            )

    async def _tokenised(self, size: int, work: Callable[[], T]) -> T:
        return work() if size <= CHARS_ON_LOOP else await asyncio.to_thread(work)


def _reason(delta: Delta) -> str:
    if delta.finish_reason == "error":
        raise delta.error or InternalError("The answer failed.")
    return str(delta.finish_reason)


def _scores(delta: Delta) -> list[TokenScore]:
    return [TokenScore(each.token_id, each.logprob, each.top) for each in delta.logprobs]
