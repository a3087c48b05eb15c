"""The decode step on a GPU, in Triton. Read `gpu_step.py` first."""
