"""Recognizes checkpoints in unsupported formats, so that errors can name the format.

Uses only the names of files and tensors. Imports no torch.
"""

from collections.abc import Collection
from fnmatch import fnmatch

FLOATS_INSTEAD = "name the float checkpoint that this one was made from"
"""The advice for a quantization that cannot be read."""
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
"""The meaning of file names in a folder, and the advice; the first match is used."""
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
"""Quantization methods by the ends of their tensors' names; the first match is used."""


def describe_files(names: Collection[str]) -> str | None:
    """Returns a description of a folder or repository with the files `names` that is not a
    checkpoint.

    Example: "tiny.gguf: weights in GGUF, llama.cpp's format; name ...". None if no file name is
    known.
    """
    for pattern, meaning in _BY_FILE.items():
        if matches := sorted(name for name in names if fnmatch(name, pattern)):
            return f"{matches[0]}: {meaning}"
    return None


def describe_tensors(names: Collection[str]) -> str | None:
    """Returns the quantization of weights with the tensors `names`, and advice.

    None if no tensor name is known.
    """
    for end, method in _BY_TENSOR.items():
        if tensor_name := next((name for name in names if name.endswith(end)), None):
            return f"quantized by {method}, as tensor `{tensor_name}` shows; {FLOATS_INSTEAD}"
    return None
