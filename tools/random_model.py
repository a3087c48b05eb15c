"""A Mixtral of random weights, made on the device: no download and no float copy.

4-bit weights are random bytes, with absmax values like a trained model's; 25 GB of them take
seconds on a GPU. Steps cost what Mixtral's cost, except that the router chooses all experts alike.
"""

import torch

from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.cuda.fill_cache import MIXTRAL_8X7B
from serve_app.model.mixtral import Mixtral, RMSNorm, Rope
from serve_app.model.quantization import Quantization
from serve_app.model.quantize import code_values
from serve_app.model.quantized_weight import Codebook, QuantizedWeight

SCALE = 0.02
"""Standard deviation of the weights, about that of Mixtral's."""
MEAN_ABSMAX = 2 * SCALE
"""The mean of absmax: a uniformly random code has half the absolute value of its absmax."""
MIXTRAL = {**MIXTRAL_8X7B, "rope_theta": 1e6}
TINY = {
    **MIXTRAL,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}
"""The sizes for a quick functional check."""


def config_of(*, tiny: bool, layers: int | None) -> MixtralConfig:
    """Returns Mixtral 8x7B's sizes, or tiny ones. `layers` replaces the number of layers if it is
    given."""
    document = dict(TINY if tiny else MIXTRAL)
    if layers is not None:
        document["num_hidden_layers"] = layers
    return MixtralConfig.from_dict(document)


def random_model(
    config: MixtralConfig,
    quantization: Quantization | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantize_lm_head: bool = False,
) -> Mixtral:
    """Returns a model with random weights, generated on `device` in the form in which they are
    stored."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Mixtral(config, quantization, quantize_lm_head=quantize_lm_head).to(dtype)
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.normal_(std=SCALE)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1)
        elif isinstance(module, Rope):
            module.fill()
        elif isinstance(module, Codebook):
            fill_codebook(module)
        elif isinstance(module, QuantizedWeight):
            fill_matrices(module)
    return model


def fill_codebook(tables: Codebook) -> None:
    """Fills the code values."""
    tables.code.copy_(code_values(tables.quant_type))


def fill_matrices(matrices: QuantizedWeight) -> None:
    """Fills packed codes at random, and absmax with values like a trained model's."""
    # Whole words at a time, which is eight times as fast as bytes; 63 bits of each are random.
    matrices.packed.view(torch.int64).random_()
    matrices.absmax.uniform_(0.75 * MEAN_ABSMAX, 1.25 * MEAN_ABSMAX)
