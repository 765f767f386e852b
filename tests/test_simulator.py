"""python -m pytest tests/test_simulator.py

The tests are about the share of noise, what it depends on, and both simulators: the corpus, and a tiny model.
"""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import run_main, timeless, write_world

import grpo
import rollout
import runner
import simulator
from data import Doc, InputError, Question
from retriever import BM25
from reward import REWARDS, Reward
from simulator import HELPFUL, NOISY, CorpusSimulator, ModelSimulator, documents, noise_share

QUERIES = [f"who is w{i}" for i in range(400)]
DOCS = [Doc(str(i), f"w{i}", f"who is w{i}") for i in range(40)]


def questions(n: int) -> list[Question]:
    return [Question(str(i), f"where is w{i}", [f"gold{i}"], "unknown") for i in range(n)]


# ------------------------------------------------------------------------------------------------------------
# the share of noise


@pytest.mark.parametrize(
    "step, expected",  # p_s 0, p_e 0.5, m 4: (4^(i/4) - 1) / 6
    [(0, 0.0), (1, (math.sqrt(2) - 1) / 6), (2, 1 / 6), (3, (2 * math.sqrt(2) - 1) / 6), (4, 0.5)],
)
def test_noise_by_hand(step, expected):
    assert noise_share(step, 4, 0.0, 0.5) == pytest.approx(expected)


def test_noise_between_other_shares():
    assert noise_share(0, 203, 0.25, 0.75) == 0.25 and noise_share(203, 203, 0.25, 0.75) == 0.75
    assert noise_share(101.5, 203, 0.25, 0.75) == pytest.approx(0.25 + 0.5 / 3)  # halfway, a third is done
    assert noise_share(7, 10, 0.3, 0.3) == 0.3
    assert noise_share(5, 10, 0.5, 0.0) == pytest.approx(1 / 3)  # the share may also fall


def noisy(seed: int, step: int, share: float, queries=QUERIES) -> list[bool]:
    source = CorpusSimulator(BM25(DOCS), seed)
    source.set_step(step, share)
    return [source.draw(query)[0] for query in queries]


def test_what_is_noise_depends_on_seed_step_and_query_alone():
    first = noisy(0, 3, 0.5)
    assert noisy(0, 3, 0.5) == first
    assert noisy(0, 3, 0.5, QUERIES[::-1]) == first[::-1]  # neither order nor neighbours matter
    assert noisy(0, 3, 0.5, [QUERIES[7]]) == [first[7]]
    others = [noisy(1, 3, 0.5), noisy(0, 4, 0.5), noisy(0, 3, 0.5, [q + "?" for q in QUERIES])]
    for other in others:
        assert 120 < sum(a != b for a, b in zip(first, other, strict=True)) < 280
    noisier = noisy(0, 3, 0.7)
    assert all(b for a, b in zip(first, noisier, strict=True) if a) and sum(noisier) > sum(first)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_results_are_noise_in_the_given_share(share):
    draws = [noise for step in range(10) for noise in noisy(0, step, share)]
    assert sum(draws) / len(draws) == pytest.approx(
        share, abs=4 * math.sqrt(share * (1 - share) / len(draws))
    )


# ------------------------------------------------------------------------------------------------------------
# from a corpus


def test_without_noise_the_results_are_those_of_the_corpus():
    corpus = BM25(DOCS)
    source = CorpusSimulator(corpus, 0)
    assert source.simulates
    assert source.search(QUERIES[:9], 3, questions(9)) == corpus.search(QUERIES[:9], 3)


def test_noise_of_a_corpus():
    """A noisy result is k other documents of the corpus, each once. The other results are what was found."""
    corpus = BM25(DOCS)
    source = CorpusSimulator(corpus, 0)
    source.set_step(2, 0.5)
    queries = [doc.text for doc in DOCS]
    found, plain = source.search(queries, 3, questions(40)), corpus.search(queries, 3)
    is_noise = [source.draw(query)[0] for query in queries]
    assert 8 < sum(is_noise) < 32
    for got, want, bad in zip(found, plain, is_noise, strict=True):
        assert (got != want) if bad else (got == want)
        assert len(got) == len({doc.id for doc in got}) == 3 and all(doc.text in queries for doc in got)
    ids = [doc.id for got, bad in zip(found, is_noise, strict=True) if bad for doc in got]
    assert len(set(ids)) > 15  # the noise is not always the same few documents
    assert source.search(queries, 3, questions(40)) == found
    assert source.search(queries[::-1], 3, questions(40)) == found[::-1]
    assert corpus.search(queries, 3) == plain  # the cache of the corpus is unchanged


def test_noise_of_a_corpus_smaller_than_k():
    source = CorpusSimulator(BM25(DOCS[:2]), 0)
    source.set_step(0, 1.0)
    assert [len(docs) for docs in source.search(["who", "w1"], 5, questions(2))] == [2, 2]


