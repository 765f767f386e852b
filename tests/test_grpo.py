"""python -m pytest tests/test_grpo.py

The objective, the training step, the run directory and the command line, on a world of a few words.
"""

import itertools
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import config as config_module
import grpo
import kernels
from data import InputError, Question
from retriever import BM25, Remote
from reward import METHODS
from rollout import Episode, Segment

ROOT = Path(__file__).parent.parent
WORDS = "<pad> <eos> <think> </think> <answer> </answer> <search> </search> <result> </result>".split()
WORDS += "who is where no yes results".split()
TEMPLATE = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"


def write_world(folder: Path, dropout: float = 0.0) -> dict[str, str]:
    """A model directory, two training sets and a corpus: flags for grpo.py."""
    names = [f"w{i}" for i in range(40)]
    vocabulary = {word: i for i, word in enumerate([*WORDS, *names])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="no"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        attention_dropout=dropout,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for source, word in (("known", "who"), ("unknown", "where")):
        rows = [
            {"id": str(i), "question": f"{word} is {n}", "golden_answers": [n]} for i, n in enumerate(names)
        ]
        (folder / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [{"id": str(i), "contents": f'"{name}"\nwho is {name}'} for i, name in enumerate(names)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    return {
        "model": str(folder / "model"),
        "train": f"{folder}/known.jsonl,{folder}/unknown.jsonl",
        "corpus": f"{folder}/corpus.jsonl",
        "output_dir": str(folder / "out"),
        "prompts_per_step": "4",
        "num_generations": "4",
        "max_completion_length": "24",
        "learning_rate": "0.003",
        "max_steps": "4",
        "save_steps": "2",
        "warmup_steps": "2",
    }


def run_main(flags: dict[str, str], *more: str) -> int:
    argv = [x for name, value in flags.items() for x in (f"--{name}", value)]
    return grpo.main(*grpo.parse(grpo.Config, "grpo.py", [*argv, *more]))


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path)


@pytest.fixture
def lively(monkeypatch):
    """Rewards that differ: an untrained model earns nothing from SEM. The number of even ids, in thirds."""

    def reward(episode, question, **options):
        parts = {"f": 1.0, "s": float(episode.searches > 0), "t": 1.0, "u": 0.0, "f1_a1": 0.0, "f1_a2": 0.0}
        return {"reward": sum(i % 2 for i in episode.ids) % 3 / 2, **parts}

    monkeypatch.setitem(grpo.METHODS, "sem", replace(grpo.METHODS["sem"], reward=reward))


# ------------------------------------------------------------------------------------------------------------
# the objective


def test_advantages_golden_values():
    rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0]])
    got = grpo.advantages(rewards, torch.ones(2, 8, dtype=torch.bool), "grpo")
    std = math.sqrt(7 / 8 / 7)  # one of eight right, unbiased: 0.3536
    assert got[0, 0].item() == pytest.approx(0.875 / (std + 1e-4), abs=1e-9)
    assert got[0, 1].item() == pytest.approx(-0.125 / (std + 1e-4), abs=1e-9)
    assert got.sum(1).abs().max() < 1e-9  # each group by itself
    plain = grpo.advantages(rewards, torch.ones(2, 8, dtype=torch.bool), "dr_grpo")
    assert plain[0, 0].item() == pytest.approx(0.875)


def test_equal_rewards_give_exactly_zero():
    """Over every value and group size: rounding in the mean must not be divided by a tiny std."""
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


def episodes_with_results(vocab: int = 56) -> list[Episode]:
    """Episodes of unlike lengths: model text, a result, model text."""
    generator = torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(2, vocab, (n,), generator=generator).tolist()

    episodes = []
    for n, (before, result, after) in enumerate([(3, 4, 2), (1, 0, 1), (6, 9, 5), (2, 3, 8), (4, 0, 3)]):
        segments = [
            Segment("model", ids(before), ""),
            Segment("env", ids(result), ""),
            Segment("model", ids(after), ""),
        ]
        mask = [True] * before + [False] * result + [True] * after
        all_ids = [i for s in segments for i in s.ids]
        episode = Episode(
            Question(str(n), "", ["x"], "known"), ids(4), all_ids, mask, [-2.0] * len(mask), segments
        )
        episode.stop = "eos"
        episodes.append(episode)
    return episodes


