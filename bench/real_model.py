"""Does a real model learn when to search? An experiment that no detector of formats or wordings can win.

SEM's own set-up, MMLU against MuSiQue, can be won by telling multiple choice from open questions. Here the
same files are on both sides of the boundary. Of NQ, TriviaQA and PopQA only questions are kept whose gold
stands in what BM25 returns. Within each file they are split at random:

    injected    their answers are taught in the cold start, so that the model knows them
    unknown     not taught; those that the model answers right in any of 4 closed-book samples are dropped
    decoys      shown in the cold start as often and in the same forms, each time with another's answer
    habits      searching and reading are taught on these, and on HotpotQA and 2Wiki

RL trains on half of the injected and of the unknown questions. The tests are the other halves, the decoys,
GSM8K as the stranger, and all of them but GSM8K in a second wording that is never trained on. A question is
*known* if the model that RL starts from answers it right closed-book.

    python bench/real_model.py --small --model DIR --data FOLDER --corpus corpus.jsonl

FOLDER holds nq/, triviaqa/, popqa/ and hotpotqa/ with FlashRAG's JSONL files, and hotpotqa, 2wikimultihopqa
and gsm8k in their official formats. Every stage leaves a folder or a file in --output_dir, and is not
repeated when that is there.
"""

import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import coldstart
import grpo
from config import Config as RunConfig
from config import fail, parse
from data import InputError, Question, load
from disk import append_rows
from evaluate import Transcripts, evaluate
from measures import is_right
from model import load_model
from prompts import DIRECT
from retriever import BM25, RetrieverError, load_corpus
from reward import METHODS, normalise
from rollout import rollout

