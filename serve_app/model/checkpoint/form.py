"""How a checkpoint stores its weights, as its config.json says. Reads no other file."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.other_formats import FLOATS_INSTEAD
from serve_app.model.quantization import GROUP_SIZE, AbsmaxKind, Quantization, QuantType

Form = Literal["float", "bitsandbytes", "fused"]
"""float: as floats. bitsandbytes: in 4 bits, as transformers 4 wrote them with bitsandbytes.
fused: in 4 bits, as `mixtral-serve convert` writes them (`fused.py`)."""
FUSED_METHOD, FUSED_VERSION = "mixtral-serve", 2
"""`quant_method` and `version` in the `quantization_config` of a fused checkpoint. Version 2 has
weights in tiles; version 1, which is read still, has them row by row, see `fused.py`."""
FUSED_VERSIONS = (1, FUSED_VERSION)


def stored_form(document: Mapping[str, Any]) -> Form:
    """Returns the form of the weights that belong to a parsed config.json.

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
    found = "bitsandbytes, but not in 4 bits" if method == "bitsandbytes" else f"{method!r}"
    raise ModelLoadFailed(
        f"config.json: `quantization_config` is {found}, and only bitsandbytes in 4 bits can be "
        f"read; {FLOATS_INSTEAD}."
    )


def stored_quantization(document: Mapping[str, Any]) -> Quantization | None:
    """Returns how a parsed config.json says that the weights are quantized; None if they are
    floats.

    For a bitsandbytes checkpoint the safetensors headers are more precise. Raises `ModelLoadFailed`
    as `stored_form` does, and for another version of the fused form.
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
    """Returns the version of the fused checkpoint to which a parsed config.json belongs."""
    version: int = document["quantization_config"]["version"]
    return version


def fused_quantization_config(
    quantization: Quantization, version: int = FUSED_VERSION
) -> dict[str, Any]:
    """Returns the `quantization_config` that a fused checkpoint has in its config.json."""
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
