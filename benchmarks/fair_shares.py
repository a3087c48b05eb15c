"""Ten polite keys beside a greedy one, on simulated devices: how much longer do they wait?

    python -m benchmarks.fair_shares --save benchmarks/results/fair-shares.json

The engine is the product's; only the device is simulated, with step times that were measured
(`step_times.py`). Each polite key sends twelve requests of 64 tokens, one after the other; the
greedy key sends 300 requests at once. `ratio` divides the times of polite answers by those without
the greedy key. `tokens_per_s` counts the tokens of all keys until the last request has ended.
"""

from typing import Any

import numpy as np

from benchmarks.report import new_parser, publish, say
from benchmarks.step_times import DEVICES, StepTimes
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.prefill_policy import PrefillPolicy
from serve_app.loading.warm_up import prompt_sizes
from tools.simulated_engine import Arrival, SimulatedEngine

PLACES = (32, 128)
GREEDY_TOKENS = (32, 200, 1000)
NUM_POLITE, NUM_TURNS, POLITE_TOKENS, NUM_GREEDY = 10, 12, 64, 300
PROMPT = 20


def polite(number: int) -> Arrival:
    """Returns the first request of a polite key. The next one comes 20 ms after its answer."""
    later = None
    for _ in range(NUM_TURNS):
        later = Arrival(0.02, PROMPT, POLITE_TOKENS, then=later, group=f"polite {number}")
    assert later is not None
    later.at = 1 + 0.03 * number
    return later


def measure(device: StepTimes, places: int, greedy: list[Arrival]) -> dict[str, Any]:
    """Runs the polite keys beside `greedy`, after the warm-up prompts of a start."""
    largest = device.max_num_batched_tokens
    config = EngineConfig(16_384, places, 1 << 20, 16, 40_000, largest, frozenset())
    policy = PrefillPolicy(largest, 0.35, 0.8, device.few_tokens)
    engine = SimulatedEngine(config, device.seconds, policy, can_overlap_steps=device.is_gpu)
    for num_tokens in prompt_sizes(config):
        engine.run([Arrival(engine.clock(), num_tokens, 3)])
    began = engine.clock()
    load = [*greedy, *map(polite, range(NUM_POLITE))]
    for arrival in load:
        arrival.at += began
    ended = engine.run(load)
    answers = [each for each in ended if each.group != "greedy"]
    pauses = [max(each.gaps_s) for each in ended if each.group == "greedy"]
    num_tokens = sum(len(each.token_times) for each in ended)
    return {
        "answer_s": percentiles([each.answer_s for each in answers]),
        "first_token_s": percentiles([each.first_token_s for each in answers]),
        "tokens_per_s": round(num_tokens / (engine.clock() - began), 1),
        "greedy_longest_gap_s": percentiles(pauses) if pauses else None,
        "preemptions": engine.core.scheduler.num_preemptions,
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns p50 and p99."""
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def main() -> None:
    """Runs the command."""
    parser = new_parser(__doc__)
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=["h200", "h200, wanted"])
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in options.devices:
        for places in PLACES:
            found = results[f"{name}, {places} places"] = {
                "alone": measure(DEVICES[name], places, [])
            }
            alone = found["alone"]["answer_s"]
            for tokens in GREEDY_TOKENS:
                greedy = [Arrival(0, PROMPT, tokens, group="greedy") for _ in range(NUM_GREEDY)]
                beside = measure(DEVICES[name], places, greedy)
                answer = beside["answer_s"]
                beside["ratio"] = {each: round(answer[each] / alone[each], 2) for each in alone}
                found[f"greedy answers of {tokens}"] = beside
                say(f"{name}, {places} places, greedy answers of {tokens} tokens: {beside}")
    publish("fair_shares", {"results": results}, options.save)


if __name__ == "__main__":
    main()
