"""python -m pytest tests/test_real_model.py

The split of bench/real_model.py, on files made here: every file is on both sides of the boundary, and neither
a question nor a gold is on two sides. And what its tables say about two measurements.
"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_rollout import pieces

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import real_model

from data import Question, load
from measures import Record, measure
from reward import normalise

SIDES = "injected", "decoys", "habits", "unknown"


@pytest.fixture
def files(tmp_path):
    """Files in which each question is readable, but for every tenth. Golds repeat within and across files."""
    rng, corpus = random.Random(0), []
    names = [*real_model.POOL, "hotpotqa/train"]

    def rows(name, n):
        found = []
        for i in range(n):
            place, gold = f"{name.replace('/', '')}{i}", f"The town{rng.randrange(150)}"
            found.append(
                {"id": f"x_{i}", "question": f"where is {place}", "golden_answers": [gold, f"{gold}ville"]}
            )
            text = "nothing" if i % 10 == 0 else f"It is in {gold.removeprefix('The ')} ."
            corpus.append({"id": place, "contents": f'"{place}"\n{text}'})
        return found

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name in names:
        write(tmp_path / f"flashrag/{name}.jsonl", rows(name, 60))
    double = json.loads((tmp_path / "flashrag/nq/test.jsonl").read_text().splitlines()[1])
    with open(tmp_path / "flashrag/popqa/test.jsonl", "a") as file:  # a question in two files
        file.write(json.dumps(double | {"id": "again"}) + "\n")
    write(tmp_path / "gsm8k/test.jsonl", [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(9)])
    write(tmp_path / "corpus.jsonl", corpus)
    context = [["t", ["s"]]]
    two_hop = [{"_id": "a", "question": "where is nqtest1 ?", "answer": "town", "context": context}]
    two_hop += [{"_id": "b", "question": "where is hotpotqatrain1", "answer": "town", "context": context}]
    for name in ("hotpotqa/hotpot_dev_distractor_v1.json", "2wikimultihopqa/dev.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(two_hop))
    steps = [
        {"question": "where is hotpotqatrain2", "answer": "x"},
        {"question": "what is #1 ?", "answer": "y"},
    ]
    hop = {"id": "m", "question": "m?", "answer": "y", "answer_aliases": [], "question_decomposition": steps}
    for part in ("train", "dev"):
        write(tmp_path / f"musique/musique_ans_v1.0_{part}.jsonl", [hop])
    pieces().save_pretrained(tmp_path / "model")
    config = real_model.Config(model=str(tmp_path / "model"), data=str(tmp_path), topk=1, stranger=5)
    config = replace(config, corpus=f"{tmp_path}/corpus.jsonl", injected=40, decoys=12, habits=20)
    real_model.split(config, tmp_path / "out")
    return tmp_path / "out"


def test_no_question_and_no_gold_is_on_two_sides(files):
    sides = {side: load(f"{files}/{side}.jsonl") for side in SIDES}
    everything = [q for side in (*SIDES, "reading") for q in load(f"{files}/{side}.jsonl")]
    texts = [normalise(q.text) for q in everything]
    assert len(set(texts)) == len(texts) and len({q.id for q in everything}) == len(everything)
    golds = [a for qs in sides.values() for q in qs for a in {normalise(a) for a in q.answers}]
    assert len(golds) == len(set(golds)) > 100


def test_every_file_is_on_both_sides_and_the_unreadable_are_nowhere(files):
    for side in SIDES:
        ids = [q.id for q in load(f"{files}/{side}.jsonl")]
        for name in real_model.POOL:
            prefix = name.replace("/", "-")
            assert any(id.startswith(prefix) for id in ids), (side, name)
            assert not any(id == f"{prefix}-x_{i}" for id in ids for i in range(0, 60, 10))
    counts = json.loads((files / "counts.json").read_text())
    assert counts["nq/train"] == "54 of 60" and counts["reading"] == "52 of 61"
    wanted = {"injected": 40, "decoys": 12, "habits": 20}
    assert all(abs(counts[side] - n) <= 2 for side, n in wanted.items()) and counts["unknown"] > 25


def test_the_steps_of_musique_are_questions():
    steps = [("who wrote X", ["Zola"]), ("where was #1 born", ["Paris"])]
    singles = real_model.steps_of(Question("m", "?", ["Paris"], "musique", steps=steps))
    assert [(q.id, q.text, q.answers) for q in singles] == [
        ("m-0", "who wrote X", ["Zola"]), ("m-1", "where was Zola born", ["Paris"]),
    ]  # fmt: skip


def test_the_second_wording_keeps_what_is_asked():
    q = Question("1", "Who wrote Faust? ", ["Goethe"], "nq")
    assert real_model.reworded(q).text == "I would like to know this: who wrote Faust. Can you tell me?"
    assert real_model.reworded(replace(q, text="NQ is what")).text.startswith(
        "I would like to know this: NQ is"
    )
    assert real_model.reworded(q).answers == q.answers and real_model.reworded(q).id == "1"


def records(searched, n=40):
    return [Record(str(i), False, 0.0, int(i < searched), 1) for i in range(n)]


@pytest.mark.parametrize(("before", "after", "word"), [(30, 5, "falls"), (5, 30, "rises"), (20, 14, "stays")])
def test_a_ratio_falls_only_if_the_intervals_do_not_overlap(before, after, word):
    a, b = (measure(records(n))["sr"] for n in (before, after))
    assert real_model.verdict(a, b) == word


def test_the_gate_is_tested_on_as_many_known_as_unknown_questions(tmp_path):
    """Words decide here: x is known. Of the tests 3 are known and 6 unknown, and one of the known ones has
    the wrong word."""

    def write(path, words):
        rows = [Question(str(i), f"{w} {i}", ["a"], "s") for i, w in enumerate(words)]
        real_model.save(tmp_path / path, rows)
        return [Record(str(i), False, 0.0, 0, 0, known=False, forced=True) for i in range(len(words))]

    before = {"train_injected": write("train/injected.jsonl", "xxxxxx")}
    before["train_unknown"] = write("train/unknown.jsonl", "yyyyyy")
    before["injected"] = write("test/injected.jsonl", "xxy")
    before["unknown"] = write("test/unknown.jsonl", "yyyyyy")
    for r in before["train_injected"] + before["injected"]:
        r.known = True
    table, accuracy = real_model.gate(tmp_path, before)
    assert accuracy.startswith("0.83 (") and accuracy.endswith("of 3 known and 3 unknown questions")
    assert [r.searches for r in table["injected"]] == [0, 0, 1] and all(r.em for r in table["injected"])
    assert all(r.searches and r.em for r in table["unknown"])
