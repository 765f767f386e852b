"""python -m pytest tests/test_retriever.py

BM25 is compared with rank_bm25 and a plain sort. The corpus loader names what is wrong in a file. Client and
server meet on the loopback address, and fake servers send replies that a real one must not send.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

import retriever
import web
from config import Config
from data import Doc, InputError
from retriever import BM25, Handler, Remote, RetrieverError, Server, load_corpus, open_retriever, tokenize

ROOT = Path(__file__).parent.parent

PASSAGES = """Marie Curie was born in Warsaw, then in the Kingdom of Poland, part of the Russian Empire.
Pierre Curie, her husband, shared the 1903 Nobel Prize in Physics with her and with Henri Becquerel.
The Nobel Prize in Chemistry of 1911 was hers alone: radium and polonium, the latter named after Poland.
Warsaw is the capital of Poland; the Vistula runs through the city, and the city through its history.
Die Straße nach Łódź führt über Łowicz. ΣΊΣΥΦΟΣ rolled the stone, the stone rolled back, the stone won.
東京は日本の首都である。 人口は約1400万人。 Tokyo is the capital of Japan.""".splitlines()
DOCS = [Doc(f"p{i}", text.split()[0], text) for i, text in enumerate(PASSAGES)]


def okapi(docs):
    return BM25Okapi([tokenize(f"{doc.title}\n{doc.text}") for doc in docs])


def brute_force(docs, scores, k):
    order = sorted(range(len(docs)), key=lambda i: (-scores[i], i))[:k]
    return [(docs[i].id, scores[i]) for i in order if scores[i] > 0]


def pairs(docs):
    return [(doc.id, doc.score) for doc in docs]


# ------------------------------------------------------------------------------------------------------------
# BM25


def test_tokenize():
    assert tokenize("Łódź's 2nd-best_café, ΣΊΣΥΦΟΣ!") == ["łódź", "s", "2nd", "best_café", "σίσυφοσ"]
    assert tokenize("東京は、日本の首都") == ["東京は", "日本の首都"]
    assert tokenize(" .,;\n") == []


# There are few words and the documents are short, so that repeated words, ties, words that are in every
# document and a negative idf all occur.
words = st.sampled_from(["a", "b", "c", "d", "É", "ß", "日本", "x1", "_"])
texts = st.lists(words, max_size=12).map(" ".join)
corpora = st.lists(st.tuples(texts, texts), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(corpora, texts, st.integers(1, 14), st.sampled_from(["okapi", "plus1"]))
def test_scores_are_rank_bm25s_and_the_top_is_a_sort(corpus, query, k, idf):
    docs = [Doc(str(i), title, text) for i, (title, text) in enumerate(corpus)]
    if not any(tokenize(title + " " + text) for title, text in corpus):
        with pytest.raises(InputError):
            BM25(docs, idf)
        return
    bm25 = BM25(docs, idf)
    scores = bm25.scores(query)
    assert scores.dtype == np.float64 and scores.shape == (len(docs),)
    if idf == "okapi":
        assert np.array_equal(scores, okapi(docs).get_scores(tokenize(query)))
    assert pairs(bm25.search([query], k)[0]) == brute_force(docs, scores, k)


def test_scores_on_a_larger_corpus():
    """In this corpus there are long posting lists, ties, and frequent words that are stored as rows over all
    documents. The bound that the rarest word gives for the k-th best score takes effect."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 301)
    words = rng.choice(300, (2000, 12), p=share / share.sum())
    docs = [Doc(str(i), "", " ".join(f"w{w}" for w in row)) for i, row in enumerate(words)]
    reference, index = okapi(docs), {idf: BM25(docs, idf) for idf in ("okapi", "plus1")}
    assert any(where is retriever.ALL for where, _ in index["okapi"].postings.values())
    for size in range(1, 41):
        query = " ".join(f"w{w}" for w in rng.choice(300, size % 9 + 1, p=share / share.sum()))
        scores = index["okapi"].scores(query)
        assert np.array_equal(scores, reference.get_scores(tokenize(query)))
        for idf, k in (("okapi", 3), ("plus1", 3), ("okapi", size), ("plus1", 5000)):
            assert pairs(index[idf].search([query], k)[0]) == brute_force(docs, index[idf].scores(query), k)


