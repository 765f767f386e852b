"""python -m pytest tests/test_run.py

The tests are about the run directory, checkpoints, resuming, signals, and the settings that a run derives.
"""

import json
import os
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_grpo import GOOD_STEP
from worlds import arguments, episodes_with_results, run_main, timeless

import grpo
import optim
import run as module
from config import TOY, Config, parse
from data import InputError
from retriever import BM25
from reward import METHODS
from run import checkpoints, resolve
from signals import Signals, hold_signals
from simulator import CorpusSimulator, ModelSimulator

ROOT = Path(__file__).parent.parent
LOGS = "metrics.jsonl", "transcripts.jsonl"


def finish(flags: dict[str, str], max_steps: int):
    """Resumes a run until `max_steps` steps are done."""
    assert run_main({"output_dir": flags["output_dir"], "max_steps": str(max_steps)}, "--resume") == 0


def assert_same_run(a: str | Path, b: str | Path):
    """The two runs ended with the same weights and logs, bit for bit."""
    first, second = (load_file(Path(out) / "model.safetensors") for out in (a, b))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in LOGS:
        assert timeless(Path(a) / name) == timeless(Path(b) / name)


def steps_of(flags: dict[str, str]) -> list[int]:
    """The steps in metrics.jsonl."""
    return [row["step"] for row in timeless(Path(flags["output_dir"]) / "metrics.jsonl")]


@pytest.fixture
def undisturbed(world, lively):
    """The directory of a run of four steps that nothing interrupts."""
    flags = world | {"output_dir": world["output_dir"] + "-undisturbed"}
    assert run_main(flags) == 0
    return flags["output_dir"]


# ------------------------------------------------------------------------------------------------------------
# resuming


