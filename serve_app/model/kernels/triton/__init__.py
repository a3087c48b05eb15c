"""A model's steps on a GPU, in Triton: one that decodes, and one with prompt tokens.

Read `gpu_step.py` first: it launches the decode step, with the products of `step_products.py`;
`step_trial.py` compares it with plain torch. `nf4_decode.py` launches products with 4-bit weights,
whose kernels are in `nf4_kernels.py`, with what they share in `nf4_sums.py` and
`nf4_ptx.py`; `nf4_unpack.py` dequantizes for prompts; `paged_attention.py` and `step_kernels.py` do
the rest of a layer. `prompt_step.py` launches the step with prompt tokens, with the attention of
`prompt_attention.py`, whose programs `chunk_tiles.py` lists, and the products of
`prompt_products.py`: `prompt_routing.py` orders tokens by expert, `unpack_ahead.py` dequantizes
ahead of the products of `grouped_product.py`.
"""
