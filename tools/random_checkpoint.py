"""Writes a Mixtral checkpoint with random weights in our own form, with Mixtral's own tokenizer.

The writer of `mixtral-serve convert` writes weights that are generated one by one, so at most one
layer is in memory. All 32 layers take 25 GB. Codes and absmax are random as in `random_model`:
logits are finite, and the router chooses all experts equally often. A stopped run continues when it
is started again; a complete folder is not written again. The tokenizer comes from the package
mistral-common, so no network is needed.
"""

import argparse
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.convert import Progress, convert_checkpoint
from serve_app.model.checkpoint.source import Source
from serve_app.model.checkpoint.tensor_names import Weight
from serve_app.model.quantization import GROUP_SIZE, Quantization
from serve_app.model.quantize import QuantizedTensor, code_values
from tools import mixtral_tokenizer
from tools.random_model import MEAN_ABSMAX, MIXTRAL, SCALE, TINY

QUANTIZATION = Quantization("nf4", "bfloat16")


class RandomSource(Source):
    """Generates each weight when it is read. Equal names give equal weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._code_values = code_values(QUANTIZATION.quant_type, self._device)

    def read(self, weight: Weight) -> Tensor | QuantizedTensor:
        """Returns random codes, and absmax within a quarter of `MEAN_ABSMAX`; floats for float
        weights."""
        if not weight.is_quantized:
            return self.floats(weight)
        out_features, in_features = weight.shape
        random = self._generator(weight)
        # Whole words at a time, which is eight times as fast as bytes.
        words = torch.empty(out_features, in_features // 16, dtype=torch.int64, device=self._device)
        words.random_(generator=random)
        absmax = torch.empty(out_features, in_features // GROUP_SIZE, device=self._device)
        absmax.uniform_(0.75 * MEAN_ABSMAX, 1.25 * MEAN_ABSMAX, generator=random)
        return QuantizedTensor(words.view(torch.uint8), absmax.bfloat16(), self._code_values)

    def floats(self, weight: Weight) -> Tensor:
        """Returns bfloat16: 1 for norms, otherwise random with the standard deviation `SCALE`."""
        if len(weight.shape) == 1:
            return torch.ones(weight.shape, dtype=torch.bfloat16)
        values = torch.empty(weight.shape, dtype=torch.bfloat16, device=self._device)
        return values.normal_(std=SCALE, generator=self._generator(weight))

    def _generator(self, weight: Weight) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(zlib.crc32(weight.name.encode()))


def document_of(*, tiny: bool, layers: int | None) -> dict[str, Any]:
    """Returns the config.json of Mixtral 8x7B, or of a toy of two layers with its vocabulary.

    `layers` replaces the number of layers if it is given.
    """
    document = {"architectures": ["MixtralForCausalLM"], **(TINY if tiny else MIXTRAL)}
    document |= {"vocab_size": MIXTRAL["vocab_size"], "bos_token_id": 1, "eos_token_id": 2}
    if layers is not None:
        document["num_hidden_layers"] = layers
    return document


def write(folder: Path, document: Mapping[str, Any], progress: Progress | None = None) -> None:
    """Writes a checkpoint with the sizes of `document` into `folder`.

    Raises `ModelLoadFailed` if the disk is full or cannot be written.
    """
    with tempfile.TemporaryDirectory() as files:  # the small files, which `convert` copies
        checkpoint = Checkpoint.from_config(mixtral_tokenizer.write(Path(files)), document)
        source = RandomSource(checkpoint)
        convert_checkpoint(checkpoint, folder, QUANTIZATION, progress, source)


def main() -> None:
    """Runs `python -m tools.random_checkpoint FOLDER [--layers N] [--tiny]`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="instead of Mixtral's 32")
    parser.add_argument("--tiny", action="store_true", help="toy sizes with Mixtral's vocabulary")
    options = parser.parse_args()
    document = document_of(tiny=options.tiny, layers=options.layers)

    def report(done: int, total: int, name: str) -> None:
        print(f"{done} of {total} files", flush=True)

    try:
        write(options.folder, document, report)
    except ModelLoadFailed as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
