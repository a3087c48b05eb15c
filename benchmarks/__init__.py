"""Measurements. The last line of each script is one JSON document; `results/` has some."""