# ------------------------------------------------------------------------------------------------------------
# from a model: reading what it wrote


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Doc 1: one\nDoc 2: two", ["one", "two"]),
        ("Here you are:\n\nDoc 1: one\nmore of one\n\nDoc 2: two\n", ["one\nmore of one", "two"]),
        ("**Doc 1:** one\n- Doc 2. two\n# Doc 3 three", ["one", "two", "three"]),
        ("Doc1: one\nDoc2: two", ["one", "two"]),
        ("Doc 1: one\nDoc 2:\nDoc 3: three", ["one", "three"]),
        ("Doc 1: see Doc 2: it says so", ["see Doc 2: it says so"]),  # a mark must stand where a line begins
        ("one\n\n two \n", ["one", "two"]),
        ("the doctor", ["the doctor"]),
        ("", []),
        (" \n ", []),
        ("Doc 1:", []),
    ],
)
def test_documents(text, expected):
    assert [doc.text for doc in documents(text, 5)] == expected


def test_documents_are_numbered_and_at_most_k():
    text = "".join(f"Doc {i}: text {i}\n" for i in range(3, 9))
    assert documents(text, 2) == [Doc("1", "Doc 1", "text 3"), Doc("2", "Doc 2", "text 4")]


BODY = st.text("abc xyz.,", min_size=1).map(str.strip).filter(lambda t: t and t[0].isalnum())


@given(st.lists(BODY, min_size=1, max_size=8), st.integers(1, 8))
def test_documents_written_in_the_form_are_read_back(bodies, k):
    text = "\n".join(f"Doc {i}: {body}" for i, body in enumerate(bodies, 1))
    assert [doc.text for doc in documents(text, k)] == bodies[:k]


@given(st.text() | st.text("Doc 1:\n*-"), st.integers(1, 6))
@example("Doc " * 50 + "\n" * 500, 5)
def test_any_text_gives_documents(text, k):
    found = documents(text, k)
    assert len(found) <= k and [doc.id for doc in found] == [str(i + 1) for i in range(len(found))]
    assert all(doc.text and doc.text == doc.text.strip() and doc.text in text for doc in found)


def test_answer_texts():
    assert Question("1", "?", ["Oslo", "Christiania"], "x").answer_texts() == ["Oslo", "Christiania"]
    assert Question("1", "?", ["B"], "x", ["Oslo", "Lima"]).answer_texts() == ["Lima"]


