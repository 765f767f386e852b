"""Teaches a model the dialect of a method, and to read what a search returns, before RL.

RL sharpens what a policy does now and then. A pretrained model of up to about 1B never writes a tag when it
is told to, so it earns nothing (DGPO, arXiv 2508.20324, starts Qwen2.5-0.5B at EM 0.006). And a policy that
cannot read results learns from SEM's reward to stop searching, because its searches earn nothing. So this
program fine-tunes a model on transcripts of the method's own dialect, which are episodes as `rollout` makes
them: the same segments, each tokenised on its own, and the same mask.

    question          the user's turn, under the prompt of the method
    draft             the model's own closed-book answer, greedy. If it is right, the question is *known*
    search            in a share of the known and a larger share of the unknown questions. The query is the
                      question, or the steps of MuSiQue's own decomposition
    result            what the retriever returns for the query, cut as in a rollout, and not trained on
    thought, answer   the words of the result around the gold, and the gold. A search is written only where
                      the gold stands in the results that the model sees

So that a question counts as known although the model is small, its answer can be taught (--inject): without
the tool, and as a draft. --decoys are shown in the same forms and as often, but each time with the answer of
another question. A policy that knows what it knows treats them like unknown questions; one that recognises
the wording of what it was trained on does not.

    python coldstart.py --model DIR --train hotpotqa:dev.json --corpus corpus.jsonl --output_dir out/cold
    python grpo.py --model out/cold ...

The output is a Hugging Face directory with coldstart.json (the settings and the exam) and transcripts.jsonl
(some of what was trained on, and the episodes of the exam).
"""

from __future__ import annotations

import copy
import json
import math
import random
import string
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from cache import context_length
from config import check_ranges, check_writable, fail, parse
from data import Doc, Episode, InputError, Question, Segment, load_sets
from disk import write_model
from evaluate import Transcripts
from measures import is_right, mean
from model import check_prompts, load_model, probe
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
from retriever import RetrieverError, open_retriever
from reward import METHODS, exact_match, normalise, parse_episode
from rollout import detokenize, rollout


@dataclass
class Config:
    """Fine-tunes a model on transcripts of a method's dialect, so that RL has something to choose from."""

    model: str = ""  # hub id or local directory of the model to start from
    method: str = "sem"  # the dialect: sem, ssrl, search-r1, research or zerosearch
    train: str = ""  # data sets that search and reading are taught on, comma-separated: name, name:path, path
    inject: str = ""  # data sets whose right answers are taught too, so that they become known
    decoys: str = ""  # data sets shown as often as --inject, each time with another question's answer
    corpus: str = ""  # JSONL of {"id", "contents"}; none: the paragraphs that multi-hop sets contain
    retriever: str = ""  # URL of a /retrieve server, in place of a corpus
    output_dir: str = "out/cold"  # an empty or new directory
    seed: int = 0  # of the choice of questions, of thoughts and of searches
    rows: int = 2000  # transcripts about --train
    questions: int = 0  # readable questions of --train to write them from; 0: all
    times: int = 25  # transcripts of each question of --inject and --decoys
    closed_book: float = 0.5  # share of these that have no tool: question, answer
    search_known: float = 0.6  # share of transcripts about known questions that search
    search_unknown: float = 0.85  # share of the others that search
    topk: int = 2  # documents a search returns
    max_doc_tokens: int = 80  # tokens that each document is cut to
    max_searches: int = 2  # searches of a transcript
    max_answer_tokens: int = 16  # a draft is cut to this length, and a longer gold is not taught
    max_completion_length: int = 512  # tokens after the prompt in the exam
    batch_size: int = 32  # transcripts a step
    learning_rate: float = 1e-4  # its peak, after a warm-up of 20 steps; then a cosine down to a tenth
    bf16: bool = True  # matrix products in bf16; the weights stay in fp32
    exam_size: int = 50  # questions of --train, and of --inject, that the exam asks


RANGES = {name: (1, math.inf) for name in "rows times topk max_doc_tokens batch_size exam_size".split()}
RANGES |= {name: (1, math.inf) for name in "max_searches max_answer_tokens max_completion_length".split()}
RANGES |= {name: (0, 1) for name in "closed_book search_known search_unknown".split()}
RANGES |= {"questions": (0, math.inf), "learning_rate": (0, math.inf)}
FORMAT, READING, SEARCH = 0.95, 0.5, (0.2, 0.95)  # what the exam asks for; SEARCH is for sampled episodes
REMINDED = 0.1  # share of transcripts with a reminder, where a method has one

