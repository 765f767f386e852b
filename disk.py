"""What a run does with its directory: it holds a lock, appends to logs, and writes whole files and models.

The logs are read and written as bytes, and only b"\\n" ends a row. Text functions would cut rows at other
characters too (U+2028, U+0085), and would stop at a row that a crash cut inside a character.

    with lock("out/sem"):                              # InputError if another process holds it
        append_rows(Path("out/sem/metrics.jsonl"), [{"step": 1, "reward": 0.5}])
    for line, row in read_lines(Path("out/sem/metrics.jsonl")):
        ...
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from files import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def lock(folder: str):
    """Holds the directory of a run, so that no second process writes into it. The lock is gone with the
    process, however it ends. Raises InputError while another process holds it. Where the file system has no
    locks, it warns. A directory that is still empty at the end is removed."""
    path = Path(folder, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise BlockingIOError  # the other process has removed this file just now
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise InputError(f"--output_dir {folder}: process {owner} is using it") from error
        except OSError as error:
            tqdm.write(f"warning: {folder} cannot be locked ({error}); do not start a second run in it")
        try:
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                path.parent.rmdir()


def append_rows(path: Path, rows: list[dict]):
    """Appends rows to a log. A half-written row at its end, which a crash or a full disk has left, is removed
    first. Raises OSError."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 2**16)
            file.seek(start)
            if (at := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + at + 1
                break
            end = start
        file.truncate(end)
        # half a surrogate pair becomes its JSON escape
        file.write(text.encode(errors="backslashreplace"))


def read_lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Yields (line, row) of a log, without the rows that a crash or a full disk cut short."""
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and line.endswith(b"\n"):
                yield line, row


def drop_later_rows(path: Path, last_step: int):
    """Removes the rows of later steps from a log, and those that were cut short."""
    if path.exists():
        kept = [line for line, row in read_lines(path) if row.get("step", last_step + 1) <= last_step]
        replace_bytes(path, b"".join(kept))


def replace_bytes(path: Path, content: bytes):
    """Writes a file completely or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    complete = (p.parent for p in out.glob("checkpoint-*/trainer_state.json"))
    return sorted((p for p in complete if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def flush(folder: Path):
    """Waits until the files of a directory are on the disk."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb+") as file:  # Windows flushes only what can be written to
            os.fsync(file.fileno())
    flush_names(folder)


def flush_names(folder: Path):
    """Waits until the names of the files of a directory are on the disk; Windows has no call for that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_model(model, tokenizer, folder: Path, full: dict | None = None):
    """Writes a Hugging Face directory that transformers 4.57 and 5 read alike, with the weights `full`, all
    of one dtype, in place of the model's if they are given. Raises OSError and SafetensorError.

    transformers 5 writes names that version 4 does not know. Version 4 would refuse the tokenizer, and would
    silently read the model with another base of the rotary embedding. So both names are written."""
    if full:
        full = {name: x for name, x in model.named_buffers() if name in model.state_dict()} | full
    model.save_pretrained(folder, state_dict=full)
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower, for a full disk too
        raise OSError(str(error)) from error
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(settings.get("rope_parameters") or {})
    if "rope_theta" in rope:
        settings["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            settings["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        if rope.get("rope_type") == "longrope":  # version 4 takes no other keys for Phi-3
            settings["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
            factors = {key: rope[key] for key in ("short_factor", "long_factor")}
            settings["rope_scaling"] = {"type": "longrope", **factors}
        elif rope.get("rope_type", "default") != "default":
            settings["rope_scaling"] = rope
    if full:
        settings["dtype"] = str(next(iter(full.values())).dtype).removeprefix("torch.")
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