@pytest.mark.parametrize("switches", [(), ("--num_iterations", "2", "--loss_type", "dapo")])
def test_resume_is_exact(world, lively, switches, tmp_path):
    """N steps give the same weights and metrics, bit for bit, as k steps, a stop, and N - k steps."""
    assert run_main(world | {"output_dir": str(tmp_path / "whole")}, *switches) == 0
    part = world | {"output_dir": str(tmp_path / "part")}
    assert run_main(part | {"max_steps": "3"}, *switches) == 0
    # as if killed in step 4: step 3 is in the logs, but its checkpoint was not written
    shutil.rmtree(tmp_path / "part" / "checkpoint-3")
    (tmp_path / "part" / "model.safetensors").unlink()
    finish(part, 4)
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    rows = timeless(tmp_path / "part" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["kl"] > 0  # the reference is still the start model


def test_resume_keeps_the_method(world, monkeypatch):
    flags = world | {"method": "search-r1", "reward": "otc", "max_steps": "1"}
    assert run_main(flags) == 0
    again = {"output_dir": world["output_dir"], "max_steps": "2"}
    for flag, value in (("method", "sem"), ("reward", "flat")):
        with pytest.raises(InputError, match=f"--resume: --{flag} is "):
            run_main(again | {flag: value}, "--resume")
    templates, real = [], grpo.rollout

    def spied(model, tokenizer, template, *args, **options):
        templates.append(template)
        return real(model, tokenizer, template, *args, **options)

    monkeypatch.setattr(grpo, "rollout", spied)
    finish(flags, 2)
    stored = json.loads((Path(world["output_dir"]) / "run.json").read_text())
    assert (stored["method"], stored["reward"]) == ("search-r1", "otc")
    assert templates == [METHODS["search-r1"].template]


@pytest.mark.parametrize("text", ['{"config": {}, "measures": {"x": {"em": 1}}}', '{"bef', "[]"])
def test_another_eval_json_does_not_stop_a_resume(world, lively, capsys, text):
    """evaluate.py writes a file of that name too, and somebody may let it write into this directory."""
    sets = {"eval": world["train"], "eval_size": "4"}
    assert run_main(world | sets | {"max_steps": "1"}) == 0
    path = Path(world["output_dir"]) / "eval.json"
    path.write_text(text)
    finish(world, 2)
    assert "it will be replaced" in "".join(capsys.readouterr())
    assert set(json.loads(path.read_text())) == {"after"}


def damage_tensors(folder):
    (folder / "optimizer.safetensors").write_bytes(b"12345")


def damage_state(folder):
    (folder / "trainer_state.json").write_text("{}")


def damage_weights(folder):
    (folder / "model.safetensors").write_bytes(b"12345")


@pytest.mark.parametrize("damage", [damage_tensors, damage_state, damage_weights])
def test_a_damaged_checkpoint_is_named(world, lively, damage):
    assert run_main(world | {"max_steps": "2"}) == 0
    damage(Path(world["output_dir"]) / "checkpoint-2")
    with pytest.raises(InputError, match=r"--resume:? .*checkpoint-2") as error:
        finish(world, 3)
    assert "\n" not in str(error.value)


def test_a_run_is_not_resumed_to_an_earlier_step(world, lively):
    assert run_main(world | {"max_steps": "2"}) == 0
    with pytest.raises(InputError, match=r"--max_steps 1: .* is at step 2 already"):
        finish(world, 1)
    assert json.loads((Path(world["output_dir"]) / "run.json").read_text())["max_steps"] == 2


def test_a_second_run_into_the_same_folder_is_refused(world, lively):
    assert run_main(world | {"max_steps": "1"}) == 0
    with pytest.raises(InputError, match="holds a run"):
        run_main(world | {"max_steps": "1"})
    with pytest.raises(InputError, match="--learning_rate"):
        run_main({"output_dir": world["output_dir"], "learning_rate": "1"}, "--resume")


def test_a_line_cut_short_does_not_stop_a_resume(world, lively):
    assert run_main(world) == 0
    with open(Path(world["output_dir"]) / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    finish(world, 5)
    assert steps_of(world) == [1, 2, 3, 4, 5]


def test_a_run_json_without_settings_is_named(world):
    out = Path(world["output_dir"])
    out.mkdir()
    for text in ("{", '{"modle": 1}'):
        (out / "run.json").write_text(text)
        with pytest.raises(InputError, match=r"run\.json"):
            run_main({"output_dir": world["output_dir"]}, "--resume")


# ------------------------------------------------------------------------------------------------------------
# the directory


def test_every_flag_is_in_run_json(world, lively):
    assert run_main(world) == 0
    stored = json.loads((Path(world["output_dir"]) / "run.json").read_text())
    assert set(stored) == {f.name for f in fields(Config)}
    assert stored["micro_batch_tokens"] > 0 and stored["rollout_slots"] == 16
    assert stored["bf16"] is False


def test_transcripts_show_every_source(world, lively):
    assert run_main(world | {"max_steps": "1"}, "--log_completions", "2") == 0
    rows = timeless(Path(world["output_dir"]) / "transcripts.jsonl")
    assert {row["source"] for row in rows} == {"known", "unknown"}


def test_the_start_model_is_not_overwritten(world, lively, tmp_path):
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    for place in (world["model"], f"{tmp_path}/other/../model"):
        with pytest.raises(InputError, match="that is --model"):
            run_main(world | {"output_dir": place})
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_full_disk_causes_only_a_warning(world, lively, monkeypatch, capsys):
    """Nothing is left of the checkpoint that does not fit. Earlier ones stay, and training goes on."""
    real = module.save_file

    def full(tensors, path):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return real(tensors, path)

    monkeypatch.setattr(module, "save_file", full)
    assert run_main(world | {"max_steps": "6", "save_total_limit": "9"}) == 0
    out = Path(world["output_dir"])
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    assert "checkpoint-4 was not written" in "".join(capsys.readouterr())


def test_no_room_on_the_disk_is_an_error_at_the_start(world, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="GB are free"):
        run_main(world)
    assert not Path(world["output_dir"]).exists()


def test_only_complete_checkpoints_count_and_old_ones_go(world, lively):
    assert run_main(world | {"max_steps": "8"}) == 0
    out = Path(world["output_dir"])
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    (out / "checkpoint-8" / "trainer_state.json").unlink()
    (out / "checkpoint-10.tmp").mkdir()
    assert [p.name for p in checkpoints(out)] == ["checkpoint-6"]


# ------------------------------------------------------------------------------------------------------------
# what the command line leaves open


@pytest.mark.parametrize("given, expected", [(None, None), (True, True), (False, False)])
def test_bf16_is_for_a_gpu_unless_the_flag_is_given(world, monkeypatch, given, expected):
    config = Config(model=world["model"], output_dir=world["output_dir"], bf16=given)
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        flags = {"model", "output_dir"} | ({"bf16"} if given is not None else set())
        assert resolve(config, flags).bf16 is (gpu if expected is None else expected)


@pytest.mark.parametrize("method, place", [("sem", "out/toy"), ("search-r1", "out/toy-search-r1")])
def test_without_a_model_a_run_is_in_the_toy_world(monkeypatch, tmp_path, method, place):
    """The defaults of the toy world apply, except where the command line gives a flag."""
    built = []
    monkeypatch.setattr(module.toy, "build", lambda config: built.append(config) or tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    config = resolve(Config(method=method, max_steps=7, seed=3), {"method", "max_steps", "seed"})
    assert config.output_dir == place and config.max_steps == 7
    assert [(toy.method, toy.seed) for toy in built] == [(method, 3)]
    assert config.model == f"{tmp_path}/world/model" and config.corpus == f"{tmp_path}/world/corpus.jsonl"
    assert config.train.split(",")[0] == f"{tmp_path}/world/train/known.jsonl"
    assert config.eval.split(",")[0] == f"{tmp_path}/world/test/known_train.jsonl"
    for name in TOY.keys() - {"train", "eval", "output_dir", "max_steps"}:
        assert getattr(config, name) == TOY[name], name


# ------------------------------------------------------------------------------------------------------------
# signals, and a GPU that is full


@pytest.fixture
def handlers(monkeypatch):
    """Asserts that the handlers after the test are those before it, and that no signal has ended the process
    at once."""

    def exit_at_once(code):
        raise AssertionError("os._exit was called")

    monkeypatch.setattr(os, "_exit", exit_at_once)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert Signals.installed is None


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def at_the_end_of(real, call: int, action):
    """A function that calls `real`, and `action` at the end of call number `call`."""
    calls = []

    def wrapped(*args, **options):
        result = real(*args, **options)
        calls.append(None)
        if len(calls) == call:
            action()
        return result

    return wrapped


@pytest.mark.parametrize("phase", ["rollout", "policy_loss"])
def test_a_signal_before_the_weights_move_drops_the_step(
    world, undisturbed, monkeypatch, handlers, capsys, phase
):
    """The run stops with a checkpoint of the last whole step, and nothing of the dropped step is logged."""
    with monkeypatch.context() as patch:
        patch.setattr(grpo, phase, at_the_end_of(getattr(grpo, phase), 3, terminate))
        assert run_main(world | {"save_steps": "50"}) == 130
    assert "stopped after step 2" in "".join(capsys.readouterr())
    assert steps_of(world) == [1, 2]
    assert {row["step"] for row in timeless(Path(world["output_dir"]) / "transcripts.jsonl")} == {1, 2}
    assert [p.name for p in checkpoints(Path(world["output_dir"]))] == ["checkpoint-2"]
    finish(world, 4)
    assert_same_run(world["output_dir"], undisturbed)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_while_the_weights_move_waits_for_the_end_of_the_step(
    world, undisturbed, monkeypatch, handlers, moment
):
    """The step is recorded, and the checkpoint contains it."""
    real, calls = optim.AdamW.step, []

    def step(*args, **options):
        calls.append(None)
        if len(calls) == 3 and moment == "before":
            terminate()
        result = real(*args, **options)
        if len(calls) == 3 and moment == "after":
            terminate()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(optim.AdamW, "step", step)
        assert run_main(world | {"save_steps": "50"}) == 130
    assert steps_of(world) == [1, 2, 3]
    assert [p.name for p in checkpoints(Path(world["output_dir"]))] == ["checkpoint-3"]
    finish(world, 4)
    assert_same_run(world["output_dir"], undisturbed)


@pytest.mark.parametrize("log", LOGS)
def test_a_signal_while_the_step_is_recorded_waits_for_the_end_of_the_step(
    world, lively, monkeypatch, handlers, log
):
    """This also holds for a step without an update, here one whose searches have all failed."""
    rollout, append, calls = grpo.rollout, module.Run.append, []

    def failed(*args, **options):
        episodes = rollout(*args, **options)
        for episode in episodes:
            episode.stop = "search_failed"
        return episodes

    def interrupted(run, name, rows):
        calls.append(name)
        if name == log and calls.count(log) == 2:
            terminate()
        append(run, name, rows)

    monkeypatch.setattr(grpo, "rollout", failed)
    monkeypatch.setattr(module.Run, "append", interrupted)
    assert run_main(world | {"save_steps": "50"}) == 130
    assert steps_of(world) == [1, 2]
    transcripts = timeless(Path(world["output_dir"]) / "transcripts.jsonl")
    assert {row["step"] for row in transcripts} == {1, 2}
    assert [p.name for p in checkpoints(Path(world["output_dir"]))] == ["checkpoint-2"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_checkpoint_is_always_finished(world, undisturbed, monkeypatch, handlers, number):
    """If one or two signals come while it is written, it is completed first, and then the run stops."""
    real = module.save_file

    def save_file(*args):
        for _ in range(number):
            terminate()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", save_file)
        assert run_main(world) == 130
    assert steps_of(world) == [1, 2]
    out = Path(world["output_dir"])
    assert [p.name for p in checkpoints(out)] == ["checkpoint-2"] and not list(out.glob("*.tmp"))
    finish(world, 4)
    assert_same_run(world["output_dir"], undisturbed)


def test_a_signal_before_the_first_step_leaves_no_checkpoint(world, lively, monkeypatch, handlers):
    monkeypatch.setattr(grpo, "rollout", at_the_end_of(grpo.rollout, 1, terminate))
    assert run_main(world) == 130
    out = Path(world["output_dir"])
    assert not list(out.glob("checkpoint-*")) and not (out / "metrics.jsonl").exists()


def test_handlers_are_installed_only_during_training(world, lively, monkeypatch, handlers):
    """The handlers from before are put back after the last step, and also after an error."""
    during = []
    spy = at_the_end_of(grpo.rollout, 1, lambda: during.append(signal.getsignal(signal.SIGTERM)))
    monkeypatch.setattr(grpo, "rollout", spy)
    before = signal.getsignal(signal.SIGTERM)
    assert run_main(world | {"max_steps": "1"}) == 0
    assert isinstance(during[0], Signals) and signal.getsignal(signal.SIGTERM) is before

    def fail(run):
        raise InputError("a mistake")

    monkeypatch.setattr(grpo, "train_step", fail)
    with pytest.raises(InputError, match="a mistake"):
        finish(world, 2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_hold_signals_outside_of_training_does_nothing(handlers):
    hold_signals()
    assert Signals.installed is None


def start(*argv: str, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *argv], cwd=cwd, stderr=subprocess.PIPE)


def wait_until(condition, process: subprocess.Popen):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or nothing happens"
        time.sleep(0.05)


def test_sigterm_saves_and_resumes(world, tmp_path):
    """The program stops in the middle of a run with exit code 130 and a checkpoint of the last whole step,
    from which it goes on."""
    flags = arguments(world | {"max_steps": "100000"})
    process = start(str(ROOT / "grpo.py"), *flags, "--no-bf16", cwd=tmp_path)  # as in worlds.run_main
    metrics = Path(world["output_dir"]) / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()[-2000:]
    steps = steps_of(world)
    assert steps == list(range(1, len(steps) + 1))
    newest = checkpoints(Path(world["output_dir"]))[-1]
    assert newest.name == f"checkpoint-{steps[-1]}"
    finish(world, steps[-1] + 1)
    assert steps_of(world)[-1] == steps[-1] + 1


DRIVER = f"""
import os, pathlib, signal, sys, time
from dataclasses import replace
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
import grpo
import optim
from reward import METHODS
from worlds import lively_reward

METHODS["sem"] = replace(METHODS["sem"], reward=lively_reward)
real, calls = optim.AdamW.step, []


def step(*args, **options):
    calls.append(None)
    result = real(*args, **options)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        pathlib.Path("held").touch()
        time.sleep(300)
    return result


optim.AdamW.step = step
grpo.program()
"""


def test_a_second_signal_ends_the_program_at_once(world, undisturbed, tmp_path):
    """The first signal comes while the weights move, so it waits. The second one ends the program even then,
    and the run can be resumed from its last checkpoint."""
    (tmp_path / "driver.py").write_text(DRIVER)
    process = start("driver.py", *arguments(world), "--no-bf16", cwd=tmp_path)
    wait_until((tmp_path / "held").exists, process)
    time.sleep(0.5)
    assert process.poll() is None  # the first signal waits
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err.decode()[-2000:]
    assert steps_of(world) == [1, 2]
    assert [p.name for p in checkpoints(Path(world["output_dir"]))] == ["checkpoint-2"]
    finish(world, 4)
    assert_same_run(world["output_dir"], undisturbed)


@pytest.mark.parametrize("where, saved", [("rollout", ["checkpoint-2"]), ("step", [])])
def test_a_full_gpu_is_one_line(world, lively, monkeypatch, handlers, where, saved):
    """The last whole step is saved, unless the weights are in the middle of an update."""

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    if where == "rollout":
        monkeypatch.setattr(grpo, "rollout", at_the_end_of(grpo.rollout, 3, full))
    else:
        monkeypatch.setattr(optim.AdamW, "step", at_the_end_of(optim.AdamW.step, 3, full))
    with pytest.raises(InputError, match="out of GPU memory in step 3: --resume with other") as error:
        run_main(world | {"save_steps": "50"})
    assert "\n" not in str(error.value)
    assert steps_of(world) == [1, 2]
    assert [p.name for p in checkpoints(Path(world["output_dir"]))] == saved


# ------------------------------------------------------------------------------------------------------------
# the date, and checkpoints that cannot be written


def with_a_date(flags: dict[str, str]):
    path = Path(flags["model"]) / "chat_template.jinja"
    path.write_text(path.read_text() + "{{ strftime_now(' w%-d w%-m') }}")


def test_a_run_has_one_date(world, lively, tmp_path, monkeypatch):
    """A run that is resumed on another day has the prompts of the first day, so it stays exact."""

    class OtherDay(module.date):
        @classmethod
        def today(cls):
            return cls(2031, 3, 4)

    with_a_date(world)
    flags = [world | {"output_dir": str(tmp_path / name), "save_steps": "2"} for name in ("whole", "part")]
    assert run_main(flags[0] | {"date": "2019-02-05"}) == 0
    monkeypatch.setattr(module, "date", OtherDay)
    assert run_main(flags[1] | {"date": "2019-02-05", "max_steps": "2"}) == 0
    assert json.loads((tmp_path / "part" / "run.json").read_text())["date"] == "2019-02-05"
    assert run_main({"output_dir": flags[1]["output_dir"], "max_steps": "4"}, "--resume") == 0
    assert timeless(tmp_path / "part" / "metrics.jsonl") == timeless(tmp_path / "whole" / "metrics.jsonl")
    rows = timeless(tmp_path / "part" / "transcripts.jsonl")
    assert all(row["prompt"].endswith("w5 w2") for row in rows)
    with pytest.raises(InputError, match="--date is 2019-02-05 in"):
        run_main({"output_dir": flags[1]["output_dir"], "date": "2019-02-06"}, "--resume")


def test_a_run_json_without_a_date_takes_todays(world, lively, capsys):
    with_a_date(world)
    assert run_main(world | {"max_steps": "2"}) == 0
    path = Path(world["output_dir"]) / "run.json"
    settings = json.loads(path.read_text())
    today = module.date.today().isoformat()
    assert settings.pop("date") == today
    path.write_text(json.dumps(settings))
    assert run_main({"output_dir": world["output_dir"], "max_steps": "3"}, "--resume") == 0
    assert f"has no date; a chat template that prints one gets {today}" in "".join(capsys.readouterr())
    assert json.loads(path.read_text())["date"] == today


@pytest.mark.parametrize("where", ["fsync", "weights", "rename"])
def test_a_run_whose_first_checkpoint_cannot_be_written_stops(world, lively, monkeypatch, capsys, where):
    def refuse(*arguments, **options):
        raise OSError(9, "Bad file descriptor")

    name = {"fsync": "fsync", "rename": "replace"}.get(where)
    real = getattr(os, name) if name else None
    if where == "weights":
        monkeypatch.setattr(module, "save_file", refuse)
    else:

        def sometimes(source, *arguments):
            return refuse() if where == "fsync" or "checkpoint-" in str(source) else real(source, *arguments)

        monkeypatch.setattr(os, name, sometimes)
    with pytest.raises(
        InputError, match=r"checkpoint-2 was not written, so the run stops: .*Bad file descriptor"
    ):
        run_main(world)
    assert steps_of(world) == [1, 2] and not list(Path(world["output_dir"]).glob("checkpoint-*"))
    monkeypatch.undo()


def test_files_are_flushed_through_a_handle_that_can_be_written_to(world, lively, monkeypatch):
    import fcntl

    real, modes = os.fsync, []

    def spy(number):
        if not stat.S_ISDIR(os.fstat(number).st_mode):
            modes.append(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE)
        return real(number)

    monkeypatch.setattr(os, "fsync", spy)
    assert run_main(world | {"max_steps": "2"}) == 0
    assert len(modes) >= 6 and set(modes) == {os.O_RDWR}


def test_what_a_crash_left_of_a_checkpoint_is_removed(world, lively):
    assert run_main(world | {"max_steps": "2"}) == 0
    out = Path(world["output_dir"])
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-7.tmp")
    assert run_main({"output_dir": world["output_dir"], "max_steps": "3"}, "--resume") == 0
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


# ------------------------------------------------------------------------------------------------------------
# SIGKILL (bench/kill.py makes many more of these)


@pytest.mark.parametrize("call", [25, 45])
def test_a_killed_run_ends_like_an_undisturbed_one(world, undisturbed, tmp_path, call):
    """The run is killed when it opens or renames a file for the 25th time, which is inside of the first
    checkpoint, and for the 45th time, which is later."""
    kill = runpy.run_path(str(ROOT / "bench" / "kill.py"))
    trial = kill["Trial"](tmp_path, "killed", [*arguments(world), "--no-bf16"])
    assert "exit -9" in kill["killed_at_a_call"](trial, call)
    assert (call == 25) == ([p.suffix for p in trial.out.glob("checkpoint-*")] == [".tmp"])
    assert not (trial.out / "model.safetensors").exists() and trial.finish() == 0
    assert kill["differences"](trial.out, Path(undisturbed)) == "none"


@pytest.mark.parametrize("call, saved", [(5, ["checkpoint-2"]), (6, [])])
def test_a_gpu_that_is_full_between_two_updates_leaves_no_checkpoint(
    world, lively, monkeypatch, handlers, call, saved
):
    """Each step makes two updates. In the first backward pass of step 3 the weights are still those of step
    2, and in the second one they are those of no step."""

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.Tensor, "backward", at_the_end_of(torch.Tensor.backward, call, full))
    with pytest.raises(InputError, match="out of GPU memory in step 3"):
        run_main(world | {"save_steps": "50", "num_iterations": "2"})
    assert [p.name for p in checkpoints(Path(world["output_dir"]))] == saved


@pytest.mark.parametrize("moment", ["write_model", "flush"])
def test_a_second_signal_does_not_break_the_checkpoint_of_the_first(
    world, lively, monkeypatch, handlers, moment
):
    """The first signal drops the step under way. The second one comes while the steps before it are saved,
    at the beginning or at the end."""
    real = getattr(module, moment)

    def interrupted(*args):
        terminate()
        return real(*args)

    monkeypatch.setattr(grpo, "rollout", at_the_end_of(grpo.rollout, 2, terminate))
    monkeypatch.setattr(module, moment, interrupted)
    assert run_main(world | {"save_steps": "50"}) == 130
    out = Path(world["output_dir"])
    assert [p.name for p in checkpoints(out)] == ["checkpoint-1"] and not list(out.glob("*.tmp"))


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_after_a_checkpoint_a_signal_stops_the_run_at_once(
    world, lively, monkeypatch, handlers, capsys, disk_is_full
):
    """Only while a checkpoint is written do signals wait for it, whether or not that succeeds. Here it is the
    second one that may fail, because without the first one the run would stop."""
    real = module.save_file

    def full(tensors, path):
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        return real(tensors, path)

    if disk_is_full:
        monkeypatch.setattr(module, "save_file", full)
    monkeypatch.setattr(grpo, "rollout", at_the_end_of(grpo.rollout, 3, terminate))
    assert run_main(world | {"save_steps": "1"}) == 130
    assert steps_of(world) == [1, 2]
    assert ("checkpoint-2 was not written" in capsys.readouterr().out) == disk_is_full


# ------------------------------------------------------------------------------------------------------------
# more about checkpoints and resuming


def test_what_samples_are_the_weights_of_the_last_update(world, lively, monkeypatch):
    """Also in bf16: after an update, and after a resume those of the checkpoint."""
    real, sampling = grpo.rollout, []

    def spied(model, *args, **options):
        sampling.append({name: p.detach().cpu().clone() for name, p in model.named_parameters()})
        return real(model, *args, **options)

    out = Path(world["output_dir"])
    assert run_main(world | {"max_steps": "1"}, "--bf16") == 0
    trained = [load_file(out / "checkpoint-1" / "model.safetensors")]
    monkeypatch.setattr(grpo, "rollout", spied)
    assert run_main({"output_dir": str(out), "max_steps": "3"}, "--resume", "--bf16") == 0
    trained.append(load_file(out / "checkpoint-2" / "model.safetensors"))
    for seen, weights in zip(sampling, trained, strict=True):
        assert seen.keys() == weights.keys()
        assert all(torch.equal(seen[name], weight) for name, weight in weights.items())


def test_a_resume_changes_no_setting_but_those_given(world, lively):
    """This includes the sizes, which were computed from the memory that was free at the start."""
    sizes = {"rollout_slots": "8", "micro_batch_tokens": "100"}
    assert run_main(world | sizes | {"max_steps": "1"}) == 0
    stored = Path(world["output_dir"]) / "run.json"
    before = json.loads(stored.read_text())
    finish(world, 2)
    assert json.loads(stored.read_text()) == before | {"max_steps": 2}
    assert (before["rollout_slots"], before["micro_batch_tokens"]) == (8, 100)


def test_what_a_killed_run_has_left_is_in_no_checkpoint(world, lively):
    left = Path(world["output_dir"]) / "checkpoint-1.tmp"
    left.mkdir(parents=True)
    (left / "half-of-it").write_text("")
    assert run_main(world | {"max_steps": "1"}) == 0
    [checkpoint] = checkpoints(left.parent)
    assert not (checkpoint / "half-of-it").exists() and not left.exists()


def test_the_table_of_other_data_sets_is_not_compared_with(world, lively):
    sets = {"eval": world["train"], "eval_size": "4"}
    assert run_main(world | sets | {"max_steps": "1"}) == 0
    path = Path(world["output_dir"]) / "eval.json"
    tables = json.loads(path.read_text())
    path.write_text(json.dumps({"before": {"another": tables["before"]["known"]}}))
    finish(world, 2)
    assert set(json.loads(path.read_text())) == {"after"}


def test_checkpoint_10_is_newer_than_checkpoint_8(world, monkeypatch):
    """Checkpoints are sorted by number, both when old ones are removed and when the newest is loaded."""
    begun = []

    def step(run):
        begun.append(run.step)
        run.step += 1
        return GOOD_STEP, []

    monkeypatch.setattr(grpo, "train_step", step)
    assert run_main(world | {"max_steps": "10"}) == 0
    kept = [p.name for p in checkpoints(Path(world["output_dir"]))]
    assert kept == ["checkpoint-8", "checkpoint-10"]
    with pytest.raises(InputError, match="is at step 10 already"):
        finish(world, 9)
    finish(world, 11)
    assert begun == list(range(11))


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(world, lively, monkeypatch):
    """Otherwise a power failure could leave a complete name with empty files. The checkpoint before it is
    removed later still: when the name of the new one is on the disk too."""
    out, named, flushed, fsync, replace = Path(world["output_dir"]), [], set(), os.fsync, os.replace
    seen_with_the_name = []

    def spied_fsync(file):
        flushed.add(os.fstat(file).st_ino)
        if os.fstat(file).st_ino == out.stat().st_ino:
            seen_with_the_name.append([p.name for p in checkpoints(out)])
        fsync(file)

    def spied_replace(source, target):
        if target.name.startswith("checkpoint-"):
            missing = [p.name for p in source.iterdir() if p.stat().st_ino not in flushed]
            named.append((target.name, missing, [p.name for p in checkpoints(out)]))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    assert run_main(world | {"save_total_limit": "1"}) == 0
    assert named == [("checkpoint-2", [], []), ("checkpoint-4", [], ["checkpoint-2"])]
    assert seen_with_the_name == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]
    assert [p.name for p in checkpoints(out)] == ["checkpoint-4"]


# ------------------------------------------------------------------------------------------------------------
# what a run is made of


def make_run(flags: dict[str, str], *switches: str) -> module.Run:
    argv = [*arguments(flags), "--no-bf16", *switches]
    return module.Run(resolve(*parse(Config, "grpo.py", argv)))


def test_weight_decay_is_for_matrices_alone(world):
    """A step with gradients of 0 does nothing but decay. Norms and biases are left as they are."""
    run = make_run(world | {"weight_decay": "0.5", "learning_rate": "0.01"})
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    assert {p.ndim for p in run.model.parameters()} == {1, 2}
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * 0.01 * (p.ndim == 2)))


