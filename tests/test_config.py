"""python -m pytest tests/test_config.py

The tests are about flags and the ranges of their values, and about what a user sees after a mistake: there is
one line that names what is wrong and where, the exit code is 2, and nothing is written.
"""

import dataclasses
import json
import math
import os
import runpy
import subprocess
import sys
import typing
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from worlds import arguments, run_main

import config as module
import evaluate
import retriever
import toy
from config import RANGES, Config, check, parse
from data import InputError
from flags import PEERS, Parser
from reward import METHODS, REWARDS

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------------------------------
# flags and ranges


def kinds() -> dict[str, type]:
    """Field name -> its type, which for `float | None` is float."""
    hints = typing.get_type_hints(Config)
    return {
        name: next(t for t in (*typing.get_args(hint), hint) if t is not type(None))
        for name, hint in hints.items()
    }


def test_every_flag_has_its_help():
    notes = module.comments(Config)
    assert [f.name for f in dataclasses.fields(Config) if not notes.get(f.name)] == []


def test_every_number_has_a_range():
    """The seed is the only exception, because it may be any number."""
    assert RANGES.keys() == {name for name, kind in kinds().items() if kind in (int, float)} - {"seed"}


@pytest.mark.parametrize("name", RANGES)
def test_a_number_out_of_its_range_is_named(name):
    """The bounds themselves are allowed. The next number outside of them, nan and infinity are not."""
    low, high = RANGES[name]
    integer = kinds()[name] is int
    config = Config(lora_r=8)  # --lora_alpha needs it
    for value in (low, high):
        if value != math.inf:
            assert getattr(check(replace(config, **{name: value})), name) == value
    outside = [low - 1 if integer else math.nextafter(low, -math.inf), math.nan, math.inf, -math.inf]
    if high != math.inf:
        outside.append(high + 1 if integer else math.nextafter(high, math.inf))
    bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
    for value in outside:
        with pytest.raises(InputError) as error:
            check(replace(config, **{name: value}))
        assert str(error.value) == f"--{name} {value}: must be a number {bounds}"


@pytest.mark.parametrize("method", METHODS)
def test_rewards_that_fit(method):
    """The rewards of Search-R1 and ZeroSearch read only the final answer, so they fit every method. Others
    also count the searches of the environment, which SSRL does not make."""
    counting = () if method == "ssrl" else ("otc", "flat", "ikea", "boundary", "boundary_on")
    own = {method} & set(REWARDS)  # hybrid has no reward of that name
    for name in ("", *own, "search-r1", "zerosearch", *counting):
        config = Config(method=method, reward=name, num_generations=4)
        assert check(config) == config


@pytest.mark.parametrize("method", METHODS)
def test_sem_kept_is_for_the_reward_sem(method):
    """It does not matter whether the method or --reward selects the reward sem."""
    for name in ("", *REWARDS):
        reward = REWARDS[name] if name else METHODS[method].reward
        if not reward.fits(METHODS[method].template):
            continue
        config = Config(method=method, reward=name, sem_kept=0.1, num_generations=4)
        if reward is REWARDS["sem"]:
            assert check(config) == config
        else:
            with pytest.raises(InputError, match=r"--sem_kept 0\.1: only for the reward sem"):
                check(config)


# ------------------------------------------------------------------------------------------------------------
# bad input, in this process


def no_tokenizer(folder):
    for path in (folder / "model").glob("*tok*"):
        path.unlink()


def no_chat_template(folder):
    (folder / "model" / "chat_template.jinja").unlink()


def bad_line(folder):
    with open(folder / "known.jsonl", "a") as file:
        file.write('{"id": "1", "question"\n')


def empty_set(folder):
    (folder / "known.jsonl").write_text("")


def empty_corpus(folder):
    (folder / "corpus.jsonl").write_text("")


def bad_corpus(folder):
    (folder / "corpus.jsonl").write_text('{"id": "0", "contents": "a"}\n{"id": 1}\n')


