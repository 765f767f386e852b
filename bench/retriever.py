"""Queries a second of BM25 beside rank_bm25: one process, one thread, the same words, equal scores.

    python bench/retriever.py            # about a minute; writes its table into bench/RESULTS.md

Corpora of 10,000 and 100,000 documents of 45 words, drawn from 50,000 words by Zipf's law (p ~ 1 / rank);
64 distinct queries of 6 to 8 words are drawn the same way, so most contain very common words, as questions
do. k = 3.

rank_bm25 has two advantages: its index shares string objects, which makes it about twice as fast, and its
queries are tokenized beforehand. Ours tokenizes in the measured time, and its cache is emptied before each
round. The scores of all documents are compared bit for bit beforehand, for each query that rank_bm25 is
timed on. All times are CPU times, the best of the rounds.
"""

import platform
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from rank_bm25 import BM25Okapi
from results import write

from data import Doc
from retriever import BM25, tokenize

LENGTH, VOCABULARY, QUERIES, K, SEED = 45, 50_000, 64, 3, 0


def race(rounds: int, *functions) -> list[float]:
    """CPU seconds of each function, the best of the rounds. They take turns, so that a busy time hits all."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            best[i] = min(best[i], time.process_time() - start)
    return best


def measure(n_docs: int, n_peer: int) -> list[str]:
    """A row of the table. The peer answers only the first `n_peer` queries, because it is slow."""
    rng = np.random.default_rng(SEED)
    share = 1 / np.arange(1, VOCABULARY + 1)
    share /= share.sum()
    words = np.array([f"w{i}" for i in range(VOCABULARY)], dtype=object)
    corpus = [row.tolist() for row in words[rng.choice(VOCABULARY, (n_docs, LENGTH), p=share)]]
    queries = [" ".join(words[rng.choice(VOCABULARY, rng.integers(6, 9), p=share)]) for _ in range(QUERIES)]
    assert len(set(queries)) == QUERIES
    docs = [Doc(str(i), "", " ".join(row)) for i, row in enumerate(corpus)]

    def fit():
        return BM25Okapi(tokenize(doc.text) for doc in docs)

    fitting, indexing = race(3, fit, lambda: BM25(docs, "okapi"))
    peer, ours = BM25Okapi(corpus), BM25(docs, "okapi")
    tokenized = [tokenize(query) for query in queries[:n_peer]]
    for query, terms in zip(queries, tokenized, strict=False):
        assert np.array_equal(ours.scores(query), peer.get_scores(terms)), query

    def search():
        ours._top.cache_clear()
        ours.search(queries, K)

    slow, fast = race(5, lambda: [peer.get_top_n(terms, docs, K) for terms in tokenized], search)
    slow, fast = n_peer / slow, QUERIES / fast
    rates = f"{slow:,.1f} ({n_peer})", f"{fast:,.0f} ({QUERIES})", f"{fast / slow:,.0f}x"
    return [f"{n_docs:,}", *rates, f"{fitting:.2f}", f"{indexing:.2f}"]


def main():
    head = "documents", "rank_bm25, queries/s", "BM25, queries/s", "ratio"
    times = "rank_bm25, tokenize and fit, s", "BM25, the same and index, s"
    rows = [[*head, *times], ["---:"] * 6, measure(10_000, QUERIES), measure(100_000, 8)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    packages = ", ".join(f"{name} {version(name)}" for name in ("rank-bm25", "numpy"))
    text = f"""## Search: BM25 beside rank_bm25

`python bench/retriever.py`, {date.today()}, Python {platform.python_version()}, {packages}.
One thread, CPU time. Documents of {LENGTH} Zipf words, distinct queries of 6 to 8 words (in brackets: how
many were timed), k = {K}, no query from the cache. idf is "okapi", with which
the scores are equal bit for bit.

{table}"""
    print(text)
    write("retriever", text)


if __name__ == "__main__":
    main()
