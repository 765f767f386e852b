"""Data sets and the records that every other file works on: questions, documents, episodes.

Here: `Question`, `Doc`, `Segment` and `Episode`, one loader for each data set, and the balanced mix of a
training step as a function of (seed, step). Not here: prompts and token ids (prompts.py), search
(retriever.py), and how an answer is matched (reward.py), but for `number`, the value of a numeric answer.
Files are read by files.py.

    questions = load("mmlu:data/mmlu")                 # a name, and a path in the data set's official format
    sources = load_sets("musique,mmlu", "train")       # {name: questions}
    batch = mix(sources, 256, seed=0, step=0)          # the questions of the first training step
"""

from __future__ import annotations

import os
import random
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from files import InputError, rows, stem


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    answers: list[str]  # any of them is right; for a multiple-choice question the letter of the right option
    source: str  # name of the data set; the mix is balanced by it, and metrics are reported for each
    choices: list[str] | None = None  # the options of a multiple-choice question, A first
    steps: list[tuple[str, list[str]]] | None = None  # MuSiQue: (question, answers) of each hop; #1 in a
    # question stands for the answer of the first hop

    def answer_texts(self) -> list[str]:
        """The answers in words: for a multiple-choice question the text of the right option."""
        return [self.choices[ord(a) - 65] for a in self.answers] if self.choices else self.answers


@dataclass(frozen=True)
class Doc:
    id: str
    title: str
    text: str
    score: float = 0.0  # set by the retriever that returned the document


@dataclass
class Segment:
    """A piece of an episode with one writer. The kinds:

    model      the policy wrote it
    env        the search result that the environment added
    reminder   what the environment adds after a turn without query and answer, see prompts.Template
    forced     an opening search tag that the environment added, see `rollout(force_search=True)`"""

    kind: str
    ids: list[int]
    text: str  # the decoded ids, without the end token


@dataclass
class Episode:
    """One rollout. `ids` are the ids of all segments in order. They are exactly the ids that were sampled,
    and those that the environment added: none of them was decoded to text and encoded again."""

    question: Question
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)  # all tokens after the prompt
    loss_mask: list[bool] = field(default_factory=list)  # per id: the policy chose it and is trained on it
    logps: list[float] = field(default_factory=list)  # per id: log-prob when sampled; environment: 0.0
    segments: list[Segment] = field(default_factory=list)
    searches: int = 0  # searches that the environment answered
    stop: str = ""  # why the episode ended: see rollout.py
    engine: bool = True  # whether the search engine was there; see `rollout(engine=..)`
    template: Any = field(kw_only=True)  # the prompts.Template it follows, which its readers need

    @property
    def policy_tokens(self) -> int:
        """How many tokens the policy is trained on: |o_i| of the objective and every logged length."""
        return sum(self.loss_mask)


# ------------------------------------------------------------------------------------------------------------
# the loaders: a spec names files, files hold rows, a row becomes a question


