"""One run on several GPUs, by torchrun and FSDP2 (torch.distributed.fsdp.fully_shard).

    torchrun --nproc_per_node=8 grpo.py --model ...

Every process ("rank") has one GPU. In each step

    1. it samples and rewards its own questions, a contiguous block of those of the step (`block`), with the
       random numbers that these episodes would have in one process
    2. all ranks get all episodes (`gather`), and compute the same advantages, metrics and decisions from them
       by the code of one process
    3. it makes micro-batches of its own episodes, as many as the rank with the most (`most`): every forward
       and backward pass needs the shards of all ranks, so a rank that made fewer would leave the others
       waiting for ever. A rank with fewer adds empty ones
    4. the gradients are summed over the ranks, and every rank updates its shard of the weights
    5. it fills its sampling copy with all weights (`gather_weights`)

In bytes a parameter, on N ranks with bf16 weights: 2 for the sampling copy, and 16 / N for the shards of
weights, gradients, optimizer state and start model.

The layers that are gathered at the moment come on top of that. Every episode has the same random numbers on
any number of ranks. Sums are rounded in another order, so in rare cases a token differs.

The first rank writes all files. They are those of one process, so a run can be resumed on another number of
ranks; with --rollout_slots 0 --micro_batch_tokens 0 its sizes are computed anew.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from config import TOY, Config, fail, parse
from files import InputError
from world import World

TIMEOUT = timedelta(hours=2)  # a rank waits this long for another, because a slow server can delay one


class Ranks(World):
    """The processes that torchrun has started. What the methods do is said in world.py."""

    def __init__(self):
        gpus = torch.cuda.device_count()
        for name in (n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ):
            raise InputError(f"WORLD_SIZE is set but {name} is not: start the processes by torchrun")
        if 0 < gpus <= int(os.environ["LOCAL_RANK"]):
            raise InputError(f"--nproc_per_node: each process needs a GPU of its own, and there are {gpus}")
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self.store, self.rank, self.size = next(rendezvous("env://"))
        options = {"store": self.store, "rank": self.rank, "world_size": self.size, "timeout": TIMEOUT}
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", **options)
        self.stderr = sys.stderr
        if self.rank:  # the first rank prints for all
            sys.stdout = sys.stderr = open(os.devnull, "w")

    def reports(self) -> bool:
        """Whether this process is the first one with an error, and so prints it. The others have the same
        error, or fail because this process has ended."""
        sys.stderr = self.stderr
        try:
            return self.store.add("errors", 1) == 1
        except RuntimeError:  # the process with the store is gone
            return True

    def check(self, config: Config):
        if (n := config.prompts_per_step) % self.size:
            raise InputError(f"--prompts_per_step {n}: {self.size} processes cannot share it evenly")
        if config.simulator:  # its results depend on which queries come together
            raise InputError(f"--simulator {config.simulator}: several processes need --corpus in its place")

    def block(self, n: int) -> range:
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    # exchange

    def gather(self, values: list) -> list:
        lists = [None] * self.size
        dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def first(self, function, *args):
        result = [function(*args) if self.rank == 0 else None]
        dist.broadcast_object_list(result)
        return result[0]

    def most(self, number: int) -> int:
        return max(self.gather([number]))

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        parts = self.gather([sums])
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    # weights

    def shard(self, model: nn.Module) -> nn.Module:
        # FSDP2 gathers a layer when its forward pass begins. The loss needs the weight of the head too, so it
        # has to be computed inside of what FSDP2 takes for a forward pass of the model.
        layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # bf16 gradients are summed in fp32
        for part in [*layers, model]:
            fully_shard(part, mp_policy=policy, reshard_after_forward=True)
        model.inside = lambda function, *args: function(model, *args)
        register_fsdp_forward_method(model, "inside")
        return model

    def call(self, function, model, *args):
        return model.inside(function, *args) if hasattr(model, "inside") else function(model, *args)

    def finish_gradients(self, optimizer) -> torch.Tensor:
        # FSDP2 has averaged the gradients of shards already, but not those of whole weights: adapters
        whole = [p for p in optimizer.parameters.values() if not isinstance(p, DTensor)]
        for p in whole:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
            p.grad /= self.size
        square = optimizer.grad_norm() ** 2
        if not whole:
            dist.all_reduce(square)
        return square.sqrt()

    @torch.no_grad()
    def gather_weights(self, sharded: nn.Module, model: nn.Module):
        for whole, shard in zip(model.parameters(), sharded.parameters(), strict=True):
            whole.copy_(shard.full_tensor())

    @torch.no_grad()
    def whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for name, x in tensors.items():
            if isinstance(x, DTensor):
                # neither gloo nor NCCL sends int16, so lower halves are sent as bf16, which has as many bits
                bits = x.to_local().view(torch.bfloat16) if x.dtype == torch.int16 else x.to_local()
                sent = DTensor.from_local(bits, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
                x = sent.full_tensor().view(x.dtype)
            result |= {name: x.cpu()} if self.rank == 0 else {}
        return result

    def cut(self, tensors, like):
        def part(x, own):  # as FSDP2 cuts; what does not fit is left whole, since the caller compares shapes
            fits = isinstance(own, DTensor) and own.shape == x.shape
            return ([*x.chunk(self.size)] + [x[:0]] * self.size)[self.rank] if fits else x

        return {name: part(x, like.get(name)) for name, x in tensors.items()}


def program(name: str, main) -> int:
    """The command line of a run under torchrun: `main(config, given, world)`. Returns its exit code."""
    world = None
    try:
        world = Ranks()
        if len(flags := {" ".join(argv) for argv in world.gather([sys.argv[1:]])}) > 1:
            raise InputError(f"the processes were started with different flags: {' / '.join(sorted(flags))}")
        config, given = world.first(lambda: parse(Config, name, toy=TOY))
        code = main(config, given, world)
        dist.destroy_process_group()
        return code
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or (world and not world.reports()):
            sys.exit(2)
        lost = type(error) is RuntimeError and "by peer" in str(error)  # gloo has no class for it
        if lost or isinstance(error, dist.DistError):
            fail(name, "another process of this run has ended; --resume continues from the last checkpoint")
        if isinstance(error, (InputError, OSError, torch.OutOfMemoryError)):
            fail(name, error)
        raise
