"""Questions in, prompts out: what a row is, how a method talks, the loaders, the balanced mix of a step.

Here: `Question`, `Doc`, `Template` and the prompt of every method, one loader for each data set, the mix as a
function of (seed, step), and `neutralise`, which turns foreign text into text that cannot act as a tag or a
special token. Not here: retrieval (retriever.py), answer matching (reward.py).

    from data import load, render, SEM
    questions = load("mmlu:data/mmlu")                 # a name and a path in the set's official format
    ids = render(SEM, questions[0], tokenizer)         # the prompt, through the tokenizer's own chat template
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from jinja2 import TemplateError


class DataError(ValueError):
    """Bad input from outside: the message is one line that names what is wrong and where. Programs print it
    and exit with 2."""


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    answers: list[str]  # any one of them is right; for multiple choice the letter
    source: str  # name of the data set: the mix is balanced by it and the metrics are split by it
    choices: list[str] | None = None  # the options of a multiple-choice question, A first

    def in_words(self) -> list[str]:
        """The answers as a reader sees them: of multiple choice the options' texts."""
        return [self.choices[ord(a) - 65] for a in self.answers] if self.choices else self.answers


@dataclass(frozen=True)
class Doc:
    id: str
    title: str
    text: str
    score: float = 0.0  # set by the retriever that returned it


@dataclass(frozen=True)
class Template:
    """How a method talks: the system prompt, the names of its four tags, and who says what when."""

    system: str
    think: str = "think"
    answer: str = "answer"
    search: str = "search"
    result: str = "result"
    draft: bool = False  # the first answer comes before any search, and may be the last
    boxed: bool = False  # the answer stands in \boxed{} inside its tags
    raw: bool = False  # no tags at all: the whole text is the answer
    own_results: bool = False  # the model writes the results too; these tokens are not trained on
    answer_ends: bool = False  # </answer> ends the episode, as an end token does
    retry: str = ""  # what a turn without a query and without an answer is told; none: it ends the episode

    @property
    def tags(self) -> tuple[str, str, str, str]:
        return self.think, self.answer, self.search, self.result


# The wording of every prompt is ours; none holds a filled-in example, so there is no placeholder to copy.
# Tags, order and rules are the papers'. Instructions are the system message (Search-R1 and ZeroSearch put
# theirs into the user's), so that the question stands alone in its turn whatever the method.

SHORT = "An answer is a few words, or the letter alone if options are given."

# arXiv 2505.07903; section 2.3, the paper's own prompt, is not public in text form
SEM = Template(
    "You answer questions, and you may use a search engine when your own knowledge is not enough. First "
    "reason between <think> and </think>, then give your best answer between <answer> and </answer>. If you "
    "are sure of it, stop there. If you are not, write a query between <search> and </search>; what the "
    "search engine finds comes back between <result> and </result>. After a result you may reason again "
    "between <think> and </think>, and search again with another query. When you know enough, give the final "
    f"answer between <answer> and </answer>. {SHORT}",
    draft=True,
)

# arXiv 2503.09516 and github.com/PeterGriffinJin/Search-R1; ZeroSearch (arXiv 2505.04588) talks the same way
SEARCH_R1 = Template(
    "You answer questions, and you may use a search engine. Reason between <think> and </think> every time "
    "you learn something new. If you find that some knowledge is missing, write a query between <search> and "
    "</search>; what the search engine finds comes back between <information> and </information>. Search as "
    "often as you want. When nothing more is needed, give the answer alone between <answer> and </answer>. "
    f"{SHORT}",
    result="information",
    answer_ends=True,
    retry="\nThat was neither a query nor an answer. I have to write a query between <search> and </search>, "
    "or the answer between <answer> and </answer>. Let me try again.\n",
)

# arXiv 2503.19470 and github.com/Agent-RL/ReCall, branch re-search
RESEARCH = Template(
    "You solve questions step by step, with a search tool. First reason between <think> and </think>. "
    "When you need a fact, write a query between <search> and </search>; what the tool finds comes back "
    "between <result> and </result>, and you reason on. At the end write one answer between <answer> and "
    f"</answer>, with the final exact answer in \\boxed{{}} inside it. {SHORT}",
    boxed=True,
)

