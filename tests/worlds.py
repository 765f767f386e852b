"""What several test files share: the files of a world of a few words, a run in that world, and episodes made
by hand.

flags = write_world(tmp_path)            # the fixture `world`
assert run_main(flags, "--resume") == 0
rows = timeless(tmp_path / "out" / "metrics.jsonl")
"""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import grpo
from config import Config, parse
from data import Episode, Question, Segment
from prompts import SEM

WORDS = "<pad> <eos> <think> </think> <answer> </answer> <search> </search> <result> </result>".split()
WORDS += "who is where no yes results".split()
NAMES = [f"w{i}" for i in range(40)]
VOCABULARY = len(WORDS) + len(NAMES)
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}[{{ m['content'] }}]{% endif %}"
    "{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def write_world(folder: Path, dropout: float = 0.0) -> dict[str, str]:
    """Writes a model directory, two training sets and a corpus. Returns the flags of a run of grpo.py on
    them."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *NAMES])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="no"))
    backend.normalizer = normalizers.Replace(
        Regex(r"^\[[^\]]*\]"), ""
    )  # this small model reads no instructions
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        attention_dropout=dropout,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for source, word in (("known", "who"), ("unknown", "where")):
        rows = [
            {"id": str(i), "question": f"{word} is {name}", "golden_answers": [name]}
            for i, name in enumerate(NAMES)
        ]
        (folder / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [{"id": str(i), "contents": f'"{name}"\nwho is {name}'} for i, name in enumerate(NAMES)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    return {
        "model": str(folder / "model"),
        "train": f"{folder}/known.jsonl,{folder}/unknown.jsonl",
        "corpus": f"{folder}/corpus.jsonl",
        "output_dir": str(folder / "out"),
        "prompts_per_step": "4",
        "num_generations": "4",
        "max_completion_length": "24",
        "learning_rate": "0.003",
        "max_steps": "4",
        "save_steps": "2",
        "warmup_steps": "2",
    }


def arguments(flags: dict[str, str]) -> list[str]:
    """{"seed": "1"} -> ["--seed", "1"]"""
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def run_main(flags: dict[str, str], *switches: str) -> int:
    """Runs grpo.py in this process with these flags, and returns its exit code. Unless --bf16 is among the
    switches the run is in fp32, on a GPU too, since the tests compare log-probs."""
    precision = [] if "--bf16" in switches else ["--no-bf16"]
    return grpo.main(*parse(Config, "grpo.py", [*arguments(flags), *precision, *switches]))


def timeless(path: Path) -> list[dict]:
    """The lines of a log without the figures that depend on the clock."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if "seconds" not in k and "time" not in k and "/s" not in k}
        for row in rows
    ]


def lively_reward(episode: Episode, question: Question, **options) -> dict[str, float]:
    """An untrained model earns nothing by the reward of SEM, so all its advantages are 0. This reward depends
    on the number of odd ids, so it differs within a group."""
    parts = {"f": 1.0, "s": float(episode.searches > 0), "t": 1.0, "u": 0.0, "f1_a1": 0.0, "f1_a2": 0.0}
    return {"reward": sum(i % 2 for i in episode.ids) % 3 / 2, **parts}


def episodes_with_results() -> list[Episode]:
    """Five episodes of different lengths. Each has text of the model, a result (in two episodes an empty
    one), and text of the model again."""
    generator = torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()

    episodes = []
    for n, (before, result, after) in enumerate([(3, 4, 2), (1, 0, 1), (6, 9, 5), (2, 3, 8), (4, 0, 3)]):
        segments = [
            Segment("model", ids(before), ""),
            Segment("env", ids(result), ""),
            Segment("model", ids(after), ""),
        ]
        mask = [True] * before + [False] * result + [True] * after
        question = Question(str(n), "", ["x"], "known")
        all_ids = [i for s in segments for i in s.ids]
        episode = Episode(question, ids(4), all_ids, mask, [-2.0] * len(mask), segments, template=SEM)
        episode.stop = "eos"
        episodes.append(episode)
    return episodes
