"""One episode token by token: who wrote each token, whether it is trained on, and whether the sampler and the
loss agree about it.

    python look.py --model out/sem --corpus corpus.jsonl --question "Who wrote the song that ..."

The episode is sampled as in training. Then grpo.make_batches and grpo.token_logps compute its log-probs a
second time, as in training too: in one pass, without a cache. A line for each token shows

    place, kind of the segment, id, mask (1: trained on), log-prob as sampled and as scored, difference, text

The verdict says FAULT, and the exit code is 1, if the mask is not what the segments ask for, if the loss
takes other tokens than the mask says, or if a log-prob differs by more than rounding. Such a fault stops no
run; the run only learns something else. On a GPU the model is in bf16, as in training, and rounding hides
small faults: CUDA_VISIBLE_DEVICES= in front of the command looks closer, on the CPU in fp32.

Not here: many questions at once, and whether an answer is right
(evaluate.py)."""

import math
import re
import sys
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

import evaluate
import grpo
from config import Config as TrainingConfig
from config import check_date, check_ranges, fail, parse
from data import Episode, InputError, Question
from lora import load_adapter
from model import check_prompts, load_model, probe
from prompts import set_date
from retriever import RetrieverError, open_retriever
from reward import METHODS
from rollout import detokenize, rollout
from runner import ModelRunner

# The largest difference of a log-prob that counts as rounding: in fp32, and in bf16. A fault of the cache or
# of a position makes differences as large as the log-probs themselves.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1.0}
BUDGET = "topk", "max_searches", "max_completion_length", "max_doc_tokens"
RANGES = {name: evaluate.RANGES[name] for name in BUDGET} | {"temperature": (0, math.inf)}


@dataclass
class Config:
    """Prints one episode token by token, and whether the sampler and the loss agree about it."""

    model: str = ""  # hub id or local directory
    adapter: str = ""  # directory of a LoRA adapter of --model, see lora.py
    question: str = ""  # what the model is asked
    method: str = ""  # the method whose prompt the model was trained on; none: as its run.json says, else sem
    corpus: str = ""  # JSONL of {"id", "contents"}; ssrl needs none, and with one it searches there
    retriever: str = ""  # URL of a /retrieve server, in place of a corpus
    temperature: float = 1.0  # of sampling; 0: greedy, with the log-probs of temperature 1
    seed: int = 0  # of sampling: another seed gives another episode
    topk: int = 5  # documents a search returns
    max_searches: int = 4  # results and reminders that an episode may get
    max_completion_length: int = 8192  # tokens after the prompt, results included
    max_doc_tokens: int = 512  # tokens that each document is cut to
    date: str = ""  # what a chat template that prints the date prints; none: as its run.json says, else today
    cuda_graphs: bool = True  # on a GPU, replay decode steps as CUDA graphs


def check(config: Config, given: set[str] = frozenset()) -> Config:
    """Returns the settings with those of the model's run added, as evaluate.py does. Raises InputError for
    values that make no sense, before anything is loaded."""
    for name in ("model", "question"):
        if not getattr(config, name).strip():
            raise InputError(f"--{name} is needed")
    if config.question.encode(errors="replace").decode() != config.question:
        raise InputError("--question: it is not UTF-8")
    shared = "model", "adapter", "method", "date", *BUDGET
    stored = evaluate.as_trained(evaluate.Config(**{n: getattr(config, n) for n in shared}), given)
    config = replace(config, **{name: getattr(stored, name) for name in shared})
    check_ranges(config, RANGES)
    check_date(config.date)
    if config.method not in METHODS:
        raise InputError(f"--method {config.method}: must be one of {', '.join(METHODS)}")
    if not (config.corpus or config.retriever or METHODS[config.method].template.self_search):
        raise InputError(f"--corpus or --retriever is needed: --method {config.method} searches")
    return config


def sample(config: Config, model, tokenizer) -> Episode:
    """One episode. Raises InputError if the model cannot be sampled, or if a search fails."""
    template = METHODS[config.method].template
    retriever = open_retriever(config, {}) if config.corpus or config.retriever else None
    question = Question("--question", config.question, [], "look.py")
    length = check_prompts(model, tokenizer, template, [question]) + config.max_completion_length
    probe(model, tokenizer, length)
    [episode] = rollout(
        model, tokenizer, template, [question], retriever=retriever, temperature=config.temperature,
        seed=config.seed, runner=ModelRunner(model, len(tokenizer), 1, length, config.cuda_graphs),
        **{name: getattr(config, name) for name in BUDGET},
    )  # fmt: skip
    if episode.stop == "search_failed":
        raise InputError("--retriever: it failed on the query of the episode")
    return episode


