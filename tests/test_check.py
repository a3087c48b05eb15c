"""The check: one sentence about what is wrong, before anything starts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.check import main
from serve_app.cold_start.check import check
from serve_app.tiny import CHECKPOINT


def config(folder: Path, **args: Any) -> Path:
    """Writes configs/tiny.yaml with a free port and these sections of `args:`; returns its path."""
    document = yaml.safe_load(Path("configs/tiny.yaml").read_text())
    document["applications"][0]["args"] |= args
    document["http_options"]["port"] = 0  # any port: 8000 may be in use on this machine
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def model(path: Path) -> dict[str, str]:
    return {"name": str(path), "quantization": "none", "device": "cpu"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, copy)
    return copy


def sentence(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    """Returns the one line on stderr for a configuration that cannot work; the exit code is 1."""
    assert main([str(path)]) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_the_shipped_model_passes() -> None:
    """The tiny configuration passes, and the lines have its context and KV cache."""
    lines = check("configs/tiny.yaml").lines
    assert any("context 16,384 tokens" in line for line in lines)
    assert any("KV cache" in line for line in lines)


def test_the_command_is_a_module_of_its_own(tmp_path: Path) -> None:
    """`python -m serve_app.check` exits 0 if all is well."""
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.check", str(config(tmp_path))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "the configuration is valid" in done.stdout


def test_misspelt_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown key in `args:` is named together with its file."""
    path = config(tmp_path, engine={"max_runing": 3})
    said = sentence(capsys, path)
    assert str(path) in said
    assert "`engine.max_runing`" in said


def test_key_that_serve_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong key outside `args:` is named."""
    path = config(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["applications"][0]["deployments"] = [{"name": "mixtral", "num_replica": 2}]
    path.write_text(yaml.safe_dump(document))
    assert "num_replica" in sentence(capsys, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("import_path", "serve_app.app:biuld_app"), ("deployments", [{"name": "mixtrl"}])],
)
def test_names_that_serve_would_not_find(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    """A misspelt import path or deployment is named before Serve starts."""
    path = config(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["applications"][0][key] = value
    path.write_text(yaml.safe_dump(document))
    assert f"`{key}`" in sentence(capsys, path)


def test_several_applications(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second application, which would not be served, is refused."""
    path = config(tmp_path)
    document = yaml.safe_load(path.read_text())
    other = {**document["applications"][0], "name": "other", "route_prefix": "/other"}
    document["applications"].append(other)
    path.write_text(yaml.safe_dump(document))
    assert "`applications` has 2 entries" in sentence(capsys, path)


