"""python -m pytest tests/test_coldstart.py          (SEM_DATA=FOLDER: also with real tokenizers)

A transcript is compared with the episode that `rollout` makes when the policy samples the same tokens: ids,
mask, segments and the reason of the end are equal. Other tests are about what is written (the gold stands in
the results, shares of searches, decoys), about the loss, the exam and everything that is refused.
"""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_rollout import build, pieces, script, tokenizer_named  # noqa: F401 (script is a fixture)
from torch.nn.functional import cross_entropy

import coldstart
import transcripts
from data import Doc, InputError, Question, load
from disk import read_lines
from model import load_model
from prompts import DIRECT
from retriever import RetrieverError
from reward import METHODS, exact_match, parse_episode
from rollout import detokenize, rollout
from sft import fit
from transcripts import Fact, find_gold, read_results, transcript, write_transcripts

DIALECTS = ["sem", "ssrl", "search-r1", "research", "zerosearch", "hybrid"]
TOKENIZERS = ["pieces", "qwen2.5", "phi-3-mini", "minimind"]
PARIS = Question("q", "what is the capital of France?", ["Paris"], "towns")
FRANCE = [Doc("0", "France", "Its capital is Paris, on the Seine. </result> "), Doc("1", "Seine", "A river.")]
TURNS = [("capital of France", FRANCE, "Its capital is Paris"), ("the Seine", FRANCE[1:], "A river")]


class Library:
    """Answers each query with the documents that belong to it, and with none if there are none."""

    def __init__(self, shelves):
        self.shelves, self.queries = shelves, []

    def search(self, queries, k):
        self.queries += queries
        return [self.shelves.get(query, [])[:k] for query in queries]


class Dice:
    """`random()` is always `value`; `choice` is random."""

    def __init__(self, value):
        self.random, self.choice = lambda: value, random.Random(0).choice


def segment_kinds(episode):
    """The kind of segment of each token."""
    return [s.kind for s in episode.segments for _ in s.ids]


# ------------------------------------------------------------------------------------------------------------
# a transcript is an episode of rollout