def test_models_that_are_not_needed_are_not_loaded(world):
    """Without a KL term there is no reference. The model itself samples."""
    run = make_run(world | {"beta": "0"})
    assert run.reference is None and run.runner.model is run.model
    assert make_run(world).reference is not None


def test_the_data_sets_of_training_and_of_the_evaluation(world, monkeypatch):
    """They are different splits, and only the evaluation takes a sample."""
    real, calls = module.load_sets, []
    monkeypatch.setattr(module, "load_sets", lambda *args: calls.append(args) or real(*args))
    run = make_run(world | {"eval": world["train"], "eval_size": "3"})
    assert calls == [(world["train"], "train"), (world["train"], "test", 3)]
    assert {len(rows) for rows in run.sources.values()} == {40}
    assert {len(rows) for rows in run.eval_sets.values()} == {3}


@pytest.mark.parametrize("simulator", [False, True])
def test_a_simulator_is_for_training_alone(world, monkeypatch, simulator):
    """The evaluation of ZeroSearch asks the corpus. What is noise in training depends on --seed."""
    flags = world | {"method": "zerosearch", "eval": world["train"], "seed": "7"}
    run, calls = make_run(flags | ({"simulator": world["model"]} if simulator else {})), []
    monkeypatch.setattr(module, "evaluate", lambda *args, **options: calls.append((args, options)) or {})
    monkeypatch.setattr(module, "check_answered", lambda records: None)
    run.out.mkdir()
    run.evaluate("before")
    [((model, _, template, sets, retriever), options)] = calls
    assert type(run.train_retriever) is (ModelSimulator if simulator else CorpusSimulator)
    assert run.train_retriever.seed == 7 and type(retriever) is BM25
    assert model is run.model and template is run.method.template and sets == run.eval_sets
    assert options["runner"] is run.runner and options["slots"] == run.config.rollout_slots
    budget = run.config.budget()
    assert {name: options[name] for name in budget} == budget


