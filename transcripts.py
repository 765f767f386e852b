"""Transcripts of a method's dialect, written from questions, golds and real search results, for coldstart.py.

A transcript is an episode as `rollout` would make it: the same segments, each tokenised on its own, results
cut in the same way, and a mask of what is trained on. A search is written only where a gold stands in what
the model sees of its results.

    facts = read_results(questions, BM25(docs), tokenizer, template, topk=2, max_doc_tokens=80)
    episode = transcript(facts[0], "Paris", True, template, tokenizer, rng, max_doc_tokens=80)    # searched
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from tqdm import tqdm

from data import Doc, Episode, InputError, Question, Segment, load_sets
from prompts import (
    DIRECT,
    Template,
    closing_token,
    encode_foreign,
    encode_result,
    neutralise,
    passage,
    render,
)
from reward import exact_match, normalise, parse_episode
from rollout import detokenize, rollout

RECALLS = 0.5  # share of transcripts that recall, searched or not, where a method can
REMINDED = 0.1  # share of transcripts with a reminder, where a method has one

# The thoughts. Those before a draft say nothing about whether it is right.
FIRST = "I say what I remember.", "My first guess comes before any search.", "What do I know about this?"
SURE = "I know this one.", "I remember this.", "No search is needed here."  # where there is no draft
UNSURE = "I have to look this up.", "A search will tell.", "I am not sure, so I search."
READ = "The result says: {}", "I read: {}", "The result contains: {}", "It is written there: {}"
RECALLED = "I remember: {}", "My memory says: {}"  # after a memory, where a method has them
LOST = "I have to think about how to go on.", "Let me think about this."  # before a reminder


@dataclass(eq=False)
class Fact:
    """What the transcripts about a question are written from."""

    question: Question
    answer: str  # the gold, as the results spell it if it stands there
    turns: list[tuple[str, list[Doc], str]] | None  # query, documents, words to quote; None: not readable
    draft: str = ""  # the model's closed-book answer
    known: bool = False  # whether that is right


def load_questions(specs: dict[str, str], seed: int) -> list[list[Question]]:
    """The questions of "train", "inject" and "decoys", shuffled, each once. Raises InputError if one is in
    two data sets, and for multiple choice: results do not contain the letter of an option."""
    groups, places = [], {}
    for flag, spec in specs.items():
        questions = {}
        for q in (q for rows in load_sets(spec, "train").values() for q in rows):
            place = places.setdefault(normalise(q.text), (flag, q.source))
            if place != (flag, q.source):
                raise InputError(f"--{flag}: question {q.id} of {q.source} is in --{place[0]} {place[1]} too")
            if q.choices:
                raise InputError(f"--{flag}: {q.id} of {q.source}: the letter of an option is not a fact")
            questions.setdefault(normalise(q.text), q)
        groups.append(random.Random(seed).sample([*questions.values()], len(questions)))
    return groups


def find_gold(question: Question, text: str, before: int = 8) -> tuple[str, str] | None:
    """(a gold as the text spells it, the words up to it), or None if no gold stands in the text. Yes and no
    stand in many texts by chance, so they do not count."""
    words = text.split()
    golds = {normalise(gold) for gold in question.answers} - {"yes", "no", "noanswer"}
    longest = max((len(gold.split()) for gold in golds), default=0) + 2  # articles and marks come on top
    for i in range(len(words)):
        for j in range(min(i + longest, len(words)), i, -1):
            if normalise(" ".join(words[i:j])) in golds:
                spelled = " ".join(words[i:j]).strip(string.punctuation + " ")
                return spelled, " ".join(words[max(0, i - before) : j]).rstrip(".,;:")
    return None


def read_results(
    questions: list[Question], retriever, tokenizer, template: Template, enough: int | None = None, *,
    topk: int, max_doc_tokens: int, max_searches: int = 1,
) -> list[Fact]:  # fmt: skip
    """Searches for each question and finds its gold in what a model would see. The query is the question. A
    question of MuSiQue with at most `max_searches` steps is asked step by step, each with the answer of the
    step before. Stops when `enough` are readable. Raises RetrieverError."""
    facts, readable = [], 0
    for question in tqdm(questions, desc="searching", disable=None):
        steps = question.steps or []
        steps = steps if 1 < len(steps) <= max_searches else [(question.text, question.answers)]
        turns, golds = [], []
        for text, answers in steps:
            for i, gold in enumerate(golds, 1):
                text = text.replace(f"#{i}", gold)
            query = neutralise(" ".join(text.split()), tokenizer, template)
            docs = retriever.search([query], topk)[0]
            ids = [encode_foreign(passage(d), tokenizer, template)[:max_doc_tokens] for d in docs]
            asked, shown = Question("", text, answers, ""), [detokenize(tokenizer, list(i)) for i in ids]
            if (found := next(filter(None, (find_gold(asked, text) for text in shown)), None)) is None:
                break
            golds.append(found[0])
            turns.append((query, docs, found[1]))
        read = len(turns) == len(steps) and exact_match(golds[-1], question) == 1.0
        answer = golds[-1] if read else question.answer_texts()[0]
        facts.append(Fact(question, answer, turns if read else None))
        readable += read
        if readable == enough:
            break
    return facts


def transcript(
    fact: Fact, draft: str, searched: bool, template: Template, tokenizer, rng, max_doc_tokens: int
) -> Episode:
    """An episode about a fact. Its loss mask is that of a rollout, but for two things: a turn after which a
    reminder comes is not trained on, and a result that the model writes itself is, since it has to learn
    that."""
    episode = Episode(fact.question, render(template, fact.question, tokenizer), template=template)
    end = closing_token(tokenizer)
    end = [tokenizer.eos_token_id if end is None else end]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def add(kind: str, ids: list[int], text: str, trained: bool):
        episode.segments.append(Segment(kind, ids, text))
        episode.ids += ids
        episode.loss_mask += [trained] * len(ids)

    def think(thought: str) -> str:
        return f"<{template.think}> {thought} </{template.think}>\n"

    def say(answer: str) -> str:
        answer = neutralise(answer, tokenizer, template)
        answer = f"\\boxed{{{answer}}}" if template.boxed else answer
        return answer if template.raw else f"<{template.answer}> {answer} </{template.answer}>"

    if template.reminder and rng.random() < REMINDED:
        text = think(rng.choice(LOST)).strip()
        add("model", encode(text) + end, text, False)
        add("reminder", encode(template.reminder), template.reminder, False)
    recalls = template.recall and rng.random() < RECALLS
    first = FIRST if template.draft or recalls else UNSURE if searched else SURE
    text = "" if template.raw else think(rng.choice(first))
    if recalls:
        asked = " ".join(fact.question.text.split())
        query, told = (neutralise(t, tokenizer, template) for t in (asked, draft))
        text += f"<{template.recall}> {query} </{template.recall}>\n"
        text += f"<{template.memory}> {told} </{template.memory}>\n"
        text += think(rng.choice(UNSURE) if searched else rng.choice(RECALLED).format(told))
    text += say(draft) if template.draft or not searched else ""
    for query, docs, words in fact.turns if searched else ():
        text += "\n" * text.endswith(">") + f"<{template.search}> {query} </{template.search}>"
        result = encode_result(docs, tokenizer, template, max_doc_tokens)
        if template.self_search:
            text += detokenize(tokenizer, result)
        else:
            add("model", encode(text), text, True)
            add("env", result, detokenize(tokenizer, result), False)
            episode.searches, text = episode.searches + 1, ""
        text += think(rng.choice(READ).format(neutralise(words, tokenizer, template)))
    text += say(fact.answer) if searched else ""
    add("model", encode(text) + end * (not template.answer_ends), text, True)
    episode.stop = "answer" if template.answer_ends else "eos"
    return episode


def closed_book(model, tokenizer, questions: list[Question], max_answer_tokens: int) -> list[str]:
    """The model's greedy closed-book answers: the first line, without its final stop."""
    options = {"temperature": 0.0, "slots": 64, "max_completion_length": max_answer_tokens}
    episodes = rollout(model, tokenizer, DIRECT, questions, progress="closed-book", **options)
    lines = ((parse_episode(e).answer or "").strip().partition("\n")[0] for e in episodes)
    return [line.strip().rstrip(".") for line in lines]


