"""The network: loads Mixtral from a checkpoint and computes logits.

Read `mixtral.py` first, the forward pass. Then, in the order of calls:

    config.py          the sizes, from config.json
    batch.py, kv.py    the inputs of a forward pass: tokens of several sequences, the KV cache
    attention.py       attention over the cache in plain torch
    experts.py         routing tokens to experts, with float weights
    linear.py          linear layers, with float or 4-bit weights
    row_padding.py     makes the bits of a row independent of the other rows, on a CPU
    quantization.py    the constants of 4-bit weights; quantize.py computes them,
                       quantized_weight.py stores them, quantized_experts.py computes the experts
    footprint.py       the bytes of a model, computed from its sizes
    checkpoint/        finding, inspecting, loading and converting checkpoints
    kernels/           faster implementations for CPUs and GPUs
"""
