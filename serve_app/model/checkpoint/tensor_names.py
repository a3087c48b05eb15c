"""The table of a checkpoint's tensor names and their weights. Imports no torch.

A row of `TABLE` is one weight of our `Mixtral`: its path in the model, its tensors in the files,
its sizes and its part. There are three layouts of files:

- transformers 4 wrote one tensor per matrix and expert, in float and bitsandbytes checkpoints. This
  package uses its names for weights everywhere.
- transformers 5 has one tensor for all experts of a layer: `merged_name`.
- Our fused form has one tensor, or a few with one prefix, per weight: `fused_name`.

Example: `layers.0.attention.qkv.weight` is a matrix [6144, 4096] in Mixtral 8x7B. It consists of
`model.layers.0.self_attn.q_proj.weight` [4096, 4096] in rows 0 to 4095, then `k_proj` [1024, 4096]
and `v_proj` [1024, 4096]. In a fused checkpoint it is `model.layers.0.self_attn.qkv`, with
`.packed` [6144, 2048] and `.absmax` [6144, 64].
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Literal, NamedTuple, get_args

from serve_app.model.config import MixtralConfig

Part = Literal["experts", "attention", "head", "other"]
"""The parts for which memory is reported. "head" is the embedding and lm_head; "other" is the
routers and norms."""
PARTS: tuple[Part, ...] = get_args(Part)
QUANTIZED_PARTS: tuple[Part, ...] = ("experts", "attention")
"""Parts with 4-bit weights in a quantized checkpoint."""
_LAYER = "model.layers.{layer}"
_ATTENTION, _MOE = f"{_LAYER}.self_attn", f"{_LAYER}.block_sparse_moe"
LM_HEAD = "lm_head.weight"
CODEBOOK = "quantization"
"""Prefix of a fused checkpoint's tensors with the code values that all weights share."""


class Row(NamedTuple):
    """One weight of `Mixtral`; `{layer}` and `{expert}` stand for numbers."""

    path: str
    """The path of the attribute in `Mixtral`."""
    part: Part
    fused_name: str
    out_features: tuple[str, ...]
    """out_features of each matrix, as attributes of `MixtralConfig`."""
    in_features: str | None
    """in_features as an attribute of `MixtralConfig`; None for a vector."""
    names: tuple[str, ...] = ()
    """The matrices in the order of their rows, by transformers 4's names; () if `fused_name` is the
    only name."""
    merged_name: str | None = None
    """The tensor with all of `names` in transformers 5's layout."""
    is_interleaved: bool = False
    """Whether the rows of its matrices alternate if it is quantized, see `QuantizedWeight`."""


def _norm(path: str) -> Row:
    return Row(path, "other", f"model.{path}", ("hidden_size",), None)


TABLE = (
    Row("embedding", "head", "model.embed_tokens.weight", ("vocab_size",), "hidden_size"),
    _norm("layers.{layer}.input_layernorm.weight"),
    Row(
        path="layers.{layer}.attention.qkv.weight",
        part="attention",
        fused_name=f"{_ATTENTION}.qkv",
        out_features=("q_size", "kv_size", "kv_size"),
        in_features="hidden_size",
        names=tuple(f"{_ATTENTION}.{matrix}_proj.weight" for matrix in "qkv"),
    ),
    Row(
        path="layers.{layer}.attention.o.weight",
        part="attention",
        fused_name=f"{_ATTENTION}.o",
        out_features=("hidden_size",),
        in_features="q_size",
        names=(f"{_ATTENTION}.o_proj.weight",),
    ),
    _norm("layers.{layer}.post_attention_layernorm.weight"),
    Row(
        path="layers.{layer}.mlp.router",
        part="other",
        fused_name=f"{_LAYER}.mlp.gate.weight",
        out_features=("num_local_experts",),
        in_features="hidden_size",
        names=(f"{_MOE}.gate.weight",),
        merged_name=f"{_LAYER}.mlp.gate.weight",
    ),
    Row(
        path="layers.{layer}.mlp.experts.gate_up",
        part="experts",
        fused_name=f"{_LAYER}.mlp.experts.gate_up",
        out_features=("intermediate_size", "intermediate_size"),
        in_features="hidden_size",
        names=tuple(f"{_MOE}.experts.{{expert}}.{matrix}.weight" for matrix in ("w1", "w3")),
        merged_name=f"{_LAYER}.mlp.experts.gate_up_proj",
        is_interleaved=True,
    ),
    Row(
        path="layers.{layer}.mlp.experts.down",
        part="experts",
        fused_name=f"{_LAYER}.mlp.experts.down",
        out_features=("hidden_size",),
        in_features="intermediate_size",
        names=(f"{_MOE}.experts.{{expert}}.w2.weight",),
        merged_name=f"{_LAYER}.mlp.experts.down_proj",
    ),
    _norm("norm.weight"),
    Row("lm_head.weight", "head", LM_HEAD, ("vocab_size",), "hidden_size"),
)