# arXiv 2508.10874 and github.com/TsinghuaC3I/SSRL: Search-R1's instruction, but the model is its own engine
SSRL = Template(
    "You answer questions by searching your own knowledge. Reason between <think> and </think> every time "
    "you learn something new. If some knowledge is missing, write a query between <search> and </search>, "
    "and then yourself write what a search engine would find, its top results, between <information> and "
    "</information>. Search as often as you want. When nothing more is needed, reason a last time between "
    f"<think> and </think> and give the answer alone between <answer> and </answer>. {SHORT}",
    result="information",
    own_results=True,
)

# What the methods are compared with. The first one also measures what a model knows: it mentions neither a
# tool nor tags.
DIRECT = Template(f"Answer the question. Write only the answer, nothing else. {SHORT}", raw=True)
COT = Template(
    "Answer the question. First reason step by step between <think> and </think>, then give the answer alone "
    f"between <answer> and </answer>. {SHORT}"
)
RAG = Template(  # naive RAG as FlashRAG (github.com/RUC-NLPIR/FlashRAG) has it: one retrieval, no reasoning
    f"Answer the question by the documents given. Write only the answer, nothing else. {SHORT}", raw=True
)


# ------------------------------------------------------------------------------------------------------------
# from a question to prompt ids


@lru_cache(maxsize=8)
def _foreign_marks(tokenizer, template: Template) -> tuple[re.Pattern, frozenset[int]]:
    """What foreign text must not hold: a pattern of our tags and all added tokens, and the ids of these."""
    added = tokenizer.added_tokens_decoder  # id -> AddedToken
    texts = sorted((t.content for t in added.values() if t.content.strip()), key=len, reverse=True)
    tags = rf"<\s*/?\s*(?:{'|'.join(template.tags)})\s*/?\s*>"
    return re.compile("|".join([tags, *map(re.escape, texts)]), re.IGNORECASE), frozenset(added)


def neutralise(text: str, tokenizer, template: Template) -> str:
    """`text` with every tag of the template and every added token of the tokenizer broken by a space after
    its first character.

    The tokenizer option `split_special_tokens=True` alone is not enough: it covers only tokens marked
    special, and Qwen2.5 keeps <tool_call> and <|fim_prefix|>, Phi-3 keeps </s>."""
    pattern, _ = _foreign_marks(tokenizer, template)
    # a tokenizer may normalise: full-width letters become ASCII, characters without width vanish
    plain = unicodedata.normalize("NFKC", "".join(c for c in text if unicodedata.category(c) != "Cf"))
    text = plain if pattern.search(plain) else text
    return pattern.sub(lambda m: m[0][0] + " " + m[0][1:], text)


@lru_cache(maxsize=4096)  # the episodes of a group search alike, and find the same passages
def encode_foreign(text: str, tokenizer, template: Template) -> tuple[int, ...]:
    """Token ids of a text that somebody else wrote (a passage), without tags of ours and ids of added tokens.

    Runs of whitespace become one blank: some tokenizers have added tokens made of blanks and newlines."""
    _, added = _foreign_marks(tokenizer, template)
    text = neutralise(" ".join(text.split()), tokenizer, template)
    text = " ".join(text.split())  # again: "< think>" is now "<  think>", a token of two blanks is left out
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    # what is left out here: an added token of one character, which no space can break
    return tuple(i for i in ids if i not in added)


def encode_result(docs: list[Doc], tokenizer, template: Template, max_doc_tokens: int = 512) -> list[int]:
    """Ids of a search result: the documents between the result tags, each "title: text" cut to
    `max_doc_tokens` by itself.

    The cut is made before the tags are put around it: cut the whole and the closing tag is what gets lost.
    The layout is our choice."""
    opened, newline, closed, nothing = _result_frame(tokenizer, template)
    ids = [*opened]
    for doc in docs:
        ids += encode_foreign(f"{doc.title}: {doc.text}", tokenizer, template)[:max_doc_tokens]
        ids += newline
    return ids + (closed if docs else nothing)