def long_prompt(folder):
    row = {"id": "long", "question": "who " * 70, "golden_answers": ["x"]}
    with open(folder / "known.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


BAD = {  # flags, what is damaged, what the message contains
    "group of one": ({"num_generations": "1"}, None, "--num_generations 1: must be a number at least 2"),
    "tau": ({"tau": "1.5"}, None, "--tau 1.5: must be a number between 0 and 1"),
    "tau is a number": ({"tau": "nan"}, None, "--tau nan"),
    "loss type": ({"loss_type": "ppo"}, None, "--loss_type ppo: must be one of grpo, dapo, dr_grpo"),
    "missing file": ({"train": "nowhere/known.jsonl"}, None, "nowhere/known.jsonl"),
    "unknown data set": ({"train": "musiqe"}, None, "musiqe"),
    "malformed line": ({}, bad_line, "known.jsonl:41"),
    "empty data set": ({}, empty_set, "known.jsonl"),
    "empty corpus": ({}, empty_corpus, "corpus.jsonl"),
    "malformed corpus": ({}, bad_corpus, "corpus.jsonl"),
    "no model": ({"model": "nowhere/model"}, None, "nowhere/model"),
    "no directory": ({"model": "./nowhere/model"}, None, "--model ./nowhere/model: no such directory"),
    "no tokenizer": ({}, no_tokenizer, "no model and tokenizer from this directory"),
    "no chat template": ({}, no_chat_template, "chat template"),
    "prompt longer than the context": ({}, long_prompt, "the prompt of long (known) has"),
    "no run to resume": ({"resume": None}, None, "--resume"),
    "no data set": ({"train": " , "}, None, "--train"),
    "infinite": ({"learning_rate": "inf"}, None, "--learning_rate inf: must be a number"),
    "output below a file": ({"output_dir": "/dev/null/out"}, None, "--output_dir /dev/null/out"),
    "a server that is down": ({"retriever": "http://127.0.0.1:9"}, None, "--retriever"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, world, tmp_path, monkeypatch):
    change, damage, expected = BAD[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if damage:
        damage(tmp_path)
    switches = ["--resume"] if "resume" in change else []
    with pytest.raises(InputError) as error:
        run_main(world | {k: v for k, v in change.items() if v is not None}, *switches)
    message = str(error.value)
    assert expected in message and "\n" not in message
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------
# the program


@pytest.mark.slow
def test_unknown_flag_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "grpo.py"), "--modle", "x"],
        cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--modle" in done.stderr
    assert not list(tmp_path.iterdir())


DOES_NOT_FIT = "--reward {}: it cannot read what --method {} writes"
REFUSED = {
    "method": ({"method": "semm"}, "--method semm: must be one of sem, ssrl"),
    "reward": ({"reward": "em"}, "--reward em: must be one of sem"),
    "a reward that is gone": ({"reward": "sem_kept"}, "--reward sem_kept: must be one of sem"),
    "no draft": ({"method": "search-r1", "reward": "sem"}, DOES_NOT_FIT.format("sem", "search-r1")),
    "no draft to keep": (
        {"method": "research", "sem_kept": "0.1"},
        "--sem_kept 0.1: only for the reward sem",
    ),
    "no search to count": ({"method": "ssrl", "reward": "flat"}, DOES_NOT_FIT.format("flat", "ssrl")),
    "no box": ({"reward": "research"}, DOES_NOT_FIT.format("research", "sem")),
    "no box either": (
        {"method": "ssrl", "reward": "research_paper"},
        DOES_NOT_FIT.format("research_paper", "ssrl"),
    ),
    "no self-search": (
        {"method": "zerosearch", "reward": "ssrl"},
        DOES_NOT_FIT.format("ssrl", "zerosearch"),
    ),
    "noise": ({"method": "zerosearch", "noise_end": "1.5"}, "--noise_end 1.5: must be a number between"),
    "noise is a number": (
        {"method": "zerosearch", "noise_start": "nan"},
        "--noise_start nan: must be a number between",
    ),
    "a server is no simulator": (
        {"method": "zerosearch", "retriever": "http://127.0.0.1:9"},
        "--method zerosearch: give --simulator",
    ),
    "no simulator": ({"method": "zerosearch", "simulator": "nowhere/model"}, "--simulator nowhere/model"),
    "nothing to simulate": ({"simulator": "nowhere/model"}, "nowhere/model: --method sem does not"),
    "an odd group": (
        {"reward": "boundary", "num_generations": "5"},
        "--reward boundary: --num_generations 5 must be even and at least 4",
    ),
    "halves of one": (
        {"reward": "boundary_on", "num_generations": "2"},
        "--reward boundary_on: --num_generations 2 must be even and at least 4",
    ),
    "halves that are not normalised": (
        {"reward": "boundary", "loss_type": "dr_grpo"},
        "--reward boundary: not with --loss_type dr_grpo",
    ),
    "an engine that is a model": (
        {"reward": "boundary", "method": "zerosearch", "simulator": "nowhere/model"},
        "--reward boundary: not with --simulator",
    ),
    "no engine to switch off": (
        {"method": "ssrl", "reward": "boundary"},
        DOES_NOT_FIT.format("boundary", "ssrl"),
    ),
    "nothing to keep": (
        {"reward": "otc", "sem_kept": "0.1"},
        "--sem_kept 0.1: only for the reward sem",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, world, tmp_path, capsys, monkeypatch):
    """The program prints one line, exits with code 2, and writes nothing."""
    change, expected = REFUSED[case]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *arguments(world | change)])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "grpo.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert err.count("\n") == 1 and err.startswith("grpo.py: error: ") and expected in err
    assert sorted(tmp_path.rglob("*")) == before


FULL = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
OUTSIDE_OF_TRAINING = [(FULL, 2, "error: out of GPU memory: try"), (KeyboardInterrupt(), 130, "stopped")]


