"""python -m pytest tests/test_alarms.py

Each alarm is given for metrics just beyond its threshold and not just before it, once in a run, and for no
step of a run that goes well. The mean probability of tag tokens is compared with hand-made episodes.
"""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from worlds import VOCABULARY, run_main, timeless

import grpo
import report
from alarms import Alarms, diagnose
from data import Episode, Question
from measures import tag_probability
from prompts import SEARCH_R1, SEM

GOOD = {
    "reward": 0.5,
    "entropy": 0.2,
    "format": 1.0,
    "frac_reward_zero_std": 0.2,
    "completions/clipped_ratio": 0.0,
    "tag_probability": 0.9,
    "sampler_logp_diff/mean": 1e-6,
    "em/nq": 0.8,
    "search_ratio/nq": 0.6,
    "em_searched/nq": 0.7,
    "em/gsm8k": 0.6,
    "search_ratio/gsm8k": 0.6,
}


def run(start: dict, end: dict, steps: int = 6) -> list[dict]:
    """The metrics of a run in which three steps like `end` follow on steps like `start`."""
    return [GOOD | start] * (steps - 3) + [GOOD | end] * 3


CASES = [  # alarm, metrics at the start, metrics at its threshold, metrics beyond it, words of its line
    ("format", {}, {"format": 0.05}, {"format": 0.04}, "0.04 of the episodes have a valid structure"),
    ("clipped", {}, {"completions/clipped_ratio": 0.5}, {"completions/clipped_ratio": 0.6}, "0.60 of"),
    (
        "equal",
        {},
        {"frac_reward_zero_std": 0.95},
        {"frac_reward_zero_std": 1.0},
        "1.00 of the groups, with a",
    ),
    ("sampler", {}, {"sampler_logp_diff/mean": 0.049}, {"sampler_logp_diff/mean": 0.06}, "0.06 apart"),
    ("reward", {}, {"reward": 0.36}, {"reward": 0.34}, "has fallen from 0.50 to 0.34"),
    ("entropy rises", {}, {"entropy": 0.35}, {"entropy": 0.37}, "has risen from 0.20 to 0.37 nats"),
    ("entropy falls", {}, {"entropy": 0.021}, {"entropy": 0.019}, "has fallen from 0.20 to 0.02 nats"),
    ("tags", {}, {"tag_probability": 0.81}, {"tag_probability": 0.79}, "has fallen from 0.90 to 0.79"),
    (
        "em_searched/nq",
        {},
        {"em_searched/nq": 0.06},
        {"em_searched/nq": 0.04},
        "of nq that search, 0.04 are right",
    ),
    (
        "search_ratio/nq",
        {},
        {"search_ratio/nq": 0.16, "em/nq": 0.5},
        {"search_ratio/nq": 0.14, "em/nq": 0.5},
        "of nq has gone from 0.60 to 0.14, its right answers from 0.80 to 0.50",
    ),
    (
        "search_ratio/nq",
        {},
        {"search_ratio/nq": 0.0, "em/nq": 0.65},
        {"search_ratio/nq": 0.0, "em/nq": 0.63},
        "from 0.80 to 0.63",
    ),
    (
        "search_ratio/nq",
        {"em/nq": 0.1},
        {"search_ratio/nq": 0.0, "em/nq": 0.06},
        {"search_ratio/nq": 0.0, "em/nq": 0.04},
        "from 0.10 to 0.04",
    ),
    (
        "search_ratio/nq",
        {},
        {"search_ratio/nq": 0.94, "em/nq": 0.5},
        {"search_ratio/nq": 0.96, "em/nq": 0.5},
        "from 0.60 to 0.96",
    ),
]


@pytest.mark.parametrize("name, start, at, beyond, words", CASES)
def test_an_alarm_is_given_beyond_its_threshold_alone(name, start, at, beyond, words):
    assert not list(diagnose(run(start, at), True))
    found = dict(diagnose(run(start, beyond), True))
    assert list(found) == [name]
    assert words in found[name] and "\n" not in found[name]
    assert not list(diagnose(run(start, beyond, 8)[:-1], True))  # two steps beyond it are not enough


