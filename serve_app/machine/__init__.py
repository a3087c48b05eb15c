"""What this machine has: GPUs and their driver, memory and its limits, volumes, processes.

`gpus.py` asks NVML, `host.py` asks psutil and the container's cgroup, `volume.py` reads
the kernel's mount table, `processes.py` finds and ends processes with psutil. No module here
imports torch or takes a CUDA context.
"""
