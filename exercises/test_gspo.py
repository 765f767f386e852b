"""python -m pytest exercises/test_gspo.py          the third exercise of exercises/README.md

The loss and its gradient are compared with autograd on the formula of the paper, written once more in
`plain_loss`.
"""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import grpo
import kernels.chunked
from config import Config, check
from data import Episode, InputError, Question, Segment
from optim import AdamW
from prompts import SEARCH_R1

VOCABULARY = 40  # of the tokenizer; the head of the model is wider
REF_LOGP = -3.0  # of every token under the start model, so that the KL is not 0
#        policy tokens, tokens of the result, policy tokens; advantage; ratio s of the episode
EPISODES = [
    ((5, 3, 4), 1.0, 1.6),  # clipped: it is more probable already than the clip allows
    ((2, 9, 2), 0.7, 0.5),  # the clip is on the other side
    ((7, 2, 1), -0.8, 0.5),  # clipped: it is less probable already
    ((1, 1, 3), -1.2, 1.6),  # the clip is on the other side
    ((6, 4, 8), 0.9, 1.1),  # inside, but most of its tokens are outside
    ((3, 0, 8), -0.5, 0.9),  # likewise
    ((1, 0, 0), 0.6, 1.05),
]
ADVANTAGE = [advantage for _, advantage, _ in EPISODES]
CLIPPED = {"low": 7 + 1, "high": 5 + 4}  # policy tokens of the two clipped episodes


def config(**changes) -> Config:
    try:
        return check(replace(Config(bf16=False, loss_type="gspo", epsilon=0.2, epsilon_high=0.3), **changes))
    except InputError as error:
        pytest.fail(f"{error}: exercise 3, exercises/README.md", pytrace=False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY + 8, initializer_range=0.2, **sizes))


def logps_of(model, episode, c):
    """[tokens] The log-probs of all ids of an episode."""
    ids = torch.tensor([episode.prompt_ids + episode.ids])
    logits = model(input_ids=ids).logits[0, len(episode.prompt_ids) - 1 : -1, :VOCABULARY]
    return (logits / c.temperature).log_softmax(-1).gather(1, ids[0, len(episode.prompt_ids) :, None])[:, 0]


def make_episodes(model, c):
    """The episodes of EPISODES. Their `logps` are old log-probs, which give each the ratio s that it should
    have, while the ratios of its tokens differ."""
    generator, episodes = torch.Generator().manual_seed(5), []
    for lengths, _, ratio in EPISODES:
        ids = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (4, *lengths)]
        kinds = "model", "env", "model"
        segments = [Segment(kind, part, "") for kind, part in zip(kinds, ids[1:], strict=True)]
        mask = torch.tensor([s.kind == "model" for s in segments for _ in s.ids])
        e = Episode(Question("1", "", [""], "x"), ids[0], segments=segments, template=SEARCH_R1)
        e.ids, e.loss_mask = [i for s in segments for i in s.ids], mask.tolist()
        noise = torch.randn(len(mask), generator=generator)
        gap = torch.tensor(ratio).log() + noise - noise[mask].mean()
        e.logps = ((logps_of(model, e, c) - gap) * mask).tolist()
        episodes.append(e)
    return episodes


def plain_loss(model, episodes, c):
    """-1/G sum_i min(s_i A_i, clip(s_i) A_i) + beta KL, by one loop over the episodes."""
    loss = torch.zeros(())
    for e, advantage in zip(episodes, ADVANTAGE, strict=True):
        mask = torch.tensor(e.loss_mask)
        logps, old = logps_of(model, e, c)[mask], torch.tensor(e.logps)[mask]
        s = (logps - old).mean().exp()
        surrogate = -torch.minimum(s * advantage, s.clamp(1 - c.epsilon, 1 + c.epsilon_high) * advantage)
        x = REF_LOGP - logps
        loss = loss + (surrogate + c.beta * (x.exp() - x - 1).mean()) / len(episodes)
    return loss


def batches_of(episodes, c):
    batches = grpo.make_batches(episodes, ADVANTAGE, c, "cpu")
    for b in batches:
        b.old_logps, b.ref_logps = b.sampled_logps, torch.full_like(b.advantage, REF_LOGP)
        b.sampled_logps = b.old_logps + 1  # the sampler's log-probs are only logged
    return batches


