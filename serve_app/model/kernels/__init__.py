"""The model's arithmetic in forms that are faster than plain torch on one kind of device.

Read `cpu/cpu_step.py` for a CPU and `triton/gpu_step.py` for a GPU: each is a whole step behind one
class, which compares itself with plain torch on the device before it is used. `kernel_check.py`
compares single 4-bit products and attention with float32. `cuda/` has products with 4-bit weights
for a GPU, for which the memory is the limit.
"""
