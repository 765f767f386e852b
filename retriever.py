"""Search over a corpus: BM25 in this process, and Search-R1's /retrieve protocol, as client and as server.

A retriever is anything with `.search(queries, k) -> list[list[Doc]]`: here `BM25` and `Remote`. Not here:
dense retrieval (put it behind /retrieve), and making a passage safe to show to a model (data.encode_foreign).
Not for many millions of passages: rank_bm25's fit holds one dict a document.

    python retriever.py --corpus corpus.jsonl --port 8000         # serves /retrieve on 127.0.0.1

    retriever = BM25(load_corpus("corpus.jsonl"))                 # or Remote("http://127.0.0.1:8000")
    [docs] = retriever.search(["who wrote Faust"], k=3)
"""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

import numpy as np
from rank_bm25 import BM25Okapi
from tqdm import tqdm

from config import fail, parse
from data import DataError, Doc

MAX_REQUEST, MAX_REPLY = 2**20, 2**26  # bytes: what the server reads and what the client reads
MAX_TOPK = 100  # of the server: a small request cannot ask for the whole corpus a thousand times
BACKOFF = 0.5  # seconds before the first retry, doubled for each one after it
ALL = slice(None)
TINY = np.nextafter(0.0, 1.0)  # score >= TINY is score > 0


def tokenize(text: str) -> list[str]:
    """Lower-cased runs of letters, digits and underscores; no stemming and no stop words (our choice).

    In a script without spaces (Chinese, Thai) a phrase is one word: such a corpus needs another function."""
    return re.findall(r"\w+", text.lower())


