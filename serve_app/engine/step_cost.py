"""StepCost: predicts how long a step takes, from the steps that were measured.

A step that only decodes takes

    a + b * decodes + c * context tokens of the decodes

and a step with prompt tokens takes

    a + b * prompt tokens + c * attention scores of the prompt tokens + d * (the decodes alone).

The fixed part `a` of a step with prompt tokens is large on a GPU that unpacks all 4-bit weights for
it, and small on a CPU. `d` is near 0 where a step with prompt tokens reads all weights anyway, and
1 where decodes and prompts are computed one after the other. It is 1 until a step with both has
been measured, which a device that overlaps steps never computes. All coefficients are at least 0.

A GPU may compute steps of up to `few_tokens` prompt tokens in another way, which reads 4-bit
weights once for each pass of some tokens and has a small fixed part. These steps have coefficients
of their own.

The coefficients are fitted to the newest steps of each class of sizes, so that sizes that became
rare are remembered. The fit minimises relative absolute errors, so that single slow steps (a first
compile, a busy machine) do not matter.
"""

from collections import deque
from collections.abc import Sequence as Numbers
from typing import NamedTuple

import numpy as np

from serve_app.engine.scheduled_tokens import ScheduledTokens

NUM_STEPS = 5
"""Measured steps that are kept for each class of sizes."""
HALF_LIFE = 64
"""A measured step counts half after this many newer ones."""
MAX_UNFITTED = 16
"""Newer steps without which predictions may be made, if each was as predicted: a fit takes the
engine's thread half a millisecond, a good part of a small model's step."""
SURPRISE = 0.2
"""A step is as predicted up to this relative error."""
NUM_ROUNDS = 4
"""Rounds of reweighting, which turn least squares into least absolute errors."""


class StepShape(NamedTuple):
    """The sizes of a step on which its time depends."""

    num_decodes: int
    context_tokens: int
    """Tokens before the decodes, which their attention reads."""
    num_prompt_tokens: int
    num_scores: int
    """Pairs of a prompt token and a token that it attends to."""


def shape_of(scheduled: list[ScheduledTokens]) -> StepShape:
    """The sizes of a step."""
    num_decodes = context = num_prompt = num_scores = 0
    for part in scheduled:
        if part.is_decode:
            num_decodes += 1
            context += part.start
        else:
            num_prompt += part.num_tokens
            num_scores += _scores(part.start, part.num_tokens)
    return StepShape(num_decodes, context, num_prompt, num_scores)


