"""Teaches a model the dialect of a method, and to read what a search returns, before RL.

RL can only reinforce what a policy already does sometimes. A pretrained model of up to about 1B hardly ever
writes a tag when it is only told to, so it earns nothing (DGPO, arXiv 2508.20324, starts Qwen2.5-0.5B at EM
0.006). And a policy that cannot read results learns from SEM's reward to stop searching, because its searches
earn nothing. So this program fine-tunes a model on transcripts of the method's own dialect, which are
episodes as `rollout` makes them: the same segments, each tokenised on its own, and the same mask.

    question          the user's turn, under the prompt of the method
    draft             the model's own closed-book answer, greedy. If it is right, the question is *known*
    recall, memory    in half of the transcripts of the hybrid: the question, and the draft
    search            in a share of the known and a larger share of the unknown questions. The query is the
                      question, or the steps of MuSiQue's own decomposition
    result            what the retriever returns for the query, cut as in a rollout, and not trained on
    thought, answer   the words of the result around the gold, and the gold. A search is written only where
                      the gold stands in the results that the model sees

So that a question counts as known although the model is small, its answer can be taught (--inject): without
the tool, and as a draft. --decoys are shown in the same forms and as often, but their closed-book answer or
draft is each time that of another question; after a search the answer is right. A policy that knows what it
knows treats them like unknown questions; one that recognises the wording of what it was trained on does not.

    python coldstart.py --model DIR --train hotpotqa:dev.json --corpus corpus.jsonl --output_dir out/cold
    python coldstart.py --model out/cold --train ... --output_dir out/cold2 --search_known 0.85
    python grpo.py --model out/cold2 ...

The second round is worth its time where facts are taught. In the first one the drafts of all other questions
are those of the start model: long sentences, where the taught ones are a few words. A model can tell known
from unknown by that alone. In the second one its drafts have one style (see bench/RESULTS.md).

The output is a Hugging Face directory with coldstart.json (the settings and the exam) and transcripts.jsonl
(some of what was trained on, and the episodes of the exam).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cache import context_length
from config import check_ranges, check_writable, fail, parse
from data import InputError, Question
from disk import write_model
from evaluate import Transcripts
from measures import is_right, mean
from model import check_prompts, load_model, probe
from retriever import RetrieverError, open_retriever
from reward import METHODS, exact_match, parse_episode
from rollout import rollout
from sft import fit
from transcripts import closed_book, find_gold, is_valid, load_questions, read_results, write_transcripts


@dataclass
class Config:
    """Fine-tunes a model on transcripts of a method's dialect, so that RL has something to choose from."""

    model: str = ""  # hub id or local directory of the model to start from
    method: str = "sem"  # the dialect: sem, ssrl, search-r1, research, zerosearch or hybrid
    train: str = ""  # data sets that search and reading are taught on, comma-separated: name, name:path, path
    inject: str = ""  # data sets whose right answers are taught too, so that they become known
    decoys: str = ""  # data sets shown as often as --inject, each time with another question's answer
    corpus: str = ""  # JSONL of {"id", "contents"}; none: the paragraphs that multi-hop sets contain
    retriever: str = ""  # URL of a /retrieve server, in place of a corpus
    output_dir: str = "out/cold"  # an empty or new directory
    seed: int = 0  # of the choice of questions, of thoughts and of searches
    rows: int = 2000  # transcripts about --train
    questions: int = 0  # readable questions of --train to write them from; 0: as many as --rows
    times: int = 25  # transcripts of each question of --inject and --decoys
    closed_book: float = 0.5  # share of these that have no tool: question, answer
    search_known: float = 0.6  # share of transcripts about known questions that search
    search_unknown: float = 0.85  # share of the others that search
    topk: int = 2  # documents a search returns
    max_doc_tokens: int = 80  # tokens that each document is cut to
    max_searches: int = 2  # searches of a transcript
    max_answer_tokens: int = 16  # of drafts, which are cut, and of golds
    max_completion_length: int = 512  # tokens after the prompt in the exam
    batch_size: int = 16  # transcripts a step
    learning_rate: float = 3e-4  # its peak, after a warm-up of 20 steps; then a cosine down to a tenth
    bf16: bool = True  # products in bf16; the weights stay in fp32 until they are written
    exam_size: int = 50  # questions of --train, and of --inject, that the exam asks


