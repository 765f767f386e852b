"""What is measured, and how: the metrics of a training step, the measures of an evaluation with their
intervals and tables, and a language model as the judge of answers. Not here: the sampling of the episodes,
which grpo.py does in training and evaluate.py in an evaluation.

    metrics = step_metrics(episodes, parts, group_size=5, tau=0.5)
    measures = measure(records)                        # {"em": {"value", "low", "high", "n"}, ...}
    print(report({"hotpotqa": measures}))
"""

from __future__ import annotations

import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from tqdm import tqdm

from data import Episode, Question
from reward import exact_match, parse_episode, tag_pattern
from web import RequestError, post


def is_right(episode: Episode) -> bool:
    """Whether the final answer is an exact match."""
    return exact_match(parse_episode(episode).answer, episode.question) == 1.0


def self_searches(episode: Episode) -> int:
    """How often the model asked itself: in hybrid's dialect with a tag of its own, in SSRL's with that of a
    search that the engine did not answer."""
    shape = parse_episode(episode).shape
    return shape.count("S") - episode.searches if episode.template.self_search else shape.count("Q")


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


# ------------------------------------------------------------------------------------------------------------
# training: the metrics of a step


def step_metrics(episodes: list[Episode], parts: list[dict], group_size: int, tau: float) -> dict[str, float]:
    """What the episodes of a training step were like, under TRL's names where TRL has one. `parts[i]` is what
    the reward of episode i returned, and empty if its search failed. Each `group_size` consecutive
    episodes are compared with one another: a whole group, or one half of it.

    An episode whose search failed says nothing about the policy, so it counts in tools/failure_frequency
    only. What is about searches and right answers counts the episodes with a search engine alone (`engine`).
    Lengths and num_tokens count policy tokens. TRL's num_tokens grows over the run; this one is of the step
    alone."""
    counted = [(e, p) for e, p in zip(episodes, parts, strict=True) if p]
    engine = [e for e, _ in counted if e.engine]
    n = max(1, len(counted))
    lengths = [e.policy_tokens for e, _ in counted]
    terminated = [e.policy_tokens for e, _ in counted if e.stop in ("eos", "answer")]
    groups = [[p for p in parts[i : i + group_size] if p] for i in range(0, len(parts), group_size)]
    rewards = torch.tensor([p["reward"] for _, p in counted], dtype=torch.float64)
    spreads, equal = [], []  # for groups of at least two, stacked by size: std, whether all rewards are equal
    for size in range(2, group_size + 1):
        if same_size := [[p["reward"] for p in group] for group in groups if len(group) == size]:
            stacked = torch.tensor(same_size, dtype=torch.float64)  # [groups, size]
            spreads.append(stacked.std(1))
            equal.append(stacked.amax(1) - stacked.amin(1) < 1e-6)
    metrics = {
        "reward": rewards.sum().item() / n,
        "reward_std": torch.cat(spreads).mean().item() if spreads else 0.0,
        "frac_reward_zero_std": torch.cat(equal).double().mean().item() if equal else 0.0,
        "completions/mean_length": sum(lengths) / n,
        "completions/min_length": min(lengths, default=0),
        "completions/max_length": max(lengths, default=0),
        "completions/mean_terminated_length": mean(terminated) or 0.0,
        "completions/clipped_ratio": sum(e.stop == "length" for e, _ in counted) / n,
        "tools/call_frequency": sum(e.searches for e in engine) / max(1, len(engine)),
        "tools/failure_frequency": 1 - len(engine) / sum(e.engine for e in episodes),
        "num_tokens": sum(lengths),
    }
    first = counted[0][1] if counted else {}
    if "f" in first:
        metrics["format"] = sum(p["f"] for _, p in counted) / n
    if "f1_a1" in first:
        firsts = episodes[::group_size]
        with_engine = [group for group, e in zip(groups, firsts, strict=True) if e.engine]
        suspects, searched = sandbag_suspects(with_engine, tau)
        metrics["sandbag_suspects"] = suspects / searched if searched else 0.0
    own_results = bool(episodes[0].template.own_result)  # not in call_frequency and search_ratio
    if own_results:
        metrics["tools/self_searches"] = sum(map(self_searches, engine)) / max(1, len(engine))
    for source in sorted({e.question.source for e in engine}):
        of_source = [e for e in engine if e.question.source == source]
        metrics[f"search_ratio/{source}"] = mean(e.searches > 0 for e in of_source)
        metrics[f"em/{source}"] = mean(map(is_right, of_source))
        if own_results:
            metrics[f"self_search_ratio/{source}"] = mean(self_searches(e) > 0 for e in of_source)
        if searched := [e for e in of_source if e.searches]:
            metrics[f"em_searched/{source}"] = mean(map(is_right, searched))
    return metrics