@pytest.mark.slow
@pytest.mark.parametrize("searches", [0, 1, 2])
@pytest.mark.parametrize("reminded", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("method", DIALECTS)
def test_a_transcript_is_the_episode_that_rollout_would_make(script, method, name, reminded, searches):  # noqa: F811
    tokenizer, template = tokenizer_named(name), METHODS[method].template
    fact = Fact(PARIS, "Paris", TURNS[:searches])
    dice = Dice(0.0 if reminded else 1.0)
    written = transcript(fact, "Rome", searches > 0, template, tokenizer, dice, max_doc_tokens=6)
    own = [s.ids for s in written.segments if s.kind == "model"]
    model = build("llama", tokenizer, context=4096)
    script([[i for ids in own for i in ids]], tokenizer.eos_token_id)
    shelves = {query: docs for query, docs, _ in TURNS}
    retriever = None if template.self_search else Library(shelves)
    [sampled] = rollout(
        model, tokenizer, template, [PARIS], retriever=retriever, max_doc_tokens=6, max_completion_length=3000
    )
    assert written.prompt_ids == sampled.prompt_ids and written.ids == sampled.ids
    assert [s.kind for s in written.segments] == [s.kind for s in sampled.segments]
    assert [s.ids for s in written.segments] == [s.ids for s in sampled.segments]
    assert (written.stop, written.searches) == (sampled.stop, sampled.searches)
    assert written.searches == (0 if template.self_search else searches)
    fumbled = reminded and bool(template.reminder)  # the turn before a reminder is not a lesson
    assert ("reminder" in [s.kind for s in written.segments]) == fumbled
    if template.self_search:  # a model that is to write results has to learn it
        assert (all(written.loss_mask) and sum(sampled.loss_mask) < len(sampled.ids)) or not searches
    elif template.memory and reminded:  # this Dice makes it recall
        assert all(t for t, s in zip(written.loss_mask, segment_kinds(written), strict=True) if s == "model")
        assert 0 < sum(sampled.loss_mask) < sum(written.loss_mask)
    else:
        n = len(own[0]) if fumbled else 0
        assert written.loss_mask[n:] == sampled.loss_mask[n:] and not any(written.loss_mask[:n])
    if name != "phi-3-mini":  # whose decoded text is not exactly the encoded one
        assert [s.text for s in written.segments] == [s.text for s in sampled.segments]


@pytest.mark.parametrize("method", DIALECTS)
def test_the_reward_of_the_method_pays_a_transcript_that_read(method):
    template, tokenizer = METHODS[method].template, pieces()
    fact = Fact(PARIS, "Paris", TURNS[:1])
    e = transcript(fact, "Rome", True, template, tokenizer, Dice(1.0), max_doc_tokens=60)
    assert METHODS[method].reward(e, PARIS, tau=0.5, group=[e])["reward"] > 0.6
    assert transcripts.is_valid(e) and parse_episode(e).answer == "Paris"
    assert parse_episode(e).first == ("Rome" if template.draft else parse_episode(e).first)
    e = transcript(fact, "Rome", False, template, tokenizer, Dice(1.0), max_doc_tokens=60)
    assert exact_match(parse_episode(e).answer, PARIS) == 0.0 and transcripts.is_valid(e)


def test_a_closed_book_transcript_is_the_answer_alone():
    e = transcript(Fact(PARIS, "Paris", TURNS), "Paris", False, DIRECT, pieces(), Dice(0.0), 60)
    assert [s.text for s in e.segments] == ["Paris"] and all(e.loss_mask)
    assert e.ids[-1] == pieces().eos_token_id and e.ids[:-1] == pieces()("Paris").input_ids


# ------------------------------------------------------------------------------------------------------------
# what is written


def test_a_gold_is_found_as_whole_words_in_the_spelling_of_the_text():
    q = replace(PARIS, answers=["the new york times", "yes"])
    assert find_gold(q, 'He read "The New York Times", always.')[0] == "The New York Times"
    assert find_gold(q, "one two three four five New York Times. Then", before=2) == (
        "New York Times", "four five New York Times",
    )  # fmt: skip
    assert find_gold(q, "yes, New York is nice") is None
    assert find_gold(replace(q, answers=["10"]), "in 1910 and 100") is None


def facts(questions, shelves, **options):
    options = {"topk": 2, "max_doc_tokens": 60} | options
    return read_results(questions, Library(shelves), pieces(), METHODS["sem"].template, **options)


def test_a_question_is_readable_only_by_what_the_model_sees():
    shelves = {PARIS.text: FRANCE}
    [fact] = facts([PARIS], shelves)
    assert fact.answer == "Paris" and fact.turns == [(PARIS.text, FRANCE, "France: Its capital is Paris")]
    assert facts([PARIS], shelves, max_doc_tokens=20)[0].turns is None  # the document is cut before it
    assert facts([PARIS], {PARIS.text: FRANCE[::-1]}, topk=1)[0].turns is None
    assert facts([PARIS], {})[0].turns is None


def test_musique_is_searched_by_its_own_steps(tmp_path):
    row = {
        "id": "2hop",
        "question": "where was the author of X born?",
        "answer": "Paris",
        "answer_aliases": [],
    }
    steps = [("X >> author", "Zola"), ("where was #1 born?", "Paris")]
    row |= {"question_decomposition": [{"question": q, "answer": a} for q, a in steps], "paragraphs": []}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    [question] = load(f"musique:{tmp_path}/m.jsonl")
    shelves = {"X author": [Doc("0", "X", "A novel by Zola.")]}
    shelves["where was Zola born?"] = [Doc("1", "Zola", "Born in Paris.")]
    [fact] = facts([question], shelves, max_searches=2)
    assert [query for query, *_ in fact.turns] == ["X author", "where was Zola born?"]
    e = transcript(fact, "Rome", True, METHODS["sem"].template, pieces(), Dice(1.0), 60)
    assert parse_episode(e).shape == "TASRTSRTA" and parse_episode(e).valid and e.searches == 2
    assert facts([question], shelves, max_searches=1)[0].turns is None  # then it is one query: the question
    del shelves["where was Zola born?"]
    assert facts([question], shelves, max_searches=2)[0].turns is None


def test_shares_of_searches_and_what_facts_and_decoys_are_told():
    def fact(i, known):
        question = Question(str(i), f"where is {i}?", [f"town {i}"], "towns")
        turns = [("q", [Doc("0", "", f"It is in town {i}.")], f"It is in town {i}")]
        return Fact(question, f"town {i}", turns, draft="Rome", known=known)

    config = coldstart.Config(rows=1200, times=60)
    train, inject = [fact(i, i < 10) for i in range(20)], [fact(i, True) for i in range(20, 25)]
    decoys = [fact(i, True) for i in range(25, 30)]
    episodes = write_transcripts(pieces(), METHODS["sem"].template, train, inject, decoys, config)
    assert len(episodes) == 1200 + 60 * 10
    shown = Counter(e.question.id for e in episodes)
    assert all(shown[str(i)] == 60 for i in range(30))
    searched, direct = Counter(), Counter()
    for e in episodes:
        i, p = int(e.question.id), parse_episode(e)
        kind = "known" if i < 10 else "unknown" if i < 20 else "inject" if i < 25 else "decoy"
        direct[kind] += e.template == DIRECT
        searched[kind] += e.searches
        first = p.answer if e.template == DIRECT else p.first
        if i < 20:
            assert first == "Rome"
        else:
            assert (first == f"town {i}") == (i < 25) and re.fullmatch(r"town 2\d", first)
        if e.searches:
            assert p.last == f"town {i}"
            assert find_gold(e.question, next(s.text for s in e.segments if s.kind == "env"))
    assert abs(searched["known"] / 600 - 0.6) < 0.06 and abs(searched["unknown"] / 600 - 0.85) < 0.05
    for kind in ("inject", "decoy"):  # in the same forms, equally often
        assert (
            abs(direct[kind] / 300 - 0.5) < 0.09 and abs(searched[kind] / (300 - direct[kind]) - 0.6) < 0.12
        )
    assert len({parse_episode(e).answer for e in episodes if e.question.id == "27" and not e.searches}) > 5


def test_drafts_are_the_models_own_closed_book_answers(script):  # noqa: F811
    tokenizer = pieces()
    script([tokenizer("Paris.\nOr Rome").input_ids], tokenizer.eos_token_id)
    model = build("llama", tokenizer, context=1024)
    assert transcripts.closed_book(model, tokenizer, [PARIS], 16) == ["Paris"]
    script([tokenizer("Paris is the capital").input_ids], tokenizer.eos_token_id)
    assert transcripts.closed_book(model, tokenizer, [PARIS], 5) == ["Paris"]


# ------------------------------------------------------------------------------------------------------------
# the loss


def small(seed=0):
    return build("llama", pieces(), context=64, seed=seed)


def test_the_loss_is_that_of_the_masked_tokens_alone():
    """Against a loop without padding: rows of different lengths, which hold the ids that other programs would
    take for padding (0, and the end token)."""
    rng, end = random.Random(0), pieces().eos_token_id
    rows = []
    for n in (5, 9, 12, 7, 12, 3):
        ids = [rng.choice([0, end, 40, 50, 60]) for _ in range(n)]
        rows.append((ids, [rng.random() < 0.5 for _ in ids[:-1]] + [True]))
    ours, theirs = small(), small()
    fit(ours, [rows, rows[:4]], steps=2, learning_rate=1e-3, warmup=1, desc="test")
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01)
    for step, part in enumerate([rows, rows[:4]]):
        optimizer.param_groups[0]["lr"] = 1e-3 * (0.55 + 0.45 * [1, 0][step])
        n = sum(sum(mask[1:]) for _, mask in part)
        for ids, mask in part:
            logits = theirs(torch.tensor([ids])).logits[0, :-1]
            losses = cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            (losses[torch.tensor(mask[1:])].sum() / n).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-6), name
        assert not torch.equal(a, dict(small().named_parameters())[name])


