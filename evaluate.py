"""Greedy evaluation: how often a model is right, how often it searches, and whether it does so when it
should.

    python evaluate.py --model out/sem --data hotpotqa,gsm8k,mmlu,musique --corpus corpus.jsonl
    python evaluate.py --model out/sem --baseline rag ...       # or direct, cot, always
    python evaluate.py --model Qwen/Qwen2.5-7B-Instruct --adapter out/sem/adapter ...           # see lora.py
    python evaluate.py --model out/ssrl --real_searches 3 ...   # SSRL with real search (or all, or entropy)

    python evaluate.py --model out/sem --knowledge_samples 8 ...    # searches by what the model knows

The questions of each data set go through the sampler of training, with temperature 0, in up to three passes:

    normal        as in training; if --model is the directory of a run, with the budget of that run
    closed-book   with prompts.DIRECT, which mentions neither tool nor tags; what is right there is "known".
                  The prompt of the method would not do: a policy that searches may write a junk draft there
    forced        <search> is added after the first answer (or thought), as if the policy always searched

The output is a table on stdout with every measure, its definition, its number of questions and a 95 %
interval. eval.json has the same figures, the settings and the ids of the known questions, and
eval_transcripts.jsonl has every episode. The search ratio of a data set does not show whether a model judges
question by question, since data sets also differ by their format. For this, read over_search and under_search
within a data set. What is measured and how is in measures.py.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

import knowledge
from config import check_date, check_ranges, check_writable, fail, parse
from data import Episode, InputError, Question, load_sets
from disk import append_rows
from lora import load_adapter
from measures import JudgeError, Record, is_right, judge, measure, report, self_searches, verdicts
from model import check_prompts, load_model, probe
from prompts import COT, DIRECT, RAG, Template, encode_foreign, passage, set_date
from retriever import RetrieverError, open_retriever
from reward import METHODS, f1, parse_episode
from rollout import detokenize, rollout
from runner import ModelRunner
from web import check_url


@dataclass
class Config:
    """Evaluates a model with search: its answers, its searches, and when it searches."""

    model: str = ""  # hub id or local directory
    adapter: str = ""  # directory of a LoRA adapter of --model, such as out/sem/adapter, see lora.py
    data: str = ""  # data sets, comma-separated: a name (hub), name:path, or a path to JSONL
    method: str = ""  # the method whose prompt the model was trained on; none: as its run.json says, else sem
    baseline: str = ""  # in place of the method: direct, cot, rag (retrieve once), always (search is forced)
    real_searches: str = ""  # ssrl: searches with real results: the first K, all (max_searches), or entropy
    corpus: str = ""  # JSONL of {"id", "contents"}; none: the paragraphs that multi-hop sets contain
    retriever: str = ""  # URL of a /retrieve server, in place of a corpus
    topk: int = 5  # documents a search returns (ReSearch, arXiv 2503.19470)
    max_searches: int = 4  # results and reminders that an episode may get (Search-R1, arXiv 2503.09516)
    max_completion_length: int = 8192  # tokens after the prompt, results included
    max_doc_tokens: int = 512  # tokens that each document is cut to
    eval_size: int = 0  # questions of each set, drawn once; 0: all
    batch_size: int = 64  # episodes sampled at once; fewer need less memory
    cuda_graphs: bool = True  # on a GPU, replay decode steps as CUDA graphs
    tau: float = 0.5  # F1 from which a draft counts as right
    known: str = ""  # eval.json of the base model: adds over_search_base, on the questions that it knew
    closed_book: bool = True  # also the closed-book and the forced pass: three times the time
    samples: int = 0  # sampled episodes a question for pass@k (SSRL); 0: none
    knowledge_samples: int = 0  # closed-book samples a question, such as 8, see knowledge.py; 0: none
    judge_url: str = ""  # OpenAI-compatible endpoint that judges answers (LJ); the key is in OPENAI_API_KEY
    date: str = ""  # what a chat template that prints the date prints; none: as its run.json says, else today
    judge_model: str = "gpt-4o-mini"  # the model of that endpoint (ReSearch)
    output: str = "eval.json"  # where the figures are written


RANGES = {  # flag: smallest and largest value
    "topk": (1, float("inf")),
    "max_searches": (0, float("inf")),
    "max_completion_length": (1, float("inf")),
    "max_doc_tokens": (1, float("inf")),
    "eval_size": (0, float("inf")),
    "batch_size": (1, float("inf")),
    "tau": (0, 1),
    "samples": (0, float("inf")),
    "knowledge_samples": (0, float("inf")),
}
BASELINES = {"direct": DIRECT, "cot": COT, "rag": RAG}  # "always" has the template of the method


# ------------------------------------------------------------------------------------------------------------
# the passes


def evaluate(
    model, tokenizer, template: Template, sets: dict[str, list[Question]], retriever, *,
    closed_book: bool = False, force: bool = False, samples: int = 0, knowledge_samples: int = 0,
    tau: float = 0.5, log: Callable = lambda name, kind, episodes: None, progress: bool = True, **options,
) -> dict[str, list[Record]]:  # fmt: skip
    """Returns {set: one record for each question}. `options` are further arguments of `rollout`, for every
    pass.

    `closed_book` adds the closed-book pass and, if there is a retriever, the forced pass. `force` forces the
    search in the normal pass too. `samples` adds that many sampled episodes for each question, and
    `knowledge_samples` that many sampled answers to the closed-book prompt. `log(set, pass, episodes)` is
    called with the episodes of each pass. Questions whose search failed are left out, with a warning, because
    a retriever that is down says nothing about the model."""
    table = {}
    for name, questions in sets.items():

        def run_pass(kind, template, retriever, name=name, questions=questions, **changed):
            episodes = rollout(
                model, tokenizer, template, questions, retriever=retriever,
                progress=f"{name}, {kind}" if progress else None,
                **{"temperature": 0.0, **options, **changed},
            )  # fmt: skip
            log(name, kind, episodes)
            return episodes

        passes = {"normal": run_pass("normal", template, retriever, force_search=force)}
        if closed_book and template == DIRECT:
            passes["closed-book"] = passes["normal"]
        elif closed_book:
            passes["closed-book"] = run_pass("closed-book", DIRECT, None)
        if closed_book and retriever is not None and not template.raw:
            changed = {"force_search": True, "entropy_guided": False}
            forced = passes["normal"] if force else run_pass("forced", template, retriever, **changed)
            passes["forced"] = forced
        sampled = []
        if samples:
            changed = {"force_search": force, "group_size": samples, "temperature": 1.0}
            sampled = run_pass("sampled", template, retriever, **changed)
        asked = []
        if knowledge_samples:
            asked = run_pass("knowledge", DIRECT, None, group_size=knowledge_samples, temperature=1.0)
        table[name] = []
        for i in range(len(questions)):
            of_question = {kind: episodes[i] for kind, episodes in passes.items()}
            if record := make_record(of_question, sampled[i * samples : (i + 1) * samples], template, tau):
                of_question = asked[i * knowledge_samples : (i + 1) * knowledge_samples]
                record.closed_book = [is_right(e) for e in of_question] or None
                table[name].append(record)
        if failed := len(questions) - len(table[name]):
            tqdm.write(f"warning: {name}: {failed} searches failed, their questions are left out")
    return table


def check_answered(table: dict[str, list[Record]]):
    """Raises InputError for a set without a record: all its searches have failed."""
    for name in (name for name, records in table.items() if not records):
        raise InputError(f"{name}: the retriever failed on every question")


def make_record(
    passes: dict[str, Episode], sampled: list[Episode], template: Template, tau: float
) -> Record | None:
    """The record of one question from its episodes in the passes "normal", and "closed-book" and "forced" if
    they were made. None if a search failed in one of them."""
    if any(episode.stop == "search_failed" for episode in (*passes.values(), *sampled)):
        return None
    right = {kind: is_right(episode) for kind, episode in passes.items()}
    episode = passes["normal"]
    question, parse = episode.question, parse_episode(episode)
    return Record(
        id=question.id,
        em=right["normal"],
        f1=f1(parse.answer, question),
        searches=episode.searches,
        tokens=episode.policy_tokens,
        self_searches=self_searches(episode) if template.own_result else None,
        draft=f1(parse.first, question) >= tau if template.draft else None,
        known=right.get("closed-book"),
        forced=right.get("forced"),
        sampled=[is_right(e) for e in sampled] or None,
    )


def retrieve_once(sets: dict[str, list[Question]], retriever, topk: int, max_doc_tokens: int, tokenizer):
    """Naive RAG: each question preceded by the `topk` documents that a search for it returns."""
    with_documents = {}
    for name, questions in sets.items():
        with_documents[name], found = [], []
        for i in range(0, len(questions), 256):  # a whole data set would be too large a request for a server
            found += retriever.search([q.text for q in questions[i : i + 256]], topk)
        for question, docs in zip(questions, found, strict=True):
            lines = []
            for i, doc in enumerate(docs, 1):
                ids = encode_foreign(passage(doc), tokenizer, RAG)[:max_doc_tokens]
                lines.append(f"Doc {i}: {detokenize(tokenizer, ids)}\n")
            text = "".join(lines) + f"\nQuestion: {question.text}"
            with_documents[name].append(replace(question, text=text))
    return with_documents


# ------------------------------------------------------------------------------------------------------------
# the program


def as_trained(config: Config, given: set[str]) -> Config:
    """Takes the method and the budget from the run.json of the model, or of the adapter if there is one,
    except for what is `given`."""
    folder = Path(config.adapter or config.model)
    inside = folder.name.startswith("checkpoint-") or folder.name == "adapter"
    run = (folder.parent if inside else folder) / "run.json"
    today = date.today().isoformat()
    if not run.exists():
        return replace(config, method=config.method or "sem", date=config.date or today)
    try:
        stored = json.loads(run.read_text())
        names = set("topk max_searches max_completion_length max_doc_tokens tau date".split()) - given
        same = {name: type(getattr(config, name))(stored[name]) for name in names & set(stored)}
        config = replace(config, method=config.method or str(stored.get("method", "sem")), **same)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{run}: not the settings of a run; give --method") from error
    if not config.date:
        tqdm.write(f"warning: {run} has no date; a chat template that prints one gets {today}")
    return replace(config, date=config.date or today)


def check(config: Config, given: set[str] = frozenset()) -> Config:
    """Returns the settings with those of the model's run added. Raises InputError for values that make no
    sense, before anything is loaded."""
    for name in ("model", "data", "output"):
        if not getattr(config, name):
            raise InputError(f"--{name} is needed")
    config = as_trained(config, given)
    check_ranges(config, RANGES)
    check_date(config.date)
    if config.method not in METHODS:
        raise InputError(f"--method {config.method}: must be one of {', '.join(METHODS)}")
    if config.baseline not in ("", *BASELINES, "always"):
        raise InputError(f"--baseline {config.baseline}: must be one of {', '.join(BASELINES)}, always")
    real = config.real_searches
    if real and not METHODS[config.method].template.self_search:
        raise InputError(f"--real_searches {real}: only for ssrl, whose model answers its own searches")
    if real and real not in ("all", "entropy") and not real.isdecimal():
        raise InputError(f"--real_searches {real}: must be a number, all or entropy")
    if config.knowledge_samples and config.baseline == "rag":
        raise InputError("--knowledge_samples: not with --baseline rag, whose questions contain documents")
    if config.judge_url:
        check_url(config.judge_url, "--judge_url")
    if Path(config.output).exists():  # it may be the result of hours, and --known reads such a file
        raise InputError(f"--output {config.output}: it exists; give another name")
    check_writable(Path(config.output), "--output")
    return config


def load_known(path: str) -> dict[str, set[str]]:
    """{set: ids of the questions that the model knew} from the eval.json of a closed-book pass."""
    try:
        known = json.loads(Path(path).read_text())["known"]
        return {name: set(ids) for name, ids in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--known {path}: not the eval.json of a closed-book pass") from error


class Transcripts:
    """Writes every episode to a file, and keeps those of the normal pass for the judge."""

    def __init__(self, path: Path):
        self.path, self.episodes = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def log(self, name: str, kind: str, episodes: list[Episode]):
        rows = []
        for e in episodes:
            row = {"set": name, "pass": kind, "id": e.question.id, "question": e.question.text}
            row |= {"answers": e.question.answers, "answer": parse_episode(e).answer, "right": is_right(e)}
            row |= {"searches": e.searches, "stop": e.stop}
            row["segments"] = [{"kind": s.kind, "text": s.text} for s in e.segments]
            rows.append(row)
            if kind == "normal":
                self.episodes[name, e.question.id] = e
        append_rows(self.path, rows)


def save(records: dict[str, list[Record]], config: Config, with_known: bool) -> dict:
    """Writes --output. Returns {set: measures}, with "all" for several sets together."""
    table = {name: measure(rows) for name, rows in records.items()}
    if len(records) > 1:
        table["all"] = measure([r for rows in records.values() for r in rows])
    known = {name: [r.id for r in rows if r.known] for name, rows in records.items()}
    content = {"config": asdict(config), "measures": table} | ({"known": known} if with_known else {})
    if n := config.knowledge_samples:
        content["search_by_knowledge"] = knowledge.search_by_knowledge(records, n)
    Path(config.output).write_text(json.dumps(content, indent=1))
    return table


def main(config: Config, given: set[str] = frozenset()):
    config = check(config, given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sets = load_sets(config.data, "test", config.eval_size)
    for name, questions in sets.items():
        id, count = Counter(q.id for q in questions).most_common(1)[0]
        if count > 1:
            raise InputError(f"{name}: {count} questions have the id {id}; they cannot be told apart")
    if config.judge_url:
        first = next(iter(sets.values()))[0]
        try:
            judge(first, first.answer_texts()[0], config.judge_url, config.judge_model)
        except JudgeError as error:
            raise InputError(f"--judge_url {config.judge_url}: {error}") from error
    known = load_known(config.known) if config.known else {}
    for name, questions in sets.items() if config.known else ():
        if not known.get(name, set()) & {q.id for q in questions}:
            tqdm.write(f"warning: {name}: --known {config.known} has none of its questions")

    template = BASELINES.get(config.baseline, METHODS[config.method].template)
    real = config.real_searches if template.self_search else "all"
    retriever, max_searches = None, config.max_searches
    if config.baseline == "always" or (real and config.baseline not in ("direct", "cot")):
        retriever = open_retriever(config, {"test": config.data})
        max_searches = int(real) if real.isdecimal() else max_searches
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = load_model(config.model, device, dtype)
    if config.adapter:
        load_adapter(model, config.adapter)
    set_date(tokenizer, config.date)
    closed_book, rag = config.closed_book, config.baseline == "rag"
    plain = {(name, q.id): q for name, rows in sets.items() for q in rows}  # the judge sees no documents
    if rag:
        sets = retrieve_once(sets, retriever, config.topk, config.max_doc_tokens, tokenizer)
        retriever, closed_book = None, False  # the questions contain documents
    longest = check_prompts(model, tokenizer, template, [q for rows in sets.values() for q in rows])
    length = longest + config.max_completion_length
    probe(model, tokenizer, length)
    group = max(1, config.samples, config.knowledge_samples)
    slots = min(config.batch_size, max(map(len, sets.values())) * group)
    runner = ModelRunner(model, len(tokenizer), slots, length, config.cuda_graphs)

    output = Path(config.output)
    transcripts = Transcripts(output.with_name(output.stem + "_transcripts.jsonl"))
    records = evaluate(
        model, tokenizer, template, sets, retriever, closed_book=closed_book,
        force=config.baseline == "always", samples=config.samples, tau=config.tau,
        knowledge_samples=config.knowledge_samples, log=transcripts.log,
        slots=config.batch_size, runner=runner, max_searches=max_searches,
        entropy_guided=real == "entropy", topk=config.topk, max_doc_tokens=config.max_doc_tokens,
        max_completion_length=config.max_completion_length,
    )  # fmt: skip
    check_answered(records)
    for name, record in ((name, r) for name, rows in records.items() for r in rows):
        record.searches = 1 if rag else record.searches
        record.known_base = record.id in known.get(name, ()) if known else None
    table = save(records, config, closed_book)
    for name, rows in records.items() if config.judge_url else ():
        episodes = [transcripts.episodes[name, r.id] for r in rows]
        answers = [(plain[name, e.question.id], parse_episode(e).answer or "") for e in episodes]
        judged = verdicts(answers, config.judge_url, config.judge_model, name)
        for record, verdict in zip(rows, judged, strict=True):
            record.judged = verdict
        table = save(records, config, closed_book)
    print(report(table))
    if n := config.knowledge_samples:
        print("\n" + knowledge.report(knowledge.search_by_knowledge(records, n), n))


if __name__ == "__main__":
    config, given = parse(Config, "evaluate.py")
    try:
        main(config, given)
    except KeyboardInterrupt:
        print("evaluate.py: stopped", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        fail("evaluate.py", "out of GPU memory: try a smaller --batch_size or --max_completion_length")
    except (InputError, RetrieverError, OSError) as error:
        fail("evaluate.py", error)
