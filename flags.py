"""From a dataclass to a command line: a field becomes a flag, and the comment on its line the help.

    config, given = parse(Config, "grpo.py", toy=TOY)    # reads sys.argv; `given`: names of the flags in it

A mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import io
import os
import re
import sys
import typing
from contextlib import suppress

PEERS = {  # flag: what other programs call it, mainly TRL and verl
    "model": "model_name_or_path path",
    "train": "dataset_name train_files",
    "eval": "val_files test_files eval_dataset",
    "data": "dataset tasks",
    "eval_size": "limit",
    "retriever": "url retriever_url",
    "max_doc_tokens": "max_obs_length",
    "output_dir": "default_local_dir",
    "resume": "resume_from_checkpoint resume_mode",
    "prompts_per_step": "train_batch_size per_device_train_batch_size generation_batch_size batch_size",
    "num_generations": "n n_agent group_size",
    "max_completion_length": "max_response_length max_new_tokens max_tokens",
    "max_searches": "max_turns",
    "beta": "kl_coef kl_loss_coef",
    "epsilon": "clip_ratio clip_ratio_low cliprange",
    "epsilon_high": "clip_ratio_high",
    "loss_type": "loss_agg_mode",
    "num_iterations": "ppo_epochs",
    "max_steps": "total_training_steps num_train_epochs total_epochs",
    "learning_rate": "lr",
    "warmup_steps": "lr_warmup_steps warmup_ratio",
    "max_grad_norm": "grad_clip",
    "lora_r": "lora_rank use_peft",
    "micro_batch_tokens": "ppo_max_token_len_per_gpu gradient_accumulation_steps",
    "save_steps": "save_freq",
    "save_total_limit": "max_actor_ckpt_to_keep",
}


class Stream:
    """A stream that never fails, because printing must not end a run. A console may lack the letters of a
    file's name; a terminal may be closed, a pipe be broken, a disk be full (`python grpo.py 2> log`)."""

    def __init__(self, stream):
        self.stream = stream  # None where the program was started without one
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line without the usage before it, that flags cannot be
    abbreviated, and that an unknown flag names the nearest known one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(self.prog, message)

    def parse_args(self, args=None):
        values, unknown = self.parse_known_args(args)
        if unknown and not unknown[0].startswith("-") and "=" not in unknown[0]:
            why = "Flags begin with --, and a switch such as --resume takes no value"
            self.error(f"{unknown[0]!r} is not a flag. {why}")
        if unknown:
            flags = [
                text[2:] for text in self._option_string_actions if text[:2] == "--" and text != "--help"
            ]
            # verl writes actor_rollout_ref.rollout.n=5
            word = unknown[0].lstrip("-").partition("=")[0].rpartition(".")[2].replace("-", "_")
            known = [flag for flag, names in PEERS.items() if word in names.split() and flag in flags]
            nearest = known or difflib.get_close_matches(word, flags, 1, cutoff=0)
            hint = f"; the nearest one is --{nearest[0]}" if nearest else ""
            self.error(f"unknown flag {unknown[0]}{hint}")
        return values


def fail(program: str, message) -> typing.NoReturn:
    """Prints one line that names what is wrong, and exits with code 2."""
    print(f"{program}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def comments(cls) -> dict[str, str]:
    """Field name -> the comment at the end of its line, which --help prints."""
    return dict(re.findall(r"^    (\w+): [^#\n]+#\s*(.+)$", inspect.getsource(cls), re.MULTILINE))


def parse(cls, program: str, argv: list[str] | None = None, **alternatives: dict):
    """Makes every field of the dataclass `cls` a flag. Returns (an instance of it, the names of the fields
    that the command line gives).

    `alternatives` are other sets of defaults, {"toy": {"max_steps": 60}}, which the help names beside the
    defaults. The program decides which set applies. A ~ at the start of a path is the home directory, also in
    --output_dir=~/x and in --train musique:~/data, where no shell replaces it."""
    if argv is None:
        sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    parser = Parser(
        prog=program,
        description=(cls.__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    hints, notes = typing.get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        types = *typing.get_args(hints[field.name]), hints[field.name]
        kind = next(t for t in types if t is not type(None))  # float for `float | None`
        other = "".join(f"; {name}: {d[field.name]}" for name, d in alternatives.items() if field.name in d)
        text = f"{notes.get(field.name, '')} [{field.default}{other}]".replace("%", "%%").strip()
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **options)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, str):
            path = r"((?:^|[:,])\s*)(~[^,]*)"
            given[name] = re.sub(path, lambda m: m[1] + os.path.expanduser(m[2]), value)
    return cls(**given), set(given)
