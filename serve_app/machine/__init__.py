"""Queries this machine: GPUs and their driver, memory and its limits, volumes, processes, ports.

`gpus.py` queries NVML, `host.py` psutil and the container's cgroup, `volume.py` the kernel's mount
table. `processes.py` finds and kills processes with psutil, `ports.py` opens TCP ports, and
`own_folder.py` creates folders that do not outlive their process for long. This package imports no
torch and creates no CUDA context.
"""
