"""This machine: its GPUs, its memory limits, its processes. None of these modules imports torch."""
