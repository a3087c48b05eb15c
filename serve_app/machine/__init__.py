"""Queries this machine: GPUs and their driver, memory and its limits, volumes, processes.

`gpus.py` queries NVML, `host.py` psutil and the container's cgroup, `volume.py` the kernel's mount
table; `processes.py` finds and kills processes with psutil. This package imports no torch and
creates no CUDA context.
"""
