"""StepTimes: how long a device takes for a step, as measured or assumed."""

from itertools import pairwise
from typing import NamedTuple

from serve_app.engine.step_cost import StepShape


class StepTimes(NamedTuple):
    """The times of a device's steps, in milliseconds."""

    source: str
    """The source of the numbers."""
    decodes: tuple[tuple[int, float], ...]
    """Seconds of steps by number of decodes with short contexts; between two sizes the time is
    linear."""
    context_token: float
    """Added for each token before a decode."""
    prompt: float
    """Fixed part of a step with prompt tokens."""
    prompt_token: float
    score: float
    """Added for each pair of a prompt token and a token that it attends to."""
    is_gpu: bool
    """Whether steps overlap with the host, and decodes are steps of their own."""
    max_num_batched_tokens: int
    rate: float
    """Requests per second of the benchmark's mixed load that keep the device busy."""
    few_tokens: int = 0
    """The most prompt tokens of a step that runs in another form than larger ones."""
    few: float = 0.0
    """Fixed part of such a step."""
    few_token: float = 0.0
    """Added for each of its prompt tokens."""

    def seconds(self, shape: StepShape) -> float:
        """Returns the time of one step."""
        decodes = 0.0
        if shape.num_decodes:
            decodes = self._decodes(shape.num_decodes) + self.context_token * shape.context_tokens
        if not shape.num_prompt_tokens:
            return decodes / 1000
        fixed, token = self.prompt, self.prompt_token
        if shape.num_prompt_tokens <= self.few_tokens:
            fixed, token = self.few, self.few_token
        prompt = fixed + token * shape.num_prompt_tokens + self.score * shape.num_scores
        return (prompt + decodes) / 1000

    def _decodes(self, count: int) -> float:
        for (n0, t0), (n1, t1) in pairwise(((0, self.decodes[0][1]), *self.decodes)):
            if count <= n1:
                return t0 + (t1 - t0) * (count - n0) / (n1 - n0)
        n, t = self.decodes[-1]
        return t * count / n


H200 = ((1, 8.5), (8, 18.0), (32, 24.8), (128, 38.5))
DEVICES = {
    "h200": StepTimes(
        "measured (results/gpu-h200-triton.json); prompts by the first of two readings",
        H200, 4e-5, 230, 0.024, 2e-6, True, 8192, 4,
    ),
    "h200, second reading": StepTimes(
        "measured; prompts by the second reading", H200, 4e-5, 222, 0.039, 2e-6, True, 8192, 4,
    ),
    "h200, wanted": StepTimes(
        "the targets of the CUDA kernels",
        ((1, 4.2), (8, 8.4), (32, 11.6), (128, 20.5)), 4e-5, 40, 0.05, 2e-6, True, 8192, 8,
    ),
    "small gpu": StepTimes(
        "assumed, and not used to tune the policy",
        ((1, 14), (8, 30), (32, 48), (128, 110)), 1e-4, 120, 0.25, 1e-5, True, 2048, 1,
    ),
    "cpu": StepTimes(
        "measured with the tiny model (results/engine-cpu.json)",
        ((1, 0.5), (8, 1.1), (16, 1.6), (32, 2.6), (64, 4.5)), 2.5e-4,
        0.1, 0.045, 5e-5, False, 512, 6,
    ),
}  # fmt: skip
