"""Batched sampling: logits in, one token for each sequence out, each by its own parameters.

Every operation touches only the rows that ask for it and treats each row alone, so what a request
gets is a function of its own logits, parameters, seed and output position: exactly the same in any
company. What depends on parameters alone is kept from step to step while the batch stays the same.
Knows no scheduling, and no text.
"""

import numpy as np
import torch
from torch import Tensor

from serve_app.engine import noise
from serve_app.engine.penalties import Penalties, has_penalty
from serve_app.engine.sequence import FAILED, Samples, SamplingParams, Sequence, TokenLogprob

_GREEDY_BELOW = 1e-6
"""A temperature under this is 0 for all that float32 can tell."""


class Sampler:
    """Samples for batches of sequences; remembers the last batch's parameters as tensors."""

    def __init__(self) -> None:
        self._batch: _Batch | None = None

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> Samples:
        """The next token of each sequence; see `start`."""
        return self.start(logits, sequences).samples()

    def start(
        self, logits: Tensor, sequences: list[Sequence], greedy: Tensor | None = None
    ) -> "Sampled":
        """The next token of each sequence from float32 `logits` [sequences, vocab], overwritten.

        The order of operations is that of `SamplingParams`. A row whose logits are not finite
        gives `FAILED`. Does not wait for the device, except where the batch is another one.
        `greedy` is what a batch without any parameters gets, where that is known.
        """
        batch = self._batch
        if batch is None or batch.sequences != sequences:
            batch = self._batch = _Batch(sequences, logits.shape[1], logits.device)
        if greedy is not None and batch.is_greedy:
            return Sampled(greedy, batch, None)
        raw_logprobs = logits[batch.logprob_rows].log_softmax(-1) if batch.logprob_rows else None
        batch.adjust(logits)
        tokens = best_tokens(logits)
        if batch.random is not None:
            rows = batch.random.rows
            tokens[rows] = torch.where(tokens[rows] < 0, FAILED, batch.random.sample(logits))
        return Sampled(tokens, batch, raw_logprobs)


def best_tokens(logits: Tensor) -> Tensor:
    """int64 `[rows]` from `logits` `[rows, vocab]`; `FAILED` where they are not finite."""
    # A NaN wins every maximum, so the best logit tells whether the row is sound.
    if logits.is_cuda:
        best, tokens = logits.max(-1)
        return tokens.masked_fill_(~best.isfinite(), FAILED)  # a number given to `where` is copied
    # On a CPU numpy's is ten times as fast.
    host = logits.numpy()
    ids = host.argmax(-1)
    is_sound = np.isfinite(host[np.arange(len(ids)), ids])
    return torch.from_numpy(np.where(is_sound, ids, FAILED))


class Sampled:
    """Tokens on the device, and what is still to be told of them."""

    def __init__(self, tokens: Tensor, batch: "_Batch", raw_logprobs: Tensor | None) -> None:
        self.tokens = tokens
        """int64 `[sequences]`; `FAILED` where the logits were not finite."""
        self._batch = batch
        self._raw_logprobs = raw_logprobs

    def samples(self, token_ids: list[int] | None = None) -> Samples:
        """On the host; waits for the device. `token_ids` are the tokens where they are known."""
        if token_ids is None:
            token_ids = self.tokens.tolist()
        if self._raw_logprobs is None:
            return Samples(token_ids, {})
        return Samples(token_ids, self._batch.logprobs(self._raw_logprobs, token_ids))