@pytest.mark.parametrize(
    "query",
    ["the the the Nobel Prize", "Straße ŁÓDŹ", "stone rolled stone", "poland, Poland; POLAND?", "人口は"],
)
def test_scores_on_text(query):
    assert np.array_equal(BM25(DOCS, "okapi").scores(query), okapi(DOCS).get_scores(tokenize(query)))


def test_title_is_searched():
    docs = [Doc("1", "Faust", "a play"), Doc("2", "Emma", "a novel"), Doc("3", "Ulysses", "a novel")]
    assert [doc.id for doc in BM25(docs).search(["Faust"], 3)[0]] == ["1"]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_small_corpora_find_the_right_document(n):
    for target in range(n):
        weather = ["windy" if i == target else "calm" for i in range(n)]
        docs = [Doc(str(i), f"city {i}", f"the weather is {word}") for i, word in enumerate(weather)]
        found = BM25(docs).search(["windy weather"], n)[0]
        assert found[0].id == str(target) and len(found) == n and all(doc.score > 0 for doc in found)


def test_a_word_that_is_in_every_document_counts_a_little():
    found = BM25([Doc("1", "", "windy"), Doc("2", "", "windy and warm")]).search(["windy"], 2)[0]
    assert [doc.id for doc in found] == ["1", "2"] and 0 < found[1].score < found[0].score


def test_nothing_found():
    assert BM25(DOCS).search(["", "  .,", "zzz", "zzz Łódź"], 3)[:3] == [[], [], []]
    assert BM25(DOCS).search([], 3) == []
    assert [doc.id for doc in BM25(DOCS).search(["zzz Łódź"], 3)[0]] == ["p4"]
    docs = [Doc("1", "", "a b"), Doc("2", "", "a c")]
    assert not BM25(docs, "okapi").search(["a"], 2)[0]  # a word that is in every document has an idf below 0


def test_ties_are_in_corpus_order():
    docs = [Doc(str(i), "", "red fish" if i % 2 else "blue fish") for i in range(40)]
    assert [doc.id for doc in BM25(docs).search(["red"], 5)[0]] == ["1", "3", "5", "7", "9"]
    assert [doc.id for doc in BM25(docs).search(["fish"], 3)[0]] == ["0", "1", "2"]


def test_result_documents():
    [[found]] = BM25(DOCS).search(["vistula"], 1)
    assert (found.id, found.title, found.text) == ("p3", "Warsaw", PASSAGES[3]) and found.score > 0
    assert DOCS[3].score == 0.0


def test_a_cached_result_cannot_be_changed():
    bm25 = BM25(DOCS)
    first = bm25.search(["poland"], 3)[0]
    expected = list(first)
    first.clear()
    assert bm25.search(["poland"], 3)[0] == expected


def test_searches_in_several_threads():
    bm25 = BM25(DOCS)
    queries = ["poland warsaw", "nobel prize", "the stone", "capital of japan", "curie"] * 40
    expected = bm25.search(queries, 3)

    def search(query):
        bm25._top.cache_clear()
        return bm25.search([query], 3)[0]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(search, queries)) == expected


def test_wrong_arguments():
    bm25 = BM25(DOCS)
    for queries in ("poland", ["poland", 1], None, {"poland": 1}, [["poland"]]):
        with pytest.raises(TypeError, match="queries must be a list of strings"):
            bm25.search(queries, 3)
    for k in (0, -1, True, 2.0, None):
        with pytest.raises(ValueError, match="1 or more"):
            bm25.search(["poland"], k)
    for docs, idf in (([], "plus1"), ([Doc("1", "", "...")], "plus1"), (DOCS, "tfidf")):
        with pytest.raises(InputError):
            BM25(docs, idf)


# ------------------------------------------------------------------------------------------------------------
# the corpus file


def test_a_corpus_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"id": 1, "title": "t", "text": "a"}\n', encoding="utf-8-sig")
    assert [doc.text for doc in load_corpus(tmp_path / "c.jsonl")] == ["a"]


