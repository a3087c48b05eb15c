# mypy: disable-error-code="no-untyped-call"
"""A GPU's step of prompts, its Triton kernels run by the interpreter, beside plain torch."""

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from serve_app.model.batch import Batch
from serve_app.model.footprint import kernel_step_bytes, trial_bytes, workspace_bytes
from serve_app.model.kernels.cuda import prompt_passes
from serve_app.model.kernels.cuda.launcher import DriverError, Grid
from serve_app.model.kernels.cuda.prompt_passes import (
    CardSpeed,
    PassedProducts,
    max_tokens,
    speed_of,
)
from serve_app.model.kernels.cuda.use_kernels import products_of
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.kernels.triton import grouped_product, prompt_step
from serve_app.model.kernels.triton.chunk_tiles import items_of
from serve_app.model.kernels.triton.grouped_product import TileShape
from serve_app.model.kernels.triton.prompt_attention import PromptAttention
from serve_app.model.kernels.triton.prompt_products import (
    PromptProducts,
    TorchProducts,
    UnpackedProducts,
)
from serve_app.model.kernels.triton.prompt_step import TRIAL_CHUNKS, PromptStep
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.kv import KVCache
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantization import Quantization
from tests.model.kernels.held import Held
from tests.model.kernels.test_gpu_step import CASES, cache_of, model_of
from tools.random_model import config_of


@pytest.fixture(autouse=True)
def _short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens in the trial: the interpreter takes a second for what a GPU does in 1 ms."""
    monkeypatch.setattr(prompt_step, "TRIAL_CHUNKS", ((5, 20), (1, 1), (300, 900)))
    monkeypatch.setattr(grouped_product, "NARROW", TileShape(16, 64, 64, num_stages=1))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # for the device "meta"


@pytest.mark.parametrize(("quantization", "shape"), CASES.values(), ids=CASES)
def test_it_gives_the_models_logits(
    quantization: Quantization | None, shape: dict[str, Any]
) -> None:
    """Chunks of several sequences: logits equal plain torch's to float32's rounding, with products
    in torch and, for weights in 4 bits, in kernels."""
    torch.manual_seed(1)
    model = model_of(quantization, torch.float32, **shape)
    step = PromptStep(model, cache_of(model))
    forms: list[PromptProducts] = [TorchProducts(model)]
    if quantization is not None:
        forms.append(UnpackedProducts(model, 3))
    for form in forms:
        assert step._error(form) < 1e-5


def refusal(model: Any) -> str:
    with pytest.raises(StepUnavailable) as caught:
        PromptStep.verified(model, cache_of(model), 2)
    return str(caught.value)


def test_in_16_bits_it_is_used_when_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that computes something else, or raises, is refused with a reason; products that do
    are left to torch."""
    monkeypatch.setattr(prompt_step, "TRIAL_LAYERS", 1)
    torch.manual_seed(1)
    model = model_of(Quantization("nf4", "bfloat16"), torch.float16)
    step = PromptStep.verified(model, cache_of(model), 8)
    assert isinstance(step._products, UnpackedProducts)
    assert "products in kernels, with the weights of 8 experts as floats" in step.note
    mlp = UnpackedProducts.mlp
    monkeypatch.setattr(UnpackedProducts, "mlp", lambda self, i, x: mlp(self, i, x) * -1)
    step = PromptStep.verified(model, cache_of(model), 8)
    assert isinstance(step._products, TorchProducts)
    assert "products in torch: the kernels differ from plain torch by" in step.note
    logits = PromptStep._logits
    for wrong in (1.1, float("nan")):
        monkeypatch.setattr(
            PromptStep, "_logits", lambda self, rows, form, w=wrong: logits(self, rows, form) * w
        )
        assert "differ from plain torch" in refusal(model)
    monkeypatch.setattr(PromptStep, "_logits", lambda self, rows, form: rows.nothing)
    assert "failed in their trial (AttributeError" in refusal(model)


class Launches(TorchDispatchMode):
    """Names of what a GPU would be given to do: operators of torch that compute, and kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.overloadpacket not in NO_LAUNCH:
            self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


NO_LAUNCH = {torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like}
NO_LAUNCH |= {torch.ops.aten._unsafe_view, torch.ops.aten.detach}


StepOf = Callable[[Mixtral, KVCache], PromptStep]


class Recorded:
    """A CUDA kernel in whose place its name is recorded."""

    names: ClassVar[list[str]] = []

    def __init__(self, name: str, macros: Sequence[str], grid: Grid) -> None:
        self._name = name

    def launch(self, *arguments: Any, blocks: int | None = None) -> None:
        self.names.append(self._name)


def without_values(layers: int) -> Mixtral:
    """Returns a model of Mixtral's sizes on the device "meta", whose CUDA kernels are recorded."""
    with torch.device("meta"):
        config = config_of(tiny=False, layers=layers)
        model = Mixtral(config, Quantization("nf4", "bfloat16")).to(torch.bfloat16)
    model.products = products_of(config, Card(90, 132), torch.zeros(16), Recorded)
    return model


