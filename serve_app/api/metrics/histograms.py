"""The histograms of `/metrics`: name, help and buckets of each.

Buckets reach from the tiny model on a CPU to Mixtral behind a long queue. They are narrowest around
usual service levels: a first token after 0.1 to 2.5 s, then a token every 10 to 100 ms.
"""

FIRST_TOKEN = (
    "time_to_first_token_seconds",
    "Time from a request's arrival to its first token.",
    (
        *(0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75),
        *(1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
    ),
)
INTER_TOKEN = (
    "inter_token_latency_seconds",
    "Time between two tokens of an answer, measured where they leave the engine.",
    (
        *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
        *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
    ),
)
QUEUE = (
    "request_queue_time_seconds",
    "Time in the engine's queue before the first step, of requests that got a token.",
    (
        *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
        *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
    ),
)
WHOLE = (
    "e2e_request_latency_seconds",
    "Time from a request's arrival to the end of a complete answer.",
    (
        *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0),
        *(10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    ),
)
LOOP_LAG = (
    "event_loop_lag_seconds",
    "Delay of callbacks on the event loop, measured ten times a second.",
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
TOKENS = tuple(2.0**n for n in range(16))
PROMPT_TOKENS = (
    "request_prompt_tokens",
    "Tokens of prompts whose answers are complete.",
    TOKENS,
)
GENERATION_TOKENS = (
    "request_generation_tokens",
    "Tokens of complete answers.",
    TOKENS,
)
