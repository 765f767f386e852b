"""python -m pytest tests/test_data.py          (SEM_DATA=FOLDER: also on real rows)

Every loader reads small rows in the official formats. Every mistake is reported with its line, and a file of
arbitrary bytes gives questions or such a report. The mix of a training step is a function of seed and step.
"""

import csv
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import huggingface_hub.errors
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
from data import Doc, Episode, InputError, Question, load, load_sets, mix, paragraphs

REAL = Path(os.environ.get("SEM_DATA", "/nowhere"))
NAMES = ["musique", "mmlu", "hotpotqa", "2wikimultihopqa", "gsm8k", "nq", "triviaqa", "popqa", "bamboogle"]
STEM = "tower_of_x"

# ------------------------------------------------------------------------------------------------------------
# small rows in the official formats

MUSIQUE = {
    "id": "2hop__1_2",
    "paragraphs": [
        {"idx": 0, "title": "Pisa", "paragraph_text": "A city with a tower.", "is_supporting": True},
        {"idx": 1, "title": "Oslo", "paragraph_text": "A city with a fjord.", "is_supporting": False},
    ],
    "question": "Which river runs through the city of the leaning tower?",
    "question_decomposition": [],
    "answer": "Arno",
    "answer_aliases": ["the Arno", "Arno", " "],
    "answerable": True,
}
HOTPOT = {
    "_id": "5ab3",
    "answer": "yes",
    "question": "Are Pisa and Oslo cities?",
    "supporting_facts": [["Pisa", 0]],
    "context": [["Pisa", ["A city.", " It has a tower."]], ["Oslo", ["A city.", " It has a fjord."]]],
    "type": "comparison",
    "level": "easy",
}
TWO_WIKI = HOTPOT | {"_id": "298f", "context": [["Pisa", ["A city.", "It has a tower."]]], "evidences": []}
GSM8K = {"question": "How much is 600 and 600?", "answer": "600+600=<<600+600=1200>>1200.\n#### 1,200"}
FLASHRAG = {
    "id": "test_0",
    "question": "who painted it",
    "golden_answers": ["Giotto", "", "Giotto", "Giotto di Bondone"],
}
LINE = json.dumps(FLASHRAG)
CSV = 'Which "x" is it,\nor none?'  # the question spans two lines


def write(path, *rows):
    """Writes rows as JSONL, or as a JSON list if the path ends in .json. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    as_list = path.suffix == ".json"
    path.write_text(
        json.dumps(rows) if as_list else "\n".join(json.dumps(row) for row in rows), encoding="utf-8"
    )
    return path


def write_csv(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)
    return path


def mistake(*arguments, function=load):
    """The message of the InputError that the call raises. It must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert str(caught.value).splitlines() == [str(caught.value)]
    return str(caught.value)


def test_musique(tmp_path, capsys):
    write(tmp_path / "musique_ans_v1.0_train.jsonl", MUSIQUE)
    ours = [Question("2hop__1_2", MUSIQUE["question"], ["Arno", "the Arno"], "musique")]
    assert load(f"musique:{tmp_path}") == ours
    assert load(f"musique:{tmp_path}/musique_ans_v1.0_train.jsonl", "test") == ours
    docs = [Doc("0", "Pisa", "A city with a tower."), Doc("1", "Oslo", "A city with a fjord.")]
    assert paragraphs(f"musique:{tmp_path}") == docs
    assert capsys.readouterr().err == ""


def test_musique_full_drops_the_unanswerable_and_counts_them(tmp_path, capsys):
    unanswerable = MUSIQUE | {
        "answerable": False,
        "paragraphs": [{"title": "Rome", "paragraph_text": "A city."}],
    }
    # the official archive unpacks into a folder data/
    write(tmp_path / "data" / "musique_full_v1.0_dev.jsonl", unanswerable, MUSIQUE, unanswerable)
    assert [q.answers for q in load(f"musique:{tmp_path}", "test")] == [["Arno", "the Arno"]]
    assert capsys.readouterr().err == "musique: 2 of 3 rows are unanswerable and were dropped\n"
    assert [d.title for d in paragraphs(f"musique:{tmp_path}", "dev")] == ["Rome", "Pisa", "Oslo"]
    write(tmp_path / "none.jsonl", unanswerable)
    assert mistake(f"musique:{tmp_path}/none.jsonl") == f"musique:{tmp_path}/none.jsonl: no questions in it"


