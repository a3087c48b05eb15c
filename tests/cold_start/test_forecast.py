"""How long a load will take is said beforehand, with what to do where nobody waits so long."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from serve_app.cold_start import cold_start
from serve_app.cold_start.forecast import START_S, Forecast, predict, sample
from serve_app.config.settings import Settings
from serve_app.start_plan.plan import StartPlan, plan_start
from serve_app.tiny import CHECKPOINT

GB = 10**9


def settings(model: dict[str, Any] | None = None, **runpod: Any) -> Settings:
    chosen = {"name": "tiny", "device": "cpu", **(model or {})}
    return Settings.from_args({"model": chosen, "runpod": runpod}, "test")


def forecast(**known: Any) -> Forecast:
    plain: dict[str, Any] = {
        "read_bytes": 25 * GB,
        "download_bytes": 0,
        "read_bytes_per_s": GB / 2,
        "is_measured": True,
        "quantizes": False,
        "on_cpu": False,
    }
    return Forecast(**{**plain, **known})


@pytest.mark.parametrize(
    ("known", "seconds"),
    [
        ({}, 50),
        ({"download_bytes": 10 * GB}, 50 + 50),
        ({"quantizes": True}, 50),
        ({"quantizes": True, "on_cpu": True}, 250),
    ],
)
def test_what_counts(known: dict[str, Any], seconds: float) -> None:
    """Reading at the measured speed, a download, and a processor that quantizes slower."""
    assert forecast(**known).seconds == START_S + seconds


def test_a_load_that_is_short_enough_is_no_warning() -> None:
    """The sentence says how much and how fast; nobody is alarmed."""
    assert forecast().warning(settings()) is None
    assert forecast().sentence() == (
        "The load reads 25.00 GB, which takes about 70 s (reading 0.5 GB/s, measured)."
    )


@pytest.mark.parametrize(
    ("known", "runpod", "said", "unsaid"),
    [
        (
            {"read_bytes": 93 * GB, "quantizes": True, "read_bytes_per_s": GB / 10},
            {},
            [
                "about 950 s, and 600 s are",
                "serve_app.convert",
                "to eager",
                "raise the timeout",
            ],
            "volume",
        ),
        (
            {"download_bytes": 93 * GB},
            {"execution_timeout_s": 300},
            ["about 535 s, and 300 s are", "onto a network volume", "to eager"],
            "convert",
        ),
        (
            {"read_bytes_per_s": GB / 20},
            {"start": "eager"},
            ["about 520 s, and 420 s are", "RUNPOD_INIT_TIMEOUT"],
            "to eager",
        ),
    ],
)
def test_the_remedy_is_said(
    known: dict[str, Any], runpod: dict[str, Any], said: list[str], unsaid: str
) -> None:
    """Only what would help: nobody is told to convert what is in 4 bits already."""
    warning = forecast(**known).warning(settings(**runpod))
    assert warning is not None
    for words in said:
        assert words in warning
    assert unsaid not in warning


def test_a_forecast_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All have waited when the first one has: each job waiting anew would hold up the load."""
    is_over = threading.Event()

    def predict(_: StartPlan) -> Forecast:
        is_over.wait()
        raise OSError("The volume is gone.")

    monkeypatch.setattr(cold_start, "predict", predict)
    monkeypatch.setattr(cold_start, "FORECAST_LIMIT_S", 0.05)
    cold = cold_start.ColdStart(settings(), plan_start(settings()))
    monkeypatch.setattr(cold_start, "FORECAST_LIMIT_S", 1000)
    for _ in range(2):
        assert asyncio.run(cold.outlook()) == {}
    is_over.set()


def test_a_start_without_a_plan_has_no_forecast() -> None:
    """The check has failed, and the load says why."""
    assert asyncio.run(cold_start.ColdStart(settings(), None).outlook()) == {}


def test_this_machines_speed_is_measured(tmp_path: Path) -> None:
    """A real read of the weights; too few bytes tell nothing."""
    predicted = predict(plan_start(settings({"quantization": "nf4"})))
    assert (predicted.is_measured, predicted.quantizes, predicted.on_cpu) == (True, True, True)
    assert predicted.read_bytes == (CHECKPOINT / "model.safetensors").stat().st_size
    assert predicted.seconds > START_S
    small = tmp_path / "small"
    small.write_bytes(b"x" * 1000)
    assert sample([small]) is None