def test_load_corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [
        {"id": "a", "contents": '"Faust"\nA play.\nIn two parts.'},
        {"id": 7, "contents": '"John "Hannibal" Smith"\nA colonel.'},
        {"id": "b", "title": '"Heroes"', "text": "Bowie, 東京"},
        {"id": "c", "contents": "No quotes\nText.", "title": "Its own"},
        {"id": "d", "contents": '"Only a title"'},
    ]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    path.write_bytes(("\r\n".join(lines) + "\n\n").encode())
    assert load_corpus(path) == [
        Doc("a", "Faust", "A play.\nIn two parts."),
        Doc("7", 'John "Hannibal" Smith', "A colonel."),
        Doc("b", '"Heroes"', "Bowie, 東京"),
        Doc("c", "Its own", "No quotes\nText."),
        Doc("d", "Only a title", ""),
    ]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{not json", "not JSON"),
        (b'{"id": "1", "contents": "caf\xe9"}', "not UTF-8"),
        (b"[1, 2]", "this row is not a JSON object"),
        (b'{"id": "1"}', "contents"),
        (b'{"id": "1", "contents": null}', "contents"),
        (b'{"id": "1", "title": "t", "text": 5}', "contents"),
        (b'{"contents": "t"}', "id"),
        (rb'{"id": "1", "contents": "\ud800"}', "surrogates"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"id": "0", "contents": "fine"}\n\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        load_corpus(path)
    message = str(error.value)
    assert f"{path}:3: " in message and reason in message and "\n" not in message


def test_no_corpus(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for path, reason in {"missing.jsonl": "No such", "empty.jsonl": "no document", ".": "directory"}.items():
        with pytest.raises(InputError, match=reason) as error:
            load_corpus(tmp_path / path)
        assert str(tmp_path / path) in str(error.value)


@pytest.mark.skipif("SEM_DATA" not in os.environ, reason="SEM_DATA is not set")
def test_a_real_corpus():
    path = Path(os.environ["SEM_DATA"]) / "corpus" / "wiki_multihop_corpus.jsonl"
    docs = load_corpus(path)
    assert len(docs) == 44_941
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    for doc, line in ((docs[0], lines[0]), (docs[-1], lines[-2])):
        row = json.loads(line)
        assert doc.id == row["id"] and f'"{doc.title}"\n{doc.text}' == row["contents"]


# ------------------------------------------------------------------------------------------------------------
# the client, and a server that does what a test wants


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def fake(*steps):
    """A server that answers each request with the next step, and repeats the last step for all later
    requests. A step is (status, body), (status, body, headers) or a function of the handler.

    Yields the address and the list of the requests seen, (path, parsed body)."""
    seen = []

    class Fake(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, json.loads(body)))
            step = steps[min(len(seen), len(steps)) - 1]
            if callable(step):
                return step(self)
            status, body, *headers = step
            self.send_response(status)
            for name, value in headers[0].items() if headers else ():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def do_GET(self):
            seen.append((self.path, None))
            self.send_error(404)

        def log_message(self, *args):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *args):
            pass

    with running(Quiet(("127.0.0.1", 0), Fake)) as url:
        yield url, seen


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(retriever, "BACKOFF", 0.01)


def failure(client, queries=("q",)):
    """The message of the RetrieverError that a search must raise within three seconds."""
    start = time.monotonic()
    with pytest.raises(RetrieverError) as error:
        client.search(list(queries), 2)
    message = str(error.value)
    assert client.url in message and "\n" not in message and time.monotonic() - start < 3
    return message


def item(id, score):
    return {"document": {"id": id, "contents": f'"T{id}"\ntext {id}'}, "score": score}


GOOD = {"result": [[item("1", 2.5), item("2", 1)], []]}


def test_client_right_answer():
    with fake((200, GOOD)) as (url, seen):
        for address in (url, url + "/", url + "/retrieve", url + "/retrieve/"):
            found = Remote(address).search(["who?", "東京"], 2)
            assert found == [[Doc("1", "T1", "text 1", 2.5), Doc("2", "T2", "text 2", 1.0)], []]
        assert seen == [("/retrieve", {"queries": ["who?", "東京"], "topk": 2, "return_scores": True})] * 4


def test_client_reads_documents_without_scores():
    bare = {"result": [[{"id": 1, "contents": '"T"\nx'}, {"contents": '"U"\ny'}, {"contents": '"V"\nz'}]]}
    with fake((200, bare)) as (url, seen):
        found = Remote(url).search(["q"], 2)
        assert found == [[Doc("1", "T", "x"), Doc("", "U", "y")]]  # the third one is beyond k = 2
        assert Remote(url).search([], 2) == [] and len(seen) == 1
        with pytest.raises(TypeError):
            Remote(url).search("q", 2)


def test_client_tries_again_after_a_500():
    with fake((500, b""), (503, b""), (200, GOOD)) as (url, seen):
        assert len(Remote(url).search(["a", "b"], 2)[0]) == 2 and len(seen) == 3