@pytest.mark.parametrize(
    "name, row, file",
    [("hotpotqa", HOTPOT, "hotpot_dev_distractor_v1.json"), ("2wikimultihopqa", TWO_WIKI, "dev.json")],
)
def test_two_hop(tmp_path, name, row, file):
    write(tmp_path / file, row)
    for split in ("dev", "test", "val", "validation"):  # dev stands in for test, whose answers are not public
        assert load(f"{name}:{tmp_path}", split) == [Question(row["_id"], row["question"], ["yes"], name)]
    assert paragraphs(f"{name}:{tmp_path}", "test")[0] == Doc("0", "Pisa", "A city. It has a tower.")
    assert "train" in mistake(f"{name}:{tmp_path}")


def test_paragraphs_come_once_and_in_order(tmp_path):
    rows = [["B", ["b"]], ["A", ["a"]]], [["A", ["a"]], ["A", ["other"]], ["B", ["b"]]]
    write(tmp_path / "dev.json", *(TWO_WIKI | {"context": context} for context in rows))
    docs = paragraphs(f"2wikimultihopqa:{tmp_path}", "dev")
    assert docs == [Doc("0", "B", "b"), Doc("1", "A", "a"), Doc("2", "A", "other")]


def test_sets_without_paragraphs_give_no_documents(tmp_path):
    write(tmp_path / "test.jsonl", FLASHRAG)
    for spec in (f"nq:{tmp_path}", f"{tmp_path}/test.jsonl", "mmlu", "gsm8k:/nowhere"):
        assert paragraphs(spec, "test") == []
    assert "bogus" in mistake("bogus", function=paragraphs)


def test_gsm8k(tmp_path):
    write(tmp_path / "test.jsonl", GSM8K, GSM8K | {"answer": "#### no\n####  -3 "})
    first, second = load(f"gsm8k:{tmp_path}", "test")
    assert first == Question("0", GSM8K["question"], ["1200"], "gsm8k")
    assert (second.id, second.answers) == ("1", ["-3"])
    assert mistake(f"gsm8k:{tmp_path}", "dev") == "gsm8k has no split 'dev': it has train, test"


def test_mmlu(tmp_path):
    for split in ("dev", "val", "test"):
        write_csv(tmp_path / "data" / split / f"{STEM}_{split}.csv", [CSV, "1", "two, three", '"4"', "", "C"])
    write_csv(
        tmp_path / "data" / "test" / "arts_test.csv", *[["q", "1", "2", "3", "4", letter] for letter in "AB"]
    )
    question = Question(f"{STEM}_val-0", CSV, ["C"], "mmlu", ["1", "two, three", '"4"', ""])
    assert load(f"mmlu:{tmp_path}", "val") == load(f"mmlu:{tmp_path}", "validation") == [question]
    # CSV files that lie directly in the folder are read for every split
    assert load(f"mmlu:{tmp_path}/data/val", "test") == [question]
    assert load(f"mmlu:{tmp_path}/data/val/{STEM}_val.csv", "test") == [question]
    assert [q.id for q in load(f"mmlu:{tmp_path}/data", "dev")] == [f"{STEM}_dev-0"]
    ids = [q.id for q in load(f"mmlu:{tmp_path}", "test")]
    assert ids == ["arts_test-0", "arts_test-1", f"{STEM}_test-0"]
    assert load(f"mmlu:{tmp_path}", "train") == [question]  # val is read, since there is no auxiliary_train
    write_csv(tmp_path / "data" / "auxiliary_train" / "race.csv", ["q", "1", "2", "3", "4", "D"])
    assert [q.id for q in load(f"mmlu:{tmp_path}", "train")] == ["race-0"]


