"""One compute thread for all tests here, and a random Mixtral with its transformers twin."""

from collections.abc import Iterator

import pytest
import torch

from tests.engine.mixtral import Pair
from tests.model.driver import load_float32, random_oracle


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    oracle = random_oracle(seed=3)
    folder = tmp_path_factory.mktemp("mixtral")
    oracle.save_pretrained(folder)
    return Pair(load_float32(folder), oracle)
