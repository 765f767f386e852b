"""Keys and values in slots: a cache for transformers in which every row has its own length.

    cache = SlotCache(model.config, slots=8, max_len=4096, device=model.device, dtype=model.dtype)
    cache.select(rows, positions, kv_len)      # before a forward pass: where it writes, how far it reads

runner.py makes the forward passes; rollout.py decides which row has which slot.
"""

from __future__ import annotations

import math

import torch
from transformers.cache_utils import Cache


class SlotCache(Cache):
    """Keys and values of every row at the row's own positions: for each layer two tensors [slots, kv_heads,
    max_len + 1, head_dim].

    So a row can be extended by one token or by a whole search result, some rows can be stepped without the
    others, and a slot can be copied or given to another row. The last position is scratch space: all
    padding is written there."""

    def __init__(self, config, slots: int, max_len: int, device, dtype):
        super().__init__(layers=[])
        shape = (slots, kv_shape(config)[1], max_len + 1, kv_shape(config)[2])
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(kv_shape(config)[0])]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.slots, self.max_len = slots, max_len

    def select(self, rows: int | torch.Tensor, positions: torch.Tensor, kv_len: int):
        """Sets where the next forward pass writes, `positions` [rows, new] int64, and how many it reads.
        `rows` is an int n, for the first n slots, or a tensor of slots."""
        first = isinstance(rows, int)
        index = torch.arange(rows, device=positions.device) if first else rows
        self.rows = slice(rows) if first else rows  # a slice: attention reads a view, not a copy
        self.where = index[:, None], slice(None), positions  # [rows, new, kv_heads, head_dim] of a layer
        self.kv_len = kv_len

    def update(self, key, value, layer, *args, **kwargs):
        """Called by each layer of the model: writes key and value [rows, kv_heads, new, head_dim] where
        `select` said. Returns views of the first kv_len positions of its rows, which attention reads."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.where] = key.transpose(1, 2).to(keys.dtype)
        values[self.where] = value.transpose(1, 2).to(values.dtype)
        return keys[self.rows, :, : self.kv_len], values[self.rows, :, : self.kv_len]

    def get_seq_length(self, layer: int = 0) -> int:
        return 0  # the caller passes position_ids and a mask, so transformers must not count positions itself

    def clear(self):
        """Sets all keys and values to 0; why is said in `ModelRunner.prepare`."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def copy(self, source: int, targets: list[int], length: int):
        """Copies the first `length` positions of one slot to others."""
        if targets:
            index = torch.tensor(targets, device=self.keys[0].device)  # one transfer, not one a layer
            for tensor in (*self.keys, *self.values):
                tensor[index, :, :length] = tensor[source, :, :length]

    def swap(self, a: list[int], b: list[int], length: int):
        """Exchanges the first `length` positions of slot a[i] and slot b[i], for every i."""
        index = torch.tensor([a + b, b + a], device=self.keys[0].device)
        for tensor in (*self.keys, *self.values):
            tensor[index[0], :, :length] = tensor[index[1], :, :length]


def kv_shape(config) -> tuple[int, int, int]:
    """(layers, key-value heads, head size) of a model."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, head_dim


def context_length(config) -> int:
    """The most tokens that a model can read; 2^30 if its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def kv_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of one token in the cache."""
    return 2 * math.prod(kv_shape(config)) * dtype.itemsize