def gradient(model, episodes, config, advantage=(1.0, -0.5, 0.3, -1.0, 0.0)) -> dict[str, torch.Tensor]:
    model.zero_grad()
    head = model.get_output_embeddings().weight
    for b in grpo.make_batches(episodes, list(advantage), config, "cpu"):
        ref = torch.full_like(b.advantage, -3.0)
        hidden = grpo.hidden_states(model, b, bf16=False)
        loss, _ = kernels.grpo_loss(
            hidden, head, b.target, None, ref, b.advantage, b.scale, epsilon=0.2, epsilon_high=0.2, beta=0.1
        )
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def model(world):
    return AutoModelForCausalLM.from_pretrained(world["model"], dtype=torch.float32)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_gradient_does_not_depend_on_the_cut(model, loss_type):
    """One micro-batch, several, one row each: the same gradient, for unlike lengths and every normaliser."""
    results = []
    for tokens in (10_000, 60, 30, 1):
        config = grpo.Config(loss_type=loss_type, micro_batch_tokens=tokens, max_completion_length=24)
        results.append(gradient(model, episodes_with_results(), config))
    for other in results[1:]:
        for name, g in results[0].items():
            assert (g - other[name]).abs().max() <= 1e-6 * max(1.0, g.abs().max().item()), name


def test_gradient_equals_the_plain_formula(model):
    """The whole objective written once more, with log_softmax over full logits and one loop over episodes."""
    config = grpo.Config(micro_batch_tokens=10_000)
    episodes, advantage = episodes_with_results(), (1.0, -0.5, 0.3, -1.0, 0.0)
    ours = gradient(model, episodes, config, advantage)
    model.zero_grad()
    loss = torch.zeros(())
    for episode, a in zip(episodes, advantage, strict=True):
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
    """Loss tokens are the policy's alone, so the head sees no result position, and lengths count none."""
    config = grpo.Config(micro_batch_tokens=10_000)
    episodes = episodes_with_results()
    batch = grpo.make_batches(episodes, [1.0] * 5, config, "cpu")[0]
    assert len(batch.target) == sum(sum(e.loss_mask) for e in episodes)
    parts = [{"reward": 0.0, "f": 0.0, "s": 0.0, "f1_a1": 0.0}] * 5
    rewards = torch.zeros(1, 5)
    config = grpo.Config(num_generations=5)
    before = grpo.episode_metrics(episodes, parts, rewards, config)
    assert before["num_tokens"] == len(batch.target) and before["completions/max_length"] == 11
    embeds = model.get_input_embeddings()(batch.ids).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    seen = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    seen[batch.row, batch.position] = True
    hidden.retain_grad()
    loss, _ = kernels.grpo_loss(
        hidden[batch.row, batch.position],
        model.get_output_embeddings().weight.detach(),
        batch.target,
        None,
        None,
        batch.advantage,
        batch.scale,
        epsilon=0.2,
        epsilon_high=0.2,
        beta=0.0,
    )
    loss.backward()
    assert hidden.grad[~seen].abs().max() == 0 and hidden.grad[seen].abs().max() > 0
    # whatever stands in the result: it only changes what the policy conditions on
    for episode in episodes:
        env = [t for t, chosen in enumerate(episode.loss_mask) if not chosen]
        for t in env:
            episode.logps[t] = 1e9
            episode.ids[t] = 5
    again = grpo.make_batches(episodes, [1.0] * 5, config.__class__(micro_batch_tokens=10_000), "cpu")[0]
    assert torch.equal(again.target, batch.target) and torch.equal(again.sampled_logps, batch.sampled_logps)
    assert grpo.episode_metrics(episodes, parts, rewards, config) == before


def test_a_step_raises_good_episodes_and_lowers_bad_ones(model):
    """The sign of the policy gradient, and of KL: with no advantage at all it pulls towards the reference."""
    config = grpo.Config(micro_batch_tokens=10_000, beta=0.0)

    def logp_sums():
        batches = grpo.make_batches(episodes_with_results()[:2], [0.0, 0.0], config, "cpu")
        scores = torch.cat([grpo.score(model, b, config, 56) for b in batches])
        rows = torch.cat([b.target.new_full(b.target.shape, 0) + b.row for b in batches])
        return [scores[rows == r].sum().item() for r in (0, 1)]  # short first: episode 1, then episode 0

    start = logp_sums()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = grpo.make_batches(episodes_with_results()[:2], [1.0, -1.0], config, "cpu")
    signals = grpo.Signals()
    signals.restore()
    grpo.update(model, None, optimizer, batches, config, 0.5, 56, signals)
    end = logp_sums()
    assert end[1] > start[1] and end[0] < start[0]


