"""RunPod's Hub finds what it asks for, and every variable in it is one that we read."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from serve_app.cold_start.forecast import READ_BYTES_PER_S, Forecast
from serve_app.config.environment import aliases
from serve_app.config.settings import Settings
from serve_app.config.sources import PREFIX
from serve_app.worker.job import parse
from tests.fakes import answer, server
from tools.settings_table import BEGIN, rewritten, table, values

HUB: dict[str, Any] = json.loads(Path(".runpod/hub.json").read_text())
TESTS: dict[str, Any] = json.loads(Path(".runpod/tests.json").read_text())
INPUTS = {each["key"]: each["input"] for each in HUB["config"]["env"] if "input" in each}
STATIC = {each["key"]: each["value"] for each in HUB["config"]["env"] if "value" in each}
OF_THE_PLATFORM = {"RUNPOD_INIT_TIMEOUT"}
"""Read by RunPod, not by us."""


def field_of(name: str) -> FieldInfo:
    """Returns the setting of the variable `name`."""
    path = aliases().get(name) or name.removeprefix(PREFIX).lower().replace("__", ".")
    section, key = path.split(".")
    field: FieldInfo = type(getattr(Settings(), section)).model_fields[key]
    return field


def settings_with(monkeypatch: pytest.MonkeyPatch, variables: dict[str, Any]) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return Settings.from_yaml("configs/runpod.yaml")


def test_the_hub_finds_what_it_requires() -> None:
    """The fields of the listing, and beside it a handler, a Dockerfile and a README."""
    assert HUB.keys() >= {"title", "description", "type", "category", "config"}
    assert (HUB["type"], HUB["category"]) == ("serverless", "language")
    assert HUB["config"].keys() >= {"runsOn", "containerDiskInGb", "gpuIds", "presets", "env"}
    assert "sys.exit(main())" in Path(".runpod/handler.py").read_text()
    assert Path("Dockerfile").exists()
    assert Path("README.md").exists()
    assert TESTS["tests"]
    assert all(each.keys() >= {"name", "input"} for each in TESTS["tests"])


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_a_form_field_is_a_setting_of_its_type(name: str) -> None:
    """Numbers where we take numbers, and exactly our choices where we offer some."""
    given, field = INPUTS[name], field_of(name)
    kind = "number" if "number" in values(field) else "string"
    assert given["type"] in (kind, "huggingface")
    assert given["type"] != "huggingface" or name == "MODEL_NAME"
    if get_origin(field.annotation) is Literal:
        offered = [option["value"] for option in given["options"]]
        assert offered == list(get_args(field.annotation))
    assert given["name"]
    assert given["description"]


def test_the_forms_defaults_can_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form's defaults are valid settings, with the limit on tokens that the form shows."""
    assert STATIC.keys() <= OF_THE_PLATFORM
    defaults = {name: given["default"] for name, given in INPUTS.items()}
    assert settings_with(monkeypatch, defaults).api.max_tokens_limit == 4096
    for bound in ("min", "max"):
        limits = {name: given[bound] for name, given in INPUTS.items() if bound in given}
        settings_with(monkeypatch, {**defaults, **limits})


@pytest.mark.parametrize("preset", HUB["config"]["presets"], ids=lambda preset: preset["name"])
def test_a_preset_can_be_served(monkeypatch: pytest.MonkeyPatch, preset: dict[str, Any]) -> None:
    """A preset's variables are in the form, and its values are valid."""
    assert preset["defaults"].keys() <= INPUTS.keys()
    settings_with(monkeypatch, preset["defaults"])


@pytest.mark.parametrize("preset", HUB["config"]["presets"], ids=lambda preset: preset["name"])
def test_a_preset_comes_up_in_time(monkeypatch: pytest.MonkeyPatch, preset: dict[str, Any]) -> None:
    """With the form's defaults, a worker that downloads 93 GB is ready within its limit."""
    defaults = {name: given["default"] for name, given in INPUTS.items()}
    settings = settings_with(monkeypatch, defaults | preset["defaults"] | STATIC)
    size = 93_000_000_000
    download = Forecast(size, size, READ_BYTES_PER_S, False, quantizes=True, on_cpu=False)
    assert download.warning(settings) is None
    assert size < HUB["config"]["containerDiskInGb"] * 1e9


def test_the_listing_names_the_cuda_versions_that_the_image_runs_on() -> None:
    """torch's own CUDA version and newer ones: RunPod compares exactly, and tests on the same."""
    (own,) = re.findall(r"^ARG BNB_CUDA_VERSION=(\d+)$", Path("Dockerfile").read_text(), re.M)
    allowed = HUB["config"]["allowedCudaVersions"]
    assert min(allowed) == f"{own[:-1]}.{own[-1]}"
    assert len(allowed) > 1
    assert TESTS["config"]["allowedCudaVersions"] == allowed


@pytest.mark.parametrize(
    ("row", "read", "download", "speed", "seconds"),
    [
        ("your own 4-bit", 25.2, 0, 1e9, "45 s"),
        ("Mistral's repository", 93.4, 0, 1e9, "113 s"),
        ("inside the image", 25.2, 0, 1e9, "45 s"),
        ("model on a network volume", 25.2, 0, 4e8, "83 to"),
        ("model on a network volume", 25.2, 0, 2e8, "to 146 s"),
        ("download by each", 93.4, 93.4, 1e9, "580 s"),
    ],
)
def test_the_pages_cold_starts_are_computed(
    row: str, read: float, download: float, speed: float, seconds: str
) -> None:
    """docs/runpod.md compares the ways to a model with the seconds that a worker would forecast."""
    (line,) = re.findall(rf"^\| .*{row}.*$", Path("docs/runpod.md").read_text(), re.M)
    forecast = Forecast(int(read * 1e9), int(download * 1e9), speed, False, read > 30, False)
    assert seconds in line
    assert re.sub(r"\D", "", seconds) == f"{forecast.seconds:.0f}"


@pytest.mark.parametrize("test", TESTS["tests"], ids=lambda test: test["name"])
def test_the_hubs_tests_would_pass(monkeypatch: pytest.MonkeyPatch, test: dict[str, Any]) -> None:
    """Every input is answered, in the environment that the hub's tests ask for."""
    variables = {each["key"]: each["value"] for each in TESTS["config"]["env"]}
    assert settings_with(monkeypatch, variables).model.name == "tiny"
    call = parse({"id": "job", "input": test["input"]}, "req-1", 10**6).call
    assert "error" not in asyncio.run(answer(server(), call.path, call.body))


def test_the_table_of_variables_is_true() -> None:
    """docs/runpod.md has each setting as it is; `python -m tools.settings_table` writes it."""
    text = Path("docs/runpod.md").read_text(encoding="utf-8")
    assert rewritten(text) == text
    assert BEGIN in text


def test_every_setting_says_what_it_is() -> None:
    """No row without a description, and each of our names is in the table."""
    rows = table().splitlines()[2:]
    assert all(not row.endswith("|  |") for row in rows)
    for name in aliases():
        assert sum(f"`{name}`" in row for row in rows) == 1, name