def score(config: Config, model, episode: Episode, vocab_size: int) -> dict[int, float]:
    """{place in the episode: log-prob} of the tokens that the loss takes."""
    training, scored = TrainingConfig(temperature=config.temperature or 1.0), {}
    for batch in grpo.make_batches([episode], [0.0], training, model.device):
        places = (batch.position + 1 - len(episode.prompt_ids)).tolist()
        logps = grpo.token_logps(model, batch, training, vocab_size).tolist()
        scored |= dict(zip(places, logps, strict=True))
    return scored


def right_mask(episode: Episode, tokenizer) -> list[bool]:
    """What the mask should be: all tokens of the model, except those with a character of a result that it
    wrote itself. The sampler finds these token by token; here they are found in the whole text."""
    template, mask = episode.template, []
    for segment in episode.segments:
        spans, ends = [], [0] * (len(segment.ids) + 1)
        if template.own_result:
            ends = [len(detokenize(tokenizer, segment.ids[:n])) for n in range(len(segment.ids) + 1)]
            block = rf"<{template.own_result}>.*?(?:</{template.own_result}>|\Z)"
            spans = [m.span() for m in re.finditer(block, detokenize(tokenizer, segment.ids), re.DOTALL)]
        for start, end in pairwise(ends):
            inside = any(start < last and end > first for first, last in spans)
            mask.append(segment.kind == "model" and not inside)
    return mask


def report(episode: Episode, scored: dict[int, float], tokenizer, tolerance: float) -> int:
    """Prints the table and the verdict. Returns the exit code."""
    kinds = [segment.kind for segment in episode.segments for _ in segment.ids]
    gaps = {place: abs(logp - episode.logps[place]) for place, logp in scored.items()}
    print(f"prompt, {len(episode.prompt_ids)} tokens: {detokenize(tokenizer, episode.prompt_ids)!r}\n")
    print("place  kind          id mask    sampled     scored difference  text")
    for i, (kind, id, chosen) in enumerate(zip(kinds, episode.ids, episode.loss_mask, strict=True)):
        sampled = f"{episode.logps[i]:.5f}" if kind == "model" or chosen else "-"
        again, gap = (f"{scored[i]:.5f}", f"{gaps[i]:.1e}") if i in scored else ("-", "-")
        text = detokenize(tokenizer, [id])
        print(f"{i:5}  {kind:8} {id:7} {chosen:4d} {sampled:>10} {again:>10} {gap:>10}  {text!r}")
    print(f"\n{len(kinds)} tokens, {episode.policy_tokens} of them trained on, stopped by: {episode.stop}")
    faults = []
    if wrong := [i for i, m in enumerate(right_mask(episode, tokenizer)) if m != episode.loss_mask[i]]:
        faults.append(f"the mask of {len(wrong)} tokens is wrong, first at place {wrong[0]}")
    if other := scored.keys() ^ {i for i, chosen in enumerate(episode.loss_mask) if chosen}:
        faults.append(f"the loss does not take the tokens of the mask, first at place {min(other)}")
    if gaps:
        worst = max(gaps, key=lambda i: math.inf if math.isnan(gaps[i]) else gaps[i])
        print(f"largest difference: {gaps[worst]:.1e} at place {worst}")
        if not gaps[worst] <= tolerance:
            faults.append(f"log-probs differ by more than {tolerance:g}, most at place {worst}")
    print("verdict: " + (f"FAULT: {'; '.join(faults)}" if faults else "the mask and the log-probs are right"))
    return bool(faults)


def main(config: Config, given: set[str] = frozenset()) -> int:
    config, device = check(config, given), "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = load_model(config.model, device, dtype)
    if config.adapter:
        load_adapter(model, config.adapter)
    set_date(tokenizer, config.date)
    episode = sample(config, model, tokenizer)
    scored = score(config, model, episode, len(tokenizer))
    return report(episode, scored, tokenizer, TOLERANCES[dtype])


if __name__ == "__main__":
    config, given = parse(Config, "look.py")
    try:
        sys.exit(main(config, given))
    except KeyboardInterrupt:
        print("look.py: stopped", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        fail("look.py", "out of GPU memory: try a smaller --max_completion_length")
    except (InputError, RetrieverError, OSError) as error:
        fail("look.py", error)