def test_client_gives_up():
    with fake((500, b"")) as (url, seen):
        assert "HTTP 500" in failure(Remote(url, retries=2)) and len(seen) == 3


def test_client_does_not_repeat_a_400():
    with fake((400, b""), (200, GOOD)) as (url, seen):
        assert "HTTP 400" in failure(Remote(url)) and len(seen) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"",
        b"\xff\xfe\xff",
        b"[" * 100_000,
        [],
        {"error": "x"},
        {"result": []},
        {"result": [[], []]},
        {"result": [None]},
        {"result": "x"},
        {"result": [[None]]},
        {"result": [["text"]]},
        {"result": [[{"document": None}]]},
        {"result": [[{"document": {"id": "1"}}]]},
        {"result": [[{"contents": "x", "score": None}]]},
        {"result": [[{"contents": "x", "score": "high"}]]},
        {"result": [[{"contents": "x", "score": 10**400}]]},
        {"result": [[{"contents": "\ud800"}]]},
    ],
    ids=lambda body: str(body)[:30],
)
def test_client_refuses_a_wrong_reply(body):
    with fake((200, body)) as (url, seen):
        assert "not a reply of /retrieve" in failure(Remote(url)) and len(seen) == 1


def test_client_connection_refused():
    with fake((200, GOOD)) as (url, _):
        pass  # the port is free again
    assert "refused" in failure(Remote(url, retries=2))


def test_client_connection_lost():
    def hang_up(handler):
        handler.close_connection = True
        handler.connection.close()

    cut = (200, b'{"result": [[], []]', {"Content-Length": "1000"})
    with fake(hang_up, cut, (200, GOOD)) as (url, seen):
        assert len(Remote(url).search(["a", "b"], 2)) == 2 and len(seen) == 3


@pytest.mark.parametrize("drip", [False, True])
def test_client_timeout(drip):
    stop = threading.Event()

    def slow(handler):
        if drip:  # a byte now and then, so that no single read times out
            handler.send_response(200)
            handler.end_headers()
        while not stop.wait(0.05):
            if drip:
                handler.wfile.write(b" ")

    with fake(slow) as (url, seen):
        try:
            assert "timed out" in failure(Remote(url, timeout=0.2, retries=1)) and len(seen) == 2
        finally:
            stop.set()


def test_client_huge_reply(monkeypatch):
    monkeypatch.setattr(web, "MAX_REPLY", 100_000)

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:  # this ends when the client closes the connection
            handler.wfile.write(b" " * 10_000)

    with fake(endless) as (url, seen):
        assert "larger than 100000 bytes" in failure(Remote(url)) and len(seen) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_client_refuses_a_redirect(status):
    with fake((200, GOOD)) as (elsewhere, seen):
        with fake((status, b"", {"Location": elsewhere + "/retrieve"})) as (url, _):
            assert f"HTTP {status}" in failure(Remote(url), ["a", "b"])
        assert not seen


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host/retrieve",
        "data:,{}",
        "localhost:8000",
        "",
        "http://",
        "http:///retrieve",
        "http://host:port",
        "http://host:70000",
        "http://user:word@host",
        "http://[::1",
        "http://a b/",
        "http://host/\r\nX: y",
        "http://hôst/",
    ],
)
def test_client_refuses_an_address(url):
    with pytest.raises(InputError, match="http"):
        Remote(url)


def test_client_uses_no_proxy_on_loopback(monkeypatch):
    with fake((500, b"")) as (proxy, proxied), fake((200, GOOD)) as (url, _):
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        for address in (url, url.replace("127.0.0.1", "localhost")):
            assert len(Remote(address).search(["a", "b"], 2)) == 2
        assert not proxied
        failure(Remote("http://retriever.invalid", retries=0))
        assert len(proxied) == 1


# ------------------------------------------------------------------------------------------------------------
# the server


@pytest.fixture(scope="module")
def served():
    server = Server(("127.0.0.1", 0), Handler)
    server.retriever = BM25(DOCS)
    with running(server) as url:
        yield url, server.retriever


