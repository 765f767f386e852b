"""python -m pytest tests/test_evaluate.py          (SEM_DATA=FOLDER: also on real rows)

A tiny model is made to write the episodes of the twelve questions of test_measures.py, so that the records
and every measure can be computed by hand. The tests are about the passes, the program and its errors.
"""

import json
import os
import re
import runpy
from dataclasses import replace
from datetime import date
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_measures import (
    EXPECTED_FIGURES,
    EXPECTED_SHARES,
    RIGHT,
    TWELVE,
    WRONG,
    endpoint,
    numbered,
    records,
)
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
from config import comments, parse
from data import Doc, InputError, load
from knowledge import classes, search_by_knowledge
from measures import Record, cell, report, wilson
from prompts import DIRECT, SEM, SSRL
from retriever import RetrieverError

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("SEM_DATA", "/nowhere"))

# ------------------------------------------------------------------------------------------------------------
# a tiny model that writes what a test wants


@cache
def byte_tokenizer():
    """Every byte is a token, so that a prompt can be read back. Every tag is a token too, so that texts are
    short."""
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
    """Answers each query with one document that has the query as its title."""

    def search(self, queries, k):
        return [[Doc("0", query, "a document")] for query in queries]


def words(i: int, kind: str) -> str:
    return {"right": f"gold {i}", "half": "gold", "wrong": "Bob"}[kind]


def answer(i: int, kind: str) -> str:
    return f"<answer>{words(i, kind)}</answer>" if kind else ""


SETS = {"towers": [numbered(i) for i in range(5)], "rivers": [numbered(i) for i in range(5, 12)]}


RIGHT_OF_8 = 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 3, 8  # of the closed-book samples of each question


def episode(i: int, kind: str, member: int) -> str:
    """What the policy writes in one pass over question i of the twelve."""
    draft, searches, last, known, forced, _, _, c = TWELVE[i]
    start = "<think>hm</think>" + answer(i, draft)
    if kind == "closed-book":
        return words(i, "right" if known else "wrong")
    if kind == "knowledge":
        return words(i, "right" if member < RIGHT_OF_8[i] else "wrong")
    if kind == "sampled":
        return "<think>hm</think>" + answer(i, "right" if member < c else "wrong")
    if kind == "forced":
        return start + f"query {i}</search>" + answer(i, "right" if forced else "wrong")
    return start + f"<search>query {i}</search>" * searches + (answer(i, last) if searches else "")


@pytest.fixture
def script(monkeypatch):
    """script(text) makes the model write `text(number of the question, pass, member)` in every row of every
    pass. Which pass it is can be seen from the arguments of `rollout`."""
    real, current = rollout.rollout, {}

    def spied(model, tokenizer, template, questions, *, group_size=1, **options):
        forced = options.get("force_search")
        kind = "closed-book" if template is DIRECT else "forced" if forced else "normal"
        several = "knowledge" if kind == "closed-book" else "sampled"
        current["kind"] = several if group_size > 1 else kind
        current["rows"] = [(int(q.id.strip("q")), member) for q in questions for member in range(group_size)]
        current["streams"], current["tokenizer"] = {}, tokenizer
        return real(model, tokenizer, template, questions, group_size=group_size, **options)

    def start(text):
        def scripted(logits, u, temperature, vocab_size):
            assert temperature == (1.0 if current["kind"] in ("sampled", "knowledge") else 0.0)
            tokenizer, tokens = current["tokenizer"], []
            for row in map(int, u.tolist()):
                if row < 0:  # a row of padding
                    tokens.append(0)
                    continue
                if row not in current["streams"]:
                    number, member = current["rows"][row]
                    written = text(number, current["kind"], member)
                    ids = tokenizer(written, add_special_tokens=False).input_ids
                    current["streams"][row] = iter([*ids, tokenizer.eos_token_id])
                tokens.append(next(current["streams"][row]))
            return torch.tensor(tokens), torch.zeros(len(tokens))

        monkeypatch.setattr(rollout, "uniform_stream", lambda n, seed, step, row: [float(row)] * n)
        monkeypatch.setattr(runner, "sample", scripted)
        monkeypatch.setattr(
            rollout, "SERVE_EVERY", 1
        )  # a GPU that is a step ahead would read on in the script
        monkeypatch.setattr(evaluate, "rollout", spied)

    start(episode)
    return start


