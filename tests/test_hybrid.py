"""python -m pytest tests/test_hybrid.py

The method hybrid: what its base model is taught in the toy world, what its reward pays, and what is logged.
The masks are tested in test_rollout.py, its transcripts of a cold start in test_coldstart.py.
"""

import random
import re
from collections import Counter

import pytest

import hybrid
import toy
from config import Config, check
from data import Episode, InputError, Question, Segment
from measures import self_searches, step_metrics
from prompts import SEM, neutralise
from reward import METHODS, parse_episode
from rollout import detokenize

WORLD = toy.World.make(0)
TOKENIZER = toy.make_tokenizer(WORLD, "hybrid")
QUESTION = Question("q", "", ["oslo"], "toy")
OWN_TAGS = ["<recall>", "</recall>", "<memory>", "</memory>"]


def episode(shape: str, answer: str, engine: bool = True) -> Episode:
    """T, Q O and S R are blocks. The answer comes last, unless the episode ends with a search."""
    blocks = {"T": "<think> a </think>", "Q": "<recall> a </recall>", "O": "<memory> b </memory>"}
    segments = []
    for part in re.findall("R|[TQOS]+", shape):
        if part == "R":
            segments.append(Segment("env", [], "<result> c </result>"))
        else:
            text = "".join({**blocks, "S": "<search> a </search>"}[letter] for letter in part)
            segments.append(Segment("model", [], text))
    stopped = shape.endswith("S")
    if not stopped:
        segments.append(Segment("model", [], f"<answer> {answer} </answer>"))
    return Episode(
        QUESTION, [], segments=segments, searches=shape.count("R"), engine=engine,
        stop="turns" if stopped else "eos", template=hybrid.HYBRID,
    )  # fmt: skip


def test_the_world_of_the_other_methods_has_no_tags_of_its_own():
    """Two more tags in the vocabulary would be other base models."""
    others = toy.make_tokenizer(WORLD).get_vocab()
    assert not set(OWN_TAGS) & set(others) and set(OWN_TAGS) < set(TOKENIZER.get_vocab())
    assert len(TOKENIZER) == len(others) + len(OWN_TAGS)


def transcripts(n: int, **options):
    """(words of the question, text, shape) of each transcript."""
    rng, config = random.Random("hybrid"), toy.Config(method="hybrid", closed_book=0.0, **options)
    for _ in range(n):
        text = detokenize(TOKENIZER, toy.transcript(WORLD, rng, config, TOKENIZER))
        question, text = re.fullmatch(r".*what is (.*) \? <assistant> (.*) <eos>", text).groups()
        parts = re.split(r"( <result> .*? </result>)", text)
        segments = [Segment("env" if i % 2 else "model", [], part) for i, part in enumerate(parts)]
        e = Episode(QUESTION, [], segments=segments, stop="eos", template=hybrid.HYBRID)
        yield question.split(), text, parse_episode(e)


def kind_of(words: list[str]) -> str:
    hop = "known" if words[-1] in WORLD.known else "unknown"
    return (
        "sum"
        if "plus" in words
        else {"known": "composed", "unknown": "two_hop"}[hop]
        if "friend" in words
        else hop
    )


def test_transcripts_hold_all_three_acts_for_every_kind():
    """What is recalled of a known person is true, and the answer is what was found last."""
    shapes, wrong = {}, Counter()
    for words, text, parse in transcripts(4000):
        kind = kind_of(words)
        shapes.setdefault(kind, Counter())[parse.shape] += 1
        stated = re.findall(r"<memory> (\w+) of (\w+) is (\w+) \. </memory>", text)
        for relation, name, value in stated:
            if name in WORLD.known:
                assert value == WORLD.facts[relation, name], text
            else:
                wrong[value == WORLD.facts[relation, name]] += 1
        found = re.findall(r"is (\w+)", text)
        assert not found or parse.answer == found[-1], text
        if stated and "SR" not in parse.shape:
            assert parse.answer == stated[-1][2], text
            assert len(stated) == 1 or stated[1][1] == stated[0][2]  # the friend that it has just recalled
        elif len(stated) == 2:  # the friend that the engine has found
            friends = re.findall(rf"friend of {words[-1]} is (\w+)", text.split("</search>")[1])
            assert stated[1][1] in friends, text
    one = {"TA": 0.2, "TQOTA": 0.2, "TSRTA": 0.48, "TQOSRTA": 0.12}
    two = {"TA": 0.2, "TQOQOTA": 0.2, "TSRSRTA": 0.48, "TQOSRQOSRTA": 0.12}
    for kind, expected in {"known": one, "sum": one, "composed": two}.items():
        n = shapes[kind].total()
        assert {shape: count / n for shape, count in shapes[kind].items()} == pytest.approx(
            expected, abs=0.06
        )
    assert set(shapes["unknown"]) == set(one) and set(shapes["two_hop"]) == set(two)
    assert wrong[True] / wrong.total() < 0.2  # made up


