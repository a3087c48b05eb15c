"""Settings come from the YAML, the environment overrides them, and unknown names are errors."""

import pickle
import re
from pathlib import Path

import pytest

from serve_app.config.environment import (
    EXTRA_NAMES,
    NOT_BY_RULE,
    aliases,
)
from serve_app.config.sections import SECTIONS
from serve_app.config.serve_config import http_options
from serve_app.config.settings import RENAMED, ConfigError, Settings, application

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
    """`MIXTRAL_*` overrides one value; the other values of the section are those of the YAML."""
    monkeypatch.setenv("MIXTRAL_ENGINE__MAX_NUM_SEQS", "7")
    settings = Settings.from_yaml(TINY)
    assert settings.engine.max_num_seqs == 7
    assert settings.engine.kv_cache_tokens == 65536


def test_names_that_runpod_users_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alias works too; ours wins over it; an empty one counts as unset."""
    monkeypatch.setenv("MODEL_NAME", "someone/mixtral")
    monkeypatch.setenv("MAX_MODEL_LEN", "4096")
    monkeypatch.setenv("MIXTRAL_ENGINE__MAX_MODEL_LEN", "2048")
    monkeypatch.setenv("QUANTIZATION", "")
    settings = Settings.from_yaml(TINY)
    assert settings.model.name == "someone/mixtral"
    assert settings.engine.max_model_len == 2048
    assert settings.model.quantization == "none"


PATHS = {f"{name}.{field}" for name, model in SECTIONS.items() for field in model.model_fields}


def test_float32_absmax_is_refused_with_what_to_do() -> None:
    """The value that was dropped gets one sentence: what to set, and that files may have it."""
    with pytest.raises(ConfigError, match=r"`model.absmax`: float32 is .* use bfloat16.*convert"):
        Settings.from_args({"model": {"absmax": "float32"}}, "a.yaml")


def test_the_sections_are_those_of_the_settings() -> None:
    """`SECTIONS` has the sections of `Settings` with their types."""
    fields = {name: info.annotation for name, info in Settings.model_fields.items()}
    assert fields == {**SECTIONS, "load_log": str | None}


def test_a_field_has_one_name_by_rule() -> None:
    """A field outside `NOT_BY_RULE` has exactly one name that is not in `EXTRA_NAMES`."""
    by_rule = [path for name, path in aliases().items() if name not in EXTRA_NAMES]
    assert sorted(by_rule) == sorted(PATHS - NOT_BY_RULE.keys())
    assert set(EXTRA_NAMES.values()) | NOT_BY_RULE.keys() <= PATHS


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("MODEL_NAME", "model.name"),
        ("MODEL_REVISION", "model.revision"),
        ("SERVED_MODEL_NAME", "model.served_model_name"),
        ("OPENAI_SERVED_MODEL_NAME_OVERRIDE", "model.served_model_name"),
        ("QUANTIZATION", "model.quantization"),
        ("DTYPE", "model.dtype"),
        ("HF_TOKEN", "model.hf_token"),
        ("MAX_MODEL_LEN", "engine.max_model_len"),
        ("MAX_NUM_SEQS", "engine.max_num_seqs"),
        ("MAX_NUM_BATCHED_TOKENS", "engine.max_num_batched_tokens"),
        ("BLOCK_SIZE", "engine.block_size"),
        ("GPU_MEMORY_UTILIZATION", "engine.gpu_memory_utilization"),
        ("ENABLE_PREFIX_CACHING", "engine.enable_prefix_caching"),
        ("API_KEYS", "api.keys"),
        ("REQUEST_TIMEOUT", "api.request_timeout_s"),
        ("MAX_CONCURRENCY", "runpod.max_concurrency"),
        ("BASE_PATH", "runpod.volume"),
    ],
)
def test_names_that_vllm_and_runpod_document(name: str, path: str) -> None:
    """The names that users of vLLM and RunPod set lead to the setting that means the same."""
    assert aliases()[name] == path


def test_stray_names_set_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that containers have for other purposes change no setting."""
    expected = Settings.from_yaml(TINY)
    fields = [path.split(".")[1] for path in PATHS]
    one_word = {field.upper() for field in fields if "_" not in field} - EXTRA_NAMES.keys()
    assert one_word >= {"NAME", "DEVICE", "START", "VOLUME", "KEYS", "REVISION"}
    left_out = {"CACHE_DIR", "NUM_THREADS", "RUNPOD_VOLUME", "RUNPOD_START", "LOAD_LOG"}
    for name in one_word | left_out:
        monkeypatch.setenv(name, "1")
    assert Settings.from_yaml(TINY) == expected


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    """In the YAML, through Serve and as a variable, the error says what the setting is called."""
    assert new in PATHS
    section, field = old.split(".")
    with pytest.raises(ConfigError, match=f"`{old}` has a new name: `{new}`"):
        Settings.from_yaml(write(tmp_path, f"{{{section}: {{{field}: null}}}}"))
    with pytest.raises(ValueError, match=f"`{old}` has a new name: `{new}`"):
        Settings.model_validate({section: {field: 1}})
    before, after = (f"MIXTRAL_{path.replace('.', '__').upper()}" for path in (old, new))
    monkeypatch.setenv(before, "1")
    with pytest.raises(ConfigError, match=f"{before}, which has a new name: {after}"):
        Settings()


