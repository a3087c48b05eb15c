"""Counts the memory of tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made within it and still held.

    Tensors of the device "meta" count as if they had values.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[Any, int]] = {}
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_reference(each).cdata for each in tensors_of((args, kwargs))}
        for tensor in tensors_of(made):
            reference = _reference(tensor)
            if reference.cdata not in given:
                size = tensor.untyped_storage().nbytes()
                self._storages[reference.cdata] = (reference, size)
        held = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        self._storages = held
        self.largest = max(self.largest, sum(size for _, size in held.values()))
        return made


def tensors_of(values: Any) -> list[Tensor]:
    """Returns the tensors in a tree of lists, tuples and dicts."""
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def _reference(tensor: Tensor) -> Any:
    make: Any = StorageWeakRef  # which has no types
    return make(tensor.untyped_storage())
