"""python -m pytest tests/test_optim.py

The tests are about weights in two halves, and an AdamW that trains them as torch trains fp32 weights.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from optim import AdamW, clip_factor, join, rounding_notes, split

SIZES = (
    (33, 7),
    (1, 13),
    (129, 50),
    (301,),
    (64, 2),
)  # with slices of 64: one, many, whole ones, one cut short
LR = 1e-6


@pytest.fixture
def small_slices(monkeypatch):
    assert optim.SLICE % 64 == 0 and optim.SLICE <= 1 << 24
    monkeypatch.setattr(optim, "SLICE", 64)


def as_model(*tensors: torch.Tensor) -> torch.nn.Module:
    """A module with these parameters, named 0, 1, ..."""
    return torch.nn.ParameterList([torch.nn.Parameter(x.clone()) for x in tensors])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start_weights() -> list[torch.Tensor]:
    """fp32 weights of the sizes of a language model's, from 0.02 to 10, and denormal ones."""
    scales = 0.02, 1.0, 0.05, 10.0, 1e-40
    return [scale * normal(*size, seed=i) for i, (size, scale) in enumerate(zip(SIZES, scales, strict=True))]


def in_halves(full: list[torch.Tensor], lr: float, weight_decay: float) -> AdamW:
    """The optimizer of a bf16 model with these weights."""
    optimizer = AdamW(as_model(*(x.bfloat16() for x in full)), lr, weight_decay)
    optimizer.load_weights(as_model(*full))
    return optimizer


def set_gradients(optimizer: AdamW, step: int):
    for i, p in enumerate(optimizer.parameters.values()):
        scale = 10.0 ** (i - 2 + step % 3)
        p.grad = (scale * normal(*p.shape, seed=100 * step + i)).to(p.dtype)


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].contiguous().view(-1).view(torch.uint8).equal(b[name].view(-1).view(torch.uint8)), name


# ------------------------------------------------------------------------------------------------------------
# halves


def from_bits(bits) -> torch.Tensor:
    return torch.tensor([b - (1 << 32) if b >> 31 else b for b in bits], dtype=torch.int32).view(
        torch.float32
    )


def bits_of(x: torch.Tensor) -> list[int]:
    return [b & 0xFFFFFFFF for b in x.view(torch.int32).tolist()]


def check_halves(full: torch.Tensor):
    """All bits come back, bits(full) is the sum of the docstring, and the upper half is the nearest number,
    away from zero if there are two."""
    upper, lower = split(full)
    assert (upper.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    assert join(upper, lower).view(torch.int32).equal(full.view(torch.int32))
    summed = (upper.view(torch.int16).long() << 16) + lower
    assert ((summed - full.view(torch.int32)) % (1 << 32) == 0).all()
    usual = full.abs() <= torch.finfo(torch.bfloat16).max
    x, nearest = full[usual].double(), full[usual].bfloat16()
    off, least = (upper[usual].double() - x).abs(), (nearest.double() - x).abs()
    assert (off == least).all()
    tie = upper[usual] != nearest
    assert (upper[usual].double().abs() >= nearest.double().abs()).all()
    assert (lower[usual][tie] == -(1 << 15)).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_halves_of_any_bits(bits):
    check_halves(from_bits(bits))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**16 - 1), st.integers(-(2**15), 2**15 - 1))
def test_any_two_halves_are_those_of_their_number(upper, lower):
    """The other direction: no pair is changed by `join` and `split`."""
    upper = torch.tensor([upper - (upper >> 15 << 16)], dtype=torch.int16).view(torch.bfloat16)
    lower = torch.tensor([lower], dtype=torch.int16)
    again = split(join(upper, lower))
    assert again[0].view(torch.int16).equal(upper.view(torch.int16)) and again[1].equal(lower)


def test_halves_of_all_exponents_and_ties():
    """Every upper half, so all signs, exponents, denormals, infinities and NaNs, with lower halves at both
    ends, in the middle, and next to these."""
    upper = torch.arange(1 << 16) << 16
    for low in (0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF):
        check_halves((upper + low).to(torch.int32).view(torch.float32))


