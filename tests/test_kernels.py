"""python -m pytest tests/test_kernels.py

Every test with the fixture `device` runs on the plain-torch twin and on the Triton kernel. The kernel runs on
a GPU if there is one, and otherwise in Triton's interpreter. Both are compared with the unfused formula, in
float64 and with autograd.
"""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import kernels
from kernels import chunked, reference

ROOT = Path(__file__).parent.parent
GPU = torch.cuda.is_available()
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
BIG = [pytest.param(v, 1.0, marks=gpu) for v in (128256, 151936, 152064, 262144)]
OPTIONS = {"epsilon": 0.2, "epsilon_high": 0.3, "beta": 0.1}

# When a function is defined, Triton reads TRITON_INTERPRET to decide whether the function will be
# interpreted. The functions of Triton itself, such as tl.sum, were defined when Triton was first imported,
# perhaps by transformers, and without this variable. So they are defined again with it.
with pytest.MonkeyPatch.context() as patch:
    if not GPU:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.reload(tl.standard)
        importlib.reload(tl)
    from kernels import attention, sampling, triton_loss  # noqa: F401  (for other test files too)


@pytest.fixture(params=["twin", "triton"])
def device(request, monkeypatch):
    """Makes the kernels package pick the twin or the kernel, and returns the device on which it then runs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if request.param == "triton" and not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(triton_loss, "BLOCK", 1024)  # so that shorter rows too have several blocks
    return torch.device("cuda" if request.param == "triton" and GPU else "cpu")


def exact(
    logits, target, old, ref, advantages, scale, *, epsilon, epsilon_high, beta, temperature=1.0, vocab=None
):
    """(loss, stats, gradient of the logits) of the unfused formula in float64, with autograd."""
    x, target = logits.detach().double().cpu().requires_grad_(), target.cpu()
    columns = old, ref, advantages, scale
    old, ref, advantages, scale = (None if c is None else c.double().cpu() for c in columns)
    z = x[:, :vocab] / temperature
    logp = z.log_softmax(1).gather(1, target[:, None])[:, 0]
    ratio = (logp - (logp.detach() if old is None else old)).clamp(-20, 20).exp()
    bounded = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    surrogate = -torch.minimum(ratio * advantages, bounded * advantages)
    gap = torch.zeros_like(logp) if ref is None else (ref - logp).clamp(-20, 20)
    kl = gap.exp() - gap - 1
    loss = (scale * (surrogate + beta * kl)).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    clipped = (bounded * advantages < ratio * advantages).double()
    stats = {"logps": logp, "entropy": torch.special.entr(z.softmax(1)).sum(1), "kl": kl, "clipped": clipped}
    return loss.detach(), {name: value.detach() for name, value in stats.items()}, gradient


def rows(vocab: int, dtype, device, temperature: float = 1.0, seed: int = 0):
    """Arguments of grpo_loss_from_logits for ten rows. For both signs of the advantage the ratio is above,
    inside and below the clip, and log-ratios of +-200 occur."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.tensor([1.0, 4.0]).repeat(5)[:, None]
    logits = (torch.randn(10, vocab, generator=generator) * sigma).to(dtype)
    target = torch.randint(vocab, (10,), generator=generator)
    target[0], target[3], target[-1] = 0, vocab - 1, vocab - 1
    logp = (logits.double() / temperature).log_softmax(1).gather(1, target[:, None])[:, 0]
    gap = torch.tensor([math.log(1.5), 0.1, -math.log(2), 200.0, -200.0]).repeat(2)
    ref = logp + torch.randn(10, generator=generator)
    ref[5:7] += torch.tensor([200.0, -200.0])
    advantages = torch.tensor([1.3] * 5 + [-0.7] * 5)
    scale = torch.rand(10, generator=generator) + 0.1
    columns = (logp - gap).float(), ref.float(), advantages, scale
    return [x.to(device) for x in (logits, target, *columns)]


