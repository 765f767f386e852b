"""Runs of grpo.py in one, two and four processes, for test_parallel.py.

    ranks.py FOLDER                    # all runs, in FOLDER. Their processes are forks, because to start one
                                       # takes seconds
    torchrun ... ranks.py --model ...  # one run, as grpo.py would make it

The reward is `lively_reward`, because an untrained model earns 0 by that of SEM."""

import math
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from worlds import arguments, lively_reward, write_world

import grpo
import parallel
from config import Config, parse
from optim import AdamW, local, rounding_notes
from reward import METHODS, REWARDS
from world import ALONE, World

sampled, norm = grpo.rollout, AdamW.grad_norm
RUNS = {  # name: words for `run`, and flags
    "plain": "--num_iterations 2 --eval_size 3",
    "tied": "silent skipped --model tied --gradient_checkpointing --max_steps 2 --eval=",
    "bf16": "--bf16 --learning_rate 0.00001 --save_fp32 --eval=",
    "lora": "--lora_r 4 --learning_rate 0.01 --max_steps 2 --eval=",
    "halves": "--reward boundary_on --max_steps 2 --eval=",
}
MISTAKES = {  # flags, and the line that they are answered with
    "--prompts_per_step 5": "--prompts_per_step 5: 2 processes cannot share it evenly",
    "--different": "the processes were started with different flags: ",
    "--beta -1": "--beta -1.0: must be a number at least 0",
    "--retriver x": "unknown flag --retriver",
}


def silence(*args, first_row: int = 0, **options):
    """`rollout`, except that all episodes from the ninth of a step on are without a loss token: with two
    processes those of the second."""
    episodes = sampled(*args, first_row=first_row, **options)
    for row, episode in enumerate(episodes, first_row):
        if row >= 8:
            episode.loss_mask = [False] * len(episode.loss_mask)
    return episodes


def skip(optimizer: AdamW) -> torch.Tensor:
    """`AdamW.grad_norm`, except that the gradient of the second step is not finite."""
    return norm(optimizer) * (math.inf if next(iter(optimizer.state.values()))["step"] == 1 else 1)


def run(words: list[str], world: World):
    """One run. The words "silent" and "skipped" put `silence` and `skip` in place."""
    grpo.rollout = silence if "silent" in words else sampled
    AdamW.grad_norm = skip if "skipped" in words else norm
    flags = [word for word in words if word not in ("silent", "skipped")]
    assert grpo.main(*parse(Config, "grpo.py", flags), world) == 0


def check_exchange(world: parallel.Ranks):
    """Tensors with fewer rows than processes, and of every type of the optimizer's state, survive the way
    into shards and back."""
    n = world.rank
    assert world.gather([n] * n) == [i for i in range(world.size) for _ in range(i)]
    assert world.total({"a": n, "b": -1.0}) == {"a": sum(range(world.size)), "b": -world.size}
    assert world.most(-n) == 0 and world.first(lambda: n) == 0
    model = torch.nn.Sequential(torch.nn.Linear(3, 5))  # of four processes the last gets no row
    model._no_split_modules = ["Linear"]
    optimizer = AdamW(world.shard(model), 0.1, 0.0)
    assert rounding_notes(optimizer) == []  # also where this process has no row
    for dtype in (torch.float32, torch.bfloat16, torch.int16):
        like = {name: torch.zeros_like(p, dtype=dtype) for name, p in optimizer.parameters.items()}
        whole = {
            name: torch.arange(math.prod(p.shape)).view(p.shape).to(dtype) - 7 for name, p in like.items()
        }
        cut = world.cut(whole, like)
        assert sum(world.gather([len(x) for x in cut.values()])) == 10
        for name, x in like.items():
            local(x).copy_(cut[name])
        back = world.whole(like)
        assert n or all(back[name].equal(x) and back[name].dtype == dtype for name, x in whole.items())
        assert not n or back == {}