def passes(template=SEM, **options):
    """Calls evaluate() on the twelve questions. Returns its records, and the episodes of each pass."""
    seen: dict[str, list] = {}
    options = {"closed_book": True, "max_searches": 4, "progress": False, "slots": 5} | options
    sets, retriever = options.pop("sets", SETS), options.pop("retriever", Shelf())

    def log(name, kind, episodes):
        seen.setdefault(kind, []).extend(episodes)

    return evaluate.evaluate(*tiny(), template, sets, retriever, log=log, **options), seen


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
        want.id, want.judged, want.known_base, want.self_searches = f"q{i}", None, None, None
        want.tokens = length(episode(i, "normal", 0)) + 1  # one more for the end token
        assert got.f1 == pytest.approx(want.f1)
        want.f1 = got.f1
        assert got == want
    numbers = {"normal": 12, "closed-book": 12, "forced": 12, "sampled": 48}
    assert {kind: len(episodes) for kind, episodes in seen.items()} == numbers


@pytest.mark.parametrize("tau, right", [(0.66, True), (0.67, False)])
def test_the_draft_is_right_from_tau_on(script, tau, right):
    table, _ = passes(tau=tau, closed_book=False)
    assert flat(table)[11].draft is right and table["rivers"][6].id == "q11"


def test_passes_that_are_left_out(script):
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


def test_forced_tokens_are_no_policy_tokens(script):
    table, seen = passes(force=True, closed_book=False)
    assert set(seen) == {"normal"}
    for i, (record, e) in enumerate(zip(flat(table), seen["normal"], strict=True)):
        forced = [s for s in e.segments if s.kind == "forced"]
        assert len(forced) == (TWELVE[i][0] != "")  # it follows the draft, so there is none without a draft
        assert [s.text for s in forced] == ["\n<search>"] * len(forced)
        assert record.tokens == sum(e.loss_mask)
        if forced:
            assert record.tokens == length(episode(i, "forced", 0)) + 1
        assert record.searches == len(forced) and record.em == bool(TWELVE[i][4] and forced)


def test_the_tokens_of_ssrl_are_those_outside_its_results(script):
    """SSRL writes its results itself, and they are not trained on, so Record.tokens does not count them."""
    thought, query, result = "<think>hm</think>", "<search>query 1</search>", "<information>x</information>"

    def text(number, kind, member):
        return thought + (query + result) * TWELVE[number][1] + answer(number, "right")

    script(text)
    table, seen = passes(SSRL, retriever=None, closed_book=False)
    for i, (record, e) in enumerate(zip(flat(table), seen["normal"], strict=True)):
        results = TWELVE[i][1]
        trained = thought + query * results + answer(i, "right")
        assert record.tokens == e.policy_tokens == sum(e.loss_mask) == length(trained) + 1
        assert record.tokens == len(e.ids) - results * length(result)
        assert [s.kind for s in e.segments] == ["model"]
        assert (record.searches, record.self_searches) == (0, results)
    assert any(TWELVE[i][1] for i in range(12))


def test_always_forces_the_samples_too(script):
    """pass@k of the policy that always searches is measured with searches too."""
    seen = []
    script(lambda number, kind, member: "<think>hm</think><answer>Bob</answer>q</search>")
    evaluate.evaluate(
        *tiny(), SEM, {"towers": SETS["towers"]}, Shelf(), force=True, samples=2, progress=False,
        log=lambda _, kind, episodes: seen.extend((kind, e.searches) for e in episodes),
    )  # fmt: skip
    assert seen == [("normal", 1)] * 5 + [("sampled", 1)] * 10


@pytest.mark.parametrize("fails", ["query 3", "query 8"])
def test_a_search_that_failed_leaves_its_question_out(script, fails, capsys):
    """The search of question 3 fails in the normal pass, that of question 8 only in the forced pass."""

    class Flaky(Shelf):
        def search(self, queries, k):
            if fails in queries:
                raise RetrieverError("down")
            return super().search(queries, k)

    sets = {"towers": [numbered(2), numbered(3)], "rivers": [numbered(8), numbered(5)]}
    table, _ = passes(retriever=Flaky(), slots=1, sets=sets)
    number = int(fails.split()[1])
    assert [r.id for r in flat(table)] == [f"q{i}" for i in (2, 3, 8, 5) if i != number]
    name = "towers" if number < 5 else "rivers"
    assert f"warning: {name}: 1 searches failed" in "".join(capsys.readouterr())


