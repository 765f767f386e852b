"""The toy table: the rewards of the papers in one world, the same number of steps, several seeds.

    python bench/methods.py --seeds 0,1,2        # hours on 2 cores; writes its tables to RESULTS.md
    python bench/methods.py --others             # also ReSearch, ZeroSearch and SSRL

The world is that of `toy.py --between`, which also has questions of which the base model is partly certain. A
row is a model and a way to use it. A cell is the mean over the seeds, and their range where they differ. The
rewards start from the same base model, in the dialect of SEM; those of the "happy" and the "shy" rows come
from it by further training on transcripts that search more or less. The hybrid has a dialect of its own, and
so another base model, of 3,200 steps or more, and twice as many steps of RL. (With --others the three other
methods have base models too.) What exists in --output_dir is not made again, so a stopped program goes on. If
it is older than its world, it is an error.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import results
import torch
from gate import gate

from config import TOY, fail, parse
from knowledge import classes
from measures import measure
from reward import dialect

ROOT = Path(__file__).resolve().parents[1]
KINDS = "known_heldout", "composed", "between", "unknown", "two_hop", "absent", "arithmetic"
PEOPLE = 72  # whose facts the base models half know, see between.py
CLOSED_BOOK = 0.15  # share of transcripts without a tool; with fewer, too few facts are half known
SAMPLES = 8  # of each question in the closed-book prompt, see knowledge.py


@dataclass(frozen=True)
class Row:
    """How the model of a row is trained."""

    method: str
    reward: str = ""  # --reward; none: that of the method
    habit: str = ""  # which base model of the dialect it starts from, see HABITS
    flags: tuple[str, ...] = ()  # further flags of grpo.py
    longer: int = 1  # times --max_steps


KEPT = ("--sem_kept", "0.1")
OTHERS = {
    "ReSearch": Row("research"),
    "ZeroSearch": Row("zerosearch"),
    "SSRL": Row("ssrl"),
}
RUNS = {
    "EM of Search-R1": Row("sem", reward="search-r1"),
    "OTC": Row("sem", reward="otc"),
    "flat": Row("sem", reward="flat"),
    "SEM": Row("sem"),
    "SEM kept": Row("sem", flags=KEPT),
    "boundary": Row("sem", reward="boundary"),
    "boundary, off half only labels": Row("sem", reward="boundary_on"),
    "IKEA": Row("sem", reward="ikea"),
    "hybrid": Row("hybrid", longer=2),
} | {
    f"{name}, {habit} base": Row("sem", reward, habit, flags)
    for habit in ("happy", "shy")
    for name, reward, flags in (("SEM", "", ()), ("SEM kept", "", KEPT), ("boundary", "boundary", ()))
}
HABITS = {  # share of a base model's transcripts that search: of known people and sums, of unknown people
    "": (0.6, 0.85),
    "happy": (0.95, 0.98),
    "shy": (0.1, 0.4),
}
BASES = {"ssrl": "SSRL", "hybrid": "hybrid"}  # dialects whose base models have a row of their own
HABIT_STEPS = 200  # of that further training
SHARED = "prompts_per_step num_generations max_completion_length max_searches topk learning_rate warmup_steps"
TRAIN_FLAGS = [f"--{name}={TOY[name]}" for name in SHARED.split()]  # what grpo.py takes without --model
TRAIN_SETS = [*TOY["train"].split(","), "between", "absent"]
BUDGET = [f"--{name}={TOY[name]}" for name in ("topk", "max_searches", "max_completion_length")]


@dataclass
class Config:
    """Trains and evaluates the rewards in the toy world and writes the tables."""

    seeds: str = "0,1,2"  # seeds of the worlds, base models and runs
    others: bool = False  # also ReSearch, ZeroSearch and SSRL, each with a base model of its own
    max_steps: int = 50  # RL steps of every run
    output_dir: str = "out/methods"  # where worlds, runs and evaluations are kept
    jobs: int = 2  # programs at a time, one core each


def run(*command):
    """Runs one of the programs on one core. Its output is shown only if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def world(out: Path, dialect: str, habit: str, seed: int) -> Path:
    """Builds the toy world of a dialect and a habit, unless it is there."""
    path = out / "-".join(filter(None, ["world", dialect, habit, str(seed)]))
    known, unknown = HABITS[habit]
    flags = ["--steps", 3200] if dialect == "hybrid" else []  # it has more to learn
    if habit:
        home = world(out, dialect, "", seed)
        refuse_stale(path / "world.json", home)
        flags = ["--start", home, "--steps", HABIT_STEPS, "--learning_rate", 1e-3]
    run("toy.py", "--output_dir", path, "--method", dialect, "--seed", seed, "--between", PEOPLE,
        "--closed_book", CLOSED_BOOK, "--search_known", known, "--search_unknown", unknown,
        *flags)  # fmt: skip
    return path


