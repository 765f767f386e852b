"""python -m pytest tests/test_grpo.py

The tests are about the objective, the batch, the update, the training step and the loop, in a world of a few
words.
"""

import copy
import itertools
import json
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from worlds import VOCABULARY, episodes_with_results, lively_reward, run_main, timeless, write_world

import grpo
import kernels
from config import Config
from data import Episode, InputError, Question, Segment, load_sets, mix
from measures import step_metrics
from optim import AdamW
from retriever import BM25, Remote
from reward import METHODS, REWARDS, Reward
from signals import Signals
from simulator import CorpusSimulator

CONFIG = Config(bf16=False)
ADVANTAGE = 1.0, -0.5, 0.3, -1.0, 0.0  # of the five episodes of `episodes_with_results`


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------
# the objective


def test_advantages_golden_values():
    rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0]])
    got = grpo.advantages(rewards, torch.ones(2, 8, dtype=torch.bool), "grpo")
    std = math.sqrt(7 / 8 / 7)  # the unbiased std of one right episode in eight: 0.3536
    assert got[0, 0].item() == pytest.approx(0.875 / (std + 1e-4), abs=1e-9)
    assert got[0, 1].item() == pytest.approx(-0.125 / (std + 1e-4), abs=1e-9)
    assert got.sum(1).abs().max() < 1e-9  # each group has its mean subtracted
    plain = grpo.advantages(rewards, torch.ones(2, 8, dtype=torch.bool), "dr_grpo")
    assert plain[0, 0].item() == pytest.approx(0.875)


def test_equal_rewards_give_exactly_zero():
    """Whatever the value and the group size, rounding in the mean must not be divided by a tiny std."""
    for value, size in itertools.product([i / 100 for i in range(101)], range(2, 33)):
        rewards = torch.full((1, size), value, dtype=torch.float64)
        assert grpo.advantages(rewards, torch.ones(1, size, dtype=torch.bool), "grpo").abs().max() == 0


def test_rewards_that_differ_by_rounding_are_equal():
    rewards = torch.tensor([[0.7, 0.7 + 5e-7, 0.7, 0.7]], dtype=torch.float64)
    assert grpo.advantages(rewards, torch.ones(1, 4, dtype=torch.bool), "grpo").abs().max() == 0


def test_failed_searches_are_in_no_mean():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    counted = torch.tensor([[True, True, False, False]])
    got = grpo.advantages(rewards, counted, "dr_grpo")
    assert got.tolist() == [[0.5, -0.5, 0.0, 0.0]]
    assert grpo.advantages(rewards, torch.tensor([[True, False, False, False]]), "grpo").abs().max() == 0


def test_token_scale_by_hand():
    assert grpo.token_scale([1, 3], "grpo", 10) == [1 / 2, 1 / 6]
    assert grpo.token_scale([1, 3], "dapo", 10) == [1 / 4, 1 / 4]
    assert grpo.token_scale([1, 3], "dr_grpo", 10) == [1 / 20, 1 / 20]
    with pytest.raises(InputError, match="--loss_type ppo: must be one of grpo, dapo, dr_grpo"):
        grpo.token_scale([1, 3], "ppo", 10)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_value_of_the_first_loss(model, loss_type):
    """In the first pass every ratio is 1 and the KL is 0, so the loss is -sum(scale * advantage). With grpo
    every episode has the same total weight and the advantages of a group sum to 0, so the loss is 0. With
    the other two a long episode weighs more, so it is not. In every case there is a gradient."""
    config = replace(CONFIG, loss_type=loss_type, micro_batch_tokens=60, max_completion_length=16, beta=0.1)
    episodes = [*episodes_with_results(), *reversed(episodes_with_results())]  # two groups
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.5, 0.0], [0.2, 0.5, 1.0, 0.0, 0.0]])
    advantage = grpo.advantages(rewards, torch.ones(2, 5, dtype=torch.bool), loss_type).flatten().tolist()
    lengths = [sum(e.loss_mask) for e in episodes]
    assert len(set(lengths[:5])) == 5
    share = {  # of an episode in the loss: its token scale times its number of tokens
        "grpo": [1 / 10] * 10,
        "dapo": [n / sum(lengths) for n in lengths],
        "dr_grpo": [n / (10 * 16) for n in lengths],
    }[loss_type]
    expected = -sum(w * a for w, a in zip(share, advantage, strict=True))
    batches = grpo.make_batches(episodes, advantage, config, "cpu")
    assert len(batches) > 1
    optimizer = AdamW(model, 0.0, 0.0)
    metrics = grpo.update(model, copy.deepcopy(model), optimizer, batches, config, 0.0, VOCABULARY)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-6)
    assert abs(metrics["loss"]) < 1e-6 if loss_type == "grpo" else metrics["loss"] < -0.05
    assert metrics["grad_norm"] > 0.01 and metrics["kl"] < 1e-6


