"""python -m pytest tests/test_look.py

The inspector says that a correct sampler is right, and finds a planted fault of the mask, of the cache and of
the loss. A mistake of the user is one line.
"""

import json
import os
import re
import runpy
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM
from worlds import VOCABULARY

import grpo
import look
import runner
from config import comments
from data import InputError, Question
from prompts import SEM
from retriever import RetrieverError
from rollout import rollout

ROOT = Path(__file__).parent.parent


@pytest.fixture
def flags(world, monkeypatch):
    """The flags of an episode in the world of a few words, on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shared = {name: world[name] for name in ("model", "corpus", "max_completion_length")}
    return shared | {"question": "who is w1"}


@pytest.fixture
def parts(world):
    """(model, tokenizer) of the world."""
    return AutoModelForCausalLM.from_pretrained(world["model"]), AutoTokenizer.from_pretrained(world["model"])


def settings(flags: dict, **other) -> look.Config:
    flags = flags | {"max_completion_length": 40} | other
    return look.check(look.Config(**flags), {"max_completion_length"})


@pytest.fixture
def searching(flags, parts, monkeypatch):
    """The settings of an episode with a search. The model is made to write it; the log-probs are its own."""
    text = "<think> no </think> <answer> w3 </answer> <search> w1 </search> <answer> w1 </answer> <eos>"
    script = cycle(parts[1](text).input_ids)

    def scripted(logits, u, temperature, vocab_size):
        logps = torch.log_softmax(logits[:, :vocab_size].float(), -1)
        token = torch.tensor([next(script)])
        return token, logps[0, token]

    monkeypatch.setattr(runner, "sample", scripted)
    return settings(flags, topk=2)


def inspect(capsys, config: look.Config) -> tuple[int, str, list[list[str]]]:
    """(exit code, verdict, cells of the table) of the program with these settings."""
    code = look.main(config, set(look.Config.__dataclass_fields__))
    out = capsys.readouterr().out
    rows = [
        re.split(r"\s+", line.strip(), maxsplit=7)
        for line in out.splitlines()
        if re.match(r" *\d+  \w", line)
    ]
    return code, out.splitlines()[-1], rows


# ------------------------------------------------------------------------------------------------------------
# what is right


def test_an_episode_with_a_search(searching, parts, capsys):
    code, verdict, rows = inspect(capsys, searching)
    episode = look.sample(searching, *parts)
    assert episode.searches == 1
    assert (code, verdict) == (0, "verdict: the mask and the log-probs are right")
    assert [int(row[2]) for row in rows] == episode.ids
    assert [row[3] == "1" for row in rows] == episode.loss_mask == [row[1] == "model" for row in rows]
    for row, logp in zip(rows, episode.logps, strict=True):
        if row[1] == "model":
            assert float(row[4]) == pytest.approx(logp, abs=1e-5) == float(row[5]) and float(row[6]) < 1e-4
        else:
            assert row[4:7] == ["-", "-", "-"]
    tokenizer = parts[1]
    assert [row[7] for row in rows] == [repr(tokenizer.decode([i])) for i in episode.ids]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sem", "search-r1", "research", "ssrl", "zerosearch", "hybrid"])
def test_every_method(flags, capsys, method):
    for seed in range(3):
        code, verdict, _ = inspect(capsys, settings(flags, method=method, seed=seed))
        assert (code, verdict) == (0, "verdict: the mask and the log-probs are right")


def test_seeds_and_temperatures(flags, capsys):
    """The same seed gives the same episode, and greedy needs none. The scored log-probs are those of the same
    temperature; greedy ones are those of temperature 1."""

    def ids(**other):
        code, _, rows = inspect(capsys, settings(flags, **other))
        assert code == 0
        return [row[2] for row in rows]

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
    assert ids(seed=1, temperature=0.0) == ids(seed=2, temperature=0.0)
    assert ids(seed=1, temperature=0.3) != ids(seed=1, temperature=3.0)


@pytest.mark.parametrize("template", [replace(SEM, self_search=True), replace(SEM, memory="think")])
def test_the_mask_of_results_that_the_model_wrote_itself(parts, template):
    """Found in the whole text, it is what the sampler found token by token. (The world has no token for the
    tag of a memory, so a thought takes its place.)"""
    model, tokenizer = parts
    questions = [Question(str(i), f"who is w{i}", ["x"], "known") for i in range(30)]
    episodes = rollout(model, tokenizer, template, questions, max_completion_length=40)
    assert sum(not all(e.loss_mask) for e in episodes) >= 5
    for episode in episodes:
        assert look.right_mask(episode, tokenizer) == episode.loss_mask


def test_the_settings_of_the_run(flags, tmp_path):
    """As in evaluate.py: what is not given is read from the run.json of the model."""
    (tmp_path / "run.json").write_text(
        json.dumps({"method": "ssrl", "topk": 2, "max_searches": 3, "seed": 9})
    )
    found = look.check(look.Config(model=str(tmp_path), question="x", topk=7), {"topk"})
    assert (found.method, found.topk, found.max_searches, found.seed) == ("ssrl", 7, 3, 0)


def test_every_flag_has_its_help():
    notes = comments(look.Config)
    assert all(notes.get(name) for name in look.Config.__dataclass_fields__)


# ------------------------------------------------------------------------------------------------------------
# planted faults


def plant(monkeypatch, change):
    """`change` is called with every episode that is sampled."""
    real = look.rollout

    def changed(*args, **options):
        episodes = real(*args, **options)
        change(*episodes)
        return episodes

    monkeypatch.setattr(look, "rollout", changed)


def place_of(episode, kind: str) -> int:
    """The place of the first token of a segment of that kind."""
    return [segment.kind for segment in episode.segments for _ in segment.ids].index(kind)


def test_a_result_that_is_trained_on(searching, capsys, monkeypatch):
    place = []

    def change(episode):
        place.append(place_of(episode, "env"))
        episode.loss_mask[place[0]] = True

    plant(monkeypatch, change)
    code, verdict, rows = inspect(capsys, searching)
    assert code == 1 and f"FAULT: the mask of 1 tokens is wrong, first at place {place[0]}" in verdict
    assert f"log-probs differ by more than 0.001, most at place {place[0]}" in verdict
    assert rows[place[0]][1] == "env" and rows[place[0]][3] == "1"


def test_a_token_of_the_model_that_is_not_trained_on(flags, capsys, monkeypatch):
    def change(episode):
        episode.loss_mask[2] = False

    plant(monkeypatch, change)
    code, verdict, _ = inspect(capsys, settings(flags))
    assert (code, verdict) == (1, "verdict: FAULT: the mask of 1 tokens is wrong, first at place 2")


def test_a_fault_of_the_cache(flags, parts, capsys, monkeypatch):
    """Decode steps leave a hole of one position after the prompt."""
    config, real = settings(flags), runner.step_hidden

    def shifted(model, cache, slots, ids, positions, last, kv_len):
        decode = ids.shape[1] == 1
        return real(model, cache, slots, ids, positions + decode, last + decode, kv_len + decode)

    monkeypatch.setattr(runner, "step_hidden", shifted)
    monkeypatch.setattr(runner.ModelRunner, "prepare", longer(runner.ModelRunner.prepare))
    code, verdict, rows = inspect(capsys, config)
    assert code == 1 and "log-probs differ by more than 0.001" in verdict and "mask" not in verdict
    assert float(rows[0][6]) < 1e-4  # the first token comes from the prefill, which is right


def longer(prepare):
    """`ModelRunner.prepare` with room for one more position."""
    return lambda self, slots, max_len, temperature: prepare(self, slots, max_len + 1, temperature)


def test_a_fault_of_the_loss(flags, capsys, monkeypatch):
    """The loss takes the hidden state of the token itself, not of the one before."""
    real = grpo.make_batches

    def shifted(*args):
        batches = real(*args)
        for batch in batches:
            batch.position = (batch.position + 1).clamp(max=batch.ids.shape[1] - 1)
        return batches

    monkeypatch.setattr(grpo, "make_batches", shifted)
    code, verdict, _ = inspect(capsys, settings(flags))
    assert code == 1 and "the loss does not take the tokens of the mask, first at place 0" in verdict
    assert "log-probs differ" in verdict


def test_a_log_prob_that_is_no_number(flags, capsys, monkeypatch):
    def change(episode):
        episode.logps[3] = float("nan")

    plant(monkeypatch, change)
    code, verdict, _ = inspect(capsys, settings(flags))
    assert code == 1 and "log-probs differ by more than 0.001, most at place 3" in verdict


# ------------------------------------------------------------------------------------------------------------
# Bad input is reported on one line that names it. The exit code is 2, and nothing is printed.

BAD = {
    "no model": ({"model": ""}, "--model is needed"),
    "no question": ({"question": ""}, "--question is needed"),
    "a blank question": ({"question": " \n"}, "--question is needed"),
    "not UTF-8": ({"question": os.fsdecode(b"who \xff")}, "--question: it is not UTF-8"),
    "a long question": ({"question": "who " * 70}, "the prompt of --question (look.py) has 70 tokens"),
    "method": ({"method": "semm"}, "--method semm"),
    "temperature": ({"temperature": "-1"}, "--temperature -1"),
    "temperature is a number": ({"temperature": "nan"}, "--temperature nan"),
    "topk": ({"topk": "0"}, "--topk 0"),
    "max searches": ({"max_searches": "-1"}, "--max_searches -1"),
    "seed": ({"seed": "one"}, "--seed"),
    "unknown flag": ({"greedy": "1"}, "--greedy"),
    "missing model": ({"model": "./nowhere"}, "./nowhere"),
    "missing corpus": ({"corpus": "nowhere.jsonl"}, "nowhere.jsonl"),
    "nothing to search": ({"corpus": ""}, "--corpus or --retriever is needed"),
    "no server": ({"retriever": "http://127.0.0.1:9"}, "--retriever"),
    "a model that cannot be sampled": ({"model": "window"}, "sliding window of 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, flags, tmp_path, capsys, monkeypatch):
    change, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    if change.get("model") == "window":
        size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = MistralConfig(vocab_size=VOCABULARY, num_key_value_heads=1, sliding_window=8, **size)
        MistralForCausalLM(config).save_pretrained("window")
        AutoTokenizer.from_pretrained(flags["model"]).save_pretrained("window")
    argv = [x for name, value in (flags | change).items() if value != "" for x in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["look.py", *argv])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "look.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert err.count("\n") == 1 and err.startswith("look.py: error: ") and message in err


def test_a_search_that_fails(searching, parts, monkeypatch):
    class Down:
        def search(self, queries, k):
            raise RetrieverError("it is down")

    monkeypatch.setattr(look, "open_retriever", lambda config, splits: Down())
    with pytest.raises(InputError, match="--retriever: it failed"):
        look.sample(searching, *parts)
