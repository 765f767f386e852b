"""python -m pytest tests/test_evaluate.py          (SEM_DATA=FOLDER: also on real rows)

Twelve questions whose every measure can be counted by hand, as records and as episodes that a tiny model is
made to write; the passes, the program, the judge behind a server of this file.
"""

import json
import math
import os
import runpy
import threading
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import evaluate
import rollout
import runner
from data import DIRECT, SEM, InputError, Doc, Question, load
from evaluate import Record, bootstrap, measure, report, summary, wilson
from retriever import RetrieverError

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("SEM_DATA", "/nowhere"))

# ------------------------------------------------------------------------------------------------------------
# twelve questions

# draft, searches, last answer, right closed-book, right when forced, known to the base model, judged, how
# many of four samples are right
TWELVE = [
    ("right", 0, "", True, True, True, True, 4),
    ("right", 0, "", False, False, True, True, 4),
    ("right", 0, "", False, True, True, True, 3),
    ("right", 1, "right", True, True, False, True, 3),
    ("right", 1, "wrong", True, True, False, False, 2),
    ("wrong", 1, "right", True, True, True, True, 2),
    ("wrong", 2, "right", False, True, True, True, 2),
    ("wrong", 3, "wrong", False, False, False, False, 1),
    ("wrong", 0, "", False, True, False, False, 1),
    ("wrong", 0, "", True, False, False, False, 0),
    ("", 1, "right", False, False, False, None, 0),  # no draft at all
    ("half", 0, "", False, True, False, True, 0),  # F1 is 2/3: right enough not to search, but no match
]
SHARES = {  # of which questions, which of them count: numbers of the rows above
    "em": (range(12), [0, 1, 2, 3, 5, 6, 10]),
    "lj": ([i for i in range(12) if i != 10], [0, 1, 2, 3, 5, 6, 11]),
    "sr": (range(12), [3, 4, 5, 6, 7, 10]),
    "known": (range(12), [0, 3, 4, 5, 9]),
    "over_search": ([0, 3, 4, 5, 9], [3, 4, 5]),
    "over_search_base": ([0, 1, 2, 5, 6], [5, 6]),
    "under_search": ([2, 6, 8, 11], [2, 8, 11]),  # 1, 7 and 10 would be wrong with a search, too
    "wrong_without_search": ([0, 1, 2, 8, 9, 11], [8, 9, 11]),
    "draft_right_given_search": ([3, 4, 5, 6, 7, 10], [3, 4]),
    "sandbag_rate": ([3, 4, 5], [5]),
}
FIGURES = {
    "f1": (7 + 2 / 3) / 12,
    "searches": 9 / 12,
    "f1_aware": 2 * (2 / 6) * (2 / 5) / (2 / 6 + 2 / 5),  # of the six not searched 0 and 9 are known, of five
    "tool_productivity": 7 / 9,
    "pass@1": 22 / 48,
    "pass@2": (4 * 1 + 3 * 5 / 6 + 2 * 1 / 2) / 12,  # 1 - C(4 - c, 2) / 6: 1, 1, 5/6, 1/2, 0 for c = 4 .. 0
    "pass@4": 9 / 12,
}


def records() -> list[Record]:
    rows = []
    for i, (draft, searches, last, known, forced, base, judged, c) in enumerate(TWELVE):
        final = last if searches else draft
        score = {"right": 1.0, "half": 2 / 3}.get(final, 0.0)
        sampled = [member < c for member in range(4)]
        drafted = draft in ("right", "half")
        row = Record(str(i), final == "right", score, searches, 10 * i, drafted, known, base, forced, judged)
        row.sampled = sampled
        rows.append(row)
    return rows


def test_every_measure_on_twelve_records():
    table = measure(records())
    assert set(table) == {*SHARES, *FIGURES, "tokens"}
    for name, (some, counted) in SHARES.items():
        k, n = len(counted), len(some)
        assert table[name]["value"] == pytest.approx(k / n), name
        assert table[name]["n"] == n, name
        assert (table[name]["low"], table[name]["high"]) == wilson(k, n)
    for name, value in {**FIGURES, "tokens": 55.0}.items():
        assert table[name]["value"] == pytest.approx(value), name
        assert table[name]["n"] == 12 and table[name]["low"] <= value <= table[name]["high"], name
    assert list(evaluate.SHARES) == list(SHARES)  # a new measure needs its value here
    assert [*evaluate.FIGURES] == ["f1", "searches", "tokens", "f1_aware", "tool_productivity"]