def sandbag_suspects(groups: list[list[dict[str, float]]], tau: float = 0.5) -> tuple[int, int]:
    """(suspects, searched) from the parts of SEM's reward, group by group. `searched` counts the episodes
    that searched although another episode of their group earned a reward without a search; `suspects` counts
    those of them whose draft is wrong. This measure is ours.

    The share suspects / searched rises if a policy learns to write junk drafts in order to search."""
    suspects = searched = 0
    for group in groups:
        if any(p["reward"] > 0 and not p["s"] for p in group):
            searched += sum(p["s"] == 1 for p in group)
            suspects += sum(p["s"] == 1 and p["f1_a1"] < tau for p in group)
    return suspects, searched


def tag_probability(episodes: list[Episode], tokenizer) -> dict[str, float]:
    """{"tag_probability": mean} over the tokens of the tags that the policy wrote, each with the probability
    at which it was sampled; {} if there are none. arXiv 2606.26027 finds that the tags show a collapse before
    the answers do; in our collapse on purpose they do so later. The measure is ours. It also moves a little
    with the habits of the policy, because the tag that opens a search is a decision."""
    texts: dict[int, str] = {}
    total = n = 0
    for e in (e for e in episodes if e.stop != "search_failed"):  # those enter no metric
        for token in e.ids:
            if token not in texts:
                texts[token] = tokenizer.decode([token])
        ends = list(accumulate(len(texts[token]) for token in e.ids))
        for tag in tag_pattern(e.template).finditer("".join(texts[token] for token in e.ids)):
            for i in range(bisect_right(ends, tag.start()), bisect_right(ends, tag.end() - 1) + 1):
                if e.loss_mask[i]:
                    total, n = total + math.exp(e.logps[i]), n + 1
    return {"tag_probability": total / n} if n else {}


# ------------------------------------------------------------------------------------------------------------
# evaluation: one record for each question, and measures over records


@dataclass
class Record:
    """What an evaluation found out about one question. A field is None if its pass was not made."""

    id: str
    em: bool  # the answer is an exact match
    f1: float
    searches: int
    tokens: int  # policy tokens
    draft: bool | None = None  # the first answer has F1 >= tau; None: the method has no drafts
    known: bool | None = None  # right in the closed-book pass, see prompts.DIRECT
    known_base: bool | None = None  # right closed-book for the base model, by the eval.json of --known
    forced: bool | None = None  # right in the pass in which a search is forced
    judged: bool | None = None  # right for the judge; None also where the judge gave no verdict
    sampled: list[bool] | None = None  # right, for each sampled episode
    closed_book: list[bool] | None = None  # the same in the closed-book prompt, see knowledge.py
    self_searches: int | None = None  # queries to itself; None: the method has none

    @property
    def searched(self) -> bool:
        return self.searches > 0


@dataclass(frozen=True)
class Share:
    """A measure that is a share of records: of those that `among` selects, how many `counts` selects."""

    definition: str
    among: Callable[[Record], object]
    counts: Callable[[Record], object]


SHARES = {
    "em": Share("exact match", lambda r: True, lambda r: r.em),
    "lj": Share("right for the judge", lambda r: r.judged is not None, lambda r: r.judged),
    "sr": Share("P(searched a corpus or server): SEM's search ratio", lambda r: True, lambda r: r.searched),
    "self_sr": Share("P(asked itself)", lambda r: r.self_searches is not None, lambda r: r.self_searches > 0),
    "known": Share("P(right closed-book)", lambda r: r.known is not None, lambda r: r.known),
    "over_search": Share(
        "P(searched | known): QOR of SAAS (arXiv 2605.29796)", lambda r: r.known, lambda r: r.searched
    ),
    "over_search_base": Share(
        "P(searched | known to the base model, by --known)", lambda r: r.known_base, lambda r: r.searched
    ),
    "under_search": Share(
        "P(not searched | not known, but right when forced to search): ours",
        lambda r: r.known is False and r.forced,
        lambda r: not r.searched,
    ),
    "wrong_without_search": Share("P(wrong | not searched)", lambda r: not r.searched, lambda r: not r.em),
    "draft_right_given_search": Share(
        "P(draft right | searched)", lambda r: r.searched and r.draft is not None, lambda r: r.draft
    ),
    "sandbag_rate": Share(
        "P(draft wrong | known, searched): ours",
        lambda r: r.known and r.searched and r.draft is not None,
        lambda r: not r.draft,
    ),
}


