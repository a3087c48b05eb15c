"""One program for each client of `benchmarks.compat`, run in that client's own environment."""