def test_the_cache_is_as_long_as_an_episode(world, monkeypatch):
    """An episode ends with its token budget, or with the context of the model, which is 64 here."""
    monkeypatch.setattr(module, "ModelRunner", lambda model, vocab_size, slots, length, graphs: length)
    prompt = make_run(world | {"max_completion_length": "1"}).runner - 1
    assert 3 <= prompt < 20
    assert make_run(world | {"max_completion_length": "30"}).runner == prompt + 30
    assert make_run(world | {"max_completion_length": "500"}).runner == 64


@pytest.mark.parametrize("missing", [0, 1])
def test_a_gpu_has_to_hold_the_model_and_one_group(world, monkeypatch, missing):
    """Rough numbers of bytes: gradients, that of the head once more, a chunk of logits, the logits of a
    decode step, the activations of one episode, the cache of a group. The moments are there already."""
    run = make_run(world)
    parameters, length = sum(p.numel() for p in run.model.parameters()), run.runner.max_len
    head = run.model.get_output_embeddings().weight.numel()
    fixed = 4 * parameters + 4 * head + (2 << 30) + 4 * 4 * 16 * len(run.tokenizer)
    activations, cache = (
        2 * 32 * 80 * length,
        4 * 2 * 2 * 2 * 8 * 4 * length,
    )  # layers, K and V, heads, D, fp32
    free = fixed + activations + cache - missing
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    if missing:
        with pytest.raises(InputError, match=r"one group of \d+ tokens do not fit this GPU"):
            run.resolve_sizes("cuda", length - 24)
    else:
        run.resolve_sizes("cuda", length - 24)