def test_flashrag(tmp_path):
    path = write(tmp_path / "test.jsonl", FLASHRAG)
    question = Question("test_0", "who painted it", ["Giotto", "Giotto di Bondone"], "test")
    assert load(str(path)) == [question]
    for name in ("nq", "triviaqa", "popqa", "bamboogle"):
        (ours,) = load(f"{name}:{tmp_path}", "test")
        assert (ours.id, ours.answers, ours.source) == ("test_0", question.answers, name)
    choices = {"choices": ["red", "blue"], "golden_answers": ["B"], "id": 7}
    path = write(tmp_path / "colours.jsonl", FLASHRAG | choices, FLASHRAG | {"choices": None})
    assert load(str(path))[0] == Question("7", "who painted it", ["B"], "colours", ["red", "blue"])
    assert load(str(path))[1].choices is None


def test_flashrag_rows_of_a_multi_hop_set_keep_its_name_and_paragraphs(tmp_path):
    context = {"title": ["Pisa", "Oslo"], "sentences": [["A city.", " It has a tower."], ["Another."]]}
    two_wiki = {"title": ["Pisa"], "content": [["A city.", "It has a tower."]]}
    for name, columns in ("hotpotqa", context), ("2wikimultihopqa", two_wiki):
        path = write(tmp_path / "rows.jsonl", FLASHRAG | {"metadata": {"context": columns}})
        assert load(f"{name}:{path}")[0].source == name
        assert paragraphs(f"{name}:{path}")[0] == Doc("0", "Pisa", "A city. It has a tower.")


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(FLASHRAG).encode() + b"\r\n\r\n" + json.dumps(FLASHRAG).encode()
    )
    assert len(load(str(path))) == 2
    inside = FLASHRAG | {"question": "a\n\ufeffb"}  # this mark belongs to the row
    path.write_text(f"{LINE}\n{json.dumps(inside, ensure_ascii=False)}", encoding="utf-8")
    assert load(str(path))[1].text == "a\n\ufeffb"
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbf"a\r\nb",1,2,3,4,A\r\n\r\nc,1,2,3,4,B\r\n')
    assert [q.text for q in load(f"mmlu:{path}")] == ["a\r\nb", "c"]
    path.write_text('"a\n\ufeff\nb",1,2,3,4,A\n', encoding="utf-8")
    assert [q.text for q in load(f"mmlu:{path}")] == ["a\n\ufeff\nb"]


# ------------------------------------------------------------------------------------------------------------
# mistakes

