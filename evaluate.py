"""Greedy evaluation: how often a model is right, how often it searches, and whether when it should.

    python evaluate.py --model out/sem --data hotpotqa,gsm8k,mmlu,musique --corpus corpus.jsonl
    python evaluate.py --model out/sem --baseline rag ...       # or direct, cot, always
    python evaluate.py --model out/ssrl --real_searches 3 ...   # SSRL with real search (or all, or entropy)

Whole sets in their own order, the sampler of training with temperature 0, up to three passes with one budget:

    normal        as in training, with the run's own budget if --model is the folder of a run
    closed-book   a prompt of its own that mentions neither tool nor tags: what is right is *known*
    forced        a <search> is put behind the first answer (or thought), if there is one: what a policy gets
                  that always searches

Out come a table on stdout, every measure with its definition, the number of questions it is about and a 95 %
interval (Wilson's for shares, bootstrap for the rest), the same in eval.json with the ids of what is known,
and every episode in eval_transcripts.jsonl. A share by data set alone does not tell whether a model judges
question by question: read over_search and under_search within a set.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import fail, parse
from data import COT, DIRECT, RAG, DataError, Question, Template, encode_foreign, load, paragraphs, render
from model import load_model, probe, refuse_thinking
from retriever import BM25, Remote, RetrieverError, load_corpus
from reward import METHODS, exact_match, f1, parse_episode
from rollout import Episode, decode, rollout
from runner import Runner


@dataclass
class Config:
    """Evaluates a model with search: answers, searches, and when it searches."""

    model: str = ""  # hub id or local directory
    data: str = ""  # data sets, comma-separated: a name (hub), name:path, or a path to JSONL
    method: str = ""  # how the model was trained to talk; none: as its run.json says, else sem
    baseline: str = ""  # instead of the method: direct, cot, rag (retrieve once), always (search by force)
    real_searches: str = ""  # ssrl: real results in place of its own: the first K, all, or entropy
    corpus: str = ""  # JSONL of {"id", "contents"}; none: the paragraphs that multi-hop sets bring along
    retriever: str = ""  # URL of a /retrieve server, in place of a corpus
    topk: int = 5  # documents a search returns (ReSearch, arXiv 2503.19470)
    max_searches: int = 4  # searches an episode may make (Search-R1, arXiv 2503.09516)
    max_completion_length: int = 8192  # tokens after the prompt, results included
    max_doc_tokens: int = 512  # tokens a document is cut to
    eval_size: int = 0  # questions of each set, drawn once; 0: all
    batch_size: int = 64  # episodes sampled at once; fewer take less memory
    cuda_graphs: bool = True  # on a GPU, decode steps as CUDA graphs
    tau: float = 0.5  # F1 from which a draft counts as right
    known: str = ""  # eval.json that this program wrote of the base model: over_search for what it knew
    closed_book: bool = True  # two more passes, three times the time; over_search and others need them
    samples: int = 0  # sampled episodes a question for pass@k (SSRL); 0: none
    judge_url: str = ""  # OpenAI-compatible endpoint that judges answers (LJ); the key is in OPENAI_API_KEY
    judge_model: str = "gpt-4o-mini"  # its model; this one is ReSearch's
    output: str = "eval.json"  # where the figures are written


# ----------------------------------------------------------------------------------------------------------
# what is measured


@dataclass
class Record:
    """One question. What was not asked (no such pass) is None."""

    id: str
    em: bool
    f1: float
    searches: int
    tokens: int  # written by the policy
    draft: bool | None = None  # the first answer has F1 >= tau; None: the method has no drafts
    known: bool | None = None  # right closed-book
    known_base: bool | None = None  # right closed-book for the model of --known
    forced: bool | None = None  # right in the forced pass
    judged: bool | None = None  # right for the judge
    sampled: list[bool] | None = None  # right, sample by sample

    @property
    def searched(self) -> bool:
        return self.searches > 0


# name: definition, of which records, which of them count
SHARES: dict[str, tuple[str, Callable, Callable]] = {
    "em": ("exact match", lambda r: True, lambda r: r.em),
    "lj": ("right for the judge", lambda r: r.judged is not None, lambda r: r.judged),
    "sr": ("P(searched a corpus or server): SEM's search ratio", lambda r: True, lambda r: r.searched),
    "known": ("P(right closed-book)", lambda r: r.known is not None, lambda r: r.known),
    "over_search": (
        "P(searched | known): QOR of SAAS (arXiv 2605.29796)",
        lambda r: r.known,
        lambda r: r.searched,
    ),
    "over_search_base": (
        "P(searched | known to the model of --known)",
        lambda r: r.known_base,
        lambda r: r.searched,
    ),
    "under_search": (
        "P(not searched | not known, but right when forced to search): ours, no paper has it by question",
        lambda r: r.known is False and r.forced,
        lambda r: not r.searched,
    ),
    "wrong_without_search": ("P(wrong | not searched)", lambda r: not r.searched, lambda r: not r.em),
    "draft_right_given_search": (
        "P(draft right | searched)",
        lambda r: r.searched and r.draft is not None,
        lambda r: r.draft,
    ),
    "sandbag_rate": (
        "P(draft wrong | known, searched): ours",
        lambda r: r.known and r.searched and r.draft is not None,
        lambda r: not r.draft,
    ),
}


def mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def f1_aware(records: list[Record]) -> float | None:
    """2PR / (P + R) of the decision not to search, P = P(known | not searched), R = P(not searched |
    known)."""
    told = [r for r in records if r.known is not None]
    both = sum(r.known and not r.searched for r in told)
    either = sum(r.known for r in told) + sum(not r.searched for r in told)
    return 2 * both / either if either else None


def tool_productivity(records: list[Record]) -> float | None:
    searches = sum(r.searches for r in records)
    return sum(r.em for r in records) / searches if searches else None


def pass_at(k: int) -> Callable:
    """The unbiased estimator (arXiv 2107.03374): 1 - C(n - c, k) / C(n, k), for c right ones of n samples."""

    def figure(records: list[Record]) -> float | None:
        counts = [(len(r.sampled), sum(r.sampled)) for r in records if r.sampled]
        return mean(1 - math.comb(n - c, k) / math.comb(n, k) for n, c in counts)

    return figure


FIGURES: dict[str, tuple[str, Callable]] = {  # name: definition, function of the records
    "f1": ("token F1", lambda rs: mean(r.f1 for r in rs)),
    "searches": ("searches a question", lambda rs: mean(r.searches for r in rs)),
    "tokens": ("tokens that the model wrote", lambda rs: mean(r.tokens for r in rs)),
    "f1_aware": ("F1 of the decision not to search against known (AdaSearch, arXiv 2512.16883)", f1_aware),
    "tool_productivity": ("right answers / searches (OTC, arXiv 2504.14870)", tool_productivity),
}


def measure(records: list[Record]) -> dict[str, dict[str, float]]:
    """{name: {"value", "low", "high", "n"}}: the measures that these records tell something about."""
    table = {}
    for name, (_, of, counts) in SHARES.items():
        if some := [bool(counts(r)) for r in records if of(r)]:
            low, high = wilson(sum(some), len(some))
            table[name] = {"value": mean(some), "low": low, "high": high, "n": len(some)}
    samples = max((len(r.sampled or []) for r in records), default=0)
    figures = {name: figure for name, (_, figure) in FIGURES.items()}
    figures |= {f"pass@{2**i}": pass_at(2**i) for i in range(samples.bit_length())}
    if all(r.known is None for r in records):
        del figures["f1_aware"]
    for name, figure in figures.items():
        if (value := figure(records)) is not None:
            low, high = bootstrap(figure, records)
            table[name] = {"value": value, "low": low, "high": high, "n": len(records)}
    return table


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of k in n."""
    p, centre = k / n, (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)  # rounding: -1e-17 would be printed as -0.000