@pytest.mark.parametrize(
    "start, end",
    [
        ({}, {}),
        ({}, {"frac_reward_zero_std": 1.0, "em/nq": 1.0, "em/gsm8k": 0.9}),  # all is solved
        ({}, {"entropy": 0.01, "em/nq": 1.0, "em/gsm8k": 0.9}),
        ({}, {"search_ratio/nq": 0.0, "em/nq": 1.0}),  # what SEM is made for
        ({}, {"search_ratio/nq": 1.0, "em/nq": 0.9}),
        ({"search_ratio/nq": 0.85}, {"search_ratio/nq": 1.0, "em/nq": 0.5}),  # it searched before
        ({}, {"search_ratio/nq": 0.1, "em/nq": 0.5, "self_search_ratio/nq": 0.6}),  # it asks itself
        ({}, {"em_searched/nq": 0.0, "search_ratio/nq": 0.09}),  # of a few searches
        ({}, {"reward": 0.2, "noise_share": 0.5}),  # the results get worse on purpose
        ({}, {"reward": math.nan, "entropy": math.nan}),
    ],
)
def test_what_is_no_fault_gives_no_alarm(start, end):
    assert not list(diagnose(run(start, end), True))


@pytest.mark.parametrize(
    "end, names",
    [
        ({"entropy": 0.4, "reward": 0.0, "format": 0.0, "em_searched/nq": 0.0}, ["entropy rises"]),
        ({"tag_probability": 0.5, "reward": 0.0, "em_searched/nq": 0.0}, ["tags"]),
        ({"format": 0.0, "reward": 0.0, "em_searched/nq": 0.0}, ["format", "reward"]),
        (
            {"em_searched/nq": 0.0, "search_ratio/gsm8k": 0.0, "em/gsm8k": 0.1},
            ["em_searched/nq", "search_ratio/gsm8k"],
        ),
    ],
)
def test_what_follows_from_a_fault_is_not_said_beside_it(end, names):
    assert [name for name, _ in diagnose(run({}, end), True)] == names


def test_a_search_ratio_matters_only_where_searches_cost_something():
    beyond = run({}, {"search_ratio/nq": 0.0, "em/nq": 0.4})
    assert not list(diagnose(beyond, False)) and list(diagnose(beyond, True))


@given(
    st.lists(st.dictionaries(st.sampled_from([*GOOD, "kl"]), st.floats(), max_size=8), min_size=1, max_size=8)
)
def test_any_metrics_give_whole_lines(history):
    """A metric may be missing in some steps, and may be infinite or NaN."""
    for name, line in diagnose(history, True):
        assert name and line and "\n" not in line


def test_an_alarm_is_given_once_in_a_run():
    rows = run({}, {"entropy": 0.5}, 8)
    alarms = Alarms(priced=True)
    given = [alarms(row) for row in [*rows, *rows[-3:]]]
    assert [len(lines) for lines in given] == [0] * 6 + [1] + [0] * 4  # the mean of 0.2, 0.5, 0.5 is enough
    resumed = Alarms(True, past=rows)
    assert resumed(rows[-1]) == [] and len(resumed(GOOD | {"reward": -1.0, "entropy": 0.0})) == 1


def test_a_step_in_which_all_searches_failed_is_passed_over():
    """Such a step logs a reward of 0, because no episode has one."""
    alarms, failed = Alarms(priced=True), GOOD | {"reward": 0.0, "tools/failure_frequency": 1}
    assert not any(alarms(row) for row in [*run({}, {}), *[failed] * 3])


