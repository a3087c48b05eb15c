"""A folder that cannot be served is refused with what is in it and what to do."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.find import find_local, is_complete
from serve_app.tiny import CHECKPOINT

W1 = "model.layers.0.block_sparse_moe.experts.0.w1"


def refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        inspect(folder)
    assert caught.value.message.endswith(".")
    return caught.value.message


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["mixtral.Q4_K_M.gguf"], ["mixtral.Q4_K_M.gguf", "GGUF", "llama.cpp", "name"]),
        (["consolidated.00.pth", "params.json"], ["consolidated.00.pth", "Mistral's own format"]),
        (["consolidated.safetensors", "tekken.json"], ["Mistral's own format", "config.json"]),
        (["consolidated.00.pt"], ["Mistral's own format"]),
        (["model.pt"], ["model.pt", "pickled", "safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.bin", "pickled"]),
        (["adapter_model.safetensors", "adapter_config.json"], ["LoRA", "merge"]),
        (["model-00001-of-00002.safetensors"], ["index.json", "download"]),
        (["weights.npz"], ["NumPy"]),
        (["README.md"], ["name the folder of a checkpoint"]),
        ([], ["name the folder of a checkpoint"]),
    ],
)
def test_files_of_other_formats(files: Collection[str], words: list[str], tmp_path: Path) -> None:
    """The sentence is the same kind with and without a config.json."""
    for name in files:
        (tmp_path / name).write_bytes(b"1")
    message = refusal(tmp_path)
    assert [word for word in ["config.json is missing", *words] if word not in message] == []
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    words = ["model.safetensors", "is missing", *words]
    message = refusal(tmp_path)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (["qweight", "qzeros", "scales", "g_idx"], "GPTQ or AWQ"),
        (["qweight", "qzeros", "scales"], "GPTQ or AWQ"),
        (["weight", "weight_scale_inv"], "FP8"),
        (["weight_packed", "weight_scale", "weight_shape"], "compressed-tensors"),
        (["weight", "SCB"], "bitsandbytes in 8 bits"),
    ],
)
def test_other_quantizations_without_a_configuration(
    names: list[str], method: str, tmp_path: Path
) -> None:
    """Where config.json does not say how weights are quantized, their tensors' names do."""
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[f"{W1}.weight"]
    weights |= {f"{W1}.{name}": torch.zeros(4, 8, dtype=torch.int32) for name in names}
    save_file(weights, tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert f"quantized by {method}" in message
    assert "name the float checkpoint" in message


def test_bitsandbytes_without_a_configuration_is_read(tmp_path: Path) -> None:
    """Weights in 4 bits are known by their tensors; config.json need not say it."""
    folder = Path(__file__).parent / "transformers4" / "default"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect(tmp_path).quantization == inspect(folder).quantization
    assert inspect(tmp_path).form == "bitsandbytes"


@pytest.mark.parametrize(
    "content", ["{", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}']
)
def test_a_stale_index_does_not_matter(content: str, tmp_path: Path) -> None:
    """Shards that were merged into one file leave an index; transformers reads the file too."""
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert is_complete(tmp_path)
    assert list(inspect(tmp_path).headers) == [tmp_path / "model.safetensors"]


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    """The error says that the path is a file."""
    file = tmp_path / "mixtral.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelLoadFailed, match=r"mixtral\.gguf: this is a file"):
        find_local(str(file))
