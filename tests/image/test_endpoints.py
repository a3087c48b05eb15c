"""The image as an HTTP server, as a load balancer's worker, and as a pod of KubeRay's."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml

from tests.cluster.manifests import groups, rayservice
from tests.worker.conftest import TINY, until
from tools.image.container import Container, Options, container, run

HTTP = {"SERVE_CONFIG": "configs/tiny.yaml", "RUNPOD_SERVERLESS": "false"}
SERVING = "Serving HTTP"
START_S = 120
LONG = {"prompt": "x", "ignore_eos": True, "max_tokens": 3000, "stream": True}


SHM_BYTES = 512 << 20
"""`--shm-size 512m`"""


@contextmanager
def serving(image: str) -> Iterator[Container]:
    """Yields the image in server mode, once it has loaded the model."""
    with container(image, Options(environment=HTTP, shm_bytes=SHM_BYTES)) as it:
        until(lambda: it.process.poll() is not None or SERVING in it.log, START_S)
        assert it.process.poll() is None, it.log
        yield it


def get(it: Container, url: str) -> tuple[int, str]:
    """Status and body, as wget has them in the container."""
    done = it.run("wget", "--server-response", "--quiet", "--content-on-error", "-O-", url)
    (status, *_) = [line.split()[1] for line in done.stderr.splitlines() if "HTTP/" in line]
    return int(status), done.stdout


def post(it: Container, url: str, body: object) -> "subprocess.CompletedProcess[str]":
    data = f"--post-data={json.dumps(body)}"
    return it.run("wget", "--quiet", "-O-", "--header=Content-Type: application/json", data, url)


def test_a_server_finishes_its_stream_after_sigterm(image: str) -> None:
    """SIGTERM reaches the entry through tini: a stream runs to its end, then all processes end."""
    with serving(image) as it:
        assert it.processes()[0].startswith("tini -- docker-entrypoint.sh python runpod_entry.py")
        body = json.dumps(LONG)
        command = f"wget -qO- --header='Content-Type: application/json' --post-data='{body}' "
        script = f"{command} http://127.0.0.1:8000/prompt >/tmp/stream; echo $? >/tmp/code"
        it.run("sh", "-c", f"({script}) >/dev/null 2>&1 &")
        stream, code = it.root / "tmp" / "stream", it.root / "tmp" / "code"
        until(lambda: stream.exists() and stream.stat().st_size > 0)
        it.send(signal.SIGTERM)
        assert it.wait() == 0, it.log
        events = [line.removeprefix("data: ") for line in stream.read_text().splitlines() if line]
        assert events.pop() == "[DONE]"
        assert json.loads(events[-1])["usage"]["completion_tokens"] == LONG["max_tokens"]
        assert int(code.read_text()) == 0


def test_dockers_default_of_shared_memory_is_an_error(image: str) -> None:
    """With Docker's default of 64 MB for /dev/shm, the server ends with one sentence that names the
    option to set."""
    code, _, log = run(image, Options(environment=HTTP))
    assert code == 1
    assert "Traceback" not in log
    assert "--shm-size" in log.splitlines()[-1]


def test_no_zombie_is_left(image: str) -> None:
    """tini reaps processes whose parent has ended, so no zombie is left."""
    with serving(image) as it:
        it.run("sh", "-c", "(true &) ; (sleep 0 &)")
        until(lambda: "Z" not in it.run("sh", "-c", "cut -d' ' -f3 /proc/[0-9]*/stat").stdout)


def test_a_load_balancers_worker_says_when_it_is_ready(image: str) -> None:
    """`/ping` on PORT_HEALTH is 204 from the first moment and 200 with the model; PORT serves."""
    health = "http://127.0.0.1:8001/ping"
    variables = HTTP | {"PORT": "8080", "PORT_HEALTH": "8001"}
    options = Options(environment=variables, shm_bytes=SHM_BYTES)
    with container(image, options) as it:
        seen: list[int] = []

        def is_ready() -> bool:
            assert it.process.poll() is None, it.log
            done = it.run("wget", "-qS", "-O-", health)
            seen.extend(
                int(line.split()[1]) for line in done.stderr.splitlines() if "HTTP/" in line
            )
            return seen[-1:] == [200]

        until(is_ready, START_S)
        assert set(seen) == {204, 200}
        done = post(
            it, "http://127.0.0.1:8080/prompt", {"prompt": "x", "max_tokens": 3, "ignore_eos": True}
        )
        assert json.loads(done.stdout)["usage"]["completion_tokens"] == 3
        it.send(signal.SIGTERM)
        assert it.wait() == 0


# What the operator runs: `/bin/bash -c --` is the container's command, and the start its argument.
# https://github.com/ray-project/kuberay: ray-operator/controllers/ray/common/pod.go
START = "ulimit -n 65536; ray start --head {options} --block"
AGENT = 52365
PROBE = (
    f"wget --tries 1 -T 2 -q -O- http://localhost:{AGENT}/api/local_raylet_healthz | grep success"
    " && wget --tries 1 -T 10 -q -O- http://localhost:8265/api/gcs_healthz | grep success"
)
TOKEN = "t" * 32
DEPLOY = """
import json, os, sys, urllib.request
url = "http://localhost:8265/api/serve/applications/"
headers = {"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"],
           "Content-Type": "application/json"}
