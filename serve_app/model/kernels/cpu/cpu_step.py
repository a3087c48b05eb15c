"""CpuStep: the forward pass of a float32 Mixtral on a CPU in one call of C, see `_cpu_step.c`.

Its logits equal those of `model/mixtral.py` up to float32 rounding. A token gets the same bits in
any batch, in any prefill chunk and with any number of threads. The call releases the interpreter
lock, so that the server can answer while it computes. The library is built at installation if there
is a C compiler, and compared with plain torch before it is used. The step keeps a second,
transposed copy of the weights.
"""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.batch import Batch
from serve_app.model.experts import Experts
from serve_app.model.kernels.cpu.step_threads import StepThreads
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.kv import KVCache
from serve_app.model.linear import Linear, QuantizedLinear

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral

LANES = 16
"""Number of float32 values in a vector register. The sizes of sums must be multiples of it."""
MAX_WEIGHT_BYTES = 500_000_000
"""Maximum bytes of the weights of a model that uses this step, which needs a second copy."""
TOLERANCE = 1e-4
"""Maximum relative error compared with plain torch on this processor."""
POINTER, INT = ctypes.c_void_p, ctypes.c_int64


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, POINTER)
        for name in (
            "input_layernorm",
            "qkv",
            "o",
            "post_attention_layernorm",
            "router",
            "gate_up",
            "down",
            "keys",
            "values",
        )
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, INT) for name in ("inner", "experts", "top_k", "vocab", "block_size", "window")),
        ("eps", ctypes.c_float),
        *((name, POINTER) for name in ("embedding", "norm", "head", "cos", "sin")),
        ("layers", ctypes.POINTER(_Layer)),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("count", "num_sampled", "table_width")),
        *((name, POINTER) for name in ("token_ids", "positions", "slots", "owners")),
        *((name, POINTER) for name in ("sampled", "tables")),
    ]


class CpuStep:
    """The step of one model with one KV cache. The C code accesses their memory by address."""

    def __init__(
        self, library: ctypes.CDLL, model: "Mixtral", cache: KVCache, max_threads: int
    ) -> None:
        config = model.config
        layers = [
            (*_weights(layer), keys, values)
            for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True)
        ]
        head = transposed(model.embedding if model.lm_head is None else _float(model.lm_head))
        tables = (model.embedding, model.norm.weight, head, model.rope.cos, model.rope.sin)
        # Keeps the tensors alive that the pointers refer to.
        self._kept = (layers, tables)
        self._vocab_size, self._row_size = config.vocab_size, head.shape[1]
        self._threads = StepThreads(model, max_threads)
        self._step = library.compute_mixtral_step
        self._step.restype = INT
        pointers = [_Layer(*(tensor.data_ptr() for tensor in layer)) for layer in layers]
        self._model = _Model(
            *(
                config.num_hidden_layers,
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
            ),
            *(
                config.head_dim,
                config.intermediate_size,
                config.num_local_experts,
                config.num_experts_per_tok,
            ),
            *(config.vocab_size, cache.block_size, config.sliding_window or 0, config.rms_norm_eps),
            *(table.data_ptr() for table in tables),
            (_Layer * len(layers))(*pointers),
        )

    @classmethod
    def verified(cls, model: "Mixtral", cache: KVCache, max_threads: int) -> "CpuStep":
        """Returns a step for `model` after comparing it with plain torch. `cache` must be unused.

        Long steps use up to `max_threads` threads, see `StepThreads`. Raises `StepUnavailable` if
        there is no compiled step or it fails the comparison.
        """
        _require_fitting(model)
        step = cls(_library(), model, cache, max_threads)
        error = step._error(model, cache)
        if not error < TOLERANCE:  # also true for NaN
            raise StepUnavailable(f"it differs from plain torch by {error:.1e}")
        return step

    def logits(self, batch: Batch, num_threads: int | None = None) -> Tensor:
        """Returns float32 logits `[sampled, vocab_size]` of `batch.sample_rows`, and fills the
        cache.

        `num_threads` None means the number that `StepThreads` chooses. If the system cannot create
        all threads, the existing ones compute the step. Raises `MemoryError` if the memory is too
        small.
        """
        num_threads = num_threads or self._threads.of(batch)
        owners = np.arange(len(batch.query_lens)).repeat(batch.query_lens)
        tables = batch.block_tables
        assert tables.stride(1) == 1
        counts = (len(owners), len(batch.sample_rows), tables.stride(0))
        inputs = (batch.token_ids.data_ptr(), batch.positions.data_ptr(), batch.slots.data_ptr())
        rows = _Rows(
            *counts, *inputs, owners.ctypes.data, batch.sample_rows.data_ptr(), tables.data_ptr()
        )
        logits = torch.empty(len(batch.sample_rows), self._row_size)
        started = self._step(
            ctypes.byref(self._model),
            ctypes.byref(rows),
            INT(num_threads),
            POINTER(logits.data_ptr()),
        )
        if started < 1:
            raise MemoryError("There is not enough memory for a step.")
        return logits[:, : self._vocab_size]

    @torch.inference_mode()
    def _error(self, model: "Mixtral", cache: KVCache) -> float:
        """Returns the relative error of the logits of a prompt of one KV block, and of decodes.

        The decodes attend to random keys and values. All threads compute.
        """
        count, size = min(cache.num_blocks, 5), cache.block_size
        blocks = torch.arange(count)
        generator = torch.Generator().manual_seed(0)
        for tensor in (*cache.keys, *cache.values):
            tensor[blocks] = torch.randn(tensor[blocks].shape, generator=generator)
        # All slots of the first KV block, and the last slot of the others.
        slots = torch.cat((torch.arange(size), (blocks[1:] + 1) * size - 1))
        batch = Batch(
            token_ids=slots % self._vocab_size,
            positions=slots % size,
            slots=slots,
            query_lens=[size, *[1] * (count - 1)],
            context_lens=[size] * count,
            block_tables=blocks[:, None],
            sample_rows=torch.arange(len(slots)),
        )
        expected = model(batch, cache)
        actual = self.logits(batch, self._threads.max_threads)
        cache.clear(blocks)
        return float((actual - expected).norm() / expected.norm())