def f1_aware(records: list[Record]) -> float | None:
    """2PR / (P + R) of the decision not to search, with P = P(known | not searched) and R = P(not searched |
    known)."""
    records = [r for r in records if r.known is not None]
    both = sum(r.known and not r.searched for r in records)
    total = sum(r.known for r in records) + sum(not r.searched for r in records)
    return 2 * both / total if total else None


def tool_productivity(records: list[Record]) -> float | None:
    searches = sum(r.searches for r in records)
    return sum(r.em for r in records) / searches if searches else None


def pass_at(k: int) -> Callable[[list[Record]], float | None]:
    """The measure pass@k by its unbiased estimator (arXiv 2107.03374): 1 - C(n - c, k) / C(n, k), where c of
    n samples are right."""

    def figure(records: list[Record]) -> float | None:
        counts = [(len(r.sampled), sum(r.sampled)) for r in records if r.sampled]
        return mean(1 - math.comb(n - c, k) / math.comb(n, k) for n, c in counts)

    return figure


FIGURES: dict[str, tuple[str, Callable]] = {  # the other measures: definition, function of the records
    "f1": ("token F1", lambda rs: mean(r.f1 for r in rs)),
    "searches": ("searches per question", lambda rs: mean(r.searches for r in rs)),
    "tokens": ("policy tokens per question", lambda rs: mean(r.tokens for r in rs)),
    "f1_aware": ("F1 of not searching as the sign of known (AdaSearch, arXiv 2512.16883)", f1_aware),
    "tool_productivity": ("right answers / searches (OTC, arXiv 2504.14870)", tool_productivity),
}


def measure(records: list[Record]) -> dict[str, dict[str, float]]:
    """{measure: {"value", "low", "high", "n"}} for all measures that these records allow. low and high are
    the 95 % interval: Wilson's for shares, bootstrap for the others."""
    table = {}
    for name, share in SHARES.items():
        if outcomes := [bool(share.counts(r)) for r in records if share.among(r)]:
            low, high = wilson(sum(outcomes), len(outcomes))
            table[name] = {"value": mean(outcomes), "low": low, "high": high, "n": len(outcomes)}
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
    return max(0.0, centre - half), min(1.0, centre + half)  # rounding could give -1e-17, printed as -0.000


def bootstrap(figure: Callable, records: list[Record], times: int = 300) -> tuple[float, float]:
    """The 95 % percentile interval of `figure` over resampled questions, the same at every call."""
    rng = np.random.default_rng(0)
    draws = (
        figure([records[i] for i in rng.integers(len(records), size=len(records))]) for _ in range(times)
    )
    low, high = np.quantile([draw for draw in draws if draw is not None], [0.025, 0.975])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------------
# tables


SUMMARY = {
    "em": lambda r: r.em,
    "f1": lambda r: r.f1,
    "sr": lambda r: r.searched,
    "searches": lambda r: r.searches,
}


def summary(records: list[Record]) -> dict[str, float]:
    """The four figures of the table that grpo.py prints at the end, and the number n of questions."""
    return {name: mean(map(value, records)) or 0.0 for name, value in SUMMARY.items()} | {"n": len(records)}


def markdown(tables: dict[str, dict[str, dict[str, float]]]) -> str:
    """{"before": {set: summary}, "after": ..} -> a markdown table with one line for each set."""
    head = "".join(f" | EM {when} | F1 {when} | SR {when} | searches {when}" for when in tables)
    lines = [f"| questions | n{head} |", "| --- | ---:" + " | ---:" * 4 * len(tables) + " |"]
    for name, first in next(iter(tables.values())).items():
        cells = "".join(f" | {table[name][figure]:.2f}" for table in tables.values() for figure in SUMMARY)
        lines.append(f"| {name} | {first['n']}{cells} |")
    return "\n".join(lines)


