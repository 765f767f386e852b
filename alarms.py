"""Some ways in which a run goes wrong. An alarm is one line, with what is wrong, a figure that shows it, and
what to try. grpo.py prints it when it is given for the first time in a run, report.py above the curves.

    alarms = Alarms(priced=True)
    alarms(metrics)               # after each step: ["the entropy has risen from 0.14 to 0.27 nats: ..."]

The thresholds are ours. Runs that went well stayed away from them (bench/RESULTS.md). They apply to means
over three steps, because single steps are noisy. An alarm is a reason to look, not to stop the run. Not here:
what does stop it, such as a retriever that is down (grpo.train).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

WINDOW = 3  # steps


class Alarms:
    """The alarms of a run, each given once. `priced` says that with this reward a search can lower what an
    episode earns. `past` are the metrics of the steps before, whose alarms are not given again."""

    def __init__(self, priced: bool, past: Iterable[dict] = ()):
        self.priced, self.history, self.given = priced, [], set()
        for metrics in past:
            self(metrics)

    def __call__(self, metrics: dict) -> list[str]:
        """The new alarms after the step with these metrics, one line each. A step in which the
        searches of all episodes failed says nothing, so it is passed over."""
        if metrics.get("tools/failure_frequency") == 1:
            return []
        self.history.append(metrics)
        new = {name: line for name, line in diagnose(self.history, self.priced) if name not in self.given}
        self.given |= set(new)
        return list(new.values())


def diagnose(history: list[dict], priced: bool) -> list[tuple[str, str]]:
    """[(name, line)] of what is wrong after these steps, the first steps of a run. It is read from means over
    the last three. To see a rise or a fall they are compared with the first three, so six steps are needed.
    No alarm is given about a metric that is missing in one of these steps.

    The alarms are in three groups, and only those of the first group that has any are given, because the
    later ones can follow from them: the text falls apart; something is wrong with all episodes; something is
    wrong with the searches of one data set."""
    return [*of_text(history)] or [*of_all(history)] or [*of_searches(history, priced)]


def of_text(history: list[dict]) -> Iterator[tuple[str, str]]:
    if later(history, "entropy") > 1.8 * first(history, "entropy"):
        what = f"the entropy has risen {change(history, 'entropy')} nats: the text is falling apart"
        yield "entropy rises", f"{what}; try a lower --learning_rate or a larger --beta"
    elif later(history, "tag_probability") < first(history, "tag_probability") - 0.1:
        what = f"the mean probability of the tags has fallen {change(history, 'tag_probability')}"
        yield "tags", f"{what}: the policy forgets the format; try a lower --learning_rate"


def of_all(history: list[dict]) -> Iterator[tuple[str, str]]:
    answers = [value for row in history[-WINDOW:] for name, value in row.items() if name.startswith("em/")]
    right = sum(answers) / len(answers) if answers else math.nan
    form, clipped = last(history, "format"), last(history, "completions/clipped_ratio")
    equal, gap = last(history, "frac_reward_zero_std"), last(history, "sampler_logp_diff/mean")
    if gap > 0.05:
        what = f"the log-probs of the sampler and those of the loss are {gap:.2f} apart on average"
        yield (
            "sampler",
            f"{what}: the two differ, or what the policy did not write is trained on; see look.py",
        )
    if form < 0.05:
        what = f"{form:.2f} of the episodes have a valid structure"
        yield "format", f"{what}: the model does not know the tags of the method; see coldstart.py"
    if clipped > 0.5:
        what = f"{clipped:.2f} of the episodes run out of tokens"
        yield "clipped", f"{what}: try a larger --max_completion_length"
    if equal > 0.95 and right < 0.9:  # nothing is wrong where all answers are right
        what = f"all rewards are equal in {equal:.2f} of the groups, with a mean reward of"
        where = f"{last(history, 'reward'):.2f} and {right:.2f} right answers"
        yield "equal", f"{what} {where}: little is learned; see the rewards in transcripts.jsonl"
    noisier = "noise_share" in history[-1]  # ZeroSearch makes the results worse on purpose
    if later(history, "reward") < first(history, "reward") - 0.15 and not noisier:
        what = f"the reward, which should rise, has fallen {change(history, 'reward')}"
        yield "reward", f"{what}: try a lower --learning_rate; with a reward of your own, check its sign"
    if later(history, "entropy") < 0.1 * first(history, "entropy") and right < 0.9:
        what = f"the entropy has fallen {change(history, 'entropy')} nats: the episodes of a group are alike"
        yield "entropy falls", f"{what}; try a lower --learning_rate or a larger --epsilon_high"


def of_searches(history: list[dict], priced: bool) -> Iterator[tuple[str, str]]:
    for source in (name.partition("/")[2] for name in history[-1] if name.startswith("em/")):
        ratio, em, searched = f"search_ratio/{source}", f"em/{source}", f"em_searched/{source}"
        if last(history, searched) < 0.05 and last(history, ratio) > 0.1:
            what = f"of the episodes of {source} that search, {last(history, searched):.2f} are right"
            yield (
                searched,
                f"{what}: the results are wrong, see transcripts.jsonl, or not read, see coldstart.py",
            )
        # A search ratio near 0 or 1 is a fault only if right answers are lost. A model that asks itself in
        # place of the engine has not stopped searching.
        start, end = first(history, ratio), later(history, ratio)
        asks = end + sum(row.get(f"self_search_ratio/{source}", 0) for row in history[-WINDOW:]) / WINDOW
        at_end = asks < 0.25 * start or (end > 0.95 and start < 0.8)
        before = first(history, em)
        if priced and at_end and later(history, em) < min(0.8 * before, before - 0.05):
            what = f"the search ratio of {source} has gone {change(history, ratio)}, its right answers"
            advice = "try a lower --learning_rate or price of a search (sem: --sem_kept 0.1)"
            yield ratio, f"{what} {change(history, em)}: {advice}"


def first(history: list[dict], name: str) -> float:
    return average(history[:WINDOW], name)


def last(history: list[dict], name: str) -> float:
    return average(history[-WINDOW:], name) if len(history) >= WINDOW else math.nan


def later(history: list[dict], name: str) -> float:
    """As `last`, where none of these steps is among the first."""
    return last(history, name) if len(history) >= 2 * WINDOW else math.nan


def change(history: list[dict], name: str) -> str:
    return f"from {first(history, name):.2f} to {last(history, name):.2f}"


def average(rows: list[dict], name: str) -> float:
    """The mean of a metric; NaN if a row lacks it, and no comparison with NaN is true."""
    return sum(row.get(name, math.nan) for row in rows) / len(rows)
