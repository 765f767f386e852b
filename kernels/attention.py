"""Attention of one new token a row to the row's own keys and values, as a Triton kernel.

For row r, and for query head h, which shares the keys and values of key-value head c with the rest of its
group:

    s_j = scale q[r, h] . keys[r, c, j]                        for j < lengths[r]
    out[r, h] = sum_j p_j values[r, c, j],   p = softmax(s)    (zeros if lengths[r] is 0)

In plain torch this is SDPA with a mask, which runs where Triton does not. It multiplies with all positions of
the view, also with those that the mask leaves out. (transformers 5.17 even copied keys and values for every
query head before that; 5.23 packs the heads of a group instead.) A decode step does little else than read
keys and values. So the kernel reads those of a row once for all heads of a group, where they lie in the
cache, and not one position beyond the row's length. A CUDA graph freezes all arguments except memory. The
kernel reads the lengths from memory, so one graph serves all lengths.

The softmax is computed while the keys go by (arXiv 1805.02867). Over the keys so far, with u = log2(e) s, it
keeps

    top = max u_j,   total = sum 2^(u_j - top),   acc = sum 2^(u_j - top) values_j

If a block has a higher maximum, all earlier terms were computed with the old one. They are corrected by
multiplying total and acc by 2^(old top - new top). In the end out = acc / total.

There is one program for each row and key-value head, so few rows leave most multiprocessors idle. Then each
row's keys are divided among several programs i = 0, 1, .., and `_merge` adds up what these found, out_i, with
weights total_i 2^(top_i). For this each program also stores lse_i = top_i + log2(total_i):

    out = sum_i 2^(lse_i - max lse) out_i / sum_i 2^(lse_i - max lse)
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e20)  # below every score; finite, because -inf - -inf would be NaN
LOG2E = tl.constexpr(1.4426950408889634)


def decode_attention(q, keys, values, lengths, scale: float | None = None) -> torch.Tensor:
    """q [rows, heads, D], keys and values [rows, kv_heads, L, D] as views of a cache, lengths [rows] of whole
    numbers from 0 to L -> [rows, heads, D]. All but lengths have the same dtype: fp32, bf16 or fp16.

    `scale` is D ** -0.5 by default. Products are summed in fp32, and fp32 inputs are multiplied in full fp32,
    not in TF32. The result depends on the content of no other row. For the same shapes it is the same bit for
    bit every time. Raises ValueError for shapes and dtypes that do not fit; a length beyond L is not noticed,
    because the CPU would have to wait for the GPU."""
    (rows, heads, size), kv_heads, positions = q.shape, keys.shape[1], keys.shape[2]
    if not (q.dtype == keys.dtype == values.dtype and q.stride(2) == keys.stride(3) == values.stride(3) == 1):
        raise ValueError("q, keys and values must have one dtype, and a head's entries must be adjacent")
    if heads % kv_heads or keys.shape != (rows, kv_heads, positions, size) or values.shape != keys.shape:
        raise ValueError(f"shapes do not fit: q {q.shape}, keys {keys.shape}, values {values.shape}")
    if lengths.shape != (rows,) or lengths.is_floating_point():
        raise ValueError(f"lengths must be {rows} whole numbers: {lengths.dtype} {lengths.shape}")
    width = max(16, triton.next_power_of_2(size))
    # A block of keys has about 16 kB, so that three programs fit the shared memory of a multiprocessor.
    block = max(16, min(64, 16384 // (width * q.element_size())))
    splits = number_of_splits(rows * kv_heads, positions)
    out = torch.empty(rows, heads, size, dtype=q.dtype, device=q.device)
    parts, lse = out, None
    if splits > 1:
        parts = torch.empty(splits, rows, heads, size, dtype=torch.float32, device=q.device)
        lse = torch.empty(splits, rows, heads, dtype=torch.float32, device=q.device)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter cannot multiply bf16 numbers
    if rows:
        with torch.cuda.device_of(q):
            _attend[(rows, kv_heads, splits)](
                q, keys, values, lengths.contiguous(), parts, lse, size**-0.5 if scale is None else scale,
                *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], GROUP=heads // kv_heads, D=size,
                TILE=max(16, triton.next_power_of_2(heads // kv_heads)), WIDTH=width, BLOCK=block,
                IN_FP32=interpreted, num_warps=4, num_stages=3,
            )  # fmt: skip
            if splits > 1:
                _merge[(rows * heads,)](parts, lse, out, rows * heads, D=size, WIDTH=width, SPLITS=splits)
    return out


def number_of_splits(programs: int, positions: int) -> int:
    """Among how many programs a row's keys are divided, a power of two. `positions` is the length of the
    view. The number depends on shapes alone, because a CUDA graph freezes it, and so that a result can be
    repeated.

    Two programs for each of the 132 multiprocessors of an H200, with 128 positions or more for each program,
    were within 2 % of the best choice in all shapes that were measured (bench/RESULTS.md). More than 32
    parts would not fit the registers of `_merge`."""
    splits = 1
    while programs * splits * 2 <= 2 * 132 and positions >= splits * 2 * 128 and splits < 32:
        splits *= 2
    return splits


@triton.jit
def _attend(
    q, keys, values, lengths, out, lse, scale,
    q_row, q_head, k_row, k_head, k_key, v_row, v_head, v_key,  # strides
    GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    IN_FP32: tl.constexpr,
):  # fmt: skip
    # One program: one row, one key-value head, one part of the keys. The matrix unit multiplies tiles whose
    # sides are powers of two, 16 at least: so a group of heads is padded to TILE, and D to WIDTH.
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    member, d, block = tl.arange(0, TILE), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    heads = kv_head * GROUP + member  # [TILE] query heads
    query_mask = (member < GROUP)[:, None] & (d < D)[None, :]
    query = tl.load(q + row * q_row + heads[:, None] * q_head + d[None, :], mask=query_mask, other=0.0)
    keys += row * k_row + kv_head * k_head
    values += row * v_row + kv_head * v_head
    unit = scale * LOG2E
    length = tl.load(lengths + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), BLOCK) * BLOCK
    first = part * share
    last = tl.minimum(first + share, length)

    top = tl.full([TILE], FLOOR, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, WIDTH], tl.float32)
    for start in range(first, last, BLOCK):
        ids = start + block
        # Past the length there may be anything, NaN too. It is not read, because 0 * NaN is NaN.
        key_mask = (ids < last)[:, None] & (d < D)[None, :]
        key = tl.load(keys + ids[:, None] * k_key + d[None, :], mask=key_mask, other=0.0)  # [BLOCK, WIDTH]
        value = tl.load(values + ids[:, None] * v_key + d[None, :], mask=key_mask, other=0.0)
        u = _multiply(query, tl.trans(key), IN_FP32) * unit  # [TILE, BLOCK]
        u = tl.where((ids < last)[None, :], u, float("-inf"))
        higher = tl.maximum(top, tl.max(u, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(u - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + _multiply(p.to(value.dtype), value, IN_FP32)
        top = higher

    nonzero = tl.where(total == 0.0, 1.0, total)  # a part without keys stores 0 / 1, not 0 / 0
    n = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * GROUP
    index = part * n + row * tl.num_programs(1) * GROUP + heads  # in [parts, rows, heads]
    tl.store(out + index[:, None] * D + d[None, :], acc / nonzero[:, None], mask=query_mask)
    if lse is not None:
        tl.store(lse + index, top + tl.log2(nonzero), mask=member < GROUP)


@triton.jit
def _multiply(a, b, IN_FP32: tl.constexpr):
    if IN_FP32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _merge(parts, lse, out, n, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One program: one of the n = rows * heads results."""
    i, part, d = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    lse_i = tl.load(lse + part * n + i)
    weight = tl.exp2(lse_i - tl.max(lse_i, 0))
    index = (part * n + i)[:, None] * D + d[None, :]
    out_i = tl.load(parts + index, mask=(d < D)[None, :], other=0.0)
    tl.store(out + i * D + d, tl.sum(weight[:, None] * out_i, 0) / tl.sum(weight, 0), mask=d < D)
