"""Every flag of grpo.py with what it does and where its value comes from, and the checks of the values.

    config, given = parse(Config, "grpo.py", toy=TOY)    # from flags.py; `given`: names of the flags in it
    check(config)                                        # InputError for a value that makes no sense

This file imports no torch, so that programs without a model, such as retriever.py, start fast."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import boundary
import hybrid  # noqa: F401 (it adds its method to METHODS)
from data import InputError
from flags import comments, fail, parse  # noqa: F401 (the programs take all they need from here)
from reward import METHODS, REWARDS


@dataclass
class Config:
    """GRPO with the reward of SEM, or of another method. Without --model it runs in the toy world.

    SEM publishes GRPO, 200 steps, a balanced mix of MuSiQue and MMLU, and Qwen2.5-7B-Instruct. Most of what
    it does not publish has the value of ReSearch (arXiv 2503.19470, table 4), whose tags and metrics it
    shares. Where a value comes from a paper, the comment names it in brackets; the other values are our
    choice. All methods have the same defaults, so that two runs differ in the method alone."""

    # what is trained, how, on what
    method: str = "sem"  # sem, ssrl, search-r1, research, zerosearch or hybrid: prompt, tags, reward
    reward: str = ""  # another method's, research_paper, otc, flat, ikea, boundary or boundary_on
    model: str = ""  # hub id or directory of the start model; none: the toy world (SEM: Qwen2.5-7B-Instruct)
    train: str = "musique,mmlu"  # data sets in equal shares: name (hub), name:path, or a JSONL path (SEM)
    eval: str = ""  # data sets of the greedy evaluation before and after training; none: no evaluation
    eval_size: int = 500  # questions of each evaluation set, drawn once; 0: all
    corpus: str = ""  # JSONL of {"id", "contents"}; none: the paragraphs that the data sets contain
    retriever: str = ""  # URL of a /retrieve server (Search-R1's protocol), in place of a corpus
    output_dir: str = "out/sem"  # directory of settings, metrics, transcripts, checkpoints and final weights
    resume: bool = False  # continue the run in output_dir from its newest complete checkpoint
    seed: int = 0  # of the mix, the sampling, and the toy world
    date: str = ""  # what a chat template that prints the date prints, such as 2026-11-26; none: today
    # rollout
    prompts_per_step: int = 256  # questions a step (ReSearch)
    num_generations: int = 5  # episodes of each question, the group size G (ReSearch); boundary: even
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained on (ReSearch)
    max_completion_length: int = 8192  # tokens after the prompt, results included (ReSearch)
    max_searches: int = 4  # results and reminders that an episode may get (Search-R1, arXiv 2503.09516)
    topk: int = 5  # documents a search returns (ReSearch)
    max_doc_tokens: int = 512  # tokens that each document is cut to
    rollout_slots: int = 0  # episodes sampled at once; 0: what fits, computed once
    cuda_graphs: bool = True  # on a GPU, replay decode steps as CUDA graphs
    simulator: str = ""  # zerosearch: hub id or directory of a model that plays the engine; none: the corpus
    noise_start: float = 0.0  # zerosearch: share of noisy results at the start (ZeroSearch, arXiv 2505.04588)
    noise_end: float = 0.5  # zerosearch: share of noisy results at the end (ZeroSearch)
    # reward
    tau: float = 0.5  # sem: F1 from which the first answer counts as right (not published by SEM)
    sem_kept: float | None = None  # sem: share of F1(a2) that a search after a right draft costs (SEM: all)
    # objective
    beta: float = 0.001  # weight of the k3 KL to the start model (ReSearch)
    epsilon: float = 0.2  # lower clip of the ratio (ReSearch)
    epsilon_high: float = 0.2  # upper clip of the ratio (ReSearch)
    loss_type: str = "grpo"  # grpo, dapo or dr_grpo: see grpo.token_scale and grpo.advantages
    num_iterations: int = 1  # optimizer steps on one batch of episodes (ReSearch: mini-batch = batch, so 1)
    # optimizer
    max_steps: int = 200  # training steps (SEM)
    learning_rate: float = 1e-6  # of AdamW (ReSearch); with --lora_r the default is 4e-5
    warmup_steps: int = 10  # linear warm-up, then constant
    weight_decay: float = 0.01  # of AdamW; at a learning rate of 1e-6 it is lost in rounding (verl's value)
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm (verl, ReSearch's framework)
    micro_batch_tokens: int = 0  # padded tokens of one pass; 0: what fits, computed once
    lora_r: int = 0  # rank of adapters that are trained in place of the weights, see lora.py; 0: all weights
    lora_alpha: int | None = None  # an adapter's change is multiplied by lora_alpha / lora_r; none: 32 (TRL)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    bf16: bool | None = None  # a bf16 model, see optim.py; none: yes on a GPU, no on a CPU
    # files
    save_steps: int = 25  # steps between two checkpoints
    save_total_limit: int = 2  # checkpoints kept; an older one is removed once a newer one is complete
    save_fp32: bool = False  # with bf16: the final weights are in fp32, with their lower halves
    log_completions: int = 4  # episodes of each step that are written to transcripts.jsonl

    def budget(self) -> dict[str, int]:
        """What an episode may use, in training and in evaluation alike: arguments of `rollout`."""
        names = "max_completion_length", "max_searches", "topk", "max_doc_tokens"
        return {name: getattr(self, name) for name in names}


TOY = {  # defaults of the toy world; they differ from those above because the world is small
    "train": "known,composed,unknown",
    "eval": "known_train,known_heldout,composed,unknown,two_hop,arithmetic",
    "output_dir": "out/toy",
    "prompts_per_step": 32,
    "num_generations": 8,
    "max_completion_length": 128,
    "max_searches": 3,
    "topk": 2,
    "max_steps": 50,
    "learning_rate": 1e-4,
    "warmup_steps": 5,
    "bf16": False,
}
LORA = {  # defaults of a run with --lora_r. The rate is that of the Tinker cookbook's search runs (rank 32).
    "learning_rate": 4e-5,
    "lora_alpha": 32,
}
TOY_LORA = LORA | {"learning_rate": 1e-3}  # in the toy world: measured, see bench/RESULTS.md


# ------------------------------------------------------------------------------------------------------------
# checks of values

LOSS_TYPES = "grpo", "dapo", "dr_grpo"
RANGES = {  # flag: smallest and largest value
    "prompts_per_step": (1, math.inf),
    "num_generations": (2, math.inf),  # in a group of one there is nothing to compare with
    "temperature": (1e-6, math.inf),
    "max_completion_length": (1, math.inf),
    "max_searches": (0, math.inf),
    "topk": (1, math.inf),
    "max_doc_tokens": (1, math.inf),
    "rollout_slots": (0, math.inf),
    "eval_size": (0, math.inf),
    "noise_start": (0, 1),
    "noise_end": (0, 1),
    "tau": (0, 1),
    "sem_kept": (0, 1),
    "beta": (0, math.inf),
    "epsilon": (0, math.inf),
    "epsilon_high": (0, math.inf),
    "num_iterations": (1, math.inf),
    "max_steps": (0, math.inf),
    "learning_rate": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (1e-9, math.inf),
    "lora_r": (0, math.inf),
    "lora_alpha": (1, math.inf),
    "micro_batch_tokens": (0, math.inf),
    "save_steps": (1, math.inf),
    "save_total_limit": (1, math.inf),
    "log_completions": (0, math.inf),
}


def check_ranges(config, ranges: dict[str, tuple[float, float]]):
    """Raises InputError for the first value that is out of its range, infinite or not a number. None is a
    value that was not given."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise InputError(f"--{name} {value}: must be a number {bounds}")


