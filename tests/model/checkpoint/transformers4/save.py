"""Writes the small 4-bit checkpoints of this folder with transformers 4, and their logits.

Run it where transformers==4.57.3, bitsandbytes==0.50.2, accelerate and torch are installed. The
environment of this project has transformers 5, which cannot write such files:

    python save.py

Each checkpoint has one layer of random weights. `logits.safetensors` has the logits `[12, 96]` that
transformers 4 computes from each one, in float32 on a CPU, for the token ids `ids` `[12]`.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

HERE = Path(__file__).parent
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "initializer_range": 0.2,
}
NF4: dict[str, Any] = {"bnb_4bit_quant_type": "nf4"}
NESTED: dict[str, Any] = {"bnb_4bit_use_double_quant": True}
BF16_STORAGE: dict[str, Any] = {"bnb_4bit_quant_storage": torch.bfloat16}
CHECKPOINTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "default": (torch.bfloat16, {}),
    "everything-nf4-nested": (torch.float32, {**NF4, **NESTED, "llm_int8_skip_modules": []}),
    "skip-gate-fp4-nested-bf16": (
        torch.bfloat16,
        {**NESTED, **BF16_STORAGE, "llm_int8_skip_modules": ["gate"]},
    ),
    "skip-attention-nf4-bf16": (
        torch.bfloat16,
        {**NF4, **BF16_STORAGE, "llm_int8_skip_modules": ["lm_head", "self_attn"]},
    ),
    "skip-experts-nf4-nested": (
        torch.bfloat16,
        {**NF4, **NESTED, "llm_int8_skip_modules": ["experts", "self_attn"]},
    ),
}
"""dtype of the float weights, and arguments of `BitsAndBytesConfig`."""


def main() -> None:
    """Writes all checkpoints and `logits.safetensors`."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**CONFIG))
    ids = torch.randint(96, (12,))
    logits = {"ids": ids}
    for name, (dtype, how) in CHECKPOINTS.items():
        with tempfile.TemporaryDirectory() as floats:
            model.to(dtype).save_pretrained(floats)
            model.float()
            quantized = MixtralForCausalLM.from_pretrained(
                floats,
                quantization_config=BitsAndBytesConfig(load_in_4bit=True, **how),
                device_map="cpu",
                dtype=dtype,
            )
        quantized.save_pretrained(HERE / name)
        logits[name] = float32_logits(HERE / name, dtype, ids)
    save_file(logits, HERE / "logits.safetensors")


def float32_logits(folder: Path, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits `[tokens, 96]` of the checkpoint in `folder`, read in the dtype of its
    floats."""
    model = MixtralForCausalLM.from_pretrained(folder, device_map="cpu", dtype=dtype)
    for weight in model.parameters():
        if hasattr(weight, "quant_state"):  # `float()` would convert nibbles stored as bfloat16
            weight.data = weight.data.view(torch.uint8)
    torch.nn.Module.float(model)
    model.train()  # in eval mode bitsandbytes' CPU kernel refuses routers of fewer than 32 rows
    with torch.no_grad():
        logits: torch.Tensor = model(ids[None]).logits[0]
    return logits


if __name__ == "__main__":
    main()
