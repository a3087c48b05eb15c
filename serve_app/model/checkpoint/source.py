"""The weights of a float or bitsandbytes checkpoint, one by one, under one set of names.

Every weight has the name of transformers 4's float checkpoints (one tensor per expert), however
the files hold it. What is quantised in the files is never dequantised. Holds nothing that it has
handed out: files are read, not mapped, because pages of a mapped file count as this process's
memory for as long as it is mapped, and one shard of Mixtral has 5 GB of them.
"""

import torch
from torch import Tensor

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.bnb4 import PackedInfo
from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.shards import TensorInfo, read_into
from serve_app.model.nf4 import Nested, Quantized

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I8": torch.int8,
}
"""Of safetensors' names."""


class Source:
    """Reads what a `Checkpoint` of form "float" or "bitsandbytes" describes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._stacked = any(".mlp.experts." in name for name in checkpoint.tensors)
        self._code: Tensor | None = None
        self._nested_code: Tensor | None = None

    def float(self, name: str) -> Tensor:
        """A weight that is not quantised, on the CPU, in the dtype that it is stored in.

        float64 becomes float32: nothing computes with it, and our own form does not have it.
        """
        if self._stacked and ".block_sparse_moe." in name:
            weight = self._from_stack(name)
        else:
            weight = self._read(self.checkpoint.tensors[name])
        return weight.float() if weight.dtype == torch.float64 else weight

    def quantized(self, name: str) -> Quantized:
        """A weight `[N, K]` that is quantised in the files, as it is there, on the CPU.

        All of them share the tables `code` and `nested.code`; a checkpoint whose matrices have
        different ones is refused.
        """
        info = self.checkpoint.packed[name]
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
        return self.quantized(name) if name in self.checkpoint.packed else self.float(name)

    def _from_stack(self, name: str) -> Tensor:
        """Of transformers 5's stacked experts, the part that `name` had before."""
        layer, _, rest = name.partition(".block_sparse_moe.")
        match rest.split("."):
            case ["gate", "weight"]:
                return self._read(self.checkpoint.tensors[f"{layer}.mlp.gate.weight"])
            case ["experts", expert, "w2", "weight"]:
                down = self.checkpoint.tensors[f"{layer}.mlp.experts.down_proj"]
                return self._read(down, int(expert), down.shape[0])
            case ["experts", expert, "w1" | "w3" as half, "weight"]:
                gate_up = self.checkpoint.tensors[f"{layer}.mlp.experts.gate_up_proj"]
                part = 2 * int(expert) + (half == "w3")
                return self._read(gate_up, part, 2 * gate_up.shape[0])
        raise AssertionError(f"{name} is no weight")

    def _read(self, tensor: TensorInfo, part: int = 0, num_parts: int | None = None) -> Tensor:
        """A tensor of the files, or, of a stack of matrices, one of its `num_parts` parts."""
        shape = tensor.shape
        if num_parts is not None:
            shape = (tensor.shape[0] * tensor.shape[1] // num_parts, *tensor.shape[2:])
        weight = torch.empty(shape, dtype=DTYPES[tensor.dtype])
        begin = tensor.begin + part * weight.nbytes
        read_into(tensor.file, begin, weight.view(-1).view(torch.uint8).numpy().data)
        return weight

    def _same_table(self, of: PackedInfo, table: TensorInfo, known: Tensor | None) -> Tensor:
        values = self._read(table).flatten()
        if known is None or torch.equal(values, known):
            return values if known is None else known
        raise ModelLoadFailed(
            f"{of.packed.file}: tensor `{table.name}` differs from that "
            "of other weights; all weights must be quantised with the same values."
        )