# ------------------------------------------------------------------------------------------------------------
# the batch, and the gradient of the loss over it


def gradient(model, episodes, config, advantage=ADVANTAGE) -> dict[str, torch.Tensor]:
    """The gradient of the objective, with a KL term to a model that gives every token the log-prob -3."""
    model.zero_grad()
    for b in grpo.make_batches(episodes, list(advantage), config, "cpu"):
        b.ref_logps = torch.full_like(b.advantage, -3.0)
        loss, _ = grpo.policy_loss(model, b, replace(config, beta=0.1), VOCABULARY)
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_gradient_does_not_depend_on_the_cut(model, loss_type):
    """One micro-batch, several, and one for each row give the same gradient, for episodes of different
    lengths and every loss type."""
    results = []
    for tokens in (10_000, 60, 30, 1):
        config = replace(CONFIG, loss_type=loss_type, micro_batch_tokens=tokens, max_completion_length=24)
        results.append(gradient(model, episodes_with_results(), config))
    for other in results[1:]:
        for name, g in results[0].items():
            assert (g - other[name]).abs().max() <= 1e-6 * max(1.0, g.abs().max().item()), name


def test_gradient_equals_the_plain_formula(model):
    """The whole objective is written once more here, with log_softmax over full logits and one loop over the
    episodes."""
    config = replace(CONFIG, micro_batch_tokens=10_000)
    episodes = episodes_with_results()
    ours = gradient(model, episodes, config)
    model.zero_grad()
    loss = torch.zeros(())
    for episode, a in zip(episodes, ADVANTAGE, strict=True):
        ids = torch.tensor([episode.prompt_ids + episode.ids])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        logps = logps[len(episode.prompt_ids) - 1 :]
        mask = torch.tensor(episode.loss_mask)
        x = -3.0 - logps
        term = -(logps - logps.detach()).exp() * a + 0.1 * (x.exp() - x - 1)
        loss = loss + (term * mask).sum() / mask.sum() / len(episodes)
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad - ours[name]).norm() <= 1e-5 * p.grad.norm(), name


def test_results_have_no_gradient_and_enter_no_metric(model):
    """Only tokens of the policy are loss tokens. So the head reads no position that predicts a token of a
    result, and no length counts such a token."""
    config = replace(CONFIG, micro_batch_tokens=10_000)
    episodes = episodes_with_results()
    batch = grpo.make_batches(episodes, [1.0] * 5, config, "cpu")[0]
    assert len(batch.target) == sum(sum(e.loss_mask) for e in episodes)
    parts = [{"reward": 0.0, "f": 0.0, "s": 0.0, "f1_a1": 0.0}] * 5
    before = step_metrics(episodes, parts, group_size=5, tau=0.5)
    assert before["num_tokens"] == len(batch.target) and before["completions/max_length"] == 11
    captured = []

    def capture(module, inputs, output):
        output.last_hidden_state.retain_grad()
        captured.append(output.last_hidden_state)

    model.base_model.register_forward_hook(capture)
    loss, _ = grpo.policy_loss(model, batch, config, 56)
    loss.backward()
    [hidden] = captured  # [rows, width, H]
    predicts = torch.zeros(hidden.shape[:2], dtype=torch.bool)  # positions before a token of the policy
    by_length = sorted(episodes, key=lambda e: len(e.prompt_ids + e.ids))  # the order of the rows
    for row, e in enumerate(by_length):
        for t in (t for t, chosen in enumerate(e.loss_mask) if chosen):
            predicts[row, len(e.prompt_ids) + t - 1] = True
    assert hidden.grad[~predicts].abs().max() == 0
    assert (hidden.grad[predicts].abs().amax(-1) > 0).all()
    # the text of a result is only read by the policy; it changes neither targets nor metrics
    for episode in episodes:
        for t in [t for t, chosen in enumerate(episode.loss_mask) if not chosen]:
            episode.logps[t] = 1e9
            episode.ids[t] = 5
    again = grpo.make_batches(episodes, [1.0] * 5, config, "cpu")[0]
    assert torch.equal(again.target, batch.target) and torch.equal(again.sampled_logps, batch.sampled_logps)
    assert step_metrics(episodes, parts, group_size=5, tau=0.5) == before


