"""The storage form of a checkpoint's weights, from its config.json."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.other_formats import FLOATS_INSTEAD
from serve_app.model.quantization import GROUP_SIZE, AbsmaxKind, Quantization, QuantType

Form = Literal["float", "bitsandbytes", "fused"]
"""float: float weights. bitsandbytes: 4-bit weights as transformers 4 wrote them with bitsandbytes.
fused: 4-bit weights as `mixtral-serve convert` writes them (`fused.py`)."""
FUSED_METHOD, FUSED_VERSION = "mixtral-serve", 2
"""`quant_method` and `version` in the `quantization_config` of a fused checkpoint. Version 2 stores
weights in tiles. Version 1, which can still be read, stores them row by row; see `fused.py`."""
FUSED_VERSIONS = (1, FUSED_VERSION)


def stored_form(document: Mapping[str, Any]) -> Form:
    """Returns the form of the weights, from a parsed config.json.

    Raises `ModelLoadFailed`, which names the quantization, for a form that cannot be read.
    """
    stored = document.get("quantization_config")
    if not stored:
        return "float"
    if not isinstance(stored, Mapping):
        raise ModelLoadFailed("config.json: `quantization_config` must be an object.")
    method = stored.get("quant_method", "bitsandbytes")
    if method == FUSED_METHOD:
        return "fused"
    # transformers wrote either name, and early on no `quant_method`.
    four_bits = stored.get("load_in_4bit") or stored.get("_load_in_4bit")
    if method == "bitsandbytes" and four_bits:
        return "bitsandbytes"
    description = "bitsandbytes, but not in 4 bits" if method == "bitsandbytes" else f"{method!r}"
    raise ModelLoadFailed(
        f"config.json: `quantization_config` is {description}, but only bitsandbytes in 4 bits can "
        f"be read; {FLOATS_INSTEAD}."
    )


def stored_quantization(document: Mapping[str, Any]) -> Quantization | None:
    """Returns the quantization that a parsed config.json describes; None for float weights.

    For a bitsandbytes checkpoint the safetensors headers are more precise. Raises `ModelLoadFailed`
    if `stored_form` does, and for an unknown version of the fused form.
    """
    form = stored_form(document)
    if form == "float":
        return None
    stored = document["quantization_config"]
    if form == "fused":
        return _fused_quantization(stored)
    absmax: AbsmaxKind = "nested" if stored.get("bnb_4bit_use_double_quant") else "float32"
    return Quantization("nf4" if stored.get("bnb_4bit_quant_type") == "nf4" else "fp4", absmax)


def fused_version(document: Mapping[str, Any]) -> int:
    """Returns the version of a fused checkpoint, from its parsed config.json."""
    version: int = document["quantization_config"]["version"]
    return version


def fused_quantization_config(
    quantization: Quantization, version: int = FUSED_VERSION
) -> dict[str, Any]:
    """Returns the `quantization_config` for the config.json of a fused checkpoint."""
    return {
        "quant_method": FUSED_METHOD,
        "version": version,
        "quant_type": quantization.quant_type,
        "absmax": quantization.absmax,
        "blocksize": GROUP_SIZE,
    }


def _fused_quantization(stored: Mapping[str, Any]) -> Quantization:
    for quant_type in get_args(QuantType):
        for absmax in get_args(AbsmaxKind):
            quantization = Quantization(quant_type, absmax)
            if any(
                dict(stored) == fused_quantization_config(quantization, v) for v in FUSED_VERSIONS
            ):
                return quantization
    raise ModelLoadFailed(
        f"config.json: `quantization_config` does not fit version {FUSED_VERSION} of our "
        "format; convert the checkpoint again with `mixtral-serve convert`."
    )