class _Batch:
    """The parameters of one batch, by the operation that needs them."""

    def __init__(self, sequences: list[Sequence], vocab_size: int, device: torch.device) -> None:
        self.sequences = list(sequences)
        params = [sequence.params for sequence in sequences]
        self.logprob_rows = [row for row, p in enumerate(params) if p.logprobs is not None]
        self._delayed = [(row, s) for row, s in enumerate(sequences) if s.params.min_tokens]
        penalised = [row for row, p in enumerate(params) if has_penalty(p)]
        self._penalties = (
            Penalties(penalised, [sequences[row] for row in penalised], vocab_size, device)
            if penalised
            else None
        )
        biases = [(row, *bias) for row, p in enumerate(params) for bias in p.logit_bias.items()]
        self._bias: tuple[Tensor, Tensor, Tensor] | None = None
        if biases:
            rows, ids, values = zip(*biases, strict=True)
            self._bias = (
                torch.tensor(rows, device=device),
                torch.tensor(ids, device=device),
                torch.tensor(values, dtype=torch.float32, device=device),
            )
        random = [row for row, p in enumerate(params) if p.temperature >= _GREEDY_BELOW]
        self.random = _Random(random, sequences, vocab_size, device) if random else None

    @property
    def is_greedy(self) -> bool:
        """Whether every row's token is that of its best logit, and nothing else is wanted."""
        parts = (self.random, self._bias, self._penalties)
        return not (any(part is not None for part in parts) or self._delayed or self.logprob_rows)

    def adjust(self, logits: Tensor) -> None:
        """Bias, penalties and the stops that come too early, in place."""
        if self._bias is not None:
            rows, ids, values = self._bias
            logits[rows, ids] += values
        if self._penalties is not None:
            self._penalties.apply(logits)
        for row, sequence in self._delayed:
            if sequence.num_generated < sequence.params.min_tokens:
                logits[row, list(sequence.stop_ids)] = -torch.inf

    def logprobs(self, raw: Tensor, token_ids: list[int]) -> dict[int, TokenLogprob]:
        """Of the rows `logprob_rows`, whose log probabilities `raw` [rows, vocab] are given."""
        chosen = torch.tensor([max(token_ids[row], 0) for row in self.logprob_rows])
        of_chosen = raw.gather(1, chosen.to(raw.device)[:, None])[:, 0].tolist()
        wanted = [self.sequences[row].params.logprobs or 0 for row in self.logprob_rows]
        found: dict[int, TokenLogprob] = {}
        # One `topk` for each count: which of two equals it returns may depend on the count.
        for num in set(wanted):
            group = [index for index, n in enumerate(wanted) if n == num]
            values, ids = raw[group].topk(min(num, raw.shape[1]))
            for index, row_values, row_ids in zip(
                group, values.tolist(), ids.tolist(), strict=True
            ):
                row = self.logprob_rows[index]
                best = sorted(zip(row_ids, row_values, strict=True), key=lambda t: (-t[1], t[0]))
                found[row] = TokenLogprob(token_ids[row], of_chosen[index], tuple(best))
        return found


class _Random:
    """The rows of a batch that are not greedy."""

    def __init__(
        self, rows: list[int], sequences: list[Sequence], vocab_size: int, device: torch.device
    ) -> None:
        self.rows = torch.tensor(rows, device=device)
        self._sequences = [sequences[row] for row in rows]
        params = [sequence.params for sequence in self._sequences]
        self._temperature = torch.tensor(
            [[p.temperature] for p in params], dtype=torch.float32, device=device
        )
        self._seeds = torch.tensor([noise.signed(s.seed) for s in self._sequences], device=device)
        filtered = [row for row, p in enumerate(params) if _is_filtered(p)]
        self._filtered = torch.tensor(filtered, device=device) if filtered else None
        self._filter = _Filter([params[row] for row in filtered], vocab_size, device)

    def sample(self, logits: Tensor) -> Tensor:
        """Tokens [rows] drawn from the rows' distributions."""
        scores = logits[self.rows] / self._temperature
        if self._filtered is not None:
            scores[self._filtered] = self._filter.apply(scores[self._filtered])
        positions = upload([s.num_generated for s in self._sequences], logits.device)
        return (noise.gumbel(self._seeds, positions, logits.shape[1]) + scores).argmax(-1)


class _Filter:
    """top_k, then top_p of what that leaves, then min_p: one threshold for each row.

    Equal logits are kept or dropped together, so their order in the vocabulary cannot matter.
    """

    def __init__(self, params: list[SamplingParams], vocab_size: int, device: torch.device) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._is_sorted = any(0 < p.top_k < vocab_size or p.top_p < 1 for p in params)
        last = [min(p.top_k, vocab_size) - 1 if p.top_k else vocab_size - 1 for p in params]
        self._last = torch.tensor(last, device=device)[:, None]
        # Rounding may carry the sum of all probabilities to 1 before the last token.
        self._top_p = column([p.top_p if p.top_p < 1 else torch.inf for p in params])
        self._log_min_p = column([p.min_p for p in params]).log()

    def apply(self, scores: Tensor) -> Tensor:
        """`scores` [rows, vocab] with -inf for the dropped tokens."""
        if self._is_sorted:
            ordered = _descending(scores)
            best = ordered[:, :1]
            kth = ordered.gather(1, self._last)
            probs = ordered.masked_fill(ordered < kth, -torch.inf).softmax(-1)
            is_kept = probs.cumsum(-1) - probs < self._top_p
            last = (is_kept.sum(-1, keepdim=True) - 1).clamp_(min=0)
            threshold = torch.maximum(kth, ordered.gather(1, last))
        else:
            best = scores.amax(-1, keepdim=True)
            threshold = torch.full_like(best, -torch.inf)
        threshold = torch.maximum(threshold, best + self._log_min_p)
        return scores.masked_fill(scores < threshold, -torch.inf)


def _descending(scores: Tensor) -> Tensor:
    """`scores` [rows, vocab], each row from its largest down."""
    if scores.is_cuda:
        return scores.sort(-1, descending=True).values
    # On a CPU numpy's takes half the time or less.
    return torch.from_numpy(np.sort(scores.neg().numpy(), axis=-1)).neg_()


def upload(values: list[int], device: torch.device) -> Tensor:
    """int64 `values` on `device`, without waiting for what the device has to do before."""
    # Through numpy: it reads a list five times as fast.
    tensor = torch.from_numpy(np.array(values, dtype=np.int64))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0
