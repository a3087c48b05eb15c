"""The work of a replica's constructor: everything between a `StartPlan` and an engine that answers.

Read `load.py` first. `phases.py` defines the phases of a load and their events, `load_log.py`
records them, `device.py` prepares the device, `warm_up.py` runs the first prompts.
"""
