"""cluster/kuberay: each overlay, rendered by `kubectl kustomize`, is what the API server takes."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.config.settings import Settings
from tests.cluster.manifests import (
    KUBECTL,
    KUBERAY,
    check,
    containers,
    groups,
    rayservice,
    rendered,
)

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")

OVERLAYS = [KUBERAY / name for name in ("base", "one-gpu", "autoscaling")]
COMPONENTS = ("monitoring", "host-path")
overlays = pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """An overlay as a user writes it: autoscaling with both components and an image of theirs."""
    for source in KUBERAY.iterdir():
        (tmp_path / source.name).symlink_to(source.resolve())
    (tmp_path / "mine").mkdir()
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(Path("..") / "autoscaling")],
        "components": [f"../{name}" for name in COMPONENTS],
        "images": [{"name": "mixtral-serve", "newName": "registry/mixtral", "newTag": "1"}],
    }
    (tmp_path / "mine" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    return tmp_path / "mine"


def objects(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["kind"], each["metadata"]["name"]): each for each in rendered(folder)}


def deployment(service: dict[str, Any]) -> dict[str, Any]:
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (found,) = application["deployments"]
    return dict(found)


@overlays
def test_kubernetes_takes_the_objects(folder: Path) -> None:
    """Each object passes the schemas of KubeRay 1.5.1 and 1.7.0 and of Kubernetes, strictly."""
    for each in rendered(folder):
        check(each)


def test_kubernetes_takes_the_components(mine: Path) -> None:
    """With both components too; the claim is gone, and each container has the user's image."""
    found = objects(mine)
    for each in found.values():
        check(each)
    policies = {name for kind, name in found if kind == "NetworkPolicy"}
    assert policies == {"mixtral", "mixtral-metrics"}
    assert ("PodMonitor", "mixtral") in found
    assert not [kind for kind, _ in found if kind == "PersistentVolumeClaim"]
    service = found["RayService", "mixtral"]
    assert {each["image"] for each in containers(service)} == {"registry/mixtral:1"}
    (worker,) = groups(service)[1:]
    models = {
        "name": "models",
        "hostPath": {"path": "/var/lib/mixtral-models", "type": "Directory"},
    }
    assert models in worker["template"]["spec"]["volumes"]


@pytest.mark.parametrize(
    "path", ["spec.upgradeStrategie", "spec.rayClusterConfig.workerGroupSpecs.0.minReplica"]
)
def test_a_misspelt_field_is_found(path: str) -> None:
    """The validation refuses a misspelt field, which the API server would silently drop."""
    service = copy.deepcopy(rayservice())
    *parents, name = path.split(".")
    place: Any = service
    for each in parents:
        place = place[int(each) if each.isdigit() else each]
    place[name] = 1
    with pytest.raises(jsonschema.ValidationError, match=name):
        check(service)


def test_a_volume_that_does_not_exist_is_no_pod() -> None:
    """The check of pods refuses a volume without a name, which KubeRay's definition lets pass."""
    service = copy.deepcopy(rayservice())
    del groups(service)[1]["template"]["spec"]["volumes"][0]["name"]
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(service)


@overlays
def test_serve_takes_the_configuration(folder: Path) -> None:
    """`serveConfigV2` passes Serve's schema and its `args:` are our settings."""
    config = yaml.safe_load(rayservice(folder)["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    settings = Settings.from_args(config["applications"][0]["args"], "serveConfigV2")
    assert settings.model.quantization == "nf4"


def test_overlays_change_only_what_they_say() -> None:
    """one-gpu changes the upgrade alone; autoscaling the replicas, the workers and the claim."""
    base, one, auto = (objects(folder) for folder in OVERLAYS)
    assert one.pop(("RayService", "mixtral"))["spec"].pop("upgradeStrategy") == {"type": "None"}
    service = copy.deepcopy(base["RayService", "mixtral"])
    assert {name: it for name, it in base.items() if name[0] != "RayService"} == one
    theirs = copy.deepcopy(auto["RayService", "mixtral"])
    ours, config = (yaml.safe_load(it["spec"].pop("serveConfigV2")) for it in (service, theirs))
    assert ours["applications"][0]["deployments"][0].pop("num_replicas") == 1
    scaling = config["applications"][0]["deployments"][0].pop("autoscaling_config")
    assert config == ours
    cluster = theirs["spec"]["rayClusterConfig"]
    assert cluster.pop("enableInTreeAutoscaling") is True
    assert cluster.pop("autoscalerOptions")
    assert cluster["workerGroupSpecs"][0]["maxReplicas"] == scaling["max_replicas"] == 4
    assert cluster["workerGroupSpecs"][0]["minReplicas"] == scaling["min_replicas"] == 1
    cluster["workerGroupSpecs"][0]["maxReplicas"] = 1
    assert theirs == service
    assert auto["PersistentVolumeClaim", "mixtral-models"]["spec"]["accessModes"] == [
        "ReadWriteMany"
    ]


def test_a_replica_is_full_before_it_queues() -> None:
    """Serve adds a replica before the engine's own batch is full."""
    service = rayservice(KUBERAY / "autoscaling")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    settings = Settings.from_args(application["args"], "serveConfigV2")
    scaling = deployment(service)["autoscaling_config"]
    assert scaling["target_ongoing_requests"] < settings.engine.max_num_seqs


@overlays
def test_pods_outside_reach_the_http_port_alone(folder: Path) -> None:
    """The policy covers head and workers. All pods may reach port 8000, and no other port."""
    found = objects(folder)
    policy = found["NetworkPolicy", "mixtral"]["spec"]
    labels = policy["podSelector"]["matchLabels"]
    for group in groups(found["RayService", "mixtral"]):
        assert labels.items() <= group["template"]["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress"]
    (everybody,) = (rule for rule in policy["ingress"] if "from" not in rule)
    assert [each["port"] for each in everybody["ports"]] == [8000]
    every_port = [rule["from"] for rule in policy["ingress"] if "ports" not in rule]
    assert every_port == [[{"podSelector": {"matchLabels": labels}}]]
