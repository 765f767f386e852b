"""Search without a search engine (ZeroSearch, arXiv 2505.04588): while the policy trains, something else
plays the engine, and a growing share of its results is noise.

    p(i) = p_start + (4^(i / m) - 1) / 3 * (p_end - p_start)        share of noisy results in step i of m

`ModelSimulator` lets a second language model write the documents: helpful ones, for which its prompt holds
the question and the answer, or noisy ones, for which it does not. `CorpusSimulator` takes them from a corpus:
what BM25 finds, or random documents. Both are retrievers, and their attribute `simulates` makes a rollout
pass the questions to `search` as well.

Not here: the fine-tuned simulators of the paper (any causal language model can be used), and its evaluation
with real search, which evaluate.py does.

    simulator = CorpusSimulator(BM25(docs), seed=0)
    simulator.set_step(step, noise_share(step, max_steps, 0.0, 0.5))
    results = simulator.search(queries, k=3, questions=questions)
"""

from __future__ import annotations

import random
import re

from data import Doc, InputError, Question
from prompts import Template
from retriever import BM25, RetrieverError
from rollout import rollout

# The wording is ours. About 30 words a document, 600 tokens and temperature 0.8 are those of the paper's
# code.
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


def noise_share(step: int, max_steps: int, start: float, end: float) -> float:
    """p(i), the share of noisy results in step `step` (from 0) of `max_steps`."""
    return start + (4 ** (step / max_steps) - 1) / 3 * (end - start)


class Simulator:
    """The part that both simulators share: whether a result is noise depends on (seed, step, query) alone, so
    that a resumed run repeats it."""

    simulates = True

    def __init__(self, seed: int):
        self.seed = seed
        self.set_step(0, 0.0)

    def set_step(self, step: int, share: float):
        """Sets the step of training, and the share of noisy results in it."""
        self.step, self.share = step, share

    def draw(self, query: str) -> tuple[bool, random.Random]:
        """(whether the result of this query is noise, random numbers for it)."""
        rng = random.Random(f"{self.seed} {self.step} {query}")
        return rng.random() < self.share, rng


class CorpusSimulator(Simulator):
    def __init__(self, corpus: BM25, seed: int):
        super().__init__(seed)
        self.corpus = corpus

    def search(self, queries: list[str], k: int, questions: list[Question]) -> list[list[Doc]]:
        """What the corpus gives for each query; for noisy results random documents of it."""
        results = list(self.corpus.search(queries, k))
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
        """Sampled documents for each query. The random numbers of a query depend on its place among the
        queries of this call, so, unlike those of CorpusSimulator, the results change with the number of
        rollout slots. Raises RetrieverError if a query does not fit the simulator's context."""
        results: dict[int, list[Doc]] = {}
        for template, noisy in ((HELPFUL, False), (NOISY, True)):
            indices = [i for i, query in enumerate(queries) if self.draw(query)[0] == noisy]
            requests = []
            for i in indices:
                text = f"Query: {queries[i]}"
                if not noisy:
                    text += f"\nQuestion: {questions[i].text}\nAnswer: {questions[i].answer_texts()[0]}"
                requests.append(Question(questions[i].id, text, [], "simulator"))
            try:
                episodes = rollout(
                    self.model, self.tokenizer, template, requests, temperature=0.8,
                    max_completion_length=600, seed=self.seed, step=self.step,
                )  # fmt: skip
            except InputError as error:
                raise RetrieverError(f"the simulator: {error}") from error
            for i, episode in zip(indices, episodes, strict=True):
                results[i] = documents("".join(s.text for s in episode.segments), k)
        return [results[i] for i in range(len(queries))]


def documents(text: str, k: int) -> list[Doc]:
    """At most `k` documents of a simulator's text: the parts after "Doc 1:", "Doc 2:" and so on, or, if it
    has no such marks, its lines."""
    parts = re.split(r"(?m)^\W*Doc\s*\d+\W*", text)[1:] or text.splitlines()
    parts = [part.strip() for part in parts if part.strip()]
    return [Doc(str(i), f"Doc {i}", part) for i, part in enumerate(parts[:k], 1)]