def test_an_episode_that_is_all_masked_teaches_nothing(model):
    """A policy that writes its search results itself may have written nothing else. Such an episode is in no
    micro-batch, but it counts in the normaliser."""
    episodes = episodes_with_results()
    advantage = (1.0, -0.5, 0.3, -1.0, 0.4)
    episodes[1].loss_mask = [False] * len(episodes[1].ids)
    whole, cut = (
        gradient(model, episodes, replace(CONFIG, micro_batch_tokens=tokens), advantage)
        for tokens in (10_000, 1)
    )
    for name, g in whole.items():
        assert (g - cut[name]).abs().max() <= 1e-6 * max(1.0, g.abs().max().item()), name
    [batch] = grpo.make_batches(episodes, list(advantage), replace(CONFIG, micro_batch_tokens=10_000), "cpu")
    assert len(batch.ids) == 4
    assert batch.scale[batch.row == batch.row.max()].sum().item() == pytest.approx(1 / 5)


# ------------------------------------------------------------------------------------------------------------
# the update


def test_a_step_raises_good_episodes_and_lowers_bad_ones(model):
    """This tests the sign of the policy gradient."""
    config = replace(CONFIG, micro_batch_tokens=10_000, beta=0.0)

    def logp_sums():
        batches = grpo.make_batches(episodes_with_results()[:2], [0.0, 0.0], config, "cpu")
        scores = torch.cat([grpo.token_logps(model, b, config, VOCABULARY) for b in batches])
        rows = torch.cat([b.row for b in batches])
        return [scores[rows == r].sum().item() for r in (0, 1)]  # row 0 is episode 1, which is shorter

    start = logp_sums()
    optimizer = AdamW(model, 0.0, 0.0)
    batches = grpo.make_batches(episodes_with_results()[:2], [1.0, -1.0], config, "cpu")
    grpo.update(model, None, optimizer, batches, config, 0.01, VOCABULARY)
    end = logp_sums()
    assert end[1] > start[1] and end[0] < start[0]


@pytest.mark.parametrize("iterations", [2, 3])
def test_every_iteration_needs_one_forward_pass(model, iterations):
    """The first iteration computes `old_logps`, so the policy needs no scoring pass. The weights are still,
    bit for bit, those of a loop that scores before its first step. The metrics of every iteration are
    compared with those of that loop."""
    config = replace(CONFIG, micro_batch_tokens=30, num_iterations=iterations, beta=0.1, max_grad_norm=0.5)
    reference, lr = copy.deepcopy(model), 0.02
    with torch.no_grad():  # so that the KL is not 0
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    plain = copy.deepcopy(model)

    # the loop that scores first
    optimizer = torch.optim.AdamW(plain.parameters(), lr=lr, weight_decay=0.0, fused=True)
    batches = grpo.make_batches(episodes_with_results(), list(ADVANTAGE), config, "cpu")
    for b in batches:
        b.old_logps = grpo.token_logps(plain, b, config, VOCABULARY)
        b.ref_logps = grpo.token_logps(reference, b, config, VOCABULARY)
    tokens, expected = sum(len(b.target) for b in batches), []
    for _ in range(iterations):
        sums = dict.fromkeys(("loss", "entropy", "kl", "low", "high"), 0.0)
        for b in batches:
            loss, stats = grpo.policy_loss(plain, b, config, VOCABULARY)
            loss.backward()
            sums["loss"] += loss.item() * tokens
            sums["entropy"] += stats["entropy"].sum().item()
            sums["kl"] += stats["kl"].sum().item()
            sums["low"] += stats["clipped"][b.advantage < 0].sum().item()
            sums["high"] += stats["clipped"][b.advantage > 0].sum().item()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), config.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        names = {"low": "clip_ratio/low_mean", "high": "clip_ratio/high_mean"}
        figures = {names.get(name, name): value / tokens for name, value in sums.items()}
        expected.append(figures | {"grad_norm": norm})

    calls = {"policy": 0, "reference": 0}

    def count(name):
        def hook(*args):
            calls[name] += 1

        return hook

    model.base_model.register_forward_hook(count("policy"))
    reference.base_model.register_forward_hook(count("reference"))
    batches = grpo.make_batches(episodes_with_results(), list(ADVANTAGE), config, "cpu")
    optimizer = AdamW(model, lr=123.0, weight_decay=0.0)
    metrics = grpo.update(model, reference, optimizer, batches, config, lr, VOCABULARY)
    assert len(batches) > 2 and calls == {"policy": iterations * len(batches), "reference": len(batches)}
    assert_equal(model.state_dict(), plain.state_dict())

    named = dict(expected[0])
    for number, figures in enumerate(expected[1:], 2):
        named |= {f"iteration_{number}/{name}": value for name, value in figures.items()}
    assert {name: metrics[name] for name in named} == pytest.approx(named, abs=1e-9)
    once_a_step = {"sampler_logp_diff/mean", "sampler_logp_diff/max", "seconds/score", "seconds/update"}
    assert metrics.keys() == named.keys() | once_a_step
    first, second = expected[:2]
    assert first["clip_ratio/low_mean"] == first["clip_ratio/high_mean"] == 0
    assert second["clip_ratio/low_mean"] > 0 and second["clip_ratio/high_mean"] > 0
    assert first["kl"] > 1e-3 and second["loss"] != first["loss"]


