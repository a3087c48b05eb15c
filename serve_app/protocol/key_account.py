"""KeyAccount: counts and limits the use of one API key."""

import math
from collections.abc import Callable

from serve_app.config.key_file import ApiKey
from serve_app.errors import RateLimited
from serve_app.protocol.allowance import Allowance


class KeyAccount:
    """Counts and limits the requests of one key on one replica."""

    def __init__(self, key: ApiKey, *, is_alone: bool) -> None:
        """`is_alone`: whether `key` is the only key, so that the engine is not shared."""
        self.num_requests = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_running = 0
        """Number of requests whose answers are running or waiting."""
        self._requests: Allowance | None = None
        self._tokens: Allowance | None = None
        self.update(key, is_alone=is_alone)

    def update(self, key: ApiKey, *, is_alone: bool) -> None:
        """Applies the current limits of the key file. A limit that has not changed keeps its
        state."""
        self.key = key
        self.group = "" if is_alone else key.name
        """The group of its requests; the engine divides its time between groups."""
        self._requests = _kept(self._requests, key.requests_per_minute)
        self._tokens = _kept(self._tokens, key.tokens_per_minute)

    def take_request(self) -> Callable[[], None]:
        """Counts a generating request as running until the returned function is called.

        The returned function may be called more than once. Raises `RateLimited` if a limit is used
        up.
        """
        max_concurrent = self.key.max_concurrent
        if max_concurrent is not None and self.num_running >= max_concurrent:
            raise RateLimited(
                f"The API key {self.key.name!r} may have {max_concurrent} requests at once; "
                "send this one again when another has ended.",
                retry_after_s=1,
            )
        for unit, allowance in self._allowances:
            if (wait_s := allowance.wait_s()) > 0:
                raise RateLimited(
                    f"The API key {self.key.name!r} has used its {allowance.per_minute} {unit} a "
                    "minute; send this request again after the seconds in the header Retry-After.",
                    retry_after_s=math.ceil(wait_s),
                )
        self.num_requests += 1
        if self._requests is not None:
            self._requests.use(1)
        self.num_running += 1
        is_running = [True]

        def end() -> None:
            self.num_running -= bool(is_running)
            is_running.clear()

        return end

    def use_tokens(self, num_prompt_tokens: int, num_generation_tokens: int) -> None:
        """Counts tokens of prompts and of answers."""
        self.num_prompt_tokens += num_prompt_tokens
        self.num_generation_tokens += num_generation_tokens
        if self._tokens is not None:
            self._tokens.use(num_prompt_tokens + num_generation_tokens)

    def headers(self) -> dict[str, str]:
        """Returns the response headers with the limits and the remaining amounts."""
        headers: dict[str, str] = {}
        for unit, allowance in self._allowances:
            headers |= allowance.headers(unit)
        return headers

    @property
    def _allowances(self) -> list[tuple[str, Allowance]]:
        pairs = ("requests", self._requests), ("tokens", self._tokens)
        return [(unit, allowance) for unit, allowance in pairs if allowance is not None]


def _kept(allowance: Allowance | None, per_minute: int | None) -> Allowance | None:
    if per_minute is None:
        return None
    if allowance is not None and allowance.per_minute == per_minute:
        return allowance
    return Allowance(per_minute)