MISTAKES = [  # name of the set, file, content, what follows the file's path in the message
    ("", "a.jsonl", f"{LINE}\n{LINE[:-1]}", ":2: not JSON: Expecting ',' delimiter"),
    ("", "a.jsonl", f"{LINE}\n\n[1]", ":3: this row is not a JSON object"),
    ("", "a.jsonl", b"\n" + LINE.encode() + b"\n\xff", ":3: not UTF-8"),
    ("", "a.jsonl", FLASHRAG | {"question": " \n"}, ":1: the question is empty"),
    ("", "a.jsonl", FLASHRAG | {"question": 3}, ":1: question, answers, choices and data_source are texts"),
    ("", "a.jsonl", FLASHRAG | {"golden_answers": ["", " "]}, ":1: no answer"),
    ("", "a.jsonl", FLASHRAG | {"golden_answers": []}, ":1: no answer"),
    ("", "a.jsonl", FLASHRAG | {"golden_answers": "Giotto"}, ":1: answers and choices are lists"),
    (
        "",
        "a.jsonl",
        FLASHRAG | {"golden_answers": [None]},
        ":1: question, answers, choices and data_source are texts",
    ),
    ("", "a.jsonl", {"id": "1", "golden_answers": ["x"]}, ":1: no key 'question'"),
    ("", "a.jsonl", {"id": "1", "question": "x"}, ":1: no key 'golden_answers'"),
    ("", "a.jsonl", FLASHRAG | {"choices": ["x", "y"]}, ":1: answer 'Giotto' is not one of the letters A-B"),
    ("", "a.jsonl", FLASHRAG | {"choices": "xy"}, ":1: answers and choices are lists"),
    (
        "",
        "a.jsonl",
        LINE.replace("who", "\\ud800"),
        ":1: not JSON: 'utf-8' codec can't encode character '\\ud800'",
    ),
    ("", "a.jsonl", "[" * 100_000, ":1: not JSON: maximum recursion depth exceeded"),
    ("", "a.jsonl", "9" * 5000, ":1: not JSON: Exceeds the limit (4300 digits)"),
    ("musique", "a.jsonl", {"id": "1", "question": "x", "answer_aliases": []}, ":1: no key 'answer'"),
    ("musique", "a.jsonl", MUSIQUE | {"answer_aliases": "Arno"}, ":1: a value has the wrong type"),
    ("gsm8k", "a.jsonl", GSM8K | {"answer": "it is 1,200"}, ":1: no answer"),
    ("gsm8k", "a.jsonl", GSM8K | {"answer": 1200}, ":1: a value has the wrong type"),
    ("hotpotqa", "a.json", '[\n{"_id": 1},\n]', ":3: not JSON:"),
    ("hotpotqa", "a.json", b'[\n{"_id": "\xff"}]', ":2: not UTF-8"),
    ("hotpotqa", "a.json", json.dumps(HOTPOT), ": it is one JSON object, or JSONL"),
    ("hotpotqa", "a.json", json.dumps([HOTPOT, 1]), ", row 2: this row is not a JSON object"),
    ("hotpotqa", "a.json", json.dumps([HOTPOT, {"_id": "1", "question": "x"}]), ", row 2: no key 'answer'"),
    ("mmlu", "a.csv", "q,1,2,3,4,A\nq,1,2,3,A\n", ":2: 5 columns instead of 6"),
    # the message names the line on which the row starts
    ("mmlu", "a.csv", '"q\nq",1,2,3,4,A\n"q\nq",1,2,3,4,5,A\n', ":3: 7 columns instead of 6"),
    ("mmlu", "a.csv", "q,1,2,3,4,A\nq,1,2,3,4,E\n", ":2: answer 'E' is not one of the letters A-D"),
    ("mmlu", "a.csv", "q,1,2,3,4,b\n", ":1: answer 'b' is not one of the letters A-D"),
    ("mmlu", "a.csv", "q,1,2,3,4,\n", ":1: no answer"),
    ("mmlu", "a.csv", " ,1,2,3,4,A\n", ":1: the question is empty"),
    ("mmlu", "a.csv", 'q,1,2,3,4,A\n"q,1,2,3,4,A\nq,1,2,3,4,A\n', ":2: not CSV: unexpected end of data"),
    ("mmlu", "a.csv", b"q,1,2,3,4,A\nq,1,2,\xe9,4,A\n", ":2: not UTF-8"),
]


@pytest.mark.parametrize("name, file, content, message", MISTAKES)
def test_a_mistake_is_one_line_that_names_file_and_line(tmp_path, name, file, content, message):
    path = tmp_path / file
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert mistake(f"{name}:{path}" if name else str(path)).startswith(f"{path}{message}")


CONTEXTS = [
    {},
    {"context": 3},
    {"context": [["Pisa"]]},
    {"context": [["Pisa", "A city."]]},
    {"context": [["Pisa", [1]]]},
]
CONTEXTS += [
    {"context": {"title": ["Pisa"], "sentences": []}},
    {"context": [[None, ["x"]]]},
    {"paragraphs": [{"title": "Pisa"}]},
]


@pytest.mark.parametrize("context", CONTEXTS)
def test_paragraphs_in_another_format(tmp_path, context):
    path = write(tmp_path / "a.json", HOTPOT, {"_id": "1", "question": "x", "answer": "y"} | context)
    message = f"{path}, row 2: its paragraphs are not in the official format"
    assert mistake(f"hotpotqa:{path}", function=paragraphs) == message


def test_missing_and_empty_files(tmp_path):
    path = tmp_path / "a.jsonl"
    assert mistake(f"nq:{path}") == f"{path}: No such file or directory"
    assert mistake(f"nq:{tmp_path}", "dev") == f"{tmp_path}: no dev.jsonl in it"
    assert mistake(f"mmlu:{tmp_path}", "test") == f"{tmp_path}: no test/*.csv or *.csv in it"
    for content in ("", "\n \n"):
        path.write_text(content)
        assert mistake(str(path)) == f"{path}: no questions in it"
    write(tmp_path / "train.json")
    assert mistake(f"2wikimultihopqa:{tmp_path}") == f"2wikimultihopqa:{tmp_path}: no questions in it"


