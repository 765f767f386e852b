"""Search over a corpus: BM25 in this process, and Search-R1's /retrieve protocol, as client and as server.

A retriever is any object with `search(queries, k) -> list[list[Doc]]`; simulator.CorpusSimulator needs its
list `docs` as well. Here these are `BM25` and `Remote`, and `open_retriever` chooses between them by the
flags. Dense retrieval is not here; it can run behind /retrieve. prompts.encode_foreign makes passages safe to
show to a model. BM25 is not for many millions of passages, since rank_bm25 holds one dict for each while it
is built.

    python retriever.py --corpus corpus.jsonl --port 8000         # serves /retrieve on 127.0.0.1

    retriever = BM25(load_corpus("corpus.jsonl"))                 # or Remote("http://127.0.0.1:8000")
    [docs] = retriever.search(["who wrote Faust"], k=3)
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

import numpy as np
from rank_bm25 import BM25Okapi
from tqdm import tqdm

from config import fail, parse
from data import Doc, InputError, paragraphs
from files import json_lines
from web import MAX_REPLY, RequestError, check_url, post

MAX_REQUEST = 2**20  # bytes that the server reads at most
MAX_TOPK = 100  # of the server, so that a small request cannot ask for the whole corpus
MAX_DOCUMENTS = 10_000  # queries times topk of one request
MAX_QUERY = 2**15  # characters; the client cuts a longer query, which no retriever reads to its end
BACKOFF = 0.5  # seconds before the first retry, doubled for each further one
ALL = slice(None)
# `\w` of the module re leaves out combining marks, which would cut Hindi words at their vowels
MARKS = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c) in ("Mn", "Mc"))
WORD = re.compile(rf"[\w{MARKS}]+")
VARIATION = re.compile("[\u034f\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # invisible marks
TINY = np.nextafter(0.0, 1.0)  # score >= TINY is score > 0


def tokenize(text: str) -> list[str]:
    """The words of a text, which are runs of letters, digits, underscores and the marks of letters. They are
    composed (NFKC) and case-folded, and lose invisible characters, so that two spellings of one word are
    equal. Accents and other marks stay, because Hindi and Thai write vowels with them. Words are not stemmed,
    and stop words are kept (our choice).

    In a script without spaces (Chinese, Thai) a whole phrase becomes one word, so a corpus in such a script
    needs another function."""
    if text.isascii():
        return re.findall(r"\w+", text.lower())
    composed = VARIATION.sub("", unicodedata.normalize("NFKC", text))
    visible = "".join(c for c in composed if unicodedata.category(c) != "Cf")
    # i with a dot above is the small form of the Turkish capital I with a dot
    return WORD.findall(unicodedata.normalize("NFKC", visible.casefold().replace("i\u0307", "i")))


def _doc(row) -> Doc:
    """The document in a line of a corpus or in a reply. Raises ValueError, which says what is wrong.

    A title of its own comes before a first line of "contents" that looks like one. Without either, the
    document has no title."""
    if not isinstance(row, dict):
        raise ValueError("a document is not a JSON object")
    title, text, contents = (row.get(key) for key in ("title", "text", "contents"))
    title = str(title) if isinstance(title, (int, float)) else title
    if isinstance(contents, str) and not (isinstance(title, str) and title.strip() and isinstance(text, str)):
        first, line_break, rest = contents.partition("\n")
        inner = ".*" if line_break else '[^"]*'  # without a line break '"A" and "B"' is a text
        heading = re.sub(rf'^\s*"({inner})"\s*$', r"\1", first).removesuffix("\r")
        if not (isinstance(title, str) and title.strip()):
            title = heading if line_break or heading != first else ""
        text = rest if title.strip() == heading.strip() else contents
    if not (isinstance(title, str) and isinstance(text, str)):
        raise ValueError('a document without "contents" (or "title" and "text")')
    id = str(row.get("id", ""))
    (id + title + text).encode()  # half of a surrogate pair is valid JSON, but would stop the tokenizer
    return Doc(id, title, text)


def load_corpus(path) -> list[Doc]:
    """The documents of a JSONL file, which may be packed with gzip or bzip2, in its order. A line is
    Search-R1's {"id", "contents": "\\"Title\\"\\ntext"}, or {"id", "title", "text"}, or {"id", "title",
    "contents"}.

    Raises InputError, which names file and line, if the file is missing or empty, or if a line is not UTF-8,
    not JSON, or no document with an id."""
    docs: list[Doc] = []
    for where, row in tqdm(json_lines(path), desc="reading", unit=" documents", disable=None, delay=5):
        try:
            docs.append(_doc(row))
            if "id" not in row:
                raise ValueError('a document without "id"')
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
    if not docs:
        raise InputError(f"{path}: no document in it")
    return docs


def _check(queries, k):
    if not isinstance(queries, (list, tuple)) or not all(isinstance(query, str) for query in queries):
        raise TypeError("queries must be a list of strings")
    if type(k) is not int or k < 1:
        raise ValueError("the number of documents must be an integer, 1 or more")


class BM25:
    """Okapi BM25 over title and text (Robertson & Zaragoza 2009, as rank_bm25 has it, k1 = 1.5 and b = 0.75):

        score(q, d) = sum over w of idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / avgdl))

    over the words w of the query, each as often as it occurs there. tf counts w in d, N is the number of
    documents, and n the number of documents with w.

    idf="plus1" (the default) is Lucene's: log(1 + (N - n + .5) / (n + .5)). It is positive for every word and
    falls with n. idf="okapi" is rank_bm25's: log((N - n + .5) / (n + .5)), and where that is negative, a
    quarter of the mean idf. In a small corpus that mean can itself be 0 or less, so nothing is found by its
    frequent words. In a large corpus the quarter of the mean gives "the" a higher idf than some rarer words.

    With idf="okapi" the scores are bit for bit those of BM25Okapi.get_scores. They are computed faster,
    because the contribution of each (word, document) is computed once, when the index is built, by the same
    operations in the same order. At search time these contributions are added word by word as rank_bm25 does,
    and only documents that can be among the best are sorted. rank_bm25 also adds 0 for every document without
    the word, and adding 0 changes no bit. With idf="plus1", the default, the formula differs from
    rank_bm25's, and so do the scores.

    Raises InputError for another idf, for no documents, and for documents without words."""

    def __init__(self, docs: list[Doc], idf: str = "plus1"):
        if idf not in ("okapi", "plus1"):
            raise InputError(f'idf must be "okapi" or "plus1", not {idf!r}')
        self.docs = list(docs)
        n = len(self.docs)
        number: dict[str, int] = {}  # word -> its number by first occurrence, which is the order of fit.idf
        bar = tqdm(self.docs, desc="indexing", disable=n < 10_000 or None)
        texts = (f"{doc.title}\n{doc.text}" for doc in bar)
        try:
            fit = BM25Okapi([number.setdefault(w, len(number)) for w in tokenize(text)] for text in texts)
        except ZeroDivisionError:
            raise InputError("nothing to index: no document with a word in it") from None

        # Pairs (word, document), sorted by word: so the documents of a word are a slice of each array.
        word = np.fromiter(chain.from_iterable(fit.doc_freqs), np.int64)  # [pairs]
        order = np.argsort(word, kind="stable")
        word = word[order]
        tf = np.fromiter(chain.from_iterable(freqs.values() for freqs in fit.doc_freqs), np.int64)[order]
        doc = np.repeat(np.arange(n), [len(freqs) for freqs in fit.doc_freqs])[order]
        df = np.bincount(word)
        weight = np.array(list(fit.idf.values()))  # [words]
        if idf == "plus1":
            weight = np.log(1 + (n - df + 0.5) / (df + 0.5))
        length = np.array(fit.doc_len)[doc]
        # in the order of operations of get_scores, since any other order differs in the last bit
        impact = weight[word] * (tf * (fit.k1 + 1) / (tf + fit.k1 * (1 - fit.b + fit.b * length / fit.avgdl)))

        self.postings = {}  # word -> (where, impact): a search does scores[where] += impact
        for text, end, count in zip(number, np.cumsum(df).tolist(), df.tolist(), strict=True):
            where, values = doc[end - count : end], impact[end - count : end]
            if count > n / 4:  # for a frequent word, adding a row over all documents is faster
                row = np.zeros(n)
                row[where] = values
                where, values = ALL, row
            self.postings[text] = where, values
        self._top = lru_cache(maxsize=2**14)(self._top)  # episodes of a group often write the same query

    def _find(self, query: str) -> list[tuple]:
        return [self.postings[word] for word in tokenize(query) if word in self.postings]

    def _sum(self, found: list[tuple]) -> np.ndarray:
        scores = np.zeros(len(self.docs))
        for where, impact in found:
            if where is ALL:
                scores += impact
            else:
                np.add.at(scores, where, impact)
        return scores

    def scores(self, query: str) -> np.ndarray:
        """The scores of all documents, [documents] float64."""
        return self._sum(self._find(query))

    def _top(self, query: str, k: int) -> list[Doc]:
        found = self._find(query)
        scores = self._sum(found)
        # Only documents above a lower bound of the k-th best score have to be sorted. The k-th best score
        # among the documents of one word is such a bound, and the rarest word gives a high one for little
        # work.
        rarest = min((f for f in found if len(f[1]) >= k), key=lambda f: len(f[1]), default=None)
        bound = max(TINY, np.partition(scores[rarest[0]], -k)[-k]) if rarest else TINY
        left = np.flatnonzero(scores >= bound)
        best = left[np.argsort(-scores[left], kind="stable")[:k]]
        return [replace(self.docs[i], score=float(scores[i])) for i in best]

    def search(self, queries: list[str], k: int) -> list[list[Doc]]:
        """For each query up to `k` documents with a score above 0, best first, ties in the order of the
        corpus.

        Can be called from several threads. Raises TypeError if `queries` is not a list of strings, and
        ValueError if `k` is below 1."""
        _check(queries, k)
        # long queries would fill the memory, and hardly come twice
        return [list((self._top if len(q) < 1000 else self._top.__wrapped__)(q, k)) for q in queries]


class RetrieverError(RuntimeError):
    """The search failed, as opposed to finding nothing. The message is one line that says where and why."""


class Remote:
    """Client of a /retrieve server (the protocol of github.com/PeterGriffinJin/Search-R1), with the `search`
    of BM25:

        POST {"queries": [..], "topk": k, "return_scores": true}
        ->   {"result": [[{"document": {"id", "contents"}, "score": 1.5}, ..], ..]}

    A reply may also hold the documents themselves, without scores. `url` is http or https, with or without
    /retrieve at its end; InputError if not. `timeout` is in seconds, for each attempt. After a failed
    connection, a timeout or a 5xx status the client tries again, up to `retries` times. After a 4xx status, a
    redirect or a wrong reply it raises RetrieverError at once."""

    remote = True  # a rollout calls it in a thread and goes on meanwhile

    def __init__(self, url: str, timeout: float = 10.0, retries: int = 3):
        self.url = check_url(url, "--retriever").removesuffix("/retrieve") + "/retrieve"
        self.timeout, self.retries = timeout, retries

    def search(self, queries: list[str], k: int) -> list[list[Doc]]:
        """For each query up to `k` documents in the server's order. Many or long queries are sent in several
        requests, within the bounds of our server. Raises RetrieverError if the server gives no valid reply to
        one of them."""
        _check(queries, k)
        parts: list[list[str]] = []
        size = MAX_REQUEST  # full, so that the first query opens the first part
        for query in (query[:MAX_QUERY] for query in queries):
            bytes_needed = len(json.dumps(query)) + 2
            if size + bytes_needed > MAX_REQUEST - 1000 or (len(parts[-1]) + 1) * k > MAX_DOCUMENTS:
                parts.append([])
                size = 0
            parts[-1].append(query)
            size += bytes_needed
        return [docs for part in parts for docs in self._ask(part, k)]

    def _ask(self, queries: list[str], k: int) -> list[list[Doc]]:
        request = {"queries": queries, "topk": k, "return_scores": True}
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
            try:
                return self._parse(post(self.url, request, self.timeout), len(queries), k)
            except RequestError as error:
                reason = str(error)
                if not error.again:
                    break
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                reason = f"not a reply of /retrieve: {error}"
                break
        raise RetrieverError(f"{self.url}: {reason} (attempt {attempt + 1} of {self.retries + 1})")

    @staticmethod
    def _parse(reply: bytes, n: int, k: int) -> list[list[Doc]]:
        result = json.loads(reply)
        result = result.get("result") if isinstance(result, dict) else None
        if not isinstance(result, list) or [type(row) for row in result] != [list] * n:
            raise ValueError(f'"result" is not a list of {n} lists, one for each query')
        return [[_scored(item) for item in row[:k]] for row in result]


def _scored(item) -> Doc:
    doc = _doc(item["document"] if isinstance(item, dict) and "document" in item else item)
    if not math.isfinite(score := float(item.get("score", 0.0))):
        raise ValueError(f"the score of a document is {score}")
    return replace(doc, score=score)


def open_retriever(config, splits: dict[str, str]):
    """The retriever that the flags select: a /retrieve server (--retriever), BM25 over a file (--corpus), or
    BM25 over the paragraphs that the data sets contain. `config` has the fields retriever and corpus.
    `splits` are comma-separated data sets for each split: {"train": "musique,mmlu", "test": "hotpotqa"}.
    Raises InputError if the server does not answer, or if there is nothing to search."""
    if config.retriever:
        remote = Remote(config.retriever)
        try:
            remote.search(["test"], 1)
        except RetrieverError as error:
            raise InputError(f"--retriever: {error}") from error
        return remote
    if config.corpus:
        return BM25(load_corpus(config.corpus))
    docs = {
        (doc.title, doc.text): doc
        for split, specs in splits.items()
        for spec in filter(None, map(str.strip, specs.split(",")))
        for doc in paragraphs(spec, split)
    }
    if not docs:
        names = ", ".join(filter(None, splits.values()))
        raise InputError(f"nothing to search: {names} contain no paragraphs; give --corpus or --retriever")
    return BM25([replace(doc, id=str(i)) for i, doc in enumerate(docs.values())])


# ------------------------------------------------------------------------------------------------------------
# the server


class Server(ThreadingHTTPServer):
    """Answers POST /retrieve with `retriever`, which is set before serve_forever(). There is no
    authentication, so it is for the loopback address."""

    request_queue_size = 128  # connections that may wait; a burst of requests would overflow the default of 5
    retriever: BM25

    def handle_error(self, request, client_address):  # mostly a client that closed the connection
        print(f"retriever.py: {client_address[0]}: {sys.exc_info()[1]!r}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds for which a silent client can occupy a thread

    def do_POST(self):
        if self.path.rstrip("/") != "/retrieve":
            return self.reply(404, {"error": "the only path is /retrieve"})
        try:
            queries, k, scored = self.request_body()
        except (ValueError, TypeError, RecursionError) as error:
            return self.reply(400, {"error": str(error)})
        result, size = [], 0
        for query in queries:
            [docs] = self.server.retriever.search([query], k)
            size += sum(len(doc.title) + len(doc.text) for doc in docs)
            if size > MAX_REPLY:
                return self.reply(400, {"error": f"the reply is larger than {MAX_REPLY} characters"})
            row = [{"id": doc.id, "contents": f'"{doc.title}"\n{doc.text}'} for doc in docs]
            if scored:
                row = [{"document": item, "score": doc.score} for item, doc in zip(row, docs, strict=True)]
            result.append(row)
        self.reply(200, {"result": result})

    def request_body(self) -> tuple[list[str], int, bool]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise ValueError("no Content-Length")
        # Reads beyond the limit, because closing a connection with unread bytes resets it, and the client
        # would never see the reason.
        body = self.rfile.read(min(int(length), 8 * MAX_REQUEST))
        if int(length) > MAX_REQUEST:
            raise ValueError(f"the request is larger than {MAX_REQUEST} bytes")
        request = json.loads(body)
        if not isinstance(request, dict):
            raise ValueError("the request is not a JSON object")
        queries, k = request.get("queries"), request.get("topk")
        k = 3 if k is None else k
        _check(queries, k)
        if k > MAX_TOPK:
            raise ValueError(f"topk is larger than {MAX_TOPK}")
        if len(queries) * k > MAX_DOCUMENTS:
            raise ValueError(f"the request asks for more than {MAX_DOCUMENTS} documents (queries times topk)")
        return queries, k, request.get("return_scores") is True

    def reply(self, status: int, content: dict):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass  # a training run makes thousands of requests


@dataclass
class Config:
    """Serves BM25 over a corpus at /retrieve."""

    corpus: str = ""  # JSONL with {"id", "contents"} or {"id", "title", "text"} in each line
    port: int = 8000  # 0: any free port
    host: str = "127.0.0.1"  # without authentication, any other address opens the corpus to its network
    idf: str = "plus1"  # or okapi, that of rank_bm25


def main():
    config, _ = parse(Config, "retriever.py")
    if not config.corpus:
        fail("retriever.py", "--corpus is missing")
    try:  # before the corpus is read, so that a port in use is reported at once
        server = Server((config.host, config.port), Handler)
    except (OSError, OverflowError, UnicodeError) as error:
        fail("retriever.py", f"{config.host}:{config.port}: {getattr(error, 'strerror', None) or error}")
    try:
        server.retriever = BM25(load_corpus(config.corpus), config.idf)
    except InputError as error:
        fail("retriever.py", error)
    host, port = server.server_address[:2]
    print(f"{len(server.retriever.docs)} documents at http://{host}:{port}/retrieve", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
