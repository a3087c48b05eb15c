"""Fixtures for tests that kill whole processes."""

import shutil
from pathlib import Path

import pytest
import yaml

from serve_app.tiny import CHECKPOINT
from tests.worker.conftest import TINY


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, which a test may break."""
    return shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")


@pytest.fixture
def config(tmp_path: Path, checkpoint: Path) -> Path:
    """The path of a configuration that serves `checkpoint`."""
    document = yaml.safe_load(TINY.read_text())
    document["applications"][0]["args"]["model"]["name"] = str(checkpoint)
    document["applications"][0]["args"]["model"]["served_model_name"] = "tiny"
    document["applications"][0]["args"]["model"]["device"] = "cpu"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def spoil(checkpoint: Path) -> None:
    """Breaks the tokenizer in a way that only a load finds."""
    (checkpoint / "tokenizer_config.json").write_text('{"eos_token": 5}')