def load(spec: str, split: str = "train") -> list[Question]:
    """The questions of a data set, in the order of its files.

    `spec` is one of three things:

        name         a name of `_SETS`, read from the Hugging Face hub
        name:path    a file or a folder in the official format of that data set
        path         FlashRAG-style JSONL: {"id", "question", "golden_answers"}

    A row with "golden_answers" is read in FlashRAG's format under every name. If it also has "choices" (the
    texts of the options), its golden answers are letters. The source of a question is the name, or the file
    name without its endings where only a path is given. A row may name another source in "data_source", as
    in Search-R1's test.parquet, where ids are unique within a source alone; the id then begins with it.

    `split` (train, dev or test) selects files in a folder or on the hub; it is ignored where the path is a
    file. For a data set without a val split, val and validation mean dev. For data sets whose test answers
    are not public (MuSiQue, HotpotQA, 2Wiki), test means dev. The train split of MMLU is its
    auxiliary_train; in a folder without that it is val, else dev, else the CSV files of the folder itself,
    but never those of its folder test.

    Raises InputError, one line that names the file and the line or row, for every mistake in the data."""
    name, parse, path = _resolve(spec)
    questions, dropped = [], 0
    for file in _files(name, path, split):
        for n, (where, row) in enumerate(rows(file)):
            if row.get("answerable") is False:  # MuSiQue-Full has questions whose evidence was taken out
                dropped += 1
                continue
            try:
                fields = (_flashrag if "golden_answers" in row else parse)(row, n)
            except KeyError as e:
                raise InputError(f"{where}: no key {e}") from e
            except (TypeError, AttributeError) as e:
                raise InputError(f"{where}: a value has the wrong type ({e})") from e
            source, id, *rest = row.get("data_source") or name, *fields
            id = id if source == name else f"{source}-{id}"
            questions.append(_question(source, where, id, *rest))
    if dropped:
        total = dropped + len(questions)
        print(f"{name}: {dropped} of {total} rows are unanswerable and were dropped", file=sys.stderr)
    if not questions:
        raise InputError(f"{spec}: no questions in it")
    return questions


def paragraphs(spec: str, split: str = "train") -> list[Doc]:
    """The corpus that a multi-hop data set contains: the paragraphs of all its rows, unanswerable ones
    included. Each (title, text) comes once, in order, with the ids "0", "1", ... The list is empty for a data
    set without paragraphs. Errors are those of `load`."""
    name, parse, path = _resolve(spec)
    if parse not in (_musique, _two_hop):
        return []
    pairs = {}  # a dict, because it keeps the order, which a set does not
    for file in _files(name, path, split):
        for where, row in rows(file):
            try:
                pairs |= dict.fromkeys(_context(row))
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                raise InputError(f"{where}: its paragraphs are not in the official format") from e
    return [Doc(str(i), title, text) for i, (title, text) in enumerate(pairs)]


# A parser takes row n of a file to (id, question, answers, choices). `_question` checks what it returns.


def _flashrag(row, n):
    return row["id"], row["question"], row["golden_answers"], row.get("choices")


def _musique(row, n):
    # If the aliases are one text, `+` raises TypeError, while [.., *aliases] would split it into letters.
    answers = [row["answer"]] + row["answer_aliases"]
    steps = [
        (s["question"].replace(" >> ", " "), [s["answer"]]) for s in row.get("question_decomposition", [])
    ]
    return row["id"], row["question"], answers, None, steps


def _two_hop(row, n):
    return row["id" if "id" in row else "_id"], row["question"], [row["answer"]], None  # hub, official file


def _gsm8k(row, n):
    _, mark, gold = row["answer"].rpartition("####")
    return n, row["question"], [gold.replace(",", "").strip()] if mark else [], None


def _mmlu(row, n):
    letter = dict(enumerate("ABCD")).get(row["answer"], row["answer"])  # 0-3 on the hub, a letter in the CSV
    subject = row["subject"] or "auxiliary_train"  # on the hub the rows of that split have no subject
    return f"{subject}-{n}", row["question"], [letter], row["choices"]


def _question(source: str, where: str, id, text, answers, choices, steps=None) -> Question:
    if not isinstance(answers, list) or not isinstance(choices or [], list):
        raise InputError(f"{where}: answers and choices are lists")
    if not all(isinstance(t, str) for t in [source, text, *answers, *(choices or [])]):
        raise InputError(f"{where}: question, answers, choices and data_source are texts")
    if not text.strip():
        raise InputError(f"{where}: the question is empty")
    answers = list(dict.fromkeys(a for a in answers if a.strip()))
    if not answers:
        raise InputError(f"{where}: no answer")
    if source == "gsm8k" and (wrong := [a for a in answers if number(a) is None]):
        raise InputError(f"{where}: the answer {wrong[0]!r} is not a number")
    letters = [chr(65 + i) for i in range(len(choices or []))]
    for answer in answers:
        if letters and answer not in letters:
            raise InputError(f"{where}: answer {answer!r} is not one of the letters A-{letters[-1]}")
    return Question(str(id), text, answers, source, choices or None, steps or None)