RANGES = {name: (1, math.inf) for name in "rows times topk max_doc_tokens batch_size exam_size".split()}
RANGES |= {name: (1, math.inf) for name in "max_searches max_answer_tokens max_completion_length".split()}
RANGES |= {name: (0, 1) for name in "closed_book search_known search_unknown".split()}
RANGES |= {"questions": (0, math.inf), "learning_rate": (0, math.inf)}
FORMAT, READING, SEARCH = 0.95, 0.5, (0.2, 0.95)  # what the exam asks for; SEARCH is for sampled episodes


# ------------------------------------------------------------------------------------------------------------
# the exam


def exam(model, tokenizer, held_out: list[Question], injected: list[Question], retriever, config, log):
    """{figure: value} of what RL will start from, greedy and sampled. `held_out` are readable questions that
    no transcript was written about. A value is None if there is nothing to measure it on.

    format       share of valid structures
    recall       share of `injected` that is right closed-book; draft: right in the first answer
    reading      of the held-out episodes with a gold in their results, the share with the right answer
    SR           share that searches, of the questions that are right closed-book and of the others"""
    questions, n, figures = held_out + injected, len(held_out), {}
    template = METHODS[config.method].template
    retriever = None if template.self_search else retriever  # as in RL
    answers = closed_book(model, tokenizer, questions, config.max_answer_tokens)
    known = [exact_match(a, q) == 1.0 for a, q in zip(answers, questions, strict=True)]
    figures["recall"] = mean(known[n:])
    for kind, temperature in ("greedy", 0.0), ("sampled", 1.0):
        budget = "topk max_doc_tokens max_searches max_completion_length seed".split()
        episodes = rollout(
            model, tokenizer, template, questions, retriever=retriever, slots=64,
            temperature=temperature, progress="exam", **{name: getattr(config, name) for name in budget},
        )  # fmt: skip
        log("exam", kind, episodes)
        rows = [(e, parse_episode(e), k) for e, k in zip(episodes, known, strict=True)]
        results = [(e, "".join(s.text for s in e.segments if s.kind == "env")) for e in episodes[:n]]
        figures[f"format, {kind}"] = mean(map(is_valid, episodes))
        figures[f"draft, {kind}"] = mean(exact_match(p.first, e.question) for e, p, _ in rows[n:])
        figures[f"reading, {kind}"] = mean(is_right(e) for e, text in results if find_gold(e.question, text))
        figures[f"SR known, {kind}"] = mean(p.searched for _, p, k in rows if k)
        figures[f"SR unknown, {kind}"] = mean(p.searched for _, p, k in rows if not k)
    return figures


def advice(figures: dict[str, float | None]) -> list[str]:
    """What the exam says against starting RL from this model, and what to do, a line each."""
    form, reading, lines = figures["format, greedy"], figures["reading, greedy"], []
    if form < FORMAT:
        lines.append(f"format {form:.2f} is low: give more --rows or a higher --learning_rate")
    if reading is not None and reading < READING:
        why = f"reading {reading:.2f} is low, so RL may teach the model never to search"
        lines.append(f"{why}: give more questions in --train, or fewer or shorter documents")
    for name in ("known", "unknown"):
        if (share := figures[f"SR {name}, sampled"]) is not None and not SEARCH[0] <= share <= SEARCH[1]:
            lines.append(f"{share:.2f} of the {name} questions are searched: change --search_{name}")
    return lines


# ------------------------------------------------------------------------------------------------------------
# the program


