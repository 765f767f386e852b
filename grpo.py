"""GRPO that teaches a language model when to search: SEM (arXiv 2505.07903) and the methods it is compared
with. This file is the algorithm, in the order in which things happen:

    questions -> episodes through the search loop -> rule-based rewards -> advantages in each group
    -> clipped policy gradient with a KL term, on the policy's own tokens only -> AdamW step -> record

There is no value model and no inference server. Files and checkpoints are in run.py, flags in config.py.
`world` stands for the processes of a run on several GPUs. With one GPU its methods return what they get
(world.py).

    python grpo.py                                    # a toy world, on a CPU, in minutes
    python grpo.py --model Qwen/Qwen2.5-3B-Instruct --train musique,mmlu --output_dir out/sem
    python grpo.py --method search-r1                 # or ssrl, research, zerosearch, hybrid
    python grpo.py --output_dir out/sem --resume      # continue from the newest complete checkpoint
    torchrun --nproc_per_node=8 grpo.py --model ...   # on eight GPUs
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tqdm import tqdm

import kernels
from alarms import Alarms
from boundary import label_shares
from config import LOSS_TYPES, TOY, Config, fail, parse
from data import Episode, InputError, mix
from disk import lock
from measures import step_metrics, tag_probability
from optim import clip_factor
from rollout import rollout, split_by_tokens
from run import Run, SaveError, place, resolve
from signals import Signals, hold_signals
from simulator import noise_share
from world import ALONE, World

# ------------------------------------------------------------------------------------------------------------
# the objective
#
# GRPO (arXiv 2402.03300) in four sentences. Sample G episodes of the same question. The advantage of an
# episode is how much better its reward is than the mean of its group, so no value network is needed. Every
# token that the policy chose becomes more probable if the advantage is positive, and less probable if it is
# negative. Two devices keep the policy from changing too fast: the ratio p_now / p_old is clipped, and a KL
# term pulls the policy towards the start model.
#
# The value of the loss says little. In the first pass over a batch p_now = p_old, so every ratio is 1, and
# the loss is -sum_i sum_t scale_it A_i plus beta times the KL. In the first step of a run the KL is 0. With
# loss_type grpo every episode has the same total weight, and the advantages of a group sum to 0, so the first
# sum is 0. With dapo and dr_grpo a long episode weighs more than a short one, so it is not 0. In all three
# cases the gradient trains the policy: at each token it is -A times the gradient of log p_now (times its
# scale), and these gradients do not cancel.


def advantages(rewards: torch.Tensor, counted: torch.Tensor, loss_type: str) -> torch.Tensor:
    """rewards [groups, G] (any float), counted [groups, G] bool -> advantages [groups, G] fp64: (r - mean) /
    (std + 1e-4) in each row (GRPO, section 4.1), or r - mean for dr_grpo (arXiv 2503.20783). A row is a
    group, or, with a reward such as boundary, half of one.

    The standard deviation is unbiased. Where all rewards of a group are equal (max - min < 1e-6) the result
    is exactly 0, because a division by a tiny std would amplify rounding. Episodes that are not `counted`
    (their search failed) enter no mean and get 0. In a group with fewer than two counted episodes every
    advantage is 0."""
    result = torch.zeros(rewards.shape, dtype=torch.float64)
    for i, (group, mask) in enumerate(zip(rewards.double(), counted, strict=True)):
        r = group[mask]
        if len(r) >= 2 and r.max() - r.min() >= 1e-6:
            centred = r - r.mean()
            result[i, mask] = centred if loss_type == "dr_grpo" else centred / (r.std() + 1e-4)
    return result


def token_scale(lengths: list[int], loss_type: str, max_completion_length: int) -> list[float]:
    """The weight of each token of an episode in the loss, for every episode i with |o_i| policy tokens.

        grpo     1 / (episodes * |o_i|)                   every episode weighs the same
        dapo     1 / sum of all |o_i|                     every token weighs the same (arXiv 2503.14476)
        dr_grpo  1 / (episodes * max_completion_length)   every token weighs the same, in every step, however
                                                          long the episodes are (arXiv 2503.20783)

    The weights are computed for the whole step, before it is cut into micro-batches. Normalising each
    micro-batch by itself would make the gradient depend on the cut. (dr_grpo has other advantages too, see
    `advantages`.) Raises InputError for an unknown loss type."""
    if loss_type == "grpo":
        return [1 / (len(lengths) * max(1, n)) for n in lengths]
    if loss_type == "dapo":
        return [1 / max(1, sum(lengths))] * len(lengths)
    if loss_type == "dr_grpo":
        return [1 / (len(lengths) * max_completion_length) for _ in lengths]
    raise InputError(f"--loss_type {loss_type}: must be one of {', '.join(LOSS_TYPES)}")


# ------------------------------------------------------------------------------------------------------------
# a batch, its loss and its log-probs: nothing else in this file calls the model


@dataclass
class Batch:
    """One micro-batch: its rows, which are episodes with their prompts, and one entry for each of its N loss
    tokens."""

    ids: torch.Tensor  # [rows, width] int64, padded on the right; causal attention never reads the padding
    row: torch.Tensor  # [N] int64: the row of the token
    position: torch.Tensor  # [N] int64: the position before the token, whose hidden state predicts it
    target: torch.Tensor  # [N] int64: the id of the token
    advantage: torch.Tensor  # [N] fp32: the advantage of its episode
    scale: torch.Tensor  # [N] fp32: its weight in the loss, from token_scale
    sampled_logps: torch.Tensor  # [N] fp32: its log-prob as the sampler saw it; only logged, see `update`
    old_logps: torch.Tensor | None = None  # [N] fp32: before the first update; None: the present ones
    ref_logps: torch.Tensor | None = None  # [N] fp32: under the start model; None: no KL term


def make_batches(
    episodes: list[Episode], advantage: list[float], config: Config, device, own: list[bool] | None = None
) -> list[Batch]:
    """Cuts the episodes of a step into micro-batches of similar lengths. With several processes `own` says
    which episodes go into the micro-batches of this one.

    An episode without a loss token is in no micro-batch, but it counts in the denominators of token_scale.
    (In SSRL an episode can consist of a masked result alone.)"""
    scale = token_scale([e.policy_tokens for e in episodes], config.loss_type, config.max_completion_length)
    # the last id is left out, because nothing is predicted from it
    chosen = [i for i, e in enumerate(episodes) if any(e.loss_mask) and (own is None or own[i])]
    sequences = [(i, (episodes[i].prompt_ids + episodes[i].ids)[:-1]) for i in chosen]
    batches = []
    for part in split_by_tokens(sequences, config.micro_batch_tokens):
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


def empty_batch(device) -> Batch:
    """A micro-batch of one row and N = 0 loss tokens, whose gradient is 0. Of several processes those with
    fewer micro-batches than another add such, see parallel.py."""
    ids, none = torch.zeros(1, 1, dtype=torch.long, device=device), torch.zeros(0, device=device)
    return Batch(ids, none.long(), none.long(), none.long(), none, none, none)


def hidden_states(model, batch: Batch) -> torch.Tensor:
    """[N, H]: the hidden states at the loss positions. Only these predict a loss token, so the head is
    applied to them alone. kernels/ does that in chunks, because the logits of all tokens of a batch would be
    its largest tensor: 8,192 tokens with 151,936 logits in fp32 are 5 GB."""
    hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state  # [rows, width, H]
    return hidden[batch.row, batch.position]


def policy_loss(model, batch: Batch, config: Config, vocab_size: int) -> tuple[torch.Tensor, dict]:
    """The loss of a micro-batch (a scalar, fp32), and stats of its loss tokens: logps, entropy, kl, clipped,
    [N] fp32 each, detached.

        loss = sum_i sum_t scale_it (surrogate_it + beta kl_it)               GRPO, arXiv 2402.03300, eq. 3, 4

    The surrogate, the KL and their gradient are in kernels/, with the formulas in kernels/reference.py."""
    hidden, head = hidden_states(model, batch), model.get_output_embeddings().weight
    return kernels.grpo_loss(
        hidden, head, batch.target, batch.old_logps, batch.ref_logps, batch.advantage, batch.scale,
        epsilon=config.epsilon, epsilon_high=config.epsilon_high, beta=config.beta,
        temperature=config.temperature, vocab_size=vocab_size,
    )  # fmt: skip


@torch.no_grad()
def token_logps(model, batch: Batch, config: Config, vocab_size: int) -> torch.Tensor:
    """[N] fp32: the log-probs of the loss tokens under `model`."""
    hidden, head = hidden_states(model, batch), model.get_output_embeddings().weight
    temperature = config.temperature
    return kernels.token_logps(hidden, head, batch.target, temperature=temperature, vocab_size=vocab_size)[0]


# ------------------------------------------------------------------------------------------------------------
# the update


def update(
    model, reference, optimizer, batches: list[Batch], config: Config, lr: float, vocab_size: int, world=ALONE
) -> dict[str, float]:
    """Makes `num_iterations` optimizer steps on one batch of episodes, each on all its micro-batches. A step
    whose gradient is not finite is left out. Returns metrics.

    The old log-probs are those before the first update. They need no pass of their own: the weights do not
    change during the first iteration, so its log-probs are the old ones. The log-probs of the sampler are not
    used in their place: it computes them along another path (through the cache, token by token), so its
    rounding would enter every ratio, and a ratio that should be 1 would not be. How far the two are apart is
    logged as sampler_logp_diff.

    The metrics of the first iteration have plain names (loss, grad_norm, entropy, kl, clip_ratio/*,
    sampler_logp_diff/*), those of iteration 2 begin with iteration_2/, and so on."""
    start = time.perf_counter()
    for b in batches:
        b.old_logps, b.ref_logps = None, None
        if reference is not None:
            b.ref_logps = world.call(token_logps, reference, b, config, vocab_size)
    scored = time.perf_counter()
    optimizer.lr = lr
    metrics, largest_gap = {}, 0.0
    model.train()  # gradient checkpointing works in train mode alone; load_model has set every dropout to 0
    for iteration in range(1, config.num_iterations + 1):
        sums = Counter()
        for b in batches:
            loss, stats = world.call(policy_loss, model, b, config, vocab_size)
            (loss * world.size).backward()  # several processes average their gradients; we want the sum
            sums["tokens"] += len(b.target)
            sums["loss"] += loss.item()
            sums["entropy"] += stats["entropy"].sum().item()
            sums["kl"] += stats["kl"].sum().item()
            sums["low"] += (stats["clipped"] * (b.advantage < 0)).sum().item()
            sums["high"] += (stats["clipped"] * (b.advantage > 0)).sum().item()
            if iteration == 1:
                b.old_logps = stats["logps"]
                gap = (stats["logps"] - b.sampled_logps).abs()
                sums["gap"] += gap.sum().item()
                largest_gap = max([largest_gap, *gap.tolist()])
        norm = world.finish_gradients(optimizer)
        sums, largest_gap = world.total(sums), world.most(largest_gap)
        if norm.isfinite():
            hold_signals()  # from here on the step has to be finished
            optimizer.step(clip_factor(norm, config.max_grad_norm))
        optimizer.zero_grad()
        tokens = sums["tokens"]
        figures = {"loss": sums["loss"], "grad_norm": norm.item(), "entropy": sums["entropy"] / tokens}
        figures |= {"kl": sums["kl"] / tokens} if reference is not None else {}
        figures |= {f"clip_ratio/{side}_mean": sums[side] / tokens for side in ("low", "high")}
        if iteration == 1:
            metrics |= figures | {"sampler_logp_diff/mean": sums["gap"] / tokens}
            metrics["sampler_logp_diff/max"] = largest_gap
        else:
            metrics |= {f"iteration_{iteration}/{name}": value for name, value in figures.items()}
    model.eval()
    return metrics | {"seconds/score": scored - start, "seconds/update": time.perf_counter() - scored}


# ------------------------------------------------------------------------------------------------------------
# one step


def train_step(run: Run) -> tuple[dict[str, float], list[Episode]]:
    """Step `run.step` (from 0): samples, rewards, updates, and records the step. Returns its metrics, which
    are then in metrics.jsonl, and its episodes."""
    config, size, world, start = run.config, run.config.num_generations, run.world, time.perf_counter()
    off = size // 2 if run.reward.halves else 0  # members of each group without the search engine
    questions = mix(run.sources, config.prompts_per_step, config.seed, run.step)
    if run.method.simulated:
        share = noise_share(run.step, config.max_steps, config.noise_start, config.noise_end)
        run.train_retriever.set_step(run.step, share)
    counts: dict[str, int] = {}
    own = world.block(len(questions))
    episodes = rollout(
        run.model, run.tokenizer, run.method.template, questions[own.start : own.stop], group_size=size,
        retriever=run.train_retriever, temperature=config.temperature, seed=config.seed, step=run.step,
        first_row=own.start * size, slots=config.rollout_slots, runner=run.runner, counts=counts,
        engine=[member >= off for member in range(size)], progress="rollout" if run.progress else None,
        **config.budget(),
    )  # fmt: skip
    sampled = time.perf_counter()

    # An episode whose search failed says nothing about the policy: it has no reward, is in no group, and is
    # left out of the update.
    parts: list[dict[str, float]] = []
    for i, e in enumerate(episodes):
        first = i // size * size
        group = [x for x in episodes[first : first + size] if x.stop != "search_failed"]
        options = {"group": group, "tau": config.tau, "search_cost": config.sem_kept}
        parts.append(run.reward(e, e.question, **options) if e.stop != "search_failed" else {})
    episodes, parts, counts = world.gather(episodes), world.gather(parts), world.total(counts)
    counted = [e.stop != "search_failed" for e in episodes]
    compared = size - off  # so many consecutive episodes are a group, or half of one
    rewards = torch.tensor([p.get("reward", 0.0) for p in parts], dtype=torch.float64).view(-1, compared)
    mask = torch.tensor(counted).view(-1, compared)
    advantage = advantages(rewards, mask, config.loss_type).flatten().tolist()

    metrics = step_metrics(episodes, parts, compared, config.tau) | label_shares(episodes, parts) | counts
    metrics |= tag_probability(episodes, run.tokenizer)
    metrics |= {"noise_share": share} if run.method.simulated else {}
    trains_off = run.reward.trains_off
    trained = [i for i, e in enumerate(episodes) if counted[i] and (e.engine or trains_off)]
    batches = make_batches(
        [episodes[i] for i in trained], [advantage[i] for i in trained], config, run.model.device,
        [i // size in own for i in trained],
    )  # fmt: skip
    batches += [empty_batch(run.model.device)] * (world.most(len(batches)) - len(batches))
    lr = config.learning_rate * min(1.0, (run.step + 1) / max(1, config.warmup_steps))
    if batches:
        trainee, vocab_size = run.trainee, len(run.tokenizer)
        metrics |= update(trainee, run.reference, run.optimizer, batches, config, lr, vocab_size, world)
        run.refresh_sampler()
    end = time.perf_counter()
    metrics |= {"learning_rate": lr, "seconds/rollout": sampled - start, "step_time": end - start}
    metrics["tokens/s"] = sum(len(e.ids) for e in episodes) / (end - start)
    run.record(metrics, episodes, parts, advantage)
    return metrics, episodes


# ------------------------------------------------------------------------------------------------------------
# the loop and the program


def train(run: Run) -> int:
    """The training loop. Returns the exit code: 0, or 130 if a signal stopped it. Raises InputError if the
    retriever is down, if no gradient is finite, and if the GPU's memory is too small."""
    config = run.config
    bar = tqdm(total=config.max_steps, initial=run.step, desc="grpo", file=sys.stderr)
    without_gradient = without_retriever = 0  # numbers of consecutive steps
    alarms = Alarms(run.reward.priced, run.past_metrics())
    with bar, Signals(run.world) as signals:
        try:
            while run.step < config.max_steps:
                started = run.step
                metrics, episodes = train_step(run)
                ratios = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("search_ratio/")}
                shown = [f"search {source} {ratio:.2f}" for source, ratio in ratios.items()]
                bar.set_postfix_str(", ".join([f"reward {metrics['reward']:.3f}", *shown]))
                bar.update()
                failed = sum(e.stop == "search_failed" for e in episodes)
                answered = sum(e.searches for e in episodes)
                if failed or answered:  # a step without any search says nothing about the retriever
                    without_retriever = without_retriever + 1 if failed > answered else 0
                if without_retriever == 3:
                    why = "training on the rest would be closed-book"
                    raise InputError(f"most searches failed in three steps in a row; {why}")
                for line in alarms(metrics):
                    tqdm.write(f"alarm in step {run.step}: {line}")
                finite = math.isfinite(metrics.get("grad_norm", math.nan))
                without_gradient = 0 if finite else without_gradient + 1
                if not finite:
                    tqdm.write("warning: no finite gradient; the weights were left as they are")
                if without_gradient == 10:
                    raise InputError(f"step {run.step}: no finite gradient ten times in a row")
                if run.step % config.save_steps == 0 or run.step == config.max_steps:
                    run.save_checkpoint()
                signals.release()
        except SaveError:
            raise
        except InputError:
            # Saving needs all processes, but an error inside a step may have hit only one.
            if run.world.size == 1 or run.step > started:
                run.save_checkpoint()
            raise
        except torch.OutOfMemoryError as error:
            # Saved only if no update is under way and there is one process.
            if not signals.held and run.world.size == 1:
                run.save_checkpoint()
            flags = "--micro_batch_tokens, --rollout_slots or --gradient_checkpointing"
            raise InputError(
                f"out of GPU memory in step {run.step + 1}: --resume with other {flags}"
            ) from error
        except KeyboardInterrupt:
            run.save_checkpoint()
            tqdm.write(f"stopped after step {run.step}: continue with --output_dir {run.out} --resume")
            return 130
    return 0


def main(config: Config, given: set[str], world: World = ALONE) -> int:
    """Trains, with a table of the evaluation sets before and after. Returns the exit code."""
    with nullcontext() if world.rank else lock(place(config, given).output_dir):
        run = Run(world.first(resolve, config, given), world)
        run.start()
        if code := train(run):
            return code
        run.finish()
    return 0


def program(name: str = "grpo.py"):
    """The command line. A file that adds a method or a reward calls this too, with the name of that file."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:  # torchrun sets it
        import parallel  # here: one process runs none of it

        sys.exit(parallel.program(name, main))
    config, given = parse(Config, name, toy=TOY)
    try:
        sys.exit(main(config, given))
    except KeyboardInterrupt:  # outside training; `train` handles its own
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:  # likewise
        fail(name, "out of GPU memory: try a smaller --rollout_slots or --max_completion_length")
    except (InputError, OSError) as error:
        fail(name, error)


if __name__ == "__main__":
    program()
