"""The weights of a float or bitsandbytes checkpoint, one by one, under one set of names.

Every weight has the name of transformers 4's float checkpoints (one tensor per expert), however
the files hold it. What is quantised in the files is never dequantised.
"""

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serve_app.errors import ModelLoadFailed
from serve_app.model.bnb4 import PackedInfo
from serve_app.model.checkpoint import Plan
from serve_app.model.nf4 import Nested, Quantized
from serve_app.model.shards import TensorInfo

MAX_MAPPED = 1
"""Files mapped at once: pages that were read count as this process's memory until the file is let
go, and one shard of Mixtral is 5 GB. Tensors come in the order of the files."""


class Source:
    """Reads what a `Plan` of form "float" or "bitsandbytes" describes, from mapped files."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._files: dict[Path, Any] = {}
        self._stacked = any(".mlp.experts." in name for name in plan.tensors)
        self._code: Tensor | None = None
        self._nested_code: Tensor | None = None

    def float(self, name: str) -> Tensor:
        """A weight that is not quantised, on the CPU, in the dtype that it is stored in.

        float64 becomes float32: nothing computes with it, and our own form does not have it.
        """
        if self._stacked and ".block_sparse_moe." in name:
            weight = self._from_stack(name)
        else:
            weight = self._read(self.plan.tensors[name])
        return weight.float() if weight.dtype == torch.float64 else weight

    def quantized(self, name: str) -> Quantized:
        """A weight `[N, K]` that is quantised in the files, as it is there, on the CPU.

        All of them share the tables `code` and `nested.code`; a checkpoint whose matrices have
        different ones is refused.
        """
        info = self.plan.packed[name]
        rows, columns = info.shape
        packed = self._read(info.packed).view(torch.uint8).view(rows, columns // 2)
        absmax = self._read(info.absmax).view(rows, -1)
        self._code = self._same_table(info, info.code, self._code)
        if info.nested is None:
            return Quantized(packed, absmax, self._code)
        self._nested_code = self._same_table(info, info.nested.code, self._nested_code)
        nested = Nested(
            self._read(info.nested.absmax).flatten(),
            self._nested_code,
            torch.tensor(info.nested.offset, dtype=torch.float32),
        )
        return Quantized(packed, absmax, self._code, nested)

    def weight(self, name: str) -> Tensor | Quantized:
        """`quantized` or `float`, whichever the weight is in the files."""
        return self.quantized(name) if name in self.plan.packed else self.float(name)

    def close(self) -> None:
        """Unmaps the files; tensors already read stay valid."""
        self._files.clear()

    def _from_stack(self, name: str) -> Tensor:
        """Of transformers 5's stacked experts, the part that `name` had before."""
        layer, _, rest = name.partition(".block_sparse_moe.")
        match rest.split("."):
            case ["gate", "weight"]:
                return self._read(self.plan.tensors[f"{layer}.mlp.gate.weight"])
            case ["experts", expert, "w2", "weight"]:
                down = self.plan.tensors[f"{layer}.mlp.experts.down_proj"]
                return self._read(down, int(expert))
            case ["experts", expert, half, "weight"]:
                gate_up = self.plan.tensors[f"{layer}.mlp.experts.gate_up_proj"]
                both = self._read(gate_up, int(expert))
                return both.chunk(2)[0 if half == "w1" else 1]
        raise AssertionError(f"{name} is no weight")

    def _read(self, tensor: TensorInfo, index: int | None = None) -> Tensor:
        try:
            file = self._open(tensor.file)
            if index is not None:
                return cast(Tensor, file.get_slice(tensor.name)[index])
            return cast(Tensor, file.get_tensor(tensor.name))
        except (OSError, SafetensorError) as error:
            raise ModelLoadFailed(f"{tensor.file}: cannot be read ({error}).") from None

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            if len(self._files) == MAX_MAPPED:
                del self._files[next(iter(self._files))]
            self._files[path] = safe_open(path, framework="pt", device="cpu")
        return self._files[path]

    def _same_table(self, of: PackedInfo, table: TensorInfo, known: Tensor | None) -> Tensor:
        values = self._read(table).flatten()
        if known is None or torch.equal(values, known):
            return values if known is None else known
        raise ModelLoadFailed(
            f"{of.packed.file}: tensor `{table.name}` differs from that "
            "of other weights; all weights must be quantised with the same values."
        )
