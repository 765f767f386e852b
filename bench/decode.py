"""Measures a decode step on a GPU and compares it with the time to read its weights, keys and values. It also
compares whole rollouts with transformers' `generate`.

    python bench/rollout.py --gpu        # about two minutes; writes its tables into bench/RESULTS.md

Models of the shapes of Qwen2.5, with random weights in bf16, and a cache of random numbers in which all rows
have the same length. A step is the whole of `ModelRunner.step`: the model, the logits of all tokens, and the
draw. Its floor is the time to read the weights (without the table of input embeddings, unless it is the
head too) and the keys and values of all rows, at the rate of a copy in the same run. Times are from CUDA
events, the median of several. The last column is the largest difference between the log-probs of a step with
the kernel and of one with SDPA, which in bf16 is the rounding through all layers.
"""

import random
import statistics
import time
from datetime import date
from importlib.metadata import version
from unittest.mock import patch

import torch
from results import write
from transformers import Qwen2Config, Qwen2ForCausalLM
from words import make_tokenizer

from cache import kv_bytes
from data import Question
from prompts import Template, render
from rollout import rollout
from runner import ModelRunner

ROWS, KEYS = 256, (640, 2048)
VOCABULARY = 151_665  # tokens of the tokenizer; the head has more columns
WORDS = "<pad> <eos> <user> <assistant>".split()
WORDS += [f"w{i}" for i in range(len(WORDS), VOCABULARY)]
SHAPES = {  # layers, width, heads, key-value heads, intermediate size, width of the head, tied
    "0.5B": (24, 896, 14, 2, 4864, 151_936, True),
    "1.5B": (28, 1536, 12, 2, 8960, 151_936, True),
    "7B": (28, 3584, 28, 4, 18944, 152_064, False),
}


