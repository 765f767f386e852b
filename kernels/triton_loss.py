"""The GRPO loss of rows of logits as one Triton kernel. The contract, the formulas and their derivation are
in reference.py; the comments here name the formula of each line, and say what is particular to a GPU.

A row is visited twice. The first visit reads it from memory (2V bytes in bf16) and yields everything that is
reported; the second reads it again, as far as it is still in the cache from there, and writes its gradient
in place (2V bytes). A loss kernel and then a backward kernel move 6V: all rows lie between the two readings.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# One program works on one row. 8,192 logits in 8 warps are 32 a thread: 16 kB of loads in flight, and at most
# 80 registers (tests/hopper.py counts them), so that three programs share a multiprocessor and one computes
# while another waits. An H200 then has 396 rows under way: 120 MB in bf16 at V = 151,936; its L2 holds 60.
BLOCK, WARPS = 8192, 8

FLOOR = tl.constexpr(-1e20)  # below every logit; finite, as in reference.py
LOG2E = tl.constexpr(1.4426950408889634)


def grpo_loss_from_logits(
    logits, target, old_logps, ref_logps, advantages, scale, *,
    epsilon: float, epsilon_high: float, beta: float, temperature: float = 1.0, vocab_size: int | None = None,
    gradient: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """As reference.grpo_loss_from_logits, but a target that is no id of the vocabulary makes the loss NaN: to
    raise an error the CPU would have to wait for the GPU."""
    n, width = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("logits: the entries of a row must be adjacent in memory")
    columns = target, old_logps, ref_logps, advantages, scale
    columns = [None if x is None else x.contiguous() for x in columns]
    out = logits.new_empty(5, n, dtype=torch.float32)
    if n:
        with torch.cuda.device_of(logits):
            _visit_row[(n,)](
                logits, *columns, out, n, logits.stride(0), width, vocab_size or width,
                float(temperature), 1.0 - epsilon, 1.0 + epsilon_high, float(beta),
                GRADIENT=gradient, BLOCK=min(BLOCK, triton.next_power_of_2(width)), num_warps=WARPS,
            )  # fmt: skip
    return out[4].sum(), dict(zip(("logps", "entropy", "kl", "clipped"), out, strict=False))


# Triton compiles anew for every new property of an argument that it may use: a number that is divisible by
# 16, an aligned pointer. N changes with every batch, and with it where the next array begins; knowing it
# helps nothing, so these are left out, and one compilation serves every N.
@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=["target", "old_logps", "ref_logps", "advantages", "scale"],
)
def _visit_row(
    logits, target, old_logps, ref_logps, advantages, scale, out,  # [N, width], [N] each, [5, N]
    n, stride, width, vocab, temperature, low, high, beta,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 at 14,135 rows of 151,936
    logits += row * stride
    y = tl.load(target + row).to(tl.int32)
    # Read now: later the gradient stands in its place. A wrong id must not read another row's logit.
    z_y = tl.load(logits + y, mask=(y >= 0) & (y < vocab), other=float("nan")).to(tl.float32)

    # First visit. With z = logits / temperature * log2(e), exp is 2^z, which is what the hardware has. Of the
    # columns seen so far: top = max z, and with d = z - top, total = sum 2^d and moment = sum d 2^d. A higher
    # top makes every earlier d smaller by the same shift: total becomes 2^shift total, and moment becomes
    # 2^shift (moment + shift total).
    unit = LOG2E / temperature
    top, total, moment = FLOOR, 0.0, 0.0
    ahead = _load(logits, 0, vocab, BLOCK)
    for start in range(0, vocab, BLOCK):
        z = ahead.to(tl.float32)
        ahead = _load(logits, start + BLOCK, vocab, BLOCK)  # on its way while this block is worked on
        higher = tl.maximum(top, tl.max(z, 0) * unit)
        shift = top - higher
        d = tl.fma(z, unit, -higher)  # rounded once: exact near the maximum, where z * unit alone is not
        d = tl.maximum(d, -1000.0, propagate_nan=tl.PropagateNan.ALL)  # 0 * -1000 is 0, 0 * -inf is NaN
        e = tl.exp2(d)
        moment = (moment + shift * total) * tl.exp2(shift) + tl.sum(d * e, 0)
        total = total * tl.exp2(shift) + tl.sum(e, 0)
        top = higher
    z_y = tl.where(z_y < FLOOR, FLOOR, z_y)
    logp = tl.fma(z_y, unit, -top) / LOG2E - tl.log(total)  # z_y - log s
    entropy = tl.log(total) - moment / total / LOG2E  # log s - sum e z / s

    # token_loss in reference.py. Comparisons with NaN are false, so tl.where keeps a NaN; min and max do not.
    advantage = tl.load(advantages + row).to(tl.float32)
    gap = logp - logp
    if old_logps is not None:
        gap = logp - tl.load(old_logps + row).to(tl.float32)
    ratio = tl.exp(_clamp(gap, -20.0, 20.0))
    free = ratio * advantage
    held = _clamp(ratio, low, high) * advantage
    clipped = held < free
    value = -tl.where(clipped, held, free)  # -min(ratio A, clip(ratio) A)
    g = tl.where(clipped | (tl.abs(gap) > 20.0), 0.0, -free)  # d surrogate / d logp, the four cases
    kl = tl.zeros_like(logp)
    if ref_logps is not None:
        x = tl.load(ref_logps + row).to(tl.float32) - logp
        inside = tl.abs(x) <= 20.0
        x = _clamp(x, -20.0, 20.0)
        small = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120))))  # exp(x) - x - 1 cancels there
        kl = tl.where(tl.abs(x) < 0.1, small, tl.exp(x) - x - 1.0)
        value += beta * kl
        g -= beta * tl.where(inside, kl + x, 0.0)  # d kl / d logp = 1 - exp(x) = -(kl + x)
    weight = tl.load(scale + row).to(tl.float32)
    out += row
    tl.store(out, logp)
    tl.store(out + n, entropy)
    tl.store(out + 2 * n, kl)
    tl.store(out + 3 * n, clipped.to(tl.float32))
    tl.store(out + 4 * n, weight * value)

    if GRADIENT:
        tl.debug_barrier()  # no thread may write before all have read z_y
        g = g * weight / temperature
        share = g / total
        last = (width - 1) // BLOCK * BLOCK
        ahead = _load(logits, last, vocab, BLOCK)
        for back in range(0, width, BLOCK):  # backwards: the end of the row was read last, it is still cached
            z = ahead.to(tl.float32)
            ahead = _load(logits, tl.maximum(last - back - BLOCK, 0), vocab, BLOCK)
            e = tl.exp2(tl.fma(z, unit, -top))  # 0 past the vocabulary
            ids = last - back + tl.arange(0, BLOCK)
            dz = tl.where(ids == y, g - share * e, -share * e)  # g (1[j = y] - p_j), in fp32
            tl.store(logits + ids, dz, mask=ids < width)  # rounded here, once


@triton.jit
def _load(logits, start, vocab, BLOCK: tl.constexpr):
    """[BLOCK] logits, -inf past the vocabulary. Whole blocks go without a mask: it would cost two
    instructions a logit, and a load masked by an odd number goes logit by logit, not 16 bytes at once."""
    ids = start + tl.arange(0, BLOCK)
    if start + BLOCK <= vocab:
        z = tl.load(logits + ids)
    else:
        z = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
    return z


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))
