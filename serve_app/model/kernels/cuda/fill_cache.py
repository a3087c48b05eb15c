"""Compiles all kernels of a model for any GPUs, without a GPU, for the build of an image.

A kernel depends on the model's sizes and on the card's compute capability, not on the checkpoint.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.cuda.compiler import Compiler
from serve_app.model.kernels.cuda.launchable import Launchable
from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.sampling import MAX_VOCAB, SampleKernel
from serve_app.model.kernels.cuda.step_kernels import StepKernels, config_problem
from serve_app.model.kernels.cuda.use_kernels import OLDEST, products_of
from serve_app.model.kernels.cuda.variants import CAPABILITIES, Card
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.quantization import NUM_CODES

MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}
"""The fields of config.json that the kernels depend on. The other fields may have any value."""


class _Compiled:
    """A kernel that is only compiled; there is no device to launch it on."""

    def launch(self, *arguments: object, blocks: int | None = None) -> None:
        raise AssertionError("this kernel is only compiled")


def fill_cache(
    config: MixtralConfig,
    cache: Path,
    capabilities: Sequence[int],
    progress: Callable[[int, str], None],
) -> None:
    """Compiles the kernels that `use_cuda_kernels` needs into the folder `cache`.

    Existing files are kept. `capabilities` are compute capabilities such as 90 for 9.0; an empty
    list means all that NVRTC and our kernels support. Calls `progress` with the capability and the
    name of each compiled kernel. Raises `StepUnavailable` if NVRTC is missing or does not support a
    capability, and `OSError` if the folder cannot be written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    supported = Compiler(OLDEST).capabilities()
    for capability in capabilities or [
        capability for capability in CAPABILITIES if capability in supported
    ]:
        if capability not in supported or capability < OLDEST:
            raise StepUnavailable(f"compute capability {capability / 10:.1f} is not supported")
        compiler, card = Compiler(capability, cache), Card(capability, 1)

        def make(
            name: str,
            macros: Sequence[str],
            grid: Grid,
            compiler: Compiler = compiler,
            capability: int = capability,
        ) -> Launchable:
            cubin = compiler.cubin(name, macros)
            path = cache / compiler.file_name(name, macros)
            if not path.exists():  # the compiler ignores an OSError; this write raises it
                path.write_bytes(cubin)
            progress(capability, name)
            return _Compiled()

        products_of(config, card, torch.zeros(NUM_CODES), make)
        if config_problem(config) is None:
            StepKernels(config, card, make)
        if config.vocab_size <= MAX_VOCAB:
            SampleKernel(config.vocab_size, 1, card, torch.device("cpu"), make)
