"""Attention of one new token a row to the row's own keys and values, as a Triton kernel.

For row r, and for head h, which shares the keys and values of key-value head c with the rest of its group:

    s_j = scale q[r, h] . keys[r, c, j]                        for j < lengths[r]
    out[r, h] = sum_j p_j values[r, c, j],   p = softmax(s)    (zeros if lengths[r] is 0)

reference.decode_attention is the same in plain torch. It multiplies with all positions of the view and masks
those beyond a row's length. A decode step does little else than read keys and values, so the kernel reads
those of a row once for all heads of a group, and not one position further. It takes them where they lie in
the cache, and gets the lengths as numbers in the GPU's memory: so one CUDA graph serves all lengths.

The softmax is computed while the keys go by (arXiv 1805.02867). Over the keys so far, with u = log2(e) s, it
keeps

    top = max u_j,   total = sum 2^(u_j - top),   acc = sum 2^(u_j - top) values_j

If a block has a higher maximum, all earlier terms change by the same factor, so total and acc are multiplied
by 2^(old top - new top). In the end out = acc / total.

If there are few rows, their programs do not fill the GPU. Then each row's keys are divided among several
programs, and `_merge` adds up what these found, out_i, with weights total_i 2^(top_i), so each program also
stores lse_i = top_i + log2(total_i):

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
    """q [rows, heads, D], keys and values [rows, kv_heads, L, D] as views of a cache, lengths [rows] int, at
    most L -> [rows, heads, D], all in the dtype of q, fp32, bf16 or fp16.

    `scale` is D ** -0.5 by default. Products are summed in fp32; those of fp32 inputs are exact (no TF32).
    The result depends on no other row, and is the same bit for bit for the same shapes."""
    (rows, heads, size), kv_heads, positions = q.shape, keys.shape[1], keys.shape[2]
    if not (q.dtype == keys.dtype == values.dtype and q.stride(2) == keys.stride(3) == values.stride(3) == 1):
        raise ValueError("q, keys and values must have one dtype, and a head's entries must be adjacent")
    if heads % kv_heads or keys.shape != (rows, kv_heads, positions, size) or values.shape != keys.shape:
        raise ValueError(f"shapes do not fit: q {q.shape}, keys {keys.shape}, values {values.shape}")
    width = max(16, triton.next_power_of_2(size))
    # The block of keys that is under way has 16 kB at most: three such blocks of keys and of values fit a
    # multiprocessor twice.
    block = max(16, min(64, 16384 // (width * q.element_size())))
    splits = number_of_splits(rows * kv_heads, positions)
    out = torch.empty(rows, heads, size, dtype=q.dtype, device=q.device)
    parts, lse = out, None
    if splits > 1:
        parts = torch.empty(splits, rows, heads, size, dtype=torch.float32, device=q.device)
        lse = torch.empty(splits, rows, heads, dtype=torch.float32, device=q.device)
    # Triton's interpreter cannot multiply bf16 numbers.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if rows:
        with torch.cuda.device_of(q):
            _attend[(rows, kv_heads, splits)](
                q, keys, values, lengths, parts, lse, size**-0.5 if scale is None else float(scale),
                *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], GROUP=heads // kv_heads, D=size,
                TILE=max(16, triton.next_power_of_2(heads // kv_heads)), WIDTH=width, BLOCK=block,
                FP32=interpreted, num_warps=4, num_stages=3,
            )  # fmt: skip
            if splits > 1:
                _merge[(rows * heads,)](parts, lse, out, rows * heads, D=size, WIDTH=width, SPLITS=splits)
    return out


def number_of_splits(programs: int, positions: int) -> int:
    """Among how many programs a row's keys are divided, a power of two. It depends on shapes alone, so that a
    CUDA graph is right for all lengths, and so that a result can be repeated.

    An H200 has 132 multiprocessors. With two programs for each, and at least 128 keys for a program, the time
    was least or within 2 % of it (2026-11-26; 32, 128 and 256 programs before the split, 640 to 8,192 keys of
    size 128): 0.038 ms in place of 0.123 for 8 rows of 8,192 keys."""
    splits = 1
    while programs * splits * 2 <= 2 * 132 and positions >= splits * 2 * 128:
        splits *= 2
    return splits


@triton.jit
def _attend(
    q, keys, values, lengths, out, lse, scale,
    q_row, q_head, k_row, k_head, k_key, v_row, v_head, v_key,  # strides
    GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    FP32: tl.constexpr,
):  # fmt: skip
    # One program: one row, one key-value head, one part of the keys. The matrix unit multiplies tiles whose
    # sides are powers of two, 16 at least: so a group of heads is padded to TILE, and D to WIDTH.
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    member, d, block = tl.arange(0, TILE), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    heads = head * GROUP + member
    inside = (member < GROUP)[:, None] & (d < D)[None, :]
    query = tl.load(q + row * q_row + heads[:, None] * q_head + d[None, :], mask=inside, other=0.0)
    keys += row * k_row + head * k_head
    values += row * v_row + head * v_head
    unit = scale * LOG2E
    length = tl.load(lengths + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), BLOCK) * BLOCK
    first = split * share
    last = tl.minimum(first + share, length)

    top = tl.full([TILE], FLOOR, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, WIDTH], tl.float32)
    for start in range(first, last, BLOCK):
        ids = start + block
        # Past the length there may be anything, NaN too. It is not read, because 0 * NaN is NaN.
        there = (ids < last)[:, None] & (d < D)[None, :]
        key = tl.load(keys + ids[:, None] * k_key + d[None, :], mask=there, other=0.0)  # [BLOCK, WIDTH]
        value = tl.load(values + ids[:, None] * v_key + d[None, :], mask=there, other=0.0)
        u = _dot(query, tl.trans(key), FP32) * unit  # [TILE, BLOCK]
        u = tl.where((ids < last)[None, :], u, float("-inf"))
        higher = tl.maximum(top, tl.max(u, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(u - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + _dot(p.to(value.dtype), value, FP32)
        top = higher

    some = tl.where(total == 0.0, 1.0, total)  # no key at all: 0 / 1
    parts = split * tl.num_programs(0) * tl.num_programs(1) * GROUP
    place = (parts + row * tl.num_programs(1) * GROUP + heads).to(tl.int64)
    tl.store(out + place[:, None] * D + d[None, :], acc / some[:, None], mask=inside)
    if lse is not None:
        tl.store(lse + place, top + tl.log2(some), mask=member < GROUP)


@triton.jit
def _dot(a, b, FP32: tl.constexpr):
    if FP32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _merge(parts, lse, out, n, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One program: one head of one row."""
    i, split, d = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    found = tl.load(lse + split * n + i)
    weight = tl.exp2(found - tl.max(found, 0))
    place = (split * n + i)[:, None] * D + d[None, :]
    part = tl.load(parts + place, mask=(d < D)[None, :], other=0.0)
    tl.store(out + i * D + d, tl.sum(weight[:, None] * part, 0) / tl.sum(weight, 0), mask=d < D)