@lru_cache(maxsize=8)
def _result_frame(tokenizer, template: Template) -> list[list[int]]:
    """Ids of what stands around documents: before all, after each, after all, and in place of none."""
    tag = template.result
    texts = f"\n<{tag}>\n", "\n", f"</{tag}>\n", f"No results.\n</{tag}>\n"
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def render(template: Template, question: Question, tokenizer) -> list[int]:
    """Prompt ids of one question: the method's system prompt and the question, through the tokenizer's own
    chat template, once.

    Nothing is rendered again later: some chat templates drop the thoughts of earlier turns, and the ids would
    change under us."""
    letters = (f"\n{chr(65 + i)}. {choice}" for i, choice in enumerate(question.choices or []))
    asked = neutralise(question.text + "".join(letters), tokenizer, template)
    write = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    try:
        text = write([{"role": "system", "content": template.system}, {"role": "user", "content": asked}])
    except TemplateError:  # some templates (Gemma's) know no system role
        text = write([{"role": "user", "content": f"{template.system}\n\n{asked}"}])
    return tokenizer(text, add_special_tokens=False).input_ids


# ------------------------------------------------------------------------------------------------------------
# the loaders: a spec names files, files hold rows, a row becomes a question


def load(spec: str, split: str = "train") -> list[Question]:
    """The questions of a data set, in the order of its files.

    `spec` is a name of `_SETS` (read from the Hugging Face hub), `name:path` (a file or folder in the set's
    official format) or a path to FlashRAG-style JSONL: {"id", "question", "golden_answers"}. Where such a row
    has "choices", the texts of options, golden_answers hold the letter. A row with "golden_answers" is read
    so under every name. The source of a question is the name, for a bare path the file's stem.

    `split` picks the files in a folder or on the hub; where the path is a file it means nothing. It is train,
    dev or test; val and validation are dev in a set that has no val of its own. Where the test answers are
    hidden (MuSiQue, HotpotQA, 2Wiki) test is dev. MMLU's train is its auxiliary_train, in a folder without it
    val, then dev, never test.

    Every mistake in the data is a DataError of one line that names the file and the line or row."""
    name, parse, path = _resolve(spec)
    questions, dropped = [], 0
    for file in _files(name, path, split):
        for n, (where, row) in enumerate(_rows(file)):
            if row.get("answerable") is False:  # MuSiQue-Full has questions whose evidence was taken out
                dropped += 1
                continue
            try:
                fields = (_flashrag if "golden_answers" in row else parse)(row, n)
            except KeyError as e:
                raise DataError(f"{where}: no key {e}") from e
            except (TypeError, AttributeError) as e:
                raise DataError(f"{where}: a value has the wrong type ({e})") from e
            questions.append(_question(name, where, *fields))
    if dropped:
        rows = dropped + len(questions)
        print(f"{name}: {dropped} of {rows} rows are unanswerable and were dropped", file=sys.stderr)
    if not questions:
        raise DataError(f"{spec}: no questions in it")
    return questions


def paragraphs(spec: str, split: str = "train") -> list[Doc]:
    """The corpus that a multi-hop set brings along: the paragraphs of all its rows, of unanswerable ones too,
    each (title, text) once, in order, ids "0", "1", ... Empty for a set without any. Errors as in `load`."""
    name, parse, path = _resolve(spec)
    if parse not in (_musique, _two_hop):
        return []
    pairs = {}  # a dict and not a set: it keeps the order
    for file in _files(name, path, split):
        for where, row in _rows(file):
            try:
                pairs |= dict.fromkeys(_context(row))
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                raise DataError(f"{where}: its paragraphs are not in the official format") from e
    return [Doc(str(i), title, text) for i, (title, text) in enumerate(pairs)]


# The parsers: row n of a file -> (id, question, answers, choices). `_question` checks what they let through.


def _flashrag(row, n):
    return row["id"], row["question"], row["golden_answers"], row.get("choices")


def _musique(row, n):
    answers = [row["answer"]] + row["answer_aliases"]  # and not *: that would take a text apart
    return row["id"], row["question"], answers, None


def _two_hop(row, n):
    return row["id" if "id" in row else "_id"], row["question"], [row["answer"]], None  # on the hub, official


def _gsm8k(row, n):
    _, mark, gold = row["answer"].rpartition("####")
    return n, row["question"], [gold.replace(",", "").strip()] if mark else [], None


def _mmlu(row, n):
    letter = dict(enumerate("ABCD")).get(row["answer"], row["answer"])  # 0-3 on the hub, a letter in the CSV
    subject = row["subject"] or "auxiliary_train"  # whose rows have no subject on the hub
    return f"{subject}-{n}", row["question"], [letter], row["choices"]