# ------------------------------------------------------------------------------------------------------------
# runs


def timeless(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if "seconds" not in k and "time" not in k and "/s" not in k}
        for row in rows
    ]


@pytest.mark.parametrize("more", [(), ("--num_iterations", "2", "--loss_type", "dapo")])
def test_resume_is_exact(world, lively, more, tmp_path):
    """N steps == k steps, stop, resume, N - k steps: weights and metrics bit for bit."""
    assert run_main(world | {"output_dir": str(tmp_path / "whole")}, *more) == 0
    part = world | {"output_dir": str(tmp_path / "part")}
    assert run_main(part | {"max_steps": "3"}, *more) == 0
    # as if killed in step 4: step 3 is in the logs, but its checkpoint was not written
    shutil.rmtree(tmp_path / "part" / "checkpoint-3")
    (tmp_path / "part" / "model.safetensors").unlink()
    assert run_main({"output_dir": part["output_dir"]}, "--resume", "--max_steps", "4") == 0
    whole, resumed = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "part"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        assert timeless(tmp_path / "whole" / name) == timeless(tmp_path / "part" / name)
    rows = timeless(tmp_path / "part" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1][
        "kl"
    ] > 0  # the reference is the start model


def test_the_weights_move_and_the_first_step_is_on_policy(world, lively, tmp_path):
    assert run_main(world) == 0
    out = Path(world["output_dir"])
    first = timeless(out / "metrics.jsonl")[0]
    assert first["kl"] < 1e-6 and first["sampler_logp_diff/max"] < 1e-4 and first["grad_norm"] > 0
    start = AutoModelForCausalLM.from_pretrained(world["model"]).state_dict()
    end = AutoModelForCausalLM.from_pretrained(out).state_dict()
    moved = sum((start[n] != end[n]).sum().item() for n in start) / sum(v.numel() for v in start.values())
    assert moved > 0.5  # words that no episode holds do not move
    assert {p.name for p in out.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "transcripts.jsonl",
        "tokenizer.json",
    }
    row = json.loads((out / "transcripts.jsonl").read_text().splitlines()[0])
    assert len(row["ids"]) == len(row["loss_mask"]) == sum(s["tokens"] for s in row["segments"])


def test_a_policy_has_no_dropout(lively, tmp_path):
    """Also under gradient checkpointing, which needs train mode: the first ratio is 1, its KL 0."""
    flags = write_world(tmp_path, dropout=0.5)
    assert run_main(flags | {"max_steps": "1"}, "--gradient_checkpointing") == 0
    row = timeless(Path(flags["output_dir"]) / "metrics.jsonl")[0]
    assert row["kl"] < 1e-6 and row["sampler_logp_diff/max"] < 1e-4


def test_tiny_learning_rates_move_every_weight_in_fp32(world, lively):
    """At 1e-6 bf16 weights would stay where they are."""
    assert run_main(world | {"learning_rate": "1e-6", "warmup_steps": "0"}) == 0
    start = AutoModelForCausalLM.from_pretrained(world["model"]).state_dict()
    end = AutoModelForCausalLM.from_pretrained(world["output_dir"]).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert end[name].dtype == torch.float32
    assert (start[name] != end[name]).double().mean() > 0.99


def test_bf16_path(world, lively):
    """Autocast, and a bf16 copy for sampling that follows the weights: a GPU's path, on a CPU."""
    assert run_main(world, "--bf16", "--gradient_checkpointing", "--beta", "0.1") == 0
    rows = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert all(math.isfinite(row["grad_norm"]) and row["sampler_logp_diff/max"] < 0.2 for row in rows)


