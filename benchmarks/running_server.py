"""RunningServer: a server under load, the bodies of its requests, and prompts new to it."""

import argparse
from dataclasses import dataclass, field
from typing import Any

from benchmarks.prompts import Lengths, Prompts
from benchmarks.report import new_parser


@dataclass
class RunningServer:
    """A server that speaks OpenAI's `/v1/completions` at `url`."""

    url: str
    model: str
    """The model's name in a request."""
    fields: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    """Fields that only this server's requests have."""
    seed: int = 0
    """Servers with the same seed get the same prompts."""
    _num_prompts: int = 0

    def body(self, prompt: str | list[int], max_tokens: int) -> dict[str, Any]:
        """Returns a streamed request for a text or token ids, greedy unless `fields` says
        otherwise."""
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | self.fields

    def words(self, count: int) -> str:
        """Returns `count` words. No two such texts begin alike, so no prefix cache has them."""
        self._num_prompts += 1
        prompts = Prompts(Lengths(count, count), Lengths(1, 1), seed=self.seed)
        return prompts.draw(self._num_prompts)[0]


def server_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a benchmark's options with `--url` and `--model`, for a server that runs already."""
    parser = new_parser(description)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="tiny")
    return parser
