"""Stop tokens and sampling defaults: both are read from all files that have them."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from serve_app.api.server import MixtralServer
from serve_app.cold_start.check import check_plan
from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed
from serve_app.loading.generation import FIELDS, Generation, read_generation
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.start_plan.plan import plan_start
from serve_app.tiny import CHECKPOINT
from tests.fakes import answer

Files = dict[str, dict[str, Any] | None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that names no end of an answer in any file."""
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    change(tmp_path, "config.json", eos_token_id=None)
    change(tmp_path, "tokenizer_config.json", eos_token=None)
    (tmp_path / "generation_config.json").unlink()
    return tmp_path


def change(folder: Path, name: str, **values: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    content = {key: value for key, value in {**content, **values}.items() if value is not None}
    file.write_text(json.dumps(content))


def generation(folder: Path, use: Any = "auto") -> Generation:
    return read_generation(inspect(folder), Tokenizer(folder), use)


def settings(folder: Path, **model: Any) -> Settings:
    how = {"name": str(folder), "quantization": "none", "dtype": "float32", "device": "cpu"}
    engine = {"kv_cache_tokens": 16384, "num_threads": 1}
    return Settings(model={**how, **model}, engine=engine)


@contextmanager
def server(folder: Path, **model: Any) -> Iterator[Callable[..., Any]]:
    one = MixtralServer(settings(folder, **model))
    try:
        yield lambda **body: asyncio.run(answer(one, "/v1/completions", {"prompt": "a", **body}))
    finally:
        one.close()


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("config.json", {"eos_token_id": [2, 5]}, {2, 5}),
        ("generation_config.json", {"eos_token_id": 7}, {7}),
        ("generation_config.json", {"eos_token_id": [2, 7]}, {2, 7}),
        ("tokenizer_config.json", {"eos_token": "</s>"}, {2}),
    ],
)
def test_each_file_may_name_the_end(
    name: str, values: dict[str, Any], expected: set[int], folder: Path
) -> None:
    """config.json, generation_config.json and the tokenizer count alike."""
    change(folder, name, **values)
    assert generation(folder).eos_token_ids == expected
    change(folder, "config.json", eos_token_id=3)
    if name != "config.json":
        assert generation(folder).eos_token_ids == expected | {3}


@pytest.mark.parametrize("value", [True, "</s>", 768, -1, [2, False], [[2]], 2.0])
def test_what_is_no_token_id_is_refused(value: Any, folder: Path) -> None:
    """The sentence has the file, the key and the value."""
    change(folder, "generation_config.json", eos_token_id=value)
    with pytest.raises(ModelLoadFailed, match=r"generation_config.json: `eos_token_id`") as caught:
        generation(folder)
    assert repr(value) in caught.value.message


def test_an_answer_ends_where_generation_config_says(folder: Path) -> None:
    """With all tokens as ends, the first one ends the answer."""
    change(folder, "generation_config.json", eos_token_id=list(range(768)))
    with server(folder) as complete:
        choice = complete(max_tokens=50)["choices"][0]
    assert (choice["finish_reason"], choice["text"]) == ("stop", "")


def test_no_known_end_is_said(folder: Path) -> None:
    """`check` and `/health` have a note if no file names an end token, and none otherwise."""
    said = "o eos token is known"
    chosen = settings(folder)
    assert any(said in line for line in check_plan(chosen, plan_start(chosen)))
    one = MixtralServer(chosen)
    one.close()
    assert any(said in note for note in one.health()["notes"])
    assert generation(CHECKPOINT).notes == []


def test_defaults_are_those_that_vllm_takes(folder: Path) -> None:
    """vLLM takes what transformers' `to_diff_dict` has of six keys, and none with "vllm"."""
    from transformers import GenerationConfig

    values: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9, "top_k": 40}
    values |= {"repetition_penalty": 1.1, "max_new_tokens": 30, "do_sample": True, "num_beams": 4}
    GenerationConfig(**values).save_pretrained(folder)
    differing = GenerationConfig.from_pretrained(folder).to_diff_dict()
    expected = {FIELDS[key]: value for key, value in differing.items() if key in FIELDS}
    assert generation(folder).defaults == expected
    assert "temperature 0.6" in generation(folder).notes[-1]
    assert generation(folder, "vllm").defaults == {}


def test_requests_without_a_field_get_the_default(folder: Path) -> None:
    """temperature 0 repeats itself; a request's own value wins, but not over max_new_tokens."""
    change(folder, "generation_config.json", temperature=0.0, max_new_tokens=6)
    with server(folder) as complete:
        answers = [complete()["choices"][0]["text"] for _ in range(3)]
        assert len(set(answers)) == 1
        assert complete()["usage"]["completion_tokens"] == 6
        assert complete(max_tokens=60)["usage"]["completion_tokens"] == 6
        assert complete(max_tokens=4)["usage"]["completion_tokens"] == 4
        warm = [complete(temperature=2.0, seed=seed)["choices"][0]["text"] for seed in range(3)]
        assert len(set(warm)) > 1
    with server(folder, generation_config="vllm") as complete:
        assert complete(max_tokens=20)["usage"]["completion_tokens"] == 20


def test_prompt_keeps_its_own_temperature(folder: Path) -> None:
    """`/prompt` is sampled with 0.7 whatever the file says; its other defaults hold there too."""
    change(folder, "generation_config.json", temperature=0.0, max_new_tokens=6)
    one = MixtralServer(settings(folder))
    try:
        bodies = [{"prompt": "Tell me a joke.", "seed": seed} for seed in range(8)]
        answers = [asyncio.run(answer(one, "/prompt", body)) for body in bodies]
        chats = [asyncio.run(answer(one, "/v1/completions", body)) for body in bodies[:3]]
    finally:
        one.close()
    assert len({answer["text"] for answer in answers}) > 1
    assert max(answer["usage"]["completion_tokens"] for answer in answers) <= 6
    assert len({chat["choices"][0]["text"] for chat in chats}) == 1


def test_an_impossible_default_says_what_to_do(folder: Path) -> None:
    """The sentence names the file and the setting; with "vllm" the file's value does not matter."""
    change(folder, "generation_config.json", temperature=7)
    with pytest.raises(ModelLoadFailed, match=r"generation_config.json: `temperature`.*vllm\."):
        generation(folder)
    assert generation(folder, "vllm").defaults == {}