def test_failed_searches_leave_the_update(world, lively, monkeypatch):
    """A retriever that is down costs its episodes, not the run; an update without episodes is skipped."""
    import rollout

    real = grpo.rollout

    def down(*args, **kwargs):
        episodes = real(*args, **kwargs)
        for episode in episodes:
            episode.stop = "search_failed"
        return episodes

    monkeypatch.setattr(grpo, "rollout", down)
    assert rollout.rollout is real
    assert run_main(world | {"max_steps": "1"}) == 0
    row = timeless(Path(world["output_dir"]) / "metrics.jsonl")[0]
    assert row["tools/failure_frequency"] == 1 and "grad_norm" not in row
    start = AutoModelForCausalLM.from_pretrained(world["model"]).state_dict()
    end = AutoModelForCausalLM.from_pretrained(world["output_dir"]).state_dict()
    assert all(torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("failed, answered, stops", [(0.3, 0.0, True), (0.3, 0.2, True), (0.2, 0.3, False)])
def test_a_retriever_that_dies_stops_the_run(world, monkeypatch, failed, answered, stops):
    """Counted among the episodes that searched: a policy that seldom searches must not hide it. A step
    without any search tells nothing."""
    steps = iter([(failed, answered), (0.0, 0.0)] * 4)

    def step(run, number, signals):
        failed, answered = next(steps)
        metrics = {"tools/failure_frequency": failed, "tools/call_frequency": answered, "grad_norm": 1.0}
        return metrics | {"reward": 0.0, "completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.0}

    monkeypatch.setattr(grpo, "train_step", step)
    if stops:
        with pytest.raises(InputError, match="most searches failed"):
            run_main(world | {"max_steps": "8"})
        assert len(list(steps)) == 3  # the third step with a search was the fifth
    else:
        assert run_main(world | {"max_steps": "8"}) == 0


@pytest.mark.parametrize("text", ['{"config": {}, "measures": {"x": {"em": 1}}}', '{"bef', "[]"])
def test_another_eval_json_does_not_stop_a_resume(world, lively, capsys, text):
    """evaluate.py writes one too, and somebody may have it write here."""
    sets = {"eval": world["train"], "eval_size": "4"}
    assert run_main(world | sets | {"max_steps": "1"}) == 0
    path = Path(world["output_dir"]) / "eval.json"
    path.write_text(text)
    resumed = {"output_dir": world["output_dir"], "max_steps": "2"}
    assert run_main(resumed, "--resume") == 0
    assert "it will be replaced" in "".join(capsys.readouterr())
    assert set(json.loads(path.read_text())) == {"after"}


def damage_tensors(folder):
    (folder / "optimizer.safetensors").write_bytes(b"12345")


def damage_state(folder):
    (folder / "trainer_state.json").write_text("{}")


def damage_weights(folder):
    (folder / "model.safetensors").write_bytes(b"12345")


@pytest.mark.parametrize("damage", [damage_tensors, damage_state, damage_weights])
def test_a_damaged_checkpoint_is_named(world, lively, damage):
    assert run_main(world | {"max_steps": "2"}) == 0
    damage(Path(world["output_dir"]) / "checkpoint-2")
    with pytest.raises(InputError, match=r"--resume:? .*checkpoint-2") as error:
        run_main({"output_dir": world["output_dir"], "max_steps": "3"}, "--resume")
    assert "\n" not in str(error.value)


def test_a_run_is_not_resumed_to_an_earlier_step(world, lively):
    assert run_main(world | {"max_steps": "2"}) == 0
    with pytest.raises(InputError, match=r"--max_steps 1: .* is at step 2 already"):
        run_main({"output_dir": world["output_dir"], "max_steps": "1"}, "--resume")
    assert json.loads((Path(world["output_dir"]) / "run.json").read_text())["max_steps"] == 2


def test_the_start_model_is_not_overwritten(world, lively, tmp_path):
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    for place in (world["model"], f"{tmp_path}/other/../model"):
        with pytest.raises(InputError, match="that is --model"):
            run_main(world | {"output_dir": place})
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_gradient_that_is_not_finite_is_not_taken(world, lively, monkeypatch, capsys):
    real = kernels.grpo_loss

    def broken(hidden, *args, **kwargs):
        loss, stats = real(hidden, *args, **kwargs)
        return loss * math.nan, stats

    monkeypatch.setattr(kernels, "grpo_loss", broken)
    assert run_main(world | {"max_steps": "2"}) == 0
    assert "no finite gradient" in "".join(capsys.readouterr())
    start = AutoModelForCausalLM.from_pretrained(world["model"]).state_dict()
    end = AutoModelForCausalLM.from_pretrained(world["output_dir"]).state_dict()
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_a_full_disk_costs_a_warning(world, lively, monkeypatch, capsys):
    """The checkpoint that does not fit is not there, not half there; earlier ones stay; training goes on."""
    real = grpo.save_file

    def full(tensors, path):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return real(tensors, path)

    monkeypatch.setattr(grpo, "save_file", full)
    assert run_main(world | {"max_steps": "6", "save_total_limit": "9"}) == 0
    out = Path(world["output_dir"])
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    assert "checkpoint-4 was not written" in "".join(capsys.readouterr())


def test_only_complete_checkpoints_count_and_old_ones_go(world, lively):
    assert run_main(world | {"max_steps": "8"}) == 0
    out = Path(world["output_dir"])
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    (out / "checkpoint-8" / "trainer_state.json").unlink()
    (out / "checkpoint-10.tmp").mkdir()
    assert [p.name for p in grpo.checkpoints(out)] == ["checkpoint-6"]


def test_sigterm_saves_and_resumes(world, tmp_path):
    """A signal in the middle of a run: exit code 130, a checkpoint of the last whole step, and it goes on."""
    flags = [x for name, value in (world | {"max_steps": "100000"}).items() for x in (f"--{name}", value)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "grpo.py"), *flags], cwd=tmp_path, stderr=subprocess.PIPE
    )
    metrics = Path(world["output_dir"]) / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()[-2000:]
    steps = [row["step"] for row in timeless(metrics)]
    assert steps == list(range(1, len(steps) + 1))
    newest = grpo.checkpoints(Path(world["output_dir"]))[-1]
    assert newest.name == f"checkpoint-{steps[-1]}"
    goal = str(steps[-1] + 1)
    assert run_main({"output_dir": world["output_dir"]}, "--resume", "--max_steps", goal) == 0
    assert timeless(metrics)[-1]["step"] == int(goal)


