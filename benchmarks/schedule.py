"""Prompts beside streams: the prefill policy and fixed budgets on simulated devices.

    python -m benchmarks.schedule --save benchmarks/results/schedule.json

The engine is the product's, from its loop to the prefill policy; only the device is simulated
(`tools/simulated_engine.py`), with step times that were measured (`step_times.py`). A fixed budget
computes up to so many tokens in every step. `beside` divides the policy's figures by the best of
the fixed budgets that keep every gap within `engine.max_stall_s`, each figure by its own best.
"""

from collections.abc import Callable
from typing import Any

from benchmarks import arrivals
from benchmarks.report import new_parser, publish, say
from benchmarks.step_times import DEVICES, StepTimes
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.prefill_policy import Policy, PrefillBudget, PrefillPolicy
from serve_app.engine.step_cost import StepShape
from serve_app.loading.warm_up import prompt_sizes
from tools.simulated_engine import Arrival, SimulatedEngine

FIXED = (512, 2048, 8192)
SLACK_S = 0.01
"""A gap may be longer than the promise by the host's time and the error of a prediction."""


class FixedBudget:
    """Up to `max_tokens` tokens in every step, whatever they cost."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def budget(self, decodes: StepShape, max_tokens: int) -> PrefillBudget:
        return PrefillBudget(max(1, min(max_tokens, self._max_tokens - decodes.num_decodes)))

    def launched(self, shape: StepShape) -> float:
        return 0.0

    def finished(self, shape: StepShape, predicted_s: float, seconds: float) -> None:
        pass


def loads(device: StepTimes) -> dict[str, Callable[[], list[Arrival]]]:
    """Returns the loads of a device by name."""
    rate = device.rate
    return {
        "poisson, a quarter": lambda: arrivals.poisson(rate / 4, 150),
        "poisson, half": lambda: arrivals.poisson(rate / 2, 200),
        "poisson": lambda: arrivals.poisson(rate, 300),
        "poisson, too many": lambda: arrivals.poisson(rate * 1.5, 300),
        "bursts": lambda: arrivals.bursts(rate / 2, 192),
        "conversations": lambda: arrivals.conversations(64 if device.is_gpu else 16),
        "a long prompt": arrivals.long_beside_streams,
        "short behind long": lambda: arrivals.short_behind_long(rate),
        "a batch job": lambda: arrivals.batch_beside_chat(rate),
    }


def measure(device: StepTimes, policy: Policy, load: list[Arrival]) -> dict[str, float]:
    """Runs `load` after the warm-up prompts of a start."""
    config = EngineConfig(
        max_model_len=32_768,
        max_num_seqs=128,
        max_waiting=1 << 20,
        block_size=16,
        num_blocks=60_000,
        max_num_batched_tokens=device.max_num_batched_tokens,
        eos_token_ids=frozenset(),
    )
    engine = SimulatedEngine(config, device.seconds, policy, can_overlap_steps=device.is_gpu)
    for num_tokens in prompt_sizes(config):
        engine.run([Arrival(engine.clock(), num_tokens, 3)])
    began = engine.clock()
    for arrival in load:
        arrival.at += began
    return figures(engine.run(load), engine.clock() - began)


def figures(ended: list[Arrival], seconds: float) -> dict[str, float]:
    """Returns the seconds, and tokens per second."""
    first = sorted(arrival.first_token_s for arrival in ended)
    answers = sorted(arrival.answer_s for arrival in ended)
    gaps = sorted(gap for arrival in ended for gap in arrival.gaps_s)
    return {
        "tokens_per_s": round(sum(len(arrival.token_times) for arrival in ended) / seconds, 1),
        **{
            f"{name}_{quantile}": round(values[int(len(values) * share)], 4)
            for name, values in (("first_token", first), ("answer", answers))
            for quantile, share in (("p50", 0.5), ("p99", 0.99))
        },
        "gap_p99": round(gaps[int(len(gaps) * 0.99)], 4),
        "gap_max": round(gaps[-1], 4),
    }


def beside(ours: dict[str, float], fixed: list[dict[str, float]], stall_s: float) -> dict[str, Any]:
    """Returns our numbers divided by those of the best fixed budget that meets the stall limit."""
    keeping = [figures for figures in fixed if figures["gap_max"] <= stall_s + SLACK_S]
    if not keeping:
        return {}
    ratios = {"tokens_per_s": ours["tokens_per_s"] / max(f["tokens_per_s"] for f in keeping)}
    for name in ("first_token_p50", "first_token_p99", "answer_p50", "answer_p99"):
        ratios[name] = ours[name] / min(f[name] for f in keeping)
    return {name: round(ratio, 2) for name, ratio in ratios.items()}


def run(device: StepTimes, stall_s: float, share: float) -> dict[str, Any]:
    """Returns every load of one device with every policy."""
    results: dict[str, Any] = {}
    for name, load in loads(device).items():
        largest = device.max_num_batched_tokens
        fixed = {str(n): measure(device, FixedBudget(n), load()) for n in FIXED if n <= largest}
        policy = PrefillPolicy(largest, stall_s, share, device.few_tokens)
        ours = measure(device, policy, load())
        ratios = beside(ours, list(fixed.values()), stall_s)
        results[name] = {"policy": ours, "fixed": fixed, "beside": ratios}
        told = "  ".join(f"{key} {value:.2f}" for key, value in ratios.items())
        say(f"  {name:18s} longest gap {ours['gap_max']:.3f} s  {told}")
    return results


def main() -> None:
    """Runs the command."""
    parser = new_parser(__doc__)
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--max-stall-s", type=float, default=0.35)
    parser.add_argument("--prefill-share", type=float, default=0.8)
    options = parser.parse_args()
    results = {}
    for name in options.devices:
        say(f"{name}: {DEVICES[name].source}")
        results[name] = run(DEVICES[name], options.max_stall_s, options.prefill_share)
    tables = {name: DEVICES[name]._asdict() for name in options.devices}
    promise = {"max_stall_s": options.max_stall_s, "prefill_share": options.prefill_share}
    publish("schedule", {**promise, "step_times_ms": tables, "results": results}, options.save)


if __name__ == "__main__":
    main()
