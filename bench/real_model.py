"""Does a real model learn when to search? Known and unknown questions are from the same files here, so that
the format of a question does not tell which it is.

SEM's own set-up, MMLU against MuSiQue, can be won by telling multiple choice from open questions. Of NQ,
TriviaQA and PopQA only questions are kept whose gold stands in what BM25 returns. Within each file they are
split at random:

    injected    their answers are taught in the cold start, so that the model knows them
    unknown     not taught; those that the model answers right in any of 4 closed-book samples are dropped
    decoys      shown in the cold start as often and in the same forms, each time with the draft of another
    habits      searching and reading are taught on these, on HotpotQA and 2WikiMultihopQA, and on the single
                steps of MuSiQue's questions

RL trains on half of the injected and of the unknown questions. The tests are the other halves, the decoys,
GSM8K as the stranger, and all of them but GSM8K in a second wording that nothing is trained on. A question is
*known* if the model that RL starts from answers it right closed-book.

    python bench/real_model.py --small --model DIR --data FOLDER --corpus corpus.jsonl

FOLDER holds flashrag/NAME/ with FlashRAG's JSONL files of nq, triviaqa, popqa and hotpotqa, and hotpotqa/,
2wikimultihopqa/, musique/ and gsm8k/ with the official ones. A stage leaves a folder or a file in
--output_dir, and is not repeated if NAME.done is there; RL goes on from its newest checkpoint. So the program
can be stopped at any time and started again with the same flags.
"""

import json
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import results
from gate import fit

import coldstart
import grpo
from config import Config as RunConfig
from config import fail, parse
from data import InputError, Question, load
from evaluate import Transcripts, evaluate
from measures import Record, is_right, measure, wilson
from model import load_model
from prompts import DIRECT
from retriever import BM25, RetrieverError, load_corpus
from reward import METHODS, normalise
from rollout import rollout
from toy import write_jsonl
from transcripts import read_results

# A short prompt, of 27 tokens of SmolLM2, because SEM's own would be half of a transcript.
SHORT = (
    "Reason in <think>, answer in <answer>. If you are not sure, <search>, read the <result>, answer again."
)


@dataclass
class Config:
    """Cold start, RL and evaluation of a real model, with the same files on both sides of the boundary."""

    model: str = ""  # hub id or directory; made for HuggingFaceTB/SmolLM2-135M-Instruct
    data: str = ""  # folder of the data sets
    corpus: str = ""  # JSONL of {"id", "contents"}
    output_dir: str = "out/real"  # where the stages are
    seed: int = 0  # of splits, transcripts and sampling
    small: bool = False  # for two CPU cores
    methods: str = "sem,search-r1,otc"  # rewards, all in SEM's dialect
    injected: int = 80  # questions, of which half are for RL; as many unknown ones
    decoys: int = 20  # questions
    habits: int = 40  # questions of the pool that searching and reading are taught on
    stranger: int = 40  # questions of GSM8K
    rows: int = 2000  # transcripts that teach reading, and half as many in a second round
    times: int = 25  # transcripts of each injected question and decoy, and a quarter in a second round
    topk: int = 2  # documents a search returns
    max_doc_tokens: int = 80  # tokens that a document is cut to
    search_known: float = 0.85  # share of transcripts about injected questions and decoys that search
    learning_rate: float = 3e-4  # of the cold start
    rl_steps: int = 30  # steps of RL
    rl_prompts: int = 16  # questions a step, each sampled 8 times
    rl_learning_rate: float = 2e-5  # of RL
    max_completion_length: int = 320  # tokens after the prompt, results included
    write: bool = False  # put the tables into RESULTS.md


SMALL = {"methods": "sem", "rl_steps": 25, "rl_prompts": 8}
POOL = "nq/train", "nq/test", "triviaqa/test", "popqa/test"  # FlashRAG's files
MULTI_HOP = {  # file: data set
    "hotpotqa/hotpot_dev_distractor_v1.json": "hotpotqa",
    "flashrag/hotpotqa/train.jsonl": "hotpotqa",
    "2wikimultihopqa/dev.json": "2wikimultihopqa",
    "musique/musique_ans_v1.0_train.jsonl": "musique",
    "musique/musique_ans_v1.0_dev.jsonl": "musique",
}


# ------------------------------------------------------------------------------------------------------------
# the stages


def save(path: Path, questions: list[Question]):
    write_jsonl(path, ({"id": q.id, "question": q.text, "golden_answers": q.answers} for q in questions))


def reworded(question: Question) -> Question:
    """The second wording of a question."""
    text = question.text.strip().rstrip("?. ")
    text = text if text[:2].isupper() else text[:1].lower() + text[1:]
    return replace(question, text=f"I would like to know this: {text}. Can you tell me?")