def fork(size: int, function, meanwhile=lambda children: None) -> list[int]:
    """Calls function(rank) in `size` processes that know each other. Returns their exit codes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        code = 1
        try:
            function(rank)
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    meanwhile(children)
    codes = []
    while children:
        child, status = os.wait()
        children.remove(child)
        codes.append(os.waitstatus_to_exitcode(status))
        for other in children if codes[-1] else ():  # as torchrun does
            os.kill(other, signal.SIGTERM)
    return codes


def start(size: int, lines: list[list[str]]):
    """Makes some runs in the same `size` processes, one after the other."""

    def make(rank: int):
        world = parallel.Ranks() if size > 1 else ALONE
        if size > 1:
            check_exchange(world)
        for words in lines:
            run(words, world)

    if any(codes := fork(size, make)):
        sys.exit(f"the processes ended with {codes}")


def start_program(flags: list[str], log: Path, meanwhile=lambda children: None):
    """grpo.py in two processes, as torchrun would start it. `log` gets what they print, and their exit codes.
    With the flag --different only the second one has a --seed."""

    def program(rank: int):
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.argv[1:] = [flag for flag in flags if flag != "--different"]
        sys.argv += ["--seed", "3"] if rank and "--different" in flags else []
        try:
            grpo.program()
        finally:
            sys.stdout.flush()

    codes = fork(2, program, meanwhile)
    with log.open("a") as file:
        file.write(f"exit codes {sorted(codes)}\n")


def after_three_steps(folder: Path, rank: int, *signals: int):
    """Sends the signals to one of the processes, a tenth of a second apart."""

    def meanwhile(children: list[int]):
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            time.sleep(0.05)
        for number in signals:
            os.kill(children[rank], number)
            time.sleep(0.1)

    return meanwhile


def resume(folder: Path, a: int, b: int) -> list[str]:
    """Stops a copy of the plain run of `a` processes after its second step. Returns how `b` go on."""
    path = folder / f"resumed-{a}-{b}"
    shutil.copytree(folder / f"plain-{a}", path)
    shutil.rmtree(path / "checkpoint-3")
    for file in [*path.glob("*.safetensors"), path / "config.json"]:
        file.unlink()
    return ["--output_dir", str(path), "--resume"]


def main(folder: Path):
    flags = write_world(folder)
    tied = AutoConfig.from_pretrained(flags["model"], tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(tied).save_pretrained(folder / "tied")
    AutoTokenizer.from_pretrained(flags["model"]).save_pretrained(folder / "tied")
    flags |= {"max_steps": "3", "log_completions": "16", "eval": f"{folder}/known.jsonl"}

    def lines(size: int) -> list[list[str]]:
        return [
            [*arguments(flags | {"output_dir": f"{folder}/{name}-{size}"}), *words.split()]
            for name, words in RUNS.items()
        ]

    os.chdir(folder)  # for --model tied
    start(1, lines(1))
    start(2, [*lines(2), resume(folder, 1, 2)])
    start(4, [*lines(4), resume(folder, 2, 4)])
    start(1, [resume(folder, 2, 1)])
    for i, words in enumerate(MISTAKES):
        out = {"output_dir": f"{folder}/mistake-{i}"}
        start_program([*arguments(flags | out), *words.split()], folder / f"mistake-{i}.log")
    once, twice = (signal.SIGKILL,), (signal.SIGTERM, signal.SIGTERM)
    for name, rank, signals in ("killed-0", 0, once), ("killed-1", 1, once), ("stopped", 1, twice):
        endless = flags | {
            "output_dir": f"{folder}/{name}",
            "max_steps": "1000",
            "save_steps": "1",
            "eval": "",
        }
        log, meanwhile = folder / f"{name}.log", after_three_steps(folder / name, rank, *signals)
        start_program(arguments(endless), log, meanwhile)


if __name__ == "__main__":
    torch.set_num_threads(1)
    METHODS["sem"] = replace(METHODS["sem"], reward=lively_reward)
    REWARDS["boundary_on"] = replace(REWARDS["boundary_on"], function=lively_reward)
    if not Path(sys.argv[1]).is_dir():
        grpo.program()
    main(Path(sys.argv[1]))
