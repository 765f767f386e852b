"""python -m pytest tests/test_files.py

Files as people bring them: packed, under a wrong name, in another encoding, cut short. A file that can be
read gives the right rows; one that cannot is named for what it is.
"""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest

from data import load, load_sets
from files import InputError, format_of, rows, stem
from retriever import load_corpus

ROW = {"id": "1", "question": "who?", "golden_answers": ["Ana"]}
DOC = {"id": "1", "contents": '"Oslo"\nA city.'}
LINES = (json.dumps(ROW | DOC) + "\n").encode()
DOCS = (json.dumps(DOC) + "\n").encode()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lambda raw: gzip.compress(bz2.compress(raw))])
@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.bz2", ".jsonl"])
def test_packed_files_are_read_by_their_first_bytes(tmp_path, pack, ending):
    path = tmp_path / f"rows{ending}"
    path.write_bytes(pack(LINES))
    assert [(q.text, q.source) for q in load(str(path))] == [("who?", "rows")]
    path.write_bytes(pack(DOCS))
    assert [(doc.title, doc.text) for doc in load_corpus(path)] == [("Oslo", "A city.")]


def test_two_packed_parts_in_one_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(DOCS) + gzip.compress(DOCS))
    assert len(load_corpus(path)) == 2


def test_packed_files_of_every_format_and_in_a_folder(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "anatomy_test.csv.gz").write_bytes(gzip.compress(b"q,1,2,3,4,A\n"))
    [question] = load(f"mmlu:{tmp_path}", "test")
    assert question.id == "anatomy_test-0"
    (tmp_path / "dev.json.bz2").write_bytes(bz2.compress(json.dumps([ROW]).encode()))
    assert load(f"2wikimultihopqa:{tmp_path}", "dev")[0].answers == ["Ana"]


@pytest.mark.parametrize(
    "name, format, source",
    [
        ("a/b.JSONL.GZ", ".jsonl", "b"),
        ("v1.0_dev.jsonl", ".jsonl", "v1.0_dev"),
        ("x", "", "x"),
        ("x.gz", "", "x"),
    ],
)
def test_names_without_their_endings(name, format, source):
    assert (format_of(name), stem(name)) == (format, source)


def packed_in_tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(LINES)
        file.addfile(info, io.BytesIO(LINES))
    return buffer.getvalue()


def packed_in_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.jsonl", LINES)
    return buffer.getvalue()


FOREIGN = {  # name of the file, content, what the message says
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16"), "it is UTF-16"),
    "UTF-16, big end first": ("a.jsonl", b"\xfe\xff" + LINES.decode().encode("utf-16-be"), "it is UTF-16"),
    "UTF-16 without a mark": ("a.jsonl", LINES.decode().encode("utf-16-le"), "UTF-16 or binary"),
    "UTF-32": ("a.csv", "q,1,2,3,4,A".encode("utf-32"), "it is UTF-32"),
    "UTF-16 inside of gzip": ("a.jsonl.gz", gzip.compress(LINES.decode().encode("utf-16")), "it is UTF-16"),
    "zip": ("a.jsonl", packed_in_zip(), "it is a zip archive"),
    "tar": ("a.jsonl.gz", packed_in_tar(), "it is a tar archive"),
    "xz": ("a.jsonl.xz", lzma.compress(LINES), "it is packed with xz"),
    "zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", "it is packed with zstd"),
    "parquet": ("a.jsonl", b"PAR1\x15\x04", "it is parquet; its name has to end with .parquet"),
    "an Arrow file": ("a.json", b"ARROW1\0\0", "it is an Arrow file"),
    "a pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of git LFS"),
    "a web page": ("a.jsonl", b"<!DOCTYPE html>\n<html>", "it is an HTML page"),
    "SQLite": ("a.jsonl", b"SQLite format 3\0", "it is an SQLite database"),
    "pickle": ("a.jsonl", b"\x80\x04\x95\x00\x00\x00", "UTF-16 or binary"),
    "JSONL named .json": ("a.json", LINES + LINES, "it is JSONL"),
    "one row of JSONL named .json": ("a.json", LINES, "or JSONL with one row"),
    "a table in one line": ("a.json", b'{"data": []}', "it is one JSON object"),
    "JSONL named .parquet": ("a.parquet", LINES, "its name says parquet"),
    "a pointer to parquet": ("a.parquet", b"version https://git-lfs.github.com\n", "pointer of git LFS"),
    "a web page after a blank line": ("a.jsonl", b"\n <html>", "it is an HTML page"),
    "a list after a blank line": ("a.jsonl", b"\n[{}]", "it is a JSON list"),
    "an object": ("a.json", b'{\n "data": []\n}', "it is a JSON object, not a JSON list"),
    "a list named .jsonl": ("a.jsonl", json.dumps([ROW]).encode(), "it is a JSON list, not JSONL"),
    "a long list named .jsonl": ("a.jsonl", json.dumps([ROW], indent=1).encode(), "it is a JSON list"),
    "cut short, gzip": ("a.jsonl.gz", gzip.compress(LINES * 999)[:-30], "ended before"),
    "cut short, bzip2": ("a.jsonl.bz2", bz2.compress(LINES * 999)[:-30], "ended before"),
    "damaged": ("a.jsonl.gz", gzip.compress(LINES)[:12] + b"\xff" * 30, ""),
    "Latin-1": ("a.jsonl", '{"question": "café"}'.encode("latin-1"), "not UTF-8"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_is_named_for_what_it_is(tmp_path, case):
    name, content, reason = FOREIGN[case]
    (tmp_path / name).write_bytes(content)
    for read in (rows, load_corpus) if not name.endswith((".csv", ".json", ".parquet")) else (rows,):
        with pytest.raises(InputError) as error:
            list(read(tmp_path / name))
        message = str(error.value)
        assert message.startswith(str(tmp_path / name)) and reason in message and "\n" not in message


def test_a_source_named_in_the_rows(tmp_path):
    """Search-R1's test file holds several data sets, and each begins with the id test_0."""
    content = [ROW | {"id": "test_0", "data_source": name} for name in ("nq", "triviaqa", "nq")]
    content[2]["id"] = "test_1"
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*content, ROW]))
    sets = load_sets(str(tmp_path / "test.jsonl"), "test")
    ids = {name: [q.id for q in questions] for name, questions in sets.items()}
    assert ids == {"nq": ["nq-test_0", "nq-test_1"], "triviaqa": ["triviaqa-test_0"], "test": ["1"]}
    assert {
        name: len(qs) for name, qs in load_sets(str(tmp_path / "test.jsonl"), "test", 1).items()
    } == dict.fromkeys(ids, 1)
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW | {"data_source": 3}))
    with pytest.raises(InputError, match="data_source are texts"):
        load_sets(str(tmp_path / "test.jsonl"), "test")
    (tmp_path / "nq.jsonl").write_bytes(LINES)
    (tmp_path / "test.jsonl").write_text(json.dumps(content[0]))
    with pytest.raises(InputError, match="a second data set named nq"):
        load_sets(f"{tmp_path}/nq.jsonl,{tmp_path}/test.jsonl", "test")
