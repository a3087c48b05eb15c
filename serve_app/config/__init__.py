"""Settings, from the Serve YAML and the environment. Read `settings.py` first."""