def check_date(text: str):
    """Raises InputError if `text` is no date such as 2026-11-26. The empty text stands for today."""
    try:
        date.fromisoformat(text or "2026-11-26")
    except ValueError:
        raise InputError(f"--date {text}: must be a date such as 2026-11-26") from None


def check(config: Config) -> Config:
    """Raises InputError for values that make no sense, alone or together, before anything is loaded."""
    check_ranges(config, RANGES)
    check_date(config.date)
    if config.loss_type not in LOSS_TYPES:
        raise InputError(f"--loss_type {config.loss_type}: must be one of {', '.join(LOSS_TYPES)}")
    if config.method not in METHODS:
        raise InputError(f"--method {config.method}: must be one of {', '.join(METHODS)}")
    if config.reward and config.reward not in REWARDS:
        raise InputError(f"--reward {config.reward}: must be one of {', '.join(REWARDS)}")
    if not config.train.strip(", "):
        raise InputError("--train: give at least one data set")
    method = METHODS[config.method]
    reward = REWARDS[config.reward] if config.reward else method.reward
    if config.reward and not reward.fits(method.template):
        raise InputError(f"--reward {config.reward}: it cannot read what --method {config.method} writes")
    if getattr(reward, "halves", False):
        boundary.check(config)
    if config.sem_kept is not None and reward is not REWARDS["sem"]:
        raise InputError(f"--sem_kept {config.sem_kept}: only for the reward sem")
    if config.lora_alpha is not None and not config.lora_r:
        raise InputError(f"--lora_alpha {config.lora_alpha}: only with --lora_r")
    if config.simulator and not method.simulated:
        raise InputError(f"--simulator {config.simulator}: --method {config.method} does not use one")
    if method.simulated and config.retriever and not config.simulator:
        raise InputError(f"--method {config.method}: give --simulator, or --corpus in place of --retriever")
    return config


def check_writable(path: Path, flag: str) -> Path:
    """Returns the nearest existing directory on the way to `path`. Raises InputError if `path` cannot be
    created in it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the libraries that write weights and tokenizers take no other names
        raise InputError(f"{flag} {path}: its name is not UTF-8") from None
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{flag} {path}: {nearest} is not a directory that can be written to")
    return nearest
