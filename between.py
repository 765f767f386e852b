"""Questions in between: what `toy.py --between N` adds to the toy world.

In the plain toy world an answer without a search is either certain or a guess of one in twelve, and so all
rewards but EM teach the same there. These questions are about what the model is not certain of. On them the
rewards disagree.

    between    facts that the base model half knows. In its training texts such a fact has its true value half
               of the time, and otherwise one other value, which is always the same. N people have two such
               facts each. After training, those facts are kept that the model gives with a probability of
               0.25 to 0.75, closed-book and in a draft; the others are dropped. For 35 % of the facts the
               corpus lacks the answer. Which ones is fixed: if it were up to chance at each call, it would
               pay to ask again
    absent     facts that neither the model nor the corpus holds

If the model is right with a probability of 0.5 at once and of 0.6 after a search, the rewards are on average

           stop    honest draft, search    junk draft, search
    sem    0.50    0.30                    0.60
    otc    0.50    0.30 (if another episode of the group is right without a search)
    flat   0.50    0.50

(otc and flat do not read the draft, so an honest and a junk draft earn the same.)

    world = World.make(seed, between=72)       # toy.py calls `add_people`
    half_known(model, world, template, tokenizer)
"""

from __future__ import annotations

import random

import torch

from data import Question
from prompts import DIRECT, Template, render

LEAST_TRAIN, LEAST_HELDOUT = 32, 16  # questions of the kind between, else the exam fails
ABSENT_TRAIN, ABSENT_HELDOUT = 32, 16  # people of the kind absent; each has two questions
LACKING = 0.35  # share of the candidates whose answer is not in the corpus
RATES = 0.25, 0.75  # of right answers
NAMES = sorted({a + b for a in "ba ce di fo gu ha je ki lo mu na pe ri so tu va".split() for b in
                "bek dor fen gan hol jut kur lom mas nev pit rad sel tur".split()})  # fmt: skip
PEOPLE = (
    LEAST_TRAIN + LEAST_HELDOUT,
    len(NAMES) - ABSENT_TRAIN - ABSENT_HELDOUT,
)  # fewest and most for --between


def add_people(world, seed: int, n: int, values: dict[str, list[str]]):
    """Adds `n` people with half-known facts, and absent people, to a toy.World. `values` are the relations of
    facts and their possible values."""
    rng = random.Random(f"between {seed}")
    names = rng.sample(NAMES, n + ABSENT_TRAIN + ABSENT_HELDOUT)
    world.between, world.absent = names[:n], names[n:]
    for name in names:
        for relation, options in values.items():
            world.conflicting[relation, name] = rng.sample(options, 2)
            world.facts[relation, name] = world.conflicting[relation, name][0]
    candidates = [fact for fact in world.conflicting if fact[1] in world.between]
    world.lacking = {fact for fact in world.conflicting if fact[1] in world.absent}
    world.lacking |= set(rng.sample(candidates, round(LACKING * len(candidates))))


def cut(world) -> int:
    """How many of the people of world.between have questions to train on. The others are held out."""
    return len(world.between) * LEAST_TRAIN // (LEAST_TRAIN + LEAST_HELDOUT)


def question_sets(world) -> dict[str, list[Question]]:
    """File name -> questions, as toy.splits has them. Of `between` only half-known facts."""
    return {
        "train/between": world.questions(world.between[: cut(world)], "between"),
        "train/absent": world.questions(world.absent[:ABSENT_TRAIN], "absent"),
        "test/between": world.questions(world.between[cut(world) :], "between"),
        "test/absent": world.questions(world.absent[ABSENT_TRAIN:], "absent"),
    }


@torch.no_grad()
def half_known(model, world, template: Template, tokenizer) -> bool:
    """Sets world.half_known to the facts (relation, name) of world.between that the model gives with a
    probability within RATES, closed-book and as a draft (the answer after the first thought). Returns whether
    they are enough. Every value is one token, so its probability is there, and need not be estimated from
    samples."""

    def rate(ids: list[int], value: str) -> float:
        probabilities = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
        return probabilities[tokenizer.convert_tokens_to_ids(value)].item()

    world.half_known, (low, high) = set(), RATES
    for (relation, name), (value, _) in world.conflicting.items():
        question = Question("", f"what is the {relation} of {name} ?", [], "")
        draft = f"<think> {relation} of {name} </think> <answer>" + " \\boxed{" * template.boxed
        draft = tokenizer(draft, add_special_tokens=False).input_ids
        starts = render(DIRECT, question, tokenizer), render(template, question, tokenizer) + draft
        if name in world.between and all(low <= rate(ids, value) <= high for ids in starts):
            world.half_known.add((relation, name))
    names = [name for _, name in world.half_known]
    n = sum(name in world.between[: cut(world)] for name in names)
    print(f"half-known facts: {n} to train on, {len(names) - n} held out")
    return n >= LEAST_TRAIN and len(names) - n >= LEAST_HELDOUT