def distance(a, b) -> float:
    """The norm of a - b relative to that of b."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def agrees(args, **options):
    """Asserts that all results of grpo_loss_from_logits agree with those in float64."""
    logits = args[0].clone()
    want_loss, want, gradient = exact(*args, **OPTIONS, **options)
    options["vocab_size"] = options.pop("vocab", None)
    loss, stats = kernels.grpo_loss_from_logits(logits, *args[1:], **OPTIONS, **options)
    stats = {name: value.double().cpu() for name, value in stats.items()}
    largest = args[0].float()[args[0].isfinite()].abs().max().cpu()
    near = max(1e-5, 4 * (torch.nextafter(largest, torch.tensor(math.inf)) - largest).item())
    assert (stats["logps"] - want["logps"]).abs().max() <= near
    assert (stats["entropy"] - want["entropy"]).abs().max() <= near
    if args[3] is not None:
        x = (args[3].double().cpu() - want["logps"]).clamp(-20, 20)
        assert ((stats["kl"] - want["kl"]).abs() <= near * x.exp().clamp(min=1)).all()
    assert torch.equal(stats["clipped"], want["clipped"])
    # In bf16 one rounding is allowed. Triton's interpreter truncates where a GPU rounds, which costs twice as
    # much.
    rounding = 1e-5 if logits.dtype == torch.float32 else 8e-3 if interpreted() else 4e-3
    knows_ratio = args[2] is not None or args[3] is not None  # exp(logp - old) is as uncertain as logp
    assert distance(logits, gradient) <= (max(rounding, near) if knows_ratio else rounding)
    assert loss.item() == pytest.approx(want_loss.item(), rel=near, abs=near)


# ------------------------------------------------------------------------------------------------------------
# from given logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab, temperature", [(7, 0.7), (1000, 1.0), (2053, 0.7), (32000, 1.0), *BIG])
def test_loss_stats_and_gradient(device, monkeypatch, vocab, temperature, dtype):
    if vocab == 32000:
        monkeypatch.setattr(triton_loss, "BLOCK", 8192)
    agrees(rows(vocab, dtype, device, temperature), temperature=temperature)


def test_without_old_or_reference_logps(device):
    """Without old_logps they are the policy's own. Then the ratio is 1 and nothing is clipped, but there is a
    gradient."""
    args = rows(2053, torch.float32, device)
    agrees([*args[:2], None, *args[3:]])
    agrees([*args[:3], None, *args[4:]])
    agrees([*args[:2], None, None, *args[4:]])
    _, stats = kernels.grpo_loss_from_logits(args[0], args[1], None, None, *args[4:], **OPTIONS)
    assert (stats["clipped"] == 0).all() and (stats["kl"] == 0).all() and (args[0] != 0).any(1).all()


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter warns of what should overflow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_minus_infinity_and_equal_logits(device, dtype):
    """-inf stands at the beginning of a row, near its end, in whole blocks, and everywhere but in one column.
    In two rows all logits are equal."""
    args = rows(2053, dtype, device, 0.7)
    logits, target = args[:2]
    logits[1, 5:900] = -math.inf
    logits[2, :1100] = logits[3, 1000:-1] = -math.inf
    logits[4, 1:] = -math.inf
    logits[8], logits[9] = 0.0, -15.0
    target[1], target[2], target[4] = 2, 1500, 0
    logp = (logits.double() / 0.7).log_softmax(1).gather(1, target[:, None])[:, 0]
    args[2:4] = ((logp + torch.linspace(a, -a, 10, device=device)).float() for a in (1, -1.5))
    agrees(args, temperature=0.7)
    want, masked = logits.clone(), logits.clone()
    masked[masked == -math.inf] = torch.finfo(dtype).min  # some models mask with this number instead of -inf
    for x in (want, masked):
        loss, stats = kernels.grpo_loss_from_logits(x, *args[1:], **OPTIONS, temperature=0.7)
    assert torch.equal(want, masked) and loss.isfinite() and stats["entropy"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_of_ten_thousand(device, dtype):
    """Near 1e4, fp32 numbers are 1e-3 apart. The probabilities are still exact, because the maximum is
    subtracted before anything is rounded."""
    args = rows(2053, dtype, device, 0.7)
    args[0][:4] += 1e4
    args[0][4:7] -= 1e4
    args[0][7:] *= 1e4 / args[0][7:].abs().amax(1, keepdim=True)
    args[1][8] = args[0][8].argmax()
    agrees([*args[:2], None, None, *args[4:]], temperature=0.7)
    logp = (args[0].double() / 0.7).log_softmax(1).gather(1, args[1][:, None])[:, 0]
    args[2:4] = ((logp + a).float() for a in (0.1, -0.5))
    agrees(args, temperature=0.7)


def test_kl_of_close_policies(device):
    """For small x a plain exp(x) - x - 1 loses every digit. With a reference 1e-3 away kl is 5e-7, and it has
    to be right to 1 %."""
    args = rows(2053, torch.float32, device)
    logp = exact(*args, **OPTIONS)[1]["logps"]
    args[3], args[4] = (logp + 1e-3).float().to(device), torch.zeros(10, device=device)
    logits = args[0].clone()
    _, stats = kernels.grpo_loss_from_logits(logits, *args[1:], **OPTIONS)
    x = args[3].double() - stats["logps"].double()  # the rounding of logps is not tested here
    assert torch.allclose(stats["kl"].double(), x.expm1() - x, rtol=1e-2, atol=0)
    assert distance(logits, exact(*args, **OPTIONS)[2]) < 1e-2


def test_gradient_by_central_differences(device):
    args = rows(7, torch.float32, device)
    inside = [i for i in range(10) if i % 5 < 3]  # beyond the clamp the loss is 1e8, too large to subtract
    args = [x[inside] for x in args]
    args[3] = args[2] + 0.5
    base, h = args[0].double().cpu(), 1e-6
    want = torch.zeros_like(base)
    for i in range(base.numel()):
        step = torch.zeros_like(base).view(-1)
        step[i] = h
        high, low = (exact(base + s * step.view_as(base), *args[1:], **OPTIONS)[0] for s in (1, -1))
        want.view(-1)[i] = (high - low) / (2 * h)
    logits = args[0].clone()
    kernels.grpo_loss_from_logits(logits, *args[1:], **OPTIONS)
    assert distance(logits, want) < 1e-5


def test_kl_alone_pulls_to_the_reference(device):
    """A step against the gradient raises the log-prob where the reference's is higher, and lowers it
    elsewhere."""
    args = rows(1000, torch.float32, device)
    args[4].zero_()
    away = torch.tensor([1.0, -1.0]).repeat(5)
    args[3] = (exact(*args, **OPTIONS)[1]["logps"] + away).float().to(device)
    gradient = args[0].clone()
    before = kernels.grpo_loss_from_logits(gradient, *args[1:], **OPTIONS)[1]["logps"]
    moved = (args[0] - 0.1 * gradient).contiguous()
    after = kernels.grpo_loss_from_logits(moved, *args[1:], **OPTIONS, gradient=False)[1]["logps"]
    assert torch.equal(after > before, args[3] > before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [1000, 1024, 1500, 2048])
def test_ids_beyond_the_vocabulary(device, dtype, vocab):
    """Whatever their logits are, they are treated as -inf, and their gradient is 0."""
    args = rows(2053, dtype, device, seed=1)
    args[0][:, vocab:] = 100.0
    args[1].clamp_(max=vocab - 1)
    agrees(args, vocab=vocab)
    logits = args[0].clone()
    kernels.grpo_loss_from_logits(logits, *args[1:], **OPTIONS, vocab_size=vocab)
    assert (logits[:, vocab:] == 0).all()


@pytest.mark.parametrize("n", [0, 1, 3, pytest.param(70_000, marks=gpu)])
def test_number_of_rows(device, n):
    args = rows(7, torch.float32, device)
    args = [x.repeat(n // 10 + 1, *[1] * (x.ndim - 1))[:n].contiguous() for x in args]
    loss, stats = kernels.grpo_loss_from_logits(args[0].clone(), *args[1:], **OPTIONS)
    assert loss.shape == () and loss.dtype == torch.float32
    assert {name: (value.shape, value.dtype) for name, value in stats.items()} == dict.fromkeys(
        ("logps", "entropy", "kl", "clipped"), ((n,), torch.float32)
    )
    if n:
        agrees(args)
    else:
        assert loss == 0


def test_rows_need_not_be_adjacent_or_aligned(device):
    """The logits may be a window of a larger buffer, and the columns may begin at an odd address. Nothing
    beside them is touched."""
    args = rows(1000, torch.float32, device)
    buffer = torch.full((10, 1013), 7.0, device=device)
    buffer[:, 5:1005] = args[0]
    odd = [torch.cat([x[:1], x])[1:] for x in args[1:]]
    assert odd[0].storage_offset() == 1
    kernels.grpo_loss_from_logits(buffer[:, 5:1005], *odd, **OPTIONS)
    assert distance(buffer[:, 5:1005], exact(*args, **OPTIONS)[2]) < 1e-5
    assert (buffer[:, :5] == 7).all() and (buffer[:, 1005:] == 7).all()
    every_second = [x.repeat_interleave(2, 0)[::2] for x in args[1:]]
    logits = args[0].clone()
    kernels.grpo_loss_from_logits(logits, *every_second, **OPTIONS)
    assert torch.equal(logits, buffer[:, 5:1005])


def test_offsets_beyond_32_bits(device):
    """The last row begins more than 2^31 elements after the first. What lies between them is not touched, so
    on a CPU it takes no memory."""
    stride = (1 << 30) + 8
    start = 0 if device.type == "cuda" else 1 << 31  # an overflowing offset stays in the buffer
    try:
        buffer = torch.empty(start + 2 * stride + 1000, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("no room for 8 GiB of addresses")
    if device.type == "cuda":
        buffer.zero_()
    args = [x[:3] for x in rows(1000, torch.bfloat16, device)]
    far = buffer.as_strided((3, 1000), (stride, 1), start)
    far.copy_(args[0])
    near = args[0].clone()
    loss, _ = kernels.grpo_loss_from_logits(far, *args[1:], **OPTIONS)
    same, _ = kernels.grpo_loss_from_logits(near, *args[1:], **OPTIONS)
    assert loss == same and torch.equal(far, near)


def test_scale_zero_gives_exactly_zero(device):
    args = rows(1000, torch.float32, device)
    args[5][::2] = 0
    kernels.grpo_loss_from_logits(args[0], *args[1:], **OPTIONS)
    assert (args[0][::2] == 0).all() and (args[0][1:3:2] != 0).any()


def test_what_is_no_number_is_not_hidden(device):
    """A logit of NaN, or a target that is no id, must not become some other number."""
    args = rows(1000, torch.float32, device)
    args[0][3, 77] = math.nan
    loss, stats = kernels.grpo_loss_from_logits(args[0].clone(), *args[1:], **OPTIONS)
    assert loss.isnan() and stats["logps"][3].isnan() and stats["logps"].isnan().sum() == 1
    for wrong in (-100, -1, 900, 1000):
        args = rows(1000, torch.float32, device)
        args[1].clamp_(max=899)
        args[1][3] = wrong
        if not interpreted() and device.type == "cpu":
            with pytest.raises(RuntimeError, match="out of bounds"):
                kernels.grpo_loss_from_logits(args[0], *args[1:], **OPTIONS, vocab_size=900)
        else:
            loss, stats = kernels.grpo_loss_from_logits(args[0], *args[1:], **OPTIONS, vocab_size=900)
            assert loss.isnan() and stats["logps"].isnan().sum() == 1


def test_without_gradient_the_logits_stay(device):
    args = rows(2053, torch.float32, device)
    logits = args[0].clone()
    loss, stats = kernels.grpo_loss_from_logits(logits, *args[1:], **OPTIONS, gradient=False)
    assert torch.equal(logits, args[0])
    want_loss, want = kernels.grpo_loss_from_logits(logits, *args[1:], **OPTIONS)
    assert loss == want_loss and all(torch.equal(stats[name], want[name]) for name in want)


def test_the_loss_of_given_logits_has_no_backward(device):
    """The gradient has replaced the logits, so autograd would read wrong logits."""
    args = rows(7, torch.float32, device)
    leaf = args[0].requires_grad_()
    loss, stats = kernels.grpo_loss_from_logits(leaf, *args[1:], **OPTIONS)
    assert not any(value.requires_grad for value in stats.values())
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------------
# from hidden states


def head(vocab: int, dtype, device, n: int = 10, width: int = 48, seed: int = 0):
    """Arguments of grpo_loss: hidden [n, width] and weight [vocab, width], whose logits are at most 20, and
    columns that fit them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    weight *= 20 / (hidden @ weight.T).abs().max()
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    target = torch.randint(vocab, (n,), generator=generator)
    logp = (hidden.double() @ weight.double().T).log_softmax(1).gather(1, target[:, None])[:, 0]
    old, ref = (logp + 0.4 * torch.randn(n, generator=generator) for _ in range(2))
    advantages, scale = torch.randn(n, generator=generator), torch.rand(n, generator=generator) + 0.1
    columns = target, old.float(), ref.float(), advantages, scale
    hidden, weight = (x.to(device).requires_grad_() for x in (hidden, weight))
    return [hidden, weight, *(x.to(device) for x in columns)]