def bootstrap(figure: Callable, records: list[Record], times: int = 300) -> tuple[float, float]:
    """The 95 % percentile interval of `figure` over resampled questions; the same at every call."""
    rng = np.random.default_rng(0)
    draws = (
        figure([records[i] for i in rng.integers(len(records), size=len(records))]) for _ in range(times)
    )
    low, high = np.quantile([draw for draw in draws if draw is not None], [0.025, 0.975])
    return float(low), float(high)


def summary(records: list[Record]) -> dict[str, float]:
    """The four figures of the table that grpo.py prints before and after training."""
    n = max(1, len(records))
    sums = {
        "em": sum(r.em for r in records),
        "f1": sum(r.f1 for r in records),
        "sr": sum(r.searched for r in records),
        "searches": sum(r.searches for r in records),
    }
    return {name: total / n for name, total in sums.items()} | {"n": len(records)}


# ----------------------------------------------------------------------------------------------------------
# the passes


def evaluate(
    model,
    tokenizer,
    template: Template,
    sets: dict[str, list[Question]],
    retriever,
    *,
    closed_book: bool = False,
    force: bool = False,
    samples: int = 0,
    tau: float = 0.5,
    log: Callable = lambda name, kind, episodes: None,
    progress: bool = True,
    **budget,
) -> dict[str, list[Record]]:
    """{set: a record for each question}. `budget` goes to `rollout` as it is, to every pass.

    `closed_book` adds the closed-book pass and, if there is a retriever, the forced one; `force` forces the
    search in the normal pass too. `log(set, pass, episodes)` sees every episode. Questions whose search
    failed are left out, with a warning."""
    table = {}
    for name, questions in sets.items():

        def sample(kind, talks, engine, name=name, questions=questions, **more):
            episodes = rollout(
                model, tokenizer, talks, questions, retriever=engine,
                progress=f"{name}, {kind}" if progress else None, **{"temperature": 0.0, **budget, **more},
            )  # fmt: skip
            log(name, kind, episodes)
            return episodes

        passes = {"normal": sample("normal", template, retriever, force_search=force)}
        if closed_book:
            passes["known"] = passes["normal"] if template == DIRECT else sample("closed-book", DIRECT, None)
        if closed_book and retriever is not None and not template.raw:
            more = {"force_search": True, "rising": False}
            passes["forced"] = passes["normal"] if force else sample("forced", template, retriever, **more)
        if samples:
            hot = {"group_size": samples, "temperature": 1.0}
            many = sample("sampled", template, retriever, force_search=force, **hot)
        table[name], failed = [], 0
        for i, question in enumerate(questions):
            own = [episodes[i] for episodes in passes.values()]
            own += many[i * samples :][:samples] if samples else []
            if any(episode.stop == "search_failed" for episode in own):
                failed += 1  # a retriever that is down says nothing about the model
                continue
            right = {kind: is_right(episodes[i]) for kind, episodes in passes.items()}
            episode = passes["normal"][i]
            p = parse_episode(episode)
            record = Record(
                id=question.id,
                em=right["normal"],
                f1=f1(p.answer, question),
                searches=episode.searches,
                tokens=sum(len(s.ids) for s in episode.segments if s.kind == "model"),
                draft=f1(p.first, question) >= tau if template.draft else None,
                known=right.get("known"),
                forced=right.get("forced"),
            )
            if samples:
                record.sampled = [is_right(e) for e in many[i * samples :][:samples]]
            table[name].append(record)
        if failed == len(questions):
            raise DataError(f"{name}: the retriever failed on every question")
        if failed:
            tqdm.write(f"warning: {name}: {failed} searches failed, their questions are left out")
    return table


