"""python -m pytest tests/test_sampling.py

The draw as a kernel beside its twin in plain torch, reference.sample. The kernel runs on a GPU if there is
one, and otherwise in Triton's interpreter.
"""

import pytest
import torch
from test_kernels import GPU, sampling  # made for the interpreter where there is no GPU

from kernels import reference

DEVICE, ROWS = ("cuda", 10_000) if GPU else ("cpu", 60)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 1024)  # so that shorter rows too have several blocks
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def draws(rows, width, dtype, seed=0, scale=3):
    """Logits, and a random number for each row."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, width, generator=generator)).to(DEVICE, dtype)
    return logits, torch.rand(rows, generator=generator, dtype=torch.float64).to(DEVICE)


def agree(logits, u, temperature, vocab):
    """The tokens of the kernel are those of the twin. A few may differ, if u is within 1e-7 of the border
    between the two tokens. The log-probs are those of the tokens."""
    tokens, logps = sampling.sample(logits, u, temperature, vocab)
    assert tokens.dtype == torch.int64 and logps.dtype == torch.float32
    assert tokens.min() >= 0 and tokens.max() < vocab
    exact = logits[:, :vocab].double().cpu() / (temperature or 1.0)
    tokens, u = tokens.cpu(), u.cpu()
    right = exact.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logps.cpu().double(), right, atol=4e-6, rtol=1e-6)
    twin = reference.sample(logits.cpu(), u, temperature, vocab)[0]
    other = (tokens != twin).nonzero()[:, 0]
    assert len(other) <= max(1, len(u) // 1000)
    for row in other.tolist():
        cdf = exact[row].softmax(-1).cumsum(-1)
        low, high = sorted((tokens[row].item(), twin[row].item()))
        assert temperature > 0 and (cdf[low:high] - u[row]).abs().max() <= 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("vocab, width", [(70, 70), (1024, 1030), (2500, 2504)])
def test_the_draw_is_that_of_the_twin(vocab, width, temperature, dtype):
    """The columns beyond the vocabulary are the most probable ones, and must not be drawn."""
    logits, u = draws(ROWS // 2, width, dtype)
    logits[:, vocab:] = 50.0
    agree(logits, u, temperature, vocab)


def test_a_vocabulary_that_is_larger_than_the_head():
    logits, u = draws(20, 1500, torch.float32)
    same = zip(sampling.sample(logits, u, 1.0, 1501), sampling.sample(logits, u, 1.0), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_real_vocabulary(temperature):
    logits, u = draws(ROWS // 20, 151_936, torch.bfloat16)
    agree(logits, u, temperature, 151_665)


def test_the_ends_of_the_distribution():
    """u = 0 draws the first token that has a probability, and the largest u below 1 the last one. Tokens of
    logit -inf are never drawn; whole blocks of them are at the start, in the middle and at the end."""
    logits = torch.full((4, 5000), -torch.inf, device=DEVICE)
    for column in (1500, 1501, 3300, 3301):
        logits[:, column] = float(column % 7)
    u = torch.tensor([0.0, 1 - 2.0**-53, 0.5, 1e-300], dtype=torch.float64, device=DEVICE)
    tokens, logps = sampling.sample(logits, u, 1.0)
    assert tokens[[0, 3]].tolist() == [1500, 1500] and tokens[1] == 3301 and logps.isfinite().all()
    agree(logits, u, 1.0, 5000)
    agree(logits, u, 0.0, 5000)


def test_the_largest_u_with_many_blocks(monkeypatch):
    """Sums of many terms in different orders differ in their last bits. So the cumulative sum can end below u
    times the total, and then the last token that has a probability is drawn."""
    monkeypatch.setattr(sampling, "BLOCK", 16)
    logits, u = draws(12, 400, torch.float32)
    logits[:, 360:] = -torch.inf
    agree(logits, torch.full_like(u, 1 - 2.0**-53), 1.0, 400)


def test_equal_logits_and_large_ones():
    u = torch.arange(16, device=DEVICE).double() / 16 + 1 / 32
    tokens, _ = sampling.sample(torch.zeros(16, 1600, device=DEVICE), u, 1.0)
    assert tokens.tolist() == [50 + 100 * i for i in range(16)]
    logits, u = draws(16, 1600, torch.float32, scale=3000)
    agree(logits, u, 1.0, 1600)


def test_small_probabilities_are_told_apart():
    """Near 1, fp32 numbers are 6e-8 apart, and each of these tokens has probability 3e-9."""
    logits = torch.zeros(2, 150_000, device=DEVICE)
    logits[:, 0] = 19.5
    agree(logits, torch.linspace(0.99955, 0.99999, 2, dtype=torch.float64, device=DEVICE), 1.0, 150_000)


def test_the_greedy_token_is_the_largest_logit():
    """Also where the logit of an earlier block is so close that the products with log2(e) are the same."""
    close = torch.linspace(1.5, 1.9, 100)
    above, log2e = close.nextafter(torch.tensor(2.0)), torch.tensor(1.4426950408889634)
    place = (close * log2e == above * log2e).nonzero()[0, 0]
    logits = torch.zeros(1, 3000, device=DEVICE)
    logits[0, 3], logits[0, 2500] = close[place], above[place]
    tokens, _ = sampling.sample(logits, torch.tensor([0.3], dtype=torch.float64, device=DEVICE), 0.0)
    assert tokens.tolist() == [2500]


def test_a_temperature_next_to_0():
    logits, u = draws(8, 1500, torch.float32)
    tokens, logps = sampling.sample(logits, u, 1e-6)
    assert torch.equal(tokens, logits.argmax(-1)) and logps.abs().max() < 1e-3


def test_the_temperature_can_be_a_tensor():
    logits, u = draws(20, 1500, torch.float32)
    for temperature in (0.0, 0.7):
        one = sampling.sample(logits, u, torch.tensor(temperature, device=DEVICE))
        other = sampling.sample(logits, u, temperature)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_no_number_is_seen():
    """The token is one of the vocabulary, and its log-prob is NaN."""
    logits, u = draws(4, 1500, torch.float32)
    logits[1, 700] = float("nan")
    tokens, logps = sampling.sample(logits, u, 1.0)
    assert logps[1].isnan() and not logps[[0, 2, 3]].isnan().any() and 0 <= tokens[1] < 1500


def test_no_rows_and_rows_that_are_not_adjacent():
    logits, u = draws(8, 1500, torch.float32)
    assert [len(x) for x in sampling.sample(logits[:0], u[:0], 1.0)] == [0, 0]
    some = sampling.sample(logits[::2], u[::2], 1.0)
    assert torch.equal(some[0], sampling.sample(logits, u, 1.0)[0][::2])
    with pytest.raises(ValueError, match="adjacent"):
        sampling.sample(logits.T, u, 1.0)


def test_the_cumulative_probability_has_to_exceed_u():
    """Here u is exactly the sum of the first two blocks, of the first three tokens, and of none. The sums of
    the kernel are exact, because every term is 1."""
    u = torch.tensor([0.5, 3 / 4096, 0.0], dtype=torch.float64, device=DEVICE)
    logits = torch.zeros(3, 4096, device=DEVICE)
    assert sampling.sample(logits, u, 1.0)[0].tolist() == [2048, 3, 0]


def test_small_probabilities_are_told_apart_beside_large_ones():
    """Between two tokens of almost 1/2 each, every token has probability 2e-9. That is lost wherever a sum is
    in fp32: inside of the first block, over a block, or over the blocks."""
    logits = torch.zeros(1, 9000, device=DEVICE)
    logits[:, 0] = logits[:, -1] = 19.5
    cdf = logits[0].double().softmax(-1).cumsum(-1)
    drawn = torch.tensor([1, 700, 1023, 1024, 5000, 8998], device=DEVICE)
    u = (cdf[drawn - 1] + cdf[drawn]) / 2
    assert torch.equal(sampling.sample(logits.expand(6, -1), u, 1.0)[0], drawn)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_far_below_0(temperature):
    """There are three blocks, which the kernel reads as four."""
    logits, u = draws(6, 2500, torch.float32)
    agree(logits - 1000, u, temperature, 2500)


def test_a_token_without_a_probability_is_not_drawn_at_the_edge_of_a_block(monkeypatch):
    """The sum over all blocks before is computed in another order than the cumulative one. At this u it is
    higher by its last bit, so the rest is below 0, and any token would exceed it."""
    monkeypatch.setattr(sampling, "BLOCK", 16)
    logits = 3 * torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    logits[:, ::16] = -torch.inf
    u = torch.tensor([0.09287376440554038], dtype=torch.float64, device=DEVICE)
    tokens, logps = sampling.sample(logits.to(DEVICE), u, 1.0)
    assert logits[0, tokens[0]] > -torch.inf and logps.isfinite().all()