def test_a_sample_whose_search_failed_leaves_its_question_out(script):
    """A failed search says nothing about the model, so it does not count as a wrong sample."""

    class Flaky(Shelf):
        def search(self, queries, k):
            if "query 1" in queries:
                raise RetrieverError("down")
            return super().search(queries, k)

    def text(number, kind, member):
        if kind != "sampled":
            return episode(number, "normal", 0)
        start = "<think>hm</think><answer>Bob</answer>"
        return start + f"<search>query {number}</search>" + answer(number, "right")

    script(text)
    sets = {"towers": [numbered(i) for i in range(3)]}
    table, _ = passes(retriever=Flaky(), slots=1, samples=2, closed_book=False, sets=sets)
    rows = flat(table)
    assert [r.id for r in rows] == ["q0", "q2"]
    assert all(r.sampled == [True, True] for r in rows)


def test_searches_by_what_the_samples_know(script):
    """The classes of the twelve questions by hand, from the numbers of right samples."""
    table, seen = passes(knowledge_samples=8, closed_book=False)
    assert len(seen["knowledge"]) == 96 and all(e.searches == 0 for e in seen["knowledge"])
    rows = flat(table)
    assert [sum(r.closed_book) for r in rows] == list(RIGHT_OF_8)
    assert all(len(r.closed_book) == 8 for r in rows)
    assert list(search_by_knowledge(table, 8)) == list(table)  # no figure for all sets together
    found = search_by_knowledge({"both": rows}, 8)["both"]
    by_class = {"0": (0, 9), "1-2": (1, 2), "3-5": (3, 4, 5, 10), "6-7": (6, 7), "8": (8, 11)}
    assert list(found) == list(by_class)
    for name, numbers in by_class.items():
        searched = [TWELVE[i][1] > 0 for i in numbers]
        assert found[name]["value"] == sum(searched) / len(searched) and found[name]["n"] == len(numbers)
        assert (found[name]["low"], found[name]["high"]) == wilson(sum(searched), len(searched))


@pytest.mark.parametrize(
    "n, names",
    [(1, "0 1"), (2, "0 1 2"), (4, "0 1 2 3 4"), (8, "0 1-2 3-5 6-7 8"), (32, "0 1-8 9-23 24-31 32")],
)
def test_every_number_of_right_samples_is_in_one_class(n, names):
    assert list(classes(n)) == names.split()
    assert [i for numbers in classes(n).values() for i in numbers] == list(range(n + 1))


# ------------------------------------------------------------------------------------------------------------
# the program


@pytest.fixture
def world(tmp_path):
    """Writes a model, two data sets and a corpus. Returns flags for evaluate.py."""
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


def run(flags: dict, *arguments: str) -> dict:
    """Runs the program in this process, where `script` is in effect. Returns eval.json.

    Without CUDA graphs, because a script is read token by token, and a recording runs a step twice."""
    argv = [str(x) for name, value in flags.items() for x in (f"--{name}", value)] + ["--no-cuda_graphs"]
    config, given = parse(evaluate.Config, "evaluate.py", [*argv, *arguments])
    Path(config.output).unlink(missing_ok=True)
    evaluate.main(config, given)
    return json.loads(Path(config.output).read_text())


def counts(content: dict) -> dict[str, int]:
    return {name: table["em"]["n"] for name, table in content["measures"].items()}