@pytest.mark.parametrize("flag, side, other", [("epsilon", "low", "high"), ("epsilon_high", "high", "low")])
def test_each_side_of_the_clip_has_its_flag(model, flag, side, other):
    """One side is clipped at a ratio of 1, and the other side never."""
    bounds = {"epsilon": 1.0, "epsilon_high": 1e6} | {flag: 0.0}
    config = replace(CONFIG, micro_batch_tokens=10_000, num_iterations=2, beta=0.0, **bounds)
    batches = grpo.make_batches(episodes_with_results(), list(ADVANTAGE), config, "cpu")
    optimizer = AdamW(model, 0.02, 0.01)
    metrics = grpo.update(model, None, optimizer, batches, config, 0.02, VOCABULARY)
    assert metrics[f"iteration_2/clip_ratio/{side}_mean"] > 0
    assert metrics[f"iteration_2/clip_ratio/{other}_mean"] == 0


def test_batches_can_be_used_again(model):
    """What an earlier update has stored in them, with other weights and a reference, changes nothing."""
    config, other = replace(CONFIG, micro_batch_tokens=30, num_iterations=2, beta=0.5), copy.deepcopy(model)

    def update(model, reference, batches):
        optimizer = AdamW(model, 0.02, 0.01)
        metrics = grpo.update(model, reference, optimizer, batches, config, 0.02, VOCABULARY)
        return {name: value for name, value in metrics.items() if "seconds" not in name}

    used, fresh = (
        grpo.make_batches(episodes_with_results(), list(ADVANTAGE), config, "cpu") for _ in range(2)
    )
    for _ in range(2):  # in the second update the weights are others than those of `model`
        update(other, copy.deepcopy(model), used)
    expected = update(copy.deepcopy(model), None, fresh)
    assert update(model, None, used) == expected and "kl" not in expected