def check(config: Config):
    """Raises InputError for values that make no sense, before anything is loaded."""
    for name in ("model", "train", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is needed")
    check_ranges(config, RANGES)
    if config.method not in METHODS:
        raise InputError(f"--method {config.method}: must be one of {', '.join(METHODS)}")
    check_writable(out := Path(config.output_dir), "--output_dir")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--output_dir {out}: it is not empty")


def main(config: Config):
    check(config)
    out, template = Path(config.output_dir), METHODS[config.method].template
    groups = load_questions({f: getattr(config, f) for f in ("train", "inject", "decoys")}, config.seed)
    retriever = open_retriever(config, {"train": config.train})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model, tokenizer = load_model(config.model, device)
    longest = check_prompts(model, tokenizer, template, [q for group in groups for q in group])
    probe(model, tokenizer, longest + config.max_completion_length)
    search = {name: getattr(config, name) for name in ("topk", "max_doc_tokens", "max_searches")}
    enough = config.exam_size + (config.questions or config.rows)
    train = read_results(groups[0], retriever, tokenizer, template, enough, **search)
    inject, decoys = (read_results(g, retriever, tokenizer, template, **search) for g in groups[1:])
    for fact in train + inject + decoys:
        size = len(tokenizer(fact.answer, add_special_tokens=False).input_ids)
        if size > config.max_answer_tokens and fact not in train:
            what = f"the gold of {fact.question.id} ({fact.question.source}) has {size} tokens"
            raise InputError(f"{what}, and --max_answer_tokens is {config.max_answer_tokens}")
        fact.known = fact not in train  # decoys get the habits of known questions: their answers alone differ
        fact.turns = fact.turns if size <= config.max_answer_tokens else None
    readable, need = [fact for fact in train if fact.turns], config.exam_size + (config.questions or 1)
    if len(readable) < need:
        of = f"{len(readable)} of its {len(train)} questions are readable"
        raise InputError(f"--train: {of}, {need} are needed, {config.exam_size} of them for the exam")
    held_out, train = readable[: config.exam_size], readable[config.exam_size :][: config.questions or None]
    # In bf16 the model is loaded as RL loads it: `.bfloat16()` would round its rotary angles too.
    sampler = load_model(config.model, device, dtype)[0]
    drafts = closed_book(sampler, tokenizer, [f.question for f in train], config.max_answer_tokens)
    for fact, draft in zip(train, drafts, strict=True):
        fact.draft, fact.known = draft or "unknown", exact_match(draft, fact.question) == 1.0
    episodes = write_transcripts(tokenizer, template, train, inject, decoys, config)
    rows = [(e.prompt_ids + e.ids, [False] * len(e.prompt_ids) + e.loss_mask) for e in episodes]
    size, context = max(len(ids) for ids, _ in rows), context_length(model.config)
    if size > context:
        raise InputError(f"a transcript has {size} tokens, the context of --model holds {context}")
    counts = {"transcripts": len(rows), "tokens": sum(len(ids) for ids, _ in rows), "readable": len(train)}
    counts |= {"known": sum(f.known for f in train), "injected": len(inject), "decoys": len(decoys)}
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    batches = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
    fit(model, batches, len(batches), config.learning_rate, 20, "cold start", config.bf16)
    write_model(model.to(dtype), tokenizer, out)
    log = Transcripts(out / "transcripts.jsonl").log
    log("train", "written", episodes[:20])
    model = load_model(str(out), device, dtype)[0]
    asked = [[f.question for f in facts] for facts in (held_out, inject[: config.exam_size])]
    figures = exam(model, tokenizer, *asked, retriever, config, log)
    content = {"config": asdict(config), "counts": counts, "exam": figures, "advice": advice(figures)}
    (out / "coldstart.json").write_text(json.dumps(content, indent=1))
    print(*(f"{name:20} {'-' if x is None else f'{x:.2f}'}" for name, x in figures.items()), sep="\n")
    print(*(f"warning: {line}\n" for line in advice(figures)), sep="", end="")


if __name__ == "__main__":
    config, _ = parse(Config, "coldstart.py")
    try:
        main(config)
    except torch.OutOfMemoryError:
        fail("coldstart.py", "out of GPU memory: try a smaller --batch_size")
    except (InputError, RetrieverError, OSError) as error:
        fail("coldstart.py", error)