def _doc(row) -> Doc:
    """The document of a corpus line or of a reply; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("a document is not a JSON object")
    title, text = row.get("title"), row.get("text")
    if isinstance(contents := row.get("contents"), str):
        title, _, text = contents.partition("\n")
        title = re.sub(r'^\s*"(.*)"\s*$', r"\1", title)
    if not (isinstance(title, str) and isinstance(text, str)):
        raise ValueError('a document without "contents" (or "title" and "text")')
    (title + text).encode()  # half of a surrogate pair passes JSON, and would stop the tokenizer hours later
    return Doc(str(row.get("id", "")), title, text)


def load_corpus(path) -> list[Doc]:
    """Documents of a JSONL file, in its order. A line is Search-R1's {"id", "contents": "\\"Title\\"\\ntext"}
    or {"id", "title", "text"}.

    DataError names file and line: no such file, not UTF-8, not JSON, no id, no contents, no document."""
    docs, number = [], 0
    try:
        size = os.path.getsize(path)
        quiet = size < 10**7 or None  # None: a bar, but only on a terminal
        with open(path, "rb") as file, tqdm(total=size, unit="B", unit_scale=True, disable=quiet) as bar:
            for line in file:
                number += 1
                bar.update(len(line))
                if line.strip():
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    docs.append(_doc(row := json.loads(text)))
                    if "id" not in row:
                        raise ValueError('a document without "id"')
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = {UnicodeDecodeError: "not UTF-8", json.JSONDecodeError: "not JSON"}.get(type(error), error)
        raise DataError(f"{path}, line {number}: {reason}") from None
    if not docs:
        raise DataError(f"{path}: no document in it")
    return docs


def _check(queries, k):
    if not isinstance(queries, (list, tuple)) or not all(isinstance(query, str) for query in queries):
        raise TypeError("queries must be a list of strings")
    if type(k) is not int or k < 1:
        raise ValueError("the number of documents must be an integer, 1 or more")


class BM25:
    """Okapi BM25 over title and text (Robertson & Zaragoza 2009, as rank_bm25 has it, k1 = 1.5 and b = 0.75):

        score(q, d) = sum over w of idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / avgdl))

    over the words w of the query, each as often as it occurs there; tf counts w in d, n the documents with w.

    idf "okapi" is rank_bm25's: log((N - n + .5) / (n + .5)), and where that is negative a quarter of the mean
    idf. The scores are bit for bit those of BM25Okapi.get_scores.
    idf "plus1" is Lucene's: log(1 + (N - n + .5) / (n + .5)). It is the default because it is above 0 for
    every word and falls with n. rank_bm25's is 0 or less for the shared words of a small corpus, where then
    nothing is found; in a large one its floor lifts "the" above rarer words, and the rankings differ.

    DataError: another idf, no document, or no word in any."""

    def __init__(self, docs: list[Doc], idf: str = "plus1"):
        if idf not in ("okapi", "plus1"):
            raise DataError(f'idf must be "okapi" or "plus1", not {idf!r}')
        self.docs = list(docs)
        n = len(self.docs)
        number: dict[str, int] = {}  # of a word, by first occurrence: the order of fit.idf too
        bar = tqdm(self.docs, desc="indexing", disable=n < 10_000 or None)
        texts = (f"{doc.title}\n{doc.text}" for doc in bar)
        try:
            fit = BM25Okapi([number.setdefault(w, len(number)) for w in tokenize(text)] for text in texts)
        except ZeroDivisionError:
            raise DataError("nothing to index: no document with a word in it") from None

        # one entry for each pair (word, document): sorted by word, and within a word by document
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
        # the order of operations is that of get_scores: any other differs in the last bit
        impact = weight[word] * (tf * (fit.k1 + 1) / (tf + fit.k1 * (1 - fit.b + fit.b * length / fit.avgdl)))

        self.postings = {}  # word -> (where, impact) of scores[where] += impact
        for text, end, count in zip(number, np.cumsum(df).tolist(), df.tolist(), strict=True):
            where, values = doc[end - count : end], impact[end - count : end]
            if count > n / 4:  # a row over all documents: to add it is faster than to scatter
                row = np.zeros(n)
                row[where] = values
                where, values = ALL, row
            self.postings[text] = where, values
        self._top = lru_cache(maxsize=2**14)(self._top)  # the siblings of a group often write the same query

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
        """float64 [documents]: the score of every document."""
        return self._sum(self._find(query))

    def _top(self, query: str, k: int) -> list[Doc]:
        found = self._find(query)
        scores = self._sum(found)
        # the k-th best score among the documents of one word is a lower bound for the k-th best of all; the
        # rarest word gives a high one for little work, and few documents are left to sort
        rarest = min((f for f in found if len(f[1]) >= k), key=lambda f: len(f[1]), default=None)
        bound = max(TINY, np.partition(scores[rarest[0]], -k)[-k]) if rarest else TINY
        left = np.flatnonzero(scores >= bound)
        best = left[np.argsort(-scores[left], kind="stable")[:k]]
        return [replace(self.docs[i], score=float(scores[i])) for i in best]

    def search(self, queries: list[str], k: int) -> list[list[Doc]]:
        """For each query up to `k` documents with a score above 0, best first, ties in corpus order.

        Safe to call from several threads. TypeError: not a list of strings. ValueError: `k` below 1."""
        _check(queries, k)
        return [list(self._top(query, k)) for query in queries]


class RetrieverError(RuntimeError):
    """The search failed, which is not "nothing was found". One line: the address and the reason."""


class Remote:
    """Client of a /retrieve server (protocol of github.com/PeterGriffinJin/Search-R1) with BM25's `search`:

        POST {"queries": [..], "topk": k, "return_scores": true}
        ->   {"result": [[{"document": {"id", "contents"}, "score": 1.5}, ..], ..]}; bare documents do too

    `url` is http or https, with or without /retrieve at its end, else DataError. `timeout` is in seconds and
    for each attempt. A failed connection, a timeout and a 5xx are tried again, up to `retries` times. A 4xx,
    a redirect and a wrong reply are a RetrieverError at once."""

    remote = True  # a rollout asks it in a thread, and goes on meanwhile

    def __init__(self, url: str, timeout: float = 10.0, retries: int = 3):
        host = re.fullmatch(r"(?ai)https?://([\w.-]+|\[[\da-f:.]+\])(?::(\d+))?(/[!-~]*)?", url)
        if not host or int(host[2] or 0) > 65535:  # getaddrinfo takes 70000 for 4464
            raise DataError(f"a retriever has an http:// or https:// address, which {url!r} is not")
        self.url = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        self.timeout, self.retries = timeout, retries
        local = re.fullmatch(r"localhost|127(\.\d+){3}|\[::1\]", host[1].lower())
        # built by hand: the opener of build_opener follows redirects, also to other hosts
        self._opener = urllib.request.OpenerDirector()
        proxies = {} if local else None  # None: those of the environment
        self._opener.add_handler(urllib.request.ProxyHandler(proxies))
        for kind in ("HTTPHandler", "HTTPSHandler", "HTTPErrorProcessor", "HTTPDefaultErrorHandler"):
            self._opener.add_handler(getattr(urllib.request, kind)())

    def search(self, queries: list[str], k: int) -> list[list[Doc]]:
        """For each query up to `k` documents in the server's order; RetrieverError without a valid reply."""
        _check(queries, k)
        if not queries:
            return []
        request = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
            try:
                return self._parse(self._post(request), len(queries), k)
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"HTTP {error.code} {error.reason}"
                if error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                reason = f"not a reply of /retrieve: {error}"
                break
        raise RetrieverError(f"{self.url}: {reason} (attempt {attempt + 1} of {self.retries + 1})")

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        end, reply = time.monotonic() + self.timeout, bytearray()
        with self._opener.open(request, timeout=self.timeout) as response:
            while chunk := response.read1(2**20):
                reply += chunk
                if len(reply) > MAX_REPLY:
                    raise ValueError(f"larger than {MAX_REPLY} bytes")
                if time.monotonic() > end:  # the timeout of a socket is for one read, and a server may drip
                    raise TimeoutError("timed out")
            if response.length:  # bytes still to come
                raise ConnectionError("the reply was cut short")
        return bytes(reply)

    @staticmethod
    def _parse(reply: bytes, n: int, k: int) -> list[list[Doc]]:
        result = json.loads(reply)
        result = result.get("result") if isinstance(result, dict) else None
        if not isinstance(result, list) or [type(row) for row in result] != [list] * n:
            raise ValueError(f'"result" is not a list of {n} lists, one for each query')
        return [[_scored(item) for item in row[:k]] for row in result]


