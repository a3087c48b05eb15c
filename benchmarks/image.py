"""The container's image: its build, its layers, a push after a change, and its first answer.

    python -m benchmarks.image

Builds the Dockerfile by buildah, as root, on the base that the tests make, and again after a change
of one line of Python. With `--from-nothing` the first build takes no layer of an earlier one, and
its seconds are reported. `answer_seconds` are from the start of a container to the end of
`runpod_entry.py --test_input` with the tiny model; the median of `--repeats`. Torch is the build
for a CPU where pip's configuration names it; a release has CUDA's libraries, 3 GB more.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import new_parser, publish, say
from tools.image.buildah import Build, build, make_base, missing
from tools.image.container import Options, run
from tools.image.layers import changed_copy, compressed_bytes, layers

IMAGE = "localhost/mixtral-serve-benchmark"
JOB = json.dumps({"input": {"prompt": "What is 2 + 3?", "max_tokens": 8}})
ANSWER = Options(
    ["python", "runpod_entry.py", "--test_input", JOB],
    environment={"SERVE_CONFIG": "configs/tiny.yaml"},
)


def first_answer() -> float:
    """Returns the seconds until a new container has answered and ended. Raises `RuntimeError` if it
    fails."""
    began = time.monotonic()
    code, _, log = run(IMAGE, ANSWER)
    if code != 0:
        raise RuntimeError(log)
    return time.monotonic() - began


def rebuilt() -> tuple[Build, int]:
    """Returns a build after a change of one line, and the uncompressed bytes of new layers.

    Both builds may use layers of earlier ones, which `--from-nothing` does not allow.
    """
    before = build(f"{IMAGE}-before")
    with tempfile.TemporaryDirectory() as name:
        after = build(f"{IMAGE}-after", context=changed_copy(Path(name)))
    known = {each.digest for each in layers(before.image)}
    new = (each for each in layers(after.image) if each.digest not in known)
    return after, sum(each.num_bytes for each in new)


def main() -> int:
    """Runs the command."""
    parser = new_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--from-nothing", action="store_true")
    options = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    make_base()
    whole = build(IMAGE, *(["--no-cache"] if options.from_nothing else []))
    found, compressed = layers(IMAGE), compressed_bytes(IMAGE)
    for each, pushed in zip(found, compressed, strict=True):
        say(f"{each.num_bytes / 1e6:8.1f} MB {pushed / 1e6:8.1f} MB  {each.instruction[:80]}")
    again, new_bytes = rebuilt()
    answers = [first_answer() for _ in range(options.repeats)]
    figures: dict[str, Any] = {
        "build_seconds": round(whole.seconds, 1) if options.from_nothing else None,
        "image_bytes": sum(each.num_bytes for each in found),
        "compressed_bytes": sum(compressed),
        "layers": [
            {"bytes": each.num_bytes, "compressed": pushed, "step": each.instruction[:120]}
            for each, pushed in zip(found, compressed, strict=True)
        ],
        "after_a_change": {"build_seconds": round(again.seconds, 1), "new_bytes": new_bytes},
        "answer_seconds": round(statistics.median(answers), 2),
    }
    publish("image", figures, options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
