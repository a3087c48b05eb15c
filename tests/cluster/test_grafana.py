"""cluster/grafana and cluster/prometheus: what they contain, without a server."""

import json
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tests.cluster.prometheus import CONFIG, DASHBOARD, needs_prometheus, panels

ALERTS = Path("cluster/prometheus/alerts.yaml")
RULE_TESTS = Path("tests/cluster/alerts_test.yaml")


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    """Ids and places are unique, each panel has a unit and a description, each query a letter."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"]
    assert dashboard["schemaVersion"] >= 36
    (variable,) = dashboard["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["type"] in ("timeseries", "bargauge")
        assert panel["datasource"] == source
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters))
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())
    for left, right in pairwise(panels()):
        assert (left["gridPos"]["y"], left["gridPos"]["x"]) < (
            right["gridPos"]["y"],
            right["gridPos"]["x"],
        )


def test_queries_and_alerts_ask_for_documented_metrics() -> None:
    """docs/metrics.md has each of their metrics; the one of Ray's is in Ray's agent."""
    page = Path("docs/metrics.md").read_text()
    documented = set(re.findall(r"^\| `(mixtral_\w+)`", page, re.MULTILINE))
    rules = [rule["expr"] for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]]
    asked = set(re.findall(r"mixtral_\w+", " ".join([*expressions(), *rules])))
    assert {name.removesuffix("_bucket") for name in asked} <= documented
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    rays = {name for text in expressions() for name in re.findall(r"ray_(\w+)", text)}
    assert rays <= METRICS_GAUGES.keys()


@needs_prometheus
@pytest.mark.parametrize(
    "command", [["check", "config", str(CONFIG)], ["test", "rules", str(RULE_TESTS)]]
)
def test_promtool_takes_them(command: list[str]) -> None:
    """Configuration and rules are valid, and each alert fires when it must and not before."""
    done = subprocess.run(["promtool", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested() -> None:
    """The rules' tests see each alert fire, and see it quiet."""
    alerts = {rule["alert"] for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]}
    cases = [
        case
        for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


def test_prometheus_and_the_operator_rename_alike() -> None:
    """Both drop `ray_` before our names, so that one dashboard is enough."""
    jobs = yaml.safe_load(CONFIG.read_text())["scrape_configs"]
    (ray,) = (job for job in jobs if job["job_name"] == "ray")
    monitor = yaml.safe_load(Path("cluster/kuberay/monitoring/pod-monitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (theirs,), (ours,) = endpoint["metricRelabelings"], ray["metric_relabel_configs"]
    assert theirs["sourceLabels"] == ours["source_labels"] == ["__name__"]
    assert theirs["targetLabel"] == ours["target_label"] == "__name__"
    assert theirs["regex"] == ours["regex"]
    assert re.fullmatch(ours["regex"], "ray_mixtral_kv_blocks")
    assert not re.fullmatch(ours["regex"], "ray_node_gram_used")
