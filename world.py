"""The processes of a run, which share its questions and its weights.

Usually there is one process. It has all questions and all weights, so there is nothing to exchange, and the
methods below return what they get. parallel.py has them for several processes, which torchrun starts."""

from __future__ import annotations

import torch
from torch import nn


class World:
    """The processes of a run, seen from one of them. `rank` is its number, from 0; `size` is how many there
    are. All of them have to call the methods in the same order, because most methods wait for the others."""

    rank, size = 0, 1

    def check(self, config):
        """Raises InputError for settings that the processes cannot share."""

    def block(self, n: int) -> range:
        """The indices of this process's share of n things."""
        return range(n)

    # exchange

    def gather(self, values: list) -> list:
        """The lists of all processes as one, in the order of their ranks."""
        return values

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        """The sums over all processes, which have the same keys."""
        return sums

    def most(self, number: float) -> float:
        """The largest number of all processes."""
        return number

    def first(self, function, *args):
        """What function(*args) returns in the first process, which alone calls it."""
        return function(*args)

    # weights

    def shard(self, model: nn.Module) -> nn.Module:
        """Spreads the weights of a model over the processes. From then on it is called by `call` alone."""
        return model

    def call(self, function, model: nn.Module, *args):
        """function(model, *args), during which the weights of the model are there."""
        return function(model, *args)

    def finish_gradients(self, optimizer) -> torch.Tensor:
        """Averages the gradients over the processes. Returns the norm of the whole gradient."""
        return optimizer.grad_norm()

    def gather_weights(self, sharded: nn.Module, model: nn.Module):
        """Copies all weights of a model in shards into another model."""

    def whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole tensors, from shards, in the first process. In the others {}."""
        return tensors

    def cut(self, tensors: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's parts of whole tensors, cut as those of `like` are."""
        return tensors


ALONE = World()
