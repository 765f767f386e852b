"""The draw of the next token as two Triton kernels: the first token whose cumulative probability exceeds u.
reference.sample has the contract, and is the same in plain torch.

In plain torch about eight passes go over the logits, half of them over fp64 numbers. Here every logit is read
once, and those of one block a second time. With z_j = log2(e) logits_j / temperature:

    _sum_blocks   for each block b of a row: top_b = max z_j and sum_b = sum 2^(z_j - top_b). The logit at
                  the maximum is stored without the factor: with temperature 0 the blocks are compared by
                  it, and by the products, which are rounded, two different logits could be equal
    _pick         weight_b = sum_b 2^(top_b - max top_b) is the probability of block b, times a constant. The
                  cumulative sum of the weights shows which block holds the token. The sum before this block
                  is subtracted from the target, u times the total. The rest is looked up in the cumulative
                  sum of 2^(z_j - top_b) inside the block.

The sums are in fp64, the terms in fp32. So a cumulative sum differs by about 1e-8 from that of
reference.sample, whose terms are rounded in other places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton_loss import FLOOR, LOG2E, _load

BLOCK = 4096  # logits of one program of `_sum_blocks`


def sample(logits, u, temperature, vocab_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.sample."""
    rows, vocab = len(logits), min(vocab_size or logits.shape[1], logits.shape[1])
    if logits.stride(1) != 1:
        raise ValueError("logits: the entries of a row must be adjacent in memory")
    temperature = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
    blocks = triton.cdiv(vocab, BLOCK)
    tops = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    sums = torch.empty(rows, blocks, dtype=torch.float64, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logps = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            arguments = logits, logits.stride(0), vocab, temperature, tops, sums, blocks
            _sum_blocks[(rows, blocks)](*arguments, BLOCK=BLOCK, num_warps=4)
            _pick[(rows,)](
                *arguments, u, u.stride(0), tokens, logps, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks),
                num_warps=8,
            )  # fmt: skip
    return tokens, logps


@triton.jit
def _sum_blocks(logits, stride, vocab, temperature, tops, sums, blocks, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z = _load(logits + row * stride, block * BLOCK, vocab, BLOCK).to(tl.float32)
    t = tl.load(temperature)
    unit = LOG2E / tl.where(t > 0.0, t, 1.0)  # 0 is greedy; its log-probs are those of temperature 1
    top = tl.maximum(tl.max(z, 0), FLOOR)
    e = tl.exp2(tl.fma(z, unit, -top * unit)).to(tl.float64)
    tl.store(tops + row * blocks + block, top)
    tl.store(sums + row * blocks + block, tl.sum(e, 0))


@triton.jit
def _pick(
    logits, stride, vocab, temperature, tops, sums, blocks, u, u_stride, tokens, logps,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row, b, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    top_b = tl.load(tops + row * blocks + b, mask=b < blocks, other=FLOOR)
    sum_b = tl.load(sums + row * blocks + b, mask=b < blocks, other=0.0)
    t = tl.load(temperature)
    greedy, unit = t == 0.0, LOG2E / tl.where(t > 0.0, t, 1.0)
    highest = tl.max(top_b, 0)
    top = highest * unit
    weight = sum_b * tl.exp2((top_b * unit - top).to(tl.float64))
    total = tl.sum(weight, 0)
    target = tl.load(u + row * u_stride) * total

    # The first block whose cumulative sum exceeds the target; with temperature 0 the first with the maximum.
    # The parts of a parallel sum can differ in their last bits, so what has no probability is excluded too.
    passes = tl.where(greedy, top_b == highest, (tl.cumsum(weight, 0) > target) & (weight > 0.0))
    block = tl.min(tl.where(passes, b, BLOCKS), 0)
    # If u is close to 1, rounding can leave the sum below the target. Then it is the last block that counts.
    block = tl.where(block == BLOCKS, tl.max(tl.where(weight > 0.0, b, 0), 0), block)
    rest = target - tl.sum(tl.where(b < block, weight, 0.0), 0)

    z = _load(logits + row * stride, block * BLOCK, vocab, BLOCK).to(tl.float32)
    here = tl.sum(tl.where(b == block, top_b, 0.0), 0) * unit
    e = tl.exp2(tl.fma(z, unit, -here))
    share = tl.cumsum(e.to(tl.float64), 0) * tl.exp2((here - top).to(tl.float64))
    passes = tl.where(greedy, z == tl.max(z, 0), (share > rest) & (e > 0.0))
    token = tl.min(tl.where(passes, place, BLOCK), 0)
    token = tl.where(token == BLOCK, tl.max(tl.where(e > 0.0, place, 0), 0), token)
    z_token = tl.sum(tl.where(place == token, z, 0.0), 0)
    logp = tl.fma(z_token, unit, -top).to(tl.float64) - tl.log2(total)
    tl.store(tokens + row, (block * BLOCK + token).to(tl.int64))
    tl.store(logps + row, (logp / LOG2E).to(tl.float32))
