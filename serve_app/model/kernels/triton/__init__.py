"""The steps on a GPU in Triton: the decode step, and the step with prompt tokens.

Read `gpu_step.py` first, the decode step. It uses

    step_products.py     a layer's products; nf4_decode.py launches products with 4-bit weights,
                         whose kernels are in nf4_kernels.py, nf4_sums.py and nf4_ptx.py
    paged_attention.py   attention
    step_kernels.py      norms, rotary embedding, routing to experts
    step_trial.py        compares the step with plain torch before it is used

Then `prompt_step.py`, the step with prompt tokens. It uses

    prompt_products.py   a layer's products; prompt_routing.py orders tokens by expert,
                         unpack_ahead.py and nf4_unpack.py dequantize the weights, and
                         grouped_product.py multiplies by them
    prompt_attention.py  attention; chunk_tiles.py divides it among programs
"""