def refuse_stale(made: Path, where: Path):
    """An error if `made` is older than its world. A world is built anew when its settings or its template
    change, and what was measured in the old one is void then."""
    if made.exists() and made.stat().st_mtime < (where / "world.json").stat().st_mtime:
        fail("methods.py", f"{made} is older than {where}: give another --output_dir, or remove it")


def test(model: Path, where: Path, output: Path, *flags, split: str = "test"):
    """Evaluates a model on every kind of question, unless that was done before."""
    names = KINDS if split == "test" else TRAIN_SETS
    flags += ("--knowledge_samples", SAMPLES) if split == "test" else ()
    refuse_stale(output, where)
    data = ",".join(f"{where}/{split}/{name}.jsonl" for name in names)
    if not output.exists():
        run("evaluate.py", "--model", model, "--data", data, "--corpus", where / "corpus.jsonl",
            "--output", output, "--batch_size", 256, *BUDGET, *flags)  # fmt: skip


def seed_rows(out: Path, seed: int, config: Config, pool: ThreadPoolExecutor) -> dict[str, dict]:
    """{row: {kind: measures}} of one seed."""
    runs = RUNS | (OTHERS if config.others else {})
    dialects, places = {(dialect(row.method), row.habit) for row in runs.values()}, {}
    plain = {d for d in dialects if not d[1]}
    for group in plain, dialects - plain:  # those with a habit are made from the others
        places |= zip(group, pool.map(lambda d: world(out, *d, seed), group), strict=True)
    home, files = places["sem", ""], {}

    def file(name: str) -> Path:
        files[name] = out / f"eval {name} {config.max_steps} {seed}.json"
        return files[name]

    def base(dialect: str, habit: str):
        """Evaluates a base model."""
        name = f"base, {habit or BASES[dialect]}" if habit or dialect in BASES else "base (prompted)"
        where = places[dialect, habit]
        test(where / "model", where, file(name), "--method", dialect)

    def usage(name: str, *flags):
        """Evaluates another use of the base model of SEM."""
        test(home / "model", home, file(name), "--method", "sem", *flags)

    def train(name: str):
        """Trains the model of a row, unless that was done before, and measures it."""
        row = runs[name]
        where = places[dialect(row.method), row.habit]
        target = out / f"run {name} {config.max_steps} {seed}"
        refuse_stale(target / "model.safetensors", where)
        if not (target / "model.safetensors").exists():
            shutil.rmtree(target, ignore_errors=True)
            run("grpo.py", "--model", where / "model", "--method", row.method, "--reward", row.reward,
                "--train", ",".join(f"{where}/train/{source}.jsonl" for source in TRAIN_SETS),
                "--corpus", where / "corpus.jsonl", "--output_dir", target, "--save_steps", 1000, "--no-bf16",
                "--seed", seed, "--max_steps", row.longer * config.max_steps,
                *TRAIN_FLAGS, *row.flags)  # fmt: skip
        test(target, where, file(name))
        if row.method == "ssrl":
            test(target, where, file("SSRL, real search"), "--real_searches", "all")

    first = [pool.submit(base, *d) for d in dialects if d[0] == "sem" or d[0] in BASES]
    first += [pool.submit(usage, "always-search", "--baseline", "always")]
    first += [pool.submit(usage, "direct", "--baseline", "direct")]
    train_file = out / f"eval train {seed}.json"
    first.append(pool.submit(test, home / "model", home, train_file, "--method", "sem", split="train"))
    for job in first:
        job.result()
    for job in [pool.submit(train, name) for name in runs]:
        job.result()
    rows = {name: figures(path) for name, path in files.items()}
    transcripts = (
        str(p.with_suffix("")) + "_transcripts.jsonl" for p in (train_file, files["base (prompted)"])
    )
    rows["gate"] = {name: measure(records) for name, records in gate(*transcripts).items()}
    return rows


