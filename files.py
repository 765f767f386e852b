"""Reads the files that people bring: JSON lines, a JSON list, MMLU's CSV and parquet, packed or not. Here is
`InputError` too, which the files on text alone can import.

The ending of a file's name tells its format (any but .csv, .json and .parquet means JSONL), and its first
bytes tell whether it is packed with gzip or bzip2. A file that holds something else than its name says is
refused, and the message says what it holds.

    for where, row in rows(Path("dev.jsonl.gz")):      # where: "dev.jsonl.gz:1"; row: a dict
        ...
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class InputError(ValueError):
    """Something that the user gave cannot be used: a flag, a file, a model, or a size that does not fit the
    memory. The message is one line that names what is wrong and where. A program prints it and exits with
    code 2."""


UNPACK = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open}  # first bytes -> function that opens a packed file
FOREIGN = {  # first bytes -> what the file is
    b"PAR1": "parquet; its name has to end with .parquet, and only a data set can be parquet",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\xfd7zXZ\x00": "packed with xz; only gzip and bzip2 are read",
    b"\x28\xb5\x2f\xfd": "packed with zstd; only gzip and bzip2 are read",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\xff\xfe\x00\x00": "UTF-32, not UTF-8",
    b"\xff\xfe": "UTF-16, not UTF-8",
    b"\xfe\xff": "UTF-16, not UTF-8",
    b"ARROW1": "an Arrow file; save it as JSONL or parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; save it as JSONL or parquet",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a pointer of git LFS, not the file itself; `git lfs pull` fetches that",
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
}


def _unpacked(path) -> Path:
    """The path without the endings of packed files: dev.jsonl for dev.jsonl.gz."""
    path = Path(path)
    return _unpacked(path.with_suffix("")) if path.suffix.lower() in (".gz", ".bz2") else path


def stem(path) -> str:
    """The name of a file without its endings: "dev" for data/dev.jsonl and for dev.jsonl.gz."""
    return os.fsencode(_unpacked(path).stem).decode(errors="backslashreplace")  # a name need not be UTF-8


def format_of(path) -> str:
    """The ending of a file's name that tells its format: ".jsonl" for dev.jsonl and for dev.jsonl.gz."""
    return _unpacked(path).suffix.lower()


def open_unpacked(path) -> BinaryIO:
    """Opens a file for reading, through gzip or bzip2 if its first bytes say so. Raises InputError for a
    content that no reader of this module understands, and OSError."""
    file = open(path, "rb")
    while True:
        head = file.read(512)
        file.seek(0)
        unpack = next((function for magic, function in UNPACK.items() if head.startswith(magic)), None)
        if unpack is None:
            break
        file = unpack(file)
    parquet = format_of(path) == ".parquet"
    for magic, kind in FOREIGN.items():
        if head.lstrip().lower().startswith(magic.lower()) and not (parquet and magic == b"PAR1"):
            raise InputError(f"{path}: it is {kind}")
    if head[257:262] == b"ustar":
        raise InputError(f"{path}: it is a tar archive; unpack it first")
    if b"\0" in head and not parquet:  # neither JSON nor CSV contains this byte, and UTF-16 is full of it
        raise InputError(f"{path}: it is not UTF-8 text, but UTF-16 or binary")
    return file


def lines(path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, text) of each line. Raises InputError for a file that is missing, damaged or not
    UTF-8."""
    try:
        with open_unpacked(path) as file:
            for n, line in enumerate(file, 1):
                yield n, _text(line, path, n)
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{path}: {getattr(e, 'strerror', None) or e}") from e


def json_lines(path) -> Iterator[tuple[str, dict]]:
    """Yields (place, row) for each line of a JSONL file, except blank ones."""
    if format_of(path) == ".parquet":
        raise InputError(f"{path}: its name says parquet, and only JSONL is read here")
    first = True
    for n, line in lines(path):
        if line.strip():
            if first and re.match(r"\s*\[\s*(\{|$)", line):
                raise InputError(
                    f"{path}: it is a JSON list, not JSONL, which has one JSON object in each line"
                )
            first = False
            yield f"{path}:{n}", _object(_json(line, path, n), f"{path}:{n}")


def rows(path) -> Iterator[tuple[str, dict]]:
    """Yields (place, row) for every row of a file, whose ending tells its format. Only a JSON list is read
    into memory as a whole."""
    return {".csv": _csv, ".json": _json_list, ".parquet": _parquet}.get(format_of(path), json_lines)(path)


def _object(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{where}: this row is not a JSON object")
    return row


def _csv(path) -> Iterator[tuple[str, dict]]:
    """MMLU's table: question, A, B, C, D, letter, without a header. A quoted question can span lines."""
    reader = csv.reader((line for _, line in lines(path)), strict=True)  # strict: open quotes are errors
    where = f"{path}:1"
    try:
        for cells in reader:
            if cells and len(cells) != 6:
                raise InputError(f"{where}: {len(cells)} columns instead of 6 (question, A, B, C, D, letter)")
            if cells:
                row = {"question": cells[0], "choices": cells[1:5], "answer": cells[5], "subject": stem(path)}
                yield where, row
            where = f"{path}:{reader.line_num + 1}"
    except csv.Error as e:
        raise InputError(f"{where}: not CSV: {e}") from e


def _json_list(path) -> Iterator[tuple[str, dict]]:
    text = "".join(line for _, line in lines(path))
    if text.lstrip().startswith("{"):
        one, rest = text.strip().partition("\n")[::2]
        try:
            json.loads(one)
            kind = "JSONL" if rest else "one JSON object, or JSONL with one row"
            kind += "; the name of JSONL, with one JSON object in each line, has to end with .jsonl"
        except ValueError:
            kind = "a JSON object, not a JSON list of rows"
        raise InputError(f"{path}: it is {kind}")
    content = _json(text, path, 1)
    if not isinstance(content, list):
        raise InputError(f"{path}: not a JSON list of rows")
    return ((f"{path}, row {n}", _object(row, f"{path}, row {n}")) for n, row in enumerate(content, 1))


def _parquet(path) -> Iterator[tuple[str, dict]]:
    n, head = 0, b""
    try:
        with open_unpacked(path) as file:
            head = file.peek(4)[:4]
            from pyarrow import parquet

            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    n += 1
                    yield f"{path}, row {n}", row
    except InputError:
        raise
    except Exception as e:  # pyarrow is missing or the file is broken; its errors have no common class
        if head and head != b"PAR1":
            raise InputError(f"{path}: its name says parquet, and its content is something else") from e
        reason = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        raise InputError(f"{path}, after row {n}: not readable as parquet: {reason}") from e


def _text(raw: bytes, path, line: int) -> str:
    try:
        # Editors on Windows write a byte order mark at the start of a file. MMLU has one inside a file too,
        # which belongs to its row and is kept.
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}:{line}: not UTF-8") from e


def _json(text: str, path, line: int):
    """The value of a JSON text that starts on that line of the file."""
    try:
        value = json.loads(text.rstrip())  # so that an error at the very end is reported for the last line
        if "\\ud" in text.lower():  # half of a surrogate pair is valid JSON, but no tokenizer accepts it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as e:  # malformed, half a pair, a number too long, nested too deep
        line += getattr(e, "lineno", 1) - 1
        raise InputError(f"{path}:{line}: not JSON: {getattr(e, 'msg', e)}") from e
