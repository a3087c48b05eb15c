"""An image's layers: what a push sends, and what a change of code makes anew."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.image.buildah import ROOT, STORAGE, buildah, configuration

NOT_IN_AN_IMAGE = (".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", "*.so")


@dataclass(frozen=True)
class Layer:
    """One layer of an image."""

    digest: str
    """The digest of the uncompressed content. A push sends only layers that the registry lacks."""
    instruction: str
    """The instruction of the Dockerfile, or of the base's, that made the layer."""
    num_bytes: int
    """Uncompressed bytes."""


def layers(image: str) -> list[Layer]:
    """Returns the layers of an image, the base's first."""
    document = configuration(image)
    digests = [str(each) for each in document["rootfs"]["diff_ids"]]
    steps = [each for each in document["history"] if not each.get("empty_layer")]
    (index,) = (STORAGE / "layers").glob("*-layers/layers.json")  # of containers/storage
    sizes = {
        each["diff-digest"]: int(each["diff-size"])
        for each in json.loads(index.read_text())
        if "diff-digest" in each
    }
    return [
        Layer(digest, step.get("created_by", ""), sizes[digest])
        for digest, step in zip(digests, steps, strict=True)
    ]


def compressed_bytes(image: str) -> list[int]:
    """Returns the gzipped bytes of each layer, which a push sends. This takes minutes."""
    with tempfile.TemporaryDirectory(dir=STORAGE) as name:
        buildah("push", "--quiet", image, f"oci:{name}/image:it")
        blobs = Path(name) / "image" / "blobs" / "sha256"
        (reference,) = json.loads((blobs.parents[1] / "index.json").read_text())["manifests"]
        manifest = json.loads((blobs / reference["digest"].partition(":")[2]).read_text())
    return [int(each["size"]) for each in manifest["layers"]]


def changed_copy(folder: Path) -> Path:
    """Copies the project to `folder`, adds a line to one Python file, and returns the copy."""
    copy = folder / "project"
    ignored = shutil.ignore_patterns(*NOT_IN_AN_IMAGE)
    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    with (copy / "serve_app" / "app.py").open("a") as file:
        file.write("# another line\n")
    return copy