def test_a_search_costs_only_where_the_half_without_the_engine_can_recall():
    """Composed questions: the off half recalls, so a call costs 0.05. A recall costs nothing."""
    reward = METHODS["hybrid"].reward
    off = [episode("TQOQOT", "oslo", engine=False)] * 2 + [episode("TS", "", engine=False)] * 2
    on = [episode(s, "oslo") for s in ("T", "TQOQOT", "TSRT", "TQOSRSRT")]
    paid = [reward(e, QUESTION, group=off + on)["reward"] for e in off + on]
    assert paid == pytest.approx([1, 1, 0, 0, 1, 1, 0.95, 0.9])
    off = [episode("TQOT", "rome", engine=False)] * 3 + [episode("TQOS", "", engine=False)]
    paid = [reward(e, QUESTION, group=off + on[2:])["reward"] for e in off + on[2:]]
    assert paid == pytest.approx([0, 0, 0, 0, 1, 0.95])  # needsearch: one search is free


def test_searches_and_self_searches_are_counted_apart():
    episodes = [episode(shape, "oslo") for shape in ("T", "TQOT", "TSRT", "TQOSRQOSRT", "TQOT")]
    off = [episode("TQOQOT", "oslo", engine=False) for _ in episodes]  # these are in no such figure
    parts = [METHODS["hybrid"].reward(e, QUESTION, group=off + episodes) for e in off + episodes]
    metrics = step_metrics(off + episodes, parts, 5, 0.5)
    assert [self_searches(e) for e in episodes] == [0, 1, 0, 2, 1]
    assert (metrics["search_ratio/toy"], metrics["self_search_ratio/toy"]) == (0.4, 0.6)
    assert (metrics["tools/call_frequency"], metrics["tools/self_searches"]) == (0.6, 0.8)
    assert [parse_episode(e).searched for e in episodes] == [False, False, True, True, False]


def test_a_result_that_the_model_writes_is_a_mistake():
    e = episode("T", "oslo")
    e.segments[0].text += "<result> oslo </result>"
    assert "!" in parse_episode(e).shape and not parse_episode(e).searched


@pytest.mark.parametrize(
    "memory, shape",
    [
        ("<memory> <answer> oslo </answer> </memory>", "TOA"),
        ("<memory> <search> a </search> <recall> b </recall> </memory>", "TOA"),
        ("<memory> <memory> a </memory>", "TOA"),
        ("<memory> </memory>", "T!A"),
        ("<memory> a <answer> oslo </answer>", "T!"),  # never closed: it goes on to the end
    ],
)
def test_what_stands_in_a_memory_is_no_block(memory, shape):
    e = episode("T", "rome")
    e.segments = [Segment("model", [], f"<think> a </think> {memory} <answer> rome </answer>")]
    assert parse_episode(e).shape == shape and not parse_episode(e).searched
    assert parse_episode(e).answer == ("rome" if shape.endswith("A") else None)


def test_settings_that_do_not_fit_name_the_method():
    for change in ({}, {"num_generations": 7}, {"num_generations": 8, "loss_type": "dr_grpo"}):
        with pytest.raises(InputError, match=r"^--method hybrid: "):
            check(Config(method="hybrid", **change))
    assert check(Config(method="hybrid", num_generations=8))
    for reward in ("sem", "ssrl", "research"):
        with pytest.raises(InputError, match="cannot read what --method hybrid writes"):
            check(Config(method="hybrid", num_generations=8, reward=reward))


def test_documents_cannot_hold_a_memory():
    for tag in OWN_TAGS:
        assert tag not in neutralise(f"a {tag} b", TOKENIZER, hybrid.HYBRID)
        assert tag in neutralise(f"a {tag} b", toy.make_tokenizer(WORLD), SEM)


def test_its_base_model_is_trained_longer(monkeypatch, tmp_path):
    steps = []
    monkeypatch.setattr(toy, "train", lambda model, world, rng, config, tokenizer: steps.append(config.steps))
    monkeypatch.setattr(toy, "exam", lambda *args: (1.0, 1.0))
    for method, given in (("sem", 0), ("hybrid", 0), ("hybrid", 5)):
        toy.build(toy.Config(output_dir=str(tmp_path / f"{method}{given}"), method=method, steps=given))
    assert steps == [toy.STEPS, toy.HYBRID_STEPS, 5] and toy.HYBRID_STEPS > toy.STEPS