@pytest.mark.parametrize(
    "spec", ["bogus", "nq2", "xnq", "NQ", "nq:", "bogus:a.jsonl", "", ":", "a\nb", "x" * 5000, "."]
)
def test_an_unknown_name_lists_the_known_ones(spec):
    message = mistake(spec)
    assert message.startswith(repr(spec))
    assert all(name in message for name in NAMES)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted(
    {*MUSIQUE, *HOTPOT, *FLASHRAG, "choices", "metadata", "title", "sentences", "paragraph_text", "subject"}
)
rows = st.dictionaries(st.sampled_from(KEYS), anything)
# A good row in which a few values are replaced gets further into a parser than an arbitrary row.
rows |= st.builds(
    lambda row, new: row | new, st.sampled_from([MUSIQUE, HOTPOT, TWO_WIKI, GSM8K, FLASHRAG]), rows
)
lines = st.lists((anything | rows).map(json.dumps), max_size=4).map(lambda x: "\n".join(x).encode())
lists = st.lists(anything | rows, max_size=4).map(lambda x: json.dumps(x).encode())
cells = st.text(alphabet='ABCE1,"\n\r x\x00\u2028', max_size=60).map(str.encode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["a.jsonl", "a.json", "a.csv"])
@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=60) | lines | lists | cells, name=st.sampled_from(["", *NAMES]))
@example(content=b'"', name="mmlu")
@example(content=b"q,1,2,3,4,A\rq", name="mmlu")
def test_any_content_gives_questions_or_one_line(folder, file, content, name):
    path = folder / file
    path.write_bytes(content)
    spec = f"{name}:{path}" if name else str(path)
    for function, kind in (load, Question), (paragraphs, Doc):
        try:
            out = function(spec)
        except InputError as e:
            assert str(e).splitlines() == [str(e)] and str(path) in str(e)
        else:
            assert all(isinstance(x, kind) for x in out)
            if kind is Question:
                assert out
                for q in out:
                    texts = [q.id, q.text, *q.answers, *(q.choices or [])]
                    "".join(texts).encode()  # half of a surrogate pair fails here, as it would in a tokenizer
                    assert q.text.strip() and q.answers and all(a.strip() for a in q.answers)
                    assert len(set(q.answers)) == len(q.answers)
                    assert not q.choices or set(q.answers) <= {chr(65 + i) for i in range(len(q.choices))}


