"""The choice between HAProxy and Serve's proxy, and the environment of Ray's processes."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve_app.config.api_settings import ApiSettings
from serve_app.node.haproxy import MODE, Proxy

OPTIONS = {"host": "0.0.0.0", "port": 8000}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the environment, which is dropped after the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop(MODE, None)


@pytest.mark.parametrize(
    ("options", "variables", "words"),
    [
        ({}, {}, None),
        ({}, {MODE: "1"}, None),
        ({}, {MODE: "0"}, f"{MODE} is '0'"),
        ({"ssl_certfile": "a.pem"}, {}, "`http_options.ssl_certfile`"),
    ],
)
def test_what_keeps_haproxy_away(
    options: dict[str, Any], variables: dict[str, str], words: str | None
) -> None:
    """HAProxy is the usual way; the reason against it names what the user has set."""
    os.environ.update(variables)
    proxy = Proxy(OPTIONS | options)
    proxy.prepare()
    assert (words is None) is (proxy.obstacle is None)
    assert words is None or words in str(proxy.obstacle)
    assert os.environ[MODE] == ("1" if words is None else "0")
    if words is not None:
        assert proxy.options(ApiSettings()) == OPTIONS | options
    proxy.close()


def test_without_a_binary_serves_own_proxy_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package may be missing; HAProxy on PATH does as well."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    os.environ["PATH"] = ""
    assert "there is no HAProxy on this machine" in str(Proxy(OPTIONS).obstacle)


def test_serve_listens_on_loopback_and_haproxy_where_the_user_says() -> None:
    """The program has the limits of the settings; its folder is removed at the end."""
    api = ApiSettings(max_connections_per_address=3, trusted_proxies="10.0.0.0/8, 127.0.0.2")
    proxy = Proxy({"host": "::", "port": 8000})
    proxy.prepare()
    assert proxy.options(api)["host"] == "127.0.0.1"
    program = Path(os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"])
    given = shlex.split(program.read_text().splitlines()[1])
    for option in (
        "--bind=[::]:8000 v4v6",
        "--max-connections=4096",
        "--max-connections-per-address=3",
        "--trusted=10.0.0.0/8",
        "--trusted=127.0.0.2",
    ):
        assert option in given
    proxy.close()
    assert not program.exists()


def test_a_trusted_proxy_is_an_address() -> None:
    """A name is an error that quotes it."""
    with pytest.raises(ValueError, match=r"'proxy' does not appear to be"):
        ApiSettings(trusted_proxies="127.0.0.1, proxy")


def test_serve_notices_a_dead_haproxy_soon() -> None:
    """Serve of this version reads the period of its checks from the variable that is set."""
    proxy = Proxy(OPTIONS)
    proxy.prepare()
    code = "from ray.serve._private import constants; print(constants.PROXY_HEALTH_CHECK_PERIOD_S)"
    python = [sys.executable, "-c", code]
    found = subprocess.check_output(python, env=dict(os.environ), text=True)
    assert float(found) == 2
    proxy.close()
