"""Any Mixtral checkpoint is loaded; any broken one is refused before a weight is read."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.loader import bytes_by_part
from serve_app.model.footprint import parameters, weight_bytes
from tests.model.driver import (
    Paged,
    load_float32,
    load_folder,
    oracle_logits,
    random_ids,
    random_oracle,
)


@pytest.fixture(scope="module")
def oracle() -> Any:
    return random_oracle()


def assert_computes_as(folder: Path, oracle: Any) -> None:
    ids = random_ids(12)
    logits = Paged(load_float32(folder)).step(s=ids)["s"]
    torch.testing.assert_close(logits, oracle_logits(oracle, ids), rtol=0, atol=1e-4)


def save_merged(oracle: Any, folder: Path) -> None:
    """Writes the layout that transformers has in memory, which it does not write itself."""
    oracle.save_pretrained(folder)
    state = {name: weight.clone() for name, weight in oracle.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def test_shards_load_as_one_file_does(oracle: Any, tmp_path: Path) -> None:
    """A checkpoint in many files, which split layers, computes what the oracle does."""
    oracle.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_computes_as(tmp_path, oracle)


def test_transformers_5s_layout_loads(oracle: Any, tmp_path: Path) -> None:
    """Experts as one tensor per layer, under `mlp.`, compute what the oracle does."""
    save_merged(oracle, tmp_path)
    assert "model.layers.0.mlp.experts.gate_up_proj" in inspect(tmp_path).tensors
    assert_computes_as(tmp_path, oracle)


def test_transformers_5s_layout_of_one_expert_loads(tmp_path: Path) -> None:
    """A stack of one expert keeps its first dimension in the file."""
    oracle = random_oracle(num_local_experts=1, num_experts_per_tok=1)
    save_merged(oracle, tmp_path)
    assert_computes_as(tmp_path, oracle)


def test_what_old_tools_wrote_besides_is_ignored(tmp_path: Path) -> None:
    """A tied checkpoint that stores its head too, and rotary frequencies, still loads."""
    oracle = random_oracle(tie_word_embeddings=True)
    oracle.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    assert_computes_as(tmp_path, oracle)


def test_parameters_are_counted_as_transformers_counts_them(oracle: Any, tmp_path: Path) -> None:
    """Parameters by part, before the load; bytes by part, after it, in the dtype asked for."""
    oracle.save_pretrained(tmp_path)
    counts = {"experts": 0, "attention": 0, "head": 0, "other": 0}
    for name, weight in oracle.named_parameters():
        if "experts" in name:
            counts["experts"] += weight.numel()
        elif "self_attn" in name:
            counts["attention"] += weight.numel()
        elif "embed_tokens" in name or "lm_head" in name:
            counts["head"] += weight.numel()
        else:
            counts["other"] += weight.numel()

    checkpoint = inspect(tmp_path)
    assert parameters(checkpoint.config) == counts
    promised = weight_bytes(checkpoint.config, 2)
    assert promised == {part: 2 * count for part, count in counts.items()}
    model = load_folder(tmp_path, torch.bfloat16)
    loaded = bytes_by_part(model)
    rotary = model.rope.cos.nbytes + model.rope.sin.nbytes
    assert loaded == {**promised, "other": promised["other"] + rotary}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_progress_is_reported_until_all_is_done(oracle: Any, tmp_path: Path) -> None:
    """The progress never falls and ends at 1."""
    oracle.save_pretrained(tmp_path)
    reported: list[float] = []
    load_folder(tmp_path, torch.float32, progress=reported.append)
    assert len(reported) > 10
    assert reported == sorted(reported)
    assert reported[-1] == 1.0


def test_inspect_needs_no_torch(oracle: Any, tmp_path: Path) -> None:
    """`serve_app.check` inspects a checkpoint in a process that never imports torch."""
    oracle.save_pretrained(tmp_path)
    code = (
        "import sys; from pathlib import Path;"
        "from serve_app.model.checkpoint.checkpoint import inspect;"
        "from serve_app.model.footprint import parameters;"
        "checkpoint = inspect(Path(sys.argv[1])); assert 'torch' not in sys.modules;"
        "print(sum(parameters(checkpoint.config).values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == sum(p.numel() for p in oracle.parameters())


# -- broken checkpoints ----------------------------------------------------------------------------

SHARD = "model-00002-of-"
QUERY = "model.layers.0.self_attn.q_proj.weight"
Break = Callable[[Path], object]


def change_config(**changes: Any) -> Break:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    """Rewrites the one shard that holds `QUERY`."""

    def rewrite(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = folder / index["weight_map"][QUERY]
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return rewrite


def change_index(change: Callable[[dict[str, Any]], object]) -> Break:
    def rewrite(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index)
        file.write_text(json.dumps(index))

    return rewrite


def shard(folder: Path) -> Path:
    return next(folder.glob(f"{SHARD}*"))


def cut(count: int) -> Break:
    """Leaves the first `count` bytes of a shard, or all but the last `-count`."""
    return lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:count])


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def no_weights(folder: Path) -> None:
    only_pickles(folder)
    (folder / "pytorch_model.bin").unlink()


def wrong_offsets(folder: Path) -> None:
    data = shard(folder).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first]["shape"].append(2)
    changed = json.dumps(header).encode()
    shard(folder).write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])


DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
"""JSON that Python's parser gives up on."""