def test_a_run_prints_its_alarms(world, monkeypatch, capsys):
    """Also after it was resumed: the alarm compares with steps before, and is not given a second time."""
    rows = run({}, {"entropy": 0.5}, 8)
    extra = {"grad_norm": 1.0, "tools/failure_frequency": 0.0}

    def step(run):
        metrics = rows[run.step] | extra
        run.record(metrics, [], [], [])
        return metrics, []

    monkeypatch.setattr(grpo, "train_step", step)
    line = "alarm in step 7: the entropy has risen from 0.20 to 0.40 nats"
    assert run_main(world | {"max_steps": "4", "save_steps": "2"}) == 0
    assert "alarm in" not in capsys.readouterr().out
    again = {"output_dir": world["output_dir"]}
    assert run_main(again | {"max_steps": "7"}, "--resume") == 0
    assert capsys.readouterr().out.count(line) == 1
    assert run_main(again | {"max_steps": "8"}, "--resume") == 0
    assert "alarm in" not in capsys.readouterr().out
    page = report.page(Path(world["output_dir"]))
    assert page.count("alarm in step 7") == page.count("alarm in") == 1


@pytest.mark.parametrize(
    "settings, priced",
    [
        ({"method": "sem", "reward": ""}, True),
        ({"method": "hybrid", "reward": ""}, True),
        ({"method": "sem", "reward": "search-r1"}, False),
        ({"method": "search-r1", "reward": "otc"}, True),
        ({"method": "of a fork", "reward": ""}, False),
        ({"method": ["sem"], "reward": ""}, False),
        ([], False),
        ({}, False),
    ],
)
def test_a_report_knows_whether_searches_cost_something(tmp_path, settings, priced):
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert report.is_priced(tmp_path) == priced


def test_the_probability_of_tags(world):
    """Only tokens of tags that the policy wrote count: no words, no tags of a result, no tags of another
    method. A token that holds a part of a tag counts too."""
    tokenizer = AutoTokenizer.from_pretrained(world["model"])
    words = "<think> w1 </think> <result> w2 </result> <search>".split()
    ids = tokenizer.convert_tokens_to_ids(words)
    mask = [word not in ("<result>", "w2", "</result>") for word in words]
    logps = [math.log(p) for p in (0.5, 0.1, 0.25, 0.3, 0.3, 0.3, 0.9)]
    e = Episode(Question("1", "", ["x"], "s"), [], ids, mask, logps, template=SEM)
    assert tag_probability([e], tokenizer)["tag_probability"] == pytest.approx((0.5 + 0.25 + 0.9) / 3)
    other = Episode(e.question, [], ids[:3], mask[:3], logps[:3], template=SEM)
    both = tag_probability([e, other], tokenizer)["tag_probability"]
    assert both == pytest.approx((0.5 + 0.25 + 0.9 + 0.5 + 0.25) / 5)
    failed = Episode(e.question, [], ids[:1], mask[:1], [0.0], stop="search_failed", template=SEM)
    assert tag_probability([e, failed], tokenizer) == tag_probability([e], tokenizer)
    own = Episode(e.question, [], ids[3:6], [True] * 3, logps[3:6], template=SEARCH_R1)
    assert tag_probability([own], tokenizer) == {}  # Search-R1 has no such tag
    pieces = {0: "a </", 1: "think", 2: ">.", 3: "</think", 4: "é"}

    class Tokenizer:
        def decode(self, ids):
            return pieces[ids[0]]

    split = Episode(
        e.question, [], [4, 0, 1, 2, 3], [True] * 5, [math.log(x / 10) for x in (1, 2, 3, 4, 5)], template=SEM
    )
    assert tag_probability([split], Tokenizer())["tag_probability"] == pytest.approx(0.3)


def test_a_step_logs_the_probability_of_its_tags(world):
    """The model is untrained, so each token has about the same probability."""
    assert run_main(world | {"max_steps": "1"}) == 0
    [metrics] = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert metrics["tag_probability"] == pytest.approx(1 / VOCABULARY, rel=0.3)