FIRST = [  # thoughts before a draft: they say nothing about whether it is right
    "First I say what I remember.",
    "My first guess comes before any search.",
    "I try to recall this.",
    "What do I know about this?",
]
SURE = ["I know this one.", "I remember this.", "No search is needed here."]  # where there is no draft
UNSURE = ["I have to look this up.", "A search will tell.", "I am not sure, so I search."]
READ = ["The result says: {}", "I read: {}", "In the result stands: {}", "It is written there: {}"]
LOST = ["I have to think about how to go on.", "Let me think about this."]  # before a reminder


# ------------------------------------------------------------------------------------------------------------
# training; toy.py trains its base model with this function too


def fit(
    model, batches: Iterable[list[tuple[list[int], list[bool]]]], steps: int, learning_rate: float,
    warmup: int, desc: str, bf16: bool = False,
):  # fmt: skip
    """Supervised next-token prediction, on a GPU if there is one. A row is (ids, mask), where mask[i] says
    that ids[i] is trained on. The loss of a batch is the mean over such tokens; nothing predicts the first id
    of a row. AdamW on fp32 weights; with `bf16` the products are computed in bf16. Raises InputError if the
    loss is not finite."""
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    bar = tqdm(batches, desc=desc, total=steps)
    for step, rows in enumerate(bar):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / warmup, decay)
        rows = sorted(rows, key=lambda row: len(row[0]))
        tokens, total = sum(sum(mask[1:]) for _, mask in rows), 0.0
        quarter = -(-len(rows) // 4)  # four parts of similar lengths need half the padding of one
        for part in (rows[i : i + quarter] for i in range(0, len(rows), quarter)):
            width = max(len(ids) for ids, _ in part)
            target = [[t if on else -100 for t, on in zip(*row, strict=True)][1:] for row in part]
            target = torch.tensor([t + [-100] * (width - len(t)) for t in target], device=model.device)
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part], device=model.device)
            # The head is large, so it is applied only where a token is trained on. Where all are, it is
            # applied to the whole matrix, because a selection would only cost a copy.
            keep = slice(None) if all(all(mask) for _, mask in part) else (target >= 0).flatten()
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
                logits = model.get_output_embeddings()(hidden[keep])
            loss = cross_entropy(logits.float(), target.flatten()[keep], reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise InputError(f"{desc}: the loss of step {step + 1} is {total}; try a lower --learning_rate")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)
    model.eval()


# ------------------------------------------------------------------------------------------------------------
# transcripts


def find_gold(question: Question, text: str, before: int = 8) -> tuple[str, str] | None:
    """(a gold as it is spelled in the text, the words up to it), or None if no gold stands in the text. Yes
    and no stand in many texts by chance, so they do not count."""
    words = text.split()
    golds = {normalise(gold) for gold in question.answers} - {"yes", "no", "noanswer"}
    longest = max((len(gold.split()) for gold in golds), default=0) + 2  # articles and marks are extra
    for i in range(len(words)):
        for j in range(min(i + longest, len(words)), i, -1):
            if normalise(" ".join(words[i:j])) in golds:
                spelled = " ".join(words[i:j]).strip(string.punctuation + " ")
                return spelled, " ".join(words[max(0, i - before) : j]).rstrip(".,;:")
    return None


@dataclass
class Fact:
    """What transcripts about a question are written from."""

    question: Question
    answer: str  # the gold, as the results spell it if it stands there
    draft: str = ""
    known: bool = False
    turns: list[tuple[str, list[Doc], str]] | None = None  # query, documents, thought; None: not readable


