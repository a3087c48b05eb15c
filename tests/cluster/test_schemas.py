"""ray-up/, compose.yaml and systemd/ are what Ray, Compose and systemd take, and fit the image."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from serve_app.config.settings import Settings
from tests.cluster.manifests import CRDS, json_schema
from tests.cluster.versions import pin

CLUSTER = Path("cluster")
CLOUDS = sorted((CLUSTER / "ray-up").glob("*.yaml"))
UNIT = CLUSTER / "systemd" / "mixtral-serve.service"
clouds = pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


@clouds
def test_ray_up_takes_the_file(path: Path) -> None:
    """It passes the schema of the installed Ray, which refuses a misspelt key."""
    schema = json.loads((Path(ray.__path__[0]) / "autoscaler" / "ray-schema.json").read_text())
    config = read(path)
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute'"):
        jsonschema.validate(config | {"idle_timeout_minute": 1}, schema)
    assert config["head_node_type"] in config["available_node_types"]
    workers = config["available_node_types"]["gpu"]
    assert workers["max_workers"] <= config["max_workers"]


def test_a_spot_machine_that_ray_terminates_stays_terminated() -> None:
    """Ray terminates spot machines; AWS would replace those of a persistent request."""
    config = read(CLUSTER / "ray-up" / "aws.yaml")
    market = config["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"]
    assert market["MarketType"] == "spot"
    assert market.get("SpotOptions", {}).get("SpotInstanceType", "one-time") == "one-time"


@clouds
def test_every_node_has_token_keys_and_haproxy(path: Path) -> None:
    """Head and workers start with the token, the secrets and the script's variables."""
    config = read(path)
    mounts = config["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert Path(mounts["~/mixtral.yaml"]).exists()
    dockerfile = Path("Dockerfile").read_text()
    assert "COPY cluster/ray cluster/ray" in dockerfile
    assert "rsync" in dockerfile
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert ". ~/mixtral.env; . /app/cluster/ray/environment.sh;" in commands[-1]


def test_the_clouds_differ_in_what_is_theirs() -> None:
    """Both files have the same image, commands, mounts and limits."""
    first, second = (read(path) for path in CLOUDS)
    for config in (first, second):
        for each in ("provider", "available_node_types"):
            del config[each]
    assert first == second


def test_compose_takes_the_file() -> None:
    """It passes Compose's schema, which refuses a misspelt key; streams end before a kill."""
    config = read(CLUSTER / "compose.yaml")
    schema = json_schema("compose-spec.json.gz")
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(config)
    server = config["services"]["server"]
    with pytest.raises(jsonschema.ValidationError, match="restarts"):
        validator.validate({"services": {"server": server | {"restarts": "no"}}})
    settings = Settings.from_yaml("configs/local.yaml")
    assert seconds(server["stop_grace_period"]) > settings.runpod.drain_s
    assert server["ports"] == ["127.0.0.1:8000:8000"]
    for name in ("HF_HOME", "MIXTRAL_MODEL__CACHE_DIR"):
        assert server["environment"][name].startswith(server["volumes"][0].partition(":")[2])


def test_the_unit_ends_after_its_requests() -> None:
    """systemd kills the service later than the server lets requests finish."""
    (limit_s,) = re.findall(r"TimeoutStopSec=(\d+)", UNIT.read_text())
    assert int(limit_s) > Settings.from_yaml("configs/local.yaml").runpod.drain_s


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` finds nothing to say of it, and finds a misspelt key."""
    # It looks for the program, which is here where the tests run from.
    text = UNIT.read_text().replace(
        "/opt/mixtral-serve/.venv/bin", str(Path(sys.executable).parent)
    )
    for content, complaint in ((text, ""), (text + "KillMod=mixed\n", "KillMod")):
        (tmp_path / UNIT.name).write_text(content)
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)]
        done = subprocess.run(command, capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if UNIT.name in line]
        assert complaint in "".join(said)
        assert bool(said) == bool(complaint)


def test_the_page_names_the_versions_that_are_pinned() -> None:
    """cluster/README.md installs the Ray that the image has, and the KubeRay that is validated."""
    page = (CLUSTER / "README.md").read_text()
    assert set(re.findall(r"ray\[default\]==([\d.]+)", page)) == {pin("ray[serve]")}
    (operator,) = re.findall(r"kuberay-operator --version ([\d.]+)", page)
    assert f"kuberay-{operator}-rayservices.yaml.gz" in CRDS["RayService"]
