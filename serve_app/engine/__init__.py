"""Continuous batching: token ids in, token ids out.

Read `engine.py` first, then `core.py`, the loop of the engine's thread. A request and its tokens
pass these files in order:

1. `engine.py`: `Engine.generate` checks the request (`admission.py`) and makes a `Sequence`.
2. `request_queue.py` brings it to the engine's thread, where `core.py` takes it.
3. `scheduler.py` chooses the tokens of the next step (`scheduled_tokens.py`) and takes KV blocks
   for them (`block_manager.py`). Answers to one prompt wait for the first (`shared_prompt.py`).
   `prefill_policy.py` limits prompts beside running streams, by the times of steps that
   `step_cost.py` predicts.
4. `model_runner.py` launches the step: block tables, forward pass (`decode_graphs.py` on a GPU),
   `sampler.py` with its parts `sampling_metadata.py`, `penalties.py`, `top_filter.py`, `noise.py`.
   On a GPU `device_sampler.py` does the same in one launch, which the graphs contain, with the
   parameters of `sampling_rows.py`; `sampler_trial.py` compares the two before it is used.
   `prompt_scores.py` takes the log probabilities of prompts that are scored.
5. `in_flight_tokens.py` brings the sampled tokens to the host, where `core.py` collects them.
6. `output_queue.py` sends them to the event loop of the request, into its `stream.py`, from which
   `Engine.generate` yields each `Delta`.

The package imports torch, numpy and `serve_app.model`, so it runs without the rest of the server.
"""
