"""One answer while it comes, and as a whole: what the routes' shapes are made from.

Knows no shapes itself, and no engine.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from serve_app.protocol.text import Piece


@dataclass(frozen=True, slots=True)
class Head:
    """What stands above every answer to one request."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time in seconds."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt's answer, running. Closing `pieces` cancels it."""

    prompt_tokens: int
    pieces: AsyncGenerator[Piece, None]

    def in_turn(self, places: asyncio.Semaphore) -> "Generation":
        """The same answer, which does not run before it has one of `places`."""
        return replace(self, pieces=_in_turn(self.pieces, places))

    async def whole(self) -> Piece:
        """Waits for the end: all text and scores in one piece."""
        whole = Piece("")
        texts: list[str] = []
        async with aclosing(self.pieces):
            async for piece in self.pieces:
                texts.append(piece.text)
                whole.scores += piece.scores
                whole.finish_reason = piece.finish_reason
                whole.num_tokens = piece.num_tokens
        whole.text = "".join(texts)
        return whole


async def _in_turn(
    pieces: AsyncGenerator[Piece, None], places: asyncio.Semaphore
) -> AsyncGenerator[Piece, None]:
    async with places, aclosing(pieces):
        async for piece in pieces:
            yield piece


class TokenNames(Protocol):
    """What `logprobs` need of the tokenizer."""

    def token_bytes(self, token_id: int) -> bytes: ...


LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (vLLM's number)."""


def finite(logprob: float) -> float:
    """`logprob` as JSON can say it. Raises `ValueError` for NaN, which nothing may stand for."""
    if logprob != logprob:
        raise ValueError("a log probability is NaN")
    return max(logprob, LEAST_LOGPROB)