_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")  # LaTeX: \frac{1}{2}
_COMMA = re.compile(
    r"\{,\}|\\,|(?<=\d)(?:[\xa0\u2009\u202f~\uff0c]|\\[;: ])(?=\d{3}(?!\d))"
)  # thin blanks too
_VULGAR = re.compile(r"[\xbc-\xbe\u2150-\u215e]")  # the characters of one half, one third, ...
_UNREAD = re.compile(  # what would change the value: roots, powers, and words for large numbers
    r"\\sqrt|[\u221a\xb1]|\d\s*[\xb2\xb3\xb9\u2070-\u207f]|\d\s*(?:k|bn|[mbt]r?illion|thousand|hundred)\b"
    r"|\$\s*[\d.,]+\s*[mb]\b",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<!\w)[^\W\d_]\w*")  # a word that begins with a letter: the digits of CO2 are no number
_MINUS = r"[-\u2010-\u2013\u2212\ufe63\uff0d]"  # hyphens, en dash, minus
_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)"  # commas stand only between groups of three
_NUMBER = re.compile(
    rf"""(?: (?<![\w)\]}}]) (?P<minus>{_MINUS}) )?    # no minus: 3-5, x-5, f(x)-5
    (?: \\?[$\u20ac\xa3\xa5] \s? (?P<inner>{_MINUS})? )?
    (?: (?<!\w) (?:(?P<whole>\d+)\s+)? (?P<top>\d+) \s*/\s* (?P<bottom>\d+)
    |   (?P<decimal> (?: (?<!\w){_INTEGER}(?:\.\d+)? | (?<![\w.])\.\d+ ) (?:e[-+]?\d{{1,2}}(?!\d))? ) )""",
    re.VERBOSE | re.IGNORECASE,
)


def number(text: str) -> Fraction | None:
    r"""The value of the only number in a text: 9500 for "$9{,}500", "9,500.00 dollars" or "\boxed{9500}".
    None if there is not exactly one, as in "3-5" or "9,50". Units and percent signs are left out, because the
    answers of GSM8K leave them out."""
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), text).replace("\u2044", "/")
    text = re.sub(r"(?<=\d)(?=\\[cdt]?frac)", " ", text)  # 2\frac{1}{2} is 2 1/2
    text = _FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]} ", text)
    text = re.sub(r"(?<=[A-Za-z}])\^\{?[23]\}?(?!\d)", "", text)  # square metres
    text = re.sub(r"\b(?:minus|negative)\s+(?=[$\d.])", "-", text, flags=re.IGNORECASE)
    if _UNREAD.search(text):
        return None
    text = _NAME.sub("w", _COMMA.sub(",", text.replace("\\!", "")))
    found = _NUMBER.search(text)
    if not found or len(found[0]) > 400 or re.search(r"\d", text[: found.start()] + text[found.end() :]):
        return None
    if found["decimal"]:
        value = Fraction(found["decimal"].replace(",", ""))
    elif int(found["bottom"]):
        value = int(found["whole"] or 0) + Fraction(int(found["top"]), int(found["bottom"]))
    else:
        return None
    return -value if found["minus"] or found["inner"] else value


def _context(row: dict) -> list[tuple[str, str]]:
    """(title, text) of each paragraph of a row. MuSiQue has a list of them. HotpotQA and 2Wiki have a context
    in one of three forms: [[title, [sentence, ...]], ...] in the official files, a dict of two columns on the
    hub, and either of these inside the metadata in FlashRAG's files."""
    if "paragraphs" in row:
        pairs = [(p["title"], p["paragraph_text"]) for p in row["paragraphs"]]
    else:
        context = row["context"] if "context" in row else row["metadata"].get("context", [])
        if isinstance(context, dict):
            sentences = context["sentences" if "sentences" in context else "content"]
            context = zip(context["title"], sentences, strict=True)
        # list.copy raises TypeError for anything but a list. Each sentence is stripped because most of
        # HotpotQA's begin with a blank and 2Wiki's do not.
        pairs = [(title, " ".join(s.strip() for s in list.copy(sentences))) for title, sentences in context]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise TypeError("not a text")
    return pairs


FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
_SETS = {  # name: repository on the hub, parser of a row, what to give if the hub cannot be used
    "musique": ("dgslibisey/MuSiQue", _musique, "the official JSONL file"),
    "mmlu": ("cais/mmlu", _mmlu, "the official CSV folder"),
    "hotpotqa": ("hotpotqa/hotpot_qa", _two_hop, "the official JSON file"),
    "2wikimultihopqa": (FLASHRAG, _two_hop, "the official JSON file"),  # this copy has 15,000 training rows
    "gsm8k": ("openai/gsm8k", _gsm8k, "the official JSONL file"),
    "nq": (FLASHRAG, _flashrag, "a FlashRAG JSONL file"),
    "triviaqa": (FLASHRAG, _flashrag, "a FlashRAG JSONL file"),
    "popqa": (FLASHRAG, _flashrag, "a FlashRAG JSONL file"),
    "bamboogle": (FLASHRAG, _flashrag, "a FlashRAG JSONL file"),
}
_FILES = {  # (name, split): files on the hub, patterns in a folder, of which the first that matches is read
    ("musique", "train"): (
        "musique_ans_v1.0_train.jsonl",
        "musique_ans*_train.jsonl musique_full*_train.jsonl",
    ),
    ("musique", "dev"): ("musique_ans_v1.0_dev.jsonl", "musique_ans*_dev.jsonl musique_full*_dev.jsonl"),
    ("mmlu", "train"): (
        "all/auxiliary_train-00000-of-00001.parquet",
        "auxiliary_train/*.csv val/*.csv dev/*.csv *.csv",
    ),
    ("mmlu", "dev"): ("all/dev-00000-of-00001.parquet", "dev/*.csv *.csv"),
    ("mmlu", "val"): ("all/validation-00000-of-00001.parquet", "val/*.csv *.csv"),
    ("mmlu", "test"): ("all/test-00000-of-00001.parquet", "test/*.csv *.csv"),
    ("hotpotqa", "train"): (
        "distractor/train-00000-of-00002.parquet distractor/train-00001-of-00002.parquet",
        "hotpot_train_v1.1.json",
    ),
    ("hotpotqa", "dev"): ("distractor/validation-00000-of-00001.parquet", "hotpot_dev_distractor_v1.json"),
    ("2wikimultihopqa", "train"): ("2wikimultihopqa/train.jsonl", "train.json"),
    ("2wikimultihopqa", "dev"): ("2wikimultihopqa/dev.jsonl", "dev.json"),
    ("gsm8k", "train"): ("main/train-00000-of-00001.parquet", "train.jsonl"),
    ("gsm8k", "test"): ("main/test-00000-of-00001.parquet", "test.jsonl"),
    ("nq", "train"): ("nq/train.jsonl", "train.jsonl"),
    ("nq", "dev"): ("nq/dev.jsonl", "dev.jsonl"),
    ("nq", "test"): ("nq/test.jsonl", "test.jsonl"),
    ("triviaqa", "train"): ("triviaqa/train.jsonl", "train.jsonl"),
    ("triviaqa", "dev"): ("triviaqa/dev.jsonl", "dev.jsonl"),
    ("triviaqa", "test"): ("triviaqa/test.jsonl", "test.jsonl"),
    ("popqa", "test"): ("popqa/test.jsonl", "test.jsonl"),
    ("bamboogle", "test"): ("bamboogle/test.jsonl", "test.jsonl"),
}


