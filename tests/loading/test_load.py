"""A load of the tiny model: its phases, its notes, and its errors."""

import asyncio
import json
import logging
import resource
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed
from serve_app.loading import warm_up
from serve_app.loading.load import load
from serve_app.loading.load_log import LoadLog
from serve_app.loading.phases import Done, Phase, Running, read_events
from serve_app.model.quantization import Quantization
from serve_app.tiny import CHECKPOINT
from tests.fakes import answer

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@pytest.mark.parametrize(("config", "quantization"), [("tiny", "none"), ("tiny-nf4", "nf4")])
def test_the_load_writes_its_phases(tmp_path: Path, config: str, quantization: str) -> None:
    """A phase has an event when it starts and when it ends; /health shows the same phases."""
    load_log = tmp_path / "load.jsonl"
    settings = Settings.from_yaml(f"configs/{config}.yaml").model_copy(
        update={"load_log": str(load_log)}
    )
    one = MixtralServer(settings)
    try:
        lines = [json.loads(line) for line in load_log.read_text().splitlines()]
        health = one.health()
    finally:
        one.close()
    reading = "read" if quantization == "none" else "read and quantize"
    phases = ["device", "resolve", "tokenizer", reading, "warm-up", "first token"]
    assert [line["phase"] for line in lines if line["state"] == "started"] == phases
    done = [line["phase"] for line in lines if line["state"] == "done"]
    assert done == [*phases, "ready"]
    assert [phase["phase"] for phase in health["load"]] == done
    *parts, whole = [phase["seconds"] for phase in health["load"]]
    assert all(seconds >= 0 for seconds in parts)
    assert whole == pytest.approx(sum(parts), abs=0.01)
    assert health["engine"]["kv_blocks_used"] == 0
    assert health["model"] == {"id": "tiny", "quantization": quantization, "dtype": "float32"}
    assert health["engine"]["kv_blocks_total"] == 65536 // 16
    assert health["memory"].keys() == {"experts", "attention", "head", "other", "kv_cache"}
    experts = 4 * 8 * 3 * 128 * 192  # weights
    said = "experts and attention in nf4, absmax bfloat16"
    assert (said in health["notes"]) == (quantization == "nf4")
    assert health["memory"]["experts"] == experts * (4 if quantization == "none" else 17 / 32)
    assert health["memory"]["kv_cache"] == 65536 * 4 * 2 * 2 * 32 * 4


def test_the_kernels_of_a_gpu_are_a_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For weights in 4 bits on a GPU: the folder for compiled kernels is in `model.cache_dir`, an
    image's is read too, and the note is passed on. Floats and a CPU have no such phase."""
    import torch

    from serve_app.loading import load as loading
    from serve_app.model.kernels.cuda import use_kernels
    from tools.random_model import config_of, random_model

    cuda, cpu, asked = torch.device("cuda"), torch.device("cpu"), list[Path]()

    def use(_: Any, cache: Path, filled: list[Path]) -> str:
        asked.extend([cache, *filled])
        return "a note"

    monkeypatch.setattr(use_kernels, "use_cuda_kernels", use)
    settings = Settings.from_yaml("configs/tiny.yaml")
    chosen = settings.model.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    settings = settings.model_copy(update={"model": chosen})
    monkeypatch.setattr(loading, "explained_lack_of_memory", lambda *_: nullcontext())
    load_log = LoadLog(str(tmp_path / "load.jsonl"))
    sizes = config_of(tiny=True, layers=1)
    floats, quantized = (
        random_model(sizes, how, torch.float32, cpu)
        for how in (None, Quantization("nf4", "bfloat16"))
    )
    assert loading._choose_kernels(settings, quantized, cuda, load_log) == ["a note"]
    assert loading._choose_kernels(settings, quantized, cpu, load_log) == []
    assert loading._choose_kernels(settings, floats, cuda, load_log) == []
    filled = Path(loading.KERNELS_FOLDER).expanduser()
    assert asked == [tmp_path / "cache" / "kernels", filled / "kernels"]
    events = read_events(tmp_path / "load.jsonl")
    assert [each.phase for each in events if isinstance(each, Done)] == [Phase.KERNELS]


def test_the_load_computes_its_first_prompts() -> None:
    """Before a request arrives, prompts of several sizes and a first token are computed."""
    settings = Settings.from_yaml("configs/tiny.yaml")
    loaded = load(settings, LoadLog(None))
    try:
        stats = loaded.engine.stats()
        num_hello = len(loaded.tokenizer.encode("Hello"))
        sizes = warm_up.prompt_sizes(loaded.engine.config)
        assert stats.num_prompt_tokens == sum(sizes) + num_hello
        assert stats.num_generation_tokens == 2 * len(sizes) + 1
    finally:
        loaded.engine.stop()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"engine": {"max_model_len": 20000}}, "was trained for 16384 tokens"),
        ({"engine": {"kv_cache_tokens": 64}}, "kv_cache_tokens"),
        (
            {"engine": {"kv_cache_tokens": 10**12}},
            r"2048000.00 GB are needed, but only \d+.\d\d GB",
        ),
    ],
)
def test_a_load_that_fails_says_why(tmp_path: Path, args: dict[str, Any], sentence: str) -> None:
    """The error is one sentence, raised and written to the load log, and is not to be retried."""
    load_log = tmp_path / "load.jsonl"
    model = {"name": "tiny", "quantization": "none", "dtype": "float32", "device": "cpu"}
    settings = Settings(**{"model": model, "load_log": str(load_log), **args})
    with pytest.raises(ModelLoadFailed, match=sentence) as failed:
        MixtralServer(settings)
    last = json.loads(load_log.read_text().splitlines()[-1])
    assert (last["state"], last["error"]) == ("failed", failed.value.message)
    assert last["retry"] is False


