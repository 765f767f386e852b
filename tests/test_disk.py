"""python -m pytest tests/test_disk.py

The directory of a run: who may write into it, logs that no crash spoils, and models that others can load.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import run_main

import disk
from data import InputError
from disk import append_rows, drop_later_rows, lock, read_lines, write_model

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------------------------------
# the lock


def test_a_folder_has_one_owner(tmp_path):
    with lock(f"{tmp_path}/run"):
        with pytest.raises(InputError, match=f"{tmp_path}/run: process {os.getpid()} on .* is using it"):
            with lock(f"{tmp_path}/run"):
                pytest.fail("two owners")
        with lock(f"{tmp_path}/other"):
            pass
        (tmp_path / "run" / "run.json").write_text("{}")
    with lock(f"{tmp_path}/run"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "run.json"]


def test_a_lock_is_gone_with_its_process(tmp_path):
    code = (
        f"import time, disk\nwith disk.lock({str(tmp_path)!r}):\n  print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {owner.pid} on"):
        with lock(str(tmp_path)):
            pytest.fail("two owners")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with lock(str(tmp_path)):
        pass


@pytest.mark.parametrize("reason", ["no flock", "refused"])
def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, capsys, reason):
    if reason == "no flock":
        monkeypatch.setattr(disk, "fcntl", None)
    else:

        def refuse(*arguments):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with lock(str(tmp_path)):
        pass
    text = "".join(capsys.readouterr())
    assert text.count("warning") == 1 and "cannot be locked" in text


@pytest.mark.parametrize("switches", [(), ("--resume",)])
def test_a_second_run_is_refused_while_the_first_lives(world, lively, tmp_path, switches):
    """Before anything is read: neither the settings nor the data are there yet when the first one starts."""
    if switches:
        assert run_main(world | {"max_steps": "2"}) == 0
    before = {p: p.stat().st_mtime_ns for p in Path(tmp_path).rglob("*") if p.is_file()}
    with lock(world["output_dir"]), pytest.raises(InputError, match=f"process {os.getpid()} on"):
        run_main(world | {"train": world["train"] if switches else "nowhere"}, *switches)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert run_main(world, *switches) == 0


# ------------------------------------------------------------------------------------------------------------
# logs

texts = st.text(
    st.characters(codec=None) | st.sampled_from("\u2028\u2029\x85\x0b\x0c\r\n\ud800é"), max_size=9
)


@settings(max_examples=40, deadline=None)
@given(st.lists(texts, max_size=5), texts, st.integers(0, 40), texts)
def check_logs(path, before, cut, n, after):
    path.unlink(missing_ok=True)
    rows = [{"step": i, "text": text} for i, text in enumerate(before)]
    append_rows(path, rows)
    torn = json.dumps({"step": 99, "text": f"{cut}é"}, ensure_ascii=False).encode(errors="replace")[: n - 1]
    with open(path, "ab") as file:
        file.write(torn)  # a row that a crash cut short, maybe inside a character
    assert [row for _, row in read_lines(path)] == rows
    append_rows(path, [{"step": 5, "text": after}])
    assert [row for _, row in read_lines(path)] == [*rows, {"step": 5, "text": after}]
    assert path.read_bytes().count(b"\n") == len(rows) + 1
    drop_later_rows(path, 2)
    assert [row for _, row in read_lines(path)] == rows[:3]


def test_no_character_and_no_crash_spoils_a_log(tmp_path):
    check_logs(tmp_path / "log.jsonl")


def test_a_row_longer_than_a_block_that_was_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    append_rows(path, [{"step": 1}])
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "text": "' + b"x" * 200_000)
    append_rows(path, [{"step": 2}])
    assert [row["step"] for _, row in read_lines(path)] == [1, 2] and path.stat().st_size < 100


def test_what_a_full_disk_leaves_is_no_half_row(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    append_rows(path, [{"step": 1}])
    code = (
        "import resource, signal, disk, pathlib; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"path = pathlib.Path({str(path)!r})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30, -1))\n"
        "try: disk.append_rows(path, [{'step': 2, 'text': 'x' * 50}]); print('written')\n"
        "except OSError as error: print(error.strerror)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
        "disk.append_rows(path, [{'step': 3}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "File too large\n", done.stderr
    assert [json.loads(line)["step"] for line in path.read_bytes().split(b"\n")[:-1]] == [1, 3]


# ------------------------------------------------------------------------------------------------------------
# models


def test_a_saved_folder_has_the_names_of_both_versions_of_transformers(world, model, tmp_path):
    """transformers 4.57.3 read such a folder with the same logits and tokens; without these names it refuses
    the tokenizer, and takes 10000 for the base of the rotary embedding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 32}
    model.config.rope_parameters = rope | {"rope_theta": 77000.0}
    tokenizer = AutoTokenizer.from_pretrained(world["model"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    write_model(model, tokenizer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["rope_theta"] == 77000.0 and config["rope_scaling"] == rope
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.rope_parameters == model.config.rope_parameters
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.all_special_ids == tokenizer.all_special_ids and loaded.get_vocab() == tokenizer.get_vocab()
    write_model(again, loaded, tmp_path / "twice")
    assert (tmp_path / "twice" / "config.json").read_text() == (
        tmp_path / "saved" / "config.json"
    ).read_text()


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """What stops the program before the end of the new file leaves the old one."""

    def fails(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / "run.json").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError):
            disk.replace_bytes(tmp_path / "run.json", b"new")
    assert (tmp_path / "run.json").read_text() == "old"
    disk.replace_bytes(tmp_path / "run.json", b"new")
    assert (tmp_path / "run.json").read_text() == "new"


@pytest.mark.parametrize("kind", ["partial", "longrope"])
def test_the_names_of_the_rotary_embedding_of_phi(world, model, tmp_path, kind):
    """Both were tried in transformers 4.57.3, with equal logits."""
    from transformers import AutoTokenizer

    rope = {"rope_theta": 9000.0, "partial_rotary_factor": 0.75, "rope_type": "default"}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    if kind == "longrope":
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": 32, **factors}
    model.config.rope_parameters = rope
    write_model(model, AutoTokenizer.from_pretrained(world["model"]), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["rope_theta"] == 9000.0 and config["partial_rotary_factor"] == 0.75
    assert config["rope_parameters"] == rope
    if kind == "longrope":
        assert config["rope_scaling"] == {"type": "longrope", **factors}
        assert config["original_max_position_embeddings"] == 32


def test_an_error_of_the_tokenizers_library_is_an_error_of_the_disk(world, model, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "saved" / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(OSError, match="os error"):
        write_model(model, AutoTokenizer.from_pretrained(world["model"]), tmp_path / "saved")


def test_a_checkpoint_may_hold_folders(tmp_path):
    """transformers writes one if a tokenizer has several chat templates."""
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    disk.flush(tmp_path)


def test_fp32_weights_are_written_with_the_buffers_of_the_model(model, world, tmp_path):
    """Some mixtures of experts keep a correction of their router in a buffer. Buffers that are computed, such
    as those of the rotary embedding, are not stored."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    model.bfloat16().model.register_buffer("correction", torch.tensor([1.0, 2.0]))
    full = {name: p.float() + 1 for name, p in model.named_parameters()}
    write_model(model, AutoTokenizer.from_pretrained(world["model"]), tmp_path / "saved", full)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored.keys() == full.keys() | {"model.correction"}
    assert stored["model.correction"].tolist() == [1.0, 2.0]
