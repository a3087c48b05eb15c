"""Faster implementations of the model's arithmetic for CPUs and GPUs.

Read `cpu/cpu_step.py` for a CPU and `triton/gpu_step.py` for a GPU. Each has a class that computes
a whole step, and is compared with plain torch on the device before it is used. The server uses the
first line of a list below that agrees. `/health` says why if it is not the first line.

    CPU, float32 weights    CpuStep        decodes and prefill chunks in one call of C

    GPU, decodes            CudaStep       4-bit weights: 8 CUDA kernels a layer
                            GpuStep        4-bit products in CUDA (LayerProducts), rest in Triton
                            GpuStep        all in Triton (QuantizedProducts; floats: FloatProducts)

    GPU, prefill chunks     PromptStep with these products:
                            PassedProducts    up to a few hundred tokens: the decode step's products
                            UnpackedProducts  more tokens: dequantizes, then grouped products
                            TorchProducts     float weights

    all                     Mixtral        plain torch

`kernel_check.py` compares single 4-bit products and attention with float32; `attention_check.py` is
its part for attention. `decode_batch.py` has the inputs of a decode step, and `unavailable.py` the
exception that says why a step cannot be used. `cuda/` computes the layers of a decode step with
4-bit weights for `triton/gpu_step.py`.
"""
