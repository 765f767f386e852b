"""python -m pytest tests/test_boundary.py

The tests are about --reward boundary: labels and rewards of groups made by hand, what a step logs of them,
and training steps in a world of a few words. That an engine that is off is never asked is in test_rollout.py.
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_reward import GOLD, dialogue
from worlds import lively_reward, run_main, timeless

import grpo
from boundary import LABELS, label_shares
from measures import step_metrics
from prompts import RESEARCH, SEARCH_R1, SEM
from reward import REWARDS

# ------------------------------------------------------------------------------------------------------------
# labels and rewards


def group(off: str, on: str, template=SEM):
    """A group from lines of words, see test_reward.dialogue, with | between the episodes. An episode that
    ends with a query has the stop "turns", as one of the off half has."""
    halves = []
    for half, engine in ((off, False), (on, True)):
        for line in map(str.strip, half.split("|")):
            stop = "turns" if line.endswith("S") else "eos"
            halves.append(replace(dialogue(line, stop, GOLD, template), engine=engine))
    return halves


def rewards(episodes) -> list[float]:
    return [REWARDS["boundary"](e, e.question, group=episodes)["reward"] for e in episodes]


def label(episodes) -> str:
    [name] = {
        name for e in episodes for name in LABELS if REWARDS["boundary"](e, e.question, group=episodes)[name]
    }
    return name


SEARCHES = "T wrong S R right | T wrong S R S R S R right | T right S R S R half | T wrong"
PAID = [  # off half, on half, label, rewards of both halves
    # two of four without the engine: every search of a right episode costs 0.05
    ("T right | T right | T wrong | T half", SEARCHES, "nosearch", [1, 1, 0, 2 / 3, 0.95, 0.85, 2 / 3, 0]),
    # one of four says nothing
    ("T right | T wrong | T wrong | T half", SEARCHES, "neither", [1, 0, 0, 2 / 3, 1, 1, 2 / 3, 0]),
    # none of four: searches beyond the one that is needed cost
    ("T half | T wrong | T wrong | T", SEARCHES, "needsearch", [2 / 3, 0, 0, 0, 1, 0.9, 2 / 3, 0]),
    # an answer before a search that was asked for in vain counts, the search does not
    ("T right S | T right S | T wrong S | T S", SEARCHES, "nosearch", [1, 1, 0, 0, 0.95, 0.85, 2 / 3, 0]),
    # nobody is right
    ("T wrong | T wrong", "T wrong S R wrong | T half", "neither", [0, 0, 0, 2 / 3]),
    # a right guess of the on half without a search: nothing is needed
    ("T wrong | T half", "T right | T wrong S R S R right", "needsearch", [0, 2 / 3, 1, 0.9]),
    # half of two, and of three
    ("T right | T wrong", "T right S R right | T right", "nosearch", [1, 0, 0.95, 1]),
    ("T right | T wrong | T wrong", "T right S R right | T | T", "neither", [1, 0, 0, 1, 0, 0]),
    ("T right | T right | T wrong", "T right S R right | T | T", "nosearch", [1, 1, 0, 0.95, 0, 0]),
]


@pytest.mark.parametrize("off, on, name, paid", PAID, ids=[f"{row[2]}: {row[0]}" for row in PAID])
def test_labels_and_rewards(off, on, name, paid):
    for template in (SEM, SEARCH_R1):  # the final answer of Search-R1 is the last one, asked or not
        episodes = group(off, on, template)
        assert label(episodes) == name
        assert rewards(episodes) == pytest.approx(paid)


def test_the_vectors_of_the_paper():
    """SAAS at alpha = 0.05: nosearch with F1 = 1 and three searches, and with F1 = 0.8; needsearch with three
    searches where one would do."""
    three = "T wrong S R S R S R"
    known = group("T right | T right", f"{three} right | {three} <answer>Marie_Curie_Sklodowska</answer>")
    assert rewards(known)[2:] == pytest.approx([0.85, 0.8])
    assert rewards(group("T | T", f"{three} right | T S R right"))[2:] == pytest.approx([0.9, 1])


def test_the_order_within_a_group_does_not_matter():
    episodes = group("T right | T half | T wrong S | T right", SEARCHES)
    expected = {id(e): reward for e, reward in zip(episodes, rewards(episodes), strict=True)}
    for order in itertools.islice(itertools.permutations(episodes), 0, 40320, 5003):
        assert rewards(list(order)) == [expected[id(e)] for e in order]


@pytest.mark.parametrize("right, probability", [(0.0, 0.0), (0.5, 11 / 16), (1.0, 1.0)])
def test_how_noisy_a_label_is(right, probability):
    """The probability of the label nosearch, from all 16 outcomes of an off half of four."""
    total = 0.0
    for outcome in itertools.product([True, False], repeat=4):
        off = " | ".join("T right" if r else "T wrong" for r in outcome)
        weight = math.prod(right if r else 1 - right for r in outcome)
        total += weight * (label(group(off, "T right | T | T | T")) == "nosearch")
    assert total == pytest.approx(probability)


def test_parts_that_only_a_method_with_drafts_has():
    for template, expected in ((SEM, {"s", "f1_a1"}), (SEARCH_R1, set()), (RESEARCH, set())):
        episodes = group("T right | T", "T S R right | T", template)
        parts = REWARDS["boundary"](episodes[0], GOLD, group=episodes)
        assert set(parts) == {"reward", "f1", "engine", *LABELS} | expected


# ------------------------------------------------------------------------------------------------------------
# what a step logs


def of_source(source: str, episodes):
    return [replace(e, question=replace(GOLD, source=source)) for e in episodes]


def test_the_metrics_of_a_step_are_about_the_half_with_an_engine():
    """Two groups of four. In the first one all are right; in each half one searches, although the other one
    does not: after a right draft in the off half, and after a wrong one in the on half. In the second one a
    search fails."""
    episodes = of_source("towers", group("T right S | T right", "T right | T wrong S R right"))
    episodes += of_source("rivers", group("T wrong | T wrong", "T wrong S R right | T"))
    episodes[-1].stop = "search_failed"
    parts = []
    for i, e in enumerate(episodes):
        members = [x for x in episodes[i // 4 * 4 : i // 4 * 4 + 4] if x.stop != "search_failed"]
        failed = e.stop == "search_failed"
        parts.append({} if failed else REWARDS["boundary"](e, e.question, group=members))
    metrics = step_metrics(episodes, parts, 2, 0.5)
    assert metrics["tools/call_frequency"] == 2 / 3 and metrics["tools/failure_frequency"] == 1 / 4
    assert metrics["search_ratio/towers"] == 1 / 2 and metrics["search_ratio/rivers"] == 1
    assert metrics["em/towers"] == 1 and metrics["em/rivers"] == 1
    assert metrics["sandbag_suspects"] == 1
    assert metrics["reward"] == pytest.approx((1 + 1 + 1 + 0.95 + 0 + 0 + 1) / 7)
    assert metrics["frac_reward_zero_std"] == 2 / 3  # both off halves; the fourth half has one member left
    assert label_shares(episodes, parts) == {
        f"labels/{name}/{source}": float((source, name) in {("towers", "nosearch"), ("rivers", "needsearch")})
        for source in ("rivers", "towers")
        for name in LABELS
    }


def test_the_share_of_a_label_is_one_of_questions():
    """The on half of the first question is left with one episode, and still the question counts as one."""
    groups = [group(off, "T right | T") for off in ("T right | T", "T | T", "T | T")]
    parts = [REWARDS["boundary"](e, GOLD, group=episodes) for episodes in groups for e in episodes]
    parts[3] = {}
    shares = label_shares([e for episodes in groups for e in episodes], parts)
    assert shares == pytest.approx(
        {"labels/nosearch/people": 1 / 3, "labels/needsearch/people": 2 / 3, "labels/neither/people": 0}
    )
    assert label_shares([], []) == {}


# ------------------------------------------------------------------------------------------------------------
# training


@pytest.fixture
def steps(monkeypatch):
    """Puts a reward in the place of boundary that differs within a group of an untrained model. Returns what
    `grpo.rollout` and `grpo.make_batches` got: [(engine, episodes, trained, advantages)] of each step."""
    rollout, make_batches, seen = grpo.rollout, grpo.make_batches, []
    for name in ("boundary", "boundary_on"):
        monkeypatch.setitem(REWARDS, name, replace(REWARDS[name], function=lively_reward))

    def spied(*args, **options):
        seen.append([options["engine"], rollout(*args, **options)])
        return seen[-1][1]

    def spied_batches(episodes, advantage, *args):
        seen[-1] += episodes, advantage
        return make_batches(episodes, advantage, *args)

    monkeypatch.setattr(grpo, "rollout", spied)
    monkeypatch.setattr(grpo, "make_batches", spied_batches)
    return seen


@pytest.mark.parametrize("name", ["boundary", "boundary_on"])
def test_each_half_has_its_own_advantages(world, steps, name):
    """(r - mean) / (std + 1e-4) of the two episodes of a half. In the second variant the off halves are in no
    batch, and so they do not count in the denominators of the loss either."""
    assert run_main(world | {"reward": name, "max_steps": "1"}) == 0
    [(engine, episodes, trained, advantage)] = steps
    assert engine == [False, False, True, True] and [e.engine for e in episodes] == engine * 4
    expected, spreads = [], []
    for half in (episodes[i : i + 2] for i in range(0, 16, 2)):
        a, b = (lively_reward(e, e.question)["reward"] for e in half)
        spreads.append(abs(a - b) / math.sqrt(2))
        expected += [(x - (a + b) / 2) / (spreads[-1] + 1e-4) for x in (a, b)]
    kept = [i for i, e in enumerate(episodes) if e.engine or name == "boundary"]
    assert [id(e) for e in trained] == [id(episodes[i]) for i in kept]
    assert advantage == pytest.approx([expected[i] for i in kept]) and len({*advantage}) > 2
    [row] = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert row["reward_std"] == pytest.approx(sum(spreads) / 8)


def test_a_half_with_one_episode_left_teaches_nothing(world, steps, monkeypatch):
    rollout = grpo.rollout

    def fails(*args, **options):
        episodes = rollout(*args, **options)
        for e in episodes[2::4]:  # the first one of each on half
            e.stop = "search_failed"
        return episodes

    monkeypatch.setattr(grpo, "rollout", fails)
    assert run_main(world | {"reward": "boundary", "max_steps": "1"}) == 0
    [(_, _, trained, advantage)] = steps
    assert [e.engine for e in trained] == [False, False, True] * 4
    assert advantage[2::3] == [0] * 4 and any(advantage)


def test_all_members_of_a_group_have_an_engine_with_another_reward(world, steps, lively):
    assert run_main(world | {"max_steps": "1"}) == 0
    assert steps[0][0] == [True] * 4 and all(e.engine for e in steps[0][1])
    [row] = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert not any(name.startswith("labels/") for name in row)


def test_a_run_is_resumed_with_its_halves(world, steps, tmp_path):
    whole, part = (world | {"reward": "boundary", "output_dir": str(tmp_path / name)} for name in "ab")
    assert run_main(whole) == 0
    assert run_main(part | {"max_steps": "2"}) == 0
    assert run_main({"output_dir": part["output_dir"], "max_steps": "4"}, "--resume") == 0
    assert [step[0] for step in steps] == [[False, False, True, True]] * 8
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        assert timeless(tmp_path / "a" / name) == timeless(tmp_path / "b" / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(first[name].equal(second[name]) for name in first)


def test_the_labels_are_logged(world):
    """An untrained model is never right, so every question has the label neither."""
    assert run_main(world | {"reward": "boundary", "max_steps": "1"}) == 0
    [row] = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert {name: row[f"labels/{name}/known"] for name in LABELS} == dict.fromkeys(LABELS, 0) | {"neither": 1}
    assert {name.rpartition("/")[2] for name in row if name.startswith("labels/")} == {"known", "unknown"}
    rows = map(json.loads, (Path(world["output_dir"]) / "transcripts.jsonl").read_text().splitlines())
    assert all({"engine", "neither", "f1"} <= row.keys() for row in rows)