def _question(source: str, where: str, id, text, answers, choices) -> Question:
    if not isinstance(answers, list) or not isinstance(choices or [], list):
        raise DataError(f"{where}: answers and choices are lists")
    if not all(isinstance(t, str) for t in [text, *answers, *(choices or [])]):
        raise DataError(f"{where}: question, answers and choices are texts")
    if not text.strip():
        raise DataError(f"{where}: the question is empty")
    answers = list(dict.fromkeys(a for a in answers if a.strip()))
    if not answers:
        raise DataError(f"{where}: no answer")
    letters = [chr(65 + i) for i in range(len(choices or []))]
    for answer in answers:
        if letters and answer not in letters:
            raise DataError(f"{where}: answer {answer!r} is not one of the letters A-{letters[-1]}")
    return Question(str(id), text, answers, source, choices or None)


def _context(row: dict) -> list[tuple[str, str]]:
    """(title, text) of a row's paragraphs: MuSiQue's list, or HotpotQA's and 2Wiki's context in three forms:
    [[title, [sentence, ...]], ...] (official), two columns (hub), the same inside the metadata (FlashRAG)."""
    if "paragraphs" in row:
        pairs = [(p["title"], p["paragraph_text"]) for p in row["paragraphs"]]
    else:
        context = row["context"] if "context" in row else row["metadata"].get("context", [])
        if isinstance(context, dict):
            sentences = context["sentences" if "sentences" in context else "content"]
            context = zip(context["title"], sentences, strict=True)
        # list.copy takes lists only; HotpotQA's sentences mostly start with their blank, 2Wiki's do not
        pairs = [(title, " ".join(s.strip() for s in list.copy(sentences))) for title, sentences in context]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise TypeError("not a text")
    return pairs


FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
_SETS = {  # name: repo on the hub, parser of a row, what to give where the hub cannot be used
    "musique": ("dgslibisey/MuSiQue", _musique, "the official JSONL file"),
    "mmlu": ("cais/mmlu", _mmlu, "the official CSV folder"),
    "hotpotqa": ("hotpotqa/hotpot_qa", _two_hop, "the official JSON file"),
    "2wikimultihopqa": (FLASHRAG, _two_hop, "the official JSON file"),  # with 15,000 of the training rows
    "gsm8k": ("openai/gsm8k", _gsm8k, "the official JSONL file"),
    "nq": (FLASHRAG, _flashrag, "a FlashRAG JSONL file"),
    "triviaqa": (FLASHRAG, _flashrag, "a FlashRAG JSONL file"),
    "popqa": (FLASHRAG, _flashrag, "a FlashRAG JSONL file"),
    "bamboogle": (FLASHRAG, _flashrag, "a FlashRAG JSONL file"),
}
_FILES = {  # name, split: files on the hub, patterns in a folder (the first that fits is read)
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
    """(source, parser, path or ""). The name is looked up whole: by substring, "nqx" would be "nq"."""
    name, colon, path = spec.partition(":")
    if name in _SETS and bool(colon) == bool(path):
        return name, _SETS[name][1], path
    if os.path.isfile(spec):
        return Path(spec).stem, _flashrag, spec
    names = ", ".join(_SETS)
    raise DataError(f"{spec!r} is neither a file nor a data set (NAME or NAME:PATH, NAME one of {names})")


def _files(name: str, path: str, split: str) -> list[Path]:
    if path and not os.path.isdir(path):
        return [Path(path)]
    split = "val" if split == "validation" else split
    if (name, split) not in _FILES and split in ("val", "test"):
        split = "dev"
    if (name, split) not in _FILES:
        splits = ", ".join(s for n, s in _FILES if n == name)
        raise DataError(f"{name} has no split {split!r}: it has {splits}")
    remote, local = (names.split() for names in _FILES[name, split])
    if not path:
        return _download(name, remote)
    for pattern in local:
        for folder in (Path(path), Path(path, "data")):
            if files := sorted(folder.glob(pattern)):
                return files
    raise DataError(f"{path}: no {' or '.join(local)} in it")


def _download(name: str, files: list[str]) -> list[Path]:
    repo, _, form = _SETS[name]
    try:
        if files[0].endswith(".parquet"):
            import pyarrow.parquet  # noqa: F401 (asked before the download, not after it)
        from huggingface_hub import hf_hub_download

        return [Path(hf_hub_download(repo, file, repo_type="dataset")) for file in files]
    except ImportError as e:
        advice = f"pip install pyarrow, or give {form}: {name}:PATH"
        raise DataError(f"{repo} is stored as parquet: {advice}") from e
    except Exception as e:  # no network, no access, a full disk, a broken proxy: they share no class
        reason = f"{repo} cannot be fetched from the hub ({type(e).__name__})"
        raise DataError(f"{reason}: give {form} instead: {name}:PATH") from e


def _rows(file: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row. The file's ending names its format; all but a JSON list are streams."""
    read = {".csv": _csv, ".json": _json_list, ".parquet": _parquet}.get(file.suffix, _jsonl)
    try:
        for where, row in read(file):
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row is a JSON object")
            yield where, row
    except OSError as e:
        raise DataError(f"{file}: {e.strerror or e}") from e


def _jsonl(file: Path) -> Iterator[tuple[str, dict]]:
    return ((f"{file}:{n}", _json(line, file, n)) for n, line in _lines(file) if line.strip())


def _csv(file: Path) -> Iterator[tuple[str, dict]]:
    """MMLU's table has no header: question, A, B, C, D, letter. A quoted question may have several lines."""
    reader = csv.reader((line for _, line in _lines(file)), strict=True)  # strict: an open quote is an error
    where = f"{file}:1"
    try:
        for cells in reader:
            if cells and len(cells) != 6:
                raise DataError(f"{where}: {len(cells)} columns instead of 6 (question, A, B, C, D, letter)")
            if cells:
                row = {"question": cells[0], "choices": cells[1:5], "answer": cells[5], "subject": file.stem}
                yield where, row
            where = f"{file}:{reader.line_num + 1}"
    except csv.Error as e:
        raise DataError(f"{where}: not CSV: {e}") from e


def _json_list(file: Path) -> Iterator[tuple[str, dict]]:
    rows = _json(_text(file.read_bytes(), file, 1), file, 1)
    if not isinstance(rows, list):
        raise DataError(f"{file}: not a JSON list of rows")
    return ((f"{file}, row {n}", row) for n, row in enumerate(rows, 1))


def _parquet(file: Path) -> Iterator[tuple[str, dict]]:
    n = 0
    try:
        from pyarrow import parquet

        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                n += 1
                yield f"{file}, row {n}", row
    except Exception as e:  # no pyarrow, a broken file: its errors have many classes
        reason = str(e).partition("\n")[0]
        raise DataError(f"{file}, after row {n}: not readable as parquet: {reason}") from e


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with open(file, "rb") as f:
        for n, line in enumerate(f, 1):
            yield n, _text(line, file, n)


def _text(raw: bytes, file: Path, line: int) -> str:
    try:
        # Windows editors put a mark in front of the file; inside, MMLU has one that belongs to its row
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as e:
        line += raw.count(b"\n", 0, e.start)
        raise DataError(f"{file}:{line}: not UTF-8") from e


def _json(text: str, file: Path, line: int):
    """The value of a JSON text that starts on that line of the file."""
    try:
        value = json.loads(text.rstrip())  # an error at the very end belongs to the last line
        if "\\ud" in text.lower():  # half of a surrogate pair is JSON but no text: no tokenizer takes it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as e:  # malformed, half a pair, 5,000 digits; a thousand brackets
        line += getattr(e, "lineno", 1) - 1
        raise DataError(f"{file}:{line}: not JSON: {getattr(e, 'msg', e)}") from e


# ------------------------------------------------------------------------------------------------------------
# the mix of a training step


def mix(sources: dict[str, list[Question]], n: int, seed: int, step: int) -> list[Question]:
    """The `n` questions of training step `step` (from 0): equal shares of every source ("balanced", arXiv
    2505.07903), interleaved.

    Each source is an endless row of epochs, each epoch a shuffle of its own. A share that does not divide
    evenly moves on by one source a step. All of it is a function of (seed, step), so a resumed run continues
    with the batch that would have come next."""
    names = sorted(sources)
    rows = []
    for slot in range(step * n, (step + 1) * n):  # slot: number of the question since the start of the run
        name, i = names[slot % len(names)], slot // len(names)
        epoch, position = divmod(i, len(sources[name]))
        rows.append(sources[name][_order(len(sources[name]), f"{seed} {name} {epoch}")[position]])
    return rows


@lru_cache(maxsize=16)
def _order(n: int, key: str) -> list[int]:
    return random.Random(key).sample(range(n), n)
