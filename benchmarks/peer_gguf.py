"""Writes a small Mixtral as GGUF in float32, for llama.cpp, whose converter is not a package.

Tensor names and metadata are those of llama.cpp's `llama` architecture with experts. The tokenizer
is its `llama` kind: pieces with scores, and bytes as fallback. The score of a merged piece is the
rank of its merge, so llama.cpp cuts text as the Hugging Face tokenizer does.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from safetensors.numpy import load_file

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows `[heads * head_dim, hidden]` from half-split to interleaved rotary order.

    Mixtral rotates row i of a head with row i + head_dim / 2, llama.cpp rows 2i and 2i + 1.
    """
    rows, hidden = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, hidden)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, hidden))


def tensors(config: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the rows of each tensor by llama.cpp's name; experts are one tensor `[experts, out,
    in]`."""
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output.weight": weights["lm_head.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, new in NAMES.items():
            weight = weights[f"{ours}.{name}.weight"]
            found[f"{theirs}.{new}.weight"] = (
                interleave(weight, heads[new]) if new in heads else weight
            )
        for name, new in EXPERTS.items():
            found[f"{theirs}.{new}.weight"] = np.stack(
                [
                    weights[f"{ours}.block_sparse_moe.experts.{expert}.{name}.weight"]
                    for expert in range(config["num_local_experts"])
                ]
            )
    return found


def write_gguf(checkpoint: Path, path: Path) -> Path:
    """Writes the model of a float32 Hugging Face folder to `path` and returns it."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, checkpoint)
    for name, weight in tensors(config, load_file(checkpoint / "model.safetensors")).items():
        writer.add_tensor(name, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, checkpoint: Path) -> None:
    model = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    rank = {first + second: -float(n) for n, (first, second) in enumerate(model["merges"])}
    last = -float(len(rank))  # a single character is never made by a merge
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([rank.get(token, last) for token in tokens])
    writer.add_token_types([_kind(token) for token in tokens])
    writer.add_bos_token_id(model["vocab"]["<s>"])
    writer.add_eos_token_id(model["vocab"]["</s>"])
    writer.add_unk_token_id(model["vocab"]["<unk>"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)


def _kind(token: str) -> TokenType:
    if token == "<unk>":
        return TokenType.UNKNOWN
    if token in ("<s>", "</s>"):
        return TokenType.CONTROL
    if token.startswith("<0x"):
        return TokenType.BYTE
    return TokenType.NORMAL
