"""Settings from the Serve YAML and from environment variables.

Read `settings.py` first: the model that holds them all. Then

    sections.py       the fields, with their units and defaults; api_settings.py has those of the
                      API, section.py the base class of all sections
    environment.py    the variables of vLLM and RunPod that set some of them
    unused_names.py   the variables of RunPod's vLLM worker that have no effect
    sources.py        the variable that sets a setting, for error messages
    serve_config.py   reads the YAML; named.py finds the one of a name, such as "local"
    log_format.py     log lines as text or JSON
    key_file.py       the file of API keys
"""