def is_right(episode: Episode) -> bool:
    return exact_match(parse_episode(episode).answer, episode.question) == 1.0


def retrieve_once(sets: dict[str, list[Question]], retriever, topk: int, max_doc_tokens: int, tokenizer):
    """Naive RAG: every question with the `topk` documents that a search for it returns, in its prompt."""
    told = {}
    for name, questions in sets.items():
        told[name], found = [], []
        for i in range(0, len(questions), 256):  # a server does not take a whole set at once
            found += retriever.search([q.text for q in questions[i : i + 256]], topk)
        for question, docs in zip(questions, found, strict=True):
            lines = []
            for i, doc in enumerate(docs, 1):
                ids = encode_foreign(f"{doc.title}: {doc.text}", tokenizer, RAG)[:max_doc_tokens]
                lines.append(f"Doc {i}: {decode(tokenizer, ids)}\n")
            told[name].append(replace(question, text="".join(lines) + f"\nQuestion: {question.text}"))
    return told


# ----------------------------------------------------------------------------------------------------------
# LJ: a language model as the judge


def judge(question: Question, answer: str, url: str, model: str) -> bool | None:
    """ReSearch's criterion (arXiv 2503.19470, appendix): the same in meaning as one of the golds. The wording
    is ours. None if the endpoint does not answer."""
    asked = (
        "Is the answer right? It is right if it means the same as at least one of the reference answers. "
        'Reply with JSON only: {"rationale": "...", "judgement": "correct" or "incorrect"}.\n\n'
        f"Question: {question.text}\n"
        + "".join(f"{chr(65 + i)}. {choice}\n" for i, choice in enumerate(question.choices or []))
        + f"Reference answers: {json.dumps(question.answers + question.in_words())}\nAnswer: {answer}"
    )
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": asked}]}
    key = os.environ.get("OPENAI_API_KEY", "")
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        target = f"{url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(target, json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=60) as reply:
            said = json.load(reply)["choices"][0]["message"]["content"]
        verdict = json.loads(said[said.index("{") : said.rindex("}") + 1])["judgement"]
        return {"correct": True, "incorrect": False}.get(verdict)
    except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def verdicts(answers: list[tuple[Question, str]], config: Config, name: str) -> list[bool | None]:
    """The judge's verdict on each answer. Of one that was silent 32 times in a row nothing more is asked: a
    silence lasts a minute."""
    told: list[bool | None] = []
    with ThreadPoolExecutor(8) as pool:
        for i in tqdm(range(0, len(answers), 32), desc=f"{name}, judge"):
            if i and told[-32:] == [None] * 32:
                return told + [None] * (len(answers) - i)
            ask = partial(judge, url=config.judge_url, model=config.judge_model)
            told += pool.map(ask, *zip(*answers[i : i + 32], strict=True))
    return told


