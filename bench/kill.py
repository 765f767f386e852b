"""What a run survives: it is killed, interrupted, started twice, and gets no room on the disk. Afterwards it
is resumed, and its weights and logs (but for times, and rows that found no room) are compared bit for bit
with those of a run that nothing disturbed.

    python bench/kill.py                                # in the toy world; prints a table
    python bench/kill.py --flags "--model DIR --train a.jsonl --corpus c.jsonl"

Half of the kills come at random moments. The other half come just before a random one of the calls by which
Python opens, renames or removes a file in the directory of the run. Weights and tokenizers are written by
Rust code, whose calls are not seen: only the random moments can fall inside of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

import grpo
from config import parse
from data import InputError
from disk import read_lines

TIMES = ("seconds/", "step_time", "tokens/s")  # metrics that differ from run to run
MINUTES = 10  # after which a child that does not end is given up


@dataclass
class Config:
    """Kills a training run at many moments, resumes it, and compares the result."""

    output_dir: str = "out/kill"  # a folder for the runs; it is removed first
    kills: int = 20  # number of runs that are killed by SIGKILL
    steps: int = 12  # steps of each run, with a checkpoint every second one
    seed: int = 0  # of the moments
    flags: str = ""  # further flags of grpo.py, separated by blanks


# ------------------------------------------------------------------------------------------------------------
# a run in a child process


def spawn(flags: list[str], log: Path, hook: Callable = lambda: None) -> int:
    """Starts grpo.py with these flags in a fork, which saves the import of torch. Returns its process id.
    `hook` is called in the child first."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = ["grpo.py", *flags]
        hook()
        grpo.program()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child, negative for a signal."""
    end = time.monotonic() + 60 * MINUTES
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    raise InputError(f"process {child} did not end within {MINUTES} minutes")


def at_file_call(out: Path, n: int, act: Callable):
    """Calls `act` before the n-th call that opens, renames or removes a file in `out`. Returns the list whose
    length counts them."""
    calls: list[str] = []

    def hook(event, arguments):
        watched = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
        if watched and str(arguments[0]).startswith(str(out)):
            calls.append(event)
            if len(calls) == n:
                act()

    sys.addaudithook(hook)
    return calls


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------------
# what is compared


def differences(out: Path, reference: Path, logs: bool = True) -> str:
    """What differs from the reference: "none", or the names. With
    `logs=False` rows may be missing from the logs, but those that are there must be equal."""
    found = []
    if (out / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes():
        found.append("weights")
    if (out / "eval.json").exists() and (out / "eval.json").read_bytes() != (
        reference / "eval.json"
    ).read_bytes():
        found.append("eval.json")
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        ours, theirs = ([timeless(row) for _, row in read_lines(f / name)] for f in (out, reference))
        if ours != theirs if logs else any(row not in theirs for row in ours):
            found.append(name)
        if len(ours) != (out / name).read_bytes().count(b"\n"):
            found.append(f"{name} is no JSONL")
    found += [p.name for p in out.iterdir() if p.name.endswith(".tmp") or p.name == "lock"]
    return ", ".join(found) or "none"


def timeless(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(TIMES)}


def checkpoints(out: Path) -> list[str]:
    return sorted(
        (p.name for p in out.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1].split(".")[0])
    )


# ------------------------------------------------------------------------------------------------------------
# the cases


class Trial:
    """One disturbed run: its directory, its flags, and what has been seen of it."""

    def __init__(self, folder: Path, name: str, flags: list[str]):
        self.out, self.log = folder / name, folder / f"{name}.log"
        self.flags = [*flags, "--output_dir", str(self.out)]

    def run(self, *more: str, hook: Callable = lambda: None) -> int:
        return wait(spawn([*self.flags, *more], self.log, hook))

    def finish(self) -> int:
        """Resumes the run, or starts it again where it was killed before it wrote its settings."""
        if (self.out / "run.json").exists():
            return wait(spawn(["--output_dir", str(self.out), "--resume"], self.log))
        return self.run()


def killed_at_a_time(trial: Trial, seconds: float) -> str:
    child = spawn(trial.flags, trial.log)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return f"SIGKILL after {seconds:.2f} s: exit {wait(child)}, {checkpoints(trial.out)}"


def killed_at_a_call(trial: Trial, n: int) -> str:
    code = trial.run(hook=lambda: at_file_call(trial.out, n, kill_self))
    return f"SIGKILL at file call {n}: exit {code}, {checkpoints(trial.out)}"


def signalled(trial: Trial, seconds: float, numbers: tuple[int, ...]) -> str:
    child = spawn(trial.flags, trial.log)
    time.sleep(seconds)
    for number in numbers:
        os.kill(child, number)
    names = " and ".join(signal.Signals(number).name for number in numbers)
    return f"{names} after {seconds:.2f} s: exit {wait(child)}, {checkpoints(trial.out)}"


def full_disk(trial: Trial, first: int, last: int) -> str:
    """No file can be longer than 2,000 bytes from step `first` to step `last`."""

    def hook():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        real = grpo.train_step

        def train_step(run):
            if run.step + 1 == first:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
            if run.step + 1 > last:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return real(run)

        grpo.train_step = train_step

    code = trial.run(hook=hook)
    return f"no room in steps {first} to {last}: exit {code}, {checkpoints(trial.out)}"


def two_at_once(trial: Trial, seconds: float) -> str:
    child = spawn(trial.flags, trial.log)
    time.sleep(seconds)
    second = trial.run("--resume") if (trial.out / "run.json").exists() else trial.run()
    return f"a second process after {seconds:.2f} s: exit {second}; the first one: exit {wait(child)}"


def without_stderr(trial: Trial) -> str:
    def hook():
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.dup2(full, 2)

    return f"nothing can be printed: exit {trial.run(hook=hook)}"


def main(config: Config):
    folder = Path(config.output_dir).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.set_num_threads(1)  # a fork has no other threads
    flags = [f"--max_steps={config.steps}", "--save_steps=2", "--save_total_limit=3", *config.flags.split()]
    reference = Trial(folder, "reference", flags)
    calls, start = folder / "calls", time.monotonic()

    def count():
        seen = at_file_call(reference.out, 0, kill_self)
        real = grpo.main

        def counted(*arguments):
            code = real(*arguments)
            calls.write_text(str(len(seen)))
            return code

        grpo.main = counted

    if code := reference.run(hook=count):
        raise InputError(f"the undisturbed run ended with {code}: see {reference.log}")
    seconds, n = time.monotonic() - start, int(calls.read_text())
    print(f"an undisturbed run: {seconds:.1f} s, {n} file calls\n")
    print("| run | what happened | end | differs in |\n| --- | --- | --- | --- |")
    rng, half = random.Random(config.seed), seconds / 2
    cases: list[Callable[[Trial], str]] = []
    for i in range(config.kills):
        call, moment = partial(killed_at_a_call, n=rng.randint(1, n)), rng.uniform(0.05, seconds)
        cases.append(partial(killed_at_a_time, seconds=moment) if i % 2 else call)
    for numbers in ((signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGINT)):
        cases.append(partial(signalled, seconds=half, numbers=numbers))
    cases += [partial(two_at_once, seconds=half), partial(two_at_once, seconds=0.05), without_stderr]
    cases += [partial(full_disk, first=5, last=8), partial(full_disk, first=1, last=4)]
    for number, case in enumerate(cases):
        trial = Trial(folder, f"run-{number}", flags)
        what = case(trial)
        done = (trial.out / "model.safetensors").exists()
        end = "" if done else f"resumed: exit {trial.finish()}"
        logs = "no room in steps 5" not in what
        print(f"| {number} | {what} | {end} | {differences(trial.out, reference.out, logs)} |", flush=True)
        shutil.rmtree(trial.out, ignore_errors=True)


if __name__ == "__main__":
    main(parse(Config, "bench/kill.py")[0])