def edited(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> Settings:
    """Settings of a copy of the tiny checkpoint in which one JSON file is changed."""
    shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))
    model = {"name": str(folder), "quantization": "none", "dtype": "float32", "device": "cpu"}
    return Settings(model=model, engine={"kv_cache_tokens": 16384, "num_threads": 1})


@pytest.mark.parametrize(
    "edit",
    [
        lambda tokenizer: tokenizer["model"].update(type="None"),
        lambda tokenizer: tokenizer["model"].update(merges=[["zz", "qq"]]),
        lambda tokenizer: tokenizer.update(decoder={"type": "None"}),
        lambda tokenizer: tokenizer.update(added_tokens=5),
    ],
    ids=["model", "merges", "decoder", "added"],
)
def test_a_tokenizer_that_is_broken_says_so(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    """The bare Exception that tokenizers raises becomes one sentence."""
    with pytest.raises(ModelLoadFailed, match="tokenizer cannot be read"):
        MixtralServer(edited(tmp_path, "tokenizer.json", edit))


def test_a_checkpoint_without_a_chat_template_is_served(tmp_path: Path) -> None:
    """Text is completed, a chat is refused with the route to use, and /health has a note."""
    one = MixtralServer(
        edited(tmp_path, "tokenizer_config.json", lambda config: config.pop("chat_template"))
    )
    try:
        completed = asyncio.run(answer(one, "/v1/completions", {"prompt": "a", "max_tokens": 2}))
        refused = asyncio.run(answer(one, "/prompt", {"prompt": "a"}))
        health = one.health()
    finally:
        one.close()
    assert completed["usage"]["completion_tokens"] > 0
    assert "use /v1/completions" in refused["error"]["message"]
    assert any("no chat template" in note for note in health["notes"])


def test_text_with_a_token_that_the_model_lacks(tmp_path: Path) -> None:
    """A fine-tune's `[PAD]` is text in a chat, and a raw prompt with it is a 400 that names it."""
    pad = {"id": 768, "content": "[PAD]", "special": True, **dict.fromkeys(FLAGS, False)}
    one = MixtralServer(
        edited(tmp_path, "tokenizer.json", lambda content: content["added_tokens"].append(pad))
    )
    try:
        body = {"prompt": "a [PAD] b", "max_tokens": 2}
        refused = asyncio.run(answer(one, "/v1/completions", body))
        answered = asyncio.run(answer(one, "/prompt", body))
        ids = asyncio.run(answer(one, "/v1/completions", {"prompt": [768], "max_tokens": 2}))
    finally:
        one.close()
    assert "`prompt` contains `[PAD]`" in refused["error"]["message"]
    assert "`prompt` contains `[PAD]`" in ids["error"]["message"]
    assert refused["error"]["param"] == "prompt"
    assert answered["usage"]["completion_tokens"] == 2


def test_a_replica_resumes_its_parents_log(tmp_path: Path) -> None:
    """The replica keeps its parent's phases and ends the one that the parent left open."""
    path = tmp_path / "load.jsonl"
    assert read_events(path) == []
    parent = LoadLog(str(path))
    parent.done(Phase.RAY, 3.5)
    parent.start(Phase.REPLICA)
    replica = LoadLog.resume(str(path))
    with replica.phase(Phase.READ):
        pass
    replica.ready()
    assert [phase["phase"] for phase in replica.phases] == ["ray", "replica", "read", "ready"]
    assert replica.phases[0]["seconds"] == 3.5
    assert replica.phases[-1]["seconds"] >= 3.5
    # One that replaces it has a load of its own, and a parent that starts anew begins at nothing.
    assert LoadLog.resume(str(path)).phases == []
    with path.open("a") as file:
        file.write('{"phase": "half a li')
    assert read_events(path)[-1] == Done(phase=Phase.READY, seconds=replica.phases[-1]["seconds"])
    parent.clear()
    assert (read_events(path), parent.phases) == ([], [])


def test_progress_is_written_once_a_second_at_most(tmp_path: Path) -> None:
    """A thousand calls within a second write fewer than ten events."""
    load_log = LoadLog(str(tmp_path / "load.jsonl"))
    for part in range(1000):
        load_log.progress(Phase.READ, part / 1000)
    lines = (tmp_path / "load.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"phase": "read", "state": "running", "done": 0.0}
    path = tmp_path / "sized.jsonl"
    LoadLog(str(path)).progress(Phase.DOWNLOAD, 0.5, 1000)
    assert read_events(path) == [Running(phase=Phase.DOWNLOAD, done=0.5, bytes=1000)]
    assert len(lines) < 10


def test_a_load_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A `load_log` in a folder that does not exist is an error that names the file."""
    path = tmp_path / "absent" / "load.jsonl"
    with pytest.raises(ModelLoadFailed, match=str(path)), LoadLog(str(path)).phase(Phase.DEVICE):
        pass


def test_a_full_disk_ends_no_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file has whole events, as many as fit; one warning says that others are missing."""
    path = tmp_path / "load.jsonl"
    load_log = LoadLog(str(path))
    load_log.start(Phase.READ)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        load_log.done(Phase.READ, 1.0)
        load_log.done(Phase.WARM_UP, 2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    load_log.done(Phase.READY, 3.0)
    assert [event.state for event in read_events(path)] == ["started", "done"]
    assert [phase["seconds"] for phase in load_log.phases] == [1.0, 2.0, 3.0]
    (warning,) = (each for each in caplog.records if each.levelno == logging.WARNING)
    assert str(path) in warning.getMessage()