def read_results(questions: list[Question], retriever, tokenizer, config: Config) -> list[Fact]:
    """Searches for the questions, and finds the golds in what a model would see. A question of MuSiQue is
    asked step by step, if it has no more steps than --max_searches."""
    template, facts = METHODS[config.method].template, []
    for question in tqdm(questions, desc="searching"):
        steps = question.steps or []
        if not 1 < len(steps) <= config.max_searches:
            steps = [(question.text, question.answers)]
        turns, golds = [], []
        for text, answers in steps:
            for i, gold in enumerate(golds, 1):
                text = text.replace(f"#{i}", gold)
            query = neutralise(" ".join(text.split()), tokenizer, template)
            docs = retriever.search([query], config.topk)[0]
            passages = (
                encode_foreign(passage(d), tokenizer, template)[: config.max_doc_tokens] for d in docs
            )
            shown = [detokenize(tokenizer, list(ids)) for ids in passages]
            asked = Question("", text, answers, question.source)
            if (found := next(filter(None, (find_gold(asked, text) for text in shown)), None)) is None:
                break
            golds.append(found[0])
            turns.append((query, docs, found[1]))
        read = len(turns) == len(steps) and exact_match(golds[-1], question) == 1.0
        answer = golds[-1] if read else question.answer_texts()[0]
        if len(encode(answer, tokenizer)) <= config.max_answer_tokens:
            facts.append(Fact(question, answer, turns=turns if read else None))
    return facts


