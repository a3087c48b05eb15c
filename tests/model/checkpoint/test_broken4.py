"""A broken 4-bit checkpoint is refused in one sentence, before a weight is read where possible."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.convert import convert
from serve_app.model.checkpoint.fused import PIECE_BYTES
from serve_app.model.checkpoint.fused_reader import read_files
from serve_app.model.checkpoint.fused_writer import _checksums, write_tensors
from serve_app.model.checkpoint.source import DTYPES
from serve_app.model.quantization import Quantization
from tests.model.checkpoint.bnb4_files import save_bnb4
from tests.model.driver import load_float32, random_oracle

QUERY = "model.layers.0.self_attn.q_proj.weight"
W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
STATE = "quant_state.bitsandbytes__nf4"
Tensors = dict[str, torch.Tensor]
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def oracle() -> Any:
    return random_oracle(intermediate_size=128)


@pytest.fixture(scope="module")
def bnb4(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bnb4")
    save_bnb4(oracle, folder, shards=1, compress_statistics=True)
    return folder


@pytest.fixture(scope="module")
def own(bnb4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    convert(bnb4, folder)
    return folder


def copy(folder: Path, to: Path) -> Path:
    """Returns a copy that a test may break."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def assert_refused(folder: Path, damage: Break, words: list[str]) -> None:
    """Asserts that the checkpoint is refused after `damage`, not before, with all `words`."""
    inspect(folder)
    damage(folder)
    message = refusal(folder).message
    assert [word for word in words if word not in message] == []


