"""In float32 on a CPU a decode row gets the same bits alone and in any batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import serve_app.tiny
from serve_app.model.quantization import Quantization
from tests.model.driver import Paged, load_float32, random_ids, random_oracle

BATCHES = (1, 2, 3, 5, 8, 13, 31)
LONG = {"max_position_embeddings": 1024}
WIDE = {
    **LONG,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
}


@pytest.fixture(scope="module", params=["narrow", "wide", "tiny", "wide-nf4", "tiny-nf4"])
def full_batch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Paged:
    """32 sequences of 3 to 417 tokens in one cache; "tiny" is the model in this package."""
    shape, _, quant_type = request.param.partition("-")
    how = Quantization("nf4", "bfloat16") if quant_type else None
    torch.set_num_threads(1)
    folder = Path(serve_app.tiny.__file__).parent / "checkpoint"
    if shape != "tiny":
        folder = tmp_path_factory.mktemp(shape)
        random_oracle(**(WIDE if shape == "wide" else LONG)).save_pretrained(folder)
    engine = Paged(load_float32(folder, how), num_blocks=1024)
    for i in range(32):
        length = 3 + (11 if i % 9 else 23) * i
        engine.step(rows=[0], **{f"s{i}": random_ids(length, seed=i)})
    return engine


def decode(full_batch: Paged, members: list[int]) -> Tensor:
    """Returns the logits of one more token of each of `members`, which is removed again: `[members,
    vocab_size]`."""
    before = dict(full_batch.lengths)
    logits = full_batch.step(**{f"s{i}": [i] for i in members})
    full_batch.lengths = before
    return torch.cat(list(logits.values()))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_decode_row_has_the_same_bits_in_any_batch(full_batch: Paged, threads: int) -> None:
    """Batches of 1 to 31 give exactly the logits that the same sequences get among 32."""
    torch.set_num_threads(threads)
    among_all = decode(full_batch, list(range(32)))
    for size in BATCHES:
        first = 7 * size % (33 - size)  # short contexts in some batches, long ones in others
        members = list(range(first, first + size))
        alone = decode(full_batch, members)
        different = (alone != among_all[members]).any(dim=1).nonzero().flatten().tolist()
        assert different == [], f"rows {different} of batch {members}"


@pytest.mark.parametrize("threads", [1, 2])
def test_another_sequences_prefill_does_not_change_a_bit(full_batch: Paged, threads: int) -> None:
    """Decode rows keep their bits beside a prefill chunk in the same step."""
    torch.set_num_threads(threads)
    among_all = decode(full_batch, list(range(32)))
    before = dict(full_batch.lengths)
    for length in (2, 7, 100):
        other = random_ids(length, seed=length)
        logits = full_batch.step(s4=[4], other=other, s20=[20])
        assert torch.equal(logits["s4"], among_all[4:5])
        assert torch.equal(logits["s20"], among_all[20:21])
        full_batch.lengths = dict(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_prefill_chunk_has_the_same_bits_in_any_batch(full_batch: Paged, threads: int) -> None:
    """The same chunk gives the same logits alone and beside decodes and another chunk."""
    torch.set_num_threads(threads)
    before = dict(full_batch.lengths)
    chunk = random_ids(37)
    alone = full_batch.step(new=chunk)["new"]
    full_batch.lengths = dict(before)
    beside = full_batch.step(s1=[1], s2=[2], new=chunk, other=random_ids(90))["new"]
    full_batch.lengths = dict(before)
    assert torch.equal(alone, beside)
