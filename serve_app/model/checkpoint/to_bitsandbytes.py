"""Converts a fused checkpoint back to bitsandbytes' form, layer by layer.

The names and tensors are those of transformers 4. Codes and absmax have the same bits as in the
source; bfloat16 absmax becomes float32, which is exact. A router or an lm_head that had 4 bits in
the source keeps floats.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve_app.model.checkpoint.bnb4 import STATE
from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.fused import (
    NESTED_ABSMAX,
    NESTED_CODE,
    NESTED_OFFSET,
    SOURCE,
    SOURCE_ABSMAX,
)
from serve_app.model.checkpoint.fused_reader import read_files
from serve_app.model.checkpoint.fused_writer import empty_weight, write_tensors
from serve_app.model.checkpoint.shards import FLOAT_DTYPES, Header
from serve_app.model.checkpoint.source import DTYPES
from serve_app.model.checkpoint.tensor_names import (
    CODEBOOK,
    ModuleWeight,
    Weight,
    module_weights,
)
from serve_app.model.quantization import (
    GROUP_SIZE,
    NESTED_GROUP_SIZE,
    Quantization,
    num_nested_groups,
)
from serve_app.model.quantized_weight import Codebook

DTYPE_NAMES = {stored: name for name, stored in FLOAT_DTYPES.items() if "." not in name}
"""dtypes in bitsandbytes' description of a weight, by safetensors' names."""


def bitsandbytes_config(quantization: Quantization) -> dict[str, Any]:
    """Returns the `quantization_config` that transformers 4 wrote."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quantization.quant_type,
        "bnb_4bit_use_double_quant": quantization.absmax == "nested",
        "llm_int8_skip_modules": ["lm_head", "gate"],
    }


class BackToBitsandbytes:
    """Writes the files of one fused checkpoint in bitsandbytes' form."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.quantization is not None
        self._config, self._quantization = checkpoint.config, checkpoint.quantization
        self._float_dtype = checkpoint.tensors["model.embed_tokens.weight"].dtype
        self._tables = self._read(
            {file: header for file, header in checkpoint.headers.items()},
            {f"{CODEBOOK}.code", NESTED_CODE},
        )
        self._codebook = Codebook(self._quantization.quant_type)
        self._codebook.code.copy_(self._tables[f"{CODEBOOK}.code"])

    def write(self, file: Path, header: Header, target: Path, fingerprint: str) -> None:
        """Writes the weights of the fused `file` to `target`, and verifies their checksums."""
        stored = self._read({file: header}, set(header.tensors))
        tensors: dict[str, Tensor] = {}
        for entry in module_weights(self._config):
            if f"{entry.fused_name}.packed" in stored:
                tensors |= self._quantized(entry, stored)
            elif entry.fused_name in stored:
                tensors[entry.weights[0].name] = stored[entry.fused_name]
        write_tensors(target, tensors, {"format": "pt", SOURCE: fingerprint})

    def _read(self, headers: dict[Path, Header], names: set[str]) -> dict[str, Tensor]:
        tensors = {
            name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
            for header in headers.values()
            for name, tensor in header.tensors.items()
            if name in names
        }
        read_files(headers, tensors, lambda num_bytes: None)
        return tensors

    def _quantized(self, entry: ModuleWeight, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = empty_weight(entry, self._codebook)
        weight.packed, weight.absmax = (
            stored[f"{entry.fused_name}.{name}"] for name in ("packed", "absmax")
        )
        tensors: dict[str, Tensor] = {}
        for part in entry.weights:
            index = () if part.expert is None else (part.expert,)
            matrix = weight.part(index, part.index)
            name, state = part.name, self._state(part)
            tensors[name] = matrix.packed.view(-1, 1)
            tensors[f"{name}.absmax"] = matrix.absmax.float().flatten()
            tensors[f"{name}.quant_map"] = self._codebook.code.clone()
            source_absmax = stored.get(f"{entry.fused_name}.{SOURCE_ABSMAX}")
            if source_absmax is not None:
                tensors[f"{name}.absmax"] = source_absmax[index][part.rows].flatten()
            if NESTED_CODE in self._tables:
                groups = stored[f"{entry.fused_name}.{NESTED_ABSMAX}"][index]
                counts = [num_nested_groups(n * part.shape[-1]) for n in entry.out_features]
                tensors[f"{name}.nested_absmax"] = torch.split(groups, counts)[part.index].clone()
                tensors[f"{name}.nested_quant_map"] = self._tables[NESTED_CODE].clone()
                offset = stored[f"{entry.fused_name}.{NESTED_OFFSET}"][index][part.index]
                state["nested_blocksize"] = NESTED_GROUP_SIZE
                state["nested_dtype"] = "float32"
                state["nested_offset"] = float(offset)
            blob = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
            tensors[f"{name}.{STATE}{self._quantization.quant_type}"] = blob
        return tensors

    def _state(self, weight: Weight) -> dict[str, Any]:
        """Returns bitsandbytes' description of a weight, without the keys of nested absmax."""
        return {
            "quant_type": self._quantization.quant_type,
            "blocksize": GROUP_SIZE,
            "dtype": DTYPE_NAMES[self._float_dtype],
            "shape": list(weight.shape),
        }