# ----------------------------------------------------------------------------------------------------------
# tables and files


def markdown(tables: dict[str, dict[str, dict[str, float]]]) -> str:
    """{"before": {set: summary}, ...} -> a markdown table, one line a set."""
    head = "".join(f" | EM {when} | F1 {when} | SR {when} | searches {when}" for when in tables)
    lines = [f"| questions | n{head} |", "| --- | ---:" + " | ---:" * 4 * len(tables) + " |"]
    for name, first in next(iter(tables.values())).items():
        cells = "".join(
            f" | {table[name][figure]:.2f}"
            for table in tables.values()
            for figure in ("em", "f1", "sr", "searches")
        )
        lines.append(f"| {name} | {first['n']}{cells} |")
    return "\n".join(lines)


def report(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """{set: measures} -> a markdown table, one line a measure: value (95 % interval; number of questions)."""
    names = dict.fromkeys(name for measures in table.values() for name in measures)
    lines = [f"| measure | {' | '.join(table)} |", "| --- |" + " ---: |" * len(table)]
    for name in names:
        cells = (
            f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f}; {m['n']})" if (m := row.get(name)) else "-"
            for row in table.values()
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    told = {name: entry[0] for name, entry in {**SHARES, **FIGURES}.items()}
    told |= {name: "right at least once in that many samples" for name in names if name.startswith("pass@")}
    return "\n".join(lines) + "\n\n" + "\n".join(f"{name}: {told[name]}" for name in names)


def writable(path: Path, flag: str) -> Path:
    """The nearest folder around `path` that exists; DataError if `path` cannot be made in it."""
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise DataError(f"{flag} {path}: {nearest} is no directory that can be written to")
    return nearest


