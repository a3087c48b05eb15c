"""StepThreads: chooses the number of threads for a compiled step on a CPU.

The number is proportional to the step's work: one thread for each `PRODUCTS_PER_THREAD`
multiplications. So a long step, such as a prefill chunk of a few hundred tokens, uses all cores. A
short step, such as the decodes of a few sequences, leaves cores for network I/O; more threads would
gain little, because threads wait for each other three times per layer.
"""

from typing import TYPE_CHECKING

from serve_app.model.batch import Batch

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral

PRODUCTS_PER_THREAD = 100_000_000
"""Multiplications per thread, which take about 2 ms on one core. The tiny model's prompts use two
threads from about 220 tokens on. In a shorter step, waiting for a thread that the system has
interrupted would cost more than the threads save."""
MIN_ROWS_PER_THREAD = 4
"""Number of rows that one thread computes together, so that it reads the weights once for all of
them."""


class StepThreads:
    """Counts the multiplications of one model's steps."""

    def __init__(self, model: "Mixtral", max_threads: int) -> None:
        """`max_threads` is the maximum for all steps."""
        config = model.config
        width = config.head_dim * config.num_attention_heads
        projections = 2 * width + 2 * config.head_dim * config.num_key_value_heads
        experts = 3 * config.intermediate_size * config.num_experts_per_tok
        self.max_threads = max_threads
        self._row = config.num_hidden_layers * config.hidden_size * (projections + experts)
        self._sampled_row = config.hidden_size * config.vocab_size
        self._score = config.num_hidden_layers * 2 * width
        self._window = config.sliding_window or config.max_position_embeddings

    def of(self, batch: Batch) -> int:
        """Returns the number of threads for the step of `batch`."""
        num_rows = len(batch.token_ids)
        num_useful = self._num_products(batch) // PRODUCTS_PER_THREAD
        return max(1, min(self.max_threads, num_useful, -(-num_rows // MIN_ROWS_PER_THREAD)))

    def _num_products(self, batch: Batch) -> int:
        """Returns the number of multiplications of a step, with weights and in attention."""
        scores = sum(
            count * min(end - count // 2, self._window)
            for count, end in zip(batch.query_lens, batch.context_lens, strict=True)
        )
        rows = len(batch.token_ids) * self._row + len(batch.sample_rows) * self._sampled_row
        return rows + scores * self._score
