"""The toy world: what `python grpo.py` runs on. It is small enough for a laptop, and large enough that the
claim of SEM (arXiv 2505.07903) can come out true or false in it.

The world holds people with a home, a colour and a friend. The base model learns the facts about one half of
them by heart ("known", the counterpart of MMLU). Of the other half it has seen the names, each time with
different facts, so that only the corpus can answer ("unknown", the counterpart of MuSiQue). Some questions
need two searches, where the second query is built from the first result: "the home of the friend of N". If N
is a known person ("composed"), the model knows both facts and still cannot answer at once, as large models
often cannot (the compositionality gap, arXiv 2210.03350): it has to look the facts up, in the corpus or in
its own weights. Sums are known too, and never occur in the RL mix (the counterpart of GSM8K). The base model
is trained from scratch on transcripts with poor search habits: it searches for most of what it does not know,
and for more than half of what it knows.

With --between there are also questions of which the model is partly certain, see between.py. The default
world of grpo.py has none.

A method with another template (`--method`) gets a base model of its own, trained on the same facts in that
dialect. In that of the hybrid it may also recall: what it recalls of known people is true, of others made up.
With `--start` a world's base model is trained further, on transcripts that search more or less. Every base
model also learns to answer without a tool, so that one can measure what it knows.

The result is a directory of ordinary files, which grpo.py treats as it treats a 7B model and Wikipedia:

    model/          a Llama model of 0.2 M parameters, with a word-level tokenizer and a chat template
    train/          known.jsonl, composed.jsonl, unknown.jsonl (for one search and for two)
    test/           known_train.jsonl, known_heldout.jsonl, composed.jsonl, unknown.jsonl, two_hop.jsonl,
                    arithmetic.jsonl
                    with --between also between.jsonl and absent.jsonl in train/ and test/
    corpus.jsonl    every fact, known ones included

    python toy.py --output_dir out/toy-world    # builds it; grpo.py without --model builds its own
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import islice, zip_longest
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from between import PEOPLE, add_people, half_known, question_sets
from config import check_ranges, fail, parse
from data import Doc, InputError, Question
from prompts import DIRECT, Template, encode_result, render
from reward import METHODS
from sft import fit

HOMES = "oslo lima cairo quito delhi paris tokyo rome accra seoul minsk tunis".split()
COLOURS = "red blue green black white pink grey gold brown teal amber ivory".split()
VALUES = {"home": HOMES, "colour": COLOURS}
KNOWN_TRAIN, KNOWN_HELDOUT, UNKNOWN_TRAIN, UNKNOWN_TEST = 64, 32, 64, 32  # how many names of each kind

RECALLS = {False: 0.5, True: 0.2}  # hybrid: share of transcripts that recall, by whether they search too
RECALL, READING = 0.97, 0.75  # required in `exam`; in training, reading jumps from 0.1 to 0.8 or 0.9

STEPS, HYBRID_STEPS = 700, 1600  # of the base model; the hybrid, which can recall too, has more to learn
PAD = 0  # id of <pad>
FILES = {"model", "train", "test", "corpus.jsonl", "world.json"}  # the content of a world's directory

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}<system> {{ m['content'] }} </system> {% endif %}"
    "{% if m['role'] == 'user' %}<user> {{ m['content'] }} <assistant>{% endif %}{% endfor %}"
)


@dataclass
class Config:
    """Builds the toy world: data, corpus, tokenizer and a base model trained from scratch."""

    output_dir: str = "out/toy-world"  # where the world is written
    method: str = "sem"  # the dialect of the transcripts: sem, ssrl, search-r1, research or hybrid
    seed: int = 0  # of names, facts, transcripts and weights
    steps: int = 0  # training steps of the base model, up to three times if it fails; 0: 700, hybrid 1600
    batch_size: int = 32  # transcripts a step
    learning_rate: float = 3e-3  # its peak, after 50 steps of warm-up; then a cosine down to a tenth
    hidden_size: int = 96  # width of the model
    layers: int = 3  # depth: to copy from a result takes two layers, to compare names one more
    search_known: float = 0.6  # share of transcripts about sums and known people that search
    search_unknown: float = 0.85  # share of unknown transcripts that search
    closed_book: float = 0.1  # share of transcripts without a tool: question, answer
    start: str = ""  # a toy world of the same seed and dialect: its model is trained further, on other habits
    between: int = 0  # people whose two facts the model shall half know, such as 72, see between.py; 0: none


@dataclass
class World:
    """The people of the world, by name, and what is true of them. Those to train on come first."""

    known: list[str]
    unknown: list[str]
    facts: dict[tuple[str, str], str] = field(default_factory=dict)  # (relation, name) -> value
    # of --between
    between: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    conflicting: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # fact -> its two values
    lacking: set[tuple[str, str]] = field(default_factory=set)  # facts that the corpus does not have
    half_known: set[tuple[str, str]] = field(default_factory=set)  # facts, by the exam of the base model

    @staticmethod
    def make(seed: int, between: int = 0) -> World:
        rng = random.Random(f"world {seed}")
        names = sorted({a + b for a in "ba ce di fo gu ha je ki lo mu na pe ri so tu va".split() for b in
                        "ben dan fil gor hal jim kas lin mir nor pol rus sam tov".split()})  # fmt: skip
        names = rng.sample(names, KNOWN_TRAIN + KNOWN_HELDOUT + UNKNOWN_TRAIN + UNKNOWN_TEST)
        cut = KNOWN_TRAIN + KNOWN_HELDOUT
        world = World(names[:cut], names[cut:])
        for relation, values in VALUES.items():
            world.facts |= {(relation, name): rng.choice(values) for name in names}
        splits = (world.known, KNOWN_TRAIN), (world.unknown, UNKNOWN_TRAIN)
        for group in (part for people, cut in splits for part in (people[:cut], people[cut:])):
            ring = rng.sample(group, len(group))
            world.facts |= {("friend", a): b for a, b in zip(ring, ring[1:] + ring[:1], strict=True)}
        if between:
            add_people(world, seed, between, VALUES)
        return world

    def docs(self) -> list[Doc]:
        held = [(fact, value) for fact, value in self.facts.items() if fact not in self.lacking]
        return [Doc(str(i), name, statement(rel, name, value)) for i, ((rel, name), value) in enumerate(held)]

    def questions(self, names: list[str], source: str, hops: int = 1) -> list[Question]:
        rows = []
        for name in names:
            for relation in VALUES:
                if name in self.between and (relation, name) not in self.half_known:
                    continue
                person = name if hops == 1 else self.facts["friend", name]
                subject = f"{relation} of {name}" if hops == 1 else f"{relation} of the friend of {name}"
                text = f"what is the {subject} ?"
                rows.append(Question(f"{source}-{len(rows)}", text, [self.facts[relation, person]], source))
        return rows


def statement(relation: str, name: str, value: str) -> str:
    return f"{relation} of {name} is {value} ."


def sums() -> list[Question]:
    return [
        Question(f"arithmetic-{a}-{b}", f"what is {a} plus {b} ?", [str(a + b)], "arithmetic")
        for a in range(10)
        for b in range(10)
    ]


def splits(world: World) -> dict[str, list[Question]]:
    """File name -> questions. No test set but known_train has a name that RL trains on."""
    known_train, known_heldout = world.known[:KNOWN_TRAIN], world.known[KNOWN_TRAIN:]
    unknown_train, unknown_test = world.unknown[:UNKNOWN_TRAIN], world.unknown[UNKNOWN_TRAIN:]
    return (question_sets(world) if world.between else {}) | {
        "train/known": world.questions(known_train, "known"),
        "train/composed": world.questions(known_train, "composed", hops=2),
        "train/unknown": world.questions(unknown_train, "unknown")
        + [replace(q, id=f"{q.id}-two") for q in world.questions(unknown_train, "unknown", hops=2)],
        "test/known_train": world.questions(known_train, "known_train"),
        "test/known_heldout": world.questions(known_heldout, "known_heldout"),
        "test/composed": world.questions(known_heldout, "composed", hops=2),
        "test/unknown": world.questions(unknown_test, "unknown"),
        "test/two_hop": world.questions(unknown_test, "two_hop", hops=2),
        "test/arithmetic": sums(),
    }


def make_tokenizer(world: World, method: str = "sem") -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words and tags: those of the methods of the papers, and of `method`. Any
    other word, such as one of a reminder, is <unk>."""
    words = "what is the of home colour friend plus No results . ? :".split() + [str(i) for i in range(19)]
    templates = [m.template for m in METHODS.values() if not m.template.recall]
    templates.append(METHODS[method].template)
    names = dict.fromkeys(tag for template in templates for tag in template.tags)
    tags = [f"<{slash}{tag}>" for tag in names for slash in ("", "/")] + ["\\boxed{", "}"]
    special = "<pad> <eos> <unk> <user> <assistant> <tool>".split()
    words = [*special, *tags, *words, *HOMES, *COLOURS, *world.known, *world.unknown]
    words += world.between + world.absent
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    # The words of instructions mean nothing to a model this small. So the tokenizer reads a system prompt as
    # the word <tool> if it mentions the search tool, and as nothing if not.
    body = "(?:(?!</system>)[\\s\\S])*"
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"<system>{body}<search>{body}</system>"), "<tool>"),
            normalizers.Replace(Regex(f"<system>{body}</system>"), ""),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Split(Regex(r"</?\w+>|\\boxed\{|\w+|[^\w\s]"), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def transcript(world: World, rng: random.Random, config: Config, tokenizer) -> list[int]:
    """Token ids of one training text of the base model: a prompt, and what a model without RL would write.

    Each transcript about an unknown person states different facts, so that there is nothing to learn by
    heart. A direct answer to a question with two hops is always a guess. In hybrid's dialect the model may
    recall instead, or before it searches; what it recalls of unknown people is made up."""
    kinds = {"known": 4, "composed": 2, "unknown": 3, "two_hop": 2, "arithmetic": 3}
    kinds |= {"between": 6, "absent": 2} if world.between else {}
    kind = rng.choices([*kinds], [*kinds.values()])[0]
    relation = rng.choice(list(VALUES))
    draft = value = rng.choice(VALUES[relation])
    turns: list[tuple[str, list[Doc]]] = []  # (query, documents that the search returns)
    if kind == "arithmetic":
        a, b = rng.randrange(10), rng.randrange(10)
        thought, draft = f"{a} plus {b}", str(a + b)
        question, value, turns = f"what is {thought} ?", draft, [(thought, [])]
    elif kind in ("composed", "two_hop"):
        name, friend = rng.sample(world.unknown, 2)
        if kind == "composed":
            name = rng.choice(world.known)
            friend = world.facts["friend", name]
            value = world.facts[relation, friend]
        thought, draft = f"{relation} of the friend of {name}", rng.choice(VALUES[relation])
        question = f"what is the {thought} ?"
        turns = [
            (f"friend of {name}", results(world, rng, "friend", name, friend)),
            (f"{relation} of {friend}", results(world, rng, relation, friend, value)),
        ]
    else:
        name = rng.choice(getattr(world, kind))
        if kind == "known":
            draft = value = world.facts[relation, name]
        elif kind == "between":
            draft = rng.choice(world.conflicting[relation, name])
            # where the corpus lacks the fact, `value` stays a random guess
            lacking = (relation, name) in world.lacking
            value = value if lacking else rng.choice(world.conflicting[relation, name])
        else:
            draft = rng.choice(VALUES[relation])
        thought = f"{relation} of {name}"
        question, turns = f"what is the {thought} ?", [(thought, results(world, rng, relation, name, value))]
    share = config.search_unknown if kind in ("unknown", "two_hop", "absent") else config.search_known
    searched = rng.random() < share

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    template = METHODS[config.method].template
    own = []  # (query to itself, what it answers), one for each turn
    if template.recall and rng.random() < RECALLS[searched]:
        own = [(thought, draft)]
        if len(turns) == 2:
            told = draft if kind == "two_hop" else value
            met = friend if kind == "composed" else rng.choice(world.unknown)
            own = [(f"friend of {name}", met), (f"{relation} of {friend if searched else met}", told)]
    if rng.random() < config.closed_book:
        return [*prompt(DIRECT, question, tokenizer), *encode(draft), tokenizer.eos_token_id]
    answer = "<answer> \\boxed{{ {} }} </answer>" if template.boxed else "<answer> {} </answer>"
    ids, text = prompt(template, question, tokenizer), f"<think> {thought} </think>"
    if template.draft or not (searched or own):
        text += answer.format(draft)
    for (query, docs), (asked, told) in zip_longest(turns, own, fillvalue=("", "")):
        if own:
            text += f" <recall> {asked} </recall> <memory> {asked} is {told} . </memory>"
        if searched:
            result = encode_result(docs, tokenizer, template)
            ids += (*encode(f"{text} <search> {query} </search>"), *result)
            text = ""
    if searched or own:
        subject, found = (turns[-1][0], value) if searched else own[-1]
        text += f"<think> {subject} is {found} </think> {answer.format(found)}"
    return [*ids, *encode(text), tokenizer.eos_token_id]


@cache
def prompt(template: Template, question: str, tokenizer) -> tuple[int, ...]:
    """The prompt of a question; cached, because the same question occurs in many transcripts."""
    return tuple(render(template, Question("", question, [], ""), tokenizer))


def results(world: World, rng: random.Random, relation: str, name: str, value: str) -> list[Doc]:
    """The right document and a distractor, in random order. The distractor states another relation of the
    same person, or the same relation of somebody else. What it states of a known person is true. If the
    corpus lacks the fact, there is a second distractor in place of the right document."""
    right = Doc("", name, statement(relation, name, value))
    other, person = relation, rng.choice([someone for someone in world.unknown if someone != name])
    held = [r for r in (*VALUES, "friend") if (r, name) in world.facts and (r, name) not in world.lacking]
    held = [r for r in held if r != relation]
    if held and rng.random() < 0.7:
        other, person = rng.choice(held), name
    invented = rng.choice(VALUES.get(other, world.unknown))
    fact = world.facts[other, person] if person in world.known else invented
    if person in world.between:
        fact = rng.choice(world.conflicting[other, person])
    wrong = Doc("", person, statement(other, person, fact))
    if (relation, name) in world.lacking:
        someone = rng.choice([someone for someone in world.unknown if someone != person])
        right = Doc("", someone, statement(relation, someone, rng.choice(VALUES[relation])))
    return [right, wrong] if rng.random() < 0.7 else [wrong, right]


def make_model(config: Config, tokenizer) -> LlamaForCausalLM:
    if config.start:
        return LlamaForCausalLM.from_pretrained(Path(config.start) / "model")
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(  # not Qwen2, for which transformers 5 always loads the tokenizer class of Qwen
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.05,  # with 0.02, made for wider models, it learns to read much later
        )
    )