def test_repeated_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that occurs twice in one mapping, of which YAML uses the last, is refused."""
    path = config(tmp_path)
    text = path.read_text()
    line = next(line for line in text.splitlines() if "kv_cache_tokens" in line)
    path.write_text(text.replace(line, f"{line}\n{line}"))
    number = text.splitlines().index(line) + 2
    assert f"`kv_cache_tokens` in line {number}" in sentence(capsys, path)


def test_keys_that_serve_run_alone_uses_are_named(tmp_path: Path) -> None:
    """The check passes and says which keys change nothing with `mixtral-serve run`."""
    path = config(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["logging_config"] = {"log_level": "DEBUG"}
    document["applications"][0] |= {"route_prefix": "/llm", "runtime_env": {}}
    path.write_text(yaml.safe_dump(document))
    (line,) = (line for line in check(path).lines if "only `serve run` uses" in line)
    keys = ("logging_config", "applications.0.route_prefix", "applications.0.runtime_env")
    assert all(f"`{key}`" in line for key in keys)
    assert not any("only `serve run` uses" in line for line in check("configs/tiny.yaml").lines)


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there is named."""
    said = sentence(capsys, config(tmp_path, model=model(tmp_path / "absent")))
    assert str(tmp_path / "absent") in said


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_missing_file(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The error names the missing file."""
    (checkpoint / name).unlink()
    assert name in sentence(capsys, config(tmp_path, model=model(checkpoint)))


def test_truncated_weights(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A half downloaded file is found without reading it."""
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    said = sentence(capsys, config(tmp_path, model=model(checkpoint)))
    assert str(weights) in said
    assert "download it again" in said


def test_pickled_weights(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pickle is refused by name."""
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "pytorch_model.bin" in sentence(capsys, config(tmp_path, model=model(checkpoint)))


def test_another_architecture(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that is no Mixtral is refused by its key."""
    document = json.loads((checkpoint / "config.json").read_text())
    document["model_type"] = "llama"
    (checkpoint / "config.json").write_text(json.dumps(document))
    assert "`model_type`" in sentence(capsys, config(tmp_path, model=model(checkpoint)))


def test_context_longer_than_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A context that the checkpoint cannot hold is refused with both numbers."""
    said = sentence(capsys, config(tmp_path, engine={"max_model_len": 20_000}))
    assert "20000" in said
    assert "16384" in said


def test_kv_cache_smaller_than_the_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache that cannot hold one full context is refused with both numbers."""
    said = sentence(capsys, config(tmp_path, engine={"kv_cache_tokens": 1024}))
    assert "1,024" in said
    assert "16,384" in said


@pytest.mark.parametrize("text", ["{}", '{"version": "1.0", "mod', '{"model": {"type": "Elf"}}'])
def test_damaged_tokenizer(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """A tokenizer that will not load is named before anything starts."""
    (checkpoint / "tokenizer.json").write_text(text)
    said = sentence(capsys, config(tmp_path, model=model(checkpoint)))
    assert str(checkpoint / "tokenizer.json") in said


def edit_tokenizer(checkpoint: Path, **values: Any) -> None:
    """Changes tokenizer_config.json."""
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", "its chat template is broken in line 1"),
        ("{{ raise_exception('Send a system message.') }}", "Send a system message."),
        ("{{ messages[0].content }}{{ '<|im_end|>' }}", "contains `<|im_end|>`"),
    ],
)
def test_chat_template_that_cannot_work(
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    template: str,
    said: str,
) -> None:
    """A broken template, one that refuses a question, and one with tokens that the model lacks."""
    token = {"content": "<|im_end|>", "special": True}
    edit_tokenizer(checkpoint, chat_template=template, added_tokens_decoder={"768": token})
    assert said in sentence(capsys, config(tmp_path, model=model(checkpoint)))


def test_tokenizer_of_another_model(
    tmp_path: Path, checkpoint: Path, mixtral_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer whose ids the model does not have is refused, with the size of its vocabulary."""
    shutil.copyfile(mixtral_folder / "tokenizer.json", checkpoint / "tokenizer.json")
    assert "vocabulary has 768 tokens" in sentence(
        capsys, config(tmp_path, model=model(checkpoint))
    )


def test_what_the_tokenizer_lacks_is_said(tmp_path: Path, checkpoint: Path) -> None:
    """A checkpoint without a chat template passes, and a line says what does not work."""
    edit_tokenizer(checkpoint, chat_template=None)
    lines = check(config(tmp_path, model=model(checkpoint))).lines
    assert any("no chat template" in line for line in lines)


def test_special_token_outside_the_vocabulary(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An end token outside the vocabulary is refused; it would fail requests later."""
    document = json.loads((checkpoint / "config.json").read_text())
    document["eos_token_id"] = 99_999
    (checkpoint / "config.json").write_text(json.dumps(document))
    assert "`eos_token_id`" in sentence(capsys, config(tmp_path, model=model(checkpoint)))


def test_too_little_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A KV cache larger than the machine is refused with the size it would need."""
    said = sentence(capsys, config(tmp_path, engine={"kv_cache_tokens": 10**12}))
    assert "GB are free" in said


def test_a_model_on_the_volume_is_found(tmp_path: Path) -> None:
    """RunPod's model cache lies under `runpod.volume`, in lower case, and needs no network."""
    hub = tmp_path / "volume" / "huggingface-cache" / "hub"
    shutil.copytree(CHECKPOINT, hub / "models--someone--mixtral-tiny" / "snapshots" / "abc")
    path = config(
        tmp_path,
        model=model(Path("Someone/Mixtral-Tiny")),
        runpod={"volume": str(tmp_path / "volume")},
    )
    assert any("context 16,384 tokens" in line for line in check(path).lines)


def test_names_of_other_workers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of another worker that has no effect here is named in the lines."""
    monkeypatch.setenv("DEFAULT_BATCH_SIZE", "50")
    assert any("DEFAULT_BATCH_SIZE" in line for line in check("configs/tiny.yaml").lines)