def launches_of(
    model: Any, step_of: Any, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> list[str]:
    """Returns what a step of `tokens` prompt tokens launches, all of it on the device "meta".

    A tensor there has no values, so that whatever needs one on the host raises.
    """
    with Launches() as launches:
        monkeypatch.setattr(
            GridExecutor,
            "__call__",
            lambda self, *args, **kwargs: launches.names.append(self.fn.__name__),
        )
        cache = KVCache.allocate(model.config, 4, 16, torch.bfloat16, torch.device("meta"))
        numbers = torch.zeros(tokens, dtype=torch.int64, device="meta")
        tables = numbers[: 3 * 4].view(3, 4)
        lens = [tokens - 8, 7, 1]
        batch = Batch(numbers, numbers, numbers, lens, [900, 7, 16], tables, numbers[:3])
        step = step_of(model, cache)
        launches.names.clear()
        Recorded.names.clear()
        step.logits(batch)
    return [*launches.names, *Recorded.names]


@pytest.mark.parametrize(
    ("experts_at_once", "expected"),
    [
        (8, {"unpack": 4, "_grouped_product": 2, "aten.linear": 3}),
        (2, {"unpack": 10, "_grouped_product": 8, "aten.linear": 3}),
        (0, {"more_tokens": 4, "aten.linear": 1}),
    ],
    ids=["many tokens", "many tokens on a small GPU", "few tokens"],
)
def test_it_never_waits_for_the_device(
    experts_at_once: int, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At Mixtral's sizes a layer is 14 launches with many tokens, 26 where experts are dequantized
    in pairs, and 10 with few tokens; no operator needs a value on the host."""
    launched = []
    for layers in (1, 2):
        model = without_values(layers)

        def step_of(model: Mixtral, cache: KVCache) -> PromptStep:
            step = PromptStep(model, cache)
            assert model.products is not None
            if experts_at_once:
                step._products = UnpackedProducts(model, experts_at_once)
            else:
                step._products = PassedProducts(model, model.products)
            return step

        launched.append(Counter(launches_of(model, step_of, monkeypatch, 512)))
    layer = launched[1] - launched[0]
    others = ("_attend_chunks", "_route_prompts", "_rope_write", "_add_norm", "_add_norm")
    assert layer == Counter(expected) + Counter(others)


@pytest.mark.parametrize("experts_at_once", [2, 8])
def test_it_takes_the_memory_that_is_planned(
    experts_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At Mixtral's sizes, a step of 2,048 tokens holds what `kernel_step_bytes` says to 2 %."""
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: None)
    model, meta = without_values(2), torch.device("meta")
    step = PromptStep(model, KVCache.allocate(model.config, 4, 16, torch.bfloat16, meta))
    numbers = torch.zeros(2048, dtype=torch.int64, device="meta")
    tables = numbers[:4].view(1, 4)
    batch = Batch(numbers, numbers, numbers, [2048], [2048], tables, numbers[:1])
    with Held() as held:
        step._products = UnpackedProducts(model, experts_at_once)
        step.logits(batch)
    planned = kernel_step_bytes(model.config, 2, experts_at_once).of(2048)
    assert 0.98 < held.largest / planned < 1.02


def test_the_trial_takes_the_memory_that_is_planned() -> None:
    """Plain torch's experts at Mixtral's sizes, beside the workspace, take most of what
    `trial_bytes` says: gate and up of one expert are floats."""
    model, meta = without_values(1), torch.device("meta")
    x, ends = torch.zeros(200, 4096, dtype=torch.bfloat16, device=meta), torch.tensor([200]).int()
    layer: Any = model.layers[0]
    with torch.inference_mode(), Held() as held:
        layer.mlp.experts._compute(torch.zeros(1, dtype=torch.int64, device=meta), x, ends.to(meta))
    planned = trial_bytes(model.config, 2, 8) - workspace_bytes(model.config, 2, 8)
    assert 0.7 < held.largest / planned < 0.95


def test_the_trial_has_a_context_in_splits() -> None:
    """At Mixtral's sizes attention cuts a context of the trial into splits, so that the kernel that
    combines them is compared, and compiled before there are requests."""
    keys = torch.empty(1, 16, 8, 128, device="meta")
    sizes = PromptAttention(32, keys, None).sizes
    new, lengths = (list(each) for each in zip(*TRIAL_CHUNKS, strict=True))
    items, combined = items_of(new, lengths, sizes)
    assert len(combined) > 0
    assert any(item.split < 0 for item in items)


def test_a_gpu_that_reports_no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The crossover is one pass where the driver reports 0 for a clock, as for a virtual GPU."""
    attributes = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE=1,
        CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH=2,
        CU_DEVICE_ATTRIBUTE_CLOCK_RATE=3,
    )
    driver = SimpleNamespace(
        CUdevice_attribute=attributes,
        cuDeviceGet=lambda number: (0, number),
        cuDeviceGetAttribute=lambda attribute, device: (0, (0, 6144, 1_980_000)[attribute - 1]),
    )
    card = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(prompt_passes, "cuda_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    with pytest.raises(DriverError, match="reports no clock"):
        speed_of(torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("bandwidth", "multiprocessors", "clock", "flops_per_cycle", "pass_tokens", "expected"),
    [(4.8e12, 132, 1.98e9, 4096, 128, 768), (1.01e12, 128, 2.52e9, 512, 64, 944)],
    ids=["H200", "4090"],
)
def test_the_crossover_follows_from_the_cards_speed(
    bandwidth: float,
    multiprocessors: int,
    clock: float,
    flops_per_cycle: int,
    pass_tokens: int,
    expected: int,
) -> None:
    """About as many tokens as were measured on an H200; more where the memory is slow."""
    cycles = multiprocessors * clock
    speed = CardSpeed(bandwidth, cycles, cycles * flops_per_cycle)
    assert max_tokens(config_of(tiny=False, layers=1), speed, pass_tokens) == expected