def make_model(layers, width, heads, kv_heads, intermediate, vocabulary, tied) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32768,
        tie_word_embeddings=tied, rope_theta=1e6, dtype="bfloat16", attn_implementation="sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def milliseconds(run, least: int = 5, budget: float = 400) -> float:
    """The median of at least `least` runs, and of more while they take less than `budget` ms."""
    times = []
    for _ in range(2):
        run()
    while len(times) < least or (len(times) < 30 and sum(times) < budget):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes/s of a copy, read and written."""
    a, b = torch.randn(2, 1 << 30, device="cuda").bfloat16()
    return 2 * a.nbytes / milliseconds(lambda: a.copy_(b)) * 1e3


def seconds(run) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(name: str, keys: int, model, rate: float) -> list[str]:
    """A row of the table."""
    generator = torch.Generator("cuda").manual_seed(0)
    runner = ModelRunner(model, VOCABULARY, ROWS, keys)
    for tensor in (*runner.cache.keys, *runner.cache.values):
        tensor.normal_(generator=generator)
    tokens = torch.randint(VOCABULARY, (ROWS,), generator=generator, device="cuda").tolist()
    inputs = tokens, [keys - 1] * ROWS, torch.rand(1, ROWS, generator=generator, device="cuda").tolist()
    start = time.perf_counter()
    list(runner.decode(*inputs))  # it records the graph
    torch.cuda.synchronize()
    recording = time.perf_counter() - start
    assert runner.cuda_graphs and runner.graphs[ROWS], "the graph of this step was refused"
    logits = runner.step(ROWS, keys)[2].log_softmax(-1)
    same = torch.equal(logits, runner.step(ROWS, keys)[2].log_softmax(-1))
    with patch("runner.use_triton", lambda tensor: False):
        gap = (runner.step(ROWS, keys)[2].log_softmax(-1) - logits).abs().max().item()
        sdpa = milliseconds(lambda: runner.step(ROWS, keys), least=3, budget=200)
    eager = milliseconds(lambda: runner.step(ROWS, keys))
    graph = milliseconds(runner.graphs[ROWS][0].replay)
    read = sum(p.numel() for p in model.parameters())
    if not model.config.tie_word_embeddings:
        read -= model.get_input_embeddings().weight.numel()
    floor = (read * 2 + ROWS * keys * kv_bytes(model.config, torch.bfloat16)) / rate * 1e3
    row = [
        name,
        f"{keys:,}",
        f"{sdpa:.2f}",
        f"{eager:.2f}",
        f"{graph:.2f}",
        f"{floor:.2f}",
        f"{floor / graph:.0%}",
    ]
    row += [f"{ROWS / graph * 1e3:,.0f}", f"{recording:.2f}", "yes" if same else "NO", f"{gap:.3f}"]
    print(" | ".join(row), flush=True)
    return row


def whole(model, prompts: int = 32, group: int = 8, length: int = 128, new: int = 512) -> list[str]:
    """A row of the table of whole rollouts: up to `new` tokens for each episode (1 in 150,000 ends ours)."""
    tokenizer, rng = make_tokenizer(WORDS), random.Random(0)
    texts = (" ".join(f"w{rng.randrange(200, 9000)}" for _ in range(length - 2)) for _ in range(prompts))
    questions = [Question(str(i), text, ["-"], "bench") for i, text in enumerate(texts)]
    runner, tokens = ModelRunner(model, len(tokenizer)), 0

    def ours():
        nonlocal tokens
        episodes = rollout(
            model, tokenizer, Template(""), questions, group_size=group, max_completion_length=new,
            runner=runner,
        )  # fmt: skip
        tokens = sum(len(e.ids) for e in episodes)

    first, again = seconds(ours), min(seconds(ours) for _ in range(2))
    ids = [render(Template(""), q, tokenizer) for q in questions for _ in range(group)]
    ids = torch.tensor(ids, device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": True, "top_k": 0}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=2, **options)  # warm-up
    theirs = seconds(lambda: model.generate(ids, max_new_tokens=new, **options))
    rates = len(ids) * new / theirs, tokens / again
    shown = [f"{theirs:.2f}", f"{first:.2f}", f"{again:.2f}", f"{rates[0]:,.0f}", f"{rates[1]:,.0f}"]
    return [f"{prompts} x {group}, {length} + {new}", *shown, f"{rates[1] / rates[0]:.1f}x"]


def main():
    if not torch.cuda.is_available():
        raise SystemExit("bench/rollout.py --gpu: there is no GPU here")
    rate = copy_rate()
    head = ["model", "keys", "SDPA eager, ms", "eager, ms", "graph, ms", "floor, ms", "share", "tokens/s"]
    head += ["recording, s", "eager twice: same bits", "largest log-prob gap to SDPA"]
    rows = [head, ["---:"] * len(head)]
    for name, shape in SHAPES.items():
        model = make_model(*shape)
        rows += [measure(name, keys, model, rate) for keys in KEYS]
        if name == "0.5B":
            whole_row = whole(model)
        del model
        torch.cuda.empty_cache()
    packages = ", ".join(
        f"{name} {version(name).partition('+')[0]}" for name in ("torch", "triton", "transformers")
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    head = ["prompts x episodes, tokens", "`generate`, s", "ours, first, s", "ours, again, s"]
    head += ["`generate`, tokens/s", "ours, tokens/s", "ratio"]
    whole_table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---:"] * len(head), whole_row])
    text = f"""## Decode steps on a GPU

`python bench/rollout.py --gpu`, {date.today()}, {torch.cuda.get_device_properties(0).name}, {packages}.
{ROWS} rows, random weights of the shapes of Qwen2.5, bf16. In the same run a copy moved
{rate / 1e12:.2f} TB/s. Floor: the time to read the weights and all keys and values at that rate; share: floor
/ graph. A recording includes the compilation of kernels. The gap to SDPA is that of bf16 rounding through all
layers.

{table}

Whole rollouts at 0.5B beside one `generate` over the same rows, sampling. The first rollout compiles kernels
and records graphs; "again" is the better of two more. `generate` is timed once, after a short call.

{whole_table}"""
    print(text)
    write("decode", text)
