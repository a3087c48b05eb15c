"""Measurements: each script's last line is one JSON document; `results/` keeps them."""