class StepCost:
    """Learns with `observe` and predicts with `seconds`."""

    def __init__(self, few_tokens: int = 0) -> None:
        self.few_tokens = few_tokens
        self._decode = _LinearFit(3)
        self._few = _LinearFit(4)
        self._prompt = _LinearFit(4)
        self._has_mixed = False

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Records the device time of one step."""
        fit = self._decode
        if shape.num_prompt_tokens:
            fit = self._few if shape.num_prompt_tokens <= self.few_tokens else self._prompt
        fit.add(self._features(shape), seconds)
        self._has_mixed |= shape.num_prompt_tokens > 0 < shape.num_decodes

    def seconds(self, shape: StepShape) -> float:
        """The predicted time of a step; 0 before the first measurement of its kind."""
        if not shape.num_prompt_tokens:
            return self._decode.predict(self._features(shape))
        features = self._features(shape)
        return self._fit_of(shape.num_prompt_tokens).predict(features) + (
            0.0 if self._has_mixed else features[-1]
        )

    def num_tokens(self, start: int, seconds: float) -> int:
        """How many tokens of a prompt from `start` on fit into `seconds`.

        `seconds` is what a step may take without its fixed part and its decodes.
        """
        fitting = _fitting(self._fit_of(1), start, seconds)
        if fitting <= self.few_tokens:
            return fitting
        many = self._fit_of(self.few_tokens + 1)
        return max(self.few_tokens, _fitting(many, start, seconds - self._more_fixed))

    def chunk_seconds(self, start: int, num_tokens: int) -> float:
        """What `num_tokens` tokens of a prompt from `start` on add to a step."""
        _, token, score, _ = self._fit_of(num_tokens).weights
        added = token * num_tokens + score * _scores(start, num_tokens)
        return added if num_tokens <= self.few_tokens else added + self._more_fixed

    @property
    def _more_fixed(self) -> float:
        """The fixed part of a large step beyond that of one with a single prompt token."""
        return self._fit_of(self.few_tokens + 1).weights[0] - self._fit_of(1).weights[0]

    def _fit_of(self, num_prompt_tokens: int) -> "_LinearFit":
        """The coefficients for a step of this size; the other ones until it was measured."""
        fits = (self._few, self._prompt)
        if num_prompt_tokens > self.few_tokens:
            fits = (self._prompt, self._few)
        return fits[0] if fits[0].is_measured or not fits[1].is_measured else fits[1]

    def _features(self, shape: StepShape) -> tuple[float, ...]:
        if not shape.num_prompt_tokens:
            return 1.0, shape.num_decodes, shape.context_tokens
        decodes = 0.0
        if shape.num_decodes:
            decodes = self._decode.predict((1.0, shape.num_decodes, shape.context_tokens))
        return 1.0, shape.num_prompt_tokens, shape.num_scores, decodes


def _fitting(fit: "_LinearFit", start: int, seconds: float) -> int:
    """How many tokens of a prompt from `start` on add at most `seconds` to a step."""
    _, token, score, _ = fit.weights
    # token * n + score * (start * n + n * (n + 1) / 2) = seconds, solved without cancellation.
    linear = token + score * (start + 0.5)
    root = (linear * linear + 2 * score * max(seconds, 0.0)) ** 0.5
    return int(2 * max(seconds, 0.0) / max(linear + root, 1e-12))


def _scores(start: int, num_tokens: int) -> int:
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


class _LinearFit:
    """A linear function with coefficients of at least 0, fitted to recent observations."""

    def __init__(self, num_features: int) -> None:
        self._observed: dict[tuple[int, ...], deque[tuple[int, tuple[float, ...]]]] = {}
        self._num_observed = 0
        self._num_fitted = 0
        self._is_surprised = False
        self._weights: tuple[float, ...] = (0.0,) * num_features
        # All subsets of the features, as masks [subsets, features].
        subsets = np.arange(1 << num_features)[:, None] >> np.arange(num_features)
        self._subsets = (subsets & 1).astype(float)

    @property
    def is_measured(self) -> bool:
        """Whether there is an observation."""
        return self._num_observed > 0

    @property
    def weights(self) -> tuple[float, ...]:
        """The coefficients; fits again after a surprise, or where much was observed since."""
        if self._is_surprised or self._num_observed - self._num_fitted >= MAX_UNFITTED:
            self._num_fitted, self._is_surprised = self._num_observed, False
            self._fit()
        return self._weights

    def predict(self, features: Numbers[float]) -> float:
        return sum(w * x for w, x in zip(self.weights, features, strict=True))

    def add(self, features: tuple[float, ...], value: float) -> None:
        size = tuple(int(x).bit_length() for x in features[1:3])
        kept = self._observed.setdefault(size, deque(maxlen=NUM_STEPS))
        kept.append((self._num_observed, (*features, max(value, 1e-6))))
        self._num_observed += 1
        predicted = sum(w * x for w, x in zip(self._weights, features, strict=True))
        self._is_surprised |= abs(predicted - value) > SURPRISE * value

    def _fit(self) -> None:
        rows = [row for kept in self._observed.values() for row in kept]
        ages = self._num_observed - np.array([number for number, _ in rows])
        table = np.array([row for _, row in rows])
        x, y = table[:, :-1], table[:, -1]
        scale = np.maximum(x.max(axis=0), 1e-12)
        # Divided by y, all targets are 1 and the errors are relative.
        a = x / scale / y[:, None]
        importance = np.maximum(0.5 ** (ages / HALF_LIFE), 1e-3)
        reweight = np.ones(len(y))
        for _ in range(NUM_ROUNDS):
            w = self._least_squares(a, importance * reweight)
            reweight = 1 / np.maximum(np.abs(a @ w - 1), 0.02)
        self._weights = tuple((w / scale).tolist())

    def _least_squares(self, a: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """The `w` >= 0 with the least weighted squares of `a @ w - 1`: of the solutions for every
        subset of the coefficients, the best one without a negative coefficient."""
        size = a.shape[1]
        gram = (a * importance[:, None]).T @ a
        gram += np.eye(size) * (1e-9 * np.trace(gram))
        right = (a * importance[:, None]).sum(axis=0)
        keep = self._subsets
        grams = gram * keep[:, :, None] * keep[:, None, :]
        grams += np.eye(size) * (1 - keep)[:, None, :]
        solved = np.linalg.solve(grams, (right * keep)[:, :, None])[:, :, 0]
        losses = np.einsum("si,ij,sj->s", solved, gram, solved) - 2 * solved @ right
        losses[(solved < 0).any(axis=1)] = np.inf
        best: np.ndarray = solved[np.argmin(losses)]
        return best
