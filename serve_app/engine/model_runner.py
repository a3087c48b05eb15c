"""ModelRunner: computes steps with a Mixtral, its KV cache and the sampler.

A step is computed in one of three ways:

- On a CPU in float32: one call of compiled C (`CpuStep`).
- On a GPU: kernels for decodes (`GpuStep`), replayed as CUDA graphs, and kernels for prefill chunks
  (`PromptStep`). Decodes and prefill chunks are separate steps.
- Otherwise: the model in torch (`Mixtral`).
"""

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serve_app.engine.block_tables import BlockTables
from serve_app.engine.decode_graphs import DecodeGraphs
from serve_app.engine.device_sampler import DeviceSampler
from serve_app.engine.in_flight_tokens import InFlightTokens
from serve_app.engine.prompt_scores import PromptScores
from serve_app.engine.sampler import Sampler
from serve_app.engine.sampler_trial import verified_sampler
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.sequence import PENDING
from serve_app.engine.step_sizes import capture_sizes
from serve_app.engine.step_timer import StepTimer
from serve_app.engine.transfer import tensor_to_device, to_device
from serve_app.model.batch import Batch
from serve_app.model.kernels.cpu.cpu_step import CpuStep
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.kv import KVCache
from serve_app.model.mixtral import Mixtral

if TYPE_CHECKING:  # that module imports triton, which not every machine has
    from serve_app.model.kernels.triton.gpu_step import GpuStep
    from serve_app.model.kernels.triton.prompt_step import PromptStep


