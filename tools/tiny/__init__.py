"""`python -m tools.tiny.train` makes the tiny model's checkpoint from nothing."""
