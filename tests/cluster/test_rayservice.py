"""The RayService of cluster/kuberay/base agrees with the image, with Ray and with our limits."""

import importlib
import tomllib
from pathlib import Path

import yaml
from ray.serve._private.constants import RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S

from serve_app.config.settings import Settings
from serve_app.node import haproxy_program
from serve_app.node.haproxy import GUARD, MODE
from serve_app.node.haproxy_program import BINARY_PATH
from tests.cluster.manifests import containers, groups, rayservice
from tests.cluster.versions import pin


def test_secrets_reach_head_and_worker() -> None:
    """Head and worker both have the secrets: Serve builds the settings on the head."""
    for container in containers(rayservice()):
        env = {entry["name"]: entry.get("valueFrom") for entry in container["env"]}
        assert env["HF_TOKEN"]["secretKeyRef"]["optional"]
        assert "optional" not in env["API_KEYS"]["secretKeyRef"]  # no pod starts without keys


def test_it_has_haproxy_with_our_limits_and_a_token() -> None:
    """Each container has the mode, our program and the guard; Ray's ports ask for the token."""
    assert rayservice()["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    for container in containers(rayservice()):
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert env[MODE] == "1"
        program = Path(env[BINARY_PATH])
        assert scripts[program.name] == f"{haproxy_program.__name__}:main"
        module, _, name = env[GUARD].partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_a_replica_finishes_its_longest_request() -> None:
    """The grace periods cover Serve's 30 s of draining and the request timeout.

    The old cluster of an upgrade stays as long, and so does a pod that ends.
    """
    spec = rayservice()["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    settings = Settings.from_args(config["applications"][0]["args"], "serveConfigV2")
    (deployment,) = config["applications"][0]["deployments"]
    grace_s = deployment["graceful_shutdown_timeout_s"]
    assert RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S == 30
    assert grace_s > settings.api.request_timeout_s + 30
    assert spec["rayClusterDeletionDelaySeconds"] > grace_s
    for group in groups(rayservice()):
        pod = group["template"]["spec"]
        env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
        drain_s = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert pod["terminationGracePeriodSeconds"] > drain_s > grace_s


def test_it_runs_the_pinned_ray() -> None:
    """KubeRay starts the Ray version that the image has."""
    assert rayservice()["spec"]["rayClusterConfig"]["rayVersion"] == pin("ray[serve]")


def test_pods_run_as_the_images_user() -> None:
    """KubeRay replaces the image's entry point, which steps down from root elsewhere."""
    assert "useradd --create-home --uid 1000 serve" in Path("Dockerfile").read_text()
    for group in groups(rayservice()):
        context = group["template"]["spec"]["securityContext"]
        assert {context["runAsUser"], context["runAsGroup"], context["fsGroup"]} == {1000}


def test_the_model_is_on_the_volume() -> None:
    """Downloaded and converted files are in folders below the workers' mount."""
    (worker,) = groups(rayservice())[1:]
    (container,) = worker["template"]["spec"]["containers"]
    mounts = {each["name"]: Path(each["mountPath"]) for each in container["volumeMounts"]}
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    for name in ("HF_HOME", "MIXTRAL_MODEL__CACHE_DIR"):
        assert Path(env[name]).is_relative_to(mounts["models"])


def test_the_object_store_fits_into_shm() -> None:
    """Ray would use the disk for an object store larger than /dev/shm."""
    for group in groups(rayservice()):
        volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
        size = volumes["shm"]["emptyDir"]["sizeLimit"]
        assert size.endswith("Gi")
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store < int(size.removesuffix("Gi")) * 2**30