def change(name: str, how: Callable[[Tensors], object]) -> Break:
    """Rewrites the file that holds tensor `name`, header and all but metadata."""

    def rewrite(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = folder / index["weight_map"][name]
        weights = load_file(file)
        how(weights)
        save_file(weights, file)

    return rewrite


def without(name: str) -> Break:
    return change(name, lambda weights: weights.pop(name))


def instead(name: str, tensor: torch.Tensor) -> Break:
    return change(name, lambda weights: weights.update({name: tensor}))


def state(**changes: Any) -> Break:
    def edit(weights: Tensors) -> None:
        document = json.loads(bytes(weights[f"{W1}.{STATE}"].tolist()))
        text = json.dumps({**document, **changes}).encode()
        weights[f"{W1}.{STATE}"] = torch.tensor(list(text), dtype=torch.uint8)

    return change(W1, edit)


def renamed(weights: Tensors, name: str) -> Tensors:
    """Returns the parts of `W1` in 4 bits under the name of another weight."""
    parts = {key: part for key, part in weights.items() if key.startswith(W1)}
    return {key.replace(W1, name): part.clone() for key, part in parts.items()}


def config(**changes: Any) -> Break:
    def edit(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        document["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(document))

    return edit


def refusal(folder: Path) -> ModelLoadFailed:
    with pytest.raises(ModelLoadFailed) as caught:
        inspect(folder)
    assert caught.value.message.endswith(".")
    assert not caught.value.retry
    return caught.value


BROKEN_BNB4: dict[str, tuple[Break, list[str]]] = {
    "no absmax": (without(f"{W1}.absmax"), [f"`{W1}.absmax`", "no file has"]),
    "no code": (without(f"{W1}.quant_map"), [f"`{W1}.quant_map`"]),
    "no nested absmax": (without(f"{W1}.nested_absmax"), [f"`{W1}.nested_absmax`"]),
    "no nested code": (without(f"{W1}.nested_quant_map"), [f"`{W1}.nested_quant_map`"]),
    "no state": (without(f"{W1}.{STATE}"), [f"`{W1}.{STATE}`"]),
    "no weight": (without(W1), [f"`{W1}`"]),
    "companion left over": (
        change(W1, lambda w: w.update({f"{W1}.scb": torch.ones(1)})),
        [f"`{W1}.scb`"],
    ),
    "weight cut": (instead(W1, torch.ones(77, 1, dtype=torch.uint8)), [f"`{W1}`", "77 bytes"]),
    "absmax cut": (
        instead(f"{W1}.absmax", torch.ones(7, dtype=torch.uint8)),
        [f"`{W1}.absmax`", "[7]", "128 values"],
    ),
    "absmax in float": (instead(f"{W1}.absmax", torch.ones(128)), [f"`{W1}.absmax`", "F32"]),
    "code too long": (instead(f"{W1}.quant_map", torch.ones(17)), [f"`{W1}.quant_map`", "16"]),
    "another block size": (
        state(blocksize=128),
        ["`blocksize` is 128", "64", "name the float checkpoint"],
    ),
    "another nested block size": (state(nested_blocksize=64), ["`nested_blocksize` is 64"]),
    "another shape": (state(shape=[64, 128]), ["`shape`", "[64, 128]", "[128, 64]"]),
    "no offset": (state(nested_offset=None), ["`nested_offset` is None"]),
    "another type": (state(quant_type="fp4"), ["`quant_type` is 'fp4'"]),
    "state no JSON": (
        instead(f"{W1}.{STATE}", torch.ones(9, dtype=torch.uint8)),
        [f"`{W1}.{STATE}`", "JSON"],
    ),
    "state too deep": (
        instead(f"{W1}.{STATE}", torch.full((100_000,), ord("["), dtype=torch.uint8)),
        [f"`{W1}.{STATE}`", "JSON"],
    ),
    "state no object": (
        instead(f"{W1}.{STATE}", torch.tensor(list(b"[]"), dtype=torch.uint8)),
        [f"`{W1}.{STATE}`", "JSON"],
    ),
    "a quantized norm": (
        change(W1, lambda w: w.update(renamed(w, "model.norm.weight"))),
        ["`model.norm.weight`", "quantized", "name the float checkpoint"],
    ),
    "a quantized head of another shape": (
        change(W1, lambda w: w.update(renamed(w, "lm_head.weight"))),
        ["`lm_head.weight.quant_state", "`shape`", "[96, 64]"],
    ),
    "not said to be quantized": (
        config(load_in_4bit=False, _load_in_4bit=False),
        ["not in 4 bits"],
    ),
}


@pytest.mark.parametrize("what", BROKEN_BNB4)
def test_broken_bitsandbytes_checkpoints(what: str, bnb4: Path, tmp_path: Path) -> None:
    """The error names the companion tensor that is missing or does not fit."""
    assert_refused(copy(bnb4, tmp_path), *BROKEN_BNB4[what])


def test_one_way_to_quantize(oracle: Any, bnb4: Path, tmp_path: Path) -> None:
    """Weights with and without double quantization in one checkpoint are refused by their names."""
    copy(bnb4, tmp_path)
    (tmp_path / "plain").mkdir()
    save_bnb4(oracle, tmp_path / "plain", shards=1, compress_statistics=False)
    plain = load_file(tmp_path / "plain" / "model-00001-of-00001.safetensors")

    def swap(weights: Tensors) -> None:
        for name in [name for name in weights if name.startswith(QUERY)]:
            del weights[name]
        weights |= {name: part for name, part in plain.items() if name.startswith(QUERY)}

    change(QUERY, swap)(tmp_path)
    message = refusal(tmp_path).message
    assert f"`{QUERY}`" in message
    assert "float32" in message
    assert "nested" in message


def test_one_code_for_all(bnb4: Path, tmp_path: Path) -> None:
    """A matrix with 16 values of its own is refused when it is read."""
    copy(bnb4, tmp_path)
    instead(f"{W1}.quant_map", torch.linspace(-1, 1, 16))(tmp_path)
    with pytest.raises(ModelLoadFailed, match=r"w1\.weight\.quant_map` differs"):
        load4(tmp_path)


GATE_UP = "model.layers.0.mlp.experts.gate_up.packed"


def flip(folder: Path) -> None:
    """Flips one bit in the middle of a file's data."""
    file = folder / "model-00001-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def without_version(folder: Path) -> None:
    """Writes a file as version 1 did, which wrote no version."""
    file = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    sums = " ".join(f"{crc:08x}" for crc in _checksums(list(tensors.values())))
    write_tensors(file, tensors, {"crc32": sums})


BROKEN_OWN: dict[str, tuple[Break, list[str]]] = {
    "tensor missing": (without(GATE_UP), [f"`{GATE_UP}`"]),
    "tensor unexpected": (
        change(GATE_UP, lambda w: w.update({"extra": torch.ones(1)})),
        ["`extra`"],
    ),
    "tensor misshapen": (
        instead(GATE_UP, torch.ones(8, 256, 31, dtype=torch.uint8)),
        [f"`{GATE_UP}`", "[8, 256, 31]", "[8, 256, 32]"],
    ),
    "tensor of another dtype": (instead(GATE_UP, torch.ones(8, 256, 32)), [f"`{GATE_UP}`", "F32"]),
    "checksums lost": (change(GATE_UP, lambda w: w), ["checksums are missing", "-00001-of-"]),
    "another version": (config(version=3), ["`quantization_config`", "convert"]),
    "a file of another version": (without_version, ["has version 1", "has version 2"]),
    "another absmax": (config(absmax="float32"), ["U8", "F32"]),
    "an absmax that is none": (config(absmax="int4"), ["`quantization_config`"]),
}


@pytest.mark.parametrize("what", BROKEN_OWN)
def test_broken_checkpoints_of_our_own(what: str, own: Path, tmp_path: Path) -> None:
    """The error names what is not as `convert` wrote it."""
    assert_refused(copy(own, tmp_path), *BROKEN_OWN[what])


def load4(folder: Path) -> None:
    quantization = Quantization("nf4", "nested")
    load_float32(folder, quantization)


def test_a_flipped_bit_is_found_by_its_checksum(own: Path, tmp_path: Path) -> None:
    """The headers are whole, and the load names the file and the place."""
    copy(own, tmp_path)
    load4(tmp_path)
    flip(tmp_path)
    inspect(tmp_path)
    with pytest.raises(ModelLoadFailed, match=r"00001-of-00003.*checksum.*wrong") as caught:
        load4(tmp_path)
    assert caught.value.message.endswith(".")


def test_a_file_that_becomes_shorter_after_its_header_was_read(own: Path, tmp_path: Path) -> None:
    """The read ends with one sentence."""
    checkpoint = inspect(copy(own, tmp_path))
    places = {
        name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        for name, tensor in checkpoint.tensors.items()
    }
    last = tmp_path / "model-00003-of-00003.safetensors"
    os.truncate(last, last.stat().st_size - 1)
    with pytest.raises(ModelLoadFailed, match=r"00003-of-00003.*was truncated"):
        read_files(checkpoint.headers, places, lambda num_bytes: None)


def test_pieces_end_where_tensors_do_not(oracle: Any, tmp_path: Path) -> None:
    """A file of several pieces, whose tensors straddle them, is read to the last byte that a load
    needs; what it keeps for a conversion is checked by that."""
    big = random_oracle(
        num_hidden_layers=1, hidden_size=512, intermediate_size=2304, num_local_experts=9
    )
    big.save_pretrained(tmp_path / "float")
    reads: dict[str, Callable[[Path], None]] = {
        "bfloat16": load4,
        "float32": lambda own: convert(own, own / "back"),
    }
    for absmax, read in reads.items():
        own = tmp_path / absmax
        convert(tmp_path / "float", own, Quantization("nf4", absmax))  # type: ignore[arg-type]
        first = own / "model-00001-of-00002.safetensors"
        assert first.stat().st_size > PIECE_BYTES + 1000
        load4(own)
        data = bytearray(first.read_bytes())
        data[-1] ^= 1
        first.write_bytes(data)
        with pytest.raises(ModelLoadFailed, match="checksum"):
            read(own)
