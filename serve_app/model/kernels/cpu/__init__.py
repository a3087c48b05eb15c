"""The step of a float32 model on a CPU, written in C.

Read `cpu_step.py` first, then `_cpu_step.c`. `step_threads.py` chooses the number of threads.
"""