def cell(figure: dict[str, float] | None) -> str:
    """Value (95 % interval; number of questions)."""
    return "{value:.3f} ({low:.3f} to {high:.3f}; {n})".format(**figure) if figure else "-"


def report(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """{set: measures} -> a markdown table with one line for each measure, value (95 % interval; number of
    questions), and the definitions of the measures below it."""
    names = dict.fromkeys(name for measures in table.values() for name in measures)
    lines = [f"| measure | {' | '.join(table)} |", "| --- |" + " ---: |" * len(table)]
    for name in names:
        lines.append(f"| {name} | {' | '.join(cell(row.get(name)) for row in table.values())} |")
    definitions = {name: share.definition for name, share in SHARES.items()}
    definitions |= {name: definition for name, (definition, _) in FIGURES.items()}
    definitions |= {name: "right at least once in that many samples" for name in names if "pass@" in name}
    return "\n".join(lines) + "\n\n" + "\n".join(f"{name}: {definitions[name]}" for name in names)


# ------------------------------------------------------------------------------------------------------------
# LJ: a language model as the judge


class JudgeError(RuntimeError):
    """The judge did not answer, or its answer is no verdict. The message is one line that says which."""


def judge(question: Question, answer: str, url: str, model: str) -> bool:
    """Whether an OpenAI-compatible endpoint finds the answer right. The criterion is ReSearch's (arXiv
    2503.19470, appendix): the same meaning as one of the golds. The wording is ours. Raises JudgeError if the
    endpoint gives no verdict within about two minutes."""
    golds = [*dict.fromkeys(question.answers + question.answer_texts())]
    prompt = (
        "Is the answer right? It is right if it means the same as at least one of the reference answers. "
        'Reply with JSON only: {"rationale": "...", "judgement": "correct" or "incorrect"}.\n\n'
        f"Question: {question.text}\n"
        + "".join(f"{chr(65 + i)}. {choice}\n" for i, choice in enumerate(question.choices or []))
        + f"Reference answers: {json.dumps(golds)}\nAnswer: {answer}"
    )
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[ -~]*", key):  # said here, because the error of the library would print the key
        raise JudgeError("OPENAI_API_KEY holds characters that no key has")
    address = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    try:
        reply = post(address, body, timeout=60, headers={"Authorization": f"Bearer {key}"})
    except RequestError as error:
        raise JudgeError(str(error)) from error
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"].rpartition("</think>")[2]
        if "<think>" in text:
            raise ValueError("the thought was cut off")
        # The last one counts, since a reply may quote others. A pattern, because models write bad JSON.
        found = re.findall(r'(?<!\\)"judge?ment"\s*:\s*"\s*(correct|incorrect)\b', text, re.IGNORECASE)
        return found[-1].lower() == "correct"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(reply[:10_000].decode(errors="replace").split())
        raise JudgeError(f"no verdict in its reply: {said[:200]}") from error


def verdicts(answers: list[tuple[Question, str]], url: str, model: str, name: str) -> list[bool | None]:
    """The judge's verdict on each answer of the set `name`; None, with a warning, where it gave none. After
    32 answers in a row without a verdict the rest is not sent, because each could take a minute."""
    results: list[bool | JudgeError] = []

    def ask(question: Question, answer: str) -> bool | JudgeError:
        try:
            return judge(question, answer, url, model)
        except JudgeError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        for i in tqdm(range(0, len(answers), 32), desc=f"{name}, judge"):
            results += pool.map(ask, *zip(*answers[i : i + 32], strict=True))
            if all(isinstance(result, JudgeError) for result in results[-32:]):
                break
    errors = [result for result in results if isinstance(result, JudgeError)]
    found: list[bool | None] = [None if isinstance(result, JudgeError) else result for result in results]
    found += [None] * (len(answers) - len(results))
    if errors:
        missing = f"no verdict on {found.count(None)} of {len(found)} questions"
        tqdm.write(f"warning: {name}: the judge gave {missing}; the first reason: {errors[0]}")
    return found