def test_summary():
    assert summary(records()) == pytest.approx(
        {"em": 7 / 12, "f1": 92 / 144, "sr": 0.5, "searches": 0.75, "n": 12}
    )
    assert summary([]) == {"em": 0, "f1": 0, "sr": 0, "searches": 0, "n": 0}


def test_a_measure_about_nothing_is_a_dash():
    """Nobody searched, nothing is known, nothing was asked twice: no division by zero, and no zero."""
    bare = [Record(str(i), True, 1.0, 0, 5) for i in range(3)]
    table = measure(bare)
    assert set(table) == {"em", "sr", "wrong_without_search", "f1", "searches", "tokens"}
    unknown = measure([Record("0", False, 0.0, 2, 5, draft=False, known=False, forced=False)])
    assert "over_search" not in unknown and "sandbag_rate" not in unknown and "under_search" not in unknown
    assert "f1_aware" not in unknown  # neither known nor left unsearched
    assert unknown["tool_productivity"]["value"] == 0
    text = report({"full": measure(records()), "bare": table, "empty": measure([])})
    lines = {(c := line.strip("| ").split(" | "))[0]: c[1:] for line in text.splitlines() if "|" in line}
    assert lines["over_search"][1:] == ["-", "-"] and lines["em"][1] != "-" and lines["em"][2] == "-"
    assert lines["sr"][1] == "0.000 (0.000 to 0.562; 3)"  # and not -0.000
    assert report({"empty": {}}).startswith("| measure | empty |")


def test_every_line_of_the_table_is_explained():
    table = measure(records())
    text = report({"a": table, "b": table})
    for name in table:
        assert f"\n| {name} | " in text and f"\n{name}: " in text
    assert "| over_search | 0.600 (0.231 to 0.882; 5) | 0.600 (0.231 to 0.882; 5) |" in text


# ------------------------------------------------------------------------------------------------------------
# intervals


