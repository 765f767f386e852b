"""CPU seconds of a rollout beside transformers' `generate`: one process, one thread, the same tokens.

    python bench/rollout.py              # about ten minutes; writes its tables into bench/RESULTS.md
    python bench/rollout.py --gpu        # on a GPU, about two minutes: see decode.py, and `gpu` below

Episodes of several turns: the peer is the loop of TRL and Search-R1. It calls `generate` until every row of
the batch has searched or ended, then it appends all results, and then it calls `generate` again over the
whole contexts, padded on the left. It knows how many tokens a turn needs at most, and a row that has ended
leaves the batch. Its results cost it nothing, since it has their ids, while ours finds each query in the text
and encodes the document.

Episodes of one turn: the peer is one `generate` over all rows. With mixed lengths it runs until the longest
row ends.

What is sampled comes from a script, so that both sides do the same work; the ids are compared beforehand.
Both compute the distribution and draw from it, and then the script's token takes the place of the drawn one.
Prefill tokens are counted without padding. A sampled token that is fed to the next call of the model is not
one of them.
"""

import gc
import os
import platform
import random
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing to fetch

import decode
import torch
from results import write
from transformers import LogitsProcessor, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging
from words import make_tokenizer

import rollout
import runner
from data import Doc, Question
from prompts import Template, render

VOCABULARY, ROUNDS, SEED = 2048, 5, 0
TEMPLATE = Template("")
EOS, SEARCH, SEARCH_END, DIGIT = 1, 6, 7, 100  # ids: the end, <search>, </search>, the word for 0
AROUND = 3  # tokens of a result beside the words of its text: two tags, and the title


@dataclass
class Row:
    """The script of an episode: what each turn samples, and the lengths of the results between the turns."""

    turns: list[list[int]]
    results: list[int]

    def ids(self) -> list[int]:  # 0 where the environment writes
        results = ([0] * n for n in [*self.results, 0])
        return [i for turn, result in zip(self.turns, results, strict=True) for i in [*turn, *result]]


def make_row(rng: random.Random, turns: list[int], results: list[int]) -> Row:
    """A row whose turns have the given numbers of tokens. All but the last one end in a search, whose query
    is the length of its result."""
    row = Row([], results)
    for n, result in zip(turns, [*results, None], strict=True):
        end = [SEARCH, *(DIGIT + int(digit) for digit in str(result)), SEARCH_END] if result else [EOS]
        row.turns.append([rng.randrange(200, VOCABULARY) for _ in range(n - len(end))] + end)
    return row


def equal_rows(group: int, searches: int, turn: int, result: int, prompts: int) -> list[Row]:
    """Rows with the same number of searches, and with turns and results of the same lengths."""
    rng = random.Random(SEED)
    return [
        make_row(rng, [turn] * (searches + 1), [result] * searches)
        for _ in range(prompts)
        for _ in range(group)
    ]


def mixed_rows(rows: int, searches: int, turn: tuple[int, int], result: tuple[int, int]) -> list[Row]:
    """Rows of 0 to `searches` searches, with the lengths of turns and results drawn from the given ranges."""
    rng = random.Random(SEED)
    counts = [rng.randint(0, searches) for _ in range(rows)]
    return [
        make_row(rng, [rng.randint(*turn) for _ in range(n + 1)], [rng.randint(*result) for _ in range(n)])
        for n in counts
    ]


# Words are tokens. The tags contain ">", so after these the search loop looks for a closed tag.
WORDS = "<pad> <eos> <user> <assistant> <result> </result> <search> </search> <answer> </answer>".split()
WORDS += [f"w{i}" for i in range(len(WORDS), VOCABULARY)]


def make_model(layers: int = 4, width: int = 256) -> Qwen2ForCausalLM:
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def make_questions(n: int, length: int) -> list[Question]:
    """Prompts of `length` tokens: the chat template adds two."""
    rng = random.Random(SEED)
    texts = (" ".join(f"w{rng.randrange(200, VOCABULARY)}" for _ in range(length - 2)) for _ in range(n))
    return [Question(str(i), text, ["-"], "bench") for i, text in enumerate(texts)]


class Shelf:
    """A retriever. A query is the length of the result that it gets."""

    def search(self, queries: list[str], k: int) -> list[list[Doc]]:
        lengths = [int("".join(str(int(word[1:]) - DIGIT) for word in query.split())) for query in queries]
        return [[Doc("0", "w99", " ".join(["w99"] * (n - AROUND)))] for n in lengths]