# ------------------------------------------------------------------------------------------------------------
# from a model: asking it


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = Path(write_world(tmp_path_factory.mktemp("engine"))["model"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def simulate(engine, queries: list[str], share: float, seed: int = 0, step: int = 2, k: int = 3):
    source = ModelSimulator(*engine, seed)
    source.set_step(step, share)
    return source.search(queries, k, questions(len(queries)))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_model_answers_every_query(engine, share):
    """This also holds where all results are of one kind, so that one of the two prompts has no query."""
    found = simulate(engine, QUERIES[:7], share)
    assert len(found) == 7 and all(len(docs) <= 3 and all(type(d) is Doc for d in docs) for docs in found)
    assert any(found) and len({str(docs) for docs in found}) > 1
    assert simulate(engine, QUERIES[:7], share) == found
    assert simulate(engine, QUERIES[:7], share, seed=1) != found
    assert simulate(engine, QUERIES[:7], share, step=3) != found
    assert all(len(docs) <= 1 for docs in simulate(engine, QUERIES[:7], share, k=1))


def test_no_query_no_result(engine):
    assert simulate(engine, [], 0.5) == []


def test_only_the_helpful_prompt_contains_question_and_answer(engine, monkeypatch):
    """Every query gets what was written for it, in the order of the queries."""
    real, seen = simulator.rollout, []

    def spied(model, tokenizer, template, questions, **options):
        episodes = real(model, tokenizer, template, questions, **options)
        for e in episodes:
            query = e.question.text.splitlines()[0].removeprefix("Query: ")
            e.segments[:] = e.segments[:1]
            e.segments[0].text = f"Doc 1: for {query}"
            seen.append((template, query, e.question, options))
        return episodes

    monkeypatch.setattr(simulator, "rollout", spied)
    found = simulate(engine, QUERIES[:40], 0.5)
    assert [docs[0].text for docs in found] == [f"for {query}" for query in QUERIES[:40]]
    is_noise = noisy(0, 2, 0.5)
    helpful = {query for template, query, _, _ in seen if template is HELPFUL}
    bare = {query for template, query, _, _ in seen if template is NOISY}
    assert bare == {query for query, bad in zip(QUERIES[:40], is_noise, strict=False) if bad}
    assert helpful | bare == set(QUERIES[:40]) and not helpful & bare and helpful and bare
    for template, query, question, options in seen:
        i = QUERIES.index(query)
        assert (f"gold{i}" in question.text) == (f"where is w{i}" in question.text) == (template is HELPFUL)
        assert question.answers == [] and question.choices is None
        assert options["temperature"] == 0.8 and options["max_completion_length"] == 600
        assert (options["seed"], options["step"]) == (0, 2)


# ------------------------------------------------------------------------------------------------------------
# in training


def spy(monkeypatch, cls) -> list:
    """Records every search of a simulator: (step, share, queries, questions)."""
    calls, real = [], cls.search

    def search(self, queries, k, questions):
        assert len(queries) == len(questions)
        found = real(self, queries, k, questions)
        calls.append((self.step, self.share, queries, questions))
        return found

    monkeypatch.setattr(cls, "search", search)
    return calls


@pytest.fixture
def eager(monkeypatch, world):
    """A policy whose rows all begin with a search, and a reward that differs within a group."""
    tokenizer = AutoTokenizer.from_pretrained(world["model"])
    begin = tokenizer.convert_tokens_to_ids("<think> w1 </think> <search> w2 </search>".split())
    streams, real, random = {}, runner.sample, rollout.uniform_stream

    def sample(logits, u, temperature, vocab_size):
        tokens, logps = real(logits, u, temperature, vocab_size)
        if temperature == 1.0:  # the policy, and not its simulator
            for i, row in enumerate(u.tolist()):
                tokens[i] = next(streams.setdefault(row, iter(begin)), tokens[i])
        return tokens, logps

    def reward(episode, question, **options):
        return {"reward": sum(episode.ids) % 3 / 2, "em": 0.0}

    # all numbers of a row are equal, so that `sample` can tell the rows apart
    monkeypatch.setattr(rollout, "uniform_stream", lambda n, *key: random(1, *key) * n)
    monkeypatch.setattr(runner, "sample", sample)
    monkeypatch.setitem(REWARDS, "eager", Reward(reward))


@pytest.mark.parametrize("engine_is", ["corpus", "model"])
def test_training_searches_with_the_simulator(world, monkeypatch, eager, engine_is):
    """ZeroSearch trains for three steps. Every search goes to the simulator, with its question and the share
    of noise of the step."""
    calls = spy(monkeypatch, CorpusSimulator if engine_is == "corpus" else ModelSimulator)
    flags = world | {"method": "zerosearch", "max_steps": "3", "noise_start": "0.2", "noise_end": "0.8"}
    flags |= {"max_completion_length": "48", "topk": "1", "max_searches": "1", "reward": "eager"}
    if engine_is == "model":
        flags |= {"simulator": world["model"]}
    assert run_main(flags) == 0
    assert [(step, share) for step, share, _, _ in calls] == [
        (i, noise_share(i, 3, 0.2, 0.8)) for i in range(3)
    ]
    for _, _, queries, questions in calls:
        assert queries == ["w2"] * 16
        assert {q.source for q in questions} == {"known", "unknown"}
    rows = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert [row["noise_share"] for row in rows] == [noise_share(i, 3, 0.2, 0.8) for i in range(3)]
    assert [row["tools/failure_frequency"] for row in rows] == [0, 0, 0]
    assert all(math.isfinite(row["grad_norm"]) for row in rows)
    if engine_is == "corpus":
        assert all(row["tools/call_frequency"] == 1 for row in rows)


def test_a_simulator_needs_no_corpus(world):
    """That is the purpose of a simulator: without --eval no real search is made."""
    world.pop("corpus")
    flags = world | {"method": "zerosearch", "max_steps": "1", "simulator": world["model"]}
    assert run_main(flags) == 0


def test_a_resumed_run_goes_on_with_the_noise_of_its_step(world, monkeypatch):
    """The share depends on the step and on the number of steps, so a resume cannot change that number."""
    shares, real, rollouts = [], CorpusSimulator.set_step, iter([grpo.rollout] * 2)

    def set_step(self, step, share):
        shares.append((step, share))
        real(self, step, share)

    def interrupted(*args, **options):
        try:
            return next(rollouts)(*args, **options)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(CorpusSimulator, "set_step", set_step)
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "rollout", interrupted)
        assert run_main(world | {"method": "zerosearch", "max_steps": "4", "noise_end": "0.8"}) == 130
    again = {"output_dir": world["output_dir"]}
    with pytest.raises(InputError, match="--max_steps is 4"):
        run_main(again | {"max_steps": "8"}, "--resume")
    assert run_main(again, "--resume") == 0
    new = (0, 0.0)  # of a simulator that has just been made
    assert shares == [
        new,
        *((i, noise_share(i, 4, 0.0, 0.8)) for i in (0, 1, 2)),
        new,
        *((i, noise_share(i, 4, 0.0, 0.8)) for i in (2, 3)),
    ]