@pytest.mark.parametrize(
    "k, n, low, high",  # E. B. Wilson's formula with z = 1.96, as the usual tables print it
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(k, n, low, high):
    assert wilson(k, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_stays_within_0_and_1_and_is_symmetric(of):
    k, n = of
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1
    assert math.copysign(1, low) == 1  # a rounded -1e-17 would be printed as -0.000
    assert (1 - high, 1 - low) == pytest.approx(wilson(n - k, n), abs=1e-12)


def test_bootstrap_repeats_itself_and_covers():
    def mean(rows):
        return sum(rows) / len(rows)

    rng, hits, widths = np.random.default_rng(1), 0, []
    for _ in range(100):
        values = rng.normal(3.0, 2.0, size=60).tolist()
        low, high = bootstrap(mean, values)
        hits += low <= 3.0 <= high
        widths.append(high - low)
    assert 88 <= hits <= 100
    assert sum(widths) / 100 == pytest.approx(2 * 1.96 * 2 / math.sqrt(60), rel=0.1)
    assert bootstrap(mean, values) == (low, high)
    assert bootstrap(mean, [0.5] * 9) == (0.5, 0.5)


def test_bootstrap_leaves_out_draws_that_tell_nothing():
    """One of five searched: a third of the draws has no search, so no tool productivity."""
    some = [Record(str(i), i < 2, 1.0, int(i == 0), 1) for i in range(5)]
    low, high = bootstrap(evaluate.tool_productivity, some)
    assert 0 < low <= 2 <= high < 6


# ------------------------------------------------------------------------------------------------------------
# a tiny model that writes what it is told to


@cache
def byte_tokenizer():
    """Every byte a token, so that a prompt can be read back, and every tag one, so that texts are short."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    tags = [f"<{slash}{tag}>" for tag in (*SEM.tags, "information") for slash in ("", "/")]
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=template)


@cache
def tiny():
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eos = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=eos, bos_token_id=None, **size
    )
    return LlamaForCausalLM(config).eval(), tokenizer


class Shelf:
    """Answers a query with one document that names it, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def search(self, queries, k):
        self.asked += queries
        return [[Doc("0", query, "a document")] for query in queries]


def words(i: int, kind: str) -> str:
    return {"right": f"gold {i}", "half": "gold", "wrong": "Bob"}[kind]


def answer(i: int, kind: str) -> str:
    return f"<answer>{words(i, kind)}</answer>" if kind else ""


def asked(i: int) -> Question:
    return Question(f"q{i}", f"What is number {i}?", [f"gold {i}"], "towers" if i < 5 else "rivers")


SETS = {"towers": [asked(i) for i in range(5)], "rivers": [asked(i) for i in range(5, 12)]}


def episode(number: int, kind: str, member: int) -> str:
    """What the policy writes of its own in one pass over one of the twelve questions."""
    i = number
    draft, searches, last, known, forced, _, _, c = TWELVE[i]
    start = "<think>hm</think>" + answer(i, draft)
    if kind == "closed-book":
        return words(i, "right" if known else "wrong")
    if kind == "sampled":
        return "<think>hm</think>" + answer(i, "right" if member < c else "wrong")
    if kind == "forced":
        return start + f"query {i}</search>" + answer(i, "right" if forced else "wrong")
    return start + f"<search>query {i}</search>" * searches + (answer(i, last) if searches else "")


@pytest.fixture
def script(monkeypatch):
    """script(text): the rows of every pass write `text(number of the question, pass, member)`, whatever the
    model thinks of it. The pass is read off how the sampler was called."""
    real, now = rollout.rollout, {}

    def spied(model, tokenizer, template, questions, *, group_size=1, **more):
        kind = "closed-book" if template is DIRECT else "forced" if more.get("force_search") else "normal"
        now["kind"] = "sampled" if group_size > 1 else kind
        now["rows"] = [(int(q.id.strip("q")), member) for q in questions for member in range(group_size)]
        now["streams"], now["tokenizer"] = {}, tokenizer
        return real(model, tokenizer, template, questions, group_size=group_size, **more)

    def start(text):
        def scripted(logits, u, temperature):
            assert temperature == (1.0 if now["kind"] == "sampled" else 0.0)
            tokenizer, tokens = now["tokenizer"], []
            for row in map(int, u.tolist()):
                if row not in now["streams"]:
                    number, member = now["rows"][row]
                    said = tokenizer(text(number, now["kind"], member), add_special_tokens=False).input_ids
                    now["streams"][row] = iter([*said, tokenizer.eos_token_id])
                tokens.append(next(now["streams"][row]))
            return torch.tensor(tokens), torch.zeros(len(tokens))

        monkeypatch.setattr(rollout, "uniforms", lambda n, seed, step, row: [float(row)] * n)
        monkeypatch.setattr(runner, "sample", scripted)
        monkeypatch.setattr(evaluate, "rollout", spied)

    start(episode)
    return start


def passes(**options):
    """evaluate() on the twelve questions: the records by number, and the episodes by pass."""
    seen: dict[str, list] = {}
    options = {"closed_book": True, "max_searches": 4, "progress": False, "slots": 5} | options
    sets, retriever = options.pop("sets", SETS), options.pop("retriever", Shelf())

    def log(name, kind, episodes):
        seen.setdefault(kind, []).extend(episodes)

    return evaluate.evaluate(*tiny(), SEM, sets, retriever, log=log, **options), seen


def length(text: str) -> int:
    return len(byte_tokenizer()(text, add_special_tokens=False).input_ids)


def flat(table: dict[str, list[Record]]) -> list[Record]:
    return [record for rows in table.values() for record in rows]


def test_evaluate_end_to_end(script):
    table, seen = passes(samples=4)
    assert {name: [r.id for r in rows] for name, rows in table.items()} == {
        name: [q.id for q in rows] for name, rows in SETS.items()
    }
    expected = records()
    for got, want in zip(flat(table), expected, strict=True):
        i = int(want.id)
        want.id, want.judged, want.known_base = f"q{i}", None, None
        want.tokens = length(episode(i, "normal", 0)) + 1  # and the end token
        assert got.f1 == pytest.approx(want.f1)
        want.f1 = got.f1
        assert got == want
    assert {kind: len(episodes) for kind, episodes in seen.items()} == {
        "normal": 12, "closed-book": 12, "forced": 12, "sampled": 48,
    }  # fmt: skip


@pytest.mark.parametrize("tau, right", [(0.66, True), (0.67, False)])
def test_the_draft_is_right_from_tau_on(script, tau, right):
    table, _ = passes(tau=tau, closed_book=False)
    assert flat(table)[11].draft is right and table["rivers"][6].id == "q11"


def test_passes_that_were_not_asked_for(script):
    for options in ({"closed_book": False}, {"retriever": None}):
        table, seen = passes(**options)
        rows = flat(table)
        assert all(r.forced is None and r.sampled is None for r in rows) and "forced" not in seen
        assert all((r.known is None) == ("closed_book" in options) for r in rows)
    assert not any(r.searched for r in rows) and {e.stop for e in seen["normal"]} == {"eos", "turns"}


def test_the_closed_book_prompt_mentions_neither_search_nor_tags(script):
    _, seen = passes()
    for e in seen["closed-book"]:
        prompt = tiny()[1].decode(e.prompt_ids)
        assert e.question.text in prompt and "Answer the question." in prompt
        assert not any(word in prompt.lower() for word in ("search", "tool", "engine", "<", ">", "tag"))
        assert e.searches == 0 and [s.kind for s in e.segments] == ["model"]
    assert all("<search>" in tiny()[1].decode(e.prompt_ids) for e in seen["normal"] + seen["forced"])


def test_forced_tokens_are_not_the_policys(script):
    table, seen = passes(force=True, closed_book=False)
    assert set(seen) == {"normal"}
    for i, (record, e) in enumerate(zip(flat(table), seen["normal"], strict=True)):
        forced = [s for s in e.segments if s.kind == "forced"]
        assert len(forced) == (TWELVE[i][0] != "")  # behind the draft; without a draft never
        assert [s.text for s in forced] == ["\n<search>"] * len(forced)
        assert record.tokens == sum(e.loss_mask)
        if forced:
            assert record.tokens == length(episode(i, "forced", 0)) + 1
        assert record.searches == len(forced) and record.em == bool(TWELVE[i][4] and forced)


def test_always_forces_the_samples_too(script):
    """pass@k of the always-searching policy is about searching, too."""
    seen = []
    script(lambda number, kind, member: "<think>hm</think><answer>Bob</answer>q</search>")
    evaluate.evaluate(
        *tiny(), SEM, {"towers": SETS["towers"]}, Shelf(), force=True, samples=2, progress=False,
        log=lambda _, kind, episodes: seen.extend((kind, e.searches) for e in episodes),
    )  # fmt: skip
    assert seen == [("normal", 1)] * 5 + [("sampled", 1)] * 10


@pytest.mark.parametrize("fails", ["query 3", "query 8"])
def test_a_search_that_failed_leaves_its_question_out(script, fails, capsys):
    """3 fails in the normal pass, 8 only in the forced one, where it searches."""

    class Flaky(Shelf):
        def search(self, queries, k):
            if fails in queries:
                raise RetrieverError("down")
            return super().search(queries, k)

    sets = {"towers": [asked(2), asked(3)], "rivers": [asked(8), asked(5)]}
    table, _ = passes(retriever=Flaky(), slots=1, sets=sets)
    number = int(fails.split()[1])
    assert [r.id for r in flat(table)] == [f"q{i}" for i in (2, 3, 8, 5) if i != number]
    name = "towers" if number < 5 else "rivers"
    assert f"warning: {name}: 1 searches failed" in "".join(capsys.readouterr())


def test_a_sample_whose_search_failed_leaves_its_question_out(script):
    """It says nothing about the model, so it is not a wrong sample."""

    class Flaky(Shelf):
        def search(self, queries, k):
            if "query 1" in queries:
                raise RetrieverError("down")
            return super().search(queries, k)

    script(
        lambda number, kind, member: (
            episode(number, "normal", 0)
            if kind != "sampled"
            else f"<think>hm</think><answer>Bob</answer><search>query {number}</search>"
            + answer(number, "right")
        )
    )
    sets = {"towers": [asked(i) for i in range(3)]}
    table, _ = passes(retriever=Flaky(), slots=1, samples=2, closed_book=False, sets=sets)
    rows = flat(table)
    assert [r.id for r in rows] == ["q0", "q2"]
    assert all(r.sampled == [True, True] for r in rows)


# ------------------------------------------------------------------------------------------------------------
# the program


@pytest.fixture
def world(tmp_path):
    """A model, two data sets, a corpus: flags for evaluate.py."""
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in SETS.items():
        write(
            tmp_path / f"{name}.jsonl",
            ({"id": q.id, "question": q.text, "golden_answers": q.answers} for q in rows),
        )
    write(tmp_path / "corpus.jsonl", ({"id": i, "contents": f'"query {i}"\nnumber {i}'} for i in range(12)))
    (tmp_path / "work").mkdir()
    return {
        "model": tmp_path / "model",
        "data": f"{tmp_path}/towers.jsonl,{tmp_path}/rivers.jsonl",
        "corpus": tmp_path / "corpus.jsonl",
        "output": tmp_path / "work" / "eval.json",
    }


def write(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(flags: dict, *more: str) -> dict:
    """The program in this process, so that the script holds; returns eval.json."""
    argv = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    config, _ = evaluate.parse(evaluate.Config, "evaluate.py", [*argv, *more])
    Path(config.output).unlink(missing_ok=True)
    evaluate.main(config)
    return json.loads(Path(config.output).read_text())


def counts(told: dict) -> dict[str, int]:
    return {name: measures["em"]["n"] for name, measures in told["measures"].items()}


def transcripts(flags: dict) -> list[dict]:
    path = flags["output"].with_name("eval_transcripts.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_program(script, world, capsys):
    base = world | {"output": world["output"].with_name("base.json")}
    script(lambda number, kind, member: words(number, "right" if TWELVE[number][5] else "wrong"))
    assert run(base)["known"] == {"towers": ["q0", "q1", "q2"], "rivers": ["q5", "q6"]}
    script(episode)
    capsys.readouterr()
    told = run(world, "--known", str(base["output"]), "--samples", "4", "--batch_size", "7")
    assert list(told["measures"]) == ["towers", "rivers", "all"]
    for name, (some, counted) in SHARES.items():
        for group, members in (("towers", range(5)), ("rivers", range(5, 12)), ("all", range(12))):
            n, k = (len(set(members) & set(numbers)) for numbers in (some, counted))
            if name == "lj":
                assert name not in told["measures"][group]
            elif n:
                assert told["measures"][group][name]["value"] == pytest.approx(k / n), (name, group)
                assert told["measures"][group][name]["n"] == n
    for name, value in FIGURES.items():
        assert told["measures"]["all"][name]["value"] == pytest.approx(value), name
    assert told["known"] == {"towers": ["q0", "q3", "q4"], "rivers": ["q5", "q9"]}
    assert told["config"]["method"] == "sem"
    printed = capsys.readouterr().out
    assert report(told["measures"]) in printed and "| measure | towers | rivers | all |" in printed
    rows = transcripts(world)
    assert len(rows) == 12 * 3 + 48 and {row["pass"] for row in rows} == {
        "normal",
        "closed-book",
        "forced",
        "sampled",
    }
    [row] = [r for r in rows if r["id"] == "q5" and r["pass"] == "forced"]
    assert [s["kind"] for s in row["segments"]] == ["model", "forced", "model", "env", "model"]
    assert row["answer"] == "gold 5" and row["right"] and row["searches"] == 1 and row["set"] == "rivers"


def test_what_the_base_model_knows_is_known_by_set(script, world, tmp_path):
    """Two sets may use the same ids."""
    (tmp_path / "copy.jsonl").write_text((tmp_path / "towers.jsonl").read_text())
    (tmp_path / "base.json").write_text('{"known": {"towers": ["q3", "q0"], "elsewhere": ["q4"]}}')
    flags = world | {
        "data": f"{tmp_path}/towers.jsonl,{tmp_path}/copy.jsonl",
        "known": tmp_path / "base.json",
    }
    told = run(flags, "--no-closed_book")["measures"]
    assert told["towers"]["over_search_base"]["value"] == 1 / 2  # q3 is searched, q0 is not
    assert "over_search_base" not in told["copy"] and told["all"]["over_search_base"]["n"] == 2


def test_the_same_table_twice(world, capsys):
    """Greedy, the bootstrap seeded, the questions drawn once: eval.json is the same byte for byte."""
    small = ("--eval_size", "3", "--max_completion_length", "12", "--samples", "2", "--batch_size", "4")
    first, text = (run(world, *small), world["output"].read_bytes())
    table = capsys.readouterr().out
    assert run(world, *small) == first and world["output"].read_bytes() == text
    assert capsys.readouterr().out == table
    assert {name: m["em"]["n"] for name, m in first["measures"].items()} == {
        "towers": 3,
        "rivers": 3,
        "all": 6,
    }


def test_eval_size_draws_the_same_questions(world):
    sets = [evaluate.load_sets(world["data"], "test", 3) for _ in range(2)]
    assert sets[0] == sets[1] and [len(rows) for rows in sets[0].values()] == [3, 3]
    assert evaluate.load_sets(world["data"], "test", 0) == SETS
    assert sets[0]["rivers"] != SETS["rivers"][:3]  # drawn, not cut


def test_baselines(script, world):
    def text(number, kind, member):
        if kind == "closed-book" or now == "rag":
            return words(number, "wrong" if now == "always" else "right")
        if now == "cot":
            return f"<think>hm</think>{answer(number, 'right')}"
        return episode(number, kind, member)

    script(text)
    for now in ("direct", "cot", "rag", "always"):
        told = run(world, "--baseline", now)["measures"]["all"]
        rows = [row for row in transcripts(world) if row["pass"] == "normal"]
        assert told["sr"]["value"] == {"direct": 0, "cot": 0, "rag": 1, "always": 11 / 12}[now]
        assert ("known" in told) == (now != "rag")
        if now != "always":
            assert told["em"]["value"] == 1.0
        if now == "rag":
            top = rows[4]["question"].splitlines()
            assert top[0] == "Doc 1: query 4: number 4" and top[-1] == "\nQuestion: What is number 4?".strip()
            assert len(top) == 5 + 2
        else:
            assert rows[4]["question"] == "What is number 4?"
        assert ("under_search" in told) == (now == "always")


def test_the_method_is_the_models_own(world, tmp_path):
    """As its run.json says, and that of the run whose checkpoint it is; a flag says otherwise."""
    checkpoint = tmp_path / "model" / "checkpoint-5"
    checkpoint.mkdir()
    for folder in (tmp_path / "model", checkpoint):
        config = evaluate.Config(model=str(folder), data="x")
        assert evaluate.check(config).method == "sem"
        (tmp_path / "model" / "run.json").write_text('{"method": "ssrl"}')
        assert evaluate.check(config).method == "ssrl"
        assert evaluate.check(evaluate.replace(config, method="research")).method == "research"
        (tmp_path / "model" / "run.json").unlink()


@pytest.mark.parametrize("real, searches", [("", 0), ("1", 1), ("2", 2), ("all", 2)])
def test_real_searches(script, world, real, searches):
    """SSRL answers itself; the first K of its results become real ones, and K of none is no retriever."""

    def text(number, kind, member):
        if kind == "closed-book":
            return "Bob"
        parts = ["<think>hm</think><search>query 1</search>", "<information>made up</information>"]
        turns = [parts[0] + (parts[1] if i >= searches else "") for i in range(2)]
        return "".join(turns) + "<think>hm</think>" + answer(number, "right")

    script(text)
    flags = world | {"method": "ssrl", "data": str(world["data"]).split(",")[0]}
    if not real:
        flags.pop("corpus")  # nothing to search with, and no complaint
    told = run(flags, *(["--real_searches", real] if real else []))["measures"]["towers"]
    assert told["searches"]["value"] == searches and told["em"]["value"] == 1.0
    for row in transcripts(world)[:5]:
        assert [s["kind"] for s in row["segments"]].count("env") == searches
        own = "".join(s["text"] for s in row["segments"] if s["kind"] == "model")
        assert own.count("made up") == 2 - searches


# ------------------------------------------------------------------------------------------------------------
# the judge


@contextmanager
def endpoint(reply):
    """An OpenAI-compatible server: `reply(asked)` is the status and the body, or the text of its answer."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            said = reply(body["messages"][0]["content"])
            status, content = said if isinstance(said, tuple) else (200, chat(said))
            if status is None:  # not even HTTP
                return self.wfile.write(content)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/", seen
    finally:
        server.shutdown()
        server.server_close()


def chat(said) -> bytes:
    return json.dumps({"choices": [{"message": {"content": said}}]}).encode()


RIGHT, WRONG = (
    '{"rationale": "same", "judgement": "correct"}',
    '{"rationale": "no", "judgement": "incorrect"}',
)


@pytest.mark.parametrize(
    "reply, verdict",
    [
        (RIGHT, True),
        (WRONG, False),
        (f"Sure:\n```json\n{RIGHT}\n```", True),
        ("correct", None),
        ('{"judgement": "maybe"}', None),
        ('{"judgement": ["correct"]}', None),
        ('{"rationale": "cut', None),
        ("{}", None),
        ("", None),
        (None, None),  # an endpoint that refuses sends no content
        ((500, b"oops"), None),
        ((200, b"not JSON"), None),
        ((200, b"[]"), None),
        ((200, b'{"choices": []}'), None),
        ((None, b"no HTTP at all\r\n\r\n"), None),
    ],
)
def test_verdicts(reply, verdict):
    with endpoint(lambda asked: reply) as (url, _):
        assert evaluate.judge(asked(3), "gold", url, "judge-1") is verdict


def test_what_the_judge_is_asked(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key of a test")
    question = Question("1", "Who wrote it?", ["Ana Lee", "A. Lee"], "x")
    with endpoint(lambda asked: RIGHT) as (url, seen):
        assert evaluate.judge(question, "Lee, Ana", url, "judge-1") is True
    [(path, head, body)] = seen
    assert path == "/v1/chat/completions" and head["Authorization"] == "Bearer key of a test"
    assert body["model"] == "judge-1" and body["temperature"] == 0
    text = body["messages"][0]["content"]
    assert all(part in text for part in ("Who wrote it?", "Ana Lee", "A. Lee", "Answer: Lee, Ana", "JSON"))


def test_nobody_judges(capsys):
    assert evaluate.judge(asked(3), "gold", "http://127.0.0.1:9", "judge-1") is None
    assert evaluate.judge(asked(3), "gold", "no address", "judge-1") is None


def test_the_judge_in_the_table(script, world, capsys):
    """It judges the answers of the normal pass; silence on two of them is a warning and no verdict."""

    def reply(text):
        number = int(text.split("What is number ")[1].split("?")[0])
        if number in (2, 10):
            return (500, b"") if number == 2 else "hm"
        return RIGHT if f"Answer: gold {number}" in text else WRONG

    with endpoint(reply) as (url, seen):
        told = run(world, "--judge_url", url)
    assert len(seen) == 1 + 12 and told["measures"]["all"]["lj"]["n"] == 10
    assert told["measures"]["all"]["lj"]["value"] == 5 / 10  # 0, 1, 3, 5 and 6
    assert told["measures"]["towers"]["lj"]["value"] == 3 / 4
    text = "".join(capsys.readouterr())
    assert "towers: the judge did not answer on 1 of 5" in text and "on 1 of 7" in text


def test_a_silent_judge_is_left_alone(monkeypatch):
    """A silence costs a minute. One that answers now and then is asked on."""
    asks = []

    def judged(question, answer, url, model):
        asks.append(answer)
        return True if answer == "x40" else None

    monkeypatch.setattr(evaluate, "judge", judged)
    answers = [(asked(i), f"x{i}") for i in range(100)]
    assert evaluate.verdicts(answers, evaluate.Config(), "towers") == [None] * 100 and len(asks) == 32
    asks.clear()
    assert evaluate.verdicts(answers[16:], evaluate.Config(), "towers").count(True) == 1 and len(asks) == 64


def test_figures_are_written_before_the_judge_is_asked(script, world, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    with endpoint(lambda text: RIGHT) as (url, _), pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(evaluate, "verdicts", stopped)
        run(world, "--judge_url", url)
    assert counts(json.loads(world["output"].read_text()))["all"] == 12


def test_the_judge_is_not_told_the_documents(script, world):
    script(lambda number, kind, member: words(number, "right"))
    with endpoint(lambda text: RIGHT) as (url, seen):
        told = run(world, "--judge_url", url, "--baseline", "rag")
    assert told["measures"]["all"]["lj"]["n"] == 12
    asked_for = {
        body["messages"][0]["content"].split("Question: ", 1)[1].split("\n")[0] for _, _, body in seen
    }
    assert asked_for == {f"What is number {i}?" for i in range(12)}
    assert not any("Doc 1" in body["messages"][0]["content"] for _, _, body in seen)


# ------------------------------------------------------------------------------------------------------------
# bad input: one line that names what and where, exit code 2, nothing written

BAD = {
    "no model": ({"model": ""}, "--model is needed"),
    "no data": ({"data": ""}, "--data is needed"),
    "method": ({"method": "semm"}, "--method semm"),
    "baseline": ({"baseline": "rga"}, "--baseline rga"),
    "real searches of a method that searches": ({"real_searches": "3"}, "--real_searches 3"),
    "real searches": ({"method": "ssrl", "real_searches": "-1"}, "--real_searches -1"),
    "samples": ({"samples": "-1"}, "--samples -1"),
    "topk": ({"topk": "0"}, "--topk 0"),
    "tau": ({"tau": "1.5"}, "--tau 1.5"),
    "tau is a number": ({"tau": "nan"}, "--tau nan"),
    "not a number": ({"topk": "two"}, "--topk"),
    "unknown flag": ({"modle": "x"}, "--modle"),
    "missing model": ({"model": "nowhere/model"}, "nowhere/model"),
    "missing data": ({"data": "nowhere/x.jsonl"}, "nowhere/x.jsonl"),
    "missing corpus": ({"corpus": "nowhere/c.jsonl"}, "nowhere/c.jsonl"),
    "missing known": ({"known": "nowhere/eval.json"}, "--known nowhere/eval.json"),
    "known is a list": ({"known": "list.json"}, "--known list.json"),
    "known is of a run": ({"known": "run.json"}, "--known run.json"),
    "known is no table": ({"known": "strange.json"}, "--known strange.json"),
    "known is not JSON": ({"known": "broken.json"}, "--known broken.json"),
    "known of a wrong kind": ({"known": "odd.json"}, "--known odd.json"),
    "no server": ({"retriever": "http://127.0.0.1:9"}, "--retriever"),
    "nothing to search": ({"corpus": ""}, "--corpus"),
    "output below a file": ({"output": "broken.json/eval.json"}, "broken.json"),
    "output is there": ({"output": "odd.json"}, "--output odd.json: it exists"),
    "ids": ({"data": "twice.jsonl"}, "twice: 2 questions have the id 7"),
    "no judge": ({"judge_url": "foo"}, "--judge_url foo"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, world, tmp_path, capsys, monkeypatch):
    change, named = BAD[case]
    work = tmp_path / "work"
    known = {
        "list": "[]",
        "run": '{"before": {}}',
        "strange": '{"known": 3}',
        "odd": '{"known": {"x": 1}}',
        "broken": "{",
    }
    for name, text in known.items():
        (work / f"{name}.json").write_text(text)
    row = json.dumps({"id": "7", "question": "what ?", "golden_answers": ["x"]})
    (work / "twice.jsonl").write_text(f"{row}\n{row}\n")
    before = sorted(work.iterdir())
    flags = world | {"output": "eval.json", "max_completion_length": 8} | change
    monkeypatch.chdir(work)
    argv = [str(x) for name, value in flags.items() if value != "" for x in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert err.count("\n") == 1 and err.startswith("evaluate.py: error: ") and named in err
    assert sorted(work.iterdir()) == before


def test_an_empty_output():
    with pytest.raises(InputError, match="--output is needed"):
        evaluate.check(evaluate.Config(model="m", data="d", output=""))


def test_the_budget_of_the_run(tmp_path):
    """What is not given comes from the run.json of the model, also for one of its checkpoints."""
    (tmp_path / "run.json").write_text(
        json.dumps({"method": "ssrl", "topk": 2, "max_searches": 3, "tau": 0.3})
    )
    for folder in (tmp_path, tmp_path / "checkpoint-7"):
        config = evaluate.Config(model=str(folder), data="d", topk=9)
        found = evaluate.check(config, {"topk"})
        assert (found.method, found.topk, found.max_searches, found.tau) == ("ssrl", 9, 3, 0.3)


def test_a_broken_run_json(world, tmp_path):
    for text in ("{", "[]"):
        (tmp_path / "model" / "run.json").write_text(text)
        with pytest.raises(InputError, match=r"run\.json"):
            run(world)


def test_every_flag_has_its_help():
    notes = evaluate.parse.__globals__["comments"](evaluate.Config)
    assert all(notes.get(name) for name in evaluate.Config.__dataclass_fields__)


# ------------------------------------------------------------------------------------------------------------
# real rows


@pytest.mark.skipif("SEM_DATA" not in os.environ, reason="SEM_DATA is not set")
def test_real_rows(tmp_path, capsys):
    """100 rows of each of four sets through a real tokenizer, the first passages of a corpus, and every
    pass."""
    tokenizer = AutoTokenizer.from_pretrained(REAL / "tokenizers" / "qwen2.5")
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    size |= {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    Qwen2ForCausalLM(Qwen2Config(**size, eos_token_id=tokenizer.eos_token_id)).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    with open(REAL / "corpus" / "wiki_multihop_corpus.jsonl") as file:
        (tmp_path / "corpus.jsonl").write_text("".join(islice(file, 3000)))
    names = ("hotpotqa", "gsm8k", "mmlu", "musique")
    flags = {
        "model": tmp_path / "model",
        "data": ",".join(f"{name}:{REAL / name}" for name in names),
        "corpus": tmp_path / "corpus.jsonl",
        "output": tmp_path / "eval.json",
        "eval_size": 100,
        "max_completion_length": 3,
    }
    first, text = run(flags), flags["output"].read_bytes()
    table = capsys.readouterr().out
    assert {name: m["em"]["n"] for name, m in first["measures"].items()} == dict.fromkeys(names, 100) | {
        "all": 400
    }
    rows = transcripts(flags)
    assert len(rows) == 3 * 400
    for name in names:
        ids = {q.id for q in load(f"{name}:{REAL / name}", "test")}
        assert {row["id"] for row in rows if row["set"] == name} <= ids
    run(flags)
    assert flags["output"].read_bytes() == text and capsys.readouterr().out == table
