"""Faster implementations of the model's arithmetic for CPUs and GPUs.

Read `cpu/cpu_step.py` for a CPU and `triton/gpu_step.py` for a GPU. Each is a class that computes a
whole step, and is compared with plain torch on the device before it is used. `kernel_check.py`
compares single 4-bit products and attention with float32. `cuda/` has products with 4-bit weights
for steps that are limited by the GPU's memory bandwidth.
"""