def transcripts(flags: dict) -> list[dict]:
    path = flags["output"].with_name("eval_transcripts.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_program(script, world, capsys):
    base = world | {"output": world["output"].with_name("base.json")}
    script(lambda number, kind, member: words(number, "right" if TWELVE[number][5] else "wrong"))
    assert run(base)["known"] == {"towers": ["q0", "q1", "q2"], "rivers": ["q5", "q6"]}
    script(episode)
    capsys.readouterr()
    content = run(world, "--known", str(base["output"]), "--samples", "4", "--batch_size", "7")
    tables = content["measures"]
    assert list(tables) == ["towers", "rivers", "all"]
    for name, (among, counted) in EXPECTED_SHARES.items():
        for group, members in (("towers", range(5)), ("rivers", range(5, 12)), ("all", range(12))):
            n, k = (len(set(members) & set(numbers)) for numbers in (among, counted))
            if name in ("lj", "self_sr"):  # no judge, and SEM does not ask itself
                assert name not in tables[group]
            elif n:
                assert tables[group][name]["value"] == pytest.approx(k / n), (name, group)
                assert tables[group][name]["n"] == n
    for name, value in EXPECTED_FIGURES.items():
        assert tables["all"][name]["value"] == pytest.approx(value), name
    assert content["known"] == {"towers": ["q0", "q3", "q4"], "rivers": ["q5", "q9"]}
    assert content["config"]["method"] == "sem"
    printed = capsys.readouterr().out
    assert report(tables) in printed and "| measure | towers | rivers | all |" in printed
    rows = transcripts(world)
    assert len(rows) == 12 * 3 + 48
    assert {row["pass"] for row in rows} == {"normal", "closed-book", "forced", "sampled"}
    [row] = [r for r in rows if r["id"] == "q5" and r["pass"] == "forced"]
    assert [s["kind"] for s in row["segments"]] == ["model", "forced", "model", "env", "model"]
    assert row["answer"] == "gold 5" and row["right"] and row["searches"] == 1 and row["set"] == "rivers"


def test_the_program_with_closed_book_samples(script, world, capsys):
    content = run(world, "--knowledge_samples", "8", "--no-closed_book", "--batch_size", "9")
    tables = content["search_by_knowledge"]
    counts = {name: sum(x["n"] for x in table.values()) for name, table in tables.items()}
    assert counts == {"towers": 5, "rivers": 7}
    printed = capsys.readouterr().out
    assert "if right closed-book in .. of 8 samples | towers | rivers |" in printed
    [line] = re.findall(r"^\| 0 \| (.*) \| (.*) \|$", printed, re.MULTILINE)
    assert line == tuple(cell(tables[name].get("0")) for name in ("towers", "rivers"))
    [line] = re.findall(r"^\| 8 \| (.*) \| (.*) \|$", printed, re.MULTILINE)
    assert line[0] == "-" and "8" not in tables["towers"]  # towers has no question in this class
    assert sum(row["pass"] == "knowledge" for row in transcripts(world)) == 96
    assert "search_by_knowledge" not in run(world, "--no-closed_book")


def test_what_the_base_model_knows_is_looked_up_by_set(script, world, tmp_path):
    """Two sets may have the same ids, so an id alone does not tell which question the base model knows."""
    (tmp_path / "copy.jsonl").write_text((tmp_path / "towers.jsonl").read_text())
    (tmp_path / "base.json").write_text('{"known": {"towers": ["q3", "q0"], "elsewhere": ["q4"]}}')
    flags = world | {
        "data": f"{tmp_path}/towers.jsonl,{tmp_path}/copy.jsonl",
        "known": tmp_path / "base.json",
    }
    tables = run(flags, "--no-closed_book")["measures"]
    assert tables["towers"]["over_search_base"]["value"] == 1 / 2  # the model searches for q3 but not for q0
    assert "over_search_base" not in tables["copy"] and tables["all"]["over_search_base"]["n"] == 2


def test_the_same_table_twice(world, capsys):
    """The normal passes are greedy, and the samples, the bootstrap and the draw of questions are seeded, so a
    second run writes the same eval.json, byte for byte."""
    small = ("--eval_size", "3", "--max_completion_length", "12", "--samples", "2", "--batch_size", "4")
    first, text = (run(world, *small), world["output"].read_bytes())
    table = capsys.readouterr().out
    assert run(world, *small) == first and world["output"].read_bytes() == text
    assert capsys.readouterr().out == table
    assert counts(first) == {"towers": 3, "rivers": 3, "all": 6}


def test_baselines(script, world):
    def text(number, kind, member):
        if kind == "closed-book" or baseline == "rag":
            return words(number, "wrong" if baseline == "always" else "right")
        if baseline == "cot":
            return f"<think>hm</think>{answer(number, 'right')}"
        return episode(number, kind, member)

    script(text)
    for baseline in ("direct", "cot", "rag", "always"):
        table = run(world, "--baseline", baseline)["measures"]["all"]
        rows = [row for row in transcripts(world) if row["pass"] == "normal"]
        assert table["sr"]["value"] == {"direct": 0, "cot": 0, "rag": 1, "always": 11 / 12}[baseline]
        assert ("known" in table) == (baseline != "rag")
        if baseline != "always":
            assert table["em"]["value"] == 1.0
        if baseline == "rag":
            lines = rows[4]["question"].splitlines()
            assert lines[0] == "Doc 1: query 4: number 4" and lines[-1] == "Question: What is number 4?"
            assert len(lines) == 5 + 2
        else:
            assert rows[4]["question"] == "What is number 4?"
        assert ("under_search" in table) == (baseline == "always")


def test_the_method_is_that_of_the_models_run(world, tmp_path):
    """The run.json of the model names the method, also for a checkpoint of the run. A flag overrides it."""
    checkpoint = tmp_path / "model" / "checkpoint-5"
    checkpoint.mkdir()
    for folder in (tmp_path / "model", checkpoint):
        config = evaluate.Config(model=str(folder), data="x")
        assert evaluate.check(config).method == "sem"
        (tmp_path / "model" / "run.json").write_text('{"method": "ssrl"}')
        assert evaluate.check(config).method == "ssrl"
        assert evaluate.check(replace(config, method="research")).method == "research"
        (tmp_path / "model" / "run.json").unlink()


@pytest.mark.parametrize("real, searches", [("", 0), ("1", 1), ("2", 2), ("all", 2)])
def test_real_searches(script, world, real, searches):
    """SSRL writes its results itself. Real ones replace the first K of them, and without K no retriever is
    needed."""

    def text(number, kind, member):
        if kind == "closed-book":
            return "Bob"
        parts = ["<think>hm</think><search>query 1</search>", "<information>made up</information>"]
        turns = [parts[0] + (parts[1] if i >= searches else "") for i in range(2)]
        return "".join(turns) + "<think>hm</think>" + answer(number, "right")

    script(text)
    flags = world | {"method": "ssrl", "data": str(world["data"]).split(",")[0]}
    if not real:
        flags.pop("corpus")  # there is nothing to search, and this is no error
    table = run(flags, *(["--real_searches", real] if real else []))["measures"]["towers"]
    assert table["searches"]["value"] == searches and table["em"]["value"] == 1.0
    for row in transcripts(world)[:5]:
        assert [s["kind"] for s in row["segments"]].count("env") == searches
        policy_text = "".join(s["text"] for s in row["segments"] if s["kind"] == "model")
        assert policy_text.count("made up") == 2 - searches


# ------------------------------------------------------------------------------------------------------------
# the judge


def test_the_judge_in_the_table(script, world, capsys):
    """The judge gets the answers of the normal pass. If it gives no verdict on some of them, these are left
    out of the measure and a warning is printed."""

    def reply(text):
        number = int(text.split("What is number ")[1].split("?")[0])
        if number in (2, 10):
            return (500, b"") if number == 2 else "hm"
        return RIGHT if f"Answer: gold {number}" in text else WRONG

    with endpoint(reply) as (url, seen):
        tables = run(world, "--judge_url", url)["measures"]
    assert len(seen) == 1 + 12 and tables["all"]["lj"]["n"] == 10  # the first request tests the address
    assert tables["all"]["lj"]["value"] == 5 / 10  # the questions 0, 1, 3, 5 and 6
    assert tables["towers"]["lj"]["value"] == 3 / 4
    text = "".join(capsys.readouterr())
    assert "towers: the judge gave no verdict on 1 of 5" in text and "on 1 of 7" in text


def test_figures_are_written_before_the_judge_is_asked(script, world, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with endpoint(lambda prompt: RIGHT) as (url, _), pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(evaluate, "verdicts", stop)
        run(world, "--judge_url", url)
    assert counts(json.loads(world["output"].read_text()))["all"] == 12


def test_the_judge_does_not_see_the_documents(script, world):
    script(lambda number, kind, member: words(number, "right"))
    with endpoint(lambda prompt: RIGHT) as (url, seen):
        tables = run(world, "--judge_url", url, "--baseline", "rag")["measures"]
    assert tables["all"]["lj"]["n"] == 12
    prompts = [body["messages"][0]["content"] for _, _, body in seen]
    questions = {re.search("Question: (.*)", prompt)[1] for prompt in prompts}
    assert questions == {f"What is number {i}?" for i in range(12)}
    assert not any("Doc 1" in prompt for prompt in prompts)


# ------------------------------------------------------------------------------------------------------------
# Bad input is reported on one line that names it. The exit code is 2, and nothing is written.

BAD = {
    "no model": ({"model": ""}, "--model is needed"),
    "no data": ({"data": ""}, "--data is needed"),
    "method": ({"method": "semm"}, "--method semm"),
    "baseline": ({"baseline": "rga"}, "--baseline rga"),
    "real searches of a method that searches": ({"real_searches": "3"}, "--real_searches 3"),
    "real searches": ({"method": "ssrl", "real_searches": "-1"}, "--real_searches -1"),
    "samples": ({"samples": "-1"}, "--samples -1"),
    "knowledge samples": ({"knowledge_samples": "-1"}, "--knowledge_samples -1"),
    "samples with documents": ({"knowledge_samples": "8", "baseline": "rag"}, "not with --baseline rag"),
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
    "no judge": ({"judge_url": "foo"}, "--judge_url 'foo'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, world, tmp_path, capsys, monkeypatch):
    change, message = BAD[case]
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
    assert err.count("\n") == 1 and err.startswith("evaluate.py: error: ") and message in err
    assert sorted(work.iterdir()) == before


def test_an_empty_output():
    with pytest.raises(InputError, match="--output is needed"):
        evaluate.check(evaluate.Config(model="m", data="d", output=""))


def test_the_budget_of_the_run(tmp_path):
    """A setting whose flag is not given is read from the run.json of the model, also for a checkpoint."""
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
    notes = comments(evaluate.Config)
    assert all(notes.get(name) for name in evaluate.Config.__dataclass_fields__)


# ------------------------------------------------------------------------------------------------------------
# real rows


@pytest.mark.skipif("SEM_DATA" not in os.environ, reason="SEM_DATA is not set")
def test_real_rows(tmp_path, capsys):
    """Every pass runs on 100 rows of each of four sets, with a real tokenizer and the beginning of a
    corpus."""
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
    assert counts(first) == dict.fromkeys(names, 100) | {"all": 400}
    rows = transcripts(flags)
    assert len(rows) == 3 * 400
    for name in names:
        ids = {q.id for q in load(f"{name}:{REAL / name}", "test")}
        assert {row["id"] for row in rows if row["set"] == name} <= ids
    run(flags)
    assert flags["output"].read_bytes() == text and capsys.readouterr().out == table


# ------------------------------------------------------------------------------------------------------------
# what comes from other files


def test_known_questions_that_are_not_there_are_said(script, world, tmp_path, capsys):
    (tmp_path / "base.json").write_text('{"known": {"towers": ["q77"], "rivers": ["q5"]}}')
    run(world | {"known": tmp_path / "base.json"}, "--no-closed_book")
    text = "".join(capsys.readouterr())
    assert text.count("has none of its questions") == 1 and "warning: towers: --known" in text


def test_the_date_of_the_run(tmp_path, capsys):
    """An evaluation prints the date that its model was trained with."""
    config = evaluate.Config(model=str(tmp_path), data="d")
    today = date.today().isoformat()
    assert evaluate.check(config).date == today and not "".join(capsys.readouterr())
    (tmp_path / "run.json").write_text(json.dumps({"method": "sem", "date": "2019-02-05"}))
    assert evaluate.check(config).date == "2019-02-05"
    assert (
        evaluate.check(evaluate.Config(model=str(tmp_path), data="d", date="2020-01-01"), {"date"}).date
        == "2020-01-01"
    )
    (tmp_path / "run.json").write_text(json.dumps({"method": "sem"}))
    assert evaluate.check(config).date == today and "has no date" in "".join(capsys.readouterr())


def test_the_date_is_in_the_prompts(script, world, tmp_path):
    path = tmp_path / "model" / "chat_template.jinja"
    path.write_text("{{ strftime_now('[date %d %b %Y]') }}" + path.read_text())
    seen = []

    def reply(number, kind, member):
        return words(number, "right")

    script(reply)
    real = evaluate.rollout

    def spy(model, tokenizer, *arguments, **options):
        episodes = real(model, tokenizer, *arguments, **options)
        seen.extend(tokenizer.decode(e.prompt_ids) for e in episodes)
        return episodes

    evaluate.rollout = spy
    try:
        run(world, "--date", "2019-02-05")
    finally:
        evaluate.rollout = real
    assert len(seen) == 36 and all("[date 05 Feb 2019]" in prompt for prompt in seen)


def test_the_forced_pass_searches_whatever_the_uncertainty(script):
    """With entropy-guided search, a query that is as certain as the one before is answered by the model. The
    forced pass asks what real results would change, so there every query is searched for."""
    first, second = "query 1</search>", "<search>query 2</search>"

    def text(number, kind, member):
        if kind == "closed-book":
            return "Bob"
        rest = second + answer(number, "right")
        return "<think>hm</think>" + ("" if kind == "forced" else "<search>") + first + rest

    script(text)
    table, seen = passes(SSRL, entropy_guided=True)
    assert {e.searches for e in seen["normal"]} == {1} and {e.searches for e in seen["forced"]} == {2}
    assert all(record.searches == 1 and record.forced for record in flat(table))
