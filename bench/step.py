"""Seconds of one GRPO step beside TRL's GRPOTrainer: one process, the same model and work, taking turns.

    pip install trl==1.16.0              # for the comparison only; without it ours is measured alone
    python bench/step.py                 # about four minutes; writes its table into bench/RESULTS.md
    python bench/step.py --gpu           # on a GPU, about a minute: equal episodes, the shape of Qwen2.5-0.5B

A step is 32 prompts of 6 tokens, 8 episodes of each in one turn, the loss with a KL term to the start model,
and one step of fused AdamW, all in fp32. The model is a Qwen2 of 0.46 M random weights with 120 logits. The
reward, the share of even ids, costs nothing and differs in every group. Episodes are of two kinds:

    equal    32 tokens each: the end token has id 120, which no logit reaches, so both sides do the same work
    ragged   at most 64 tokens: 6 of the 120 ids are end tokens too, so about 5 % of the tokens end an episode

Ours calls the functions that grpo.py trains with, and cuts the batch as grpo.py does on a CPU. TRL has its
whole batch in one pass, and no checkpointing, logging, saving or progress bar. A step lasts from the end of
the one before to its own end, so it includes the choice of the questions. Both sides compute the metrics of
the update; those of the episodes are in TRL's time only.

On a GPU an episode has 128 tokens. TRL trains fp32 weights under bf16 autocast, and ours a bf16 model whose
optimizer has the lower halves, as in grpo.py. TRL has 32 episodes in one pass, since the logits of 256 would
not fit.

Two threads need both cores for themselves. Next to another program they wait for each other most of the time,
and the brackets of the table get wide. OMP_WAIT_POLICY=PASSIVE helps there, but it slows a quiet machine, and
ours the most.
"""

import contextlib
import gc
import io
import itertools
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # neither side has anything to fetch

import decode
import torch
from results import write
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from transformers.utils import logging
from words import make_tokenizer

from config import Config
from data import Question, mix
from grpo import advantages, make_batches, update
from optim import AdamW
from prompts import SEM, render
from rollout import rollout
from runner import ModelRunner

GPU = "--gpu" in sys.argv
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
PROMPTS, GROUP, PROMPT_TOKENS, VOCABULARY, SEED = 32, 8, 6, 151_936 if GPU else 120, 0
EQUAL, RAGGED = 128 if GPU else 32, 64  # tokens an episode may have, in the two kinds of episodes
END = VOCABULARY  # id of the end token: one more than the model knows
ENDS = list(range(7, 13))  # ids that end an episode as well, in ragged episodes
WARM_UP, TIMED, BLOCK = (2, 4, 2) if GPU else (3, 20, 4)  # steps; a block of ours follows each of TRL's
CONFIG = Config(
    prompts_per_step=PROMPTS, num_generations=GROUP, learning_rate=1e-5, weight_decay=0.01, beta=0.001,
    seed=SEED, bf16=GPU, micro_batch_tokens=1 << (14 if GPU else 11),  # on a CPU what grpo.py chooses
)  # fmt: skip