SHORT = (  # 29 tokens of SmolLM2; SEM's own prompt is half of a transcript
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
    small: bool = False  # for two CPU cores: sem alone, one seed
    methods: str = "sem,search-r1,otc"  # rewards, all in SEM's dialect
    injected: int = 80  # questions, of which half are for RL; as many unknown ones
    decoys: int = 20  # questions
    habits: int = 40  # questions of the pool that searching and reading are taught on
    stranger: int = 40  # questions of GSM8K
    rows: int = 2000  # transcripts about habits, HotpotQA and 2Wiki
    times: int = 25  # transcripts of each injected question and decoy
    topk: int = 2  # documents a search returns
    max_doc_tokens: int = 80  # tokens of a document
    learning_rate: float = 3e-4  # of the cold start
    batch_size: int = 16  # of the cold start
    rl_steps: int = 30  # steps of RL
    rl_prompts: int = 16  # questions a step, each sampled 8 times
    rl_learning_rate: float = 2e-5  # of RL
    max_completion_length: int = 320  # tokens after the prompt, results included


SMALL = {"methods": "sem", "rl_steps": 25, "rl_prompts": 8}
POOL = ("nq", "train"), ("nq", "test"), ("triviaqa", "test"), ("popqa", "test")


def jsonl(path: Path, questions: list[Question]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    append_rows(path, [{"id": q.id, "question": q.text, "golden_answers": q.answers} for q in questions])


def reworded(question: Question) -> Question:
    """The second wording of a test question."""
    text = question.text.strip().rstrip("?. ")
    text = text if text[:2].isupper() else text[:1].lower() + text[1:]
    return replace(
        question, id=f"{question.id}-again", text=f"I would like to know this: {text}. Can you tell me?"
    )


def split(config: Config, out: Path):
    """Stage 1: writes the files of the cold start, and of RL and tests before unknown questions are dropped.
    All golds of one normalised answer go to one side."""
    folder, rng = Path(config.data), random.Random(f"split {config.seed}")
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    retriever = BM25(load_corpus(config.corpus))
    cold = coldstart.Config(topk=config.topk, max_doc_tokens=config.max_doc_tokens, max_searches=1)

    def readable(questions):
        facts = coldstart.read_results(questions, retriever, tokenizer, cold)
        return [f.question for f in facts if f.turns]

    sides = {"injected": config.injected, "decoys": config.decoys, "habits": config.habits}
    sides["unknown"] = 0  # the rest, some of which will be dropped
    pools, seen, counts = [], set(), {}
    for name, part in POOL:
        rows = load(f"{name}:{folder}/flashrag/{name}/{part}.jsonl")
        questions = [replace(q, id=f"{name}-{part}-{q.id}") for q in rows if normalise(q.text) not in seen]
        seen |= {normalise(q.text) for q in questions}
        pools.append(rng.sample(found := readable(questions), len(found)))
        counts[f"{name} {part}"] = f"{len(found)} of {len(rows)}"
    total, split, owner = sum(map(len, pools)), {name: [] for name in sides}, {}
    for pool in pools:
        quota = {name: round(n * len(pool) / total) for name, n in sides.items()}
        for question in pool:
            answers = {normalise(a) for a in question.answers}
            sides_taken = {owner[a] for a in answers if a in owner}
            side = next((s for s in quota if quota[s] > 0), "unknown")
            if len(sides_taken) > 1:
                continue
            side = sides_taken.pop() if sides_taken else side
            quota[side] -= 1
            owner |= {a: side for a in answers}
            split[side].append(question)
    multi = [q for name in ("hotpotqa/hotpot_dev_distractor_v1.json", "2wikimultihopqa/dev.json",
             "flashrag/hotpotqa/train.jsonl") for q in load(f"{name.split('/')[-2]}:{folder}/{name}")]  # fmt: skip
    unique = {normalise(q.text): q for q in multi if normalise(q.text) not in seen}
    reading = readable(list(unique.values()))
    counts |= {"reading": f"{len(reading)} of {len(unique)}"} | {k: len(v) for k, v in split.items()}
    jsonl(out / "reading.jsonl", [replace(q, id=f"{q.source}-{q.id}") for q in reading])
    for name, questions in split.items():
        jsonl(out / f"{name}.jsonl", questions)
    jsonl(out / "gsm8k.jsonl", rng.sample(load(f"gsm8k:{folder}/gsm8k/test.jsonl"), config.stranger))
    (out / "counts.json").write_text(json.dumps(counts, indent=1))


def cold_start(config: Config, data: Path, out: Path):
    """Stage 2."""
    coldstart.main(
        coldstart.Config(
            model=config.model, train=f"{data}/reading.jsonl,{data}/habits.jsonl", inject=f"{data}/injected.jsonl",
            decoys=f"{data}/decoys.jsonl", corpus=config.corpus, output_dir=str(out), seed=config.seed,
            rows=config.rows, times=config.times, topk=config.topk, max_doc_tokens=config.max_doc_tokens,
            max_searches=1, max_completion_length=config.max_completion_length, batch_size=config.batch_size,
            learning_rate=config.learning_rate, exam_size=40,
        )
    )  # fmt: skip


def open_model(folder: Path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(str(folder), device, torch.bfloat16)


def boundary(config: Config, data: Path, cold: Path, out: Path):
    """Stage 3: drops the unknown questions that the model knows, and writes the files of RL and of the
    tests."""
    model, tokenizer = open_model(cold)
    unknown = load(f"{data}/unknown.jsonl")
    episodes = rollout(
        model, tokenizer, DIRECT, unknown, group_size=4, seed=config.seed, slots=64, progress="boundary",
        max_completion_length=24,
    )  # fmt: skip
    kept = [q for i, q in enumerate(unknown) if not any(map(is_right, episodes[4 * i : 4 * i + 4]))]
    rng, half = random.Random(f"halves {config.seed}"), config.injected // 2
    injected, decoys = load(f"{data}/injected.jsonl"), load(f"{data}/decoys.jsonl")
    injected, pool = rng.sample(injected, len(injected)), rng.sample(kept, len(kept))
    jsonl(out / "train/injected.jsonl", injected[:half])
    jsonl(out / "train/unknown.jsonl", pool[:half])
    tests = {"injected": injected[half:], "unknown": pool[half : 2 * half], "decoys": decoys}
    for name, questions in tests.items():
        jsonl(out / f"test/{name}.jsonl", questions)
        jsonl(out / f"test/{name}_again.jsonl", [reworded(q) for q in questions])
    jsonl(out / "test/gsm8k.jsonl", load(f"gsm8k:{data}/gsm8k.jsonl"))
    counts = {"unknown": len(unknown), "dropped": len(unknown) - len(kept), "tests": len(tests["unknown"])}
    (out / "counts.json").write_text(json.dumps(counts))


def test(config: Config, files: Path, folder: Path, out: Path, first: bool):
    """Stages 4 and 6: asks the tests, and before RL also closed-book and with a forced search."""
    model, tokenizer = open_model(folder)
    names = [path.stem for path in sorted((files / "test").glob("*.jsonl"))]
    sets = {name: load(f"gsm8k:{files}/test/{name}.jsonl" if name == "gsm8k" else f"{files}/test/{name}.jsonl")
            for name in names}  # fmt: skip
    options = {"slots": 64, "progress": True, "max_completion_length": config.max_completion_length}
    options |= {"topk": config.topk, "max_doc_tokens": config.max_doc_tokens, "max_searches": 1}
    log = Transcripts(out.with_name(f"{out.stem}_transcripts.jsonl")).log
    retriever, template = BM25(load_corpus(config.corpus)), METHODS["sem"].template
    records = evaluate(model, tokenizer, template, sets, retriever, log=log, closed_book=first, **options)
    if first:  # the gate learns from the questions that RL trains on
        train = {name: load(f"{files}/train/{name}.jsonl") for name in ("injected", "unknown")}
        rows = evaluate(model, tokenizer, DIRECT, train, None, **options)
        records |= {f"train_{name}": of_set for name, of_set in rows.items()}
    else:
        rows = evaluate(model, tokenizer, DIRECT, sets, None, **options)
        for name, of_set in rows.items():
            for record, closed in zip(records[name], of_set, strict=True):
                record.known = closed.em
    table = {name: [asdict(record) for record in of_set] for name, of_set in records.items()}
    out.write_text(json.dumps(table))


def train(config: Config, files: Path, cold: Path, out: Path, reward: str):
    """Stage 5: RL, continued where it was stopped."""
    run = RunConfig(
        method="sem", reward=reward, model=str(cold), train=f"{files}/train/injected.jsonl,{files}/train/unknown.jsonl",
        corpus=config.corpus, output_dir=str(out), seed=config.seed, prompts_per_step=config.rl_prompts,
        num_generations=8, max_completion_length=config.max_completion_length, max_searches=1, topk=config.topk,
        max_doc_tokens=config.max_doc_tokens, beta=0.0, max_steps=config.rl_steps, warmup_steps=2,
        learning_rate=config.rl_learning_rate, bf16=True, save_steps=2, save_total_limit=1, log_completions=8,
        resume=(out / "run.json").exists(),
    )  # fmt: skip
    if grpo.main(run, set()):
        raise KeyboardInterrupt


def main(config: Config):
    METHODS["sem"] = replace(METHODS["sem"], template=replace(METHODS["sem"].template, system=SHORT))
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    def stage(name: str, function, *arguments):
        """Runs a stage unless it is there. Its time is added to that of earlier attempts."""
        done = out / f"{name}.done"
        if not done.exists():
            start = time.time()
            print(f"--- {name}", flush=True)
            function(config, *arguments)
            done.write_text(f"{time.time() - start:.0f}")

    stage("data", split, out / "data")
    stage("cold", cold_start, out / "data", out / "cold")
    stage("files", boundary, out / "data", out / "cold", out / "files")
    stage("before", test, out / "files", out / "cold", out / "before.json", True)
    for name in config.methods.split(","):
        stage(
            f"rl-{name}",
            train,
            out / "files",
            out / "cold",
            out / f"rl-{name}",
            "" if name == "sem" else name,
        )
        stage(f"after-{name}", test, out / "files", out / f"rl-{name}", out / f"after-{name}.json", False)


if __name__ == "__main__":
    config, given = parse(Config, "real_model.py", small=SMALL)
    if config.small:
        config = replace(config, **{name: value for name, value in SMALL.items() if name not in given})
    try:
        main(config)
    except (InputError, RetrieverError, OSError) as error:
        fail("real_model.py", error)
