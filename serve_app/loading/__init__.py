"""The work of a replica's constructor: turns a `StartPlan` into a running engine.

Read `load.py` first. `phases.py` defines the phases of a load and their events, `load_log.py`
records them, `device.py` prepares the device, `generation.py` reads the stop tokens and the
sampling defaults, `start_engine.py` creates the KV cache and the engine, and `warm_up.py` runs the
first prompts.
"""