call = urllib.request.Request(url, sys.argv[1].encode(), headers, method="PUT")
print(urllib.request.urlopen(call).status)
"""


@pytest.fixture
def head() -> tuple[Options, str]:
    """The head's pod of cluster/kuberay, and its configuration for Serve with the tiny model.

    The head takes the replica, because there is no second pod: `num-cpus` is 2 and no GPU is asked.
    """
    service = rayservice()
    group = groups(service)[0]
    pod = group["template"]["spec"]
    (one,) = pod["containers"]
    parameters = {
        **group["rayStartParams"],
        "num-cpus": "2",
        "dashboard-agent-listen-port": str(AGENT),
        "metrics-export-port": "8080",
    }
    start = START.format(options=" ".join(f"--{name}={it}" for name, it in parameters.items()))
    plain = {each["name"]: each["value"] for each in one["env"] if "value" in each}
    size = pod["volumes"][0]["emptyDir"]["sizeLimit"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    application["args"] = yaml.safe_load(TINY.read_text())["applications"][0]["args"]
    application["deployments"][0]["ray_actor_options"] = {"num_gpus": 0}
    options = Options(
        command=[start],
        entrypoint=["/bin/bash", "-c", "--"],
        user=pod["securityContext"]["runAsUser"],
        environment={
            **plain,
            "API_KEYS": "k" * 16,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_PORT": "6379",
            "RAY_ADDRESS": "127.0.0.1:6379",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        },
        tmpfs=("/models",),
        shm_bytes=int(size.removesuffix("Gi")) << 30,
    )
    return options, json.dumps(config)


def test_a_pod_of_kuberay_serves(image: str, head: tuple[Options, str]) -> None:
    """The operator's start command, its probe and its call to Serve work in the image; HAProxy
    answers on port 8000, and asks for the key."""
    options, config = head
    with container(image, options) as it:
        until(lambda: it.process.poll() is not None or passes(it, PROBE), START_S)
        assert it.process.poll() is None, it.log
        deployed = it.run("python", "-c", DEPLOY, config)
        assert deployed.stdout.strip() == "200", deployed.stderr
        until(
            lambda: passes(it, "wget -qO- http://localhost:8000/-/healthz | grep success"), START_S
        )
        until(lambda: get(it, "http://localhost:8000/ping")[0] == 200, START_S)
        assert get(it, "http://localhost:8000/v1/models")[0] == 401
        body = '--post-data={"prompt": "x", "max_tokens": 3, "ignore_eos": true}'
        key = f"--header=Authorization: Bearer {'k' * 16}"
        done = it.run("wget", "-qO-", key, body, "http://localhost:8000/prompt")
        assert json.loads(done.stdout)["usage"]["completion_tokens"] == 3


def passes(it: Container, probe: str) -> bool:
    return it.run("/bin/bash", "-c", probe).returncode == 0
