"""--reward boundary: what the policy knows is found out beside the episode (SAAS, arXiv 2605.29796).

SEM reads from the draft of an episode whether its search was needed, so a policy can earn by a junk draft.
SAAS takes this test out of the episode: half of each group, the "off" half, is sampled without the search
engine. How many of that half are right says whether the question needs a search.

    label         right in the off half    a right episode of the on half earns
    nosearch      at least half of it      1 - 0.05 for each search
    needsearch    none, but some with      1 - 0.05 for each search beyond the fewest of a right episode
                  the engine
    neither       the rest                 1

Right is an F1 of 1. What is not right earns its F1. An episode of the off half earns the F1 of its answer. If
it asks for a search it ends there, and the answer that it gave before counts. Both halves have the same
prompt, and each has advantages of its own: a reward is compared with those of its half alone. No structure is
checked.

    python grpo.py --reward boundary       # both halves are trained on
    python grpo.py --reward boundary_on    # ours: the off half labels, and is not trained on

EAPO (arXiv 2606.02132) also puts episodes without tools into every group.

This follows the formulas of the paper; its code differs. There a question is nosearch if at least 2 of 4 are
right; "half" is our generalisation. The first stage of the paper is left out, in which the reward is F1 alone
until that no longer rises. (The paper has an accuracy of 45.8 with it and 40.9 without.)

The labels are noisy. A policy that is right half of the time gets the label nosearch from an off half of four
with a probability of 0.69. metrics.jsonl has the share of each label by kind of question."""

from __future__ import annotations

from data import Episode, InputError, Question
from reward import REWARDS, Reward, f1, parse_episode

COST = 0.05  # of a search; alpha of the paper
LABELS = "nosearch", "needsearch", "neither"


def score(episode: Episode) -> float:
    """F1 of the final answer. Without the engine that is the answer before a search that was asked for."""
    p = parse_episode(episode)
    return f1(p.answer if episode.engine or not episode.template.draft else p.first, episode.question)


def label(group: list[Episode]) -> tuple[str, int]:
    """(label of the question, how many searches it needs) by the episodes of both halves."""
    off = [score(e) == 1 for e in group if not e.engine]
    on = [e.searches for e in group if e.engine and score(e) == 1]
    if any(off) and sum(off) >= len(off) / 2:
        return "nosearch", 0
    return ("needsearch", min(on)) if on and not any(off) else ("neither", 0)


def boundary(episode: Episode, question: Question, *, group: list[Episode], **_) -> dict[str, float]:
    """The reward, at most 1; F1, whether the engine was on, and the label. `group` is both halves. Where the
    method has drafts, there are also the parts of SEM's reward that the metric sandbag_suspects reads."""
    (name, needed), value = label(group), score(episode)
    pays = name != "neither" and value == 1  # an episode of the off half has no search to pay for
    cost = COST * max(0, episode.searches - needed) if pays else 0.0
    parts = {"reward": value - cost, "f1": value, "engine": float(episode.engine)}
    parts |= {known: float(known == name) for known in LABELS}
    if episode.template.draft:
        p = parse_episode(episode)
        parts |= {"s": float(p.searched), "f1_a1": f1(p.first, question)}
    return parts


def fits(template) -> bool:
    return not template.self_search  # a policy that writes its own results needs no engine


REWARDS["boundary"] = Reward(boundary, fits, priced=True, halves=True)
REWARDS["boundary_on"] = Reward(boundary, fits, priced=True, halves=True, trains_off=False)


def check(config):
    """Raises InputError for settings that do not fit a reward whose groups have two halves."""
    flag = f"--reward {config.reward}" if config.reward else f"--method {config.method}"
    size = config.num_generations
    if size < 4 or size % 2:
        raise InputError(f"{flag}: --num_generations {size} must be even and at least 4, for two halves")
    if config.loss_type == "dr_grpo":
        raise InputError(f"{flag}: not with --loss_type dr_grpo, since each half is normalised by itself")
    if config.simulator:
        raise InputError(f"{flag}: not with --simulator")


def label_shares(episodes: list[Episode], parts: list[dict]) -> dict[str, float]:
    """{"labels/nosearch/known": share of the questions of the source "known" with that label, ..} of a step,
    and {} for another reward. The episodes of the off halves are counted, because their searches cannot
    fail."""
    labelled = [(e, p) for e, p in zip(episodes, parts, strict=True) if "nosearch" in p and not e.engine]
    shares = {}
    for source in sorted({e.question.source for e, _ in labelled}):
        of_source = [p for e, p in labelled if e.question.source == source]
        shares |= {
            f"labels/{name}/{source}": sum(p[name] for p in of_source) / len(of_source) for name in LABELS
        }
    return shares