@pytest.mark.parametrize("missing", [0, 1])
def test_the_disk_has_to_hold_the_checkpoints_and_the_result(world, monkeypatch, missing):
    """Three checkpoints of 12 bytes a parameter, of which the oldest is removed when the newest is complete,
    and the final weights of 4."""
    run = make_run(world | {"save_total_limit": "2"})
    free = (3 * 12 + 4) * sum(p.numel() for p in run.model.parameters()) - missing
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if missing:
        with pytest.raises(InputError, match="GB are free"):
            run.start()
    else:
        run.start()


def test_both_signals_have_the_same_handler(handlers):
    with Signals() as signals:
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signals


def test_a_transcript_is_about_one_episode(world):
    """Its figures are those of its own episode, and there are some of every source."""
    run, episodes = make_run(world | {"log_completions": "2"}), episodes_with_results()
    for i, e in enumerate(episodes):
        e.question = replace(e.question, source="known" if i < 4 else "unknown")
    parts = [{"reward": i / 10} for i in range(5)]
    rows = run.transcripts(episodes, parts, [float(i) for i in range(5)])
    assert [(row["id"], row["reward"], row["advantage"]) for row in rows] == [
        ("0", 0.0, 0.0),
        ("2", 0.2, 2.0),
    ]
    run.config = replace(run.config, log_completions=9)
    assert [row["id"] for row in run.transcripts(episodes, parts, [0.0] * 5)] == list("01234")