def _resolve(spec: str) -> tuple[str, Callable, str]:
    """A spec -> (source, parser, path or "")."""
    name, colon, path = spec.partition(":")
    if name in _SETS and bool(colon) == bool(path):
        return name, _SETS[name][1], path
    if os.path.isfile(spec):
        return stem(spec), _flashrag, spec
    names = ", ".join(_SETS)
    raise InputError(f"{spec!r} is neither a file nor a data set (NAME or NAME:PATH, NAME one of {names})")


def _files(name: str, path: str, split: str) -> list[Path]:
    if path and not os.path.isdir(path):
        return [Path(path)]
    split = "val" if split == "validation" else split
    if (name, split) not in _FILES and split in ("val", "test"):
        split = "dev"
    if (name, split) not in _FILES:
        splits = ", ".join(s for n, s in _FILES if n == name)
        raise InputError(f"{name} has no split {split!r}: it has {splits}")
    remote, local = (names.split() for names in _FILES[name, split])
    if not path:
        return _download(name, remote)
    for pattern in local:
        for folder in (Path(path), Path(path, "data")):
            for packed in ("", ".gz", ".bz2"):
                if files := sorted(folder.glob(pattern + packed)):
                    return files
    raise InputError(f"{path}: no {' or '.join(local)} in it")


def _download(name: str, files: list[str]) -> list[Path]:
    repo, _, form = _SETS[name]
    try:
        if files[0].endswith(".parquet"):
            import pyarrow.parquet  # noqa: F401 (fails before the download, not after it)
        from huggingface_hub import hf_hub_download

        return [Path(hf_hub_download(repo, file, repo_type="dataset")) for file in files]
    except ImportError as e:
        advice = f"pip install pyarrow, or give {form}: {name}:PATH"
        raise InputError(f"{repo} is stored as parquet: {advice}") from e
    except Exception as e:  # no network, no access, a full disk, a broken proxy: no common class of error
        reason = f"{repo} cannot be fetched from the hub ({type(e).__name__})"
        raise InputError(f"{reason}: give {form} instead: {name}:PATH") from e


# ------------------------------------------------------------------------------------------------------------
# several data sets, and the mix of a training step


def load_sets(specs: str, split: str, size: int = 0) -> dict[str, list[Question]]:
    """Comma-separated data sets -> {source: questions}. With `size` > 0 at most that many questions of each
    are drawn, always the same ones."""
    sets: dict[str, list[Question]] = {}
    for spec in filter(None, (s.strip() for s in specs.split(","))):
        found: dict[str, list[Question]] = {}
        for question in load(spec, split):
            found.setdefault(question.source, []).append(question)
        for source, questions in found.items():
            if source in sets:
                raise InputError(f"{spec}: a second data set named {source}")
            if 0 < size < len(questions):  # a random draw, because the files of MMLU are sorted by subject
                questions = random.Random(0).sample(questions, size)
            sets[source] = questions
    return sets


def mix(sources: dict[str, list[Question]], n: int, seed: int, step: int) -> list[Question]:
    """The `n` questions of training step `step` (from 0), in turn from each source, so that every source has
    an equal share ("balanced", arXiv 2505.07903).

    Each source is read in epochs, and each epoch is a new shuffle. If `n` is not a multiple of the number of
    sources, the next step begins with the source that is next in turn. The result depends on (seed, step)
    alone, so that a resumed run gets the questions that would have come next."""
    names = sorted(sources)
    rows = []
    for slot in range(step * n, (step + 1) * n):  # number of the question since the start of the run
        name, i = names[slot % len(names)], slot // len(names)
        epoch, position = divmod(i, len(sources[name]))
        rows.append(sources[name][_shuffled(len(sources[name]), f"{seed} {name} {epoch}")[position]])
    return rows


@lru_cache(maxsize=16)
def _shuffled(n: int, key: str) -> list[int]:
    return random.Random(key).sample(range(n), n)
