"""python -m pytest tests/test_format_swap.py          (SEM_DATA=FOLDER: also on real rows)

bench/format_swap.py writes MMLU without its options and HotpotQA with four, in files that evaluate.py reads.
"""

import csv
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from data import InputError, load, load_sets
from reward import exact_match, letter

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("SEM_DATA", "/nowhere"))
# bench/ comes after the root in the search path, because it has a retriever.py too
sys.path.append(str(ROOT / "bench"))

import format_swap  # noqa: E402

MMLU = [
    ["What is the capital of Norway?", "Lima", "Oslo", "Rome", "Accra", "B"],
    ["Which of the following is a prime?", "4", "6", "7", "9", "C"],
    ["All of these are rivers, except", "Rhine", "Po", "Etna", "Nile", "C"],
    ["Who found radium?", "Curie", "Bohr", "Both of them", "None of the above", "D"],
    ["Why is the sky blue?", "No idea", "Because air scatters short waves far more", "Dust", "Ice", "B"],
    ["How many legs has a spider?", "8", "6", "4", "10", "A"],
]
HOTPOT = [("Who wrote it?", "Ana Lee"), ("Where?", "the Oslo"), ("Is it?", "yes"), ("Who sang?", "ana lee.")]
HOTPOT += [("When?", "1898"), ("What?", "Oslo"), ("Which?", "the radium")]


@pytest.fixture
def written(tmp_path):
    """A function that runs the program on the rows above and returns the questions of the two files that the
    program writes."""

    def run(seed="0", hotpot=HOTPOT):
        rows = [{"_id": str(i), "question": q, "answer": a, "context": []} for i, (q, a) in enumerate(hotpot)]
        (tmp_path / "hotpot.json").write_text(json.dumps(rows))
        with open(tmp_path / "law.csv", "w", newline="") as file:
            csv.writer(file).writerows(MMLU)
        specs = ["--mmlu", f"mmlu:{tmp_path}/law.csv", "--hotpotqa", f"hotpotqa:{tmp_path}/hotpot.json"]
        argv = [*specs, "--output_dir", str(tmp_path / "out"), "--seed", seed]
        format_swap.main(format_swap.parse(format_swap.Config, "bench/format_swap.py", argv)[0])
        files = [tmp_path / "out" / f"{name}.jsonl" for name in ("mmlu_open", "hotpotqa_choice")]
        return [load(str(file)) for file in files]

    return run


def test_mmlu_without_options(written):
    rows, _ = written()
    assert [(q.id, q.text, q.answers, q.choices) for q in rows] == [
        ("law-0", "What is the capital of Norway?", ["Oslo"], None),
        ("law-5", "How many legs has a spider?", ["8"], None),
    ]
    assert {q.source for q in rows} == {"mmlu_open"}
    assert exact_match("oslo", rows[0]) == 1.0 and exact_match("B", rows[0]) == 0.0


def test_hotpotqa_with_options(written):
    """The letter names the gold. All options are different answers, also after `normalise`."""
    _, rows = written()
    assert [q.text for q in rows] == [q for q, a in HOTPOT if a != "yes"]
    golds = dict(HOTPOT)
    for q in rows:
        assert len(q.choices) == 4 and q.choices[ord(q.answers[0]) - 65] == golds[q.text]
        assert len({format_swap.normalise(choice) for choice in q.choices}) == 4
        assert "yes" not in q.choices
        assert letter(golds[q.text], q.choices) == q.answers[0]
    assert written()[1] == rows and written("1")[1] != rows
    assert {q.source for q in rows} == {"hotpotqa_choice"}


def test_too_few_answers(written):
    with pytest.raises(InputError, match="too few"):
        written(hotpot=HOTPOT[:4])


def test_sets_of_the_wrong_kind(tmp_path):
    with pytest.raises(InputError, match="--mmlu"):
        rows = [{"id": "1", "question": "Who?", "golden_answers": ["x"]}]
        format_swap.write_jsonl(tmp_path / "x.jsonl", rows)
        path = f"{tmp_path}/x.jsonl"
        format_swap.main(format_swap.Config(path, path, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("SEM_DATA" not in os.environ, reason="SEM_DATA is not set")
def test_real_rows(tmp_path):
    config = format_swap.Config(f"mmlu:{REAL}/mmlu", f"hotpotqa:{REAL}/hotpotqa", str(tmp_path))
    format_swap.main(config)
    sets = load_sets(f"{tmp_path}/mmlu_open.jsonl,{tmp_path}/hotpotqa_choice.jsonl", "test")
    opened, chosen = sets["mmlu_open"], sets["hotpotqa_choice"]
    before = {q.id: q for q in load(config.mmlu, "test")}
    assert 0.2 < len(opened) / len(before) < 0.9
    for q in opened:
        # `letter` returns None if two options have the same text
        assert letter(q.answers[0], before[q.id].choices) in (*before[q.id].answers, None)
        assert exact_match(q.answers[0], q) == 1.0 and "following" not in q.text.lower()
    golds = {q.id: q.answers[0] for q in load(config.hotpotqa, "test")}
    assert 0.8 < len(chosen) / len(golds) < 1
    for q in chosen:
        assert exact_match(golds[q.id], q) == 1.0, q
    letters = Counter(q.answers[0] for q in chosen)
    assert all(0.15 < letters[name] / len(chosen) < 0.35 for name in "ABCD")