def figures(path: Path) -> dict[str, dict]:
    """{kind: measures} of an evaluation, and {class: its search ratio} of the questions in between."""
    content = json.loads(path.read_text())
    by_class = content["search_by_knowledge"]["between"].items()
    return content["measures"] | {name: {f"sr by right of {SAMPLES}": share} for name, share in by_class}


def cell(values: list[float | None]) -> str:
    """The mean of the values, and their range if they differ after rounding to two decimals."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    middle, low, high = sum(values) / len(values), min(values), max(values)
    return f"{middle:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{middle:.2f} ({low:.2f}-{high:.2f})"


TABLES = [  # columns: measure, kinds of question
    {"em": KINDS, "sr": KINDS},
    {
        "over_search": ("known_heldout", "between", "arithmetic"),
        "under_search": ("composed", "between", "unknown", "two_hop"),
        "sandbag_rate": ("known_heldout", "between", "arithmetic"),
    },
    {"searches": ("composed", "two_hop", "absent"), "self_sr": KINDS},
    {f"sr by right of {SAMPLES}": tuple(classes(SAMPLES))},  # of the kind between
]


def table(seeds: list[dict[str, dict]], measures: dict[str, tuple]) -> str:
    """The rows of all seeds as a markdown table with a column for each measure and kind of question."""
    names = ["base (prompted)", "always-search", "direct", "gate", *OTHERS, *RUNS]
    at = names.index("SSRL")
    names[at : at + 1] = ["base, SSRL", "SSRL", "SSRL, real search"]
    names.insert(names.index("hybrid"), "base, hybrid")
    for habit in ("happy", "shy"):
        names.insert(names.index(f"SEM, {habit} base"), f"base, {habit}")
    names = [name for name in names if any(name in rows for rows in seeds)]
    columns = [(kind, measure) for measure, kinds in measures.items() for kind in kinds]
    lines = ["| | " + " | ".join(f"{measure}: {kind}" for kind, measure in columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for name in names:
        known = [rows[name] for rows in seeds if name in rows]
        values = ([row.get(kind, {}).get(m, {}).get("value") for row in known] for kind, m in columns)
        cells = list(map(cell, values))
        if set(cells) != {"-"}:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: Config):
    out = Path(config.output_dir).absolute()
    out.mkdir(parents=True, exist_ok=True)
    seeds = config.seeds.split(",")
    if not all(map(str.isdecimal, seeds)) or config.jobs < 1:
        fail("methods.py", "--seeds are numbers with commas between them, --jobs at least 1")
    with ThreadPoolExecutor(config.jobs) as pool:
        rows = [seed_rows(out, int(seed), config, pool) for seed in seeds]
    tables = "\n\n".join(table(rows, columns) for columns in TABLES)
    print(tables)
    version = torch.__version__.partition("+")[0]
    note = (
        f"`python bench/methods.py --seeds {config.seeds}{' --others' * config.others}`: {config.max_steps} "
        f"steps of RL, {2 * config.max_steps} for the hybrid, {os.cpu_count()} CPU cores, torch {version}. A "
        f"cell is the mean over the seeds, with the range in brackets. Sr by right of {SAMPLES}: the search "
        "ratio of questions of the kind between, by how many closed-book samples are right."
    )
    results.write("methods", f"## The methods in the toy world\n\n{tables}\n\n{note}")


if __name__ == "__main__":
    main(parse(Config, "methods.py")[0])
