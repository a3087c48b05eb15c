"""The forecast of a load: its seconds, its sentence, and the warning where it takes too long."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from serve_app.cold_start import cold_start
from serve_app.cold_start.forecast import GPU_START_S, START_S, Forecast, predict, sample
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
        ({}, GPU_START_S + 50),
        ({"download_bytes": 10 * GB}, GPU_START_S + 50 + 50),
        ({"quantizes": True}, GPU_START_S + 50),
        ({"quantizes": True, "on_cpu": True}, START_S + 250),
    ],
)
def test_the_seconds_of_a_load(known: dict[str, Any], seconds: float) -> None:
    """The time is that of reading, of a download, and of quantizing on a CPU, which is slower."""
    assert forecast(**known).seconds == seconds


def test_a_short_load_has_no_warning() -> None:
    """The sentence says how much is read and how fast; there is no warning."""
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
                "about 950 s, but 600 s are",
                "mixtral-serve convert",
                "to eager",
                "raise the timeout",
            ],
            "volume",
        ),
        (
            {"download_bytes": 93 * GB},
            {"execution_timeout_s": 300},
            ["about 535 s, but 300 s are", "onto a network volume", "to eager"],
            "convert",
        ),
        (
            {"read_bytes_per_s": GB / 20},
            {"start": "eager"},
            ["about 520 s, but 420 s are", "raise RUNPOD_INIT_TIMEOUT"],
            "to eager",
        ),
        (
            {"read_bytes_per_s": GB / 40},
            {},
            ["about 1020 s, but 600 s are", "to eager and RUNPOD_INIT_TIMEOUT to more"],
            "convert",
        ),
    ],
)
def test_the_warning_names_remedies(
    known: dict[str, Any], runpod: dict[str, Any], said: list[str], unsaid: str
) -> None:
    """The warning names only remedies that help: converting does not help a 4-bit checkpoint."""
    warning = forecast(**known).warning(settings(**runpod))
    assert warning is not None
    for words in said:
        assert words in warning
    assert unsaid not in warning


def test_what_was_done_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    """RUNPOD_INIT_TIMEOUT is the limit of an eager start, and lets a lazy one become eager."""
    long = forecast(read_bytes_per_s=GB / 40)
    monkeypatch.setenv("RUNPOD_INIT_TIMEOUT", "1800")
    assert long.warning(settings(start="eager")) is None
    assert "to eager, or raise" in (long.warning(settings()) or "")
    monkeypatch.setenv("RUNPOD_INIT_TIMEOUT", "800")
    assert "but 800 s are the time in which a worker" in (
        long.warning(settings(start="eager")) or ""
    )


def test_a_forecast_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All waits share one deadline, because each job that waited anew would delay the load."""
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
    """After a failed check there is nothing to predict."""
    assert asyncio.run(cold_start.ColdStart(settings(), None).outlook()) == {}


def test_the_reading_speed_is_measured(tmp_path: Path) -> None:
    """The sample really reads the weights; a file that is too small gives no speed."""
    predicted = predict(plan_start(settings({"quantization": "nf4"})))
    assert (predicted.is_measured, predicted.quantizes, predicted.on_cpu) == (True, True, True)
    assert predicted.read_bytes == (CHECKPOINT / "model.safetensors").stat().st_size
    assert predicted.seconds > START_S
    small = tmp_path / "small"
    small.write_bytes(b"x" * 1000)
    assert sample([small]) is None
