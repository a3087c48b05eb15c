"""The work of a replica's constructor: turns a `StartPlan` into a running engine.

Read `load.py` first. `phases.py` defines the phases of a load and their events, `load_log.py`
records them, `device.py` prepares the device, and `warm_up.py` runs the first prompts.
"""
