"""python -m pytest tests/test_attention.py

The attention kernel beside the formula in float64. It runs on a GPU if there is one, with all combinations,
and otherwise in Triton's interpreter, with some of them.
"""

import pytest
import torch
from test_kernels import GPU, attention  # made for the interpreter where there is no GPU

DEVICE = "cuda" if GPU else "cpu"
SIZES, GROUPS, LONG = [64, 80, 96, 128, 256], [1, 2, 3, 7, 16], [0, 1, 65, 4097]
SHORT = [130, 0, 1, 15, 16, 17, 64, 63, 97]
if GPU:
    CASES = [(size, group, lengths) for size in SIZES for group in GROUPS for lengths in (LONG, SHORT)]
    CASES += [(128, 7, list(range(0, 2048, 8))), (64, 7, list(range(600)))]
    CASES += [(128, 5, [4097]), (64, 1, [40000])]
else:
    CASES = [(size, group, SHORT) for size, group in zip(SIZES, GROUPS, strict=True)]
    CASES += [(64, 7, LONG), (128, 1, LONG), (80, 16, [0, 1, 1200]), (96, 5, [1, 1200]), (256, 4, [1, 1200])]
CASES += [(8, 2, [0, 5, 40]), (320, 1, [0, 5, 40])]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def exact(q, keys, values, lengths, scale=None):
    """The formula at the top of attention.py, in float64 on a CPU."""
    q, keys, values = q.double().cpu(), keys.double().cpu(), values.double().cpu()
    out, group = torch.zeros_like(q), q.shape[1] // keys.shape[1]
    for row, n in enumerate(lengths.tolist()):
        for head in range(q.shape[1] if n else 0):
            s = keys[row, head // group, :n] @ q[row, head] * (scale or q.shape[2] ** -0.5)
            out[row, head] = s.softmax(0) @ values[row, head // group, :n]
    return out


def inputs(size, group, lengths, dtype, kv_heads=2, room=3):
    """(q, keys, values, lengths). Keys and values are views of some slots of a larger cache, whose last
    position is not in the view, and hold NaN beyond each row's length. The heads of q are not adjacent."""
    generator = torch.Generator().manual_seed(size + group)
    n, positions = len(lengths), max(lengths) + room
    cache = torch.randn(2, n + 2, kv_heads, positions + 1, size, generator=generator)
    for row, length in enumerate(lengths):
        cache[:, row + 1, :, length:] = float("nan")
    keys, values = cache.to(DEVICE, dtype)[:, 1:-1, :, :positions]
    q = torch.randn(n, kv_heads * group, 2, size, generator=generator).to(DEVICE, dtype)[:, :, 1]
    return q, keys, values, torch.tensor(lengths, device=DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "size, group, lengths", CASES, ids=lambda x: f"{len(x)}r" if isinstance(x, list) else x
)
def test_attention(size, group, lengths, dtype):
    if dtype == torch.float16 and max(lengths) > 200:
        pytest.skip("the short cases are enough")
    args = inputs(size, group, lengths, dtype, kv_heads=1 if max(lengths) > 4000 else 2)
    out, right = attention.decode_attention(*args), exact(*args)
    assert out.dtype == dtype and out.shape == args[0].shape
    assert all(not out[row].any() for row, n in enumerate(lengths) if n == 0)
    if dtype == torch.float32:
        assert (out.double().cpu() - right).abs().max() <= 1e-5
    else:
        limit = 3e-3 if GPU or size in SIZES else 6e-3  # the interpreter truncates to bf16 where a GPU rounds
        assert (out.double().cpu() - right).norm() <= limit * right.norm()


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_how_the_keys_are_divided_does_not_matter(monkeypatch, splits):
    """With 8 parts all parts of the longest row have keys, and most parts of the others have none."""
    monkeypatch.setattr(attention, "number_of_splits", lambda programs, positions: splits)
    args = inputs(64, 3, [0, 1, 70, 500], torch.float32)
    assert (attention.decode_attention(*args).double().cpu() - exact(*args)).abs().max() <= 1e-6


def test_scores_far_apart():
    """Scores of some thousands do not overflow, and a head's largest can come first or last."""
    q, keys, values, lengths = inputs(64, 2, [150, 150], torch.float32)
    keys[0, :, 0], keys[1, :, 149] = 300 * q[0, 0], 300 * q[1, 0]
    out = attention.decode_attention(q, keys, values, lengths)
    assert (out.double().cpu() - exact(q, keys, values, lengths)).abs().max() <= 1e-5


def test_the_scale_is_that_of_the_model():
    args = inputs(64, 2, [40, 3], torch.float32)
    assert (attention.decode_attention(*args, 0.5).double().cpu() - exact(*args, 0.5)).abs().max() <= 1e-5


def test_nan_in_a_key_is_not_hidden():
    q, keys, values, lengths = inputs(64, 2, [40, 40], torch.float32)
    keys[0, 0, 7] = float("nan")
    out = attention.decode_attention(q, keys, values, lengths)
    assert out[0, :2].isnan().all() and not out[0, 2:].isnan().any() and not out[1].isnan().any()


def test_no_rows():
    q, keys, values, lengths = inputs(64, 2, [4], torch.float32)
    assert attention.decode_attention(q[:0], keys[:0], values[:0], lengths[:0]).shape == (0, 4, 64)


def test_what_does_not_fit_is_an_error():
    q, keys, values, lengths = inputs(64, 2, [4, 5], torch.float32)
    for wrong in (
        (q.bfloat16(), keys, values), (q[:, :3], keys, values), (q[:1], keys, values),
        (q, keys, values[:, :1]), (q, keys.transpose(2, 3), values), (q[..., :32], keys, values),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            attention.decode_attention(*wrong, lengths)
    for wrong in (lengths[:1], lengths.double(), lengths[:, None]):
        with pytest.raises(ValueError, match="lengths must be 2 whole numbers"):
            attention.decode_attention(q, keys, values, wrong)


def test_the_number_of_splits_fills_the_gpu():
    """It is a power of two, 1 for many rows or short caches, and a part has at least 128 positions."""
    for programs in (1, 8, 64, 264, 265, 4096):
        for positions in (1, 511, 512, 4096, 32768):
            n = attention.number_of_splits(programs, positions)
            assert n & (n - 1) == 0 and n <= 32
            assert n == 1 or (positions // n >= 128 and programs * n <= 264)
    assert attention.number_of_splits(32, 8192) == 8 and attention.number_of_splits(1024, 32768) == 1


def test_a_part_has_at_least_128_positions():
    assert [attention.number_of_splits(1, n) for n in (255, 256, 511, 512)] == [1, 2, 2, 4]


def test_keys_values_and_lengths_may_lie_in_memory_in_their_own_way():
    q, keys, values, lengths = inputs(64, 3, [40, 3, 17], torch.float32)
    expected = exact(q, keys, values, lengths)
    values = values.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)  # positions are the first axis
    lengths = torch.stack([lengths, lengths + 1], 1)[:, 0]
    assert values.stride() != keys.stride() and not lengths.is_contiguous()
    out = attention.decode_attention(q, keys, values, lengths)
    assert (out.double().cpu() - expected).abs().max() <= 1e-5


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_the_same_bits_every_time():
    for lengths in ([2000, 1, 700, 64], list(range(600))):  # 8 parts, 1 part
        args = inputs(128, 7, lengths, torch.bfloat16)
        first = attention.decode_attention(*args)
        assert all(torch.equal(first, attention.decode_attention(*args)) for _ in range(5))