def write_transcripts(
    tokenizer, template: Template, train: list[Fact], inject: list[Fact], decoys: list[Fact], config
) -> list[Episode]:
    """All transcripts of a cold start, in random order: `config.rows` about `train`, and `config.times` about
    each of the others, some of which are closed-book. `config` is a coldstart.Config."""
    rng, answers = random.Random(f"transcripts {config.seed}"), [f.answer for f in inject + decoys]
    if decoys and len({normalise(answer) for answer in answers}) < 2:
        raise InputError("--decoys: they need the answers of other questions, give more or --inject")
    plans = [(train[i % len(train)], train[i % len(train)].draft, False) for i in range(config.rows)]
    for fact in (f for f in inject + decoys for _ in range(config.times)):
        others = [a for a in answers if normalise(a) != normalise(fact.answer)]
        draft = rng.choice(others) if fact in decoys else fact.answer
        plans.append((fact, draft, rng.random() < config.closed_book))
    episodes = []
    for fact, draft, direct in rng.sample(plans, len(plans)):
        share = config.search_known if fact.known else config.search_unknown
        searched = not direct and fact.turns is not None and rng.random() < share
        options = (DIRECT if direct else template), tokenizer, rng, config.max_doc_tokens
        episodes.append(transcript(fact, draft, searched, *options))
    return episodes


def is_valid(episode: Episode) -> bool:
    """Whether an episode has the structure of its method: SEM's grammar, elsewhere no mistake and an answer
    at the end."""
    p = parse_episode(episode)
    clean = episode.stop in ("eos", "answer") and "!" not in p.shape and bool(p.answer)
    return p.valid if episode.template.draft else clean