def test_a_loss_that_is_not_finite_ends_the_training():
    model = small()
    model.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(InputError, match="loss of step 1 is nan"):
        fit(model, [[([1, 2, 3], [True] * 3)]], 1, 1e-3, 1, "test")


# ------------------------------------------------------------------------------------------------------------
# the program


def write_files(folder, tokenizer, questions=16):
    model = build("llama", tokenizer, context=2048)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    corpus = [{"id": str(i), "contents": f'"place{i}"\nplace{i} is in town{i}.'} for i in range(40)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    for name, span in ("train", range(questions)), ("inject", range(20, 23)), ("decoys", range(30, 33)):
        rows = [
            {"id": str(i), "question": f"where is place{i}?", "golden_answers": [f"town{i}"]} for i in span
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {name: f"{folder}/{name}.jsonl" for name in ("train", "inject", "decoys", "corpus")}
    return coldstart.Config(
        **names, model=f"{folder}/model", output_dir=f"{folder}/cold", rows=20, times=2, exam_size=3,
        max_completion_length=600, bf16=False, batch_size=8,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", DIALECTS)
def test_every_dialect_runs(tmp_path, capsys, method):
    """The tokenizer has no pad token."""
    assert pieces().pad_token is None
    config = replace(write_files(tmp_path, pieces()), method=method)
    coldstart.main(config)
    stored = json.loads((tmp_path / "cold/coldstart.json").read_text())
    counts = {"transcripts": 20 + 2 * 6, "readable": 13, "known": 0, "injected": 3, "decoys": 3}
    assert stored["counts"].items() >= counts.items() and stored["config"]["method"] == method
    assert stored["exam"]["format, greedy"] < 0.95 and stored["advice"]  # after four steps it can do nothing
    assert "warning: format" in capsys.readouterr().out
    rows = [row for _, row in read_lines(tmp_path / "cold/transcripts.jsonl")]
    assert Counter((r["set"], r["pass"]) for r in rows) == {
        ("train", "written"): 20, ("exam", "greedy"): 6, ("exam", "sampled"): 6,
    }  # fmt: skip
    asked = {r["question"] for r in rows if r["set"] == "exam"}
    assert asked & {f"where is place{i}?" for i in range(20, 23)}
    assert not asked & {r["question"] for r in rows if r["set"] == "train"} - {
        f"where is place{i}?" for i in range(20, 23)
    }
    trained, start = (load_model(f"{tmp_path}/{name}", "cpu")[0] for name in ("cold", "model"))
    pairs = zip(trained.parameters(), start.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_what_the_environment_and_the_user_wrote_is_not_trained_on(tmp_path, monkeypatch):
    config, given = write_files(tmp_path, pieces()), []

    def stop(model, batches, steps, *args):
        given.extend(row for batch in batches for row in batch)
        assert steps == len(batches) == 4
        raise InputError("enough")

    monkeypatch.setattr(coldstart, "fit", stop)
    with pytest.raises(InputError, match="enough"):
        coldstart.main(config)
    assert len(given) == 32
    for ids, mask in given:
        text = detokenize(pieces(), [i for i, on in zip(ids, mask, strict=True) if on])
        assert text.endswith("<|im_end|>") and text.count("<|im_end|>") == 1
        assert "assistant" not in text and "<result>" not in text and len(ids) == len(mask)
    searched = [detokenize(pieces(), ids) for ids, _ in given]
    assert any("<result>" in text for text in searched)


def test_a_pad_token_that_is_the_end_token_is_learnt_as_an_end(tmp_path):
    tokenizer = build_tokenizer = pieces().__class__(
        tokenizer_object=pieces().backend_tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>",
        chat_template=pieces().chat_template,
    )  # fmt: skip
    assert build_tokenizer.pad_token_id == tokenizer.eos_token_id
    e = transcript(Fact(PARIS, "Paris", None), "Paris", False, DIRECT, tokenizer, Dice(1.0), 60)
    model = build("llama", tokenizer, context=512)
    row = (e.prompt_ids + e.ids, [False] * len(e.prompt_ids) + e.loss_mask)
    longer = ([*row[0], *row[0][:9]], [*row[1], *[False] * 9])
    fit(model, [[row, longer]] * 80, 80, 3e-3, 1, "test")
    [answer] = rollout(model, tokenizer, DIRECT, [PARIS], temperature=0.0, max_completion_length=12)
    assert answer.segments[0].text == "Paris" and answer.stop == "eos"


def change(path, **fields):
    rows = [json.loads(line) for line in open(path)]
    rows[0] |= fields
    open(path, "w").write("".join(json.dumps(row) + "\n" for row in rows))


def as_multiple_choice(config):
    change(config.inject, choices=["town20", "town1"], golden_answers=["A"])


def in_two_files(config):
    change(config.inject, question="Where is place5 ?")


def long_gold(config):
    change(config.inject, golden_answers=["a very long answer, longer than any draft may be"])


def down(config):
    return {"retriever": "http://127.0.0.1:9"}


REFUSED = {
    "no model": (lambda c: {"model": ""}, "--model is needed"),
    "method": (lambda c: {"method": "rag"}, "--method rag: must be one of"),
    "range": (lambda c: {"search_known": 1.5}, "--search_known 1.5"),
    "questions": (
        lambda c: {"questions": 14},
        "16 of its 16 questions are readable, 17 are needed",
    ),
    "readable": (lambda c: {"max_doc_tokens": 5}, r"0 of its 16 questions are readable"),
    "letters": (as_multiple_choice, "--inject: 20 of inject: the letter of an option is not a fact"),
    "two files": (in_two_files, "--inject: question 20 of inject is in --train train too"),
    "gold": (long_gold, r"the gold of 20 \(inject\) has \d+ tokens, and --max_answer_tokens is 16"),
    "retriever": (down, "--retriever"),
    "loss": (
        lambda c: {"learning_rate": 1e30},
        "loss of step 3 is (nan|inf); try a lower --learning_rate",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    config = write_files(tmp_path, pieces())
    fault, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        coldstart.main(replace(config, **(fault(config) or {})))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cold/config.json").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    config = write_files(tmp_path, pieces())
    (tmp_path / "cold").mkdir()
    (tmp_path / "cold/notes").write_text("mine")
    with pytest.raises(InputError, match="it is not empty"):
        coldstart.main(config)
    assert [p.name for p in (tmp_path / "cold").iterdir()] == ["notes"]


def test_a_transcript_longer_than_the_context_is_refused(tmp_path):
    config = replace(write_files(tmp_path, pieces()), max_completion_length=1)
    path = tmp_path / "model/config.json"
    settings = json.loads(path.read_text()) | {"max_position_embeddings": 750}  # the prompts do fit
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"a transcript has \d+ tokens, the context of --model holds 750"):
        coldstart.main(config)


def test_a_retriever_that_fails_later_ends_the_program(tmp_path, monkeypatch):
    config = write_files(tmp_path, pieces())

    class Failing:
        def search(self, queries, k):
            raise RetrieverError("http://x: refused")

    monkeypatch.setattr(coldstart, "open_retriever", lambda *args: Failing())
    with pytest.raises(RetrieverError, match="refused"):
        coldstart.main(config)


# ------------------------------------------------------------------------------------------------------------
# the exam, and the warnings of training


def test_the_exam_reports_what_the_policy_does(script, monkeypatch):  # noqa: F811
    """Three held-out questions: read, not read, and answered without a search. One injected question, which
    is right closed-book."""
    tokenizer, template = pieces(), METHODS["sem"].template
    held_out = [replace(PARIS, id=str(i), text=f"question {i}") for i in range(3)]
    injected = [replace(PARIS, id="3", text="question 3")]
    docs = [Doc("0", "", "Its capital is Paris.")]
    plans = [("Rome", "Paris", True), ("Rome", "Rome", True), ("Rome", "", False), ("Paris", "Paris", True)]
    rows = []
    for question, (draft, last, searched) in zip(held_out + injected, plans, strict=True):
        fact = Fact(question, last, [(question.text, docs, "it")])
        e = transcript(fact, draft, searched, template, tokenizer, Dice(1.0), 60)
        rows.append([i for s in e.segments if s.kind == "model" for i in s.ids])
    closed = iter([["no", "no", "no", "Paris"]])
    monkeypatch.setattr(coldstart, "closed_book", lambda *args: next(closed))

    def dialect_rollout(*args, **options):
        script(rows, tokenizer.eos_token_id)
        return rollout(*args, **options)

    monkeypatch.setattr(coldstart, "rollout", dialect_rollout)
    model, logged = build("llama", tokenizer, context=2048), []
    config = coldstart.Config(max_completion_length=900)
    shelf = Library({q.text: docs for q in held_out + injected})
    log = lambda name, kind, episodes: logged.append((name, kind, len(episodes)))  # noqa: E731
    figures = coldstart.exam(model, tokenizer, held_out, injected, shelf, config, log)
    for kind in ("greedy", "sampled"):
        assert figures[f"format, {kind}"] == 1.0 and figures[f"draft, {kind}"] == 1.0
        assert figures[f"reading, {kind}"] == 0.5
        assert figures[f"SR known, {kind}"] == 1.0 and figures[f"SR unknown, {kind}"] == 2 / 3
    assert figures["recall"] == 1.0
    assert logged == [("exam", "greedy", 4), ("exam", "sampled", 4)]


GOOD = {"format, greedy": 1.0, "reading, greedy": 0.7, "SR known, sampled": 0.6, "SR unknown, sampled": 0.9}


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, []),
        ({"format, greedy": 0.9}, ["format 0.90"]),
        ({"reading, greedy": 0.4}, ["reading 0.40"]),
        ({"reading, greedy": None, "SR known, sampled": None}, []),
        ({"SR known, sampled": 0.1}, ["--search_known"]),
        ({"SR unknown, sampled": 0.97, "reading, greedy": 0.0}, ["reading 0.00", "--search_unknown"]),
    ],
)
def test_the_exam_says_what_to_do(figures, words):
    lines = coldstart.advice(GOOD | figures)
    assert len(lines) == len(words) and all(w in line for w, line in zip(words, lines, strict=True))
