"""Our forward pass against transformers' `MixtralForCausalLM`, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

import serve_app.tiny
from serve_app.model.kv import KVCache
from tests.model.driver import (
    Paged,
    load_float32,
    load_folder,
    oracle_logits,
    random_ids,
    random_oracle,
)

SHAPES: dict[str, dict[str, Any]] = {
    "one-layer": {"num_hidden_layers": 1},
    "three-layers": {"num_hidden_layers": 3},
    "heads-4-4": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "heads-8-2": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "heads-12-3": {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96},
    "experts-4-top-1": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "experts-5-top-3": {"num_local_experts": 5, "num_experts_per_tok": 3},
    "experts-16-top-4": {"num_local_experts": 16, "num_experts_per_tok": 4},
    "window": {"sliding_window": 7},
    "tied-head": {"tie_word_embeddings": True},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "head-dim": {"head_dim": 20},
    "odd-widths": {"hidden_size": 72, "num_attention_heads": 4, "intermediate_size": 40},
}


def paged(oracle: Any, folder: Path, **how: int) -> Paged:
    oracle.save_pretrained(folder)
    return Paged(load_float32(folder), **how)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_for_every_shape(shape: str, tmp_path: Path) -> None:
    """Prefill whole, in chunks, and token by token: each gives the oracle's logits."""
    oracle = random_oracle(**SHAPES[shape])
    ids = random_ids(45)
    expected = oracle_logits(oracle, ids)
    engine = paged(oracle, tmp_path)

    assert_close(engine.step(whole=ids)["whole"], expected)
    for start, end in ((0, 16), (16, 17), (17, 40), (40, 45)):
        assert_close(engine.step(chunked=ids[start:end])["chunked"], expected[start:end])
    for i, token in enumerate(ids[:20]):
        assert_close(engine.step(decoded=[token])["decoded"], expected[i : i + 1])


def test_a_mixed_batch_gives_each_sequence_its_own_logits(tmp_path: Path) -> None:
    """Prefill chunks, decodes and first tokens of other sequences in one batch do not mix."""
    oracle = random_oracle()
    ids = {name: random_ids(60, seed=seed) for seed, name in enumerate("abcde")}
    expected = {name: oracle_logits(oracle, tokens) for name, tokens in ids.items()}
    engine = paged(oracle, tmp_path)

    schedule: list[dict[str, tuple[int, int]]] = [
        {"a": (0, 10), "b": (0, 33), "c": (0, 1)},
        {"a": (10, 11), "d": (0, 20), "c": (1, 2), "b": (33, 34)},
        {"d": (20, 50), "a": (11, 12), "b": (34, 35), "c": (2, 30), "e": (0, 60)},
        {"a": (12, 13), "b": (35, 36), "c": (30, 31), "d": (50, 51)},
    ]
    for parts in schedule:
        logits = engine.step(**{name: ids[name][slice(*part)] for name, part in parts.items()})
        for name, part in parts.items():
            assert_close(logits[name], expected[name][slice(*part)])


def test_only_the_sampled_rows_are_answered(tmp_path: Path) -> None:
    """`sample_rows` picks and orders the logits; none is a batch without logits."""
    oracle = random_oracle()
    ids = random_ids(9)
    expected = oracle_logits(oracle, ids)
    engine = paged(oracle, tmp_path)

    assert_close(engine.step(s=ids, rows=[8, 2])["s"], expected[[8, 2]])
    assert engine.step(t=ids, rows=[])["t"].shape == (0, 96)


@pytest.mark.parametrize("block_size", [1, 8, 16, 24])
def test_the_block_size_does_not_change_the_logits(block_size: int, tmp_path: Path) -> None:
    """Blocks of any size hold the same context."""
    oracle = random_oracle()
    ids = random_ids(50)
    expected = oracle_logits(oracle, ids)
    engine = paged(oracle, tmp_path, block_size=block_size)

    assert_close(engine.step(s=ids[:47])["s"], expected[:47])
    for i in (47, 48, 49):
        assert_close(engine.step(s=[ids[i]])["s"], expected[i : i + 1])