def encode(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def closed_book(model, tokenizer, questions: list[Question], config: Config) -> list[str]:
    """The greedy closed-book answers: the first line, without its final stop."""
    episodes = rollout(
        model, tokenizer, DIRECT, questions, temperature=0.0, slots=64,
        max_completion_length=config.max_answer_tokens, progress="closed-book",
    )  # fmt: skip
    lines = ((parse_episode(e).answer or "").strip().partition("\n")[0] for e in episodes)
    return [line.strip().rstrip(".") for line in lines]


def transcript(
    fact: Fact, draft: str, searched: bool, template: Template, tokenizer, rng, max_doc_tokens: int
) -> Episode:
    """An episode about a fact as `rollout` would have made it, with the mask of what is trained on: what the
    policy writes. That is all it samples, except for a turn after which a reminder comes. A method whose
    model writes the results itself has to learn that here, so these are trained on too."""
    episode = Episode(fact.question, render(template, fact.question, tokenizer), template=template)
    end = closing_token(tokenizer)
    end = [tokenizer.eos_token_id if end is None else end]

    def add(kind: str, ids: list[int], trained: bool):
        episode.segments.append(Segment(kind, ids, detokenize(tokenizer, ids)))
        episode.ids += ids
        episode.loss_mask += [trained] * len(ids)

    def think(thought: str) -> str:
        return f"<{template.think}> {thought} </{template.think}>\n"

    def say(answer: str) -> str:
        answer = neutralise(answer, tokenizer, template)
        answer = f"\\boxed{{{answer}}}" if template.boxed else answer
        return f"<{template.answer}> {answer} </{template.answer}>"

    if template.reminder and rng.random() < REMINDED:
        add("model", encode(think(rng.choice(LOST)).strip(), tokenizer) + end, False)
        add("reminder", encode(template.reminder, tokenizer), False)
    if template.raw:
        text = neutralise(draft, tokenizer, template)
    else:
        text = think(rng.choice(FIRST if template.draft else UNSURE if searched else SURE))
        text += say(draft) if template.draft or not searched else ""
    for query, docs, found in fact.turns if searched else ():
        text += "\n" * text.endswith(">") + f"<{template.search}> {query} </{template.search}>"
        result = encode_result(docs, tokenizer, template, max_doc_tokens)
        if template.self_search:
            text += detokenize(tokenizer, result)
        else:
            add("model", encode(text, tokenizer), True)
            add("env", result, False)
            episode.searches, text = episode.searches + 1, ""
        text += think(rng.choice(READ).format(neutralise(found, tokenizer, template)))
    text += say(fact.answer) if searched else ""
    episode.stop = "answer" if template.answer_ends else "eos"
    add("model", encode(text, tokenizer) + ([] if template.answer_ends else end), True)
    return episode


def write_transcripts(
    model, tokenizer, train: list[Fact], inject: list[Fact], decoys: list[Fact], config: Config
) -> list[Episode]:
    """All transcripts, in the order of training. Raises InputError for one that exceeds the context."""
    rng, template, plans = random.Random(f"coldstart {config.seed}"), METHODS[config.method].template, []
    answers = closed_book(model, tokenizer, [f.question for f in train], config)
    for fact, draft in zip(train, answers, strict=True):
        fact.draft, fact.known = draft or "unknown", exact_match(draft, fact.question) == 1.0
    for i in range(config.rows):
        plans.append((fact := train[i % len(train)], fact.draft, False))
    golds = [f.answer for f in inject + decoys]
    for fact in (f for f in inject + decoys for _ in range(config.times)):
        others = [gold for gold in golds if normalise(gold) != normalise(fact.answer)]
        draft = rng.choice(others) if fact in decoys else fact.answer
        plans.append((fact, draft, rng.random() < config.closed_book))
    episodes = []
    for fact, draft, direct in rng.sample(plans, len(plans)):
        share = config.search_known if fact.known or fact in inject + decoys else config.search_unknown
        searched = not direct and fact.turns is not None and rng.random() < share
        dialect = DIRECT if direct else template
        e = transcript(fact, draft, searched, dialect, tokenizer, rng, config.max_doc_tokens)
        if (n := len(e.prompt_ids + e.ids)) > (context := context_length(model.config)):
            where = f"{fact.question.id} ({fact.question.source})"
            raise InputError(f"the transcript of {where} has {n} tokens; the model's context holds {context}")
        episodes.append(e)
    return episodes


# ------------------------------------------------------------------------------------------------------------
# the exam


def exam(
    model, tokenizer, held_out: list[Question], injected: list[Question], retriever, config, log
) -> dict:
    """What RL will start from. `held_out` are readable questions that no transcript was written about.

    format       share of valid structures, greedy and sampled
    recall       share of `injected` that is right closed-book; draft: that is right in the first answer
    reading      of the held-out episodes with a gold in their results, the share with the right answer
    search       share that searches, of the questions that are right closed-book and of the others"""
    template, questions = METHODS[config.method].template, held_out + injected
    known = [
        exact_match(text, q) == 1.0
        for text, q in zip(closed_book(model, tokenizer, questions, config), questions, strict=True)
    ]
    figures = {"recall": mean(known[len(held_out) :]), "known": sum(known)}
    for kind, temperature in ("greedy", 0.0), ("sampled", 1.0):
        episodes = rollout(
            model, tokenizer, template, questions, retriever=retriever, temperature=temperature, slots=64,
            topk=config.topk, max_doc_tokens=config.max_doc_tokens, max_searches=config.max_searches,
            max_completion_length=config.max_completion_length, seed=config.seed, progress=f"exam, {kind}",
        )  # fmt: skip
        log("exam", kind, episodes)
        parses = [parse_episode(e) for e in episodes]
        figures[f"format, {kind}"] = mean(is_valid(e) for e in episodes)
        drafts = [exact_match(p.first, q) for p, q in zip(parses, questions, strict=True)]
        figures[f"draft, {kind}"] = mean(drafts[len(held_out) :])
        found = [
            is_right(e)
            for e in episodes[: len(held_out)]
            if any(find_gold(e.question, s.text) for s in e.segments if s.kind == "env")
        ]
        figures |= {f"reading, {kind}": mean(found), f"read, {kind}": len(found)}
        for name, which in ("known", True), ("unknown", False):
            share = mean(p.searched for p, k in zip(parses, known, strict=True) if k == which)
            figures[f"search {name}, {kind}"] = share
    return figures


def is_valid(episode: Episode) -> bool:
    """Whether an episode has the structure of its method: SEM's grammar, elsewhere no mistake and an answer
    at the end."""
    p = parse_episode(episode)
    if episode.template.draft:
        return p.valid
    return episode.stop in ("eos", "answer") and "!" not in p.shape and bool(p.answer)


def advice(figures: dict) -> list[str]:
    """What the exam says against starting RL from this model, and what to do, a line each."""
    lines = []
    if figures["format, greedy"] < FORMAT:
        lines.append(f"format {figures['format, greedy']:.2f}: more --rows, or a higher --learning_rate")
    if (reading := figures["reading, greedy"]) is not None and reading < READING:
        more = "more and other questions in --train, fewer or shorter documents (--topk, --max_doc_tokens)"
        lines.append(f"reading {reading:.2f}: RL would teach it never to search; {more}")
    for name in ("known", "unknown"):
        share = figures[f"search {name}, sampled"]
        if share is not None and not SEARCH[0] <= share <= SEARCH[1]:
            lines.append(f"it searches for {share:.2f} of the {name} questions: another --search_{name}")
    return lines


# ------------------------------------------------------------------------------------------------------------
# the program


def load_questions(config: Config) -> list[list[Question]]:
    """The questions of --train, --inject and --decoys, shuffled. Raises InputError if one is in two files,
    and for multiple choice among the facts to teach."""
    groups, places = [], {}
    for flag in ("train", "inject", "decoys"):
        sets = load_sets(getattr(config, flag), "train")
        for source, questions in sets.items():
            for q in questions:
                if (place := places.setdefault(normalise(q.text), source)) != source:
                    raise InputError(f"--{flag}: {q.id} of {source} is in {place} too: {q.text[:60]!r}")
                if q.choices and flag != "train":
                    raise InputError(f"--{flag}: {q.id} of {source}: the letter of an option is not a fact")
        questions = [q for rows in sets.values() for q in rows]
        groups.append(random.Random(config.seed).sample(questions, len(questions)))
    return groups


def main(config: Config):
    for name in ("model", "train", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is needed")
    check_ranges(config, RANGES)
    if config.method not in METHODS:
        raise InputError(f"--method {config.method}: must be one of {', '.join(METHODS)}")
    out, template = Path(config.output_dir), METHODS[config.method].template
    check_writable(out, "--output_dir")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--output_dir {out}: it is not empty")
    groups = load_questions(config)
    retriever = open_retriever(config, {"train": config.train})
    model, tokenizer = load_model(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    longest = check_prompts(model, tokenizer, template, [q for group in groups for q in group])
    probe(model, tokenizer, longest + config.max_completion_length)
    train, inject, decoys = (read_results(group, retriever, tokenizer, config) for group in groups)
    for flag, group, facts in ("inject", groups[1], inject), ("decoys", groups[2], decoys):
        if len(facts) < len(group):
            taught = {id(f.question) for f in facts}
            q = next(q for q in group if id(q) not in taught)
            why = f"the gold of {q.id} has more than {config.max_answer_tokens} tokens"
            raise InputError(f"--{flag}: {why}; raise --max_answer_tokens or leave the question out")
    readable = [fact for fact in train if fact.turns]
    need = config.exam_size + (config.questions or 1)
    if len(readable) < need:
        asked = f"{need} are needed, {config.exam_size} of them for the exam"
        raise InputError(f"--train: {len(readable)} of {len(groups[0])} questions are readable; {asked}")
    held_out, taught = readable[: config.exam_size], readable[config.exam_size :]
    taught = taught[: config.questions or len(taught)]
    sampler = copy.deepcopy(model).bfloat16() if config.bf16 else model
    episodes = write_transcripts(sampler, tokenizer, taught, inject, decoys, config)
    log = Transcripts(out / "transcripts.jsonl").log
    log("train", "written", episodes[:20])
    rows = [(e.prompt_ids + e.ids, [False] * len(e.prompt_ids) + e.loss_mask) for e in episodes]
    batches = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
    size = sum(len(ids) for ids, _ in rows)
    print(
        f"{len(rows)} transcripts about {len(taught)} readable questions, {sum(f.known for f in taught)} of"
    )
    print(f"them known, and {len(inject)} + {len(decoys)} facts and decoys; {size} tokens")
    fit(model, batches, len(batches), config.learning_rate, 20, "cold start", config.bf16)
    sampler = model.bfloat16() if config.bf16 else model
    write_model(sampler, tokenizer, out)
    injected = [fact.question for fact in inject[: config.exam_size]]
    questions = [fact.question for fact in held_out]
    figures = exam(sampler, tokenizer, questions, injected, retriever, config, log)
    lines = advice(figures)
    content = {"config": asdict(config), "tokens": size, "exam": figures, "advice": lines}
    (out / "coldstart.json").write_text(json.dumps(content, indent=1))
    for name, figure in figures.items():
        print(f"{name:24} {'-' if figure is None else f'{figure:.2f}'}")
    print(*(f"warning: {line}" for line in lines), sep="\n")


if __name__ == "__main__":
    config, _ = parse(Config, "coldstart.py")
    try:
        main(config)
    except torch.OutOfMemoryError:
        fail("coldstart.py", "out of GPU memory: try a smaller --batch_size")
    except (InputError, RetrieverError, OSError) as error:
        fail("coldstart.py", error)
