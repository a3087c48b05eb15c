"""Kernels of a decode step with 4-bit weights on a GPU, in CUDA, compiled when the model is loaded.

Read `cuda_step.py` first, the eight launches of a layer. Then, in the order of calls:

    products.py       the four products of a layer: few_tokens.cu and more_tokens.cu; unpack.cu
                      dequantizes for prompts; all three include tiles.cuh. layer_products.py
                      adapts the products to the decode step of Triton kernels
    step_kernels.py   the other launches: add_norm.cu (with routing.cuh), rope.cu, and
                      attention.cu (with splits.cuh)
    sampling.py       sample.cu, which includes logits.cuh, noise.cuh, found.cuh, threshold.cuh
    tiles.py          the order of 4-bit weights in memory
    variants.py       the choice of a product's kernel, and its compile-time sizes for a card
    compiler.py       compiles a kernel and keeps the result in a cache, which fill_cache.py can
                      fill without a GPU
    launcher.py       loads a compiled kernel and launches it; launchable.py is the interface
    use_kernels.py    compares the products with plain torch before they are used
    prompt_passes.py  the same products for steps with few prompt tokens

`intrinsics.cuh` has the GPU's instructions, and the rule for kernels that start before the previous
kernel has ended. Importing these modules needs no GPU and no CUDA library.

The kernels have run on an H200. For other cards, tests compile them, and run the sources on the
host.
"""
