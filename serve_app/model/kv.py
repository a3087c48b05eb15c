"""KVCache: the keys and values of all sequences, in KV blocks."""

import torch
from torch import Tensor

from serve_app.model.config import MixtralConfig


class KVCache:
    """`keys` and `values` of each layer, `[num_blocks, block_size, num_kv_heads, head_dim]`.

    All of them are parts of one tensor, so that two kernel launches clear blocks in all layers.
    """

    def __init__(self, stored: Tensor) -> None:
        """`stored` is `[layers, 2, num_blocks, block_size, num_kv_heads, head_dim]`: keys, then
        values."""
        keys, values = (list(half.unbind()) for half in stored.unbind(1))
        self.keys: list[Tensor] = keys
        self.values: list[Tensor] = values
        self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim = keys[0].shape
        # [layers * 2 * num_blocks, elements of a block]. If layers and blocks were two dimensions,
        # torch would launch one kernel for each 2 GB of the tensor.
        self._rows = stored.flatten(0, 2).flatten(1)
        # The row of block 0 of each layer's keys and values.
        self._first_rows = torch.arange(0, len(self._rows), self.num_blocks, device=stored.device)
        self._flat = [
            (k.view(-1, *k.shape[2:]), v.view(-1, *v.shape[2:]))
            for k, v in zip(keys, values, strict=True)
        ]
        self._blocks = [
            (k.view(self.num_blocks, -1), v.view(self.num_blocks, -1))
            for k, v in zip(keys, values, strict=True)
        ]
        self._scratch = keys[0].new_empty(2, 0)

    @classmethod
    def allocate(
        cls,
        config: MixtralConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KVCache":
        """Returns a cache filled with zeros. Attention multiplies masked slots by 0, so they must
        not contain a NaN."""
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        stored = torch.zeros(config.num_hidden_layers, 2, *shape, dtype=dtype, device=device)
        return cls(stored)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def clear(self, blocks: Tensor) -> None:
        """Fills the KV blocks `blocks` `[n]` with zeros.

        Attention multiplies masked slots by 0, so a NaN in a block would spread to the next
        sequence that gets the block.
        """
        rows = (self._first_rows[:, None] + blocks).flatten()
        self._rows.index_fill_(0, rows, 0)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores `keys` and `values` `[tokens, num_kv_heads, head_dim]` at `slots` `[tokens]`."""
        flat_keys, flat_values = self._flat[layer]
        flat_keys.index_copy_(0, slots, keys)
        flat_values.index_copy_(0, slots, values)

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of `blocks` `[n]`, each `[n * block_size, num_kv_heads,
        head_dim]`.

        Both are in a scratch buffer, which the next `read` overwrites. On a CPU, an allocation for
        every layer would cost more (page faults) than the copy.
        """
        width = self.block_size * self.num_kv_heads * self.head_dim
        size = blocks.numel() * width
        if self._scratch.shape[1] < size:
            self._scratch = self._scratch.new_empty(2, size)
        views = []
        for source, scratch in zip(self._blocks[layer], self._scratch, strict=True):
            out = scratch[:size].view(-1, width)
            torch.index_select(source, 0, blocks, out=out)
            views.append(out.view(-1, self.num_kv_heads, self.head_dim))
        return views[0], views[1]
