"""StepCost: predicts the time of a step from measured steps.

A step that only decodes takes

    a + b * decodes + c * context tokens of the decodes

and a step with prompt tokens takes

    a + b * prompt tokens + c * attention scores of the prompt tokens + d * (time of the decodes).

All coefficients are at least 0. The fixed part `a` of a step with prompt tokens is large on a GPU
that unpacks all 4-bit weights for it, and small on a CPU. `d` is near 0 if a step with prompt
tokens reads all weights anyway, and 1 if decodes and prompts are computed one after the other. It
is 1 until a step with both is measured; a device that overlaps steps has no such step.

If a GPU unpacks weights while it computes the products, the step takes as long as the slower of the
two: the time is constant up to some thousand prompt tokens and grows from there. The fitted line
differs from this curve by at most a fifth.

Attention scores are pairs of a prompt token and a token that it attends to. Example: the prefill
chunk (512, 1024) has 512 * 512 + 512 * 513 / 2 = 393,472 scores.

A GPU may use other kernels for steps with up to `few_tokens` prompt tokens, which read the 4-bit
weights once per group of tokens and have a small fixed part. These steps have separate
coefficients.

The coefficients are fitted to the newest steps of each size class, so that rare sizes still count.
The fit minimizes relative absolute errors, so that single slow steps (a first compile, a busy
machine) have little effect.
"""

from collections import deque
from collections.abc import Sequence as Numbers
from typing import NamedTuple

import numpy as np

from serve_app.engine.scheduled_tokens import ScheduledTokens

NUM_STEPS = 5
"""Number of measured steps kept for each size class. Two steps are in one class if their features
have the same number of binary digits."""
HALF_LIFE = 64
"""The weight of a measured step halves with this many newer steps."""
MAX_UNFITTED = 16
"""The coefficients are fitted again after this many new steps, or after a step whose prediction
was wrong."""
MIN_FITTED_S = 0.025
"""The steps between two fits take at least this many seconds. A fit takes about 0.3 ms, so fits
take about 1 % of the time of steps at most. Example: on a machine with noisy step times, most
predictions of steps of 1 ms are wrong. The coefficients are then fitted every 25 steps; with steps
of 25 ms or more they are fitted after each wrong prediction."""
MAX_RELATIVE_ERROR = 0.2
"""A prediction is wrong if its relative error is larger."""
NUM_ROUNDS = 4
"""Rounds of iteratively reweighted least squares, which approximates least absolute errors."""


class StepShape(NamedTuple):
    """The sizes of a step that determine its time."""

    num_decodes: int
    context_tokens: int
    """Total number of tokens that the decodes attend to."""
    num_prompt_tokens: int
    num_scores: int
    """Number of attention scores: pairs of a prompt token and a token that it attends to."""