class ModelRunner:
    """A `Runner` for one model on `device`, with a KV cache of its own."""

    def __init__(
        self,
        model: Mixtral,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_num_seqs: int = 128,
        experts_at_once: int = 1,
        enforce_eager: bool = False,
        max_threads: int = 1,
    ) -> None:
        """`dtype` is the type of the KV cache. At most `max_num_seqs` sequences decode in one step.

        Prefill chunks on a GPU unpack the 4-bit weights of `experts_at_once` experts at a time.
        With `enforce_eager`, decode steps are not captured as CUDA graphs. `max_threads` limits the
        threads of a compiled step on a CPU.
        """
        self.model = model
        self.cache = KVCache.allocate(model.config, num_blocks, block_size, dtype, device)
        self.notes: list[str] = []
        """Sentences for `/health`: how steps are computed, and why."""
        self._block_size = block_size
        self._device = device
        # Two, because decodes and prefill chunks alternate and each keeps its last tables.
        self._tables, self._decode_tables = BlockTables(), BlockTables()
        self.sampler: Sampler | DeviceSampler = Sampler()
        """The sampler, which maps logits to tokens."""
        self._last: InFlightTokens | None = None
        self._cpu_step: CpuStep | None = None
        self._gpu_step: GpuStep | None = None
        self._prompt_step: PromptStep | None = None
        self._graphs: DecodeGraphs | None = None
        self._experts_at_once = experts_at_once
        self._choose_step(max_num_seqs, enforce_eager, max_threads)

    def _choose_step(self, max_num_seqs: int, enforce_eager: bool, max_threads: int) -> None:
        """Chooses how steps are computed, and adds to `notes`."""
        step: CpuStep | GpuStep
        try:
            if self._device.type == "cuda":
                step = _gpu_step(self.model, self.cache, max_num_seqs)
            else:
                step = CpuStep.verified(self.model, self.cache, max_threads)
        except StepUnavailable as reason:
            self.notes.append(f"steps run in plain torch, not in compiled code: {reason}")
            return
        if isinstance(step, CpuStep):
            self._cpu_step = step
            threads = f"; long steps use up to {max_threads} threads" if max_threads > 1 else ""
            self.notes.append(f"a step is one call of compiled code{threads}")
            return
        self._gpu_step = step
        sampling = self._choose_sampler(max_num_seqs)
        captured = self._capture(step, max_num_seqs, enforce_eager)
        self.notes += [step.note, captured, sampling, self._choose_prompt_step()]
        self.notes += step.unpack_for_prompts()

    def _choose_sampler(self, max_num_seqs: int) -> str:
        """Sets the sampler. Returns a note about it."""
        products = self.model.products
        if products is None or products.make_sampler is None:
            return "tokens are sampled in plain torch: the CUDA kernels are not used"
        try:
            kernel = products.make_sampler(capture_sizes(max_num_seqs)[-1])
            self.sampler = verified_sampler(kernel, self.vocab_size, self._device)
        except StepUnavailable as reason:
            return f"tokens are sampled in plain torch: {reason}"
        return "tokens are sampled by one kernel"

    def _choose_prompt_step(self) -> str:
        """Sets the step for prefill chunks. Returns a note about it."""
        from serve_app.model.kernels.triton.prompt_step import PromptStep

        try:
            self._prompt_step = PromptStep.verified(self.model, self.cache, self._experts_at_once)
        except StepUnavailable as reason:
            return f"prompts run in plain torch: {reason}"
        return f"prompts: {self._prompt_step.note}"

    def _capture(self, step: "GpuStep", max_num_seqs: int, enforce_eager: bool) -> str:
        """Captures the decode steps, or only compiles them. Returns a note about them."""
        longest = -(-self.model.config.max_position_embeddings // self._block_size) + 1
        sizes = (max_num_seqs, min(self.cache.num_blocks, longest), self._block_size)
        sampler = self.sampler if isinstance(self.sampler, DeviceSampler) else None
        try:
            self._graphs = DecodeGraphs.captured(
                step, *sizes, self._device, sampler, is_eager=enforce_eager
            )
        except StepUnavailable as reason:
            return f"decode steps are launched kernel by kernel: {reason}"
        if enforce_eager:
            return "decode steps are launched kernel by kernel: `engine.enforce_eager` is set"
        return (
            f"decode steps are CUDA graphs, one for each of {len(self._graphs.sizes)} batch sizes"
        )

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def can_overlap_steps(self) -> bool:
        """See `Runner`. `launch` returns before the step is done on a GPU, and after it on a
        CPU."""
        return self._device.type == "cuda"

    @property
    def few_prompt_tokens(self) -> int:
        """See `Runner`."""
        return 0 if self._prompt_step is None else self._prompt_step.few_tokens

    @torch.inference_mode()
    def launch(self, scheduled: list[ScheduledTokens]) -> InFlightTokens:
        """Starts a step; see `Runner`."""
        timer = StepTimer(self._device)
        sequences = [part.sequence for part in scheduled if part.is_sampled]
        tokens: Tensor | None = None
        if self._graphs is not None and all(part.is_decode for part in scheduled):
            tables = self._decode_tables.of(scheduled)
            logits, tokens = self._graphs.run(scheduled, self._last, tables)
        else:
            logits = self._logits(scheduled)
        num_sampled = len(sequences)
        scores = None
        if len(logits) > num_sampled:
            scores = PromptScores(scheduled, logits[num_sampled:])
        self._last = self.sampler.sample(logits[:num_sampled], sequences, tokens)
        self._last.prompt_scores = scores
        timer.stop()
        self._last.timer = timer
        return self._last

    @torch.inference_mode()
    def prefill_logits(self, batch: Batch) -> Tensor:
        """Computes `batch` as prefill chunks. Returns float32 logits `[sample_rows, vocab]`."""
        if self._cpu_step is not None:
            return self._cpu_step.logits(batch)
        if self._prompt_step is not None:
            return self._prompt_step.logits(batch)
        logits: Tensor = self.model(batch, self.cache)
        return logits

    @torch.inference_mode()
    def clear_blocks(self, blocks: list[int]) -> None:
        """See `Runner`."""
        self.cache.clear(to_device(blocks, self._device))

    def _logits(self, scheduled: list[ScheduledTokens]) -> Tensor:
        """Returns float32 `[sampled + scored, vocab]`: the rows to sample, then those to score.

        Both are in the order of `scheduled`.
        """
        batch = self._batch(scheduled)
        if self._gpu_step is not None and all(part.num_tokens == 1 for part in scheduled):
            return self._gpu_step.decode(batch)[batch.sample_rows]
        return self.prefill_logits(batch)

    def _batch(self, scheduled: list[ScheduledTokens]) -> Batch:
        size = self._block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sample_rows: list[int] = []
        score_rows: list[int] = []
        for part in scheduled:
            sequence, start, end, is_sampled = part
            if num_scored := part.num_scored:
                first = len(token_ids) + part.first_scored - start
                score_rows += range(first, first + num_scored)
            table = sequence.block_table
            token_ids += sequence.token_ids[start:end]
            positions += range(start, end)
            slots += [table[p // size] * size + p % size for p in range(start, end)]
            if is_sampled:
                sample_rows.append(len(token_ids) - 1)
        # Packed into one tensor, so that one copy to the device suffices.
        lists = (token_ids, positions, slots, sample_rows + score_rows)
        packed = to_device(list(chain(*lists)), self._device)
        parts = packed.split_with_sizes([len(values) for values in lists])
        if PENDING in token_ids:
            self._feed(scheduled, parts[0])
        return Batch(
            token_ids=parts[0],
            positions=parts[1],
            slots=parts[2],
            query_lens=[part.num_tokens for part in scheduled],
            context_lens=[part.end for part in scheduled],
            block_tables=tensor_to_device(self._tables.of(scheduled), self._device),
            sample_rows=parts[3],
        )

    def _feed(self, scheduled: list[ScheduledTokens], token_ids: Tensor) -> None:
        """Replaces `PENDING` in `token_ids` `[tokens]` on the device with the last step's."""
        assert self._last is not None, "a token is pending, and no step was launched"
        rows, sources, end = [], [], 0
        for part in scheduled:
            end += part.num_tokens
            if part.sequence.token_ids[part.end - 1] == PENDING:
                rows.append(end - 1)
                sources.append(self._last.row_of[part.sequence])
        where = to_device([*rows, *sources], self._device).view(2, -1)
        # FAILED (-1) is not a token id. Its sequence ends when the host reads the token.
        token_ids[where[0]] = self._last.tokens[where[1]].clamp(min=0)


def _gpu_step(model: Mixtral, cache: KVCache, max_num_seqs: int) -> "GpuStep":
    """Returns the decode step of Triton kernels. Raises `StepUnavailable` if it cannot be used."""
    try:
        from serve_app.model.kernels.triton.gpu_step import GpuStep
    except ImportError as error:
        raise StepUnavailable(f"its kernels cannot be imported ({error})") from None
    return GpuStep.verified(model, cache, max_num_seqs)