@dataclass
class Times:
    """Seconds of each step, wall and CPU, warm-up steps included."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def start(self):
        if GPU:
            torch.cuda.synchronize()
        self.began = time.perf_counter(), time.process_time()

    def stop(self):
        if GPU:
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - self.began[0])
        self.cpu.append(time.process_time() - self.began[1])

    def cell(self, kind: str) -> str:
        low, median, high = statistics.quantiles(getattr(self, kind)[WARM_UP:], n=4)
        return f"{median:.3f} ({low:.3f}-{high:.3f})"

    def median(self, kind: str) -> float:
        return statistics.median(getattr(self, kind)[WARM_UP:])


# Words are tokens. Some contain ">", as tags do, and after these the search loop looks for a closed tag.
WORDS = ["<pad>", "<user>", "<assistant>", "<think>", "</think>", "<answer>", "</answer>"]
WORDS += [f"w{i}" for i in range(VOCABULARY - len(WORDS))] + ["<eos>"]


def make_model(ends: list[int]) -> Qwen2ForCausalLM:
    torch.manual_seed(SEED)
    layers, width, heads, kv_heads, intermediate = decode.SHAPES["0.5B"][:5] if GPU else (3, 96, 4, 4, 384)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = [END, *ends]
    return model


def make_questions(n: int) -> list[Question]:
    rng = random.Random(SEED)
    texts = (" ".join(f"w{rng.randrange(100)}" for _ in range(PROMPT_TOKENS - 2)) for _ in range(n))
    return [Question(str(i), text, ["-"], "bench") for i, text in enumerate(texts)]


def reward(ids: list[int]) -> float:
    return sum(i % 2 == 0 for i in ids) / len(ids)


class Ours:
    """The steps of grpo.py, with the reward of this file."""

    def __init__(self, folder: str, tokenizer, questions: list[Question], length: int):
        def load(dtype):
            return Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)

        self.model, self.reference = load(DTYPE), load(DTYPE).requires_grad_(False)
        self.runner = ModelRunner(self.model, len(tokenizer))
        self.tokenizer, self.questions, self.times = tokenizer, questions, Times()
        self.config = replace(CONFIG, max_completion_length=length)
        self.optimizer = AdamW(self.model, CONFIG.learning_rate, CONFIG.weight_decay)
        self.phases: list[tuple[float, float, float]] = []  # seconds of rollout, reference, update
        self.tokens = 0  # prompts and episodes

    def steps(self, n: int):
        self.times.start()
        for _ in range(n):
            self.step(len(self.times.wall))
            self.times.stop()
            self.times.start()

    def step(self, number: int):
        config, start = self.config, time.perf_counter()
        questions = mix({"bench": self.questions}, PROMPTS, SEED, number)
        episodes = rollout(
            self.model, self.tokenizer, SEM, questions, group_size=GROUP, seed=SEED, step=number,
            max_completion_length=config.max_completion_length, runner=self.runner,
        )  # fmt: skip
        sampled = time.perf_counter() - start
        rewards = torch.tensor([reward(e.ids) for e in episodes], dtype=torch.float64).view(PROMPTS, GROUP)
        advantage = advantages(rewards, torch.ones_like(rewards, dtype=torch.bool), config.loss_type)
        batches = make_batches(episodes, advantage.flatten().tolist(), config, self.model.device)
        metrics = update(
            self.model, self.reference, self.optimizer, batches, config, config.learning_rate, VOCABULARY
        )
        self.phases.append((sampled, metrics["seconds/score"], metrics["seconds/update"]))
        self.tokens += sum(len(e.prompt_ids) + len(e.ids) for e in episodes)


class Turns(TrainerCallback):
    """Times TRL's steps, and lets ours go after every block of them."""

    def __init__(self, ours: Ours):
        self.ours, self.times = ours, Times()

    def on_train_begin(self, args, state, control, **kwargs):
        self.times.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.stop()
        done = len(self.times.wall)
        if done in (WARM_UP, WARM_UP + TIMED) or (done > WARM_UP and (done - WARM_UP) % BLOCK == 0):
            gc.collect()
            self.ours.steps(done - len(self.ours.times.wall))
            gc.collect()
        self.times.start()


