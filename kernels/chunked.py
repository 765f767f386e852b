"""From hidden states to the loss and back, one chunk of rows at a time:

    logits [chunk, V] = hidden [chunk, H] @ weight.T [H, V]      their gradient in place, see reference.py
    d hidden          = dlogits @ weight                         [chunk, H]
    d weight         += dlogits.T @ hidden                       [V, H], fp32

The three products are calls of torch. Beyond the inputs and their gradients, the memory is one chunk of
logits, a few numbers for each row, and with a bf16 head d weight in fp32, which is rounded once at the end
(and a second [V, H] where `add_product` cannot add in place). Both gradients are computed in the forward
pass, while the logits are there, and the backward pass returns them.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

import kernels

# Logits of one chunk on a CPU: 1 GiB in fp32, which is 1,766 rows at V = 151,936.
CHUNK_ELEMENTS = 1 << 28


class _GRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, old_logps, ref_logps, advantages, scale, options):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        loss, parts = hidden.new_zeros((), dtype=torch.float32), []
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.empty_like(weight, dtype=torch.float32) if wants_weight else None
        for rows, logits in chunks(hidden, weight):
            cut = [None if x is None else x[rows] for x in (target, old_logps, ref_logps, advantages, scale)]
            value, stats = kernels.grpo_loss_from_logits(
                logits, *cut, **options, gradient=wants_hidden or wants_weight
            )
            loss += value
            parts.append(stats)
            if wants_hidden:
                torch.mm(logits, weight, out=d_hidden[rows])
            if wants_weight:
                add_product(d_weight, logits.T, hidden[rows], first=rows.start == 0)
        ctx.gradients = d_hidden, d_weight.to(weight.dtype) if wants_weight else None
        stats = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        ctx.mark_non_differentiable(*stats.values())
        return loss, *stats.values()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if ctx.gradients is None:
            raise RuntimeError("grpo_loss: the gradient of this loss was already taken; its memory is gone")
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        if grad != 1:  # this waits for the GPU, but saves a pass over [V, H] in the usual case
            d_hidden, d_weight = (None if d is None else d.mul_(grad) for d in (d_hidden, d_weight))
        return d_hidden, d_weight, None, None, None, None, None, None


def grpo_loss(
    hidden,
    weight,
    target,
    old_logps,
    ref_logps,
    advantages,
    scale,
    *,
    epsilon: float,
    epsilon_high: float,
    beta: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The GRPO loss of N tokens from hidden states [N, H] and the lm_head's weight [V, H], differentiable in
    both, once.

    The other arguments and the stats are those of reference.grpo_loss_from_logits. Pass the hidden states at
    the loss positions alone, because every row costs V * H."""
    options = {"epsilon": epsilon, "epsilon_high": epsilon_high, "beta": beta}
    options |= {"temperature": temperature, "vocab_size": vocab_size}
    loss, *stats = _GRPOLoss.apply(hidden, weight, target, old_logps, ref_logps, advantages, scale, options)
    return loss, dict(zip(("logps", "entropy", "kl", "clipped"), stats, strict=True))


@torch.no_grad()
def token_logps(hidden, weight, target, *, temperature: float = 1.0, vocab_size: int | None = None):
    """Log-prob of each target and entropy of each row, both [N] fp32, without a gradient."""
    options = {"temperature": temperature, "vocab_size": vocab_size, "gradient": False}
    zeros, parts = hidden.new_zeros(len(hidden), dtype=torch.float32), []
    for rows, logits in chunks(hidden, weight):  # a loss of advantage 0; only its stats are used
        _, stats = kernels.grpo_loss_from_logits(
            logits, target[rows], None, None, zeros[rows], zeros[rows],
            epsilon=0.0, epsilon_high=0.0, beta=0.0, **options,
        )  # fmt: skip
        parts.append((stats["logps"], stats["entropy"]))
    logps, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return logps, entropy


def chunks(hidden, weight):
    """Yields (slice of rows, their logits), and one empty chunk if N = 0.

    All chunks share one buffer. All V columns are computed even if the vocabulary is shorter, because a width
    that is no multiple of 8 is slow on a GPU."""
    size = min(chunk_rows(hidden, len(weight)), max(1, len(hidden)))
    buffer = hidden.new_empty(size, len(weight))
    for i in range(0, max(1, len(hidden)), size):
        rows = slice(i, min(i + size, len(hidden)))
        logits = buffer[: rows.stop - i]
        torch.mm(hidden[rows], weight.T, out=logits)
        yield rows, logits


def chunk_rows(hidden, vocab: int) -> int:
    """Rows of a chunk: on a GPU 8,192, or fewer if their logits need more than a quarter of the free memory.
    Few large chunks are best, because each of them reads and writes all of d weight."""
    if not hidden.is_cuda:
        return max(1, CHUNK_ELEMENTS // vocab)
    free = torch.cuda.mem_get_info(hidden.device)[0]
    free += torch.cuda.memory_reserved(hidden.device) - torch.cuda.memory_allocated(hidden.device)
    rows = free // 4 // (vocab * hidden.element_size())
    return min(8192, max(256, rows // 256 * 256))


def add_product(total, a, b, first: bool):
    """total = a @ b if `first`, else total += a @ b, with total in fp32.

    The matrix unit of a GPU sums bf16 products in fp32. If this sum is added to `total` directly, nothing is
    rounded between two chunks, and no second [V, H] is needed. Older versions of torch cannot do this."""
    beta = 0 if first else 1  # with 0 the old content of total is not read
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and torch.__version__ >= (2, 10):  # the first version that can add to an fp32 matrix
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.copy_(a @ b) if first else total.add_(a @ b)