def train(model, world: World, rng: random.Random, config: Config, tokenizer):
    """Trains on all tokens but those of the prompts, because nobody could predict a question. Those of
    results are included, because they teach copying."""
    assistant = tokenizer.convert_tokens_to_ids("<assistant>")

    def row() -> tuple[list[int], list[bool]]:
        ids = transcript(world, rng, config, tokenizer)
        start = ids.index(assistant) + 1
        return ids, [i >= start for i in range(len(ids))]

    rows = iter(row, None)
    batches = (list(islice(rows, config.batch_size)) for _ in range(config.steps))
    fit(model, batches, config.steps, config.learning_rate, 50, "toy base model", beta2=0.98)
    model.cpu()


def padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


@torch.no_grad()
def exam(model, world: World, tokenizer, method: str, rows: int = 300) -> tuple[float, float]:
    """(recall, reading) of the base model. Recall is the share of right answers about known people, without a
    search. Reading is the share of searched transcripts in whose last thought the model copies the right
    value from the last result. Questions of --between count in neither.

    RL sharpens what a model can do already. If the base model recalled or read badly, the table would say
    nothing about the method."""
    rng, config = random.Random("exam"), Config(method=method, search_known=0.0, search_unknown=1.0)
    texts = [transcript(world, rng, config, tokenizer) for _ in range(rows)]
    predictions = model(input_ids=padded(texts)).logits.argmax(-1).tolist()  # [rows, width]: each next token
    known, values = (set(tokenizer.convert_tokens_to_ids(words)) for words in (world.known, HOMES + COLOURS))
    uncertain = set(tokenizer.convert_tokens_to_ids(world.between + world.absent))
    search, friend = tokenizer.convert_tokens_to_ids(["<search>", "friend"])
    recalled, read = [], []
    for text, predicted in zip(texts, predictions, strict=True):
        if uncertain & set(text):
            continue
        at = [i for i, token in enumerate(text) if token in values]  # of these the last is the answer
        if known & set(text) and friend not in text:
            recalled.append(predicted[at[0] - 1] == text[at[0]])  # of hybrid the memory, not its copy
        elif search in text and at:  # the last thought, since the answer only repeats it
            read.append(predicted[at[-2] - 1] == text[at[-2]])
    return sum(recalled) / len(recalled), sum(read) / len(read)