def transposed(weight: Tensor) -> Tensor:
    """Returns a copy of `weight` `[..., N, K]` as `[..., K, N']`, with N rounded up and padded with
    0."""
    padded = F.pad(weight, (0, 0, 0, -weight.shape[-2] % LANES))
    return padded.transpose(-1, -2).contiguous()


def _float(linear: Linear | QuantizedLinear) -> Tensor:
    assert isinstance(linear, Linear)
    return linear.weight


def _weights(layer: Any) -> tuple[Tensor, ...]:
    """Returns the weights of a layer in the order of `_Layer`."""
    attention, experts = layer.attention, layer.mlp.experts
    assert isinstance(experts, Experts)
    return (
        layer.input_layernorm.weight,
        transposed(_float(attention.qkv)),
        transposed(_float(attention.o)),
        layer.post_attention_layernorm.weight,
        transposed(layer.mlp.router),
        transposed(experts.gate_up),
        transposed(experts.down),
    )


def _require_fitting(model: "Mixtral") -> None:
    config = model.config
    if model.embedding.dtype != torch.float32 or model.embedding.device.type != "cpu":
        raise StepUnavailable("it supports only float32 on a CPU")
    if model.codebook is not None:
        raise StepUnavailable("it does not support 4-bit weights")
    if (size := sum(weight.nbytes for weight in model.parameters())) > MAX_WEIGHT_BYTES:
        raise StepUnavailable(f"a second copy of {size / 1e9:.1f} GB of weights would be too large")
    if any(
        size % LANES for size in (config.hidden_size, config.intermediate_size, config.head_dim)
    ):
        raise StepUnavailable(
            f"hidden_size, intermediate_size and head_dim must be multiples of {LANES}"
        )


def _library() -> ctypes.CDLL:
    file = Path(__file__).with_name("_cpu_step" + EXTENSION_SUFFIXES[0])
    if not file.exists():
        raise StepUnavailable("it was not built, because there was no C compiler at installation")
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise StepUnavailable(f"{file.name} cannot be loaded ({error})") from None
    if not hasattr(library, "compute_mixtral_step"):  # older versions have another name
        raise StepUnavailable(f"{file.name} has another version; install the project again")
    return library
