"""The tiny model: a real Mixtral checkpoint of under 8 MB, so that everything runs anywhere.

It has Mixtral's architecture, tokenizer format and chat template, and was trained by
`python -m tools.tiny.train` on dialogues that `corpus.py` writes. It answers those and nothing
else: it stands in for Mixtral's shape, never for its quality.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
"""The folder that `from_pretrained` and our own loader read."""