def ours(model, tokenizer, questions, group: int, script: list[Row]) -> tuple[list[list[int]], int]:
    """(contexts at the end, number of prefill tokens) of our rollout."""
    width = max(len(row.ids()) for row in script)
    padded = torch.tensor([token for row in script for token in row.ids() + [0] * (width - len(row.ids()))])
    padded, sample = padded.to(model.device), runner.sample

    def scripted(logits, u, *rest):  # u is the place of the token: see `numbered`
        return padded[u.long().clamp(min=0)], sample(logits, u / len(padded), *rest)[1]

    def numbered(n, seed, step, row):
        return [float(i) for i in range(row * width, row * width + n)]

    counts, originals = {}, (runner.sample, rollout.uniform_stream)
    runner.sample, rollout.uniform_stream = scripted, numbered
    try:
        episodes = rollout.rollout(
            model, tokenizer, TEMPLATE, questions, group_size=group, retriever=Shelf(), topk=1,
            max_searches=100, max_completion_length=width, max_doc_tokens=width, counts=counts,
        )  # fmt: skip
    finally:
        runner.sample, rollout.uniform_stream = originals
    return [e.prompt_ids + e.ids for e in episodes], counts["prefill_tokens"]


class Scripted(LogitsProcessor):
    """Makes `generate` sample the tokens of a script [rows, new]."""

    def __init__(self, script: torch.Tensor):
        self.script = iter(script.T[..., None])

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).scatter_(1, next(self.script), 0.0)


@torch.no_grad()
def peer(model, prompts: list[list[int]], script: list[Row], results: list[list[list[int]]]):
    """(contexts at the end, number of prefill tokens) of the loop over `generate`."""
    contexts, prefill = [list(prompt) for prompt in prompts], 0
    for turn in range(max(len(row.turns) for row in script)):
        rows = [i for i, row in enumerate(script) if turn < len(row.turns)]
        longest = max(len(contexts[i]) for i in rows)
        new = max(len(script[i].turns[turn]) for i in rows)
        ids = [[0] * (longest - len(contexts[i])) + contexts[i] for i in rows]
        ids = torch.tensor(ids, device=model.device)
        turns = [script[i].turns[turn] for i in rows]
        padded = [tokens + [0] * (new - len(tokens)) for tokens in turns]
        padded = torch.tensor(padded, device=model.device)
        pads = torch.tensor([longest - len(contexts[i]) for i in rows], device=model.device)
        mask = torch.arange(longest, device=model.device) >= pads[:, None]
        prefill += sum(len(contexts[i]) for i in rows)
        out = model.generate(
            ids, attention_mask=mask.long(), do_sample=True, top_k=0, max_new_tokens=new,
            logits_processor=[Scripted(padded)],
        )  # fmt: skip
        for i, tokens, new_ids in zip(rows, turns, out[:, longest:].tolist(), strict=True):
            contexts[i] += new_ids[: len(tokens)]
            if turn < len(script[i].results):
                contexts[i] += results[i][turn]
    return contexts, prefill


def result_ids(context: list[int], prompt: int, row: Row) -> list[list[int]]:
    """The results of an episode, cut out of its ids."""
    lengths = [
        n for turn, result in zip(row.turns, [*row.results, 0], strict=True) for n in (len(turn), result)
    ]
    ends = list(accumulate(lengths, initial=prompt))
    return [context[a:b] for a, b in zip(ends[1::2], ends[2::2], strict=True)]