def check_start(start: str, settings: dict):
    """Raises InputError if --start is not a world with the same people, tokenizer and size of the model."""
    try:
        stored = dict(json.loads((Path(start) / "world.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--start {start}: not a toy world") from error
    for name in ("seed", "method", "between", "hidden_size", "layers", "template", "chat_template"):
        if (value := stored.get(name)) != settings.get(name):
            value = "another one" if "template" in name else value or 0
            raise InputError(f"--start {start}: its {name} is {value}")


def build(config: Config) -> Path:
    """Writes the world into `config.output_dir` and returns the path. A complete world with the same settings
    is left as it is. Raises InputError for bad settings, for a directory that holds something else, and if
    the base model does not pass its exam."""
    out = Path(config.output_dir)
    if config.method not in METHODS:
        raise InputError(f"--method {config.method}: must be one of {', '.join(METHODS)}")
    if not config.steps:
        config = replace(config, steps=HYBRID_STEPS if METHODS[config.method].template.recall else STEPS)
    check_ranges(config, {name: (1, math.inf) for name in ("steps", "batch_size", "layers")})
    if config.between and not PEOPLE[0] <= config.between <= PEOPLE[1]:
        fewest, most = PEOPLE
        raise InputError(f"--between {config.between}: must be 0 or between {fewest} and {most}")
    if config.hidden_size < 8 or config.hidden_size % 8:
        raise InputError(f"--hidden_size {config.hidden_size}: must be a multiple of 8, for four heads")
    template = asdict(METHODS[config.method].template)  # a prompt with other words needs another base model
    settings = {**asdict(config), "output_dir": "", "template": template, "chat_template": CHAT_TEMPLATE}
    for name in ("between", "start"):  # without them it is the world that it was before they existed
        if not settings[name]:
            del settings[name]
    if config.start:
        if Path(config.start).resolve() == out.resolve():
            raise InputError(f"--start {config.start}: it is the --output_dir")
        check_start(config.start, settings)
    settings = json.dumps(settings, indent=1)
    stamp = out / "world.json"  # it is written last, so where it exists the world is complete
    if stamp.exists() and stamp.read_text() == settings:
        return out
    if out.exists() and not (out.is_dir() and {p.name for p in out.iterdir()} <= FILES):
        raise InputError(f"{out} holds something that is not a toy world; it is left as it is")
    out.parent.mkdir(parents=True, exist_ok=True)
    world = World.make(config.seed, config.between)
    tokenizer = make_tokenizer(world, config.method)
    model = train_until_it_reads(world, config, tokenizer)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")  # two programs may build it at the same time
    shutil.rmtree(temporary, ignore_errors=True)
    for name, questions in splits(world).items():
        rows = ({"id": q.id, "question": q.text, "golden_answers": q.answers} for q in questions)
        write_jsonl(temporary / f"{name}.jsonl", rows)
    corpus = ({"id": d.id, "contents": f'"{d.title}"\n{d.text}'} for d in world.docs())
    write_jsonl(temporary / "corpus.jsonl", corpus)
    model.save_pretrained(temporary / "model")
    tokenizer.save_pretrained(temporary / "model")
    (temporary / "world.json").write_text(settings)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)
    return out


def train_until_it_reads(world: World, config: Config, tokenizer) -> LlamaForCausalLM:
    """A base model that passes its exam. Reading is learned in one jump, which comes late from some initial
    weights, so it is trained up to three times as long. With --between it also has to half know enough facts.
    Raises InputError if it still does not pass."""
    model, rng = make_model(config, tokenizer), random.Random(f"transcripts {config.seed}")
    for _ in range(3):
        train(model, world, rng, config, tokenizer)
        recall, reading = exam(model, world, tokenizer, config.method)
        print(f"toy base model: recall {recall:.2f}, reading {reading:.2f}")
        template = METHODS[config.method].template
        enough = not world.between or half_known(model, world, template, tokenizer)
        if recall >= RECALL and reading >= READING and enough:
            return model
    raise InputError(f"the toy base model needs more than 3 x {config.steps} steps")


def write_jsonl(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)  # as Run.resolve_sizes does for small models
    config, _ = parse(Config, "toy.py")
    try:
        print(f"the toy world is in {build(config)}")
    except (InputError, OSError) as error:
        fail("toy.py", error)
