"""Does a policy judge the question, or does it only know the data set by its format? A probe for it.

SEM is trained on MuSiQue (open questions, to be searched) and MMLU (four options, not to be searched), so
"search unless there are options" earns nearly as much as judging. Here the formats are swapped: MMLU without
its options, and HotpotQA with four, the gold and three answers of other questions.

    python bench/format_swap.py --mmlu mmlu:data/mmlu --hotpotqa hotpotqa:data/hotpotqa --output_dir out/swap
    python evaluate.py --model out/sem --corpus corpus.jsonl --data \\
        mmlu:data/mmlu,out/swap/mmlu_open.jsonl,hotpotqa:data/hotpotqa,out/swap/hotpotqa_choice.jsonl

How to read it: the questions ask for the same facts. If `sr` jumps from mmlu to mmlu_open and falls from
hotpotqa to hotpotqa_choice, the policy searches by format. Options help (a guess is right one time in four),
so some change is fair: look at over_search and under_search, within what the model knows and does not.

Left out are questions of MMLU that need their options ("which of the following") or whose answer is a whole
sentence, which nothing matches, and yes/no questions of HotpotQA, whose options would give them away."""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import fail, parse
from data import InputError, Question, load
from reward import normalise
from toy import write_jsonl

NEEDS_OPTIONS = re.compile(
    r"\b(following|which of|these|those|below|above|except|statements?|best|most)\b", re.I
)
NO_ANSWER = re.compile(r"\b(above|both|neither|none of|all of|these|I+ and I+|[A-D] and [A-D])\b", re.I)
LONGEST = 6  # words of an answer


@dataclass
class Config:
    """Writes mmlu_open.jsonl and hotpotqa_choice.jsonl, for evaluate.py --data."""

    mmlu: str = "mmlu"  # MMLU as evaluate.py takes it: name, or name:path
    hotpotqa: str = "hotpotqa"  # HotpotQA likewise
    output_dir: str = "out/swap"  # where the two files are written
    seed: int = 0  # of the wrong options and their order


def opened(questions: list[Question]) -> list[dict]:
    """Multiple choice -> the question alone, the right option's text as its answer."""
    rows = []
    for q in questions:
        gold = q.choices[ord(q.answers[0]) - 65]
        alone = not NEEDS_OPTIONS.search(q.text) and not NO_ANSWER.search(gold)
        if alone and len(gold.split()) <= LONGEST:
            rows.append({"id": q.id, "question": q.text, "golden_answers": [gold]})
    return rows


def with_options(questions: list[Question], seed: int) -> list[dict]:
    """Open questions -> four options: the gold and three answers of other questions, the letter as answer."""
    questions = [q for q in questions if normalise(q.answers[0]) not in ("yes", "no")]
    pool = {normalise(q.answers[0]): q.answers[0] for q in questions}  # every answer once
    rows = []
    for q in questions:
        rng, golds = random.Random(f"{seed} {q.id}"), {normalise(gold) for gold in q.answers}
        wrong = [answer for plain, answer in pool.items() if plain not in golds]
        if len(wrong) < 3:
            raise InputError(f"{len(wrong)} answers of other questions are too few for four options")
        choices = rng.sample([q.answers[0], *rng.sample(wrong, 3)], 4)
        letter = chr(65 + choices.index(q.answers[0]))
        rows.append({"id": q.id, "question": q.text, "golden_answers": [letter], "choices": choices})
    return rows


def main(config: Config):
    mmlu, hotpotqa = load(config.mmlu, "test"), load(config.hotpotqa, "test")
    if not all(q.choices for q in mmlu) or any(q.choices for q in hotpotqa):
        raise InputError("--mmlu must have options, and --hotpotqa must have none")
    tables = {"mmlu_open": opened(mmlu), "hotpotqa_choice": with_options(hotpotqa, config.seed)}
    for (name, rows), questions in zip(tables.items(), (mmlu, hotpotqa), strict=True):
        write_jsonl(Path(config.output_dir) / f"{name}.jsonl", rows)
        print(f"{name}: {len(rows)} of {len(questions)} questions")


if __name__ == "__main__":
    config, _ = parse(Config, "bench/format_swap.py")
    try:
        main(config)
    except (InputError, OSError) as error:
        fail("bench/format_swap.py", error)