# ------------------------------------------------------------------------------------------------------------
# directories that hold something else


@pytest.mark.parametrize("name", ["checkpoint-500/trainer_state.json", "config.json"])
def test_the_model_of_somebody_else_is_left_alone(world, name):
    """The checkpoints of another program would be the oldest or the newest of this run."""
    path = Path(world["output_dir"]) / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(InputError, match="holds a model or checkpoints of something else"):
        run_main(world)
    assert [p for p in Path(world["output_dir"]).rglob("*") if p.is_file()] == [path]


def test_a_name_that_is_taken_is_no_checkpoint(world, lively, capsys):
    assert run_main(world | {"max_steps": "2"}) == 0
    (Path(world["output_dir"]) / "checkpoint-4").write_text("")
    with pytest.raises(InputError, match="checkpoint-4 was not written, so the run stops"):
        run_main({"output_dir": world["output_dir"], "max_steps": "4"}, "--resume")


@pytest.mark.parametrize(
    "place, reason", [("", "--output_dir: it is empty"), ("o\udcff", "its name is not UTF-8")]
)
def test_names_that_are_no_directory(world, place, reason):
    with pytest.raises(InputError, match=reason):
        run_main(world | {"output_dir": place})


def test_a_data_set_whose_name_is_not_utf8(world, lively, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    shutil.copy(tmp_path / "known.jsonl", path)
    assert run_main(world | {"train": path, "max_steps": "1"}) == 0
    [metrics] = timeless(Path(world["output_dir"]) / "metrics.jsonl")
    assert "em/caf\\xe9" in metrics
    assert {row["source"] for row in timeless(Path(world["output_dir"]) / "transcripts.jsonl")} == {
        "caf\\xe9"
    }
