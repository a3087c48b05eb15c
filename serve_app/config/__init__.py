"""Settings from the Serve YAML and from environment variables.

Read `settings.py` first: the model that holds them all. `sections.py` has the fields with their
units and defaults, `environment.py` the variable names of vLLM and RunPod that set some of them,
`unused_names.py` those that change nothing, `serve_config.py` the reader of the YAML.
"""