def steps_of(question: Question) -> list[Question]:
    """The steps of a question of MuSiQue as questions of their own."""
    singles, golds = [], []
    for text, answers in question.steps:
        for i, gold in enumerate(golds, 1):
            text = text.replace(f"#{i}", gold)
        singles.append(Question(f"{question.id}-{len(golds)}", text, answers, question.source))
        golds.append(answers[0])
    return singles


def split(config: Config, out: Path):
    """Data: the questions of every side. Of those that share a normalised gold only one is taken, so that no
    gold is on two sides."""
    folder, rng = Path(config.data), random.Random(f"split {config.seed}")
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    retriever, template = BM25(load_corpus(config.corpus)), METHODS["sem"].template
    options = {"topk": config.topk, "max_doc_tokens": config.max_doc_tokens}

    def readable(questions: list[Question]) -> list[Question]:
        facts = read_results(questions, retriever, tokenizer, template, **options)
        return [fact.question for fact in facts if fact.turns]

    pools, seen, counts = {}, set(), {}
    for name in POOL:
        rows = load(f"{name.split('/')[0]}:{folder}/flashrag/{name}.jsonl")
        new = {normalise(q.text): q for q in rows if normalise(q.text) not in seen}
        seen |= set(new)
        pools[name] = [replace(q, id=f"{name.replace('/', '-')}-{q.id}") for q in readable([*new.values()])]
        counts[name] = f"{len(pools[name])} of {len(rows)}"
    taken: set[str] = set()
    for name, pool in pools.items():
        pools[name] = []
        for question in rng.sample(pool, len(pool)):
            if not (answers := {normalise(a) for a in question.answers}) & taken:
                pools[name].append(question)
                taken |= answers
    sides = {"injected": config.injected, "decoys": config.decoys, "habits": config.habits}
    chosen: dict[str, list[Question]] = {side: [] for side in (*sides, "unknown")}
    total = sum(map(len, pools.values()))
    for pool in pools.values():
        left = [side for side, n in sides.items() for _ in range(round(n * len(pool) / total))]
        for i, question in enumerate(pool):
            chosen[left[i] if i < len(left) else "unknown"].append(question)
    multi = [q for file, name in MULTI_HOP.items() for q in load(f"{name}:{folder}/{file}")]
    multi = [single for q in multi for single in (steps_of(q) if q.steps else [q])]
    unique = {normalise(q.text): q for q in multi if normalise(q.text) not in seen}
    reading = readable([*unique.values()])
    counts |= {"reading": f"{len(reading)} of {len(unique)}"} | {s: len(qs) for s, qs in chosen.items()}
    save(out / "reading.jsonl", [replace(q, id=f"{q.source}-{q.id}") for q in reading])
    for side, questions in chosen.items():
        save(out / f"{side}.jsonl", questions)
    save(out / "gsm8k.jsonl", rng.sample(load(f"gsm8k:{folder}/gsm8k/test.jsonl"), config.stranger))
    (out / "counts.json").write_text(json.dumps(counts, indent=1))