def test_a_tie_goes_away_from_zero():
    full = torch.tensor([1 + 2**-8, -1 - 2**-8])  # torch's rounding takes the even neighbour, 1
    assert full.bfloat16().tolist() == [1, -1]
    upper, lower = split(full)
    assert upper.tolist() == [1 + 2**-7, -1 - 2**-7] and lower.tolist() == [-(2**15)] * 2


def test_infinities_and_nans():
    """An infinity and the NaNs that arithmetic gives stay what they are in the upper half, so that a model
    that is broken shows it. Numbers above the largest bf16 number are infinite there, but not when joined."""
    infinity = torch.tensor([math.inf, -math.inf])
    nan = torch.cat([infinity - infinity, 0 * infinity, torch.tensor([math.nan]), -torch.tensor([math.nan])])
    assert split(infinity)[0].equal(infinity.bfloat16()) and split(nan)[0].isnan().all()
    largest = torch.tensor([torch.finfo(torch.float32).max])
    assert split(largest)[0].isinf().all() and join(*split(largest)).equal(largest)


# ------------------------------------------------------------------------------------------------------------
# steps


@pytest.mark.parametrize("lr, weight_decay", [(1e-6, 0.01), (1e-6, 0.0), (1e-3, 0.1), (0.05, 0.01)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_steps_are_those_of_torch(small_slices, dtype, lr, weight_decay):
    """Twenty steps with a warm-up, decay and clipping leave the weights and moments of torch's fused AdamW,
    bit for bit. Matrices are decayed and vectors are not."""
    full = start_weights()
    optimizer = in_halves(full, lr, weight_decay)
    if dtype == torch.float32:
        optimizer = AdamW(as_model(*full), lr, weight_decay)
    plain = as_model(*full)
    groups = [
        {"params": [p for p in plain if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in plain if p.ndim == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=lr, fused=True)
    for step in range(20):
        set_gradients(optimizer, step)
        factor = clip_factor(optimizer.grad_norm(), 1.0)
        for p, q in zip(optimizer.parameters.values(), plain, strict=True):
            q.grad = p.grad.float() * factor
        optimizer.lr = lr * min(1.0, (step + 1) / 10)
        for group in theirs.param_groups:
            group["lr"] = optimizer.lr
        optimizer.step(factor)
        theirs.step()
        assert_same_bits(optimizer.full_weights(), {str(i): p.detach() for i, p in enumerate(plain)})
    for (name, state), p in zip(optimizer.state.items(), plain, strict=True):
        assert_same_bits({k: state[k] for k in ("exp_avg", "exp_avg_sq", "step")}, theirs.state[p])
        upper = split(p.detach())[0] if dtype == torch.bfloat16 else p
        assert optimizer.parameters[name].equal(upper)


def test_a_parameter_without_a_gradient_is_left_out():
    """It counts no step either, as in torch, where the first step of a parameter is the largest."""
    optimizer = in_halves(start_weights(), 0.1, 0.1)
    before = optimizer.full_weights()["1"]
    set_gradients(optimizer, 0)
    optimizer.parameters["1"].grad = None
    optimizer.step(clip_factor(optimizer.grad_norm(), 1.0))
    assert optimizer.full_weights()["1"].equal(before)
    assert [state["step"].item() for state in optimizer.state.values()] == [1, 0, 1, 1, 1]
    optimizer.zero_grad()
    assert all(p.grad is None for p in optimizer.parameters.values())


def test_what_plain_bf16_weights_would_lose():
    """At a learning rate of 1e-6 ten steps in one direction move each weight by 1e-5. Of weights of the usual
    size, 0.02, plain bf16 moves 3 %, whose numbers lie dense enough. Here all of them move."""
    full = 0.02 * normal(100, 1000)
    plain = full.bfloat16()
    optimizer = in_halves([full], LR, 0.0)
    theirs = torch.optim.AdamW([parameter := torch.nn.Parameter(plain.clone())], lr=LR, weight_decay=0.0)
    gradient = normal(100, 1000, seed=1).bfloat16()
    for _ in range(10):
        parameter.grad, optimizer.parameters["0"].grad = gradient, gradient
        theirs.step()
        optimizer.step()
    moved = {"plain": parameter != plain, "halves": optimizer.full_weights()["0"] != full}
    share = {name: x.double().mean().item() for name, x in moved.items()}
    assert share["plain"] < 0.05 and share["halves"] > 0.9999, share
    way = (optimizer.full_weights()["0"] - full).double().abs().mean().item()
    assert way == pytest.approx(10 * LR, rel=0.01)


# ------------------------------------------------------------------------------------------------------------
# the norm, and what a step touches


def test_the_norm_is_not_rounded(small_slices):
    """clip_grad_norm_ rounds the norm of bf16 gradients to bf16."""
    optimizer = in_halves(start_weights(), LR, 0.0)
    for i, p in enumerate(optimizer.parameters.values()):
        p.grad = (11.971 * normal(*p.shape, seed=i)).bfloat16()
    exact = torch.cat([p.grad.double().flatten() for p in optimizer.parameters.values()]).norm().item()
    norm = optimizer.grad_norm()
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact, rel=1e-6)
    rounded = torch.nn.utils.clip_grad_norm_(optimizer.parameters.values(), math.inf).item()
    assert (round(exact, 2), rounded) == (999.13, 1000)


def test_the_norm_of_many_gradients():
    """At the size of a real slice an fp32 sum on a CPU is good to four digits, which is enough to clip."""
    optimizer = in_halves([torch.zeros(3, optim.SLICE // 2)], LR, 0.0)
    gradient = optimizer.parameters["0"].grad = normal(3, optim.SLICE // 2).bfloat16()
    assert optimizer.grad_norm().item() == pytest.approx(gradient.double().norm().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_step_leaves_the_gradients_as_they_are(small_slices, dtype):
    full = start_weights()
    optimizer = in_halves(full, LR, 0.01) if dtype == torch.bfloat16 else AdamW(as_model(*full), LR, 0.01)
    set_gradients(optimizer, 0)
    before = {name: p.grad.clone() for name, p in optimizer.parameters.items()}
    optimizer.step(clip_factor(optimizer.grad_norm(), 0.1))
    assert_same_bits(before, {name: p.grad for name, p in optimizer.parameters.items()})


def test_the_clip_factor():
    gradient = torch.tensor([3.0, 4.0])
    assert clip_factor(torch.tensor(5.0), 1.0).item() == pytest.approx(0.2, rel=1e-6)
    assert clip_factor(torch.tensor(5.0), 7.0).item() == 1
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([p], 1.7)
    assert p.grad.equal(gradient * clip_factor(norm, 1.7))


class Allocations(TorchDispatchMode):
    """Notes the bytes of the largest new tensor."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


def test_slices_bound_the_memory(small_slices):
    """Nothing larger than a slice in fp32 is allocated for a step."""
    optimizer = in_halves([normal(100, 50)], LR, 0.01)
    set_gradients(optimizer, 0)
    p = optimizer.parameters["0"]
    with Allocations([p, p.grad, *optimizer.state["0"].values()]) as seen:
        optimizer.step(torch.tensor(0.5))
    assert 0 < seen.largest <= 4 * optim.SLICE


# ------------------------------------------------------------------------------------------------------------
# the state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_stored_state_goes_on_as_if_nothing_had_happened(tmp_path, dtype):
    def new(weights):
        full = [x.float() for x in weights]
        return in_halves(full, 0.01, 0.1) if dtype == torch.bfloat16 else AdamW(as_model(*full), 0.01, 0.1)

    def steps(optimizer, numbers):
        for step in numbers:
            set_gradients(optimizer, step)
            optimizer.step(clip_factor(optimizer.grad_norm(), 1.0))

    whole, part = new(start_weights()), new(start_weights())
    steps(whole, range(6))
    steps(part, range(3))
    save_file(part.state_dict(), tmp_path / "state")
    again = new(list(part.parameters.values()))
    again.load_state_dict(load_file(tmp_path / "state"))
    assert_same_bits(part.state_dict(), again.state_dict())
    steps(again, range(3, 6))
    assert_same_bits(whole.state_dict(), again.state_dict())
    assert_same_bits(whole.full_weights(), again.full_weights())
    dtypes = {key.rpartition(".")[2]: x.dtype for key, x in whole.state_dict().items()}
    moments = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "step": torch.float32}
    assert dtypes == moments | ({"lower": torch.int16} if dtype == torch.bfloat16 else {})


def test_the_state_of_another_model_is_refused():
    full = start_weights()
    states = [in_halves(full[:4], LR, 0).state_dict(), in_halves([x.t() for x in full], LR, 0).state_dict()]
    for state in (*states, AdamW(as_model(*full), LR, 0).state_dict()):
        optimizer = in_halves(full, LR, 0)
        before = {key: x.clone() for key, x in optimizer.state_dict().items()}
        with pytest.raises(ValueError, match="another model"):
            optimizer.load_state_dict(state)
        assert_same_bits(before, optimizer.state_dict())


def test_lower_halves_of_a_start_model():
    """Those of an fp32 model are kept, and those of a bf16 model are 0."""
    full = start_weights()
    optimizer = in_halves(full, LR, 0)
    assert_same_bits(optimizer.full_weights(), {str(i): x for i, x in enumerate(full)})
    fresh = AdamW(as_model(*(x.bfloat16() for x in full)), LR, 0)
    assert all((state["lower"] == 0).all() for state in fresh.state.values())
    assert_same_bits(fresh.full_weights(), {str(i): x.bfloat16().float() for i, x in enumerate(full)})
    plain = AdamW(as_model(*(torch.zeros_like(x) for x in full)), LR, 0)
    plain.load_weights(as_model(*full))
    assert_same_bits(plain.full_weights(), {str(i): x for i, x in enumerate(full)})


# ------------------------------------------------------------------------------------------------------------
# what is lost in fp32


@pytest.mark.parametrize("exponent, side", [*itertools.product((-3, 0, 5), (0.99, 1.01))])
def test_the_note_on_the_learning_rate_is_true(exponent, side):
    """There is a note exactly if a step leaves the largest weight where it is. The first step of AdamW is as
    long as the learning rate."""
    weight = torch.tensor([1.5 * 2.0**exponent, 0.1])
    optimizer = in_halves([weight], side * 2.0 ** (exponent - 24), 0.0)
    assert len(rounding_notes(optimizer)) == (side < 1)
    optimizer.parameters["0"].grad = torch.ones(2, dtype=torch.bfloat16)
    optimizer.step()
    assert (optimizer.full_weights()["0"] != weight).tolist() == [side > 1, True]


@pytest.mark.parametrize("lr, lost", [(1e-6, True), (1e-5, False)])
def test_the_note_on_weight_decay_is_true(lr, lost):
    full = normal(100, 100)
    optimizer = in_halves([full], lr, 0.01)
    notes = [
        note for note in rounding_notes(optimizer) if note.startswith("--weight_decay 0.01 does nothing")
    ]
    assert bool(notes) == lost
    optimizer.parameters["0"].grad = torch.zeros(100, 100, dtype=torch.bfloat16)
    for _ in range(3):
        optimizer.step()
    assert optimizer.full_weights()["0"].equal(full) == lost


def test_nothing_is_lost_where_nothing_is_asked_for():
    assert rounding_notes(in_halves([normal(3, 3)], 1e-4, 0.01)) == []
    assert rounding_notes(in_halves([1e6 * normal(3, 3)], 0.0, 0.01)) == []
