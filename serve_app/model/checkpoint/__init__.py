"""Checkpoints: found, inspected, read into a model, converted. Read `checkpoint.py` first."""
