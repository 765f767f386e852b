"""AdamW for bf16 weights that lose nothing: the lower halves of their bits are in the optimizer.

At a learning rate of 1e-6 a step is far smaller than the distance between two bf16 numbers, so nearly all
weights would stay where they are. But a bf16 number is the upper half of the bits of an fp32 number. If the
lower half is kept too, the weights of training are in fp32, and the upper halves are a bf16 model which
samples and is trained without any copy or cast. In bytes a parameter:

    weights         2 + 2    upper halves (the model) and lower halves (here)
    gradients       2
    moments         8        fp32
    start model     2        for the KL term

After any number of steps the joined weights are those of torch.optim.AdamW(fused=True) on fp32 weights that
got the same gradients, bit for bit. fp32 weights are taken too, and have no lower halves.

    optimizer = AdamW(model, lr=1e-6, weight_decay=0.01)
    norm = optimizer.grad_norm()                            # of the gradients of loss.backward()
    optimizer.step(clip_factor(norm, max_norm=1.0))
    optimizer.zero_grad()
"""

from __future__ import annotations

import math

import torch
from torch.optim.adamw import adamw

# Elements that are in fp32 at the same time. A multiple of 64, because on a CPU torch rounds differently what
# is left of a tensor after its last full vector.
SLICE = 1 << 22


def split(full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> (upper bf16, lower int16), with bits(full) = 2^16 bits(upper) + lower, where lower is signed.

    The upper half is the nearest bf16 number. One in the middle between two goes away from zero: the other
    way lower would be 2^15, which int16 does not hold. All 2^32 patterns survive `split` and `join`. But the
    upper half of a number above 3.39e38 is infinite, and that of an unusual NaN (one whose bits are not those
    that arithmetic gives) need not be a NaN."""
    bits = full.view(torch.int32)
    upper = (bits + (1 << 15)) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """(upper bf16, lower int16) -> fp32, see `split`."""
    return ((upper.view(torch.int16).int() << 16) + lower).view(torch.float32)


def local(x: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is in this process: all of it, unless the model is spread over several
    processes (parallel.py)."""
    return x.to_local() if hasattr(x, "to_local") else x


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients of this norm are multiplied by, as in torch.nn.utils.clip_grad_norm_."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


class AdamW:
    """The optimizer of all parameters of a model that are not frozen. `lr` can be set before every step.

    The state of a parameter has two moments, the number of its steps and, if it is in bf16, the lower halves.
    They are 0 at first, as in a bf16 checkpoint; those of an fp32 checkpoint come with `load_weights`."""

    def __init__(self, model: torch.nn.Module, lr: float, weight_decay: float):
        self.lr, self.weight_decay = lr, weight_decay
        # a head tied to the embedding occurs once
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        for name, p in self.parameters.items():
            moments = {key: torch.zeros_like(p, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
            self.state[name] = moments | {"step": torch.zeros((), device=p.device)}
            if p.dtype == torch.bfloat16:
                self.state[name]["lower"] = torch.zeros_like(p, dtype=torch.int16)

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """The norm of the whole gradient in this process, a scalar in fp32. The norm that clip_grad_norm_
        returns for bf16 gradients is rounded to bf16, which has three digits."""
        gradients = [local(p.grad).view(-1) for p in self.parameters.values() if p.grad is not None]
        slices = [part for gradient in gradients for part in gradient.split(SLICE)]
        norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in slices]
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def step(self, factor: torch.Tensor | float = 1.0):
        """One step on the gradients times `factor`. The product is in fp32, and the gradients stay as they
        are: to scale them in place would round them once more."""
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            state, in_halves = self.state[name], p.dtype == torch.bfloat16
            tensors = [p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["lower"] if in_halves else p]
            slices = zip(*(local(x).view(-1).split(SLICE) for x in tensors), strict=True)
            for weight, gradient, mean, square, lower in slices:
                full = join(weight, lower) if in_halves else weight
                # this is what torch.optim.AdamW calls; a formula of our own would differ in the last bits
                adamw(
                    [full], [gradient.float() * factor], [mean], [square], [], [state["step"].clone()],
                    lr=self.lr, beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False, maximize=False, fused=True,
                    weight_decay=self.weight_decay if p.ndim >= 2 else 0.0,  # no decay of norms and biases
                )  # fmt: skip
                if in_halves:
                    upper, rest = split(full)
                    weight.copy_(upper)
                    lower.copy_(rest)
            state["step"] += 1

    def zero_grad(self):
        for p in self.parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{parameter.entry: tensor}, not copied. It is complete together with the weights of the model."""
        return {f"{name}.{key}": x for name, state in self.state.items() for key, x in state.items()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]):
        """Copies what `state_dict` returned. Raises ValueError for the state of another model."""
        own = {key: local(x) for key, x in self.state_dict().items()}
        kinds, given = ({k: (x.shape, x.dtype) for k, x in part.items()} for part in (own, tensors))
        if kinds != given:
            raise ValueError("the state of the optimizer is that of another model")
        for key, tensor in own.items():
            tensor.copy_(tensors[key])

    @torch.no_grad()
    def load_weights(self, model: torch.nn.Module):
        """Takes the weights of an fp32 model, with their lower halves."""
        for name, full in model.named_parameters():
            p, state = self.parameters[name], self.state[name]
            upper, lower = split(local(full))
            local(p).copy_(upper if "lower" in state else local(full))
            if "lower" in state:
                local(state["lower"]).copy_(lower)

    @torch.no_grad()
    def full_weights(self, whole=dict) -> dict[str, torch.Tensor]:
        """{name: weights in fp32}, on the CPU. `whole` puts shards together, see world.World.whole."""
        weights = whole(self.parameters)
        lower = whole({name: state["lower"] for name, state in self.state.items() if "lower" in state})
        return {
            name: join(p.cpu(), lower[name].cpu()) if name in lower else p.cpu()
            for name, p in weights.items()
        }


def rounding_notes(optimizer: AdamW) -> list[str]:
    """A line for each setting that has no effect because fp32 rounds it off. Of several processes each looks
    at its own shards.

    AdamW moves a weight by about the learning rate. Between 2^e and 2^(e + 1) fp32 numbers are 2^(e - 23)
    apart, so a smaller move than 2^(e - 24) is lost. Weight decay moves it by the share lr * weight_decay,
    which is lost on all weights if it is less than 2^-25."""
    lr, decay, notes = optimizer.lr, optimizer.weight_decay, []
    shards = {name: local(p.detach()) for name, p in optimizer.parameters.items()}
    sizes = {name: x.abs().max().item() for name, x in shards.items() if x.numel()} or {"": 0.0}
    name = max(sizes, key=sizes.get)
    half_distance = math.ldexp(1, math.frexp(sizes[name])[1] - 25)
    if 0 < lr < half_distance:
        largest = f"the largest weights ({sizes[name]:.3g} in {name})"
        notes.append(
            f"--learning_rate {lr:g} cannot move {largest}: below {half_distance:.2g} fp32 rounds it off"
        )
    if 0 < lr * decay < 2**-25:
        notes.append(f"--weight_decay {decay:g} does nothing: fp32 rounds off {decay:g} * {lr:g} of a weight")
    return notes
