"""The GRPO loss of rows of logits as one Triton kernel. The contract, the formulas and their derivation are
in reference.py; the comments here name the formula of each line and what is particular to a GPU.

Each row is read twice. The first visit reads it (2V bytes in bf16) and computes all results. The second visit
reads it again and writes the gradient in place, which moves 2V bytes each. So 6V bytes are moved, because the
second reading comes from memory too: more rows are under way than the L2 cache holds. With fewer rows under
way it would come from the cache, but a grid of 66 to 264 programs was slower (measured on an H200,
2026-11-26).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# One program works on one row. 4,096 logits in 4 warps are 32 for each thread. Several programs share a
# multiprocessor, so that one computes while another waits for memory. With 4 warps, 4,096 and 8,192 logits
# were equally fast; with 8 warps both took a quarter more in the forward pass (H200, bench/RESULTS.md).
BLOCK, WARPS = 4096, 4

FLOOR = tl.constexpr(-1e20)  # below every logit; finite, as in reference.py
LOG2E = tl.constexpr(1.4426950408889634)


def grpo_loss_from_logits(
    logits, target, old_logps, ref_logps, advantages, scale, *,
    epsilon: float, epsilon_high: float, beta: float, temperature: float = 1.0, vocab_size: int | None = None,
    gradient: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """As reference.grpo_loss_from_logits, except that a target outside of the vocabulary makes the loss NaN.
    To raise an error, the CPU would have to wait for the GPU."""
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


# Triton compiles a kernel again when an argument has a new property that it could use, such as a number
# divisible by 16 or an aligned pointer. N changes with every batch, and so does the alignment of the arrays.
# These properties would not make the kernel faster, so they are excluded, and one compilation serves every N.
@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=["target", "old_logps", "ref_logps", "advantages", "scale"],
)
def _visit_row(
    logits, target, old_logps, ref_logps, advantages, scale, out,  # [N, width], [N] each, [5, N]
    n, stride, width, vocab, temperature, low, high, beta,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride reaches 2^31 at 14,135 rows of 151,936
    logits += row * stride
    y = tl.load(target + row).to(tl.int32)
    # This is read first, because the gradient will replace it. A wrong id must not read another row's logit.
    z_y = tl.load(logits + y, mask=(y >= 0) & (y < vocab), other=float("nan")).to(tl.float32)

    # First visit. exp(z / temperature) is 2^(z * unit), with unit = log2(e) / temperature, and 2^x is an
    # instruction of the hardware. Over the columns so far, top = max z * unit, and with d = z * unit - top,
    # total = sum 2^d and moment = sum d 2^d. If a block has a higher maximum, every earlier d changes by the
    # same shift, so total becomes 2^shift total, and moment becomes 2^shift (moment + shift total).
    unit = LOG2E / temperature
    top, total, moment = FLOOR, 0.0, 0.0
    ahead = _load(logits, 0, vocab, BLOCK)
    for start in range(0, vocab, BLOCK):
        z = ahead.to(tl.float32)
        ahead = _load(logits, start + BLOCK, vocab, BLOCK)  # is loaded while this block is computed
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

    # As token_loss in reference.py. tl.where is used in place of min and max, which would lose a NaN.
    advantage = tl.load(advantages + row).to(tl.float32)
    gap = logp - logp
    if old_logps is not None:
        gap = logp - tl.load(old_logps + row).to(tl.float32)
    ratio = tl.exp(_clamp(gap, -20.0, 20.0))
    unclipped = ratio * advantage
    bounded = _clamp(ratio, low, high) * advantage
    clipped = bounded < unclipped
    value = -tl.where(clipped, bounded, unclipped)  # -min(ratio A, clip(ratio) A)
    g = tl.where(clipped | (tl.abs(gap) > 20.0), 0.0, -unclipped)  # d surrogate / d logp, the four cases
    kl = tl.zeros_like(logp)
    if ref_logps is not None:
        x = tl.load(ref_logps + row).to(tl.float32) - logp
        inside = tl.abs(x) <= 20.0
        x = _clamp(x, -20.0, 20.0)
        # near 0 exp(x) - x - 1 cancels, so its series is used
        small = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120))))
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
        tl.debug_barrier()  # no thread may write before all threads have read z_y
        g = g * weight / temperature
        share = g / total
        last = (width - 1) // BLOCK * BLOCK
        ahead = _load(logits, last, vocab, BLOCK)
        for back in range(0, width, BLOCK):  # backwards: its end was read last, so it may still be cached
            z = ahead.to(tl.float32)
            ahead = _load(logits, tl.maximum(last - back - BLOCK, 0), vocab, BLOCK)
            e = tl.exp2(tl.fma(z, unit, -top))  # 0 past the vocabulary
            ids = last - back + tl.arange(0, BLOCK)
            dz = tl.where(ids == y, g - share * e, -share * e)  # g (1[j = y] - p_j), in fp32
            tl.store(logits + ids, dz, mask=ids < width)  # the only rounding to the logits' dtype


@triton.jit
def _load(logits, start, vocab, BLOCK: tl.constexpr):
    """[BLOCK] logits, and -inf beyond the vocabulary. A whole block is loaded without a mask, because a mask
    costs two instructions for each logit, and a load whose mask can end at any logit reads logits one by
    one."""
    ids = start + tl.arange(0, BLOCK)
    if start + BLOCK <= vocab:
        z = tl.load(logits + ids)
    else:
        z = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
    return z


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))
