"""Weights that the build downloads from a hub, and what becomes of the token."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.tiny import CHECKPOINT
from tests import hub
from tests.image.test_jobs import ANSWER, text_of
from tools.image.buildah import Build, ImageError, build, configuration
from tools.image.container import Options, run
from tools.image.layers import layers

TOKEN = "hf_a-token-that-nothing-else-contains"
REPOSITORY = "o/gated"


@pytest.fixture(scope="module")
def hub_options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Options that make the build ask a hub on loopback for the tiny checkpoint.

    The hub's address is in a file that Python reads where it starts. An argument or a variable
    would be part of the image, and a reason to build every layer again.
    """
    folder = tmp_path_factory.mktemp("hub")
    files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
    with hub.serve(files, token=TOKEN) as url:
        line = f"import os; os.environ.update(HF_ENDPOINT={url!r}, HF_HUB_DISABLE_XET='1')\n"
        (folder / "hub.pth").write_text(line)
        place = "/usr/local/lib/python3.11/site-packages/hub.pth"
        yield ["--volume", f"{folder}/hub.pth:{place}:ro"]


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The option that gives the token to the build, as a secret."""
    path = tmp_path_factory.mktemp("token") / "HF_TOKEN"
    path.write_text(TOKEN)
    return ["--secret", f"id=HF_TOKEN,src={path}"]


ARGUMENT = ["--build-arg", f"BAKE_MODEL={REPOSITORY}"]


@pytest.fixture(scope="module")
def baked(built: Build, hub_options: list[str], token: list[str]) -> Build:
    """The image with the weights of a gated repository."""
    return build(f"{built.image}-baked", *ARGUMENT, *hub_options, *token)


def test_a_baked_model_answers_under_its_public_name(baked: Build) -> None:
    """Without a name, a volume or a network; user serve reads the weights that root wrote."""
    code, output, log = run(
        baked.image, Options(ANSWER, environment={"SERVE_CONFIG": "configs/tiny-nf4.yaml"})
    )
    assert code == 0, log
    assert text_of(output)
    assert json.loads(output)["model"] == REPOSITORY


def test_the_token_is_not_in_the_image(baked: Build, tmp_path: Path) -> None:
    """Neither settings nor history nor a file has it; what was downloaded is not there either."""
    assert TOKEN not in json.dumps(configuration(baked.image))
    script = f"grep -rls {TOKEN} / --exclude-dir=proc --exclude-dir=sys; ls -d /models/* /tmp/hub"
    code, output, log = run(baked.image, Options(["sh", "-c", script]))
    assert output.split() == ["/models/baked"]
    assert "/tmp/hub" in log  # what was downloaded
    assert code != 0


def test_without_the_token_the_build_ends(built: Build, hub_options: list[str]) -> None:
    """A gated repository is refused in the build, by the sentence that names the token.

    Another name than that of `baked`, because a secret is no reason to run a step again.
    """
    argument = ["--build-arg", f"BAKE_MODEL={REPOSITORY}-too"]
    with pytest.raises(ImageError, match="HF_TOKEN"):
        build(f"{built.image}-refused", *argument, *hub_options, "--target", "weights")


def test_weights_are_an_image_that_later_builds_take(
    built: Build, baked: Build, hub_options: list[str], token: list[str]
) -> None:
    """`--target weights` makes the image, and `--build-context weights=` takes what is in it."""
    weights = f"{built.image}-weights"
    build(weights, *ARGUMENT, *hub_options, *token, "--target", "weights")
    assert len(layers(weights)) == 1
    context = f"weights=docker-image://{weights}"
    again = build(f"{built.image}-again", *ARGUMENT, "--build-context", context)
    assert "/models/baked" in str(configuration(again.image)["config"]["Env"])
    code, output, log = run(again.image, Options(["ls", "/models/baked"]))
    assert (code, "config.json" in output) == (0, True), log
