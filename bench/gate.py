"""The simplest rival of a policy that decides when to search: logistic regression on the question's words.

It learns from the closed-book pass over training questions which ones the model knows, and then decides by
the question's text alone: answer closed-book, or take the forced pass's answer. Where this gate does as well
as a trained policy, the data sets differ by their format, and the policy may have learnt no more than that.

    python evaluate.py --model out/base --data train.jsonl --output out/gate_train.json ...
    python evaluate.py --model out/base --data test.jsonl --output out/gate_test.json ...
    python bench/gate.py --train out/gate_train_transcripts.jsonl --test out/gate_test_transcripts.jsonl
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import fail, parse
from disk import read_lines
from measures import SHARES, Record, measure, report
from retriever import tokenize


@dataclass
class Config:
    """A logistic regression that decides from the question's words whether to search."""

    train: str = ""  # eval_transcripts.jsonl over training questions
    test: str = ""  # eval_transcripts.jsonl over the questions that it decides


def passes(path) -> dict[tuple[str, str], dict]:
    """(set, id) -> {pass: the row of eval_transcripts.jsonl}."""
    table: dict[tuple[str, str], dict] = {}
    for _, row in read_lines(Path(path)):
        table.setdefault((row["set"], row["id"]), {})[row["pass"]] = row
    return table


def fit(texts: list[str], known: list[bool], steps: int = 300, decay: float = 1e-3):
    """text -> P(known): full-batch logistic regression on a bag of words, with weight decay."""
    words = {w: i for i, w in enumerate(sorted({w for text in texts for w in tokenize(text)}))}

    def bag(texts: list[str]) -> torch.Tensor:
        x = torch.zeros(len(texts), len(words) + 1)
        for row, text in zip(x, texts, strict=True):
            row[[words[w] for w in tokenize(text) if w in words]] = 1.0
            row[-1] = 1.0  # the bias
        return x

    x, y, w = bag(texts), torch.tensor(known).float(), torch.zeros(len(words) + 1, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(x @ w, y).backward()
        optimizer.step()
    return lambda texts: torch.sigmoid(bag(texts) @ w.detach()).tolist()


def gate(train, test) -> dict[str, list[Record]]:
    """{set: records} of the policy that searches where the gate says that the model does not know."""
    rows = list(passes(train).values())
    p_known = fit([r["normal"]["question"] for r in rows], [r["closed-book"]["right"] for r in rows])
    table: dict[str, list[Record]] = {}
    decided = passes(test)
    shares = p_known([r["normal"]["question"] for r in decided.values()])
    for ((name, id), r), share in zip(decided.items(), shares, strict=True):
        taken = r["closed-book"] if share > 0.5 else r["forced"]
        record = Record(id, taken["right"], float(taken["right"]), taken["searches"], 0)
        record.known, record.forced = r["closed-book"]["right"], r["forced"]["right"]
        table.setdefault(name, []).append(record)
    return table


if __name__ == "__main__":
    config, _ = parse(Config, "gate.py")
    try:
        table = {name: measure(records) for name, records in gate(config.train, config.test).items()}
    except (OSError, ValueError, KeyError) as error:
        fail("gate.py", f"--train, --test: not the transcripts of all three passes: {error!r}")
    print(report({name: {k: v for k, v in row.items() if k in SHARES} for name, row in table.items()}))