def race(folder: str, ours: Ours) -> Times:
    """Runs TRL's training with ours in its pauses; returns TRL's times."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    prompts = [f"<user> {q.text} <assistant>" for q in ours.questions]
    rendered = [render(SEM, q, ours.tokenizer) for q in ours.questions]
    assert [ours.tokenizer(p).input_ids for p in prompts] == rendered
    turns, passes = Turns(ours), 8 if GPU else 1
    trainer = GRPOTrainer(
        model=Qwen2ForCausalLM.from_pretrained(folder),
        reward_funcs=lambda completion_ids, **kwargs: [reward(ids) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=ours.tokenizer,
        callbacks=[turns],
        args=GRPOConfig(
            output_dir=f"{folder}/trl", use_cpu=not GPU, bf16=GPU, gradient_checkpointing=False,
            report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
            per_device_train_batch_size=PROMPTS * GROUP // passes, num_generations=GROUP,
            steps_per_generation=passes, gradient_accumulation_steps=passes, num_iterations=1,
            max_steps=WARM_UP + TIMED,
            max_completion_length=ours.config.max_completion_length, temperature=CONFIG.temperature,
            beta=CONFIG.beta, epsilon=CONFIG.epsilon, epsilon_high=CONFIG.epsilon_high,
            loss_type=CONFIG.loss_type, optim="adamw_torch_fused", learning_rate=CONFIG.learning_rate,
            lr_scheduler_type="constant", weight_decay=CONFIG.weight_decay,
            max_grad_norm=CONFIG.max_grad_norm, seed=SEED,
        ),
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its metrics at the end
        trainer.train()
    theirs = trainer.state.num_input_tokens_seen
    assert abs(theirs / ours.tokens - 1) < 0.1, f"not the same work: {theirs} and {ours.tokens} tokens"
    return turns.times


def measure(kind: str, threads: int, peer: bool) -> list[str]:
    """A row of the table."""
    torch.set_num_threads(threads)
    length = EQUAL if kind == "equal" else RAGGED
    tokenizer, questions = make_tokenizer(WORDS), make_questions(PROMPTS * (WARM_UP + TIMED))
    with tempfile.TemporaryDirectory() as folder:
        make_model([] if kind == "equal" else ENDS).save_pretrained(folder)
        ours = Ours(folder, tokenizer, questions, length)
        theirs = race(folder, ours) if peer else ours.steps(WARM_UP + TIMED)
    assert torch.get_num_threads() == threads
    episodes = PROMPTS * GROUP * (WARM_UP + TIMED)
    row = [f"{kind}, {ours.tokens / episodes - PROMPT_TOKENS:.1f}", str(threads)]
    for clock in ("wall", "cpu"):
        ratio = theirs and f"{theirs.median(clock) / ours.times.median(clock):.2f}x"
        row += [theirs.cell(clock) if theirs else "-", ours.times.cell(clock), ratio or "-"]
    phases = [statistics.median(phase) for phase in zip(*ours.phases[WARM_UP:], strict=True)]
    return [*row, " + ".join(f"{phase:.2f}" for phase in phases)]


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peer = all(map(find_spec, ("trl", "datasets", "accelerate")))
    if not peer:
        print("trl is not installed: ours is measured alone (pip install trl==1.16.0 for the comparison)")
    head = ["episodes, mean tokens", "threads", "TRL, s", "ours, s", "ratio"]
    head += ["TRL, CPU s", "ours, CPU s", "ratio", "ours, s: rollout + reference + update"]
    kinds = (("equal", 2),) if GPU else itertools.product(("equal", "ragged"), (2, 1))
    rows = [measure(kind, threads, peer) for kind, threads in kinds]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---:"] * len(head), *rows])
    names = ("torch", "transformers", *(("trl",) if peer else ()))
    packages = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in names)
    device = f"{torch.cuda.get_device_properties(0).name}, " if GPU else ""
    machine = f"{device}{os.cpu_count()} CPU cores, Python {platform.python_version()}, {packages}"
    weights = make_model([]).num_parameters() / 1e6
    text = f"""## One GRPO step{" on a GPU" if GPU else ""}: ours beside TRL's GRPOTrainer

`python bench/step.py{" --gpu" if GPU else ""}`, {date.today()}, {machine}.
Seconds a step: the median of {TIMED} steps (in brackets: the middle half). The two sides alternate every
{BLOCK} steps. A Qwen2 of {weights:.2f} M weights, {PROMPTS} prompts of {PROMPT_TOKENS} tokens each,
{GROUP} episodes for each prompt, {"bf16 (TRL: autocast)" if GPU else "fp32"}, with a reference model.
Equal episodes have {EQUAL} tokens. Ragged ones end by chance, or after {RAGGED}: TRL samples on until the
last one ends, and pads all to its length.

{table}"""
    print(text)
    if peer:
        write("step on a GPU" if GPU else "step", text)


if __name__ == "__main__":
    main()
