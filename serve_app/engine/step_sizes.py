"""Sizes of steps that determine their memory. The module imports no torch, because the memory plan
uses it in processes without torch."""

CAPTURE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes of decode steps that are captured as CUDA graphs; above 128, every multiple of 64.
More sizes need more time to capture and save little, because padding rows are cheap."""
MAX_SCORED_TOKENS = 512
"""Maximum number of prompt tokens that one step scores. Their logits take 66 MB with 32,000 tokens
in the vocabulary."""
MAX_PIECE = 128
"""Rows of a step's scored tokens per log softmax: 16 MB with 32,000 tokens in the vocabulary."""


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Returns the batch sizes to capture for up to `max_num_seqs` sequences.

    Example: 9 gives [1, 2, 4, 8, 16].
    """
    sizes = [*CAPTURE_SIZES, *range(CAPTURE_SIZES[-1] + 64, max_num_seqs + 64, 64)]
    enough = next(i for i, size in enumerate(sizes) if size >= max_num_seqs)
    return sizes[: enough + 1]