@dataclass(frozen=True, slots=True)
class Slice:
    """The rows of one matrix in a tensor: slice `index` of `count` equal slices."""

    name: str
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix or vector, by its name in transformers 4's layout."""

    name: str
    shape: tuple[int, ...]
    part: Part
    path: str
    """The path of the weight of `Mixtral` that contains it."""
    expert: int | None
    index: int
    """Index of the matrix in that weight: in q, k and v, k is 1."""
    rows: slice
    """The rows of the matrix in that weight, within one expert."""
    merged: Slice
    """The slice of the tensor in transformers 5's layout."""

    @property
    def is_quantized(self) -> bool:
        """Whether the weight has 4 bits in a quantized checkpoint."""
        return self.part in QUANTIZED_PARTS

    @property
    def module(self) -> str:
        """The module whose weights all have the same form, 4 bits or floats:
        "layers.0.mlp.experts"."""
        return self.path[: self.path.index(self.part) + len(self.part)]


@dataclass(frozen=True)
class ModuleWeight:
    """One weight of `Mixtral`: a vector, a matrix, or a stack of the experts' matrices."""

    row: Row
    layer: int | None
    experts: tuple[int, ...]
    """`(num_experts,)` for a weight of experts, otherwise ()."""
    out_features: tuple[int, ...]
    """out_features of each of its matrices, in the order of rows."""
    in_features: int | None

    @property
    def path(self) -> str:
        return self.row.path.format(layer=self.layer)

    @property
    def fused_name(self) -> str:
        return self.row.fused_name.format(layer=self.layer)

    @property
    def shape(self) -> tuple[int, ...]:
        last = () if self.in_features is None else (self.in_features,)
        return (*self.experts, sum(self.out_features), *last)

    @property
    def is_quantized(self) -> bool:
        """Whether the weight has 4 bits in a quantized checkpoint."""
        return self.row.part in QUANTIZED_PARTS

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Its matrices or vectors, expert by expert."""
        return tuple(self._weight(i) for i in range(prod(self.experts) * len(self.out_features)))

    def _weight(self, number: int) -> Weight:
        row, num_parts = self.row, len(self.out_features)
        expert, index = divmod(number, num_parts)
        size, end = self.out_features[index], sum(self.out_features[: index + 1])
        name = (row.names or (row.fused_name,))[index].format(layer=self.layer, expert=expert)
        merged = Slice(name, 0, 1)
        if row.merged_name is not None:
            whole = row.merged_name.format(layer=self.layer)
            merged = Slice(whole, number, prod(self.experts) * num_parts)
        return Weight(
            name=name,
            shape=(size,) if self.in_features is None else (size, self.in_features),
            part=row.part,
            path=self.path,
            expert=expert if self.experts else None,
            index=index,
            rows=slice(end - size, end),
            merged=merged,
        )


@lru_cache(maxsize=4)
def module_weights(config: MixtralConfig) -> tuple[ModuleWeight, ...]:
    """Returns all weights of `Mixtral`, layer by layer, the embedding first and lm_head last."""
    embedding, *others = TABLE
    in_layers = [row for row in others if "{layer}" in row.path]
    last = [row for row in others if row not in in_layers]
    if config.tie_word_embeddings:
        last = [row for row in last if row.fused_name != LM_HEAD]
    layers = range(config.num_hidden_layers)
    return (
        _module_weight(embedding, config),
        *(_module_weight(row, config, layer) for layer in layers for row in in_layers),
        *(_module_weight(row, config) for row in last),
    )


def weights(config: MixtralConfig) -> dict[str, Weight]:
    """Returns all matrices and vectors by transformers 4's names; lm_head comes last."""
    return {weight.name: weight for entry in module_weights(config) for weight in entry.weights}


def merged_shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor in transformers 5's layout."""
    return {
        weight.merged.name: weight.shape if weight.merged.name == weight.name else entry.shape
        for entry in module_weights(config)
        for weight in entry.weights
    }


def is_merged(config: MixtralConfig, names: Iterable[str]) -> bool:
    """Returns True if a checkpoint with tensors `names` has transformers 5's layout."""
    merged_only = merged_shapes(config).keys() - weights(config).keys()
    return not merged_only.isdisjoint(names)


def is_redundant(config: MixtralConfig, name: str) -> bool:
    """Returns True for a tensor that old tools wrote but the model does not need."""
    is_tied_head = config.tie_word_embeddings and name.startswith(LM_HEAD)
    return is_tied_head or name.endswith("rotary_emb.inv_freq")


def _module_weight(row: Row, config: MixtralConfig, layer: int | None = None) -> ModuleWeight:
    out_features = tuple(int(getattr(config, size)) for size in row.out_features)
    in_features = None if row.in_features is None else int(getattr(config, row.in_features))
    experts = (config.num_local_experts,) if row.part == "experts" else ()
    return ModuleWeight(row, layer, experts, out_features, in_features)