def unfused(hidden, weight, *columns, dtype=torch.float64, **options):
    """(loss, gradient of hidden, gradient of weight) with all logits at once. The matrix products are in
    `dtype`, and the loss is computed from them exactly."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T
    loss, _, gradient = exact(logits, *columns, **OPTIONS, **options)
    logits.backward(gradient.to(logits))
    return loss, hidden.grad, weight.grad


def fused(args, **options):
    """(loss, gradient of hidden, gradient of weight, stats) from grpo_loss."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in args[:2])
    loss, stats = kernels.grpo_loss(hidden, weight, *args[2:], **OPTIONS, **options)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [7, 1000, 2053])
def test_gradients_of_hidden_and_weight(device, monkeypatch, vocab, dtype):
    """In fp32 they are within 1e-5 of float64. In bf16 they are at most 1.5 times as far from it as the
    unfused formula in bf16."""
    args = head(vocab, dtype, device)
    cpu = [x.detach().cpu() for x in args]
    _, d_hidden, d_weight = unfused(*cpu)
    bound = 1e-5, 1e-5
    if dtype == torch.bfloat16:
        rough = unfused(*cpu, dtype=torch.bfloat16)
        bound = 1.5 * distance(rough[1], d_hidden), 1.5 * distance(rough[2], d_weight)
    for size in (10, 4):  # one chunk, and three
        monkeypatch.setattr(chunked, "chunk_rows", lambda *_, size=size: size)
        _, got_hidden, got_weight, _ = fused(args)
        assert got_hidden.dtype == got_weight.dtype == dtype
        assert distance(got_hidden, d_hidden) <= bound[0]
        assert distance(got_weight, d_weight) <= bound[1]


