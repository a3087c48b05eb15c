"""The one table of a checkpoint's tensor names, and what each name means.

A row of `TABLE` is one weight of our `Mixtral`: where it is in the model, the tensors that hold it
in files, its sizes and its part. Three layouts of files follow from it:

- transformers 4 wrote a tensor for every matrix, experts one by one: float and bitsandbytes
  checkpoints. Its names are used for weights everywhere in this package.
- transformers 5 has one tensor for the experts of a layer: the `merged` name.
- our fused form has one tensor, or a few with one prefix, for each weight: the `fused` name.

For example `layers.0.attention.qkv.weight` is a matrix [6144, 4096] in Mixtral 8x7B. It is made of
`model.layers.0.self_attn.q_proj.weight` [4096, 4096] in rows 0 to 4095, `k_proj` [1024, 4096] and
`v_proj` [1024, 4096]. In a fused checkpoint it is `model.layers.0.self_attn.qkv`, with `.packed`
[6144, 2048] and `.absmax` [6144, 64].

Imports no torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Literal, NamedTuple, get_args

from serve_app.model.config import MixtralConfig

Part = Literal["experts", "attention", "head", "other"]
"""The parts by which memory is reported. "head" is the embedding and lm_head; "other" has the
routers and norms."""
PARTS: tuple[Part, ...] = get_args(Part)
QUANTIZED_PARTS: tuple[Part, ...] = ("experts", "attention")
"""Parts whose weights are in 4 bits in a quantized checkpoint."""

_LAYER = "model.layers.{layer}"
_ATTENTION, _MOE = f"{_LAYER}.self_attn", f"{_LAYER}.block_sparse_moe"
LM_HEAD = "lm_head.weight"
CODEBOOK = "quantization"
"""Prefix of a fused checkpoint's tensors with the code values that all its weights share."""


class Row(NamedTuple):
    """One weight of `Mixtral`; `{layer}` and `{expert}` stand for numbers."""

    path: str
    """The attribute of `Mixtral`."""
    part: Part
    names: tuple[str, ...]
    """The matrices, one above the other, by transformers 4's names."""
    fused: str
    out_features: tuple[str, ...]
    """The size of each matrix, as an attribute of `MixtralConfig`."""
    in_features: str | None
    """None for a vector."""
    merged: str | None = None
    """The tensor that transformers 5 has instead of `names`."""
    is_interleaved: bool = False
    """In 4 bits, the rows of its matrices lie by turns, see `QuantizedWeight`."""


TABLE = (
    Row(
        path="embedding",
        part="head",
        names=("model.embed_tokens.weight",),
        fused="model.embed_tokens.weight",
        out_features=("vocab_size",),
        in_features="hidden_size",
    ),
    Row(
        path="layers.{layer}.input_layernorm.weight",
        part="other",
        names=(f"{_LAYER}.input_layernorm.weight",),
        fused=f"{_LAYER}.input_layernorm.weight",
        out_features=("hidden_size",),
        in_features=None,
    ),
    Row(
        path="layers.{layer}.attention.qkv.weight",
        part="attention",
        names=tuple(f"{_ATTENTION}.{one}_proj.weight" for one in "qkv"),
        fused=f"{_ATTENTION}.qkv",
        out_features=("q_size", "kv_size", "kv_size"),
        in_features="hidden_size",
    ),
    Row(
        path="layers.{layer}.attention.o.weight",
        part="attention",
        names=(f"{_ATTENTION}.o_proj.weight",),
        fused=f"{_ATTENTION}.o",
        out_features=("hidden_size",),
        in_features="q_size",
    ),
    Row(
        path="layers.{layer}.post_attention_layernorm.weight",
        part="other",
        names=(f"{_LAYER}.post_attention_layernorm.weight",),
        fused=f"{_LAYER}.post_attention_layernorm.weight",
        out_features=("hidden_size",),
        in_features=None,
    ),
    Row(
        path="layers.{layer}.mlp.router",
        part="other",
        names=(f"{_MOE}.gate.weight",),
        fused=f"{_LAYER}.mlp.gate.weight",
        out_features=("num_local_experts",),
        in_features="hidden_size",
        merged=f"{_LAYER}.mlp.gate.weight",
    ),
    Row(
        path="layers.{layer}.mlp.experts.gate_up",
        part="experts",
        names=(f"{_MOE}.experts.{{expert}}.w1.weight", f"{_MOE}.experts.{{expert}}.w3.weight"),
        fused=f"{_LAYER}.mlp.experts.gate_up",
        out_features=("intermediate_size", "intermediate_size"),
        in_features="hidden_size",
        merged=f"{_LAYER}.mlp.experts.gate_up_proj",
        is_interleaved=True,
    ),
    Row(
        path="layers.{layer}.mlp.experts.down",
        part="experts",
        names=(f"{_MOE}.experts.{{expert}}.w2.weight",),
        fused=f"{_LAYER}.mlp.experts.down",
        out_features=("hidden_size",),
        in_features="intermediate_size",
        merged=f"{_LAYER}.mlp.experts.down_proj",
    ),
    Row(
        path="norm.weight",
        part="other",
        names=("model.norm.weight",),
        fused="model.norm.weight",
        out_features=("hidden_size",),
        in_features=None,
    ),
    Row(
        path="lm_head.weight",
        part="head",
        names=(LM_HEAD,),
        fused=LM_HEAD,
        out_features=("vocab_size",),
        in_features="hidden_size",
    ),
)