@pytest.mark.parametrize("program", ["grpo.py", "evaluate.py"])
@pytest.mark.parametrize("error, code, message", OUTSIDE_OF_TRAINING)
def test_what_stops_a_program_outside_of_training_is_one_line(
    program, error, code, message, monkeypatch, capsys
):
    def stop(*args):
        raise error

    monkeypatch.setattr("data.load", stop)
    flags = ["--model", "m", "--train" if program == "grpo.py" else "--data", "t.jsonl"]
    monkeypatch.setattr(sys, "argv", [program, *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    line = capsys.readouterr().err
    assert stopped.value.code == code and line.startswith(f"{program}: {message}") and line.count("\n") == 1


@pytest.mark.parametrize(
    "word, nearest",
    [
        ("--max_step", "max_steps"),
        ("--max-steps", "max_steps"),
        ("--model_name_or_path", "model"),
        ("--max_new_tokens", "max_completion_length"),
        ("--per_device_train_batch_size", "prompts_per_step"),
        ("--num_train_epochs", "max_steps"),
        ("--resume_from_checkpoint", "resume"),
        ("--kl_coef=0.1", "beta"),
        ("retriever.url=http://h", "retriever"),
        ("actor_rollout_ref.rollout.n=5", "num_generations"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "learning_rate"),
        ("data.train_files=a.parquet", "train"),
        ("+trainer.save_freq=5", "save_steps"),
        ("-model", "model"),
        ("--zzz", ""),
    ],
)
def test_an_unknown_flag_names_the_nearest_one(capsys, word, nearest):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, "grpo.py", ["--seed", "3", word, "x"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1
    assert f"unknown flag {word}; the nearest one is --{nearest}" in err


def test_a_switch_takes_no_value(capsys):
    with pytest.raises(SystemExit):
        parse(Config, "grpo.py", ["--bf16", "true"])
    assert "'true' is not a flag. Flags begin with --" in capsys.readouterr().err


def test_a_program_without_flags_has_no_nearest_one(capsys):
    with pytest.raises(SystemExit):
        Parser(prog="p").parse_args(["--zzz"])
    assert capsys.readouterr().err == "p: error: unknown flag --zzz\n"


def test_the_names_of_other_programs_are_those_of_flags():
    assert set(PEERS) <= {field.name for c in (Config, evaluate.Config) for field in fields(c)}
    words = " ".join(PEERS.values()).split()
    assert len(set(words)) == len(words) and not set(words) & {field.name for field in fields(Config)}


@pytest.mark.parametrize(
    "value, expected",
    [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        ("musique:~/data, ~/x.jsonl,mmlu", "musique:/home/me/data, /home/me/x.jsonl,mmlu"),
        ("out/~x", "out/~x"),
        ("http://host/~me", "http://host/~me"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
    ],
)
def test_the_home_directory(monkeypatch, value, expected):
    monkeypatch.setenv("HOME", "/home/me")
    for flag in ("output_dir", "model", "train", "eval", "corpus", "simulator"):
        config, _ = parse(Config, "grpo.py", [f"--{flag}={value}"])
        assert getattr(config, flag) == expected
    for program in (evaluate, toy, retriever):
        names = [
            f.name
            for f in fields(program.Config)
            if f.name in ("output", "output_dir", "data", "known", "corpus")
        ]
        for name in names:
            assert getattr(parse(program.Config, "x", [f"--{name}={value}"])[0], name) == expected


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("name", ["問題.jsonl", b"caf\xe9.jsonl"])
def test_printing_never_fails(tmp_path, encoding, name):
    """A console may lack the letters of a file's name, and a name need not be UTF-8."""
    code = "import config, data, sys; c, _ = config.parse(config.Config, 'p'); print(data.load(c.train)[0])"
    code += "; print(c.train, file=sys.stderr); config.fail('p', c.train)"
    folder = os.fsencode(tmp_path) + b"/"
    path = folder + (name if isinstance(name, bytes) else name.encode())
    with open(path, "w") as file:
        file.write('{"id": "1", "question": "誰?", "golden_answers": ["é"]}')
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "--train", path]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 2 and done.stdout.startswith(b"Question(") and b"Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "26.11.2026", "2026-11-26T10:00"])
def test_a_date_that_is_none(text):
    with pytest.raises(InputError, match=f"--date {text}: must be a date"):
        check(Config(date=text))
    with pytest.raises(InputError, match=f"--date {text}"):
        evaluate.check(evaluate.Config(model="m", data="d", date=text))


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full", ">/dev/full 2>&1", ">&- 2>&-"])
def test_streams_that_cannot_be_written_to_end_no_program(tmp_path, stream):
    """A warning, a bar or a table that cannot be printed is lost, and the program goes on."""
    code = """
import config, os, sys
from tqdm import tqdm
config.parse(config.Config, "p")
for i in tqdm(range(3), file=sys.stderr):
    tqdm.write("a warning")
    print("a table", flush=True)
sys.stderr.isatty()
open(os.environ["PLACE"], "w").write("done")
"""
    (tmp_path / "prints.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PLACE": str(tmp_path / "done")}
    command = f"'{sys.executable}' '{tmp_path}/prints.py' {stream}"
    done = subprocess.run(command, shell=True, env=environment, capture_output=True)
    assert done.returncode == 0 and (tmp_path / "done").read_text() == "done"