def test_names_of_other_workers_that_mean_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that was set up for another worker keeps its volume, timeout and batch."""
    names = {"BASE_PATH": "/vol", "REQUEST_TIMEOUT": "3600", "MAX_NUM_SEQS": "8"}
    for name, value in {**names, "GPU_MEMORY_UTILIZATION": "0.9"}.items():
        monkeypatch.setenv(name, value)
    settings = Settings.from_yaml(TINY)
    assert settings.runpod.volume == "/vol"
    assert settings.api.request_timeout_s == 3600
    assert (settings.engine.max_num_seqs, settings.engine.gpu_memory_utilization) == (8, 0.9)


def test_only_the_settings_read_the_environment() -> None:
    """No other module reads a variable. A module may set what its child processes inherit.

    The pattern skips the quoted name, a file in /proc.
    """
    pattern = re.compile(r"\bgetenv\b|(?<!\")\benviron\b(?!\.setdefault\(|\[\w+\] = )")
    for path in [*Path("serve_app").rglob("*.py"), Path("runpod_entry.py")]:
        if path.name != "settings.py":
            assert not pattern.search(path.read_text()), path


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("{engine: {blok_size: 1}}", "`engine.blok_size` is not a setting"),
        ("{engin: {}}", "`engin` is not a setting"),
        ("{engine: {max_num_seqs: 0}}", "`engine.max_num_seqs`"),
        ("{engine: {num_threads: 100000}}", "`engine.num_threads`"),
        ("{engine: {max_num_batched_tokens: 16}}", "(16) must be at least max_num_seqs (32)"),
        ("{model: {quantization: int3}}", "`model.quantization`"),
        ("{model: {served_model_name: ','}}", "`model.served_model_name`"),
        ("{_env_file: /etc/hosts}", "`_env_file` is not a setting"),
        ("{1: 2}", "`1` is not a setting"),
        ("{self: 2}", "`self` is not a setting"),
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
    """`MIXTRAL_` plus a name that is not a setting is an error, never ignored."""
    monkeypatch.setenv("MIXTRAL_ENGINE__MAX_RUNING", "7")
    with pytest.raises(ConfigError, match="MIXTRAL_ENGINE__MAX_RUNING"):
        Settings()


@pytest.mark.parametrize("text", ["applications: [", "just text", "applications: []", "[]"])
def test_a_file_that_is_not_a_serve_config(tmp_path: Path, text: str) -> None:
    """Broken YAML, or YAML without an application, raises one sentence."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        application(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{port: 70000}", "`http_options.port` must be 0 to 65535, got 70000"),
        ("{port: '8000'}", "`http_options.port` must be 0 to 65535, got '8000'"),
        ("{port: true}", "`http_options.port` must be 0 to 65535, got True"),
        ("{host: 1}", "`http_options.host` must be an address, got 1"),
    ],
)
def test_an_address_that_is_none_is_named(tmp_path: Path, options: str, words: str) -> None:
    """The HTTP host and port are checked where they are read."""
    path = tmp_path / "config.yaml"
    path.write_text(f"http_options: {options}\napplications: []\n")
    with pytest.raises(ConfigError, match=re.escape(words)):
        http_options(path)


def test_missing_file() -> None:
    """A missing file raises one sentence that names it."""
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


@pytest.mark.parametrize(
    ("given", "token"), [("hf_secret\r\n", "hf_secret"), (" hf_secret ", "hf_secret"), ("\n", None)]
)
def test_a_token_from_a_file_has_no_line_break(
    monkeypatch: pytest.MonkeyPatch, given: str, token: str | None
) -> None:
    """Spaces and line breaks around the token, which no HTTP header can have, are left out."""
    monkeypatch.setenv("HF_TOKEN", given)
    read = Settings().model.hf_token
    assert (read and read.get_secret_value()) == token


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("HF_TOKEN", "hf_secr\u00e9t", "HF_TOKEN: a token consists of printable ASCII characters."),
        ("HF_TOKEN", "hf_secr\nt", "HF_TOKEN: a token consists of printable ASCII characters."),
        ("API_KEYS", " , ", "API_KEYS: it must hold a key."),
    ],
)
def test_a_secret_that_cannot_be_used_is_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    """A token that no header can hold, and keys that nobody can send, are refused."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        Settings.from_args({}, "config.yaml")
    assert sentence in str(refused.value)
    assert "secr" not in str(refused.value)


@pytest.mark.parametrize("args", ["{api: sesame}", "{api: [sesame]}"])
def test_a_misplaced_secret_is_not_repeated(tmp_path: Path, args: str) -> None:
    """An error about a section does not print its value, which may hold a key."""
    with pytest.raises(ConfigError, match="`api`") as caught:
        Settings.from_yaml(write(tmp_path, args))
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("name", ["MIXTRAL_API", "MIXTRAL_ENGINE"])
def test_a_section_is_not_a_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A variable for a whole section is an error that names it and hides its value."""
    monkeypatch.setenv(name, '{"keys": ["sesame"]}')
    with pytest.raises(ConfigError, match=name) as caught:
        Settings()
    assert "sesame" not in str(caught.value)


def test_frozen_and_picklable() -> None:
    """Settings survive pickling, which carries them to the replica, and cannot be changed."""
    settings = Settings.from_yaml(TINY)
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(ValueError, match="frozen"):
        settings.engine.max_num_seqs = 1  # type: ignore[misc]


def test_serve_validation_reads_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve builds the settings with `model_validate`; the environment still wins."""
    monkeypatch.setenv("MIXTRAL_ENGINE__MAX_NUM_SEQS", "7")
    args = application(TINY)["args"]
    assert Settings.model_validate(args).engine.max_num_seqs == 7