def load_sets(specs: str, split: str, size: int = 0) -> dict[str, list[Question]]:
    """Comma-separated data sets -> {source: questions}, `size` of each, always the same ones (0: all)."""
    sets: dict[str, list[Question]] = {}
    for spec in filter(None, (s.strip() for s in specs.split(","))):
        questions = load(spec, split)
        if questions[0].source in sets:
            raise DataError(f"{spec}: a second data set named {questions[0].source}")
        if 0 < size < len(questions):  # drawn, not cut: MMLU's files are sorted by subject
            questions = random.Random(0).sample(questions, size)
        sets[questions[0].source] = questions
    return sets


def open_retriever(url: str, corpus: str, specs: dict[str, str]):
    """A /retrieve server, or BM25 over a corpus file, or BM25 over the paragraphs that the data sets bring.

    `specs` are comma-separated data sets by split: {"train": "musique,mmlu", "test": "hotpotqa"}."""
    if url:
        remote = Remote(url)
        try:
            remote.search(["test"], 1)
        except RetrieverError as error:
            raise DataError(f"--retriever: {error}") from error
        return remote
    if corpus:
        return BM25(load_corpus(corpus))
    docs = {
        (doc.title, doc.text): doc
        for split, some in specs.items()
        for spec in filter(None, map(str.strip, some.split(",")))
        for doc in paragraphs(spec, split)
    }
    if not docs:
        names = ", ".join(filter(None, specs.values()))
        raise DataError(f"nothing to search: {names} bring no paragraphs; give --corpus or --retriever")
    return BM25([replace(doc, id=str(i)) for i, doc in enumerate(docs.values())])


# ----------------------------------------------------------------------------------------------------------
# the program


def as_trained(config: Config, given: set[str]) -> Config:
    """Takes what is not `given` from the run.json of the model: its method and its budget."""
    folder = Path(config.model)
    run = (folder.parent if folder.name.startswith("checkpoint-") else folder) / "run.json"
    if not run.exists():
        return replace(config, method=config.method or "sem")
    try:
        stored = json.loads(run.read_text())
        names = set("topk max_searches max_completion_length max_doc_tokens tau".split()) - given
        same = {name: type(getattr(config, name))(stored[name]) for name in names & set(stored)}
        return replace(config, method=config.method or str(stored.get("method", "sem")), **same)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{run}: not the settings of a run; give --method") from error