def cold_start(config: Config, data: Path, out: Path):
    """Two rounds. In the first one the drafts of questions that are not injected are the long sentences of
    the start model, from which it can tell them apart. In the second one they are as short as the golds."""
    first = out.with_name(f"{out.name}-first")
    names = "corpus seed topk max_doc_tokens learning_rate max_completion_length search_known".split()
    settings = {name: getattr(config, name) for name in names} | {"max_searches": 1, "exam_size": 40}
    settings |= {"train": ",".join(f"{data}/{name}.jsonl" for name in ("reading", "habits"))}
    settings |= {"inject": f"{data}/injected.jsonl", "decoys": f"{data}/decoys.jsonl"}
    rounds = (
        (config.model, first, config.rows, config.times),
        (first, out, config.rows // 2, max(1, config.times // 4)),
    )
    for model, folder, rows, times in rounds:
        if not (folder / "coldstart.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an unfinished attempt has left
            amounts = {"rows": rows, "times": times}
            coldstart.main(coldstart.Config(model=str(model), output_dir=str(folder), **amounts, **settings))


def open_model(folder: Path):
    return load_model(str(folder), "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def draw(config: Config, data: Path, cold: Path, out: Path):
    """Files: the training sets of RL and the tests, without the unknown questions that the model knows."""
    model, tokenizer = open_model(cold)
    unknown = load(f"{data}/unknown.jsonl")
    options = {"group_size": 4, "seed": config.seed, "slots": 64, "max_completion_length": 16}
    episodes = rollout(model, tokenizer, DIRECT, unknown, progress="boundary", **options)
    right = [any(map(is_right, episodes[4 * i : 4 * i + 4])) for i in range(len(unknown))]
    kept = [q for q, known in zip(unknown, right, strict=True) if not known]
    rng, half = random.Random(f"halves {config.seed}"), config.injected // 2
    pools = {"injected": load(f"{data}/injected.jsonl"), "unknown": kept}
    tests = {"decoys": load(f"{data}/decoys.jsonl")}
    for side, pool in pools.items():
        order = rng.sample(pool, len(pool))
        save(out / f"train/{side}.jsonl", order[:half])
        tests[side] = order[half : 2 * half]
    for side, questions in tests.items():
        save(out / f"test/{side}.jsonl", questions)
        save(out / f"test/{side}_again.jsonl", [reworded(q) for q in questions])
    save(out / "test/gsm8k.jsonl", load(f"gsm8k:{data}/gsm8k.jsonl"))
    (out / "counts.json").write_text(json.dumps({"unknown": len(unknown), "dropped": sum(right)}))


def test_sets(files: Path) -> dict[str, list[Question]]:
    paths = sorted((files / "test").glob("*.jsonl"))
    return {p.stem: load(f"gsm8k:{p}" if p.stem == "gsm8k" else str(p)) for p in paths}


def ask(config: Config, files: Path, folder: Path, out: Path, first: bool):
    """Before and after RL: greedy answers to all tests, closed-book and not, before RL with a forced search
    too."""
    model, tokenizer = open_model(folder)
    sets, log = test_sets(files), Transcripts(out.with_name(f"{out.stem}_transcripts.jsonl")).log
    options = {"slots": 64, "log": log, "max_searches": 1}
    options |= {n: getattr(config, n) for n in ("topk", "max_doc_tokens", "max_completion_length")}
    retriever, template = BM25(load_corpus(config.corpus)), METHODS["sem"].template
    records = evaluate(model, tokenizer, template, sets, retriever, closed_book=first, **options)
    if first:  # the gate learns from the questions that RL trains on
        sets = {f"train_{side}": load(f"{files}/train/{side}.jsonl") for side in ("injected", "unknown")}
    closed_book = evaluate(model, tokenizer, DIRECT, sets, None, **{**options, "log": lambda *row: None})
    for name, rows in closed_book.items():
        for record, closed in zip(records.setdefault(name, rows), rows, strict=True):
            record.known = closed.em
    out.write_text(json.dumps({name: [asdict(r) for r in rows] for name, rows in records.items()}))


def train(config: Config, files: Path, cold: Path, out: Path, reward: str):
    """RL, which goes on where it was stopped: also after more --rl_steps, if the .done file is removed."""
    names = "corpus seed topk max_doc_tokens max_completion_length".split()
    settings = {name: getattr(config, name) for name in names} | {"model": str(cold), "output_dir": str(out)}
    settings |= {"train": f"{files}/train/injected.jsonl,{files}/train/unknown.jsonl", "reward": reward}
    settings |= {"prompts_per_step": config.rl_prompts, "num_generations": 8, "max_steps": config.rl_steps}
    settings |= {"learning_rate": config.rl_learning_rate, "warmup_steps": 2, "beta": 0.0, "bf16": True}
    settings |= {"max_searches": 1, "save_steps": 2, "save_total_limit": 1, "log_completions": 16}
    run = RunConfig(**settings, resume=(out / "run.json").exists())
    if grpo.main(run, {"max_steps"}):  # which may be raised afterwards
        sys.exit(130)


# ------------------------------------------------------------------------------------------------------------
# the tables


def records_of(path: Path) -> dict[str, list[Record]]:
    return {name: [Record(**r) for r in rows] for name, rows in json.loads(path.read_text()).items()}


def cell(share: dict | None) -> str:
    return f"{share['value']:.2f} ({share['low']:.2f}-{share['high']:.2f})" if share else "-"


def verdict(before: dict, after: dict) -> str:
    """Whether a share falls, rises or stays: it stays if the two intervals overlap."""
    if after["high"] < before["low"]:
        return "falls"
    return "rises" if after["low"] > before["high"] else "stays"


def gate(files: Path, before: dict[str, list[Record]]) -> tuple[dict[str, list[Record]], str]:
    """(records of the logistic gate of gate.py, its accuracy). It learns from the RL questions which ones are
    known, and is tested on as many known as unknown ones of the tests."""
    training = [load(f"{files}/train/{side}.jsonl") for side in ("injected", "unknown")]
    known = [r.known for side in ("injected", "unknown") for r in before[f"train_{side}"]]
    p_known = fit([q.text for questions in training for q in questions], known)
    table, right = {}, {True: [], False: []}
    for name, questions in test_sets(files).items():
        for share, r in zip(p_known([q.text for q in questions]), before[name], strict=True):
            stops = share > 0.5
            em = r.known if stops else r.forced
            row = Record(r.id, em, float(em), int(not stops), 0, known=r.known, forced=r.forced)
            table.setdefault(name, []).append(row)
            if name in ("injected", "unknown"):
                right[r.known].append(stops == r.known)
    if not (n := min(map(len, right.values()))):
        return table, "not measured, because all are known or none is"
    hits = sum(sum(outcomes[:n]) for outcomes in right.values())
    low, high = wilson(hits, 2 * n)
    return table, f"{hits / 2 / n:.2f} ({low:.2f}-{high:.2f}) of {n} known and {n} unknown questions"


def tables(config: Config, out: Path) -> str:
    """The tables of RESULTS.md."""
    before, files = records_of(out / "before.json"), out / "files"
    gated, accuracy = gate(files, before)
    names, lines = list(test_sets(files)), []
    for method in config.methods.split(","):
        after = records_of(out / f"after-{method}.json")
        head = "test | n | known before | SR before | SR after | SR | EM before | EM after | known after"
        rule = "| --- |" + " ---: |" * 4 + " --- |" + " ---: |" * 3
        lines += [f"Reward {method}:", "", f"| {head} |", rule]
        groups = {name: (before[name], after[name]) for name in names}
        pairs = [pair for s in ("injected", "unknown") for pair in zip(before[s], after[s], strict=True)]
        for label, known in ("measured: known", True), ("measured: unknown", False):
            chosen = [pair for pair in pairs if pair[0].known == known]
            groups[label] = [a for a, _ in chosen], [b for _, b in chosen]
        for label, (first, last) in ((k, v) for k, v in groups.items() if v[0]):
            a, b = measure(first), measure(last)
            shares = [cell(x) for x in (a["known"], a["sr"], b["sr"])]
            ends = [cell(x) for x in (a["em"], b["em"], b["known"])]
            row = [label, str(len(first)), *shares, verdict(a["sr"], b["sr"]), *ends]
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    head = "SR", "EM", "over_search", "under_search", "sandbag_rate"
    lines += ["Injected and unknown tests together; known as measured before RL:", ""]
    lines += [f"| policy | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
    base = [r for s in ("injected", "unknown") for r in before[s]]
    always = [replace(r, em=r.forced, searches=1, draft=None) for r in base]
    # these four answer as the model before RL does
    rows = {"before RL": base, "always search": always}
    rows["never search"] = [replace(r, em=r.known, searches=0, draft=None) for r in base]
    rows["the gate"] = [r for s in ("injected", "unknown") for r in gated[s]]
    for method in config.methods.split(","):
        last = records_of(out / f"after-{method}.json")
        last = [r for s in ("injected", "unknown") for r in last[s]]
        pairs = zip(last, base, strict=True)
        rows[f"reward {method}"] = [replace(r, known=b.known, forced=b.forced) for r, b in pairs]
    for label, records in rows.items():
        shares = measure(records)
        lines.append(f"| {label} | {' | '.join(cell(shares.get(name.lower())) for name in head)} |")
    minutes = {p.stem: round(float(p.read_text()) / 60) for p in sorted(out.glob("*.done"))}
    exam = json.loads((out / "cold/coldstart.json").read_text())
    lines += ["", f"Accuracy of the gate: {accuracy}.", ""]
    lines += ["Exam: " + ", ".join(f"{k} {v:.2f}" for k, v in exam["exam"].items() if v is not None) + "."]
    lines += [f"Counts: {json.loads((out / 'data/counts.json').read_text())},"]
    lines += [f"{json.loads((files / 'counts.json').read_text())}, {exam['counts']}. Minutes: {minutes}."]
    return "\n".join(lines)


def main(config: Config):
    METHODS["sem"] = replace(METHODS["sem"], template=replace(METHODS["sem"].template, system=SHORT))
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    def stage(name: str, function, *arguments):
        done = out / f"{name}.done"
        if not done.exists():
            start = time.time()
            function(config, *arguments)
            done.write_text(f"{time.time() - start:.0f}")

    data, cold, files = out / "data", out / "cold", out / "files"
    stage("data", split, data)
    stage("cold", cold_start, data, cold)
    stage("files", draw, data, cold, files)
    stage("before", ask, files, cold, out / "before.json", True)
    for name in config.methods.split(","):
        stage(f"rl-{name}", train, files, cold, out / f"rl-{name}", "" if name == "sem" else name)
        stage(f"after-{name}", ask, files, out / f"rl-{name}", out / f"after-{name}.json", False)
    text = tables(config, out)
    print(text)
    if config.write:
        results.write("real_model", text)


if __name__ == "__main__":
    config, given = parse(Config, "real_model.py", small=SMALL)
    if config.small:
        config = replace(config, **{name: value for name, value in SMALL.items() if name not in given})
    try:
        main(config)
    except (InputError, RetrieverError, OSError) as error:
        fail("real_model.py", error)
