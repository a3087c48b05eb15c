"""A GPU that computes nothing, and a check of what a step does with it.

Tensors on the device "meta" have shapes and no values. Within `FakeGpu` they stand for those of a
GPU, and whatever needs one of their values on the host raises an error. Tensors of the host are
real.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

GPU = torch.device("meta")
ATEN = torch.ops.aten
ONE_LAUNCH = {ATEN.linear, ATEN.rms_norm, ATEN.embedding}
"""Operators that torch defines by others, and that a GPU computes in one launch."""
COPIES = {ATEN.copy_, ATEN._to_copy}
NO_LAUNCH = {ATEN.empty, ATEN.new_empty, ATEN.empty_like, ATEN.empty_strided, ATEN.detach}
NO_LAUNCH |= {ATEN._unsafe_view, ATEN.alias, ATEN.lift_fresh}


class Waits(AssertionError):
    """The host would wait for the device."""


class FakeGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators on the device without values.

    Raises `Waits` where torch would wait for a GPU: for a copy that is not asynchronous or whose
    host memory is not pinned, and for an operator that gets a tensor of the host.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Counter[str] = Counter()
        """Operators that compute on the device, and kernels, by name."""
        self.copies: Counter[str] = Counter()
        """Copies to the device ("in") and to the host ("out")."""
        self._pinned: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        if func.namespace == "aten" and packet not in ONE_LAUNCH:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        target = torch.device(kwargs.get("device") or (tensors or [torch.empty(0)])[0].device)
        is_on_gpu = target == GPU or any(each.is_meta for each in tensors)
        if packet in COPIES and is_on_gpu and len({target, *(it.device for it in tensors)}) > 1:
            return self._copy(func, target == GPU, tensors, args, kwargs)
        if not is_on_gpu:
            is_pinned = kwargs.pop("pin_memory", False)
            made = func(*args, **kwargs)
            return self.pin(made) if is_pinned else made
        if any(not each.is_meta and each.dim() for each in tensors):
            raise Waits(f"{func} gets a tensor of the host")
        if not func.is_view and packet not in NO_LAUNCH:
            self.launches[str(packet)] += 1
        return func(*args, **kwargs)

    def pin(self, tensor: Tensor) -> Tensor:
        """Records that a tensor of the host is in pinned memory."""
        self._pinned.append(_reference(tensor))
        return tensor

    def _copy(self, func: Any, is_in: bool, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Counts a copy between host and device."""
        in_place = func.overloadpacket is ATEN.copy_
        is_async = args[2] if in_place and len(args) > 2 else kwargs.get("non_blocking", False)
        hosts = [each for each in tensors if not each.is_meta]
        what = f"a copy of {tensors[0].dtype} {list(tensors[0].shape)}"
        if not is_async:
            raise Waits(f"{what} is not asynchronous")
        # A copy to the host that makes its tensor makes it in memory that is not pinned.
        if not hosts or _reference(hosts[0]) not in self._pinned:
            raise Waits(f"{what} is not from or to pinned memory")
        self.copies["in" if is_in else "out"] += 1
        if in_place:
            return args[0]
        return torch.empty(hosts[0].shape, dtype=kwargs.get("dtype") or hosts[0].dtype, device=GPU)


def _reference(tensor: Tensor) -> Any:
    make: Any = StorageWeakRef  # which has no types
    return make(tensor.untyped_storage())


class NoEvent:
    """An event of a stream that has no work."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A fake GPU; code must run within `with gpu:`."""
    made = FakeGpu()

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        made.launches[kernel.fn.__name__] += 1

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: made.pin(tensor.clone()))
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    # With a list, these copy where no mode sees it.
    monkeypatch.setattr(torch, "tensor", _refused_on_device(torch.tensor))
    for name in ("__getitem__", "__setitem__"):
        monkeypatch.setattr(Tensor, name, _refused_lists(getattr(Tensor, name)))
    return made


def _refused_on_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def tensor(data: Any, **kwargs: Any) -> Tensor:
        if torch.device(kwargs.get("device") or "cpu") == GPU:
            raise Waits("a tensor from numbers of the host is not asynchronous")
        return make(data, **kwargs)

    return tensor


def _refused_lists(access: Callable[..., Any]) -> Callable[..., Any]:
    def item(tensor: Tensor, index: Any, *value: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if tensor.is_meta and any(isinstance(part, list) for part in parts):
            raise Waits("an index from a list is not asynchronous")
        return access(tensor, index, *value)

    return item


class Recorded:
    """A CUDA kernel whose launches are counted, and do nothing."""

    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self._gpu, self._name = gpu, name

    def launch(self, *arguments: Any, blocks: int | None = None) -> None:
        self._gpu.launches[self._name] += 1