# ------------------------------------------------------------------------------------------------------------
# the hub, without a network


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replaces the hub by a folder. `downloads` collects the (repository, file) pairs that were requested."""
    downloads = []

    def download(repo, file, repo_type):
        assert repo_type == "dataset"
        downloads.append((repo, file))
        if not (tmp_path / file).exists():
            raise huggingface_hub.errors.EntryNotFoundError("404\nnot found")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return types.SimpleNamespace(folder=tmp_path, downloads=downloads)


@pytest.fixture
def parquet(monkeypatch):
    """Replaces pyarrow by a module that reads JSONL."""

    class ParquetFile:
        def __init__(self, file):
            self.rows = [json.loads(line) for line in file.read().splitlines()]
            if not self.rows:
                raise ValueError("no magic bytes\nin it")

        def iter_batches(self, batch_size):
            for row in self.rows:
                yield types.SimpleNamespace(to_pylist=lambda row=row: [row])

    package, module = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    package.parquet, module.ParquetFile = module, ParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)


def test_hub_jsonl(hub):
    write(hub.folder / "nq" / "dev.jsonl", FLASHRAG)
    assert load("nq", "dev")[0].source == "nq"
    write(hub.folder / "musique_ans_v1.0_dev.jsonl", MUSIQUE)
    assert load("musique", "test")[0].answers == ["Arno", "the Arno"]
    metadata = {"context": {"title": ["Pisa"], "content": [["A city."]]}}
    write(hub.folder / "2wikimultihopqa" / "train.jsonl", FLASHRAG | {"metadata": metadata})
    assert load("2wikimultihopqa")[0].source == "2wikimultihopqa"
    assert paragraphs("2wikimultihopqa") == [Doc("0", "Pisa", "A city.")]
    repos = ["RUC-NLPIR/FlashRAG_datasets", "dgslibisey/MuSiQue", *["RUC-NLPIR/FlashRAG_datasets"] * 2]
    assert [repo for repo, _ in hub.downloads] == repos


def test_hub_parquet(hub, parquet):
    row = {"question": "q", "subject": "anatomy", "choices": ["w", "x", "y", "z"], "answer": 1}
    write(hub.folder / "all" / "test-00000-of-00001.parquet", row, row | {"subject": "", "answer": 3})
    first, second = load("mmlu", "test")
    assert first == Question("anatomy-0", "q", ["B"], "mmlu", ["w", "x", "y", "z"])
    assert (second.id, second.answers) == ("auxiliary_train-1", ["D"])
    row = {key: HOTPOT[key] for key in ("question", "answer")} | {"id": "5ab3"}
    row["context"] = {"title": ["Pisa"], "sentences": [["A city.", " It has a tower."]]}
    for i in (0, 1):
        write(hub.folder / "distractor" / f"train-0000{i}-of-00002.parquet", row)
    assert load("hotpotqa") == [Question("5ab3", HOTPOT["question"], ["yes"], "hotpotqa")] * 2
    assert paragraphs("hotpotqa") == [Doc("0", "Pisa", "A city. It has a tower.")]
    write(hub.folder / "main" / "train-00000-of-00001.parquet", GSM8K)
    assert load("gsm8k")[0].answers == ["1200"]


def test_hub_parquet_mistakes(hub, parquet):
    path = hub.folder / "all" / "dev-00000-of-00001.parquet"
    row = {"question": "q", "subject": "anatomy", "choices": ["w", "x", "y", "z"], "answer": 4}
    write(path, row | {"answer": 0}, row)
    assert mistake("mmlu", "dev") == f"{path}, row 2: question, answers, choices and data_source are texts"
    write(path, row | {"answer": [0]})
    assert mistake("mmlu", "dev").startswith(f"{path}, row 1: a value has the wrong type")
    write(path)
    assert mistake("mmlu", "dev") == f"{path}, after row 0: not readable as parquet: no magic bytes"


def test_parquet_without_pyarrow(hub, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert mistake("mmlu", "test") == (
        "cais/mmlu is stored as parquet: pip install pyarrow, or give the official CSV folder: mmlu:PATH"
    )
    assert "the official JSON file: hotpotqa:PATH" in mistake("hotpotqa", function=paragraphs)
    assert not hub.downloads  # the error comes before the download
    path = write(tmp_path / "a.parquet", "x")
    assert mistake(f"mmlu:{path}") == f"{path}: its name says parquet, and its content is something else"
    path.write_bytes(b"PAR1....")
    assert mistake(f"mmlu:{path}").startswith(f"{path}, after row 0: not readable as parquet: ")


@pytest.mark.parametrize(
    "error", [OSError("no\nroute"), RuntimeError(), huggingface_hub.errors.LocalEntryNotFoundError("x")]
)
def test_hub_out_of_reach(monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert mistake("musique") == (
        f"dgslibisey/MuSiQue cannot be fetched from the hub ({type(error).__name__}): "
        "give the official JSONL file instead: musique:PATH"
    )


def test_hub_offline(tmp_path):
    """huggingface_hub reads HF_HUB_OFFLINE when it is imported, so this needs a new process."""
    code = "import data\ntry: data.load('bamboogle', 'test')\nexcept data.InputError as e: print(e)"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = Path(__file__).parent.parent
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, timeout=60
    )
    assert out.stdout == (
        "RUC-NLPIR/FlashRAG_datasets cannot be fetched from the hub (LocalEntryNotFoundError): "
        "give a FlashRAG JSONL file instead: bamboogle:PATH\n"
    )


def test_every_name_has_its_files():
    assert list(data._SETS) == NAMES
    assert {name for name, _ in data._FILES} == set(NAMES)


# ------------------------------------------------------------------------------------------------------------
# real rows


def real(path):
    if not (REAL / path).exists():
        pytest.skip("SEM_DATA names no folder with this file")
    return REAL / path


def same(question, id, text, answers, source, choices=None):
    assert question == Question(id, text, answers, source, choices)


@pytest.mark.parametrize("file", ["musique_ans_v1.0_train", "musique_ans_v1.0_dev", "musique_full_v1.0_dev"])
def test_real_musique(file, capsys):
    path = real(f"musique/{file}.jsonl")
    raw = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    good = [row for row in raw if row["answerable"]]
    ours = load(f"musique:{path}")
    assert len(ours) == len(good) == {"train": 100, "dev": 200}.get(file[17:], 22)
    assert len(ours) == len(raw) or f"{len(raw) - len(good)} of {len(raw)}" in capsys.readouterr().err
    for q, row in (ours[0], good[0]), (ours[-1], good[-1]):
        answers = list(dict.fromkeys([row["answer"], *row["answer_aliases"]]))
        steps = [(s["question"].replace(" >> ", " "), [s["answer"]]) for s in row["question_decomposition"]]
        assert q.steps == steps and len(steps) > 1
        same(replace(q, steps=None), row["id"], row["question"], answers, "musique")
    pairs = {(p["title"], p["paragraph_text"]) for row in raw for p in row["paragraphs"]}
    docs = paragraphs(f"musique:{path}")
    assert {(d.title, d.text) for d in docs} == pairs and len(docs) == len(pairs)
    assert docs[0].text == raw[0]["paragraphs"][0]["paragraph_text"] and docs[-1].id == str(len(docs) - 1)


@pytest.mark.parametrize(
    "name, file, count", [("hotpotqa", "hotpot_dev_distractor_v1", 600), ("2wikimultihopqa", "dev", 300)]
)
def test_real_two_hop(name, file, count):
    raw = json.loads(real(f"{name}/{file}.json").read_text("utf-8"))
    ours = load(f"{name}:{REAL / name}", "test")
    assert len(ours) == len(raw) == count
    for q, row in (ours[0], raw[0]), (ours[-1], raw[-1]):
        same(q, row["_id"], row["question"], [row["answer"]], name)
    docs = paragraphs(f"{name}:{REAL / name}", "test")
    assert {d.title for d in docs} == {title for row in raw for title, _ in row["context"]}
    title, sentences = raw[0]["context"][0]
    assert docs[0].title == title and "".join(docs[0].text.split()) == "".join("".join(sentences).split())


@pytest.mark.parametrize("split, count", [("dev", 285), ("val", 1531), ("test", 5235)])
def test_real_mmlu(split, count):
    files = sorted(real(f"mmlu/data/{split}").glob("*.csv"))
    raw = []
    for file in files:
        with open(file, newline="", encoding="utf-8") as f:
            raw += [(file.stem, n, row) for n, row in enumerate(csv.reader(f))]
    ours = load(f"mmlu:{REAL / 'mmlu'}", split)
    assert len(ours) == len(raw) == count
    for q, (stem, n, row) in zip(ours, raw, strict=True):
        same(q, f"{stem}-{n}", row[0], [row[5]], "mmlu", row[1:5])
    assert ours[0].text[:20] in files[0].read_text("utf-8").splitlines()[0]
    assert files[-1].read_text("utf-8").rstrip().endswith(f",{ours[-1].answers[0]}")


@pytest.mark.parametrize("split, count", [("train", 1000), ("test", 600)])
def test_real_gsm8k(split, count):
    raw = [json.loads(line) for line in real(f"gsm8k/{split}.jsonl").read_text("utf-8").splitlines()]
    ours = load(f"gsm8k:{REAL / 'gsm8k'}", split)
    assert len(ours) == len(raw) == count
    for n, (q, row) in enumerate(zip(ours, raw, strict=True)):
        same(q, str(n), row["question"], [row["answer"].split("#### ")[1].replace(",", "")], "gsm8k")
        assert re.fullmatch(r"-?[\d.]+", q.answers[0])


FILES = [("nq", "train", 256), ("nq", "test", 400), ("triviaqa", "test", 400), ("popqa", "test", 400)]
FILES += [("bamboogle", "test", 80), ("hotpotqa", "train", 256)]


@pytest.mark.parametrize("name, split, count", FILES)
def test_real_flashrag(name, split, count):
    path = real(f"flashrag/{name}/{split}.jsonl")
    raw = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    ours = load(f"{name}:{path}")
    assert len(ours) == len(raw) == count
    for q, row in zip(ours, raw, strict=True):
        same(q, row["id"], row["question"], list(dict.fromkeys(row["golden_answers"])), name)
    assert load(str(path))[0].source == split
    assert bool(paragraphs(f"{name}:{path}")) == (name == "hotpotqa")


# ------------------------------------------------------------------------------------------------------------
# several data sets, and the mix


def test_load_sets_draws_the_same_questions_every_time(tmp_path):
    for name, size in (("towers", 5), ("rivers", 7)):
        rows = ({"id": f"{name}{i}", "question": "q", "golden_answers": ["a"]} for i in range(size))
        write(tmp_path / f"{name}.jsonl", *rows)
    specs = f"{tmp_path}/towers.jsonl, {tmp_path}/rivers.jsonl,"
    whole = {"towers": questions("towers", 5), "rivers": questions("rivers", 7)}
    assert load_sets(specs, "test") == load_sets(specs, "test", 0) == load_sets(specs, "test", 7) == whole
    first, second = (load_sets(specs, "test", 3) for _ in range(2))
    assert first == second and {name: len(rows) for name, rows in first.items()} == {"towers": 3, "rivers": 3}
    assert all(q in whole[name] for name, rows in first.items() for q in rows)
    assert first["rivers"] != whole["rivers"][:3]  # the questions are drawn, not cut off


def test_load_sets_refuses_two_sets_with_the_same_name(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder / "towers.jsonl", FLASHRAG)
    specs = f"{tmp_path}/a/towers.jsonl,{tmp_path}/b/towers.jsonl"
    message = mistake(specs, "test", function=load_sets)
    assert message == f"{tmp_path}/b/towers.jsonl: a second data set named towers"


def questions(source, n):
    return [Question(f"{source}{i}", "q", ["a"], source) for i in range(n)]


@pytest.mark.parametrize("sizes", [[50], [50, 7], [50, 7, 3], [1, 1, 1], [5, 40, 2]])
@pytest.mark.parametrize("n", [1, 8, 12])
def test_mix_is_balanced_and_visits_each_row_once_an_epoch(sizes, n):
    sources = {f"s{i}": questions(f"s{i}", size) for i, size in enumerate(sizes)}
    seen, steps = [], 60
    for step in range(steps):
        batch = mix(sources, n, 3, step)
        assert len(batch) == n
        seen += batch
        counts = Counter(q.source for q in batch)
        assert max(counts.values()) - min(counts.get(name, 0) for name in sources) <= 1
    totals = Counter(q.source for q in seen)
    assert max(totals.values()) - min(totals.values()) <= 1  # the remainders of the steps even out
    for name, rows in sources.items():
        ids = [q.id for q in seen if q.source == name]
        epochs = [ids[i : i + len(rows)] for i in range(0, len(ids), len(rows))]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert all(set(epoch) == {q.id for q in rows} for epoch in epochs[:-1])
        if len(rows) >= 40 and len(epochs) > 2:
            assert epochs[0] != epochs[1]  # every epoch is a new shuffle


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_mix_is_a_function_of_seed_and_step(seed, step, n):
    sources = {"b": questions("b", 90), "a": questions("a", 70)}
    batch = mix(sources, n, seed, step)
    data._shuffled.cache_clear()
    # neither the order of the sources nor an earlier call matters
    assert mix(dict(reversed(sources.items())), n, seed, step) == batch
    ahead = [q for s in range(step, step + 3) for q in mix(sources, n, seed, s)]
    # the questions of a run are one long sequence, and the batch size only says where it is cut
    assert ahead == mix(sources, 3 * n, seed, step // 3) or step % 3
    assert mix(sources, 60, seed, 0) != mix(sources, 60, seed + 1, 0)


# ------------------------------------------------------------------------------------------------------------
# episodes


def test_an_episode_counts_the_tokens_that_are_trained_on():
    question = questions("towers", 1)[0]
    mask = [True, False, False, True, True]
    episode = Episode(question, [1, 2], ids=[3, 4, 5, 6, 7], loss_mask=mask, template=None)
    assert episode.policy_tokens == 3
    with pytest.raises(TypeError, match="template"):  # an episode cannot be read without its template
        Episode(question, [1, 2])


def test_two_sources_of_one_size_are_shuffled_apart():
    """Otherwise row i of one source would always come together with row i of the other."""
    batch = mix({"a": questions("a", 30), "b": questions("b", 30)}, 60, 0, 0)
    orders = [[q.id[1:] for q in batch if q.source == name] for name in "ab"]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
