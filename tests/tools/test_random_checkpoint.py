"""A checkpoint of random weights loads as our own form does, and a stopped run continues."""

from pathlib import Path

import pytest
import torch

from serve_app.model.batch import Batch
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.loader import load
from serve_app.model.kv import KVCache
from serve_app.protocol.tokenizer import Tokenizer
from tests import mistral
from tools import random_checkpoint
from tools.random_model import SCALE

CPU, TOKENS = torch.device("cpu"), 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("random")
    random_checkpoint.write(written, random_checkpoint.document_of(tiny=True, layers=1))
    return written


def test_its_logits_are_finite_and_spread_as_a_models_are(folder: Path) -> None:
    """The checkpoint passes the loader, and its logits have a standard deviation near that of
    lm_head times a normalized vector."""
    checkpoint = inspect(folder)
    assert checkpoint.form == "fused"
    quantization = checkpoint.quantization
    model = load(checkpoint, dtype=torch.float32, device=CPU, quantization=quantization)
    cache = KVCache.allocate(checkpoint.config, 1, TOKENS, torch.float32, CPU)
    where = torch.arange(TOKENS)
    tables, last = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([TOKENS - 1])
    batch = Batch(where * 999, where, where, [TOKENS], [TOKENS], tables, last)
    logits = model(batch, cache)
    expected = SCALE * checkpoint.config.hidden_size**0.5
    assert float(logits.std()) == pytest.approx(expected, rel=0.2)


def test_its_tokenizer_is_mixtrals_own(folder: Path) -> None:
    """A conversation has the ids that Mistral's encoder gives it."""
    chat = [{"role": "user", "content": "  def f(x):\n    return 'é日'"}]
    assert Tokenizer(folder).render(chat) == mistral.ids(chat)


def test_a_stopped_run_writes_only_what_is_missing(folder: Path) -> None:
    """A second run keeps a complete file and writes a missing one with the same bytes."""
    kept, lost = sorted(folder.glob("*.safetensors"))
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    random_checkpoint.write(folder, random_checkpoint.document_of(tiny=True, layers=1))
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content


def test_other_sizes_replace_a_checkpoint(folder: Path) -> None:
    """The same folder with other sizes gets the new model's files."""
    document = random_checkpoint.document_of(tiny=True, layers=1)
    random_checkpoint.write(folder, {**document, "intermediate_size": 256})
    assert inspect(folder).config.intermediate_size == 256
