"""A run and its directory: what it is made of, its checkpoints and its logs.

    with lock(out):                    # no second process writes into the directory of the run
    config = resolve(config, given)    # adds what the command line leaves open: a stored run or the toy world
    run = Run(config)                  # loads data sets, retriever and models
    run.start()                        # writes run.json, loads a checkpoint, evaluates the start model
    run.record(...)                    # after every step, by grpo.train_step
    run.save_checkpoint()              # every save_steps steps, by grpo.train
    run.finish()                       # writes the final weights, evaluates them, prints the table

The directory (--output_dir) holds

    run.json             all settings, those derived from free memory included
    metrics.jsonl        one object for each step
    transcripts.jsonl    some whole episodes of each step
    checkpoint-N/        a Hugging Face directory with trainer_state.json and optimizer.safetensors, which
                         has the lower halves of bf16 weights too; with --lora_r the adapter, not the model
    eval.json            the evaluation before and after training
    lock                 held while a process runs in it, see disk.lock
    *.safetensors, ...   the final weights: the directory itself is a Hugging Face directory
    adapter/             with --lora_r the final adapter, which those weights have merged in, see lora.py

Resuming is exact on a CPU: a run of N steps that was stopped and resumed has the same weights and metrics,
except times, bit for bit, as one that was never stopped. This rests on four things. The questions and the
random numbers of a step are functions of (seed, step). A checkpoint holds all 32 bits of the weights, and the
whole state of AdamW. The reference is loaded from the start model, never from a checkpoint. Sizes that depend
on free memory are computed once and stored in run.json.

Resuming is not exact in four cases. First, a GPU does not add gradients in a fixed order. (Sampling is exact
there too: the same weights, seed, step and size of the cache give the same tokens.) Second, the answers of a
remote retriever come at no fixed time, so from run to run different rows share a batch, and sums are rounded
differently. Third, sums are also rounded differently if --rollout_slots, --micro_batch_tokens,
--gradient_checkpointing, the number of threads or the number of processes changes. Fourth, with --simulator
the documents themselves depend on which rows search together.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from dataclasses import asdict, fields, replace
from datetime import date
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import toy
from cache import context_length, kv_bytes
from config import LORA, TOY, TOY_LORA, Config, check, check_writable
from data import Episode, InputError, Question, load_sets
from disk import (
    append_rows,
    checkpoints,
    drop_later_rows,
    flush,
    flush_names,
    read_lines,
    replace_bytes,
    write_model,
)
from evaluate import check_answered, evaluate
from lora import add_adapters, load_adapter, merge, save_adapter
from measures import markdown, summary
from model import check_prompts, load_model, probe, stored_types
from optim import AdamW, local, rounding_notes
from prompts import render, set_date
from retriever import open_retriever
from reward import METHODS, REWARDS, Reward, dialect
from runner import ModelRunner
from signals import Signals, hold_signals
from simulator import HELPFUL, CorpusSimulator, ModelSimulator
from world import ALONE, World

# ------------------------------------------------------------------------------------------------------------
# from the command line to the settings of a run


def place(config: Config, given: set[str]) -> Config:
    """Returns the settings with the directory of the run. Without --model and --output_dir that is the
    directory of the toy run. Raises InputError if the directory cannot be written to, or if it holds no run
    that could be resumed."""
    if not config.model and "output_dir" not in given:
        name = "" if config.method == "sem" else f"-{config.method}"
        config = replace(config, output_dir=TOY["output_dir"] + name)
    if not config.output_dir.strip():
        raise InputError("--output_dir: it is empty")
    out = Path(config.output_dir)
    if config.resume and not (out / "run.json").exists():
        raise InputError(f"--resume: there is no run in {out} ({out / 'run.json'} is missing)")
    check_writable(out, "--output_dir")
    return config


def resolve(config: Config, given: set[str]) -> Config:
    """Returns the complete, checked settings: with --resume those of the stored run, without --model those of
    the toy world, which is built if it is not there. `given` are the flags of the command line. Raises
    InputError for values that make no sense, and for an --output_dir that holds a run."""
    config = place(config, given)
    toy_run, today, out = not config.model, date.today().isoformat(), Path(config.output_dir)
    if config.resume:
        return resume_config(config, given, out)
    if toy_run:
        defaults = TOY | {"output_dir": config.output_dir}
        config = replace(config, **{name: value for name, value in defaults.items() if name not in given})
    if config.lora_r:
        missing = {n: x for n, x in (TOY_LORA if toy_run else LORA).items() if n not in given}
        config = replace(config, **missing)
        if "learning_rate" in missing:
            source = "bench/RESULTS.md" if toy_run else "the Tinker cookbook's search runs with rank 32"
            print(f"--lora_r without --learning_rate: {config.learning_rate:g}, from {source}")
    if config.bf16 is None:
        config = replace(config, bf16=torch.cuda.is_available())
    if (out / "run.json").exists():
        raise InputError(f"{out} holds a run: --resume continues it, another --output_dir starts one")
    if config.model and out.resolve() == Path(config.model).resolve():
        raise InputError(f"--output_dir {out}: that is --model, which would be overwritten")
    if checkpoints(out) or (out / "config.json").exists():  # old checkpoints would be removed
        raise InputError(f"--output_dir {out}: it holds a model or checkpoints of something else")
    config = replace(check(config), date=config.date or today)
    return with_toy_world(config) if toy_run else config


def resume_config(config: Config, given: set[str], out: Path) -> Config:
    """The stored settings, with the flags of the command line that may change in the middle of a run."""
    stored = out / "run.json"
    try:
        before = Config(**json.loads(stored.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"--resume: {stored} is not the settings of a run: {error}") from error
    changeable = set(
        "resume output_dir max_steps save_steps save_total_limit log_completions retriever".split()
    )
    changeable |= set("rollout_slots micro_batch_tokens gradient_checkpointing cuda_graphs save_fp32".split())
    changeable |= set() if before.date else {"date"}
    if before.method in METHODS and METHODS[before.method].simulated:
        changeable -= {"max_steps"}  # the share of noise depends on it
    if wrong := [n for n in sorted(given - changeable) if getattr(config, n) != getattr(before, n)]:
        value = getattr(before, wrong[0])
        raise InputError(f"--resume: --{wrong[0]} is {value} in {stored} and cannot be changed")
    try:
        config = check(replace(before, **{name: getattr(config, name) for name in given}))
    except TypeError as error:
        raise InputError(f"--resume: {stored}: a value has the wrong type: {error}") from error
    done = max((int(path.name[11:]) for path in checkpoints(out)), default=0)
    if "max_steps" in given and config.max_steps < done:
        raise InputError(f"--max_steps {config.max_steps}: {out} is at step {done} already")
    if not config.date:
        config = replace(config, date=date.today().isoformat())
        tqdm.write(f"warning: {stored} has no date; a chat template that prints one gets {config.date}")
    return config


def with_toy_world(config: Config) -> Config:
    """Builds the toy world of the method's dialect, unless it is there, and points the settings to it."""
    torch.set_num_threads(1)  # as in Run.resolve_sizes
    method = dialect(config.method)
    folder = "out/toy-world" + ("" if method == "sem" else f"-{method}") + f"-{config.seed}"
    world = toy.build(toy.Config(output_dir=folder, seed=config.seed, method=method))
    return replace(
        config,
        model=str(world / "model"),
        train=",".join(f"{world}/train/{name}.jsonl" for name in config.train.split(",")),
        eval=",".join(f"{world}/test/{name}.jsonl" for name in filter(None, config.eval.split(","))),
        corpus=config.corpus or str(world / "corpus.jsonl"),
    )