def _scored(item) -> Doc:
    doc = _doc(item["document"] if isinstance(item, dict) and "document" in item else item)
    return replace(doc, score=float(item.get("score", 0.0)))


# ------------------------------------------------------------------------------------------------------------
# the server


class Server(ThreadingHTTPServer):
    """POST /retrieve over `retriever`, to be set before serve_forever(). No authentication: loopback only."""

    request_queue_size = 128  # callers waiting to be accepted; a burst of requests overflows the usual 5
    retriever: BM25

    def handle_error(self, request, client_address):  # most often a client that went away
        print(f"retriever.py: {client_address[0]}: {sys.exc_info()[1]!r}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds that a silent client may hold a thread

    def do_POST(self):
        if self.path.rstrip("/") != "/retrieve":
            return self.reply(404, {"error": "the only path is /retrieve"})
        try:
            queries, k, scored = self.request_body()
        except (ValueError, TypeError, RecursionError) as error:
            return self.reply(400, {"error": str(error)})
        result = []
        for docs in self.server.retriever.search(queries, k):
            row = [{"id": doc.id, "contents": f'"{doc.title}"\n{doc.text}'} for doc in docs]
            if scored:
                row = [{"document": item, "score": doc.score} for item, doc in zip(row, docs, strict=True)]
            result.append(row)
        self.reply(200, {"result": result})

    def request_body(self) -> tuple[list[str], int, bool]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise ValueError("no Content-Length")
        # read past the limit: closing with bytes unread resets the connection, and the client never sees why
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
        return queries, k, request.get("return_scores") is True

    def reply(self, status: int, content: dict):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass  # a line for each request of a training run helps nobody


@dataclass
class Config:
    """Serve BM25 over a corpus at /retrieve."""

    corpus: str = ""  # JSONL, {"id", "contents"} or {"id", "title", "text"} a line
    port: int = 8000  # 0: any free one
    host: str = "127.0.0.1"  # there is no authentication: another address opens the corpus to that network
    idf: str = "plus1"  # or okapi: rank_bm25's own


def main():
    config, _ = parse(Config, "retriever.py")
    if not config.corpus:
        fail("retriever.py", "--corpus is missing")
    try:  # before the corpus is read, so that a port in use is said at once
        server = Server((config.host, config.port), Handler)
    except (OSError, OverflowError, UnicodeError) as error:
        fail("retriever.py", f"{config.host}:{config.port}: {getattr(error, 'strerror', None) or error}")
    try:
        server.retriever = BM25(load_corpus(config.corpus), config.idf)
    except DataError as error:
        fail("retriever.py", error)
    host, port = server.server_address[:2]
    print(f"{len(server.retriever.docs)} documents at http://{host}:{port}/retrieve", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
