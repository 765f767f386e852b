"""How often a policy searches, by how well the model knows the answer: evaluate.py --knowledge_samples 8.

One greedy closed-book answer says "known" or "not known". Most facts of a language model lie in between: it
is right in some samples and wrong in others. Here each question is sampled several times closed-book. The
questions are grouped by how many of these samples were right, and each group gets a line with the share of
its questions that the policy searched for. For a policy that judges what it knows, the share falls from the
first line to the last. For one that tells questions apart by their format alone, it is the same in all lines
of a data set.

    tables = search_by_knowledge(records, 8)    # {set: {"0": {"value", "low", "high", "n"}, "1-2": ..}}
    print(report(tables, 8))
"""

from __future__ import annotations

from measures import Record, cell, mean, wilson


def classes(n: int) -> dict[str, range]:
    """{name: numbers of right samples of n}: none, up to a quarter, the middle, from three quarters on, all.
    For n = 8 they are 0, 1-2, 3-5, 6-7 and 8. The edges are our choice."""
    low, high = n // 4, n - n // 4
    ranges = [range(1), range(1, low + 1), range(low + 1, high), range(high, n), range(n, n + 1)]
    return {str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}": r for r in ranges if r}


def search_by_knowledge(records: dict[str, list[Record]], n: int) -> dict[str, dict[str, dict]]:
    """{set: {class: share of its questions that were searched for, Wilson's 95 % interval, number}}, where
    the class says how many of `n` closed-book samples were right. A class without questions is left out.
    There is no figure for all sets together: it would also fall for a policy that only tells one set from
    another."""
    tables: dict[str, dict[str, dict]] = {name: {} for name in records}
    for name, rows in records.items():
        for class_, numbers in classes(n).items():
            if searched := [r.searched for r in rows if sum(r.closed_book) in numbers]:
                low, high = wilson(sum(searched), len(searched))
                tables[name][class_] = {"value": mean(searched), "low": low, "high": high, "n": len(searched)}
    return tables


def report(tables: dict[str, dict[str, dict]], n: int) -> str:
    """A markdown table with one line for each class of `n` samples: value (95 % interval; number of
    questions)."""
    lines = [f"| share searched, if right closed-book in .. of {n} samples | {' | '.join(tables)} |"]
    lines.append("| --- |" + " ---: |" * len(tables))
    for class_ in classes(n):
        cells = (cell(table.get(class_)) for table in tables.values())
        lines.append(f"| {class_} | {' | '.join(cells)} |")
    return "\n".join(lines)
