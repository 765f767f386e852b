"""Search without a search engine (ZeroSearch, arXiv 2505.04588): while the policy trains, something else
plays the engine, and a growing share of what it returns is noise.

    p(i) = p_start + (4^(i / m) - 1) / 3 * (p_end - p_start)        share of noisy results in step i of m

`ModelSimulator` asks a second language model for documents: helpful ones, for which it is told question and
answer, or noisy ones, for which it is not. `CorpusSimulator` takes them from a corpus: what BM25 finds, or
random ones. Both are retrievers (`search`), and `simulates` tells the rollout to hand them the questions too.

Not here: the fine-tuned simulators of the paper (any causal LM serves), and its real-search evaluation, which
is `evaluate.py`."""

from __future__ import annotations

import random
import re

from data import DataError, Doc, Question, Template
from retriever import BM25, RetrieverError
from rollout import rollout

# The wording is ours. About 30 words a document, 600 tokens and temperature 0.8 are the paper's code's.
HELPFUL = Template(
    "You are a search engine. Write five documents that a search for the query finds, each about 30 words on "
    "one line that begins with Doc 1:, Doc 2: and so on. They help to answer the question.",
    raw=True,
)
NOISY = Template(
    "You are a search engine. Write five documents that a search for the query finds, each about 30 words on "
    "one line that begins with Doc 1:, Doc 2: and so on. They share words with the query, and say nothing "
    "that is useful.",
    raw=True,
)


def noise(step: int, max_steps: int, start: float, end: float) -> float:
    """p(i), the share of noisy results in step `step` (from 0) of `max_steps`."""
    return start + (4 ** (step / max_steps) - 1) / 3 * (end - start)


class Simulator:
    """What both have in common: whether a result is noise depends on (seed, step, query) and on nothing
    else."""

    simulates = True

    def __init__(self, seed: int):
        self.seed = seed
        self.at(0, 0.0)

    def at(self, step: int, share: float):
        """The step of training, and the share of noisy results in it."""
        self.step, self.share = step, share

    def draw(self, query: str) -> tuple[bool, random.Random]:
        rng = random.Random(f"{self.seed} {self.step} {query}")
        return rng.random() < self.share, rng


class CorpusSimulator(Simulator):
    def __init__(self, corpus: BM25, seed: int):
        super().__init__(seed)
        self.corpus = corpus

    def search(self, queries: list[str], k: int, questions: list[Question]) -> list[list[Doc]]:
        results = self.corpus.search(queries, k)
        for i, query in enumerate(queries):
            noisy, rng = self.draw(query)
            if noisy:
                results[i] = rng.sample(self.corpus.docs, min(k, len(self.corpus.docs)))
        return results


class ModelSimulator(Simulator):
    def __init__(self, model, tokenizer, seed: int):
        super().__init__(seed)
        self.model, self.tokenizer = model, tokenizer

    def search(self, queries: list[str], k: int, questions: list[Question]) -> list[list[Doc]]:
        """Sampled documents. Which random numbers a query gets depends on its place among those asked
        together, so other than with a corpus the results change with the number of rollout slots."""
        results: dict[int, list[Doc]] = {}
        for template, wanted in ((HELPFUL, False), (NOISY, True)):
            some = [i for i, query in enumerate(queries) if self.draw(query)[0] == wanted]
            asked = []
            for i in some:
                text = f"Query: {queries[i]}"
                if not wanted:
                    text += f"\nQuestion: {questions[i].text}\nAnswer: {questions[i].in_words()[0]}"
                asked.append(Question(questions[i].id, text, [], "simulator"))
            try:
                written = rollout(
                    self.model, self.tokenizer, template, asked, temperature=0.8, max_completion_length=600,
                    seed=self.seed, step=self.step,
                )  # fmt: skip
            except DataError as error:  # a query longer than the simulator's context
                raise RetrieverError(f"the simulator: {error}") from error
            results |= {
                i: documents("".join(s.text for s in e.segments), k)
                for i, e in zip(some, written, strict=True)
            }
        return [results[i] for i in range(len(queries))]


def documents(text: str, k: int) -> list[Doc]:
    """The documents in a simulator's text, at most `k`: what follows "Doc 1:", "Doc 2:", ..., or else its
    lines."""
    parts = re.split(r"(?m)^\W*Doc\s*\d+\W*", text)[1:] or text.splitlines()
    parts = [part.strip() for part in parts if part.strip()]
    return [Doc(str(i), f"Doc {i}", part) for i, part in enumerate(parts[:k], 1)]
