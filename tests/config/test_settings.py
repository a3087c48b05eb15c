"""Settings: YAML is the truth, the environment overrides, nothing unknown passes."""

import pickle
import re
from pathlib import Path

import pytest

from serve_app.config.environment import FAMILIAR, UNNEEDED
from serve_app.config.settings import ConfigError, Settings, application, unneeded_names

TINY = "configs/tiny.yaml"


def write(folder: Path, args: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(f"applications:\n- import_path: serve_app.app:build_app\n  args: {args}\n")
    return path


def test_yaml_is_read() -> None:
    """`args:` of the shipped YAML becomes the settings."""
    settings = Settings.from_yaml(TINY)
    assert settings.model.name == "tiny"
    assert settings.engine.kv_cache_tokens == 65536


def test_environment_wins_over_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    """`MIXTRAL_*` overrides one value and leaves its neighbours as the YAML has them."""
    monkeypatch.setenv("MIXTRAL_ENGINE__MAX_NUM_SEQS", "7")
    settings = Settings.from_yaml(TINY)
    assert settings.engine.max_num_seqs == 7
    assert settings.engine.kv_cache_tokens == 65536


def test_names_that_runpod_users_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A familiar name works too; ours wins over it; an empty one counts as unset."""
    monkeypatch.setenv("MODEL_NAME", "someone/mixtral")
    monkeypatch.setenv("MAX_MODEL_LEN", "4096")
    monkeypatch.setenv("MIXTRAL_ENGINE__MAX_MODEL_LEN", "2048")
    monkeypatch.setenv("QUANTIZATION", "")
    settings = Settings.from_yaml(TINY)
    assert settings.model.name == "someone/mixtral"
    assert settings.engine.max_model_len == 2048
    assert settings.model.quantization == "none"


def test_every_familiar_name_leads_to_a_setting() -> None:
    """No entry of the table points at a field that does not exist."""
    for path in FAMILIAR.values():
        section, key = path.split(".")
        assert key in type(getattr(Settings(), section)).model_fields


def test_names_of_other_workers_that_mean_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that was set up for another worker keeps its volume, timeout and batch."""
    names = {"BASE_PATH": "/vol", "REQUEST_TIMEOUT": "3600", "MAX_NUM_SEQS": "8"}
    for name, value in {**names, "GPU_MEMORY_UTILIZATION": "0.9"}.items():
        monkeypatch.setenv(name, value)
    settings = Settings.from_yaml(TINY)
    assert settings.runpod.volume == "/vol"
    assert settings.api.request_timeout_s == 3600
    assert (settings.engine.max_num_seqs, settings.engine.gpu_memory_utilization) == (8, 0.9)


def test_names_of_other_workers_that_nothing_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once change no setting, and one line names each with the reason."""
    plain = Settings.from_yaml(TINY)
    assert unneeded_names() is None
    for name in UNNEEDED:
        monkeypatch.setenv(name, "1")
    assert Settings.from_yaml(TINY) == plain
    told = unneeded_names() or ""
    assert "\n" not in told
    for name, reason in UNNEEDED.items():
        assert re.search(rf"\b{name}\b[A-Z_, ]* \({re.escape(reason)}\)", told), name
    assert not FAMILIAR.keys() & UNNEEDED.keys()


def test_only_the_settings_read_the_environment() -> None:
    """No other module asks for a variable; what children inherit may be written.

    The quoted name is a file of another process.
    """
    pattern = re.compile(r"\bgetenv\b|(?<!\")\benviron\b(?!\.setdefault\(|\[\w+\] = )")
    for path in [*Path("serve_app").rglob("*.py"), Path("runpod_entry.py")]:
        if path.name != "settings.py":
            assert not pattern.search(path.read_text()), path


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("{engine: {blok_size: 1}}", "`engine.blok_size` is no setting"),
        ("{engin: {}}", "`engin` is no setting"),
        ("{engine: {max_num_seqs: 0}}", "`engine.max_num_seqs`"),
        ("{engine: {max_num_batched_tokens: 16}}", "(16) must be at least max_num_seqs (32)"),
        ("{model: {quantization: int3}}", "`model.quantization`"),
        ("{model: {served_model_name: ','}}", "`model.served_model_name`"),
        ("{_env_file: /etc/hosts}", "`_env_file` is no setting"),
        ("{1: 2}", "`1` is no setting"),
        ("{self: 2}", "`self` is no setting"),
        ("{api: {keys: abc}}", "is a secret"),
        ("{model: {hf_token: abc}}", "is a secret"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, args: str, sentence: str) -> None:
    """A wrong key or value is refused in one line that names file and key."""
    path = write(tmp_path, args)
    with pytest.raises(ConfigError) as caught:
        Settings.from_yaml(path)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_misspelt_environment_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`MIXTRAL_` plus a name that is no setting is an error, never ignored."""
    monkeypatch.setenv("MIXTRAL_ENGINE__MAX_RUNING", "7")
    with pytest.raises(ConfigError, match="MIXTRAL_ENGINE__MAX_RUNING"):
        Settings()


@pytest.mark.parametrize("text", ["applications: [", "just text", "applications: []", "[]"])
def test_a_file_that_is_no_serve_config(tmp_path: Path, text: str) -> None:
    """Broken YAML, or YAML without an application, is one sentence."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        application(path)


def test_missing_file() -> None:
    """A missing file is one sentence that names it."""
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        application("absent.yaml")


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither repr nor str nor JSON of the settings has a key or token in it."""
    monkeypatch.setenv("API_KEYS", "sesame")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    settings = Settings()
    assert settings.api.keys is not None
    assert settings.api.keys.get_secret_value() == "sesame"
    shown = repr(settings) + str(settings) + settings.model_dump_json()
    assert "sesame" not in shown
    assert "hf_secret" not in shown


@pytest.mark.parametrize("args", ["{api: sesame}", "{api: [sesame]}"])
def test_a_misplaced_secret_is_not_repeated(tmp_path: Path, args: str) -> None:
    """An error about a section does not print what was written there: it may be a key."""
    with pytest.raises(ConfigError, match="`api`") as caught:
        Settings.from_yaml(write(tmp_path, args))
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("name", ["MIXTRAL_API", "MIXTRAL_ENGINE"])
def test_a_section_is_no_environment_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A single underscore too few is said by name, and the value is not shown."""
    monkeypatch.setenv(name, '{"keys": ["sesame"]}')
    with pytest.raises(ConfigError, match=name) as caught:
        Settings()
    assert "sesame" not in str(caught.value)


def test_frozen_and_picklable() -> None:
    """Settings travel to the replica as they are, and nobody changes them on the way."""
    settings = Settings.from_yaml(TINY)
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(ValueError, match="frozen"):
        settings.engine.max_num_seqs = 1  # type: ignore[misc]


def test_serve_validation_reads_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve builds the settings with `model_validate`; the environment still wins."""
    monkeypatch.setenv("MIXTRAL_ENGINE__MAX_NUM_SEQS", "7")
    args = application(TINY)["args"]
    assert Settings.model_validate(args).engine.max_num_seqs == 7
