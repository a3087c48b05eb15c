"""Dockerfile, workflow and YAMLs agree with the libraries and with the code."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from ray.serve.schema import ServeDeploySchema

from serve_app.config.settings import Settings
from serve_app.loading.load import KERNELS_FOLDER
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.tiny import CHECKPOINT
from tests.mounts import NAMESPACE, can_mount, mounted_folder


@pytest.mark.parametrize("path", sorted(map(str, Path("configs").glob("*.yaml"))))
def test_configs_are_what_serve_takes(path: str) -> None:
    """Every shipped YAML passes Serve's schema and our settings."""
    ServeDeploySchema.model_validate(yaml.safe_load(Path(path).read_text()))
    Settings.from_yaml(path)


def test_the_image_installs_the_lock() -> None:
    """The image has the locked versions, and torch from the index that a build argument names."""
    text = Path("Dockerfile").read_text()
    assert 'ARG TORCH_INDEX_URL=""' in text
    assert '${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r requirements.txt' in text


def test_the_image_has_kernels_where_a_server_looks_for_them() -> None:
    """The build copies them into the folder of the user that the server runs as."""
    (folder,) = re.findall(
        r"^COPY --from=kernels --chown=serve:serve /kernels (\S+)",
        Path("Dockerfile").read_text(),
        re.MULTILINE,
    )
    assert folder == KERNELS_FOLDER.replace("~", "/home/serve") + "/kernels"


def test_the_image_copies_what_exists() -> None:
    """Every source of a COPY in the Dockerfile is in the repository."""
    for line in Path("Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            for source in line.split()[1:-1]:
                assert list(Path().glob(source)), source


def test_a_change_of_python_code_compiles_nothing() -> None:
    """Only one stage installs the package, and compiles, and it copies only what that needs."""
    install = "RUN pip install --no-cache-dir --no-deps -e ."
    before, _, after = Path("Dockerfile").read_text().partition(install)
    assert after
    assert install not in after
    copied = re.findall(r"^COPY (.*) \S+$", before.rpartition("\nFROM ")[2], re.MULTILINE)
    metadata = "pyproject.toml README.md LICENSE runpod_entry.py serve_app/__init__.py"
    sources = "serve_app/model/kernels/cpu/*.c serve_app/model/kernels/cpu/*.h"
    assert " ".join(copied) == f"{metadata} {sources}"


def test_the_image_has_no_volume_of_its_own() -> None:
    """The image makes no folder that looks like a volume, and its entry point steps down."""
    text = Path("Dockerfile").read_text()
    assert not re.search(r"mkdir.*(runpod-volume|workspace)", text)
    assert 'ENTRYPOINT ["tini", "--", "docker-entrypoint.sh"]' in text
    assert "\nUSER " not in text


@pytest.fixture
def baking(tmp_path: Path) -> tuple[str, Path]:
    """The Dockerfile's command that bakes a model into the image, with its folder in `tmp_path`."""
    text = Path("Dockerfile").read_text()
    (command,) = re.findall(r"RUN --mount=type=secret,id=HF_TOKEN \\\n((?:.*\\\n)+.*)\n", text)
    baked = tmp_path / "baked"
    return command.replace("/models/baked", str(baked)).replace(
        "/tmp/hub", f"{tmp_path}/hub"
    ), baked


def test_a_model_is_baked_into_the_image(baking: tuple[str, Path]) -> None:
    """The build argument BAKE_MODEL leaves a 4-bit checkpoint that every user can read."""
    command, baked = baking
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "BAKE_MODEL": str(CHECKPOINT)}
    subprocess.run(["sh", "-c", command], env=variables, check=True, capture_output=True)
    assert inspect(baked).form == "fused"
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in baked.iterdir())


@pytest.mark.parametrize(
    ("argument", "name", "served"),
    [("", "", ""), ("owner/mixtral", "/models/baked", "owner/mixtral")],
)
def test_a_baked_model_keeps_its_name(
    baking: tuple[str, Path], argument: str, name: str, served: str
) -> None:
    """Without BAKE_MODEL nothing is baked or set; with it clients keep the checkpoint's name."""
    text = Path("Dockerfile").read_text()
    (values,) = re.findall(r"ENV (MODEL_NAME=.*?)\n\n", text, re.DOTALL)
    # Docker replaces ${name:+word} as sh does.
    script = f"export {values}; echo $MODEL_NAME; echo $SERVED_MODEL_NAME"
    variables = {**os.environ, "BAKE_MODEL": argument}
    done = subprocess.run(["sh", "-c", script], env=variables, capture_output=True, text=True)
    assert done.stdout == f"{name}\n{served}\n"
    if not argument:
        subprocess.run(["sh", "-c", baking[0]], env=variables, check=True)
        assert not baking[1].exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("owner", [0, 1234])
def test_the_entry_point_gives_the_volume_to_its_user(owner: int, tmp_path: Path) -> None:
    """Folders of a volume that belongs to another user become writable; the rest stays as it is."""
    script = Path("docker-entrypoint.sh").read_text().replace("user=serve", "user=nobody")
    with mounted_folder() as volume:
        old = volume / "huggingface-cache" / "hub" / "models--o--m"
        old.mkdir(parents=True)
        (volume / "mine").mkdir()
        for path in (volume, *volume.rglob("*")):
            os.chown(path, owner, owner)
            path.chmod(0o755)
        volumes = {"BASE_PATH": str(volume), "MIXTRAL_MODEL__CACHE_DIR": str(volume / "copy")}
        write = "id -un; echo $HOME; touch results/a copy/b huggingface-cache/hub/models--o--m/c"
        done = subprocess.run(
            ["sh", "-c", script, "entry", "sh", "-c", f"cd {volume} && {write}"],
            env={**os.environ, **volumes},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, "nobody\n/home/serve\n"), done.stderr
        assert (volume / "mine").stat().st_uid == owner
        assert (old / "c").stat().st_uid != owner


@pytest.mark.skipif(not can_mount(), reason="the kernel allows no namespaces here")
def test_a_volume_that_cannot_be_given_away_ends_nothing(tmp_path: Path) -> None:
    """On a volume that is read-only the command runs all the same, as the same user."""
    script = Path("docker-entrypoint.sh").read_text()
    code = f'mount -t tmpfs -o ro none {tmp_path}; exec sh -c "$0" entry echo it runs'
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", code, script],
        env={**os.environ, "BASE_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "it runs\n"), done.stderr


def test_the_image_quiets_the_sdk() -> None:
    """The image sets the variables that keep the SDK from logging user text and opening the GPU."""
    text = Path("Dockerfile").read_text()
    for line in (
        "RUNPOD_SERVERLESS=true",
        "RUNPOD_LOG_LEVEL=INFO",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS=true",
        "RUNPOD_SKIP_GPU_CHECK=true",
    ):
        assert line in text


def test_the_workflow_runs_what_ci_runs() -> None:
    """The public workflow has the commands of .ci/run, on every Python that the package allows."""
    workflow = yaml.safe_load(Path(".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    commands = [run for run in runs if run.startswith("make ")]
    script = Path(".ci/run").read_text().splitlines()
    assert commands == ["make install-dev", *(line for line in script if line.startswith("make "))]
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    allowed = SpecifierSet(project["requires-python"])
    versions = [f"3.{minor}" for minor in range(30)]
    assert job["strategy"]["matrix"]["python"] == list(allowed.filter(versions))