def gradient_of(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([p.grad.flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize("tokens, chunk", [(10_000, 10_000), (10_000, 3), (60, 10_000), (1, 10_000)])
def test_loss_and_gradient_are_those_of_the_formula(model, monkeypatch, tokens, chunk):
    """In one micro-batch, in several, and with one for each episode; and where the head is applied to three
    tokens at a time, so that a chunk of logits ends within an episode."""
    monkeypatch.setattr(kernels.chunked, "CHUNK_ELEMENTS", chunk * (VOCABULARY + 8))
    c = config(micro_batch_tokens=tokens, temperature=0.7, beta=0.1)
    episodes = make_episodes(model, c)
    expected = plain_loss(model, episodes, c)
    gradient = gradient_of(model, [expected])
    results = [grpo.policy_loss(model, b, c, VOCABULARY) for b in batches_of(episodes, c)]
    assert sum(loss.item() for loss, _ in results) == pytest.approx(expected.item(), abs=1e-5)
    ours = gradient_of(model, [loss for loss, _ in results])
    assert (ours - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("number", range(len(EPISODES)))
def test_every_episode_by_itself(model, number):
    """Without the KL. The gradient of a clipped episode is 0, and that of any other is not."""
    c = config(micro_batch_tokens=10_000, beta=0.0)
    episodes = make_episodes(model, c)
    [batch] = batches_of(episodes, c)
    by_length = sorted(range(len(episodes)), key=lambda i: len(episodes[i].prompt_ids + episodes[i].ids))
    batch.advantage = batch.advantage * (batch.row == by_length.index(number))  # the others get advantage 0
    loss, _ = grpo.policy_loss(model, batch, c, VOCABULARY)
    _, advantage, s = EPISODES[number]
    value = -min(s * advantage, min(max(s, 0.8), 1.3) * advantage) / len(EPISODES)
    assert loss.item() == pytest.approx(value, abs=1e-5)
    assert (gradient_of(model, [loss]).norm() > 1e-3) == (number not in (0, 2))


def test_stats(model):
    """`update` keeps the log-probs as the old ones of the next iteration, and logs the share of clipped
    tokens. All tokens of a clipped episode count."""
    c = config(micro_batch_tokens=10_000)
    episodes = make_episodes(model, c)
    [batch] = batches_of(episodes, c)
    _, stats = grpo.policy_loss(model, batch, c, VOCABULARY)
    assert torch.allclose(stats["logps"], grpo.token_logps(model, batch, c, VOCABULARY), atol=1e-5)
    clipped = {"low": stats["clipped"][batch.advantage < 0], "high": stats["clipped"][batch.advantage > 0]}
    assert {side: x.sum().item() for side, x in clipped.items()} == CLIPPED


def test_the_first_pass_is_that_of_grpo(model):
    """All ratios are 1 there, so that gspo changes nothing while --num_iterations is 1."""
    results, rewards = [], torch.tensor([[0.0, 1.0, 1.0, 0.2]])
    for c in (config(micro_batch_tokens=60), config(micro_batch_tokens=60, loss_type="grpo")):
        batches = batches_of(make_episodes(model, c), c)
        for b in batches:
            b.old_logps = None
        results.append(gradient_of(model, [grpo.policy_loss(model, b, c, VOCABULARY)[0] for b in batches]))
    assert torch.allclose(*results, atol=1e-6)
    counted = torch.ones(1, 4, dtype=torch.bool)
    ours, theirs = (grpo.advantages(rewards, counted, loss_type) for loss_type in ("gspo", "grpo"))
    assert torch.equal(ours, theirs)


def test_an_update_of_two_iterations(model):
    """The second iteration has the ratios between the weights after and before the first."""
    c = config(micro_batch_tokens=60, num_iterations=2, beta=0.0, max_grad_norm=1e9)
    episodes, after = make_episodes(model, c), copy.deepcopy(model)
    with torch.no_grad():
        for e in episodes:
            e.logps = logps_of(model, e, c).tolist()
    once = replace(c, num_iterations=1)
    for m, settings in ((after, once), (model, c)):
        batches = grpo.make_batches(episodes, ADVANTAGE, settings, "cpu")
        metrics = grpo.update(m, None, AdamW(m, 0.0, 0.0), batches, settings, 0.01, VOCABULARY)
    assert metrics["iteration_2/loss"] == pytest.approx(plain_loss(after, episodes, c).item(), abs=1e-5)
    assert metrics["iteration_2/loss"] < metrics["loss"] - 0.01


def test_a_micro_batch_without_tokens(model):
    """One GPU of several may get such a one."""
    batch, c = grpo.empty_batch("cpu"), config()
    batch.old_logps = torch.zeros(0)
    loss, _ = grpo.policy_loss(model, batch, c, VOCABULARY)
    assert loss.item() == 0 and gradient_of(model, [loss]).abs().max() == 0
