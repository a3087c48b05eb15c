"""Faster implementations of the model's arithmetic for CPUs and GPUs.

Read `cpu/cpu_step.py` for a CPU and `triton/gpu_step.py` for a GPU. Each is a class that computes a
whole step, and is compared with plain torch on the device before it is used. `kernel_check.py`
compares single 4-bit products and attention with float32, `attention_check.py` the latter.
`decode_batch.py` has the inputs of a decode step, `unavailable.py` the reason why a step cannot be
used. `cuda/` computes the layers of a decode step with 4-bit weights; `triton/gpu_step.py` uses it.
"""
