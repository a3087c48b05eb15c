"""The decode step of a model on a GPU, in Triton.

Read `gpu_step.py` first: it launches everything else. `nf4_decode.py` launches products with 4-bit
weights, whose kernels are in `nf4_kernels.py`, with what they share in `nf4_sums.py` and
`nf4_ptx.py`; `nf4_unpack.py` dequantizes for prompts; `paged_attention.py` and `step_kernels.py` do
the rest of a layer.
"""
