"""Thousands of jobs of every kind through one worker: each is accounted for, and nothing grows.

    python -m benchmarks.soak --jobs 2000

The real worker with RunPod's SDK and the tiny model, against the platform on loopback. Streams,
plain jobs, batches, chats, refused jobs, cancelled jobs, and a platform that fails or answers late
are mixed at random. Fails where a job is not accounted for, where KV blocks stay in use, or where
the memory of all the worker's processes grows by more than 5 % after the first tenth of the jobs.
"""

import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from benchmarks.memory import memory_by_process
from benchmarks.report import new_parser, publish
from emulator.endpoint import Endpoint, endpoint
from emulator.faults import RESET
from emulator.queue import Job

MAX_GROWTH = 0.05
OPEN_AT_ONCE = 24
KINDS = ("plain", "stream", "chat", "batch", "refused", "unreadable", "cancelled")


def given(kind: str, rng: random.Random) -> Any:
    """Returns the input of a job of this kind."""
    number = rng.randrange(10**6)
    prompt = {"prompt": f"{number}. Spell the word cat.", "max_tokens": rng.randint(4, 32)}
    match kind:
        case "plain":
            return prompt
        case "stream":
            return {**prompt, "stream": True, "ignore_eos": True}
        case "chat":
            body = {"messages": [{"role": "user", "content": f"What is {number} + 1?"}]}
            return {"openai_input": {**body, "max_tokens": 16, "stream": rng.random() < 0.5}}
        case "batch":
            prompts = [prompt["prompt"], {"prompt": 5}, "What is 2 + 3?"]
            return {"prompts": prompts, "max_tokens": 8}
        case "refused":
            return {**prompt, "temperature": 3, "stream": rng.random() < 0.5}
        case "unreadable":
            return rng.choice([None, {}, "text", [1], {"prompt": "\ud800"}])
    return {**prompt, "stream": True, "max_tokens": 16_000, "ignore_eos": True}


class Soak:
    """Keeps `OPEN_AT_ONCE` jobs open and checks how each one ended."""

    def __init__(self, place: Endpoint, seed: int) -> None:
        self.place = place
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._open: dict[str, Job] = {}

    def run(self, num_jobs: int) -> None:
        """Sends `num_jobs` more jobs and waits until all have ended."""
        waiting = self._kinds(num_jobs)
        while True:
            while len(self._open) < OPEN_AT_ONCE and (kind := next(waiting, None)):
                self._misbehave()
                job = self.place.send(given(kind, self.rng))
                self._open[kind + " " + job.id] = job
            if not self._open:
                break
            self.place.wait(self._look, timeout_s=120)
        self.place.wait(self._is_free, timeout_s=30)

    def _kinds(self, num_jobs: int) -> Iterator[str]:
        for _ in range(num_jobs):
            yield self.rng.choice(KINDS)

    def _misbehave(self) -> None:
        """Makes the platform refuse, reset or delay posts now and then."""
        faults = self.place.platform.faults
        chance = self.rng.random()
        if chance < 0.02:
            faults.inject(self.rng.choice(["job-done", "job-stream"]), 500)
        elif chance < 0.03:
            faults.inject("job-done", RESET)
        elif chance < 0.05:
            faults.delay_s["job-stream"] = self.rng.choice([0.0, 0.01, 0.05])

    def _look(self) -> bool:
        """Cancels jobs and checks ended ones. Returns whether there is room for more."""
        for name, job in list(self._open.items()):
            kind = name.partition(" ")[0]
            if job.is_over:
                del self._open[name]
                self._check(kind, job)
            elif kind == "cancelled" and (job.chunks or self.rng.random() < 0.001):
                self.place.cancel(job)
        return len(self._open) < OPEN_AT_ONCE / 2 or not self._open

    def _check(self, kind: str, job: Job) -> None:
        """Checks that a job ended as its kind should, with one result."""
        expected = {"refused": "FAILED", "unreadable": "FAILED", "cancelled": "CANCELLED"}
        self.counts[f"{kind} {job.status}"] += 1
        num_results = 0 if job.status == "CANCELLED" else 1
        is_right = job.status == expected.get(kind, "COMPLETED")
        if kind == "stream" and job.chunks != job.output:
            self.wrong.append(f"stream: {len(job.chunks)} chunks, {len(job.output)} in the output")
        if not is_right or job.num_results != num_results:
            self.wrong.append(f"{kind}: {job.status}, {job.num_results} results, {job.error}")

    def _is_free(self) -> bool:
        engine = self.place.health()["engine"]
        return bool(engine["running"] == engine["waiting"] == engine["kv_blocks_used"] == 0)


def in_mb(memory: Counter[str]) -> dict[str, float]:
    """Returns the megabytes in all, and by kind of process, the largest first."""
    each = {name: round(size / 1e6, 1) for name, size in memory.most_common()}
    return {"all": round(memory.total() / 1e6, 1), **each}


def soak(num_jobs: int, seed: int) -> dict[str, Any]:
    """Runs the jobs. Returns the figures. `wrong` is empty if each job ended as it should."""
    began = time.monotonic()
    with endpoint() as place:
        place.done({"prompt": "What is 2 + 3?"})  # starts the model
        runs = Soak(place, seed)
        step = max(num_jobs // 10, 1)
        series = []
        for number in range(0, num_jobs, step):
            runs.run(min(step, num_jobs - number))
            series.append(memory_by_process(place.worker.home))
            print(f"{number + step:>6} jobs  {in_mb(series[-1])}", flush=True)
        first, last = series[0], series[-1]
        late = sum(job.num_late_posts for job in place.platform.queue.jobs.values())
        return {
            "jobs": num_jobs,
            "seconds": round(time.monotonic() - began, 1),
            "ended": dict(sorted(runs.counts.items())),
            "wrong": runs.wrong,
            "late_posts": late,
            "kv_blocks_used": place.health()["engine"]["kv_blocks_used"],
            "faults": {name: n for name, n in place.platform.faults.num_faults.items() if n},
            "memory_mb_after_a_tenth": in_mb(first),
            "memory_mb_at_the_end": in_mb(last),
            "growth": round(last.total() / first.total() - 1, 4),
        }


def main() -> int:
    """Returns the command; exit code 1 when a job was lost, a block stayed in use, or memory
    grew."""
    parser = new_parser(__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    figures = soak(options.jobs, options.seed)
    for line in figures["wrong"]:
        print(line, file=sys.stderr)
    publish("soak", figures, options.save)
    has_grown = figures["growth"] > MAX_GROWTH
    return 1 if figures["wrong"] or figures["kv_blocks_used"] or has_grown else 0


if __name__ == "__main__":
    sys.exit(main())