def check(config: Config, given: set[str] = frozenset()) -> Config:
    """Values that make no sense, before anything is loaded; fills in what the run of the model tells."""
    for name in ("model", "data", "output"):
        if not getattr(config, name):
            raise DataError(f"--{name} is needed")
    config = as_trained(config, given)
    for name in ("topk", "max_completion_length", "max_doc_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise DataError(f"--{name} {getattr(config, name)}: must be at least 1")
    for name in ("max_searches", "eval_size", "samples"):
        if getattr(config, name) < 0:
            raise DataError(f"--{name} {getattr(config, name)}: must be at least 0")
    if not 0 <= config.tau <= 1:
        raise DataError(f"--tau {config.tau}: must be between 0 and 1")
    if config.method not in METHODS:
        raise DataError(f"--method {config.method}: must be one of {', '.join(METHODS)}")
    if config.baseline not in ("", "direct", "cot", "rag", "always"):
        raise DataError(f"--baseline {config.baseline}: must be direct, cot, rag or always")
    real = config.real_searches
    if real and not METHODS[config.method].template.own_results:
        raise DataError(f"--real_searches {real}: only for a method that writes its own results (ssrl)")
    if real and real not in ("all", "entropy") and not real.isdecimal():
        raise DataError(f"--real_searches {real}: must be a number, all or entropy")
    return config


def main(config: Config, given: set[str] = frozenset()):
    config = check(config, given)
    Runner.cuda_graphs = config.cuda_graphs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = Path(config.output)
    if output.exists():  # an evaluation may have taken hours, and --known reads one
        raise DataError(f"--output {output}: it exists; give another name")
    writable(output, "--output")
    sets = load_sets(config.data, "test", config.eval_size)
    for name, questions in sets.items():
        twice = Counter(q.id for q in questions).most_common(1)[0]
        if twice[1] > 1:
            raise DataError(f"{name}: {twice[1]} questions have the id {twice[0]}; they cannot be told apart")
    if config.judge_url:
        first = next(iter(sets.values()))[0]
        if judge(first, first.in_words()[0], config.judge_url, config.judge_model) is None:
            raise DataError(f"--judge_url {config.judge_url}: no verdict from it")
    known = {}
    if config.known:
        try:
            told = json.loads(Path(config.known).read_text())["known"]
            known = {name: set(ids) for name, ids in told.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"--known {config.known}: not the eval.json of a closed-book pass") from error
    template = METHODS[config.method].template
    template = {"direct": DIRECT, "cot": COT, "rag": RAG}.get(config.baseline, template)
    real = config.real_searches if template.own_results else "all"
    retriever, searches = None, config.max_searches
    if (real and config.baseline not in ("direct", "cot")) or config.baseline == "always":
        retriever = open_retriever(config.retriever, config.corpus, {"test": config.data})
        searches = int(real) if real.isdecimal() else searches
    model, tokenizer = load_model(config.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    closed_book = config.closed_book and config.baseline != "rag"  # its questions hold the documents
    plain = {(name, q.id): q for name, rows in sets.items() for q in rows}  # without documents
    if config.baseline == "rag":
        sets = retrieve_once(sets, retriever, config.topk, config.max_doc_tokens, tokenizer)
        retriever = None
    prompts = [render(template, q, tokenizer) for rows in sets.values() for q in rows]
    if not template.raw:
        refuse_thinking(tokenizer, prompts[0])
    longest = max(map(len, prompts))
    probe(model, tokenizer, longest + config.max_completion_length)

    transcripts = output.with_name(output.stem + "_transcripts.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    transcripts.write_text("")

    def log(name: str, kind: str, episodes: list[Episode]):
        with open(transcripts, "a", encoding="utf-8") as file:
            for e in episodes:
                answer, right = parse_episode(e).answer, is_right(e)
                row = {"set": name, "pass": kind, "id": e.question.id, "question": e.question.text}
                row |= {"answers": e.question.answers, "answer": answer, "right": right}
                row |= {"searches": e.searches, "stop": e.stop}
                row["segments"] = [{"kind": s.kind, "text": s.text} for s in e.segments]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if kind == "normal":
                    said[name, e.question.id] = e

    said: dict[tuple[str, str], Episode] = {}
    budget = {k: getattr(config, k) for k in ("topk", "max_completion_length", "max_doc_tokens")}
    records = evaluate(
        model, tokenizer, template, sets, retriever, closed_book=closed_book,
        force=config.baseline == "always", samples=config.samples, tau=config.tau, log=log,
        slots=config.batch_size, max_searches=searches, rising=real == "entropy", **budget,
    )  # fmt: skip
    for name, rows in records.items():
        for record in rows:
            if config.baseline == "rag":
                record.searches = 1
            if known:
                record.known_base = record.id in known.get(name, ())

    def save() -> dict:
        table = {name: measure(rows) for name, rows in records.items()}
        if len(records) > 1:
            table["all"] = measure([r for rows in records.values() for r in rows])
        right = {name: [r.id for r in rows if r.known] for name, rows in records.items()}
        content = {"config": asdict(config), "measures": table} | ({"known": right} if closed_book else {})
        output.write_text(json.dumps(content, indent=1))
        return table

    table = save()
    for name, rows in records.items() if config.judge_url else ():
        answers = [(plain[name, r.id], parse_episode(said[name, r.id]).answer or "") for r in rows]
        for record, verdict in zip(rows, verdicts(answers, config, name), strict=True):
            record.judged = verdict
        if silent := sum(r.judged is None for r in rows):
            tqdm.write(f"warning: {name}: the judge did not answer on {silent} of {len(rows)} questions")
        table = save()
    print(report(table))


if __name__ == "__main__":
    config, given = parse(Config, "evaluate.py")
    try:
        main(config, given)
    except KeyboardInterrupt:
        print("evaluate.py: stopped", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        fail("evaluate.py", "out of GPU memory: try a smaller --batch_size or --max_completion_length")
    except (DataError, RetrieverError, OSError) as error:
        fail("evaluate.py", error)
