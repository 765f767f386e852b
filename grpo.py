"""GRPO that teaches a language model when to search: SEM (arXiv 2505.07903) and the methods it is compared
with. From a question to a trained model, in this order:

    mix of questions -> prompts -> batched episodes through the search loop -> rule-based reward
    -> advantages in each group -> clipped policy gradient with a KL term, on the policy's own tokens only
    -> AdamW step -> checkpoint

What this is not: no value model, no vLLM, no distributed training, no LoRA. One process, one device, full
fine-tuning.

    python grpo.py                                    # a toy world, on a CPU, in minutes
    python grpo.py --model Qwen/Qwen2.5-3B-Instruct --train musique,mmlu --output_dir out/sem
    python grpo.py --method search-r1                 # or ssrl, research, zerosearch
    python grpo.py --output_dir out/sem --resume      # go on from the newest complete checkpoint
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import kernels
import toy
from config import fail, parse
from data import DataError, mix, render
from evaluate import evaluate, load_sets, markdown, open_retriever, summary, writable
from model import load_model, probe, refuse_thinking
from reward import METHODS, REWARDS, dialect, exact_match, parse_episode, sandbag_suspects
from rollout import Episode, by_tokens, rollout
from runner import Runner, kv_bytes
from simulator import CorpusSimulator, ModelSimulator, noise


@dataclass
class Config:
    """GRPO with the reward of SEM, or of another method. Without --model: the toy world.

    SEM publishes GRPO, 200 steps, a balanced mix of MuSiQue and MMLU, and Qwen2.5-7B-Instruct. What it leaves
    open is filled with the settings of ReSearch (arXiv 2503.19470, table 4), whose tags and metrics it
    shares; where both are silent it is our choice. They stay the same for every method, so that two runs
    differ in the method alone."""

    # what is trained, how, on what
    method: str = "sem"  # sem, ssrl, search-r1, research or zerosearch: its prompt, reward, and who searches
    reward: str = ""  # instead of the method's own: otc, flat, sem_kept or any name in reward.REWARDS
    model: str = ""  # hub id or directory of the start model; none: the toy world (SEM: Qwen2.5-7B-Instruct)
    train: str = "musique,mmlu"  # data sets, equal shares: name (hub), name:path, or a JSONL path (SEM)
    eval: str = ""  # data sets of the before/after table, greedy; none: no table
    eval_size: int = 500  # questions of each of them, drawn once; 0: all
    corpus: str = ""  # JSONL of {"id", "contents"}; none: the paragraphs that the data sets bring along
    retriever: str = ""  # URL of a /retrieve server (Search-R1's protocol), in place of a corpus
    output_dir: str = "out/sem"  # settings, metrics, transcripts, checkpoints, final weights
    resume: bool = False  # continue the run in output_dir from its newest complete checkpoint
    seed: int = 0  # mix and sampling; each step is a function of (seed, step)
    # rollout
    prompts_per_step: int = 256  # questions a step (ReSearch)
    num_generations: int = 5  # episodes of each question, the group G (ReSearch)
    temperature: float = 1.0  # of sampling and of scoring alike (ReSearch)
    max_completion_length: int = 8192  # tokens after the prompt, results included (ReSearch)
    max_searches: int = 4  # searches an episode may make (Search-R1, arXiv 2503.09516; ReSearch: any number)
    topk: int = 5  # documents a search returns (ReSearch)
    max_doc_tokens: int = 512  # tokens a document is cut to, by itself (our choice)
    rollout_slots: int = 0  # rows in flight at once; 0: from free memory, resolved once (our choice)
    cuda_graphs: bool = True  # on a GPU, decode steps as CUDA graphs; what cannot be recorded runs eagerly
    simulator: str = ""  # zerosearch: the model that plays the engine, hub id or directory; none: the corpus
    noise_start: float = 0.0  # zerosearch: share of noisy results at the start (ZeroSearch, arXiv 2505.04588)
    noise_end: float = 0.5  # and at the end (ZeroSearch)
    # reward
    tau: float = 0.5  # F1 from which the first answer counts as known (not published; our choice)
    sem_kept: float | None = None  # repair: a right draft then a search earns (1 - this) F1(a2); SEM: none
    # objective
    beta: float = 0.001  # weight of the k3 KL to the start model (ReSearch)
    epsilon: float = 0.2  # lower clip of the ratio (ReSearch)
    epsilon_high: float = 0.2  # upper clip of the ratio (ReSearch)
    loss_type: str = "grpo"  # grpo, dapo or dr_grpo: each token's share of the loss, see token_scale
    num_iterations: int = 1  # optimiser steps on one batch of episodes (ReSearch: mini-batch = batch, so 1)
    # optimiser
    max_steps: int = 200  # (SEM)
    learning_rate: float = 1e-6  # AdamW on fp32 weights; bf16 weights would not move at this rate (ReSearch)
    warmup_steps: int = 10  # linear, then constant (our choice)
    weight_decay: float = 0.01  # (ReSearch's framework, verl)
    max_grad_norm: float = 1.0  # gradient clipping (ReSearch's framework, verl)
    micro_batch_tokens: int = 0  # padded tokens of one pass; 0: from free memory, resolved once (our choice)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: slower, much smaller
    bf16: bool = torch.cuda.is_available()  # bf16 autocast, and a bf16 copy of the weights for sampling
    # files
    save_steps: int = 25  # steps between two checkpoints
    save_total_limit: int = 2  # checkpoints kept; older ones go once a newer one is complete
    log_completions: int = 4  # episodes of each step written to transcripts.jsonl

    def budget(self) -> dict[str, int]:
        """What an episode may use, the same in training and evaluation."""
        names = "max_completion_length", "max_searches", "topk", "max_doc_tokens"
        return {name: getattr(self, name) for name in names}


TOY = {  # other defaults where the world is small; everything else is as above
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


# ----------------------------------------------------------------------------------------------------------
# the objective


# GRPO in four sentences. Sample G episodes of one question. An episode's advantage is how much better its
# reward is than the average of its group: no value network is needed. Every token that the policy wrote in it
# becomes more probable if the advantage is positive, less if it is negative. Two brakes: the ratio p_now /
# p_when_sampled is clipped, for later steps on the same episodes (in the first it is 1), and the KL term ties
# the policy to the start model ("k3": an estimate from one sample that is never negative).


def advantages(rewards: torch.Tensor, counted: torch.Tensor, loss_type: str) -> torch.Tensor:
    """rewards, counted [prompts, G] -> advantages [prompts, G] fp64: (r - mean) / (std + 1e-4) in each group
    (GRPO).

    std is unbiased. Exactly 0 where all rewards of a group are equal (max - min < 1e-6): rounding must not be
    amplified. Episodes that are not `counted` (their search failed) are in no mean and get 0; so does a group
    with fewer than two that are. dr_grpo (arXiv 2503.20783) does not divide by std."""
    result = torch.zeros(rewards.shape, dtype=torch.float64)
    for i, (group, mask) in enumerate(zip(rewards.double(), counted, strict=True)):
        r = group[mask]
        if len(r) >= 2 and r.max() - r.min() >= 1e-6:
            centred = r - r.mean()
            result[i, mask] = centred if loss_type == "dr_grpo" else centred / (r.std() + 1e-4)
    return result


def token_scale(lengths: list[int], loss_type: str, max_completion_length: int) -> list[float]:
    """Each episode's weight per token, from the numbers |o_i| of its loss tokens. One normaliser for
    the whole step, taken before it is cut into micro-batches, so that the cut changes nothing.

    grpo     1 / (episodes * |o_i|)
    dapo     1 / sum of all |o_i|                          (arXiv 2503.14476)
    dr_grpo  1 / (episodes * max_completion_length)        (arXiv 2503.20783)"""
    if loss_type == "dapo":
        return [1 / max(1, sum(lengths))] * len(lengths)
    if loss_type == "dr_grpo":
        return [1 / (len(lengths) * max_completion_length)] * len(lengths)
    return [1 / (len(lengths) * max(1, n)) for n in lengths]


@dataclass
class Batch:
    """One micro-batch: padded ids, and its N loss tokens as flat lists."""

    ids: torch.Tensor  # [rows, width]; padding is on the right, where under causal attention nobody sees it
    row: torch.Tensor  # [N] the row and
    position: torch.Tensor  # [N] the position whose hidden state predicts the loss token
    target: torch.Tensor  # [N] the loss token
    advantage: torch.Tensor  # [N] fp32
    scale: torch.Tensor  # [N] fp32
    sampled_logps: torch.Tensor  # [N] fp32, as the sampler saw them: logged, not trained on


def make_batches(episodes: list[Episode], advantage: list[float], config: Config, device) -> list[Batch]:
    """Cuts the step's episodes into micro-batches of like lengths. One without a loss token (a policy that
    writes its own results may write nothing else) is in none, but counts in the normaliser."""
    scale = token_scale([sum(e.loss_mask) for e in episodes], config.loss_type, config.max_completion_length)
    # without the last token: nothing is predicted from it
    sequences = [(i, (e.prompt_ids + e.ids)[:-1]) for i, e in enumerate(episodes) if any(e.loss_mask)]
    batches = []
    for part in by_tokens(sequences, config.micro_batch_tokens):
        width = max(len(ids) for _, ids in part)
        places, values = [], []
        for row, (i, _) in enumerate(part):
            e = episodes[i]
            for t in (t for t, chosen in enumerate(e.loss_mask) if chosen):
                places.append((row, len(e.prompt_ids) + t - 1, e.ids[t]))
                values.append((advantage[i], scale[i], e.logps[t]))
        ids = torch.tensor([ids + [0] * (width - len(ids)) for _, ids in part], device=device)
        places = torch.tensor(places, device=device).T.contiguous()  # [3, N]
        values = torch.tensor(values, device=device, dtype=torch.float32).T.contiguous()  # [3, N]
        batches.append(Batch(ids, *places, *values))
    return batches


def hidden_states(model, batch: Batch, bf16: bool) -> torch.Tensor:
    """[N, H]: the hidden states at the loss positions only. The head is never applied anywhere else."""
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state  # [rows, width, H]
    hidden = hidden[batch.row, batch.position]
    return hidden.bfloat16() if bf16 else hidden


@torch.no_grad()
def score(model, batch: Batch, config: Config, vocab: int) -> torch.Tensor:
    """[N] fp32 log-probs of the loss tokens under `model`."""
    hidden = hidden_states(model, batch, config.bf16)
    head = model.get_output_embeddings().weight
    logps, _ = kernels.token_logps(
        hidden, head, batch.target, temperature=config.temperature, vocab_size=vocab
    )
    return logps


def update(
    model, reference, optimizer, batches: list[Batch], config: Config, lr: float, vocab: int, signals: Signals
) -> dict[str, float]:
    """The optimiser steps on one batch of episodes. Returns what was optimised and how, as metrics."""
    start = time.perf_counter()
    ref = [None if reference is None else score(reference, b, config, vocab) for b in batches]
    old = [score(model, b, config, vocab) if config.num_iterations > 1 else None for b in batches]
    scored = time.perf_counter()
    head = model.get_output_embeddings().weight
    for group in optimizer.param_groups:
        group["lr"] = lr
    objective = {name: getattr(config, name) for name in ("epsilon", "epsilon_high", "beta", "temperature")}
    objective["vocab_size"] = vocab
    sums, gap_max = Counter(), 0.0
    model.train()  # gradient checkpointing works in train mode only; load_model has set every dropout to 0
    for iteration in range(config.num_iterations):
        for i, b in enumerate(batches):
            hidden = hidden_states(model, b, config.bf16)
            loss, stats = kernels.grpo_loss(
                hidden, head, b.target, old[i], ref[i], b.advantage, b.scale, **objective
            )
            loss.backward()
            sums["low"] += (stats["clipped"] * (b.advantage < 0)).sum().item()
            sums["high"] += (stats["clipped"] * (b.advantage > 0)).sum().item()
            if iteration == 0:
                gap = (stats["logps"] - b.sampled_logps).abs()
                gap_max = max(gap_max, gap.max().item())
                sums["gap"] += gap.sum().item()
                sums["loss"] += loss.item()
                sums["entropy"] += stats["entropy"].sum().item()
                sums["kl"] += stats["kl"].sum().item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        if math.isfinite(norm):
            signals.held = True  # from here until the step is recorded
            optimizer.step()
        optimizer.zero_grad()
    model.eval()
    tokens = sum(len(b.target) for b in batches)
    metrics = {
        "loss": sums["loss"],
        "grad_norm": norm,
        "entropy": sums["entropy"] / tokens,
        "clip_ratio/low_mean": sums["low"] / tokens / config.num_iterations,
        "clip_ratio/high_mean": sums["high"] / tokens / config.num_iterations,
        "sampler_logp_diff/mean": sums["gap"] / tokens,
        "sampler_logp_diff/max": gap_max,
        "seconds/score": scored - start,
        "seconds/update": time.perf_counter() - scored,
    }
    return metrics | ({"kl": sums["kl"] / tokens} if reference is not None else {})


# ----------------------------------------------------------------------------------------------------------
# one step


def train_step(run: Run, step: int, signals: Signals) -> dict[str, float]:
    """Step `step` (from 0): sample, reward, update. Returns the metrics of metrics.jsonl, under TRL's names
    where it has one; num_tokens is the policy's tokens of this step alone."""
    config, start = run.config, time.perf_counter()
    questions = mix(run.sources, config.prompts_per_step, config.seed, step)
    counts: dict[str, int] = {}
    if run.method.simulated:
        run.engine.at(step, noise(step, config.max_steps, config.noise_start, config.noise_end))
    episodes = rollout(
        run.sampler, run.tokenizer, run.method.template, questions, group_size=config.num_generations,
        retriever=run.engine, temperature=config.temperature, seed=config.seed, step=step,
        slots=config.rollout_slots, counts=counts, progress="rollout" if run.progress else None,
        **config.budget(),
    )  # fmt: skip
    sampled = time.perf_counter()

    reward = REWARDS[config.reward] if config.reward else run.method.reward
    size, parts = config.num_generations, []
    for i, e in enumerate(episodes):
        group = episodes[i // size * size :][:size]
        parts.append(reward(e, e.question, group=group, tau=config.tau, kept=config.sem_kept))
    shape = (len(questions), config.num_generations)
    rewards = torch.tensor([p["reward"] for p in parts], dtype=torch.float64).view(shape)
    counted = torch.tensor([e.stop != "search_failed" for e in episodes]).view(shape)
    advantage = advantages(rewards, counted, config.loss_type)

    metrics = episode_metrics(episodes, parts, rewards, config) | counts
    keep = [i for i in range(len(episodes)) if counted.flatten()[i]]
    lr = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    if keep:
        flat = advantage.flatten().tolist()
        batches = make_batches([episodes[i] for i in keep], [flat[i] for i in keep], config, run.model.device)
    if keep and batches:
        metrics |= update(
            run.model, run.reference, run.optimizer, batches, config, lr, len(run.tokenizer), signals
        )
        run.sync_sampler()
    end = time.perf_counter()
    metrics |= {"learning_rate": lr, "seconds/rollout": sampled - start, "step_time": end - start}
    metrics["tokens/s"] = sum(len(e.ids) for e in episodes) / (end - start)
    run.log_transcripts(step, episodes, parts, advantage.flatten().tolist())
    return metrics


def episode_metrics(
    episodes: list[Episode], parts: list[dict], rewards: torch.Tensor, config: Config
) -> dict[str, float]:
    """What the episodes were like. Lengths count the policy's own tokens; results are nobody's
    achievement."""
    n = len(episodes)
    counted = torch.tensor([e.stop != "search_failed" for e in episodes])
    lengths = [sum(e.loss_mask) for e in episodes]
    ended = [length for length, e in zip(lengths, episodes, strict=True) if e.stop in ("eos", "answer")]
    metrics = {
        "reward": rewards.flatten()[counted].sum().item() / max(1, counted.sum().item()),
        "reward_std": rewards.std(1).mean().item(),
        "frac_reward_zero_std": (rewards.amax(1) - rewards.amin(1) < 1e-6).double().mean().item(),
        "completions/mean_length": sum(lengths) / n,
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": sum(ended) / max(1, len(ended)),
        "completions/clipped_ratio": sum(e.stop == "length" for e in episodes) / n,
        "tools/call_frequency": sum(e.searches for e in episodes) / n,
        "tools/failure_frequency": sum(e.stop == "search_failed" for e in episodes) / n,
        "num_tokens": sum(lengths),
    }
    if "f" in parts[0]:
        metrics["format"] = sum(p["f"] for p in parts) / n
    if "f1_a1" in parts[0]:
        suspects, searched = sandbag_suspects(parts, config.num_generations, config.tau)
        metrics["sandbag_suspects"] = suspects / searched if searched else 0.0
    if episodes[0].template.own_results:  # searches in its own weights; the environment answers none
        metrics["tools/self_searches"] = sum(parse_episode(e).shape.count("S") for e in episodes) / n
    for source in sorted({e.question.source for e in episodes}):
        own = [e for e in episodes if e.question.source == source]
        right = sum(exact_match(parse_episode(e).answer, e.question) for e in own)
        metrics[f"search_ratio/{source}"] = sum(e.searches > 0 for e in own) / len(own)
        metrics[f"em/{source}"] = right / len(own)
    return metrics


# ----------------------------------------------------------------------------------------------------------
# a run and its directory


class Run:
    """Everything a run holds. Of this only weights, optimiser state and the number of finished steps
    change."""

    def __init__(self, config: Config):
        self.config, self.step, self.progress = config, 0, sys.stderr.isatty()
        self.method = METHODS[config.method]
        self.out = Path(config.output_dir)
        Runner.cuda_graphs = config.cuda_graphs
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.sources = load_sets(config.train, "train")
        self.sets = load_sets(config.eval, "test", config.eval_size)
        self.retriever = None  # of the evaluation
        simulated = self.method.simulated and config.simulator  # training without any corpus
        if not self.method.template.own_results and not (simulated and not config.eval):
            specs = {"train": config.train, "test": config.eval}
            self.retriever = open_retriever(config.retriever, config.corpus, specs)
        self.engine = self.retriever  # of the training
        if self.method.simulated and config.simulator:
            player = load_model(config.simulator, device, dtype, "--simulator")
            probe(*player, 1024)  # its prompt and 600 tokens, roughly
            self.engine = ModelSimulator(*player, config.seed)
        elif self.method.simulated:
            self.engine = CorpusSimulator(self.retriever, config.seed)
        self.model, self.tokenizer = load_model(config.model, device)
        longest = check_prompts(self)
        probe(self.model, self.tokenizer, longest + config.max_completion_length)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        # the start model, frozen: also after a resume, when the policy's weights come from a checkpoint
        self.reference = load_model(config.model, device, dtype)[0].eval() if config.beta else None
        # sampling reads every weight for every token: on a GPU from a bf16 copy
        self.sampler = load_model(config.model, device, dtype)[0].eval() if config.bf16 else self.model
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        rest = [p for p in self.model.parameters() if p.ndim < 2]  # norms and biases
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.learning_rate,
            fused=True,
        )
        self.resolve_sizes(device, longest)

    def resolve_sizes(self, device: str, longest: int):
        """Fills the sizes that depend on free memory, once: a resumed run finds them in run.json."""
        c, text = self.config, self.model.config.get_text_config()
        parameters = sum(p.numel() for p in self.model.parameters())
        length = longest + c.max_completion_length
        most, free = 1 << 11, 1 << 33  # on a CPU small passes, which stay in its cache, are the faster ones
        if device == "cuda":
            # to come: gradients, AdamW's two moments, autocast's bf16 weights, a chunk of logits
            held = (14 if c.bf16 else 12) * parameters + (2 << 30)
            most, free = 1 << 16, torch.cuda.mem_get_info()[0] - held
        elif parameters < 1e7:
            # a second thread saves a third of the time on a quiet machine, and multiplies it on a busy one
            torch.set_num_threads(1)
        # bytes of activations a token, roughly
        token = text.num_hidden_layers * text.hidden_size * (4 if c.gradient_checkpointing else 80)
        row = length * kv_bytes(self.model.config, torch.bfloat16 if c.bf16 else torch.float32)
        if device == "cuda" and max(token * length, row * c.num_generations) > free:
            why = f"{parameters / 1e9:.1f} B parameters and one group of {length} tokens do not fit this GPU"
            raise DataError(f"{why}: try --gradient_checkpointing or a smaller --max_completion_length")
        rows = c.prompts_per_step * c.num_generations
        self.config = replace(
            c,
            micro_batch_tokens=c.micro_batch_tokens or max(1, min(most, int(free / 2 / token))),
            rollout_slots=c.rollout_slots or min(rows, max(c.num_generations, int(free / 2 / row))),
        )

    def sync_sampler(self):
        if self.sampler is not self.model:
            with torch.no_grad():
                for source, target in zip(self.model.parameters(), self.sampler.parameters(), strict=True):
                    target.copy_(source)

    def stored_tables(self) -> dict:
        """{"before": table} from eval.json; {}, with a warning, if evaluate.py wrote that file or something
        cut it off."""
        if not (path := self.out / "eval.json").exists():
            return {}
        try:
            tables = json.loads(path.read_text())
            return {"before": tables["before"]} if self.sets.keys() == tables["before"].keys() else {}
        except (ValueError, KeyError, TypeError, AttributeError):
            tqdm.write(f"warning: {path} is no table of this program; it will be replaced")
            return {}

    def evaluate(self) -> dict:
        records = evaluate(
            self.sampler, self.tokenizer, self.method.template, self.sets, self.retriever,
            progress=self.progress, slots=self.config.rollout_slots, **self.config.budget(),
        )  # fmt: skip
        return {name: summary(rows) for name, rows in records.items()}

    # files: a full disk costs a warning, never the run

    def append(self, name: str, rows: list[dict]):
        try:
            with open(self.out / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            tqdm.write(f"warning: {self.out / name} was not written: {error}")

    def log_transcripts(self, step: int, episodes: list[Episode], parts: list[dict], advantage: list[float]):
        """Some whole episodes of the step, evenly spread over the sources: who wrote what, what was trained
        on, what it earned."""
        n, rows = min(self.config.log_completions, len(episodes)), []
        order = sorted(range(len(episodes)), key=lambda i: episodes[i].question.source)
        for i in (order[k * len(order) // n] for k in range(n)):
            e = episodes[i]
            mask = "".join(str(int(chosen)) for chosen in e.loss_mask)
            segments = [{"kind": s.kind, "text": s.text, "tokens": len(s.ids)} for s in e.segments]
            row = {
                "step": step + 1,
                "source": e.question.source,
                "id": e.question.id,
                "answers": e.question.answers,
            }
            row |= {"prompt": self.tokenizer.decode(e.prompt_ids), "segments": segments, "stop": e.stop}
            row |= {**parts[i], "advantage": advantage[i], "ids": e.ids, "loss_mask": mask}
            rows.append(row)
        self.append("transcripts.jsonl", rows)

    def save_checkpoint(self):
        """checkpoint-N/: a plain Hugging Face directory, optimizer.safetensors, and trainer_state.json.
        Complete, or not there.

        It is written under another name, flushed to the disk and renamed; older ones are removed only
        then."""
        final = self.out / f"checkpoint-{self.step}"
        temporary = self.out / f"checkpoint-{self.step}.tmp"
        if final.exists() or self.step == 0:
            return
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            self.write_model(temporary)
            tensors, scalars = {}, {}
            for i, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"{i}.{name}": value for name, value in state.items() if value.ndim}
                scalars |= {f"{i}.{name}": value.item() for name, value in state.items() if not value.ndim}
            save_file(tensors, temporary / "optimizer.safetensors")
            state = {"global_step": self.step, "optimizer": scalars}
            (temporary / "trainer_state.json").write_text(json.dumps(state))
            flush(temporary)
            os.replace(temporary, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            tqdm.write(f"warning: {final} was not written, training goes on: {error}")
            return
        for old in checkpoints(self.out)[: -self.config.save_total_limit]:
            shutil.rmtree(old, ignore_errors=True)

    def write_model(self, folder: Path):
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load_checkpoint(self):
        """Continues from the newest complete checkpoint; what the logs hold beyond it is dropped, it will be
        done again."""
        if found := checkpoints(self.out):
            try:
                self.load_state(found[-1])
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                said = f"{type(error).__name__}: {error}"
                why = f"damaged ({said}); remove it to go on from the one before"
                raise DataError(f"--resume: {found[-1]} is {why}") from error
        for name in ("metrics.jsonl", "transcripts.jsonl"):
            if (path := self.out / name).exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                replace_text(path, "".join(line + "\n" for line in lines if step_of(line) <= self.step))

    def load_state(self, folder: Path):
        """Weights, optimiser state and the number of finished steps from a checkpoint."""
        state = json.loads((folder / "trainer_state.json").read_text())
        flat = load_file(folder / "optimizer.safetensors", device=str(self.model.device))
        flat |= {key: torch.tensor(value) for key, value in state["optimizer"].items()}
        entries: dict[int, dict] = {}
        for key, value in flat.items():
            i, name = key.split(".", 1)
            entries.setdefault(int(i), {})[name] = value
        weights = load_model(str(folder), self.model.device, flag="--resume")[0].state_dict()
        self.model.load_state_dict(weights)
        self.sync_sampler()
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": entries})
        self.step = state["global_step"]


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    complete = (p.parent for p in out.glob("checkpoint-*/trainer_state.json"))
    return sorted((p for p in complete if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def step_of(line: str) -> float:
    """The step of a line of a log; infinite if a crash or a full disk cut the line short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def replace_text(path: Path, text: str):
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def flush(folder: Path):
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def check_prompts(run: Run) -> int:
    """Refuses a prompt that does not fit the context before anything is trained. Returns the length of the
    longest, roughly.

    A text has at most as many tokens as bytes, so that only long texts have to be tokenised."""
    context = getattr(run.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    questions = [q for sets in (run.sources, run.sets) for rows in sets.values() for q in rows]
    longest = max(questions, key=lambda q: len(q.text) + sum(map(len, q.choices or [])))
    bare = len(render(run.method.template, replace(longest, text="", choices=None), run.tokenizer))
    for q in questions:
        size = bare + len("".join([q.text, *(q.choices or [])]).encode()) + 8 * len(q.choices or [])
        if size >= context and (n := len(render(run.method.template, q, run.tokenizer))) >= context:
            raise DataError(
                f"the prompt of {q.id} ({q.source}) has {n} tokens; the context of --model holds {context}"
            )
    prompt = render(run.method.template, longest, run.tokenizer)
    refuse_thinking(run.tokenizer, prompt)
    return len(prompt)


class Signals:
    """SIGINT and SIGTERM stop the run with a checkpoint, but not between a step's first change of the weights
    and its record."""

    def __init__(self):
        self.held = self.pending = False
        self.before = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}

    def __call__(self, number, frame):
        self.pending = True
        if not self.held:
            raise KeyboardInterrupt

    def release(self):
        self.held = False
        if self.pending:
            raise KeyboardInterrupt

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------
# the program


def train(run: Run) -> int:
    """The training loop. Returns the exit code: 0, or 130 if a signal stopped it (a checkpoint was
    written)."""
    config, signals = run.config, Signals()
    bar = tqdm(total=config.max_steps, initial=run.step, desc="grpo", file=sys.stderr)
    idle = down = 0
    try:
        while run.step < config.max_steps:
            metrics = train_step(run, run.step, signals)
            run.step += 1
            run.append("metrics.jsonl", [{"step": run.step, **metrics}])
            shown = [f"reward {metrics['reward']:.3f}"]
            shown += [
                f"{k.replace('_ratio/', ' ')} {v:.2f}" for k, v in metrics.items() if "search_ratio" in k
            ]
            bar.set_postfix_str(", ".join(shown))
            bar.update()
            failed, answered = metrics["tools/failure_frequency"], metrics["tools/call_frequency"]
            if failed or answered:  # a step in which nobody searched tells nothing of the retriever
                down = down + 1 if failed > answered else 0
            if down == 3:
                raise DataError(
                    "most searches failed in three steps in a row; training on the rest would be closed-book"
                )
            idle = idle + 1 if skipped(metrics) else 0
            if idle == 10:
                raise DataError(f"step {run.step}: no finite gradient ten times in a row")
            if run.step % config.save_steps == 0 or run.step == config.max_steps:
                run.save_checkpoint()
            signals.release()
    except DataError:
        run.save_checkpoint()
        raise
    except torch.OutOfMemoryError as error:
        if not signals.held:  # else half an update may be done
            run.save_checkpoint()
        flags = "--micro_batch_tokens, --rollout_slots or --gradient_checkpointing"
        raise DataError(f"out of GPU memory in step {run.step + 1}: --resume with other {flags}") from error
    except KeyboardInterrupt:
        signals.held = True  # a second signal must not break the checkpoint of the first
        run.save_checkpoint()
        tqdm.write(f"stopped after step {run.step}: continue with --output_dir {run.out} --resume")
        return 130
    finally:
        signals.restore()
        bar.close()
    return 0


def skipped(metrics: dict) -> bool:
    """Warns of a step that taught nothing or was cut short; true if its weights did not move."""
    if metrics["completions/clipped_ratio"] > 0.5:
        tqdm.write("warning: more than half of the episodes ran out of tokens; raise --max_completion_length")
    if metrics["frac_reward_zero_std"] == 1:
        tqdm.write("warning: all rewards are equal in every group; this step has no policy gradient")
    if not math.isfinite(metrics.get("grad_norm", math.nan)):
        tqdm.write("warning: no finite gradient; the weights were left as they are")
        return True
    return False


def resolve(config: Config, given: set[str]) -> Config:
    """Fills in what the command line leaves open: a stored run, the toy world. Raises DataError on values
    that make no sense."""
    toy_run = not config.model
    if toy_run and "output_dir" not in given:
        name = "" if config.method == "sem" else f"-{config.method}"
        config = replace(config, output_dir=TOY["output_dir"] + name)
    stored = Path(config.output_dir) / "run.json"
    if config.resume:
        if not stored.exists():
            raise DataError(f"--resume: there is no run in {stored.parent} ({stored} is missing)")
        try:
            before = Config(**json.loads(stored.read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(f"--resume: {stored} is not the settings of a run: {error}") from error
        free = {"resume", "output_dir", "max_steps", "save_steps", "save_total_limit", "log_completions"}
        free |= {"retriever", "rollout_slots", "micro_batch_tokens", "gradient_checkpointing", "cuda_graphs"}
        if before.method in METHODS and METHODS[before.method].simulated:
            free -= {"max_steps"}  # the share of noise depends on it
        if wrong := [n for n in sorted(given - free) if getattr(config, n) != getattr(before, n)]:
            raise DataError(
                f"--resume: --{wrong[0]} is {getattr(before, wrong[0])} in {stored} and cannot be changed"
            )
        try:
            config = check(replace(before, **{name: getattr(config, name) for name in given}))
        except TypeError as error:
            raise DataError(f"--resume: {stored}: a value has the wrong type: {error}") from error
        done = max((int(path.name[11:]) for path in checkpoints(stored.parent)), default=0)
        if "max_steps" in given and config.max_steps < done:
            raise DataError(f"--max_steps {config.max_steps}: {stored.parent} is at step {done} already")
        return config
    if toy_run:
        defaults = TOY | {"output_dir": config.output_dir}
        config = replace(config, **{name: value for name, value in defaults.items() if name not in given})
    if stored.exists():
        raise DataError(
            f"{stored.parent} holds a run: --resume continues it, another --output_dir starts one"
        )
    writable(stored.parent, "--output_dir")
    if config.model and stored.parent.resolve() == Path(config.model).resolve():
        raise DataError(f"--output_dir {stored.parent}: that is --model, which would be overwritten")
    check(config)
    if toy_run:
        torch.set_num_threads(1)  # as in Run.resolve_sizes
        talks = dialect(config.method)
        folder = "out/toy-world" + ("" if talks == "sem" else f"-{talks}") + f"-{config.seed}"
        world = toy.build(toy.Config(output_dir=folder, seed=config.seed, method=talks))
        config = replace(
            config,
            model=str(world / "model"),
            train=",".join(f"{world}/train/{name}.jsonl" for name in config.train.split(",")),
            eval=",".join(f"{world}/test/{name}.jsonl" for name in filter(None, config.eval.split(","))),
            corpus=config.corpus or str(world / "corpus.jsonl"),
        )
    return config


def check(config: Config) -> Config:
    """Ranges of the values, before anything is loaded or written."""
    at_least = dict.fromkeys(
        "prompts_per_step max_completion_length topk max_doc_tokens num_iterations".split(), 1
    )
    at_least |= dict.fromkeys("save_steps save_total_limit".split(), 1)
    at_least |= dict.fromkeys(
        "max_steps max_searches beta learning_rate warmup_steps weight_decay".split(), 0
    )
    at_least |= dict.fromkeys("eval_size log_completions rollout_slots micro_batch_tokens".split(), 0)
    at_least |= {
        "num_generations": 2,
        "max_grad_norm": 1e-9,
        "temperature": 1e-6,
        "epsilon": 0,
        "epsilon_high": 0,
    }
    for name, low in at_least.items():
        if not low <= getattr(config, name) < math.inf:
            why = " (a group of one has no baseline)" if name == "num_generations" else ""
            raise DataError(f"--{name} {getattr(config, name)}: must be a number, at least {low}{why}")
    for name in ("tau", "sem_kept", "noise_start", "noise_end"):
        if (value := getattr(config, name)) is not None and not 0 <= value <= 1:
            raise DataError(f"--{name} {value}: must be between 0 and 1")
    if config.loss_type not in ("grpo", "dapo", "dr_grpo"):
        raise DataError(f"--loss_type {config.loss_type}: must be grpo, dapo or dr_grpo")
    if config.method not in METHODS:
        raise DataError(f"--method {config.method}: must be one of {', '.join(METHODS)}")
    if config.reward and config.reward not in REWARDS:
        raise DataError(f"--reward {config.reward}: must be one of {', '.join(REWARDS)}")
    if not config.train.strip(", "):
        raise DataError("--train: give at least one data set")
    talks = METHODS[config.method].template
    needs = dict.fromkeys(("sem", "sem_kept"), talks.draft) | {"ssrl": talks.own_results}
    needs |= dict.fromkeys(("research", "research_paper"), talks.boxed)
    needs |= dict.fromkeys(("otc", "flat"), not talks.own_results)  # to search oneself costs nothing there
    if not needs.get(config.reward, True):
        raise DataError(f"--reward {config.reward}: it does not fit what --method {config.method} writes")
    if config.simulator and not METHODS[config.method].simulated:
        raise DataError(f"--simulator {config.simulator}: --method {config.method} does not use one")
    if config.sem_kept is not None and (config.reward or config.method) not in ("sem", "sem_kept"):
        raise DataError(f"--sem_kept {config.sem_kept}: only for the rewards sem and sem_kept")
    if METHODS[config.method].simulated and config.retriever and not config.simulator:
        raise DataError(f"--method {config.method}: give --simulator, or --corpus in place of --retriever")
    return config


def main(config: Config, given: set[str]) -> int:
    config = resolve(config, given)
    run = Run(config)
    config = run.config
    # in fp32: checkpoints (weights and two moments), one more while it is written, and the final weights
    to_come = config.save_total_limit + 1 - len(checkpoints(run.out))
    space = (12 * max(1, to_come) + 4) * sum(p.numel() for p in run.model.parameters())
    if (free := shutil.disk_usage(writable(run.out, "--output_dir")).free) < space:
        need = f"{free / 1e9:.2f} GB are free, checkpoints and the result need {space / 1e9:.2f} GB"
        raise DataError(f"--output_dir {run.out}: {need}")
    print("\n".join(f"{f.name:24} {getattr(config, f.name)}" for f in fields(config)))
    run.out.mkdir(parents=True, exist_ok=True)
    replace_text(run.out / "run.json", json.dumps(asdict(replace(config, resume=False)), indent=1))
    tables = {}
    if config.resume:
        run.load_checkpoint()
        tables = run.stored_tables()
    if run.sets and run.step == 0:
        tables = {"before": run.evaluate()}
        replace_text(run.out / "eval.json", json.dumps(tables, indent=1))
    if code := train(run):
        return code
    try:
        run.write_model(run.out)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{run.out}: the final weights were not written, its checkpoints stay: {error}"
        ) from error
    if run.sets:
        tables["after"] = run.evaluate()
        replace_text(run.out / "eval.json", json.dumps(tables, indent=1))
        print("\n" + markdown(tables))
    return 0


def program(name: str = "grpo.py"):
    """The command line. A file of one's own that adds a method calls it too, under its own name."""
    config, given = parse(Config, name, toy=TOY)
    try:
        sys.exit(main(config, given))
    except KeyboardInterrupt:  # before or after the training, which saves a checkpoint
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:  # in the evaluation: `train` has its own
        fail(name, "out of GPU memory: try a smaller --rollout_slots or --max_completion_length")
    except (DataError, OSError) as error:
        fail(name, error)


if __name__ == "__main__":
    program()
