"""Kernels of a decode step with 4-bit weights on a GPU, in CUDA, compiled when the model is loaded.

Read `cuda_step.py` first: eight launches a layer. `products.py` launches the four products, and
`step_kernels.py` the rest: `add_norm.cu` with `routing.cuh`, `rope.cu`, and `attention.cu` with
`splits.cuh`. `tiles.py` is the order of weights in memory; `few_tokens.cu` and `more_tokens.cu` are
the products, `unpack.cu` dequantizes for prompts; they share `tiles.cuh`. `intrinsics.cuh` has the
GPU's instructions, and the rule for kernels that start before the last one has ended. `variants.py`
says which product is compiled how for a card, and that the host chooses a kernel and the device a
loop for each expert. `sampling.py` launches `sample.cu`, made of `logits.cuh`, `noise.cuh`,
`found.cuh` and `threshold.cuh`. `compiler.py` compiles a kernel and keeps the result in a
cache, which `fill_cache.py` fills without a GPU, `launcher.py` starts it. `prompt_passes.py` has
the same products for steps of few prompt tokens, and computes up to how many. Importing these
modules needs no GPU and no CUDA library.

The kernels have run on no GPU yet: tests compile them for every supported card and run the sources
on the host. Prototypes with the same layout and inner loops ran on an H200.
"""