def post(url, body, path="/retrieve"):
    """Returns (status, parsed body) of a request by another client than Remote."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
    response = connection.getresponse()
    content = response.read()
    connection.close()
    assert response.headers["Content-Type"] == "application/json" and b"\n" not in content
    return response.status, json.loads(content)


def test_round_trip(served):
    url, bm25 = served
    queries = ["東京は日本の首都である", "Łódź", "nobel prize poland", "", "zzz"]
    assert Remote(url).search(queries, 4) == bm25.search(queries, 4)
    assert Remote(url).search(queries, 1)[0][0].text == PASSAGES[5]


def test_round_trip_from_many_threads(served):
    url, bm25 = served
    queries = ["poland", "nobel prize", "the stone", "tokyo"] * 16
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda query: Remote(url).search([query], 2)[0], queries))
    assert found == bm25.search(queries, 2)


def test_server_defaults(served):
    url, bm25 = served
    status, reply = post(url, {"queries": ["the"]})
    assert status == 200 and len(reply["result"][0]) == 3
    best = bm25.search(["the"], 1)[0][0]
    assert reply["result"][0][0] == {"id": best.id, "contents": f'"{best.title}"\n{best.text}'}
    status, reply = post(url, {"queries": ["the"], "topk": None, "return_scores": True})
    assert len(reply["result"][0]) == 3 and reply["result"][0][0]["score"] == best.score


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe\xff",
        b"[" * 100_000,
        [],
        {},
        {"queries": "the"},
        {"queries": [1]},
        {"queries": {"the": 1}},
        {"queries": ["the"], "topk": 0},
        {"queries": ["the"], "topk": "3"},
        {"queries": ["the"], "topk": True},
        {"queries": ["the"], "topk": 1000},
        {"queries": ["x" * 2_000_000]},
    ],
    ids=lambda body: str(body)[:30],
)
def test_server_answers_400(served, capfd, body):
    status, reply = post(served[0], body)
    assert status == 400 and isinstance(reply["error"], str) and "\n" not in reply["error"]
    assert "Traceback" not in capfd.readouterr().err
    assert post(served[0], {"queries": ["the"]})[0] == 200


def test_server_other_paths_and_lengths(served):
    assert post(served[0], {"queries": ["the"]}, path="/")[0] == 404
    assert post(served[0], {"queries": ["the"]}, path="/retrieve/")[0] == 200
    for length in (b"", b"Content-Length: -5\r\n", b"Content-Length: many\r\n"):
        host, port = served[0].removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"POST /retrieve HTTP/1.0\r\n" + length + b"\r\n")
            assert b" 400 " in connection.recv(100)


# ------------------------------------------------------------------------------------------------------------
# the choice of a retriever


def flags(retriever="", corpus=""):
    return Config(retriever=retriever, corpus=str(corpus))


def test_open_retriever_prefers_a_server_to_a_corpus(served, tmp_path):
    url, bm25 = served
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "1", "contents": "Oslo\\nA city."}\n')
    remote = open_retriever(flags(url, path), {"train": "nowhere"})
    assert isinstance(remote, Remote) and remote.search(["poland"], 3) == bm25.search(["poland"], 3)
    found = open_retriever(flags(corpus=path), {"train": "nowhere"})
    assert isinstance(found, BM25) and found.docs == load_corpus(path)


def test_open_retriever_reads_the_paragraphs_of_all_splits(tmp_path):
    """A paragraph that occurs in two data sets is indexed once, and the documents get new ids."""
    for name, titles in (("hotpot_train_v1.1", ("Pisa", "Oslo")), ("dev", ("Oslo", "Rome"))):
        context = [[title, [f"{title} is a city."]] for title in titles]
        row = {"_id": "1", "question": "Where?", "answer": "here", "context": context}
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    splits = {"train": f"hotpotqa:{tmp_path},", "test": f" 2wikimultihopqa:{tmp_path} , gsm8k:{tmp_path}"}
    docs = open_retriever(flags(), splits).docs
    assert [(doc.id, doc.title) for doc in docs] == [("0", "Pisa"), ("1", "Oslo"), ("2", "Rome")]


def test_open_retriever_without_anything_to_search():
    with pytest.raises(InputError, match="nothing to search: mmlu, gsm8k contain no paragraphs"):
        open_retriever(flags(), {"train": "mmlu", "test": "gsm8k"})
    with pytest.raises(InputError, match=r"--retriever: http://127\.0\.0\.1:9/retrieve: "):
        open_retriever(flags(retriever="http://127.0.0.1:9"), {"train": "mmlu"})


# ------------------------------------------------------------------------------------------------------------
# the program


def program(*args):
    return [sys.executable, str(ROOT / "retriever.py"), *map(str, args)]


def test_program(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": doc.id, "title": doc.title, "text": doc.text} for doc in DOCS]
    path.write_text("\n".join(map(json.dumps, rows)))
    process = subprocess.Popen(program("--corpus", path, "--port", 0), stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"{len(DOCS)} documents at http://127.0.0.1:")
        url = line.split()[-1]
        assert Remote(url).search(["poland"], 3) == BM25(DOCS).search(["poland"], 3)
        port = url.removesuffix("/retrieve").split(":")[-1]
        in_use = subprocess.run(program("--corpus", path, "--port", port), capture_output=True, text=True)
    finally:
        process.terminate()
        process.wait(5)
    assert in_use.returncode == 2 and "in use" in in_use.stderr and in_use.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args, reason",
    [
        ([], "--corpus"),
        (["--corpus", "missing.jsonl", "--port", "0"], "missing.jsonl"),
        (["--corpus", __file__, "--port", "0"], ":1: not JSON"),
        (["--corpus", "x", "--port", "70000"], "port"),
        (["--corpus", "x", "--port", "0", "--host", "256.0.0.1"], "256.0.0.1"),
        (["--corpus", "x", "--prot", "0"], "--prot"),
    ],
)
def test_program_errors(args, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["retriever.py", *args])
    with pytest.raises(SystemExit) as error:
        retriever.main()
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.startswith("retriever.py: error: ")
    assert reason in message and message.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# letters and titles as people write them


@pytest.mark.parametrize(
    "document, query",
    [
        ("İstanbul", "Istanbul"),
        ("İSTANBUL", "istanbul"),
        ("I\u0307stanbul", "istanbul"),
        ("Straße", "STRASSE"),
        ("ﬁnal", "final"),
        ("cafe\u0301", "caf\u00e9"),
        ("ＮＨＫ １９２５", "nhk 1925"),
        ("co\u00adopera\u200btion", "cooperation"),
        ("\u200eשלום\u200f", "שלום"),
        ("ΣΊΣΥΦΟΣ", "σίσυφος"),
        ("हिन्दी", "हिन्दी"),
        ("한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8"),
        ("❤\ufe0flove", "love"),
        ("naïve\u034f", "NAI\u0308VE"),
    ],
)
def test_spellings_of_one_word_are_one_word(document, query):
    assert tokenize(document) == tokenize(query)
    docs = [Doc("1", "", document), Doc("2", "", "other words"), Doc("3", "", "and others")]
    for idf in ("plus1", "okapi"):
        assert [doc.id for doc in BM25(docs, idf).search([query], 3)[0]] == ["1"]
        reference = okapi(docs).get_scores(tokenize(query))
        assert idf == "plus1" or np.array_equal(BM25(docs, idf).scores(query), reference)


@pytest.mark.parametrize(
    "one, other",
    [
        ("हिन्दी", "हद"),
        ("หมา", "หม"),
        ("año", "ano"),
        ("ı", "i"),
        ("naïve", "naive"),
        ("का", "की"),
        ("й", "и"),
    ],
)
def test_marks_that_make_another_word_stay(one, other):
    assert len(tokenize(one)) == 1 and tokenize(one) != tokenize(other)


OWN = {"title": "Paris", "contents": "The capital of France has two million inhabitants."}
TITLES = {  # row: title and text of the document
    "a title of its own": (OWN, ("Paris", OWN["contents"])),
    "both, in two lines": (OWN | {"contents": "Line one.\nLine two."}, ("Paris", "Line one.\nLine two.")),
    "both, and the same title": ({"title": "Paris", "contents": '"Paris"\nA city.'}, ("Paris", "A city.")),
    "both, without quotes": ({"title": " Paris ", "contents": "Paris\nA city."}, (" Paris ", "A city.")),
    "title, text and contents": (
        {"title": "P", "text": "A city.", "contents": "P\nA city."},
        ("P", "A city."),
    ),
    "a text of its own too": ({"title": "P", "text": "A city.", "contents": "P A city."}, ("P", "A city.")),
    "a number": ({"title": 1984, "contents": "A novel."}, ("1984", "A novel.")),
    "an empty title": ({"title": " ", "contents": '"Paris"\nA city.'}, ("Paris", "A city.")),
    "no title": ({"title": None, "contents": '"Paris"\nA city.'}, ("Paris", "A city.")),
    "one line": ({"contents": "A city on the Seine."}, ("", "A city on the Seine.")),
    "one line in quotes": ({"contents": '"Paris"'}, ("Paris", "")),
    "only title and text": ({"title": "", "text": "A city."}, ("", "A city.")),
}


@pytest.mark.parametrize("case", TITLES)
def test_a_title_of_its_own_wins(tmp_path, case):
    row, expected = TITLES[case]
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "1"} | row))
    with fake((200, {"result": [[{"document": row, "score": 1}]]})) as (url, _):
        docs = [*load_corpus(tmp_path / "corpus.jsonl"), *Remote(url).search(["q"], 1)[0]]
    assert [(doc.title, doc.text) for doc in docs] == [expected] * 2
    with running(Server(("127.0.0.1", 0), Handler)) as url:  # and the same again after our own server
        pass
    server = Server(("127.0.0.1", 0), Handler)
    server.retriever = BM25(docs[:1])
    with running(server) as url:
        [[again]] = Remote(url).search([f"{expected[0]} {expected[1]}"], 1)
    assert (again.title, again.text) == expected


def test_the_servers_own_message_is_shown():
    with fake((400, {"error": "topk is larger than 100"})) as (url, _):
        assert "HTTP 400 Bad Request: topk is larger than 100 (attempt 1" in failure(Remote(url))
    with fake((503, b"<html><h1>Busy</h1>\n<p>try later</p>")) as (url, _):
        assert "HTTP 503 Service Unavailable: Busy try later (attempt 2" in failure(Remote(url, retries=1))


# ------------------------------------------------------------------------------------------------------------
# bounds of the client and of the server


def test_many_and_long_queries_are_split(served, monkeypatch):
    """Each request has to stay within the bounds of the server, and the order of the queries is kept."""
    url, bm25 = served
    sizes, real = [], retriever.post

    def spy(url, content, timeout):
        sizes.append((len(json.dumps(content)), len(content["queries"]) * content["topk"]))
        return real(url, content, timeout)

    monkeypatch.setattr(retriever, "post", spy)
    rambling = [f"poland {i} " + "\U0001f600 word " * 3000 for i in range(35)]
    assert Remote(url).search(rambling, 2) == bm25.search(rambling, 2) and len(sizes) > 1
    short = [("poland", "tokyo", "x")[i % 3] for i in range(12_000)]
    assert Remote(url).search(short, 2) == bm25.search(short, 2)
    longer = ["\U0001f600" * 300_000 + " poland"]
    assert Remote(url).search(longer, 2) == [[]]  # it is cut before the word
    assert max(size for size, _ in sizes) <= retriever.MAX_REQUEST
    assert max(documents for _, documents in sizes) <= retriever.MAX_DOCUMENTS


def test_the_server_bounds_what_a_small_request_may_ask_for(served, monkeypatch):
    url, _ = served
    status, reply = post(url, {"queries": ["a"] * 200_000, "topk": 100})
    assert status == 400 and "more than 10000 documents" in reply["error"]
    monkeypatch.setattr(retriever, "MAX_REPLY", 200)
    status, reply = post(url, {"queries": ["the"] * 50, "topk": 100})
    assert status == 400 and "larger than 200 characters" in reply["error"]


def test_long_queries_do_not_stay_in_memory():
    bm25 = BM25(DOCS)
    bm25.search(["poland " * 1000, "poland"], 2)
    assert bm25._top.cache_info().currsize == 1


@pytest.mark.parametrize("score", ["NaN", "Infinity", "-Infinity", '"nan"'])
def test_a_score_that_is_no_number_is_named(score):
    body = f'{{"result": [[{{"document": {{"id": "1", "contents": "x"}}, "score": {score}}}]]}}'.encode()
    with fake((200, body)) as (url, _):
        assert "the score of a document is" in failure(Remote(url))


def test_half_a_surrogate_in_an_id_is_named(tmp_path):
    body = b'{"result": [[{"document": {"id": "\\ud800", "contents": "x"}}]]}'
    with fake((200, body)) as (url, _):
        assert "surrogates not allowed" in failure(Remote(url))
    (tmp_path / "c.jsonl").write_bytes(b'{"id": "\\ud800", "contents": "x"}')
    with pytest.raises(InputError, match=r"c\.jsonl:1: .*surrogates"):
        load_corpus(tmp_path / "c.jsonl")
