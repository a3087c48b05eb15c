"""Continuous batching: token ids in, token ids out.

Read `engine.py` first, then `core.py`, the loop of the engine's thread. A request and its tokens
pass these files in order:

1. `engine.py`: `Engine.generate` checks the request (`admission.py`) and makes a `Sequence`.
2. `request_queue.py` passes it to the engine's thread, which runs the loop in `core.py`.
3. `scheduler.py` chooses the tokens of the next step (`scheduled_tokens.py`) and allocates KV
   blocks for them (`block_manager.py`). `waiting_sequences.py` defines the order in which prompts
   are computed, and `running_shares.py` shares the places of running sequences between groups. If
   several sequences have the same prompt, only the first one computes it (`SharedPrompt`).
   `prefill_policy.py` limits the prompt tokens of a step while streams are running, with step times
   that `step_cost.py` predicts.
4. `model_runner.py` launches the step: block tables, forward pass (`decode_graphs.py` on a GPU),
   `sampler.py` with its parts `sampling_metadata.py`, `penalties.py`, `top_filter.py`, `noise.py`.
   On a GPU `device_sampler.py` samples the same tokens in one kernel launch, which the graphs
   contain. `sampling_rows.py` writes the parameters of that kernel; `sampler_trial.py` compares it
   with `sampler.py` before its first use. `prompt_scores.py` computes the log probabilities of
   prompt tokens.
5. `in_flight_tokens.py` copies the sampled tokens to the host, where `core.py` collects them.
   `live_sequences.py` appends them to their sequences, and ends complete or failed ones.
6. `output_queue.py` sends them to the event loop of the request, into its `stream.py`, from which
   `Engine.generate` yields each `Delta`.

The other modules, by subject:

    data        sequence, sampling_params, scheduling_class, engine_config, delta, runner (the
                interface of model_runner)
    requests    retry_after (for refused requests), watchdog (for a step that hangs)
    a step      block_tables, step_sizes (for the memory plan), step_timer, transfer (copies to and
                from the device)
    grammars    constraint (the interface to a grammar library), token_mask
    one text    text_logits, without the engine's loop

The package imports torch, numpy and `serve_app.model`, so it runs without the rest of the server.
"""
