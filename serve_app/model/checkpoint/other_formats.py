"""Recognizes checkpoints in formats that are not read, for errors that name the format.

Looks at names of files and tensors alone. Imports no torch.
"""

from collections.abc import Collection
from fnmatch import fnmatch

FLOATS_INSTEAD = "name the float checkpoint that this one was made from"
"""What to do about a quantization that cannot be read."""
_HUGGING_FACE = "name the same model in Hugging Face's format, config.json and model*.safetensors"
_BY_FILE = {
    "adapter_model.*": "a LoRA adapter; merge it into its base model with peft's "
    "`merge_and_unload` and name that folder",
    "*.gguf": f"weights in GGUF, llama.cpp's format; {_HUGGING_FACE}",
    "consolidated*": f"weights in Mistral's own format; {_HUGGING_FACE}",
    "model-*-of-*.safetensors": "shards without model.safetensors.index.json or without "
    "config.json; download the checkpoint again",
    "*.safetensors": f"safetensors of other names; {_HUGGING_FACE}",
    **dict.fromkeys(
        ("*.bin", "*.pt", "*.pth", "*.ckpt"),
        "pickled weights, which can run code when they are loaded and are refused; convert the "
        "checkpoint to safetensors",
    ),
    "*.npz": f"weights in NumPy's format; {_HUGGING_FACE}",
    "*.onnx": f"weights in ONNX; {_HUGGING_FACE}",
}
"""What a folder holds that has a file of such a name, and what to do; the first one counts."""
_BY_TENSOR = {
    ".qweight": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    ".SCB": "bitsandbytes in 8 bits",
    ".W_q": "HQQ",
    ".biases": "MLX",
}
"""Methods of quantization by the end of their tensors' names; the first one counts."""


def describe_files(names: Collection[str]) -> str | None:
    """Returns what a folder or repository with files `names` holds in place of a checkpoint.

    For example "tiny.gguf: weights in GGUF, llama.cpp's format; name ...". None if no file is
    known.
    """
    for pattern, meaning in _BY_FILE.items():
        if found := sorted(name for name in names if fnmatch(name, pattern)):
            return f"{found[0]}: {meaning}"
    return None


def describe_tensors(names: Collection[str]) -> str | None:
    """Returns how weights with tensors `names` are quantized, and what to do.

    None if no name is known.
    """
    for end, method in _BY_TENSOR.items():
        if found := next((name for name in names if name.endswith(end)), None):
            return f"quantized by {method}, as tensor `{found}` shows; {FLOATS_INSTEAD}"
    return None
