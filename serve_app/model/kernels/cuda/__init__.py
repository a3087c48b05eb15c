"""Products with 4-bit weights on a GPU, in CUDA, compiled when the model is loaded.

Read `products.py` first: it launches everything else. `tiles.py` is the order of weights in
memory; `few_tokens.cu` and `more_tokens.cu` are the products, `unpack.cu` dequantizes for
prompts; they share `tiles.cuh`, and `intrinsics.cuh` has the GPU's instructions. `variants.py` says
which kernel is compiled how for a card, `compiler.py` compiles it and keeps the result in a cache,
`launcher.py` starts it. Importing these modules needs no GPU and no CUDA library.

The kernels have run on no GPU yet: tests compile them for every supported card and run the sources
on the host. Prototypes with the same layout and inner loops ran on an H200.
"""
