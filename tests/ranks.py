"""Runs of grpo.py in several processes, for test_parallel.py.

    ranks.py runs.json               # [[flag, ..], ..]: these runs, one after the other, in the same processes
    torchrun ... ranks.py --model    # one run, as grpo.py would make it

The reward differs within a group of an untrained model."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository

import torch
from worlds import lively_reward

import grpo
import parallel
from config import Config, parse
from files import InputError
from optim import AdamW
from reward import METHODS

METHODS["sem"] = replace(METHODS["sem"], reward=lively_reward)
sampled, norm = grpo.rollout, AdamW.grad_norm


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


def run(argv: list[str], world: parallel.World | None = None) -> int:
    """One run. The words "silent" and "skipped" in front of the flags put `silence` and `skip` in place."""
    grpo.rollout = silence if "silent" in argv else sampled
    AdamW.grad_norm = skip if "skipped" in argv else norm
    flags = [word for word in argv if word not in ("silent", "skipped")]
    return grpo.main(*parse(Config, "grpo.py", flags), world)


if __name__ == "__main__":
    if not sys.argv[1].endswith(".json"):
        grpo.program()
    torch.set_num_threads(1)
    world = parallel.World() if int(os.environ["WORLD_SIZE"]) > 1 else None
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        try:
            run(argv, world)
        except InputError as error:
            print(error)