def test_every_flag_is_in_run_json(world, lively):
    assert run_main(world) == 0
    stored = json.loads((Path(world["output_dir"]) / "run.json").read_text())
    assert set(stored) == {f.name for f in grpo.fields(grpo.Config)}
    assert stored["micro_batch_tokens"] > 0 and stored["rollout_slots"] == 16


# ------------------------------------------------------------------------------------------------------------
# bad input: one line that names what and where, exit code 2, nothing written


def cli(*argv: str, cwd: Path) -> tuple[int, str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "grpo.py"), *argv], cwd=cwd, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stderr


def test_unknown_flag_is_one_line(tmp_path):
    code, err = cli("--modle", "x", cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and "--modle" in err and not list(tmp_path.iterdir())


def no_tokenizer(flags, folder):
    for path in (folder / "model").glob("*tok*"):
        path.unlink()


def no_template(flags, folder):
    (folder / "model" / "chat_template.jinja").unlink()


def bad_line(flags, folder):
    with open(folder / "known.jsonl", "a") as file:
        file.write('{"id": "1", "question"\n')


def bad_corpus(flags, folder):
    (folder / "corpus.jsonl").write_text('{"id": "0", "contents": "a"}\n{"id": 1}\n')


def long_prompt(flags, folder):
    row = {"id": "long", "question": "who " * 70, "golden_answers": ["x"]}
    with open(folder / "known.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


BAD = {
    "group of one": ({"num_generations": "1"}, None, "--num_generations 1"),
    "tau": ({"tau": "1.5"}, None, "--tau 1.5"),
    "tau is a number": ({"tau": "nan"}, None, "--tau nan"),
    "loss type": ({"loss_type": "ppo"}, None, "--loss_type ppo"),
    "missing file": ({"train": "nowhere/known.jsonl"}, None, "nowhere/known.jsonl"),
    "unknown data set": ({"train": "musiqe"}, None, "musiqe"),
    "malformed line": ({}, bad_line, "known.jsonl"),
    "empty data set": ({}, lambda flags, folder: (folder / "known.jsonl").write_text(""), "known.jsonl"),
    "empty corpus": ({}, lambda flags, folder: (folder / "corpus.jsonl").write_text(""), "corpus.jsonl"),
    "malformed corpus": ({}, bad_corpus, "corpus.jsonl"),
    "no model": ({"model": "nowhere/model"}, None, "nowhere/model"),
    "no directory": ({"model": "./nowhere/model"}, None, "--model ./nowhere/model: no such directory"),
    "no tokenizer": ({}, no_tokenizer, "model"),
    "no chat template": ({}, no_template, "chat template"),
    "prompt longer than the context": ({}, long_prompt, "long"),
    "no run to resume": ({"resume": None}, None, "--resume"),
    "no data set": ({"train": " , "}, None, "--train"),
    "infinite": ({"learning_rate": "inf"}, None, "--learning_rate inf: must be a number"),
    "output below a file": ({"output_dir": "/dev/null/out"}, None, "--output_dir /dev/null/out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, world, tmp_path, capsys, monkeypatch):
    change, damage, named = BAD[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if damage:
        damage(world, tmp_path)
    resume = ["--resume"] if "resume" in change else []
    with pytest.raises(InputError) as error:
        run_main(world | {k: v for k, v in change.items() if v is not None}, *resume)
    message = str(error.value)
    assert named in message and "\n" not in message
    if case == "malformed line":
        assert "41" in message
    assert not (tmp_path / "out").exists()


def test_no_room_on_the_disk_is_said_at_the_start(world, monkeypatch):
    monkeypatch.setattr(grpo.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="GB are free"):
        run_main(world)
    assert not Path(world["output_dir"]).exists()


def test_a_second_run_into_the_same_folder_is_refused(world, lively):
    assert run_main(world | {"max_steps": "1"}) == 0
    with pytest.raises(InputError, match="holds a run"):
        run_main(world | {"max_steps": "1"})
    with pytest.raises(InputError, match="--learning_rate"):
        run_main({"output_dir": world["output_dir"], "learning_rate": "1"}, "--resume")


def test_every_flag_has_its_help():
    notes = config_module.comments(grpo.Config)
    assert all(notes.get(f.name) for f in grpo.fields(grpo.Config))


def test_a_line_cut_short_does_not_stop_a_resume(world, lively):
    assert run_main(world) == 0
    with open(Path(world["output_dir"]) / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    assert run_main({"output_dir": world["output_dir"]}, "--resume", "--max_steps", "5") == 0
    assert [row["step"] for row in timeless(Path(world["output_dir"]) / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_settings_that_are_none(world):
    out = Path(world["output_dir"])
    out.mkdir()
    for text in ("{", '{"modle": 1}'):
        (out / "run.json").write_text(text)
        with pytest.raises(InputError, match=r"run\.json"):
            run_main({"output_dir": world["output_dir"]}, "--resume")


def test_transcripts_show_every_source(world, lively):
    assert run_main(world | {"max_steps": "1"}, "--log_completions", "2") == 0
    rows = timeless(Path(world["output_dir"]) / "transcripts.jsonl")
    assert {row["source"] for row in rows} == {"known", "unknown"}


def test_a_retriever_that_is_down_is_said_at_the_start(world):
    with pytest.raises(InputError, match="--retriever"):
        run_main(world, "--retriever", "http://127.0.0.1:9")


# ------------------------------------------------------------------------------------------------------------
# methods


@pytest.fixture
def sampled(monkeypatch):
    """Every rollout of the trainer: (template, retriever, its episodes)."""
    real, calls = grpo.rollout, []

    def spied(model, tokenizer, template, questions, **more):
        episodes = real(model, tokenizer, template, questions, **more)
        calls.append((template, more["retriever"], episodes))
        return episodes

    monkeypatch.setattr(grpo, "rollout", spied)
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, world, sampled):
    """Its prompt, its own reward, its own rule for who writes the results; two steps, and the same again."""
    flags = world | {"method": method, "max_steps": "2", "warmup_steps": "0", "learning_rate": "0.01"}
    assert run_main(flags) == 0
    out = Path(world["output_dir"])
    first, second = timeless(out / "metrics.jsonl")
    assert all(math.isfinite(row["grad_norm"]) for row in (first, second))
    assert second["kl"] > first["kl"] and first["sampler_logp_diff/max"] < 1e-4
    for template, retriever, episodes in sampled:
        assert template is METHODS[method].template and all(e.template is template for e in episodes)
        assert (retriever is None) == (method == "ssrl")
        assert isinstance(retriever, grpo.CorpusSimulator) == (method == "zerosearch")
    stored = json.loads((out / "run.json").read_text())
    assert stored["method"] == method and stored["reward"] == ""  # its own
    rows = timeless(out / "transcripts.jsonl")
    question = Question("1", "", ["x"], "known")
    parts = METHODS[method].reward(Episode(question, [], template=METHODS[method].template), question)
    assert all(parts.keys() <= row.keys() for row in rows)
    assert ("sandbag_suspects" in first) == ("f1_a1" in parts) == (method == "sem")


def test_ssrl_never_touches_a_retriever(world, monkeypatch):
    """No corpus is opened, no server asked, not even for the tables before and after."""

    def touched(*args, **kwargs):
        raise AssertionError("a retriever was opened")

    monkeypatch.setattr(grpo, "open_retriever", touched)
    monkeypatch.setattr(BM25, "__init__", touched)
    monkeypatch.setattr(Remote, "__init__", touched)
    world.pop("corpus")
    assert run_main(world | {"method": "ssrl", "max_steps": "1", "eval": world["train"]}) == 0
    rows = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert [row["tools/call_frequency"] for row in rows] == [0]
    with pytest.raises(AssertionError, match="a retriever was opened"):
        run_main(world | {"method": "search-r1", "max_steps": "1", "output_dir": world["output_dir"] + "2"})


@pytest.mark.parametrize("name", ["otc", "flat", "sem_kept"])
def test_another_reward(name, world, monkeypatch):
    """Called once an episode, with its group; the method stays."""
    seen, real = [], grpo.REWARDS[name]

    def spied(episode, question, **options):
        assert episode in options["group"] and len(options["group"]) == 4
        assert {e.question.id for e in options["group"]} == {question.id}
        assert options["tau"] == 0.7 and options["kept"] is None
        seen.append(name)
        return real(episode, question, **options)

    monkeypatch.setitem(grpo.REWARDS, name, spied)
    assert run_main(world | {"reward": name, "max_steps": "1", "tau": "0.7"}) == 0
    assert len(seen) == 16
    stored = json.loads((Path(world["output_dir"]) / "run.json").read_text())
    assert (stored["method"], stored["reward"]) == ("sem", name)


def test_resume_keeps_the_method(world, sampled):
    flags = world | {"method": "search-r1", "reward": "otc", "max_steps": "1"}
    assert run_main(flags) == 0
    again = {"output_dir": world["output_dir"], "max_steps": "2"}
    for flag, value in (("method", "sem"), ("reward", "flat")):
        with pytest.raises(InputError, match=f"--resume: --{flag} is "):
            run_main(again | {flag: value}, "--resume")
    assert run_main(again, "--resume") == 0
    stored = json.loads((Path(world["output_dir"]) / "run.json").read_text())
    assert (stored["method"], stored["reward"]) == ("search-r1", "otc")
    assert [template for template, _, _ in sampled] == [METHODS["search-r1"].template] * 2


REFUSED = {
    "method": ({"method": "semm"}, "--method semm: must be one of sem, ssrl"),
    "reward": ({"reward": "em"}, "--reward em: must be one of sem"),
    "no draft": ({"method": "search-r1", "reward": "sem"}, "--reward sem: it does not fit"),
    "no draft to keep": ({"method": "research", "reward": "sem_kept"}, "--reward sem_kept: it does not fit"),
    "no search to count": ({"method": "ssrl", "reward": "flat"}, "--reward flat: it does not fit"),
    "no box": ({"reward": "research"}, "--reward research: it does not fit what --method sem"),
    "no box either": ({"method": "ssrl", "reward": "research_paper"}, "--reward research_paper: it does not"),
    "results of its own": ({"method": "zerosearch", "reward": "ssrl"}, "--reward ssrl: it does not fit"),
    "noise": ({"method": "zerosearch", "noise_end": "1.5"}, "--noise_end 1.5"),
    "noise is a number": ({"method": "zerosearch", "noise_start": "nan"}, "--noise_start nan"),
    "a server plays no engine": (
        {"method": "zerosearch", "retriever": "http://127.0.0.1:9"},
        "--method zerosearch: give --simulator",
    ),
    "no simulator": ({"method": "zerosearch", "simulator": "nowhere/model"}, "--simulator nowhere/model"),
    "nothing to simulate": (
        {"simulator": "nowhere/model"},
        "nowhere/model: --method sem does not",
    ),
    "nothing to keep": ({"reward": "otc", "sem_kept": "0.1"}, "--sem_kept 0.1: only for the rewards sem"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, world, tmp_path, capsys, monkeypatch):
    """The program: one line, exit code 2, nothing written."""
    change, named = REFUSED[case]
    argv = [x for name, value in (world | change).items() for x in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *argv])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "grpo.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert err.count("\n") == 1 and err.startswith("grpo.py: error: ") and named in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", METHODS)
def test_rewards_that_fit(method):
    """Those that read the final answer alone fit every method."""
    for name in ("", method, "search-r1", "zerosearch", *(() if method == "ssrl" else ("otc", "flat"))):
        config = grpo.Config(method=method, reward=name)
        assert grpo.check(config) == config


def test_an_episode_that_is_all_masked_teaches_nothing(model):
    """A policy that writes its own results may write nothing else. Cut into rows, that is an empty
    micro-batch; it still counts in the normaliser."""
    episodes = episodes_with_results()
    advantage = (1.0, -0.5, 0.3, -1.0, 0.4)
    episodes[1].loss_mask = [False] * len(episodes[1].ids)
    whole, cut = (
        gradient(model, episodes, grpo.Config(micro_batch_tokens=tokens), advantage) for tokens in (10_000, 1)
    )
    for name, g in whole.items():
        assert (g - cut[name]).abs().max() <= 1e-6 * max(1.0, g.abs().max().item()), name
    [batch] = grpo.make_batches(episodes, list(advantage), grpo.Config(micro_batch_tokens=10_000), "cpu")
    assert batch.scale[batch.row == batch.row.max()].sum().item() == pytest.approx(1 / 5)


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
    start = AutoModelForCausalLM.from_pretrained(world["model"]).state_dict()
    end = AutoModelForCausalLM.from_pretrained(world["output_dir"]).state_dict()
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_an_answer_ends_an_episode_as_an_end_token_does(model):
    """Search-R1's episodes end at </answer>: those are the terminated ones."""
    episodes = episodes_with_results()
    for episode, stop in zip(episodes, ["answer", "eos", "length", "turns", "answer"], strict=True):
        episode.stop = stop
    rows = grpo.episode_metrics(
        episodes, [{"reward": 0.0}] * 5, torch.zeros(1, 5), grpo.Config(num_generations=5)
    )
    assert rows["completions/mean_terminated_length"] == (5 + 2 + 7) / 3
    assert rows["completions/clipped_ratio"] == 1 / 5


def test_searches_in_its_own_weights_are_counted(model):
    question = Question("1", "?", ["x"], "toy")
    texts = "<search>a</search><information>b</information>" * 2, "<think>a</think>"
    episodes = [
        Episode(
            question, [1], [2], [True], [0.0], [Segment("model", [2], text)], template=METHODS[m].template
        )
        for m, text in itertools.product(("ssrl", "search-r1"), texts)
    ]
    parts, rewards = [{"reward": 0.0}] * 2, torch.zeros(1, 2)
    config = replace(grpo.Config(), num_generations=2)
    own, other = (grpo.episode_metrics(episodes[i : i + 2], parts, rewards, config) for i in (0, 2))
    assert own["tools/self_searches"] == 1.0 and own["tools/call_frequency"] == 0.0
    assert "tools/self_searches" not in other


@pytest.mark.parametrize("program", ["grpo.py", "evaluate.py"])
@pytest.mark.parametrize(
    "error, code, said",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
            2,
            "error: out of GPU memory: try",
        ),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_stops_a_program_beside_its_training_is_one_line(
    program, error, code, said, monkeypatch, capsys
):
    def stop(*args):
        raise error

    monkeypatch.setattr("data.load", stop)
    monkeypatch.setattr("evaluate.load", stop)
    flags = "--model m", "--train t.jsonl" if program == "grpo.py" else "--data t.jsonl"
    monkeypatch.setattr(sys, "argv", [program, *" ".join(flags).split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    line = capsys.readouterr().err
    assert stopped.value.code == code and line.startswith(f"{program}: {said}") and line.count("\n") == 1
