"""Progress of long work on a terminal."""

import pytest

from serve_app.cli import progress


def test_a_terminal_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bar's last state has the title and all files, and no plain line is printed."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any output for a terminal
    with progress.files("Converting") as show:
        show(1, 3, "a.safetensors")
        show(3, 3, "c.safetensors")
    written = capsys.readouterr().out
    assert "Converting" in written
    assert "3/3" in written
    assert "of 3 files" not in written