@dataclass(frozen=True, slots=True)
class Slice:
    """The rows of a tensor that hold one matrix: number `index` of `count` equal slices."""

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
    """The weight of `Mixtral` that it belongs to."""
    expert: int | None
    index: int
    """Which of the matrices in that weight: of q, k and v, k is 1."""
    rows: slice
    """Its rows in that weight, within one expert."""
    merged: Slice
    """Where it is in transformers 5's layout."""

    @property
    def is_quantized(self) -> bool:
        """True where a quantized checkpoint has it in 4 bits."""
        return self.part in QUANTIZED_PARTS


@dataclass(frozen=True, slots=True)
class ModuleWeight:
    """One weight of `Mixtral`: a vector, a matrix, or, of experts, a stack of matrices."""

    path: str
    part: Part
    layer: int | None
    fused: str
    experts: tuple[int, ...]
    """`(num_experts,)`, or () for what is not an expert's."""
    out_features: tuple[int, ...]
    """out_features of each matrix that it is made of, one above the other."""
    in_features: int | None
    weights: tuple[Weight, ...]
    """Expert by expert."""
    is_interleaved: bool
    """In 4 bits, the rows of its matrices lie by turns, see `QuantizedWeight`."""

    @property
    def shape(self) -> tuple[int, ...]:
        last = () if self.in_features is None else (self.in_features,)
        return (*self.experts, sum(self.out_features), *last)

    @property
    def is_quantized(self) -> bool:
        """True where a quantized checkpoint has it in 4 bits."""
        return self.part in QUANTIZED_PARTS


@lru_cache(maxsize=4)
def module_weights(config: MixtralConfig) -> tuple[ModuleWeight, ...]:
    """All weights of `Mixtral`, layer by layer, the embedding first and lm_head last."""
    rows = [row for row in TABLE if row.fused != LM_HEAD or not config.tie_word_embeddings]
    in_layers = [row for row in rows if "{layer}" in row.path]
    first = rows.index(in_layers[0])
    return (
        *(_module_weight(row, config) for row in rows[:first]),
        *(
            _module_weight(row, config, layer)
            for layer in range(config.num_hidden_layers)
            for row in in_layers
        ),
        *(_module_weight(row, config) for row in rows[first + len(in_layers) :]),
    )


def weights(config: MixtralConfig) -> dict[str, Weight]:
    """All matrices and vectors by transformers 4's names; lm_head comes last."""
    return {weight.name: weight for it in module_weights(config) for weight in it.weights}


def merged_shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in transformers 5's layout."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module_weight in module_weights(config):
        for weight in module_weight.weights:
            is_alone = weight.merged.name == weight.name
            shapes[weight.merged.name] = weight.shape if is_alone else module_weight.shape
    return shapes


def is_merged(config: MixtralConfig, names: Iterable[str]) -> bool:
    """True where a checkpoint with tensors `names` has transformers 5's layout."""
    only_there = merged_shapes(config).keys() - weights(config).keys()
    return not only_there.isdisjoint(names)


def is_redundant(config: MixtralConfig, name: str) -> bool:
    """True for a tensor that old tools wrote and that the model does not need."""
    is_tied_head = config.tie_word_embeddings and name.startswith(LM_HEAD)
    return is_tied_head or name.endswith("rotary_emb.inv_freq")


def _module_weight(row: Row, config: MixtralConfig, layer: int | None = None) -> ModuleWeight:
    has_experts = "{expert}" in row.names[0]
    out_features = tuple(int(getattr(config, size)) for size in row.out_features)
    in_features = None if row.in_features is None else int(getattr(config, row.in_features))
    experts = (config.num_local_experts,) if has_experts else ()
    return ModuleWeight(
        path=row.path.format(layer=layer),
        part=row.part,
        layer=layer,
        fused=row.fused.format(layer=layer),
        experts=experts,
        out_features=out_features,
        in_features=in_features,
        weights=tuple(_weights(row, layer, experts, out_features, in_features)),
        is_interleaved=row.is_interleaved,
    )


def _weights(
    row: Row,
    layer: int | None,
    experts: tuple[int, ...],
    out_features: tuple[int, ...],
    in_features: int | None,
) -> Iterator[Weight]:
    starts = [0, *accumulate(out_features)]
    count = prod(experts) * len(out_features)
    for number in range(count):
        expert, index = divmod(number, len(out_features))
        name = row.names[index].format(layer=layer, expert=expert)
        merged = Slice(name, 0, 1)
        if row.merged is not None:
            merged = Slice(row.merged.format(layer=layer), number, count)
        size = out_features[index]
        yield Weight(
            name=name,
            shape=(size,) if in_features is None else (size, in_features),
            part=row.part,
            path=row.path.format(layer=layer),
            expert=expert if experts else None,
            index=index,
            rows=slice(starts[index], starts[index] + size),
            merged=merged,
        )