def test_how_far_the_sampler_and_the_policy_are_apart(model):
    """The mean and the largest distance of their log-probs, over the tokens of all micro-batches. The largest
    one is in the first micro-batch, and there the sampler's is the higher one."""
    config = replace(CONFIG, micro_batch_tokens=30, beta=0.0)
    batches = grpo.make_batches(episodes_with_results(), list(ADVANTAGE), config, "cpu")
    for number, b in enumerate(batches):
        b.sampled_logps = grpo.token_logps(model, b, config, VOCABULARY) - 0.25 * (-1) ** number
    batches[0].sampled_logps[0] += 3.25
    metrics = grpo.update(model, None, AdamW(model, 0.1, 0.0), batches, config, 0.1, VOCABULARY)
    tokens = sum(len(b.target) for b in batches)
    assert len(batches) > 2 and metrics["sampler_logp_diff/max"] == pytest.approx(3.0, abs=1e-4)
    assert metrics["sampler_logp_diff/mean"] == pytest.approx(0.25 + 2.75 / tokens, abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_computed_again_only_with_the_flag(model, checkpointing):
    """transformers does it in train mode alone. The model is in eval mode before and after an update."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.eval()
    passes, config = [], replace(CONFIG, micro_batch_tokens=10_000, beta=0.0)
    model.base_model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: passes.append(None))
    batches = grpo.make_batches(episodes_with_results(), list(ADVANTAGE), config, "cpu")
    grpo.update(model, None, AdamW(model, 0.1, 0.0), batches, config, 0.1, VOCABULARY)
    assert len(passes) == (2 if checkpointing else 1) and not model.training


def test_update_needs_no_signal_handler(model):
    """Only `train` installs handlers. An update works without them, also outside of the main thread,
    where Python can install none."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    config = replace(CONFIG, micro_batch_tokens=10_000, beta=0.0)
    before = copy.deepcopy(model.state_dict())
    batches = grpo.make_batches(episodes_with_results(), list(ADVANTAGE), config, "cpu")
    optimizer = AdamW(model, 0.0, 0.0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(grpo.update, model, None, optimizer, batches, config, 0.1, VOCABULARY).result()
    assert any(not torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert Signals.installed is None
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


# ------------------------------------------------------------------------------------------------------------
# metrics of a step


def test_an_answer_ends_an_episode_as_an_end_token_does():
    """An episode of Search-R1 ends at </answer>, so it counts as terminated, as one with an end token
    does."""
    episodes = episodes_with_results()
    for episode, stop in zip(episodes, ["answer", "eos", "length", "turns", "answer"], strict=True):
        episode.stop = stop
    metrics = step_metrics(episodes, [{"reward": 0.0}] * 5, group_size=5, tau=0.5)
    assert metrics["completions/mean_terminated_length"] == (5 + 2 + 7) / 3
    assert metrics["completions/clipped_ratio"] == 1 / 5


def test_searches_in_the_weights_of_the_model_are_counted():
    question = Question("1", "?", ["x"], "toy")
    texts = "<search>a</search><information>b</information>" * 2, "<think>a</think>"

    def metrics(method):
        template = METHODS[method].template
        episodes = [
            Episode(question, [1], [2], [True], [0.0], [Segment("model", [2], text)], template=template)
            for text in texts
        ]
        return step_metrics(episodes, [{"reward": 0.0}] * 2, group_size=2, tau=0.5)

    ssrl = metrics("ssrl")
    assert ssrl["tools/self_searches"] == 1.0 and ssrl["tools/call_frequency"] == 0.0
    assert "tools/self_searches" not in metrics("search-r1")


# ------------------------------------------------------------------------------------------------------------
# a training step


def test_the_weights_move_and_the_first_step_is_on_policy(world, lively):
    assert run_main(world) == 0
    out = Path(world["output_dir"])
    first = timeless(out / "metrics.jsonl")[0]
    assert first["kl"] < 1e-6 and first["sampler_logp_diff/max"] < 1e-4 and first["grad_norm"] > 0
    start, end = weights(world["model"]), weights(out)
    moved = sum((start[n] != end[n]).sum().item() for n in start) / sum(v.numel() for v in start.values())
    assert moved > 0.5  # embeddings of words that occur in no episode do not move
    files = {"config.json", "metrics.jsonl", "transcripts.jsonl", "tokenizer.json"}
    assert {p.name for p in out.iterdir()} >= files
    row = json.loads((out / "transcripts.jsonl").read_text().splitlines()[0])
    assert len(row["ids"]) == len(row["loss_mask"]) == sum(s["tokens"] for s in row["segments"])


def test_what_a_step_samples_is_set_by_the_flags(world, lively, monkeypatch):
    """Questions and random numbers depend on the seed and on the step."""
    calls, real = [], grpo.rollout

    def spied(model, tokenizer, template, questions, **options):
        calls.append((questions, options))
        return real(model, tokenizer, template, questions, **options)

    monkeypatch.setattr(grpo, "rollout", spied)
    budget = {"max_searches": 2, "topk": 1, "max_doc_tokens": 7, "max_completion_length": 20}
    same = budget | {"seed": 5, "temperature": 0.9}
    flags = {name: str(value) for name, value in same.items()} | {"rollout_slots": "8", "max_steps": "3"}
    assert run_main(world | flags) == 0
    sources = load_sets(world["train"], "train")
    for step, (questions, options) in enumerate(calls):
        assert questions == mix(sources, 4, 5, step)
        expected = same | {"step": step, "slots": 8, "group_size": 4}
        assert {name: options[name] for name in expected} == expected
    assert len(calls) == 3
    rows = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert all(row["prefill_tokens"] > 0 and row["decode_tokens"] > 0 for row in rows)


def test_columns_beyond_the_vocabulary_are_in_no_softmax(world, model, lively):
    """Heads are often padded to a round width. The sampler and the loss read the same columns."""
    model.resize_token_embeddings(VOCABULARY + 8)
    model.save_pretrained(world["model"])
    assert run_main(world | {"max_steps": "1"}) == 0
    [row] = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert row["sampler_logp_diff/max"] < 1e-4


def test_sampler_policy_and_reference_have_one_temperature(world, lively):
    """The first step is on policy at any temperature, and its KL is 0."""
    assert run_main(world | {"max_steps": "1", "temperature": "0.6"}) == 0
    [row] = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert row["sampler_logp_diff/max"] < 1e-4 and row["kl"] < 1e-6


def test_the_optimizer_has_the_learning_rate_that_is_logged(world, lively, monkeypatch):
    """It rises during the warm-up, and then it is constant."""
    real, used = AdamW.step, []

    def step(self, *args, **options):
        used.append(self.lr)
        return real(self, *args, **options)

    monkeypatch.setattr(AdamW, "step", step)
    assert run_main(world | {"warmup_steps": "3", "learning_rate": "0.003"}) == 0
    logged = [row["learning_rate"] for row in timeless(Path(world["output_dir"]) / "metrics.jsonl")]
    assert logged == pytest.approx([0.001, 0.002, 0.003, 0.003])
    assert used == logged


def test_a_policy_has_no_dropout(lively, tmp_path):
    """Dropout would change the first ratio from 1 and the first KL from 0. It must be off even under gradient
    checkpointing, which needs train mode."""
    flags = write_world(tmp_path, dropout=0.5)
    assert run_main(flags | {"max_steps": "1"}, "--gradient_checkpointing") == 0
    row = timeless(Path(flags["output_dir"]) / "metrics.jsonl")[0]
    assert row["kl"] < 1e-6 and row["sampler_logp_diff/max"] < 1e-4


def test_tiny_learning_rates_move_every_weight_in_fp32(world, lively):
    """At a learning rate of 1e-6, plain bf16 weights would stay where they are."""
    assert run_main(world | {"learning_rate": "1e-6", "warmup_steps": "0"}) == 0
    start, end = weights(world["model"]), weights(world["output_dir"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert end[name].dtype == torch.float32
    assert (start[name] != end[name]).double().mean() > 0.99


def test_failed_searches_are_left_out_of_the_update(world, lively, monkeypatch):
    """If the retriever is down, the episodes are dropped and the run goes on. Here all episodes are dropped,
    so the update is skipped."""
    real = grpo.rollout

    def down(*args, **kwargs):
        episodes = real(*args, **kwargs)
        for episode in episodes:
            episode.stop = "search_failed"
        return episodes

    monkeypatch.setattr(grpo, "rollout", down)
    assert run_main(world | {"max_steps": "1"}) == 0
    row = timeless(Path(world["output_dir"]) / "metrics.jsonl")[0]
    assert row["tools/failure_frequency"] == 1 and "grad_norm" not in row
    assert_equal(weights(world["model"]), weights(world["output_dir"]))


def test_a_gradient_that_is_not_finite_is_not_applied(world, lively, monkeypatch, capsys):
    real = kernels.grpo_loss

    def broken(hidden, *args, **kwargs):
        loss, stats = real(hidden, *args, **kwargs)
        return loss * math.nan, stats

    monkeypatch.setattr(kernels, "grpo_loss", broken)
    assert run_main(world | {"max_steps": "2"}) == 0
    assert "no finite gradient" in "".join(capsys.readouterr())
    assert_equal(weights(world["model"]), weights(world["output_dir"]))


def test_a_gradient_that_is_not_finite_is_gone_in_the_next_step(world, lively, monkeypatch):
    real, scales = kernels.grpo_loss, iter([math.nan])

    def broken_once(hidden, *args, **kwargs):
        loss, stats = real(hidden, *args, **kwargs)
        return loss * next(scales, 1.0), stats

    monkeypatch.setattr(kernels, "grpo_loss", broken_once)
    assert run_main(world | {"max_steps": "2"}) == 0
    norms = [row["grad_norm"] for row in timeless(Path(world["output_dir"]) / "metrics.jsonl")]
    assert math.isnan(norms[0]) and norms[1] > 0


def test_a_step_that_is_all_masked_is_skipped(world, lively, monkeypatch, capsys):
    real = grpo.rollout

    def masked(*args, **kwargs):
        episodes = real(*args, **kwargs)
        for episode in episodes:
            episode.loss_mask = [False] * len(episode.ids)
        return episodes

    monkeypatch.setattr(grpo, "rollout", masked)
    assert run_main(world | {"max_steps": "1"}) == 0
    assert "no finite gradient" in "".join(capsys.readouterr())
    assert_equal(weights(world["model"]), weights(world["output_dir"]))


# ------------------------------------------------------------------------------------------------------------
# the methods


@pytest.fixture
def sampled(monkeypatch):
    """A list that gets (template, retriever, episodes) of every rollout of the trainer."""
    real, calls = grpo.rollout, []

    def spied(model, tokenizer, template, questions, **options):
        episodes = real(model, tokenizer, template, questions, **options)
        calls.append((template, options["retriever"], episodes))
        return episodes

    monkeypatch.setattr(grpo, "rollout", spied)
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, world, sampled):
    """Each method has its prompt, its reward, and its rule for who writes the results. The first step changes
    the policy, so the second step has a larger KL."""
    flags = world | {"method": method, "max_steps": "2", "warmup_steps": "0", "learning_rate": "0.01"}
    assert run_main(flags) == 0
    out = Path(world["output_dir"])
    first, second = timeless(out / "metrics.jsonl")
    assert all(math.isfinite(row["grad_norm"]) for row in (first, second))
    assert second["kl"] > first["kl"] and first["sampler_logp_diff/max"] < 1e-4
    for template, retriever, episodes in sampled:
        assert template is METHODS[method].template and all(e.template is template for e in episodes)
        assert (retriever is None) == (method == "ssrl")
        assert isinstance(retriever, CorpusSimulator) == (method == "zerosearch")
    stored = json.loads((out / "run.json").read_text())
    assert stored["method"] == method and stored["reward"] == ""  # this stands for the reward of the method
    rows = timeless(out / "transcripts.jsonl")
    question = Question("1", "", ["x"], "known")
    episode = Episode(question, [], template=METHODS[method].template)
    parts = METHODS[method].reward(episode, question, group=[episode])
    assert all(parts.keys() <= row.keys() for row in rows)
    assert ("sandbag_suspects" in first) == ("f1_a1" in parts) == (method == "sem")


def test_ssrl_never_touches_a_retriever(world, monkeypatch):
    """No corpus is opened and no server is called, not even for the evaluations before and after training."""

    def touched(*args, **kwargs):
        raise AssertionError("a retriever was opened")

    monkeypatch.setattr("run.open_retriever", touched)
    monkeypatch.setattr(BM25, "__init__", touched)
    monkeypatch.setattr(Remote, "__init__", touched)
    world.pop("corpus")
    assert run_main(world | {"method": "ssrl", "max_steps": "1", "eval": world["train"]}) == 0
    rows = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert [row["tools/call_frequency"] for row in rows] == [0]
    with pytest.raises(AssertionError, match="a retriever was opened"):
        run_main(world | {"method": "search-r1", "max_steps": "1", "output_dir": world["output_dir"] + "2"})


@pytest.mark.parametrize("name, flags", [("otc", {}), ("flat", {}), ("sem", {"sem_kept": "0.1"})])
def test_another_reward(name, flags, world, monkeypatch):
    """--reward replaces the reward and leaves the method as it is. The reward is called once for each
    episode, with the group and the flags that rewards may read."""
    calls, real = [], REWARDS[name]

    def spied(episode, question, **options):
        assert episode in options["group"] and len(options["group"]) == 4
        assert {e.question.id for e in options["group"]} == {question.id}
        assert options["tau"] == 0.7 and options["search_cost"] == (0.1 if flags else None)
        calls.append(name)
        return real(episode, question, **options)

    monkeypatch.setitem(REWARDS, name, Reward(spied, real.fits))
    assert run_main(world | flags | {"reward": name, "max_steps": "1", "tau": "0.7"}) == 0
    assert len(calls) == 16
    stored = json.loads((Path(world["output_dir"]) / "run.json").read_text())
    assert (stored["method"], stored["reward"]) == ("sem", name)


def test_a_failed_search_is_in_no_group(world, monkeypatch):
    """A reward that compares the episodes of a group (otc) must not see an episode whose search failed."""
    real, groups = grpo.rollout, []

    def first_fails(*args, **options):
        episodes = real(*args, **options)
        for episode in episodes[::4]:  # the first one of each group
            episode.stop = "search_failed"
        return episodes

    def reward(episode, question, *, group, **options):
        groups.append([e.stop for e in group])
        return {"reward": 0.0}

    monkeypatch.setattr(grpo, "rollout", first_fails)
    monkeypatch.setitem(REWARDS, "otc", Reward(reward))
    assert run_main(world | {"reward": "otc", "max_steps": "1"}) == 0
    assert len(groups) == 4 * 3 and all(len(stops) == 3 for stops in groups)
    assert all("search_failed" not in stops for stops in groups)
    rows = timeless(Path(world["output_dir"]) / "transcripts.jsonl")
    assert all(("reward" in row) == (row["stop"] != "search_failed") for row in rows)


def test_beside_failed_searches_every_episode_has_its_own_advantage(world, lively, monkeypatch):
    """The first episode of each group fails. The others are compared among themselves."""
    rollout, make_batches, trained = grpo.rollout, grpo.make_batches, []

    def first_fails(*args, **options):
        episodes = rollout(*args, **options)
        for episode in episodes[::4]:
            episode.stop = "search_failed"
        return episodes

    def spied(episodes, advantage, *args):
        trained.extend(zip(episodes, advantage, strict=True))
        return make_batches(episodes, advantage, *args)

    monkeypatch.setattr(grpo, "rollout", first_fails)
    monkeypatch.setattr(grpo, "make_batches", spied)
    assert run_main(world | {"max_steps": "1", "loss_type": "dr_grpo"}) == 0
    rewards = [lively_reward(e, e.question)["reward"] for e, _ in trained]
    means = [sum(rewards[i : i + 3]) / 3 for i in range(0, 12, 3)]
    assert [a for _, a in trained] == pytest.approx([r - means[i // 3] for i, r in enumerate(rewards)])
    assert len({a for _, a in trained}) > 3


@pytest.mark.parametrize("tau, share", [("0.6", 0.0), ("0.7", 1.0)])
def test_a_suspect_has_a_draft_below_tau(world, monkeypatch, tau, share):
    """In each group one episode is paid without a search, and the drafts of the others have an F1 of 0.6."""

    def reward(episode, question, *, group, **options):
        searched = float(episode is not group[0])
        return {"reward": 1.0 - searched, "f": 1.0, "s": searched, "f1_a1": 0.6}

    monkeypatch.setitem(METHODS, "sem", replace(METHODS["sem"], reward=reward))
    assert run_main(world | {"max_steps": "1", "tau": tau}) == 0
    [row] = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert row["sandbag_suspects"] == share


# ------------------------------------------------------------------------------------------------------------
# the loop


GOOD_STEP = {
    "reward": 0.0,
    "grad_norm": 1.0,
    "tools/failure_frequency": 0.0,
    "tools/call_frequency": 0.0,
    "completions/clipped_ratio": 0.0,
    "frac_reward_zero_std": 0.0,
}


def searching(failed: int, answered: int) -> list[Episode]:
    """Three episodes. In the first `failed` of them a search failed. `answered` searches were answered; the
    first of these is in episode 0, even if a later search of that episode failed."""
    episodes = episodes_with_results()[:3]
    for i, episode in enumerate(episodes):
        episode.stop = "search_failed" if i < failed else "eos"
    episodes[0].searches, episodes[1].searches = min(answered, 1), max(0, answered - 1)
    return episodes


@pytest.mark.parametrize(
    "failed, answered, stops", [(1, 0, True), (3, 2, True), (1, 1, False), (2, 2, False), (2, 3, False)]
)
def test_a_retriever_that_dies_stops_the_run(world, monkeypatch, failed, answered, stops):
    """Failed searches are compared with answered searches, not with episodes. Otherwise a policy that seldom
    searches would hide that the retriever is down. A step without any search says nothing about the
    retriever, so it is not counted among the three steps in a row, and does not interrupt them."""
    steps = iter([(failed, answered), (0, 0)] * 4)

    def step(run):
        run.step += 1
        return GOOD_STEP, searching(*next(steps))

    monkeypatch.setattr(grpo, "train_step", step)
    if stops:
        with pytest.raises(InputError, match="most searches failed"):
            run_main(world | {"max_steps": "8"})
        assert len(list(steps)) == 3  # the third step with a search was the fifth
    else:
        assert run_main(world | {"max_steps": "8"}) == 0


@pytest.mark.parametrize("norms, stops", [([math.nan] * 10, True), (([math.nan] * 9 + [1.0]) * 2, False)])
def test_ten_steps_without_a_finite_gradient_stop_the_run(world, monkeypatch, norms, stops):
    """The ten steps have to be consecutive. The run saves a checkpoint of the last one before it stops."""
    steps = iter(norms)

    def step(run):
        run.step += 1
        return GOOD_STEP | {"grad_norm": next(steps)}, []

    monkeypatch.setattr(grpo, "train_step", step)
    flags = world | {"max_steps": "20", "save_steps": "50"}
    if stops:
        with pytest.raises(InputError, match="step 10: no finite gradient ten times in a row"):
            run_main(flags)
        assert (Path(world["output_dir"]) / "checkpoint-10" / "trainer_state.json").exists()
    else:
        assert run_main(flags) == 0
