"""The tiny model for every peer: in float32, and without an end of answers.

transformers, vLLM and our server read the folder alike. The eos row of the lm_head is replaced by
that of `<unk>`, which the model was trained never to answer. So a greedy answer has the length that
was asked for on every server, whether or not the server supports `ignore_eos`.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SOURCE = Path(__file__).parents[1] / "serve_app" / "tiny" / "checkpoint"


def write_checkpoint(folder: Path, source: Path = SOURCE) -> Path:
    """Writes the copy into `folder` and returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((source / name).read_text(encoding="utf-8"))
        eos = config.pop("eos_token_id")
        if "dtype" in config:
            config["dtype"] = "float32"
            config["eos_token_id"] = None  # else the class's own default, 2
        (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {
        name: tensor.to(torch.float32)
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    weights["lm_head.weight"][eos] = weights["lm_head.weight"][0]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
