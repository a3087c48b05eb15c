"""What is in the image, how large its layers are, and what a change of code rebuilds."""

import json
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.image.buildah import CAPABILITY, ROOT, Build, build, configuration
from tools.image.container import Options, run
from tools.image.layers import changed_copy, layers

BILL = "/usr/share/doc/mixtral-serve/sbom.cdx.json"


def shell(image: str, script: str) -> str:
    code, output, log = run(image, Options(["sh", "-c", script]))
    assert code == 0, log
    return output


def packages(image: str) -> dict[str, str]:
    """The versions of what pip lists in the image, by canonical name."""
    listed = json.loads(shell(image, "pip list --format json"))
    return {canonicalize_name(each["name"]): each["version"] for each in listed}


def test_the_lock_is_installed(image: str) -> None:
    """The image has each package of requirements.txt in its version, and none of the tests'."""
    installed = packages(image)
    version = shell(image, "python -c 'import platform; print(platform.python_version())'").strip()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if pin := line.partition("#")[0]:
            one = Requirement(pin)
            if one.marker is None or one.marker.evaluate({"python_full_version": version}):
                found = installed[canonicalize_name(one.name)].partition("+")[0]
                assert f"=={found}" == str(one.specifier), one.name
    assert not {"pytest", "cyclonedx-bom"} & installed.keys()


def test_the_bill_of_materials_names_what_is_installed(image: str) -> None:
    """The CycloneDX document in the image has each package that its pip lists, with the version."""
    bill = json.loads(shell(image, f"cat {BILL}"))
    installed = packages(image)
    assert bill["bomFormat"] == "CycloneDX"
    found = {canonicalize_name(each["name"]): each["version"] for each in bill["components"]}
    del installed["mixtral-serve"]  # the bill is of what it needs
    assert found == installed
    assert all(each["purl"].startswith("pkg:pypi/") for each in bill["components"])


def test_kernels_are_compiled_where_the_server_looks(image: str) -> None:
    """User serve owns the cache, and `mixtral-serve kernels` finds nothing left to compile."""
    folder = "/home/serve/.cache/mixtral-serve/kernels"
    shown = shell(
        image,
        f"stat -c %U {folder} && touch /tmp/now"
        f" && mixtral-serve kernels {folder} {CAPABILITY} && ls {folder} | wc -l"
        f" && find {folder} -newer /tmp/now -type f",
    ).splitlines()
    assert shown[0] == "serve"
    (count,) = re.findall(rf"^{CAPABILITY}: (\d+) kernels$", "\n".join(shown), re.MULTILINE)
    assert shown[-1] == count  # as many files, and none that is newer


def test_no_compiled_code_or_test_of_ours_came_along(image: str) -> None:
    """The CPU's step is compiled in the image, and tests and benchmarks are not in it."""
    assert shell(image, "find serve_app -name '*.so'").count("_cpu_step") == 1
    assert "tests" not in shell(image, "ls")


def test_a_change_of_code_is_a_small_push(built: Build, tmp_path: Path) -> None:
    """After a change of one line, all layers but those of the project are in the registry.

    A new layer has another digest than before. Dependencies, weights, and the installation with the
    compiled code keep theirs.
    """
    before = layers(built.image)
    after = layers(build(f"{built.image}-changed", context=changed_copy(tmp_path)).image)
    new = [each for each in after if each.digest not in {one.digest for one in before}]
    assert 0 < sum(each.num_bytes for each in new) < 20e6
    (installation,) = [each for each in after if each.instruction.endswith("--no-deps -e .")]
    assert installation not in new
    assert sum(each.num_bytes for each in after) > 500e6


def test_the_settings_are_those_of_the_dockerfile(image: str) -> None:
    """The entry point steps down from root, tini is the first process, and HTTP has its port."""
    config = configuration(image)["config"]
    assert config["Entrypoint"] == ["tini", "--", "docker-entrypoint.sh"]
    assert config.get("User", "") == ""
    assert "8000/tcp" in config["ExposedPorts"]
    assert shell(image, "id -un; cat /proc/1/comm").split() == ["serve", "tini"]
    assert shell(image, "which gcc rsync wget | wc -l").strip() == "3"