BROKEN: dict[str, tuple[Break, list[str]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "missing"]),
    "config cut": (lambda folder: (folder / "config.json").write_text('{"a"'), ["config.json"]),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json"]),
    "another model": (change_config(model_type="llama"), ["config.json", "`model_type`"]),
    "no weights": (no_weights, ["model.safetensors"]),
    "pickles": (only_pickles, ["pytorch_model.bin", "pickled", "safetensors"]),
    "shard missing": (lambda folder: shard(folder).unlink(), [SHARD, "index.json", "missing"]),
    "index empty": (change_index(lambda index: index.clear()), ["index.json", "`weight_map`"]),
    "index leads out": (
        change_index(lambda index: index["weight_map"].update({QUERY: "../x.safetensors"})),
        ["index.json", "../x.safetensors"],
    ),
    "index names a list": (
        change_index(lambda index: index["weight_map"].update({QUERY: ["x"]})),
        ["index.json", "['x']"],
    ),
    "config too deep": (
        lambda folder: (folder / "config.json").write_text(DEEP),
        ["config.json", "JSON"],
    ),
    "header too deep": (
        lambda folder: shard(folder).write_bytes(struct.pack("<Q", len(DEEP)) + DEEP.encode()),
        [SHARD, "header"],
    ),
    "shard empty": (cut(0), [SHARD, "download"]),
    "header cut": (cut(100), [SHARD, "header is cut off", "download"]),
    "data cut": (cut(-1), [SHARD, "bytes", "download"]),
    "not safetensors": (
        lambda folder: shard(folder).write_bytes(struct.pack("<Q", 4) + b"nope"),
        [SHARD, "header"],
    ),
    "offsets wrong": (wrong_offsets, [SHARD, "offsets"]),
    "tensor missing": (change_weights(lambda weights: weights.pop(QUERY)), [f"`{QUERY}`"]),
    "tensor unexpected": (
        change_weights(lambda weights: weights.update({"extra.bias": torch.ones(1)})),
        ["`extra.bias`", ".safetensors"],
    ),
    "tensor misshapen": (
        change_weights(lambda weights: weights.update({QUERY: torch.ones(63, 64)})),
        [f"`{QUERY}`", "[63, 64]", "[64, 64]"],
    ),
    "tensor quantized": (
        change_weights(lambda w: w.update({QUERY: torch.ones(64, 64, dtype=torch.uint8)})),
        [f"`{QUERY}`", "U8"],
    ),
    "config disagrees": (
        change_config(num_local_experts=9),
        ["gate.weight`", "[8, 64]", "[9, 64]"],
    ),
    "fewer layers": (change_config(num_hidden_layers=1), ["`model.layers.1."]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused_in_a_sentence(
    what: str, oracle: Any, tmp_path: Path
) -> None:
    """`inspect` names the file and the key; `load` refuses with the same words."""
    oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    inspect(tmp_path)
    damage, words = BROKEN[what]
    damage(tmp_path)
    with pytest.raises(ModelLoadFailed) as caught:
        inspect(tmp_path)
    message = caught.value.message
    assert [word for word in words if word not in message] == []
    assert message.endswith(".")
    assert not caught.value.retry
    with pytest.raises(ModelLoadFailed) as again:
        load_float32(tmp_path)
    assert again.value.message == message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """The sentence names the folder that is not there."""
    with pytest.raises(ModelLoadFailed, match=r"nowhere: there is no such folder"):
        inspect(tmp_path / "nowhere")


def test_data_that_lies_between_the_headers_offsets_is_refused(oracle: Any, tmp_path: Path) -> None:
    """Tensors that share bytes, each of the right size: safetensors refuses them, and so do we."""
    oracle.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    key, value = (f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "kv")
    header[key]["data_offsets"] = header[value]["data_offsets"]
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(ModelLoadFailed, match=r"model\.safetensors: the file is damaged .*overlap"):
        inspect(tmp_path)
