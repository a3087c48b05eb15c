"""cluster/kuberay as `kubectl kustomize` renders it, validated by published schemas."""

import gzip
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERAY = Path("cluster/kuberay")
SCHEMAS = Path(__file__).parent / "schemas"
KUBECTL = shutil.which("kubectl")
KUBERNETES = ("1.30", "1.37")
"""The oldest and the newest version that the manifests are validated for."""
CRDS = {
    "RayService": ("kuberay-1.5.1-rayservices.yaml.gz", "kuberay-1.7.0-rayservices.yaml.gz"),
    "PodMonitor": ("prometheus-operator-0.93.0-podmonitors.yaml.gz",),
}


@cache
def rendered(folder: Path) -> list[dict[str, Any]]:
    """Returns the objects that `kubectl apply -k folder` would send."""
    assert KUBECTL is not None
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def rayservice(folder: Path = KUBERAY / "base") -> dict[str, Any]:
    """Returns the RayService of an overlay; the base's is read without kubectl."""
    if folder.name == "base":
        document: dict[str, Any] = yaml.safe_load((folder / "rayservice.yaml").read_text())
        return document
    (found,) = (each for each in rendered(folder) if each["kind"] == "RayService")
    return found


def groups(service: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the head group and the worker groups."""
    cluster = service["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def containers(service: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the containers of head and workers."""
    return [each for group in groups(service) for each in group["template"]["spec"]["containers"]]


def check(document: dict[str, Any]) -> None:
    """Raises where the API server would refuse the object, or drop an unknown field."""
    if document["kind"] not in CRDS:
        for version in KUBERNETES:
            kubernetes_validate.validate(document, version, strict=True)
        return
    for name in CRDS[document["kind"]]:
        jsonschema.validate(document, crd_schema(name, document["apiVersion"]))
    for group in groups(document) if document["kind"] == "RayService" else ():
        # The definition is generated from Kubernetes' types, without what these say of themselves.
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        for version in KUBERNETES:
            kubernetes_validate.validate(pod, version, strict=True)


@cache
def crd_schema(name: str, api_version: str) -> dict[str, Any]:
    """Returns the schema of one version of a custom resource; fields that it does not name are
    refused."""
    definition = yaml.load(gzip.decompress((SCHEMAS / name).read_bytes()), yaml.CSafeLoader)
    (version,) = (
        each
        for each in definition["spec"]["versions"]
        if f"{definition['spec']['group']}/{each['name']}" == api_version
    )
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    forbid_other_fields(schema)
    return dict(schema)


def forbid_other_fields(schema: object) -> None:
    """Kubernetes drops fields that a structural schema does not name; here they are an error."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for each in schema.values():
            forbid_other_fields(each)
    elif isinstance(schema, list):
        for each in schema:
            forbid_other_fields(each)


def json_schema(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(gzip.decompress((SCHEMAS / name).read_bytes()))
    return document