def clock(model) -> float:
    """CPU seconds. On a GPU it is wall-clock seconds, read after the GPU has finished all its work."""
    if model.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    name: str, model, tokenizer, prompt: int, group: int, script: list[Row], rounds: int
) -> list[str]:
    """A row of a table: prefill tokens and seconds of both sides."""
    questions = make_questions(len(script) // group, prompt)
    prompts = [render(TEMPLATE, q, tokenizer) for q in questions for _ in range(group)]
    contexts, prefill = ours(model, tokenizer, questions, group, script)  # warm-up too
    results = [result_ids(c, prompt, row) for c, row in zip(contexts, script, strict=True)]
    theirs, again = peer(model, prompts, script, results)
    assert theirs == contexts, "not the same tokens"
    sides = (
        partial(peer, model, prompts, script, results),
        partial(ours, model, tokenizer, questions, group, script),
    )
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, side in enumerate(sides):
            gc.collect()
            start = clock(model)
            side()
            best[i] = min(best[i], clock(model) - start)
    times = [f"{best[0]:.2f}", f"{best[1]:.2f}", f"{best[0] / best[1]:.2f}x"] if rounds else ["-"] * 3
    row = [name, f"{again:,}", f"{prefill:,}", f"{prefill / again:.2f}", *times]
    print(" | ".join(row), flush=True)
    return row


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    model, small, tokenizer = make_model(), make_model(layers=1, width=32), make_tokenizer(WORDS)
    several, single = [], []
    for prompt, group, searches, turn, result in (
        (150, 8, 2, 80, 450), (150, 8, 4, 80, 450), (300, 8, 3, 200, 500), (150, 16, 3, 100, 500),
    ):  # fmt: skip
        name = f"{prompt} / {group} / {searches} / {turn} / {result}"
        script = equal_rows(group, searches, turn, result, prompts=16 // group)
        timed = searches == 2  # of the others only the tokens are counted
        several.append(
            measure(name, model if timed else small, tokenizer, prompt, group, script, ROUNDS * timed)
        )
    script = mixed_rows(32, 4, (20, 100), (100, 500))
    several.append(measure("150 / 8 / 0-4 / 20-100 / 100-500", model, tokenizer, 150, 8, script, ROUNDS))
    for name, low in (("equal, 128", 128), ("mixed, 8-128", 8)):
        script = mixed_rows(64, 0, (low, 128), (0, 0))
        single.append(measure(name, model, tokenizer, 32, 1, script, ROUNDS))
    sides = ["`generate`, CPU s", "ours, CPU s", "ratio"]
    head = ["P / G / searches / C / O", "prefill tokens, re-prefilling", "ours", "ratio", *sides]
    several = [head, ["---:"] * len(head), *several]
    single = [[row[0], *row[4:]] for row in single]
    single = [["tokens a row", *sides], ["---:"] * 4, *single]
    several, single = ("\n".join(f"| {' | '.join(row)} |" for row in rows) for rows in (several, single))
    packages = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    machine = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {packages}"
    weights = model.num_parameters() / 1e6
    text = f"""## Rollouts: ours beside a loop over `generate`

`python bench/rollout.py`, {date.today()}, {machine}.
CPU time, one thread, seed {SEED}, the best of {ROUNDS}, taking turns. A Qwen2 of
{weights:.1f} M random weights (4 layers, width 256, {VOCABULARY:,} tokens), fp32; the sampled ids come from a
script and are the same on both sides.

Episodes of several turns: prompts of P tokens, groups of G, turns of C tokens, results of O; 16 rows, and 32
in the last line. The peer prefills the whole context again at every turn, as TRL and Search-R1 do. In
lines without seconds only the tokens were counted.

{several}

Episodes of one turn: 64 different prompts of 32 tokens; the peer is one `generate`.

{single}"""
    print(text)
    write("rollout", text)


def gpu():
    """The tables of decode.py, and several turns of 256 rows at the layers of the 0.5B shape, with the small
    vocabulary of the script on both sides."""
    decode.main()
    *layers, _, tied = decode.SHAPES["0.5B"]
    model = decode.make_model(*layers, VOCABULARY, tied)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, 0
    script = equal_rows(8, 2, 80, 450, prompts=32)
    row = measure("150 / 8 / 2 / 80 / 450", model, make_tokenizer(WORDS), 150, 8, script, rounds=2)
    head = "P / G / searches / C / O", "prefill tokens, re-prefilling", "ours", "ratio"
    head = [*head, "`generate`, s", "ours, s", "ratio"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---:"] * len(head), row])
    text = f"""## Episodes of several turns on a GPU

`python bench/rollout.py --gpu`, {date.today()}, {torch.cuda.get_device_properties(0).name}. 256 rows, the
layers of Qwen2.5-0.5B with random weights in bf16, and {VOCABULARY:,} tokens. Seconds, with the recording of
graphs. The peer and the columns are those of "Rollouts: ours beside a loop over `generate`".

{table}"""
    print(text)
    write("turns on a GPU", text)


if __name__ == "__main__":
    gpu() if "--gpu" in sys.argv else main()