def test_options_reach_the_loss(device):
    args = head(1000, torch.float32, device)
    args[2].clamp_(max=899)
    want = unfused(*[x.detach().cpu() for x in args], temperature=0.7, vocab=900)
    loss, d_hidden, d_weight, _ = fused(args, temperature=0.7, vocab_size=900)
    assert loss.item() == pytest.approx(want[0].item(), rel=1e-5)
    assert distance(d_hidden, want[1]) < 1e-5 and distance(d_weight, want[2]) < 1e-5
    assert (d_weight[900:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_token_logps(device, monkeypatch, dtype):
    args = head(2053, dtype, device)
    args[2].clamp_(max=1999)
    for size in (10, 3):
        monkeypatch.setattr(chunked, "chunk_rows", lambda *_, size=size: size)
        logps, entropy = kernels.token_logps(*args[:3], temperature=0.7, vocab_size=2000)
        logits = torch.cat([h @ args[1].detach().T for h in args[0].detach().split(size)])  # same rounding
        _, want, _ = exact(logits, args[2], None, None, *args[5:], **OPTIONS, temperature=0.7, vocab=2000)
        assert (logps.cpu() - want["logps"]).abs().max() < 1e-5 and not logps.requires_grad
        assert (entropy.cpu() - want["entropy"]).abs().max() < 1e-5
    assert [x.shape for x in kernels.token_logps(args[0][:0], args[1], args[2][:0])] == [(0,), (0,)]


def test_how_the_rows_are_cut_does_not_matter(device, monkeypatch):
    """Micro-batches of any sizes, with chunks of any size inside, give the same gradients."""
    args = head(1000, torch.float32, device, n=13)
    # |logit| <= 4 now, because products of other shapes differ by 1e-7 of the largest logit
    args[1].data *= 0.2
    loss, d_hidden, d_weight, stats = fused(args)
    for cuts in ([1] * 13, [5, 8], [0, 12, 1], [13]):
        monkeypatch.setattr(chunked, "chunk_rows", lambda *_, size=cuts[-1] // 2 + 1: size)
        hidden, weight = (x.detach().clone().requires_grad_() for x in args[:2])
        total, logps = 0.0, []
        for part in zip(*(x.split(cuts) for x in (hidden, *args[2:])), strict=True):
            value, seen = kernels.grpo_loss(part[0], weight, *part[1:], **OPTIONS)
            value.backward()
            total += value.item()
            logps.append(seen["logps"])
        assert total == pytest.approx(loss.item(), rel=1e-6)
        assert distance(hidden.grad, d_hidden) < 1e-6 and distance(weight.grad, d_weight) < 1e-6
        assert distance(torch.cat(logps), stats["logps"]) < 1e-6


def test_hidden_need_not_be_contiguous(device):
    args = head(1000, torch.float32, device)
    want = fused(args)
    wide = args[0].detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    turned = args[0].detach().T.contiguous().T.requires_grad_()
    for hidden in (wide, turned):
        assert not hidden.is_contiguous()
        (gradient,) = torch.autograd.grad(kernels.grpo_loss(hidden, *args[1:], **OPTIONS)[0], hidden)
        assert distance(gradient, want[1]) < 1e-5  # other layouts, other orders of summation


def test_tied_weights(device):
    """The head is the embedding too, so its gradient is the sum of both uses."""
    args = head(1000, torch.float32, device)
    table, ids = args[1].detach(), torch.arange(10) * 7

    def gradient(table, loss_of):
        table = table.clone().requires_grad_()
        loss_of(table[ids] * 0.3, table).backward()
        return table.grad

    want = gradient(table.double().cpu(), lambda h, w: plain_loss(h @ w.T, *(x.cpu() for x in args[2:])))
    got = gradient(table, lambda h, w: kernels.grpo_loss(h, w, *args[2:], **OPTIONS)[0])
    assert distance(got, want) < 1e-5


def plain_loss(logits, target, old, ref, advantages, scale):
    """The loss by the same formula, as a graph of plain operations."""
    logp = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    ratio, x = (logp - old).clamp(-20, 20).exp(), (ref - logp).clamp(-20, 20)
    free, held = ratio * advantages, ratio.clamp(0.8, 1.3) * advantages
    return (scale * (0.1 * (x.exp() - x - 1) - torch.minimum(free, held))).sum()


@pytest.mark.slow
def test_the_gradient_of_a_bf16_head_is_summed_in_fp32(device, monkeypatch):
    """It is rounded to bf16 once, after all chunks, so it is the same with 50 chunks as with one, except for
    the rounding of each product on a CPU."""
    args, got = head(50, torch.bfloat16, device, n=100), []
    for size in (100, 2):
        monkeypatch.setattr(chunked, "chunk_rows", lambda *_, size=size: size)
        got.append(fused(args)[2])
    assert {x.dtype for x in got} == {torch.bfloat16} and distance(*got) < 4e-3


def test_no_rows_at_all(device):
    args = head(1000, torch.float32, device)
    args = [args[0][:0], args[1], *(x[:0] for x in args[2:])]
    loss, d_hidden, d_weight, stats = fused(args)
    assert loss == 0 and d_hidden.shape == (0, 48) and stats["logps"].shape == (0,)
    assert d_weight.shape == (1000, 48) and (d_weight == 0).all()


def test_a_second_backward_is_an_error(device):
    args = head(7, torch.float32, device)
    loss, stats = kernels.grpo_loss(*args, **OPTIONS)
    assert not any(value.requires_grad for value in stats.values())
    loss.backward(retain_graph=True)
    kept = args[0].grad.clone()
    with pytest.raises(RuntimeError, match="already taken"):
        loss.backward()
    assert torch.equal(args[0].grad, kept)
    loss, _ = kernels.grpo_loss(*args, **OPTIONS)
    loss = loss * torch.ones((), device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss, args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_scales_and_leaves_out_what_is_frozen(device):
    args = head(1000, torch.float32, device)
    want = fused(args)
    (3 * kernels.grpo_loss(*args, **OPTIONS)[0]).backward()
    assert distance(args[0].grad, 3 * want[1]) < 1e-6 and distance(args[1].grad, 3 * want[2]) < 1e-6
    for frozen in (0, 1):
        part = [x.detach() for x in args]
        part[1 - frozen].requires_grad_()
        kernels.grpo_loss(*part, **OPTIONS)[0].backward()
        assert part[frozen].grad is None
        assert distance(part[1 - frozen].grad, want[2 - frozen]) < 1e-6
    with torch.no_grad():
        loss, _ = kernels.grpo_loss(*args, **OPTIONS)
    assert loss == want[0] and not loss.requires_grad


# ------------------------------------------------------------------------------------------------------------
# in training


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def count_rows(monkeypatch) -> list[int]:
    """A list that gets, for each chunk from now on, how many rows of logits were visited."""
    seen, real = [], kernels.grpo_loss_from_logits

    def counted(logits, *args, **options):
        seen.append(len(logits))
        return real(logits, *args, **options)

    monkeypatch.setattr(kernels, "grpo_loss_from_logits", counted)
    return seen


def test_only_loss_tokens_are_visited(device, monkeypatch):
    """Text of the environment, prompts and padding cost no row of logits, because grpo.py applies the head to
    the loss positions alone."""
    from worlds import episodes_with_results

    import grpo
    from config import Config

    episodes = episodes_with_results()
    config = Config(micro_batch_tokens=40, bf16=False)
    batches = grpo.make_batches(episodes, [1.0, -1.0, 0.5, -0.5, 0.2], config, device)
    model, seen = tiny_model().to(device), count_rows(monkeypatch)
    for b in batches:
        grpo.policy_loss(model, b, config, vocab_size=60)
        grpo.token_logps(model, b, config, vocab_size=60)
    tokens = sum(sum(e.loss_mask) for e in episodes)
    assert len(batches) > 1 and sum(seen) == 2 * tokens == 70 < 2 * sum(len(e.ids) for e in episodes)


def test_chunks_have_the_size_that_is_set(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 4 * 1000)
    seen, args = count_rows(monkeypatch), head(1000, torch.float32, "cpu")
    kernels.grpo_loss(*args, **OPTIONS)
    kernels.token_logps(*args[:3])
    assert seen == [4, 4, 2, 4, 4, 2]


@pytest.mark.slow
@pytest.mark.parametrize("given", ["old and ref", "neither"])
def test_two_steps_through_the_kernel_equal_the_twins(monkeypatch, given):
    """After two steps of AdamW on a small model, the loss, the stats and every weight agree to 1e-5."""
    on = "cuda" if GPU else "cpu"

    def train():
        model = tiny_model().to(on)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(60, (3, 12), generator=generator).to(on)
        logged = []
        for _ in range(2):
            hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].reshape(-1, 32)
            n = len(hidden)
            old, ref, advantages, scale = torch.randn(4, n, generator=generator).to(on)
            old, ref = (x * 0.3 - 4.0 for x in (old, ref)) if given == "old and ref" else (None, None)
            weight, target = model.lm_head.weight, ids[:, 1:].reshape(-1)
            columns = target, old, ref, advantages, scale.abs() / n
            loss, stats = kernels.grpo_loss(hidden, weight, *columns, **OPTIONS, vocab_size=60)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            logged += [loss, *stats.values()]
        return [torch.cat([x.detach().cpu().flatten() for x in xs]) for xs in (logged, model.parameters())]

    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel = train()
    monkeypatch.setattr(triton_loss, "grpo_loss_from_logits", reference.grpo_loss_from_logits)
    twin = train()
    for a, b in zip(kernel, twin, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.slow
def test_which_code_runs(monkeypatch):
    """On a CPU the twin runs, or with TRITON_INTERPRET=1 the kernel. Triton is imported only if the kernel
    runs."""
    args, ran = rows(7, torch.float32, "cpu"), []
    for name, module in (("twin", reference), ("triton", triton_loss)):
        monkeypatch.setattr(module, "grpo_loss_from_logits", lambda *_, name=name, **__: ran.append(name))
    for value in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        kernels.grpo_loss_from_logits(*args, **OPTIONS)
    assert ran == ["twin", "triton"]
    code = (
        "import sys, torch, kernels; t = torch.ones(2, 5); y = torch.zeros(2, dtype=torch.long);"
        "kernels.token_logps(t, t, y); sys.exit('triton' in sys.modules)"
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ------------------------------------------------------------------------------------------------------------
# memory and speed


class Allocations(TorchDispatchMode):
    """Sums the bytes of all tensors that are allocated, including those that are freed again."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage(x) for x in [*args, *(kwargs or {}).values()]}
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if storage(x) not in given:
                self.total += x.untyped_storage().nbytes()
        return result


def storage(x):
    return x.untyped_storage().data_ptr() if isinstance(x, torch.Tensor) else None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_of_the_twin(dtype):
    """At V = 151,936 the twin allocates at most 5 MB beyond the logits, and grpo_loss allocates one chunk,
    once, beyond its results."""
    args = [x.repeat(2, *[1] * (x.ndim - 1)) for x in rows(151936, dtype, "cpu")]
    with Allocations() as made:
        reference.grpo_loss_from_logits(*args, **OPTIONS)
    assert made.total <= 5e6
    args = head(2000, torch.float32, "cpu", n=600)
    with pytest.MonkeyPatch.context() as patch, Allocations() as made:
        patch.setattr(chunked, "CHUNK_ELEMENTS", 100 * 2000)
        patch.setattr(reference, "BLOCK_ELEMENTS", 2000)
        kernels.grpo_loss(*args, **OPTIONS)
    chunk, gradients = 100 * 2000 * 4, (2000 + 600) * 48 * 4
    assert made.total <= chunk + gradients + 600 * 4 * 200


@pytest.mark.slow
def test_speed_of_the_twin():
    """In bench/RESULTS.md it is 3 times as fast as autograd. Here 1.4 times is enough, because timings are
    noisy."""
    args = [x.repeat(6, *[1] * (x.ndim - 1)) for x in rows(151936, torch.float32, "cpu")]
    args[2] = args[3]
    autograd, twin = [], []
    for _ in range(3):
        leaf, scratch = args[0].clone().requires_grad_(), args[0].clone()
        start = time.process_time()
        logps = leaf.log_softmax(1)
        with torch.no_grad():
            -(logps.exp() * logps).sum(1)
        ratio = (logps.gather(1, args[1][:, None])[:, 0] - args[2]).exp()
        (args[5] * torch.minimum(ratio * args[4], ratio.clamp(0.8, 1.3) * args[4])).sum().backward()
        middle = time.process_time()
        reference.grpo_loss_from_logits(scratch, *args[1:], **OPTIONS)
        autograd.append(middle - start)
        twin.append(time.process_time() - middle)
    assert min(autograd) > 1.4 * min(twin)


@gpu
def test_memory_on_a_gpu():
    """Besides the inputs and the gradients, memory holds one chunk of logits (at most 8,192 rows) and a few
    numbers for each row."""
    vocab, width, n = 32000, 256, 40_000
    args = head(vocab, torch.bfloat16, "cuda", n=64, width=width)
    args = [x.detach().repeat(n // 64, *[1] * (x.ndim - 1)) if i != 1 else x for i, x in enumerate(args)]
    args[0].requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.grpo_loss(*args, **OPTIONS)
    chunk, gradients = 8192 * vocab * 2, n * width * 2 + vocab * width * (4 + 2)
    assert torch.cuda.max_memory_allocated() - before <= chunk + gradients + n * 4 * 30 + (64 << 20)


@gpu
def test_more_than_2_31_logits():
    """In 15,000 rows of 151,936 logits, the stats of every row and the gradients of the first and the last
    rows are those of a small batch."""
    n, vocab = 15_000, 151_936
    args = [x[:3] for x in rows(vocab, torch.bfloat16, "cuda")]
    repeated = [x.repeat(n // 3, *[1] * (x.ndim - 1)) for x in args]
    assert repeated[0].numel() > 2**31
    _, stats = kernels.grpo_loss_from_logits(repeated[0], *repeated[1:], **OPTIONS)
    _, want = kernels.grpo_loss_from_logits(args[0], *args[1:], **OPTIONS)
    for first in (0, n - 3):
        assert torch.equal(repeated[0][first : first + 3], args[0])
    assert all(torch.equal(stats[name], want[name].repeat(n // 3)) for name in stats)


@gpu
def test_one_compilation_serves_every_n():
    """The kernel runs with 50 different numbers of rows, and with columns that begin at odd addresses."""
    args = rows(1008, torch.bfloat16, "cuda")
    repeated = [x.repeat(30, *[1] * (x.ndim - 1)) for x in args]

    def compiled() -> int:
        return len(triton_loss._visit_row.device_caches[torch.cuda.current_device()][0])

    kernels.grpo_loss_from_logits(repeated[0][:7], *(x[:7] for x in repeated[1:]), **OPTIONS)
    before = compiled()
    for n in range(1, 51):
        kernels.grpo_loss_from_logits(repeated[0][:n], *(x[n : 2 * n] for x in repeated[1:]), **OPTIONS)
    assert compiled() == before > 0


@pytest.mark.slow
def test_compiled_for_an_h200():
    """This runs on any machine, because only a launch needs the GPU. No kernel spills registers to memory.
    One compilation of the loss serves 50 different numbers of rows, and one of the draw. The loss moves 16
    bytes at a time, except for one separate read of the target's logit, and so does the draw where a block
    is whole. The attention is compiled twice, with and without a merge. Three of its programs with heads of
    128 bf16 numbers fit the shared memory of a multiprocessor, and every other one fits at least once. It
    multiplies bf16 in the matrix unit, and fp32 outside of it, since that would round to TF32."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(ROOT / "tests" / "hopper.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    loss = found.pop("loss")
    assert loss["launches"] == 50 and loss["compilations"] == 1 and loss["spilled"] == 0
    assert loss["accesses"]["b16"] == 1 and loss["accesses"]["v4.b32"] >= 8
    for kernel in ("_sum_blocks", "_pick"):
        result = found.pop(kernel)
        assert result["launches"] == 4 and result["compilations"] == 1 and result["spilled"] == 0
        assert result["accesses"]["v4.b32"] > 0
    for name, result in found.items():
        assert result["launches"] == 3 and result["compilations"] == 2 and result["spilled"] == 0
        assert result["shared"] * (3 if name == "attention 128" else 1) <= 227 * 1024
        assert result["products"] == ("none" if "fp32" in name else "mma")


@gpu
def test_full_precision_products():
    assert not torch.backends.cuda.matmul.allow_tf32, "the tolerances of fp32 are of products without TF32"