def test_very_different_contexts_decode_together(tmp_path: Path) -> None:
    """Contexts far apart are computed in groups of their own, each row in its own place."""
    oracle = random_oracle(max_position_embeddings=2048)
    long, short = random_ids(1500, seed=1), random_ids(6, seed=2)
    engine = paged(oracle, tmp_path)
    for start in range(0, 1499, 500):
        engine.step(long=long[start : min(start + 500, 1499)])
    engine.step(short=short[:4], other=short[:5])

    logits = engine.step(short=[short[4]], long=[long[1499]], other=[short[5]])
    assert_close(logits["long"], oracle_logits(oracle, long)[-1:])
    assert_close(logits["short"], oracle_logits(oracle, short)[4:5])
    assert_close(logits["other"], oracle_logits(oracle, short)[5:6])


def test_decodes_between_chunks_keep_their_places(tmp_path: Path) -> None:
    """Decodes whose order by context length is not their order in the batch are not mixed up."""
    oracle = random_oracle()
    ids = {name: random_ids(50, seed=seed) for seed, name in enumerate("abcd")}
    engine = paged(oracle, tmp_path)
    lengths = {"a": 40, "b": 5, "c": 10, "d": 30}
    engine.step(**{name: ids[name][:length] for name, length in lengths.items()})

    new = {"a": 1, "b": 9, "c": 1, "d": 1}
    logits = engine.step(
        **{name: ids[name][start : start + new[name]] for name, start in lengths.items()}
    )
    for name, start in lengths.items():
        expected = oracle_logits(oracle, ids[name])[start : start + new[name]]
        assert_close(logits[name], expected)


def test_bfloat16_follows_transformers(tmp_path: Path) -> None:
    """In bfloat16 the logits are float32 numbers near the oracle's in bfloat16."""
    oracle = random_oracle(initializer_range=0.05)
    oracle.save_pretrained(tmp_path)
    ids = random_ids(40)
    model = load_folder(tmp_path, torch.bfloat16)

    ours = Paged(model).step(s=ids)["s"]
    theirs = oracle_logits(oracle.bfloat16(), ids).float()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * float(theirs.abs().max()))


def test_a_nan_of_one_sequence_does_not_reach_others(tmp_path: Path) -> None:
    """A NaN in another sequence's blocks stays there, and `clear` makes the blocks usable."""
    oracle = random_oracle()
    ids = random_ids(20)
    expected = oracle_logits(oracle, ids)
    engine = paged(oracle, tmp_path)
    zero = torch.tensor([0])
    for pages in (*engine.cache.keys, *engine.cache.values):
        pages[0] = torch.nan  # tables are padded with block 0
    engine.free.remove(0)
    engine.step(short=ids[:3], long=ids)
    assert_close(engine.step(short=[ids[3]], long=[ids[0]])["short"], expected[3:4])

    engine.cache.clear(zero)
    engine.free.append(0)
    engine.step(heir=ids[:5])
    assert engine.blocks["heir"] == [0]
    assert_close(engine.step(heir=[ids[5]])["heir"], expected[5:6])


def test_clear_fills_its_blocks_alone() -> None:
    """`clear` zeroes the keys and values of its blocks in each layer, and no others."""
    stored = torch.rand(3, 2, 5, 4, 2, 8) + 1
    KVCache(stored).clear(torch.tensor([1, 4]))
    expected = torch.zeros_like(stored, dtype=torch.bool)
    expected[:, :, [1, 4]] = True
    assert torch.equal(stored == 0, expected)


def test_the_tiny_model_answers_as_in_transformers() -> None:
    """The checkpoint in this package: the oracle's logits for a prompt and its greedy answer."""
    from tokenizers import Tokenizer
    from transformers import MixtralForCausalLM

    folder = Path(serve_app.tiny.__file__).parent / "checkpoint"
    oracle = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode("[INST] What is 2 + 3? [/INST]").ids
    with torch.no_grad():
        answer = oracle.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
        ids = answer[0].tolist()
        expected = oracle_logits(oracle, ids)

    engine = Paged(load_float32(folder))
    assert_close(engine.step(s=ids[: len(prompt)])["s"], expected[: len(prompt)])
    for i in range(len(prompt), len(ids)):
        assert_close(engine.step(s=[ids[i]])["s"], expected[i : i + 1])
