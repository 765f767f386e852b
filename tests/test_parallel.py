"""parallel.py: a run in two or four processes is the run of one process. ranks.py makes the runs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import MISTAKES
from safetensors.torch import load_file
from worlds import arguments, run_main, timeless

import parallel
from config import Config
from data import InputError
from disk import checkpoints

RANKS = Path(__file__).parent / "ranks.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="the processes are forked"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of all runs: plain-2 was made by two processes, resumed-2-4 was begun by two and ended by
    four."""
    folder = tmp_path_factory.mktemp("ranks")
    made = subprocess.run(
        [sys.executable, RANKS, folder], capture_output=True, text=True, env=ENVIRONMENT, timeout=280
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(a: Path, b: Path, norm: float, sampler: float):
    """Same episodes, counts, advantages, evaluation and files; figures equal but for rounding. `norm`:
    relative tolerance of the gradient's norm; `sampler`: absolute one of sampler_logp_diff."""
    one, other = ([json.loads(x) for x in (f / "transcripts.jsonl").open()] for f in (a, b))
    assert len(one) == 16 * len(timeless(a / "metrics.jsonl")) and one == other
    rows = zip(timeless(a / "metrics.jsonl"), timeless(b / "metrics.jsonl"), strict=True)
    for row, same in rows:
        assert row.keys() == same.keys()
        for name, value in row.items():
            if "grad_norm" in name:
                assert same[name] == pytest.approx(value, rel=norm, abs=0)
            elif "sampler" in name:
                assert same[name] == pytest.approx(value, abs=sampler)
            elif isinstance(value, int) or "reward" in name or "_ratio" in name or "tools" in name:
                assert same[name] == value
            else:
                assert same[name] == pytest.approx(value, abs=1e-6)
    if (a / "eval.json").exists():
        assert json.loads((a / "eval.json").read_text()) == json.loads((b / "eval.json").read_text())
    assert {p.relative_to(a) for p in a.rglob("*")} == {p.relative_to(b) for p in b.rglob("*")}
    last = [checkpoints(f)[-1] / "optimizer.safetensors" for f in (a, b)]
    kinds = [{name: (x.shape, x.dtype) for name, x in load_file(path).items()} for path in last]
    assert kinds[0] == kinds[1]


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float):
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(b[name], x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["plain", "tied", "lora", "halves"])
def test_some_processes_make_the_run_of_one(runs, name, size):
    """plain: two iterations and an evaluation of three questions, of which a rank of four gets none. tied: a
    tied head, recomputed activations, ranks without a loss token, and a step that is left out. halves: in
    each group two episodes have no engine and are not trained on."""
    one, other = runs / f"{name}-1", runs / f"{name}-{size}"
    assert_same_run(one, other, norm=1e-6, sampler=1e-6)
    assert_close(weights(one), weights(other), 1e-5)
    start = load_file(runs / ("tied" if name == "tied" else "model") / "model.safetensors")
    assert max((x - weights(one)[key]).abs().max() for key, x in start.items()) > 1e-3  # it has learnt
    states = (load_file(checkpoints(f)[-1] / "optimizer.safetensors") for f in (one, other))
    assert_close(*states, 1e-5)


def test_ranks_without_a_loss_token_and_skipped_steps_were_there(runs):
    rows = [json.loads(x) for x in (runs / "tied-2" / "transcripts.jsonl").open()]
    assert sum("1" in row["loss_mask"] for row in rows[:16]) == 8  # those of the first process
    assert timeless(runs / "tied-2" / "metrics.jsonl")[1]["grad_norm"] == float("inf")


@pytest.mark.parametrize("size", [2, 4])
def test_some_processes_with_bf16_weights_make_the_run_of_one(runs, size):
    """The gradients of one process are rounded to bf16 after every pass, those of several in other places.
    AdamW makes a step of about the learning rate of 1e-5 of every gradient, so the weights cannot be farther
    apart than 2e-5 a step; a bf16 number of 0.02, the size of the weights, has a distance of 1.2e-4 to the
    next."""
    one, other = runs / "bf16-1", runs / f"bf16-{size}"
    assert_same_run(one, other, norm=1e-2, sampler=2e-3)
    assert next(iter(weights(other).values())).dtype == torch.float32  # joined with their lower halves
    assert_close(weights(one), weights(other), 6e-5)
    gaps = torch.cat([(x - weights(one)[key]).abs().flatten() for key, x in weights(other).items()])
    assert gaps.mean() < 1e-6  # 3e-8 was seen; without the lower halves of the start model it is 2e-5
    same = [x.bfloat16() == weights(one)[key].bfloat16() for key, x in weights(other).items()]
    assert torch.cat([x.flatten() for x in same]).float().mean() > 0.95