# ------------------------------------------------------------------------------------------------------------
# a run


class SaveError(InputError):
    """A checkpoint cannot be written, and this process has not written an earlier one."""


class Run:
    """The settings, data sets, models and optimizer of a run. Training changes only the weights, the
    optimizer's state and `step`, the number of finished steps."""

    def __init__(self, config: Config, world: World = ALONE):
        world.check(config)
        self.config, self.step, self.has_saved, self.progress = config, 0, False, sys.stderr.isatty()
        self.world, self.writes = world, world.rank == 0  # of several processes one writes
        self.method = METHODS[config.method]
        reward = REWARDS[config.reward] if config.reward else self.method.reward
        self.reward = reward if isinstance(reward, Reward) else Reward(reward)  # a method may have a function
        self.out, self.tables = Path(config.output_dir), {}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.sources = load_sets(config.train, "train")
        self.eval_sets = load_sets(config.eval, "test", config.eval_size)
        self.open_retrievers(device, dtype)
        self.model, self.tokenizer = load_model(config.model, device, dtype)
        set_date(self.tokenizer, config.date)
        questions = [q for sets in (self.sources, self.eval_sets) for rows in sets.values() for q in rows]
        longest = check_prompts(self.model, self.tokenizer, self.method.template, questions)
        probe(self.model, self.tokenizer, longest + config.max_completion_length)
        start = None  # with adapters, the start model, whose weights are those of the model
        if config.lora_r:
            start = add_adapters(self.model, config.lora_r, config.lora_alpha, config.seed)
        # With several processes a copy in shards is trained, and this whole model samples. With adapters
        # there is no copy: the sampler needs the frozen weights as a whole anyway, and adapters are small.
        in_shards = world.size > 1 and not start
        self.trainee = self.copy_model() if in_shards else self.model
        self.optimizer = AdamW(self.trainee, config.learning_rate, config.weight_decay)
        if config.bf16 and not start and stored_types(config.model) != {"BF16"}:
            stored = load_model(config.model, "cpu")[0]
            self.optimizer.load_weights(world.shard(stored))  # with their lower halves
            self.refresh_sampler()
        self.reference = (start or self.copy_model()) if config.beta else None
        if config.gradient_checkpointing:
            self.trainee.gradient_checkpointing_enable({"use_reentrant": False})
        self.resolve_sizes(device, longest)

    def copy_model(self):
        """A copy of the model that samples. With several processes it is in shards, and made of a copy on the
        CPU, because a GPU need not have room for a second whole model."""
        if self.world.size == 1:
            return copy.deepcopy(self.model)
        model = load_model(self.config.model, "cpu", self.model.dtype)[0]
        model.load_state_dict(self.model.state_dict())
        return self.world.shard(model)

    def open_retrievers(self, device: str, dtype: torch.dtype):
        """Opens the retrievers of the evaluation and of the training. They differ in ZeroSearch alone, which
        trains with a simulator. SSRL needs none."""
        config = self.config
        self.eval_retriever = None
        without_corpus = config.simulator and not config.eval  # a simulator needs no corpus to train with
        if not (self.method.template.self_search or without_corpus):
            self.eval_retriever = open_retriever(config, {"train": config.train, "test": config.eval})
        self.train_retriever = self.eval_retriever
        if config.simulator:
            simulator, tokenizer = load_model(config.simulator, device, dtype, "--simulator")
            set_date(tokenizer, config.date)
            render(HELPFUL, Question("", "", [], ""), tokenizer)  # InputError for an unusable chat template
            probe(simulator, tokenizer, 1024)  # roughly its prompt and the 600 tokens that it writes
            self.train_retriever = ModelSimulator(simulator, tokenizer, config.seed)
        elif self.method.simulated:
            self.train_retriever = CorpusSimulator(self.eval_retriever, config.seed)

    def resolve_sizes(self, device: str, longest: int):
        """Fills in the sizes of a pass and of the cache, once: a resumed run finds them in run.json. Makes
        the runner, with its cache, that all rollouts share except those of a simulator. On a GPU the sizes
        follow from the free memory; on a CPU from a fixed budget, and there a small model gets one thread.
        Raises InputError if the model and one group of episodes do not fit the GPU."""
        c, text = self.config, self.model.config.get_text_config()
        parameters = sum(p.numel() for p in self.model.parameters())
        rows = c.prompts_per_step * c.num_generations // self.world.size
        length = min(longest + c.max_completion_length, context_length(self.model.config))
        most_tokens, memory = 1 << 11, 1 << 33  # on a CPU small passes are faster: they stay in its cache
        if device == "cuda":
            # Allocated later: gradients, that of the head in fp32 too; a chunk of logits (2 GB); and the
            # logits of a decode step, four times while its graph is recorded.
            head, logits = self.model.get_output_embeddings().weight, rows * len(self.tokenizer)
            gradients = sum(local(p).nbytes for p in self.optimizer.parameters.values())
            gradients += 4 * head.numel() if head.requires_grad else 0
            if self.trainee is not self.model:  # head, embedding and a layer, gathered, with their gradients
                gradients += 16 * (head.numel() + parameters // text.num_hidden_layers)
            torch.cuda.empty_cache()
            reserved = gradients + (2 << 30) + 4 * self.model.dtype.itemsize * logits
            most_tokens, memory = 1 << 16, torch.cuda.mem_get_info()[0] - reserved
            memory = -self.world.most(-memory)  # the least of all processes
        elif parameters < 1e7:
            # a second thread saves some time, but on a busy machine it makes a step several times slower
            torch.set_num_threads(1)
        # Rough bytes of activations in bf16 for each token, layer and entry of the hidden state. (In fp32 it
        # takes more.) With checkpointing a layer keeps its input alone.
        layer_factor = 4 if c.gradient_checkpointing else 80
        token_activations = text.num_hidden_layers * text.hidden_size * layer_factor
        row_cache = length * kv_bytes(self.model.config, self.model.dtype)
        if device == "cuda" and token_activations * length + row_cache * c.num_generations > memory:
            size = f"{parameters / 1e9:.1f} B parameters and one group of {length} tokens"
            advice = "try --gradient_checkpointing or a smaller --max_completion_length"
            raise InputError(f"{size} do not fit this GPU: {advice}")
        self.config = replace(
            c,
            micro_batch_tokens=c.micro_batch_tokens
            or max(1, min(most_tokens, int(memory / 2 / token_activations))),
            rollout_slots=c.rollout_slots or min(rows, max(c.num_generations, int(memory / 2 / row_cache))),
        )
        vocab_size, slots = len(self.tokenizer), self.config.rollout_slots
        self.runner = ModelRunner(self.model, vocab_size, slots, length, c.cuda_graphs)

    def memory(self) -> str:
        """A line with the GB that this process keeps allocated during the run, by purpose."""
        model = sum(local(p).nbytes for p in self.trainee.parameters())
        entries = self.optimizer.state_dict().items()
        lower = sum(local(x).nbytes for key, x in entries if key.endswith(".lower"))
        gradients = sum(local(p).nbytes for p in self.optimizer.parameters.values())
        sizes = {"weights": model + lower, "gradients": gradients}
        sizes["moments"] = sum(local(x).nbytes for key, x in entries if ".exp_avg" in key)
        sizes["start model"] = model if self.reference and not self.config.lora_r else 0
        if self.trainee is not self.model:
            sizes["sampling copy"] = sum(p.nbytes for p in self.model.parameters())
        sizes["cache"] = sum(x.nbytes for x in self.runner.cache.keys + self.runner.cache.values)
        return ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in sizes.items())

    def refresh_sampler(self):
        """Gives the model that samples the new weights, if it is not the one that is trained."""
        if self.trainee is not self.model:
            self.world.gather_weights(self.trainee, self.model)

    # the beginning and the end

    def start(self):
        """Checks the disk space and writes run.json. With --resume it loads the newest checkpoint. At step 0
        it evaluates the start model."""
        config = self.config
        # A checkpoint takes 12 bytes a trained parameter (32 bits of a weight, two moments), and during a
        # save there is one more than the limit.
        to_come = config.save_total_limit + 1 - len(checkpoints(self.out))
        final = 4 if config.save_fp32 else self.model.dtype.itemsize
        trained = sum(p.numel() for p in self.optimizer.parameters.values())
        space = 12 * max(1, to_come) * trained + final * sum(p.numel() for p in self.model.parameters())
        if (free := shutil.disk_usage(check_writable(self.out, "--output_dir")).free) < space:
            need = f"{free / 1e9:.2f} GB are free, checkpoints and the result need {space / 1e9:.2f} GB"
            raise InputError(f"--output_dir {self.out}: {need}")
        print("\n".join(f"{f.name:24} {getattr(config, f.name)}" for f in fields(config)))
        print(f"memory: {self.memory()}", *rounding_notes(self.optimizer), sep="\n")
        if self.writes:
            self.out.mkdir(parents=True, exist_ok=True)
            for unfinished in self.out.glob("checkpoint-*.tmp"):  # a crash left them; they can be very large
                shutil.rmtree(unfinished, ignore_errors=True)
            settings = asdict(replace(config, resume=False))
            replace_bytes(self.out / "run.json", json.dumps(settings, indent=1).encode())
        if config.resume:
            self.load_checkpoint()
            self.tables = self.load_tables()
        if self.step == 0:
            self.evaluate("before")

    def finish(self):
        """Writes the final weights, evaluates them, and prints the table. With --lora_r the written weights
        have the adapters merged in, and the evaluated ones have them apart, as in training."""
        try:
            full, lora = None, self.config.lora_r
            if self.config.save_fp32 and not lora:
                full = self.optimizer.full_weights(self.world.whole)
            if self.writes and lora:
                questions = [q for rows in self.sources.values() for q in rows[:2]]
                prompts = [render(self.method.template, q, self.tokenizer) for q in questions]
                full = merge(self.model, self.out / "adapter", self.config, prompts)
            if self.writes:
                write_model(self.model, self.tokenizer, self.out, full)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.out}: the final weights were not written: {error}") from error
        self.evaluate("after")
        if self.tables:
            print("\n" + markdown(self.tables))
        print(f"\nCurves and transcripts: python report.py {self.out}")

    def evaluate(self, when: str):
        """Evaluates the model on the evaluation sets, if there are any, and adds the table to eval.json."""
        if not self.eval_sets:
            return
        sets, world = self.eval_sets, self.world
        own = {name: [rows[i] for i in world.block(len(rows))] for name, rows in sets.items()}
        records = evaluate(
            self.model, self.tokenizer, self.method.template,
            {name: rows for name, rows in own.items() if rows}, self.eval_retriever,
            progress=self.progress, slots=self.config.rollout_slots, runner=self.runner,
            **self.config.budget(),
        )  # fmt: skip
        records = {name: world.gather(records.get(name, [])) for name in sets}
        check_answered(records)
        self.tables[when] = {name: summary(rows) for name, rows in records.items()}
        if self.writes:
            replace_bytes(self.out / "eval.json", json.dumps(self.tables, indent=1).encode())

    def load_tables(self) -> dict:
        """The stored evaluation before training, {"before": table}, or {} if there is none for these data
        sets. Warns of a file that is cut short, or that evaluate.py wrote."""
        if not (path := self.out / "eval.json").exists():
            return {}
        try:
            tables = json.loads(path.read_text())
            same_sets = self.eval_sets.keys() == tables["before"].keys()
            return {"before": tables["before"]} if same_sets else {}
        except (ValueError, KeyError, TypeError, AttributeError):
            tqdm.write(f"warning: {path} is not a table of this program; it will be replaced")
            return {}

    # logs: if the disk is full, a warning is printed and the run goes on

    def record(self, metrics: dict, episodes: list[Episode], parts: list[dict], advantage: list[float]):
        """Counts the step as finished and logs it. A signal waits until `Signals.release`."""
        hold_signals()
        self.step += 1
        self.append("transcripts.jsonl", self.transcripts(episodes, parts, advantage))
        self.append("metrics.jsonl", [{"step": self.step, **metrics}])

    def past_metrics(self) -> list[dict]:
        """The metrics of the steps that a resumed run has behind it."""
        path = self.out / "metrics.jsonl"
        return [row for _, row in read_lines(path)] if self.step and path.exists() else []

    def append(self, name: str, rows: list[dict]):
        if not self.writes:
            return
        try:
            append_rows(self.out / name, rows)
        except OSError as error:
            tqdm.write(f"warning: {self.out / name} was not written: {error}")

    def transcripts(self, episodes: list[Episode], parts: list[dict], advantage: list[float]) -> list[dict]:
        """Some whole episodes of the step, evenly from all sources: who wrote what, what is trained on, and
        what it earned."""
        n, rows = min(self.config.log_completions, len(episodes)), []
        order = sorted(range(len(episodes)), key=lambda i: episodes[i].question.source)
        for i in (order[k * len(order) // n] for k in range(n)):
            e = episodes[i]
            row = {"step": self.step, "source": e.question.source, "id": e.question.id}
            row |= {"answers": e.question.answers, "prompt": self.tokenizer.decode(e.prompt_ids)}
            row["segments"] = [{"kind": s.kind, "text": s.text, "tokens": len(s.ids)} for s in e.segments]
            row |= {"stop": e.stop, **parts[i], "advantage": advantage[i], "ids": e.ids}
            rows.append(row | {"loss_mask": "".join(str(int(chosen)) for chosen in e.loss_mask)})
        return rows

    # checkpoints

    def save_checkpoint(self):
        """Writes checkpoint-N/ completely or not at all: first under another name, then flushed to the disk,
        then renamed. Only after that are older ones removed. If it cannot be written and this process has
        written an earlier one, a warning is printed and the run goes on. If this process has written none,
        SaveError is raised, because the cause will probably remain and nothing would be kept."""
        final = self.out / f"checkpoint-{self.step}"
        temporary = self.out / f"checkpoint-{self.step}.tmp"
        written = (final / "trainer_state.json").exists
        if self.step == 0 or self.world.first(written):
            return
        state = self.world.whole(self.optimizer.state_dict())
        if self.writes:
            self.write_checkpoint(final, temporary, state)
        self.world.first(lambda: None)  # no process ends before it is written: torchrun would end them all

    def write_checkpoint(self, final: Path, temporary: Path, state: dict[str, torch.Tensor]):
        if Signals.installed:
            Signals.installed.writing = True
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            if self.config.lora_r:
                save_adapter(self.model, temporary, self.config)
            else:
                write_model(self.model, self.tokenizer, temporary)
            save_file(state, temporary / "optimizer.safetensors")
            (temporary / "trainer_state.json").write_text(json.dumps({"global_step": self.step}))
            flush(temporary)
            os.replace(temporary, final)
            flush_names(self.out)
            self.has_saved = True
            for old in checkpoints(self.out)[: -self.config.save_total_limit]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not self.has_saved:
                raise SaveError(f"{final} was not written, so the run stops: {error}") from error
            tqdm.write(f"warning: {final} was not written: {error}")
        finally:
            if Signals.installed:
                Signals.installed.writing = False

    def load_checkpoint(self):
        """Loads the newest complete checkpoint. Later lines are removed from the logs, because their steps
        will be done again. Raises InputError if the checkpoint is damaged."""
        for newest in self.world.first(lambda: checkpoints(self.out)[-1:]):
            try:
                self.load_state(newest)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                why = f"damaged ({type(error).__name__}: {error}); remove it to go on from the one before"
                raise InputError(f"--resume: {newest} is {why}") from error
        for name in ("metrics.jsonl", "transcripts.jsonl") if self.writes else ():
            drop_later_rows(self.out / name, self.step)

    def load_state(self, folder: Path):
        """Loads weights, optimizer state and the number of finished steps."""
        step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
        state = load_file(folder / "optimizer.safetensors")
        self.optimizer.load_state_dict(self.world.cut(state, self.optimizer.state_dict()))
        if self.config.lora_r:
            load_adapter(self.model, folder, "--resume")
        else:
            stored = load_model(str(folder), "cpu", self.model.dtype, flag="--resume")[0].state_dict()
            own = self.trainee.state_dict()
            for name, x in self.world.cut(stored, own).items():
                local(own[name]).copy_(x)
            self.refresh_sampler()
        self.step = step