def shape_of(scheduled: list[ScheduledTokens]) -> StepShape:
    """Returns the sizes of a step."""
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
    """`observe` records measured steps; `seconds`, `num_tokens` and `chunk_seconds` predict."""

    def __init__(self, few_tokens: int = 0) -> None:
        """`few_tokens`: see `Runner.few_prompt_tokens`."""
        self.few_tokens = few_tokens
        self._decode = _LinearFit(3)
        self._few = _LinearFit(4)
        self._prompt = _LinearFit(4)
        self._has_mixed = False

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Records the device time of one step, in seconds."""
        fit = self._decode
        if shape.num_prompt_tokens:
            fit = self._few if shape.num_prompt_tokens <= self.few_tokens else self._prompt
        fit.add(self._features(shape), seconds)
        self._has_mixed |= shape.num_prompt_tokens > 0 < shape.num_decodes

    def seconds(self, shape: StepShape) -> float:
        """Returns the predicted seconds of a step; 0 before the first measurement of its kind."""
        if not shape.num_prompt_tokens:
            return self._decode.predict(self._features(shape))
        features = self._features(shape)
        return self._fit_of(shape.num_prompt_tokens).predict(features) + (
            0.0 if self._has_mixed else features[-1]
        )

    def num_tokens(self, start: int, seconds: float) -> int:
        """Returns the number of tokens of a prompt, from `start` on, that take `seconds`.

        `seconds` excludes the fixed part of the step and its decodes. Example with `few_tokens`
        500: a small step, up to 500 tokens, takes 5 ms + 0.4 ms per token; a large step takes
        60 ms + 0.1 ms per token. In 100 ms a small step computes 100 / 0.4 = 250 tokens. In 300 ms
        it would compute 750, too many for a small step. The fixed part of a large step is 55 ms
        longer, so it computes (300 - 55) / 0.1 = 2,450 tokens.
        """
        fitting = _fitting(self._fit_of(1), start, seconds)
        if fitting <= self.few_tokens:
            return fitting
        many = self._fit_of(self.few_tokens + 1)
        return max(self.few_tokens, _fitting(many, start, seconds - self._extra_fixed_s))

    def chunk_seconds(self, start: int, num_tokens: int) -> float:
        """Returns the seconds that `num_tokens` prompt tokens from `start` on add to a step."""
        _, token, score, _ = self._fit_of(num_tokens).weights
        added = token * num_tokens + score * _scores(start, num_tokens)
        return added if num_tokens <= self.few_tokens else added + self._extra_fixed_s

    @property
    def _extra_fixed_s(self) -> float:
        """Fixed part of a large step minus the fixed part of a small step, in seconds."""
        return self._fit_of(self.few_tokens + 1).weights[0] - self._fit_of(1).weights[0]

    def _fit_of(self, num_prompt_tokens: int) -> "_LinearFit":
        """Returns the fit for a step of this size, or the other fit if only that is measured."""
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
    """Returns how many tokens of a prompt, from `start` on, add at most `seconds` to a step."""
    _, token, score, _ = fit.weights
    # token * n + score * (start * n + n * (n + 1) / 2) = seconds, solved without cancellation.
    linear = token + score * (start + 0.5)
    root = (linear * linear + 2 * score * max(seconds, 0.0)) ** 0.5
    return int(2 * max(seconds, 0.0) / max(linear + root, 1e-12))


def _scores(start: int, num_tokens: int) -> int:
    """Returns the attention scores of `num_tokens` tokens from `start` on (causal)."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


class _LinearFit:
    """A linear function with coefficients of at least 0, fitted to recent observations."""

    def __init__(self, num_features: int) -> None:
        self._observed: dict[tuple[int, ...], deque[tuple[int, tuple[float, ...]]]] = {}
        self._num_observed = 0
        self._num_fitted = 0
        # Seconds of the steps since the last fit. The first fit is due at once.
        self._unfitted_s = MIN_FITTED_S
        self._is_inaccurate = False
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
        """The coefficients, fitted again if a prediction was wrong or many steps are new.

        Not fitted again before the new steps have taken `MIN_FITTED_S`.
        """
        is_due = self._is_inaccurate or self._num_observed - self._num_fitted >= MAX_UNFITTED
        if is_due and self._unfitted_s >= MIN_FITTED_S:
            self._num_fitted, self._is_inaccurate = self._num_observed, False
            self._unfitted_s = 0.0
            self._fit()
        return self._weights

    def predict(self, features: Numbers[float]) -> float:
        return sum(w * x for w, x in zip(self.weights, features, strict=True))

    def add(self, features: tuple[float, ...], value: float) -> None:
        size = tuple(int(x).bit_length() for x in features[1:3])
        observations = self._observed.setdefault(size, deque(maxlen=NUM_STEPS))
        observations.append((self._num_observed, (*features, max(value, 1e-6))))
        self._num_observed += 1
        self._unfitted_s += value
        predicted = sum(w * x for w, x in zip(self._weights, features, strict=True))
        self._is_inaccurate |= abs(predicted - value) > MAX_RELATIVE_ERROR * value

    def _fit(self) -> None:
        rows = [row for observations in self._observed.values() for row in observations]
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
        """Returns the `w` >= 0 that minimizes the weighted squares of `a @ w - 1`.

        Solves the problem for every subset of the coefficients, with the others 0, and returns the
        best solution without a negative coefficient.
        """
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
