"""parallel.py: runs in one, two and four processes, which are the same runs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds import arguments, timeless, write_world

TESTS = Path(__file__).parent
RUNS = {  # name: words in front of the flags (see ranks.run), and flags
    "plain": "--num_iterations 2 --eval_size 3",
    "tied": "silent --gradient_checkpointing",
    "skipped": "skipped",
    "bf16": "--bf16 --learning_rate 0.00001 --save_fp32",
}


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    return os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in names.items()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(size: int, *argv: str) -> list[subprocess.Popen]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(TESTS / "ranks.py"), *argv], env=environment(rank, size, port), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(size)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """The outputs of processes that have to end well."""
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The directory of all runs: NAME-SIZE, and resumed-A-B for a run begun by A processes and ended by B."""
    folder = tmp_path_factory.mktemp("ranks")
    flags = write_world(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(flags["model"], tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(folder / "tied")
    AutoTokenizer.from_pretrained(flags["model"]).save_pretrained(folder / "tied")
    flags |= {"max_steps": "3", "log_completions": "16", "eval": f"{folder}/known.jsonl"}

    def line(name: str, size: int) -> list[str]:
        changed = {"output_dir": f"{folder}/{name}-{size}"} | ({"model": f"{folder}/tied"} if name == "tied" else {})
        return [*arguments(flags | changed), *RUNS[name].split()]

    def resumed(a: int, b: int) -> list[str]:
        path = f"{folder}/resumed-{a}-{b}"
        return ["--output_dir", path, "--resume", "--max_steps", "3"]

    def begun(a: int, b: int) -> list[str]:
        return [*line("plain", a), "--output_dir", f"{folder}/resumed-{a}-{b}", "--max_steps", "2"]

    lines = {size: [line(name, size) for name in RUNS] for size in (1, 2, 4)}
    lines[1] += [begun(1, 2)]
    lines[2] += [resumed(1, 2), begun(2, 4), begun(2, 1)]
    lines[4] += [resumed(2, 4)]
    for size, runs in lines.items():
        (folder / "runs.json").write_text(json.dumps(runs))
        outputs = finish(start(size, str(folder / "runs.json")))
        (folder / f"outputs-{size}.json").write_text(json.dumps(outputs))
    (folder / "runs.json").write_text(json.dumps([resumed(2, 1)]))
    finish(start(1, str(folder / "runs.json")))
    return folder


def test_x(folder):
    print(folder)
