"""The network: Mixtral from a checkpoint on disk to logits, with torch and nothing of a server.

Read `mixtral.py` first: the forward pass, 200 lines. Then, as they are called:

    config.py             the sizes, from config.json
    batch.py, kv.py       what a forward pass reads: tokens of several sequences, the KV cache
    attention.py          attention over the cache in plain torch
    experts.py            routing tokens to experts, weights as floats
    linear.py             linear layers, floats or 4 bits
    quantization.py       the facts of 4-bit weights; quantize.py the arithmetic,
                          quantized_weight.py the buffers, quantized_experts.py the experts
    footprint.py          bytes of a model, from its sizes alone
    checkpoint/           finding, inspecting, loading and converting checkpoints
    kernels/              the same arithmetic, faster on one kind of device
"""