def test_the_lower_halves_of_the_start_model_are_there(runs):
    """The learning rate is so small that a lost half, about 2e-5, would show."""
    start = load_file(runs / "model" / "model.safetensors")
    for size in (1, 2, 4):
        gaps = torch.cat(
            [(x - start[key]).abs().flatten() for key, x in weights(runs / f"bf16-{size}").items()]
        )
        assert gaps.mean() < 1.5e-5


@pytest.mark.parametrize("name", ["resumed-1-2", "resumed-2-1", "resumed-2-4"])
def test_a_run_is_resumed_by_another_number_of_processes(runs, name):
    one, other = runs / "plain-1", runs / name
    assert_same_run(one, other, norm=1e-6, sampler=1e-6)
    assert_close(weights(one), weights(other), 1e-5)


# what can go wrong


def assert_resumes(folder: Path):
    done = int(checkpoints(folder)[-1].name[11:])
    assert run_main({"output_dir": str(folder), "max_steps": str(done + 1)}, "--resume") == 0
    assert len(timeless(folder / "metrics.jsonl")) == done + 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_one_line_and_the_run_can_be_resumed(runs, victim):
    log = (runs / f"killed-{victim}.log").read_text().splitlines()
    lines = [line for line in log if line.startswith("grpo.py: error: ")]
    assert len(lines) == 1 and "another process of this run has ended; --resume continues" in lines[0]
    assert log[-1] == "exit codes [-9, 2]"
    assert_resumes(runs / f"killed-{victim}")


def test_a_signal_that_one_process_gets_stops_all_after_the_same_step(runs):
    """It gets two, as from a terminal and from torchrun; the second one does not end it at once."""
    log = (runs / "stopped.log").read_text()
    done = len(timeless(runs / "stopped" / "metrics.jsonl"))
    assert log.count(f"stopped after step {done}") == 1 and "error" not in log
    assert checkpoints(runs / "stopped")[-1].name == f"checkpoint-{done}"
    assert_resumes(runs / "stopped")


@pytest.mark.parametrize("i, error", list(enumerate(MISTAKES.values())))
def test_a_mistake_is_one_line(runs, i, error):
    line, codes = (runs / f"mistake-{i}.log").read_text().splitlines()
    assert line.startswith(f"grpo.py: error: {error}") and codes in (
        "exit codes [-15, 2]",
        "exit codes [2, 2]",
    )
    assert not (runs / f"mistake-{i}").exists()


def test_torchrun_stops_all_processes_after_the_same_step(runs, tmp_path):
    out = tmp_path / "out"
    stored = json.loads((runs / "plain-1" / "run.json").read_text())
    names = "model train corpus prompts_per_step num_generations max_completion_length learning_rate".split()
    flags = {name: str(stored[name]) for name in names} | {"output_dir": str(out), "max_steps": "1000"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", RANKS]
    agent = subprocess.Popen(
        [*command, *arguments(flags)], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for _ in range(2000):
        if (out / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    agent.send_signal(signal.SIGTERM)
    output, errors = agent.communicate(timeout=100)
    done = len(timeless(out / "metrics.jsonl"))
    assert output.count(f"stopped after step {done}") == 1, output + errors
    assert [path.name for path in checkpoints(out)] == [f"checkpoint-{done}"]
    assert not (out / "lock").exists()
    assert_resumes(out)


def seen_from(rank: int, size: int) -> parallel.Ranks:
    """A Ranks for methods that need no other process."""
    world = object.__new__(parallel.Ranks)
    world.rank, world.size = rank, size
    return world


def test_what_several_processes_cannot_share_is_refused():
    config = Config(prompts_per_step=6)
    seen_from(0, 3).check(config)
    with pytest.raises(InputError, match="--prompts_per_step 6: 4 processes cannot share it evenly"):
        seen_from(0, 4).check(config)
    with pytest.raises(InputError, match="--simulator some/model: several processes need --corpus"):
        seen_from(0, 2).check(replace(config, simulator="some/model"))


def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match="WORLD_SIZE is set but RANK is not: start the processes by torchrun"
    ):
        parallel.Ranks()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 64])
def test_blocks_are_contiguous_and_even(n, size):
    blocks = [seen_from(rank, size).block(n) for rank in range(size)]
    assert [i for block in blocks for i in block] == list(range(n))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
