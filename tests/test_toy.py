"""python -m pytest tests/test_toy.py

The tests are about the texts that the toy world's base models are trained on. A transcript has the form of
its dialect and is right by the reward of that dialect. A closed-book part has neither tool nor tags. Other
tests are about the exam of a base model and about `build`. No test trains a base model, because that takes
minutes.
"""

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import between
import toy
from data import Episode, InputError, Question, Segment
from prompts import COT, DIRECT, RAG, Template
from reward import METHODS, exact_match, parse_episode
from rollout import detokenize

WORLD = toy.World.make(0)
TOKENIZER = toy.make_tokenizer(WORLD)
DIALECTS = ["sem", "ssrl", "search-r1", "research"]
SHAPES = {  # dialect: the shapes of transcripts without a search, with one, and with two
    "sem": {"TA", "TASRTA", "TASRSRTA"},
    "ssrl": {"TA", "TSRTA", "TSRSRTA"},
    "search-r1": {"TA", "TSRTA", "TSRSRTA"},
    "research": {"TA", "TSRTA", "TSRSRTA"},
}


def transcripts(method: str, n: int = 400, **options) -> list[tuple[str, str]]:
    """(prompt, text) for each of `n` transcripts: what stands before and after <assistant>."""
    rng, config = random.Random(f"test {method}"), toy.Config(method=method, **options)
    rows = (detokenize(TOKENIZER, toy.transcript(WORLD, rng, config, TOKENIZER)) for _ in range(n))
    return [row.split(" <assistant> ") for row in rows]


def episode(text: str, method: str, question: Question) -> Episode:
    """An episode from a text, which is cut into segments as a rollout would cut it: a result belongs to the
    environment, unless the policy writes its results itself, and </answer> or <eos> ends the episode."""
    template = METHODS[method].template
    assert text.endswith(" <eos>")
    text = text.removesuffix(" <eos>")
    parts = [text]
    if not template.self_search:
        parts = re.split(rf"( <{template.result}> .*? </{template.result}>)", text)
    segments = [Segment("env" if i % 2 else "model", [], part) for i, part in enumerate(parts)]
    stop = "answer" if template.answer_ends else "eos"
    return Episode(question, [], segments=segments, searches=len(parts) // 2, stop=stop, template=template)


HOPS = "composed", "two_hop"  # kinds of question that take two searches


def gold(prompt: str, text: str) -> tuple[str | None, str]:
    """(right answer, kind of the question). Both are found in the text and in the world by other rules than
    those of toy.py. The answer is None if it follows neither from the text nor from the known facts."""
    words = re.search(r"what is (?:the )?(.*) \?", prompt)[1].split()
    facts = {}
    for relation, name, value in re.findall(r"(\w+) of (\w+) is (\w+) \.", text):
        facts.setdefault((relation, name), value)
    if "plus" in words:
        return str(int(words[0]) + int(words[2])), "arithmetic"
    if "friend" in words:
        value = facts.get((words[0], facts.get(("friend", words[-1]))))
        if words[-1] not in WORLD.known:
            return value, "two_hop"
        assert value in (None, WORLD.facts[words[0], WORLD.facts["friend", words[-1]]])
        return value, "composed"
    if words[-1] in WORLD.known:
        return WORLD.facts[words[0], words[-1]], "known"
    return facts.get((words[0], words[-1])), "unknown"


@pytest.mark.parametrize("method", DIALECTS)
def test_every_transcript_is_a_right_episode(method):
    """The reward reads the shape and the answer of a transcript, and pays what follows from these."""
    shapes, kinds, guesses = set(), set(), []
    for prompt, text in transcripts(method, closed_book=0.0):
        answer, kind = gold(prompt, text)
        question = Question("1", "", [answer or "nobody knows"], "toy")
        e = episode(text, method, question)
        p = parse_episode(e)
        searched = "S" in p.shape
        shapes.add(p.shape)
        kinds.add((kind, searched))
        assert p.shape.count("S") == searched * (2 if kind in HOPS else 1), text
        assert e.searches == (0 if method == "ssrl" else p.shape.count("S"))
        if answer is None:
            assert not searched and p.answer in toy.HOMES + toy.COLOURS
            continue
        assert exact_match(p.answer, question) == 1.0, text
        reward = METHODS[method].reward(e, question, group=[e])["reward"]
        if method == "sem":
            assert p.valid
            right = exact_match(p.first, question) == 1.0
            assert right or kind in ("unknown", *HOPS)  # what the model knows stands in the draft
            guesses += [right] * (kind in ("unknown", *HOPS))
            assert reward == (not right if searched else right)
        elif method == "ssrl":
            form = 0.5 if not searched else 2 / 3 if kind in HOPS else 1.0
            assert reward == pytest.approx(0.9 + 0.1 * form)
        else:
            assert reward == 1.0
    assert shapes == SHAPES[method]
    assert kinds == {(k, s) for k in ("known", "unknown", *HOPS, "arithmetic") for s in (True, False)}
    if guesses:  # the other drafts are guesses, of which one in twelve is right
        assert 0 < sum(guesses) / len(guesses) < 0.25


@pytest.mark.parametrize("method", DIALECTS)
def test_how_often_a_base_model_searches(method):
    rows = [(gold(*row)[1], "<search>" in row[1]) for row in transcripts(method, 1500, closed_book=0.0)]
    for kinds, share in ((("known", "composed", "arithmetic"), 0.6), (("unknown", "two_hop"), 0.85)):
        searches = [searched for kind, searched in rows if kind in kinds]
        assert sum(searches) / len(searches) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("method", DIALECTS)
def test_closed_book_transcripts_hold_no_tag(method):
    for prompt, text in transcripts(method, 100, closed_book=1.0):
        assert re.fullmatch(r"<user> what is [\w ]+ \?", prompt) and re.fullmatch(r"\w+ <eos>", text)
        answer, kind = gold(prompt, text)
        if kind in ("known", "arithmetic"):
            assert text == f"{answer} <eos>"
    rows = transcripts(method, 1000)
    assert sum("<tool>" not in prompt for prompt, _ in rows) == pytest.approx(100, abs=35)
    assert all(("<tool>" in prompt) == ("<think>" in text) for prompt, text in rows)


def test_no_two_questions_of_a_file_have_the_same_id():
    """evaluate.py refuses a file with such questions."""
    for rows in toy.splits(WORLD).values():
        assert len({q.id for q in rows}) == len(rows)


def test_friends_are_in_one_split():
    """The people of each split are a ring of friends. So a question with two hops about a test person never
    ends at a person that RL trains on."""
    known, unknown = (WORLD.known, toy.KNOWN_TRAIN), (WORLD.unknown, toy.UNKNOWN_TRAIN)
    for split in (part for names, cut in (known, unknown) for part in (names[:cut], names[cut:])):
        ring = [split[0]]
        while len(ring) < len(split):
            ring.append(WORLD.facts["friend", ring[-1]])
        assert set(ring) == set(split) and WORLD.facts["friend", ring[-1]] == ring[0]


@pytest.mark.parametrize("template", [*(METHODS[m].template for m in METHODS), DIRECT, COT, RAG])
def test_every_tag_is_one_token(template: Template):
    tokenizer = toy.make_tokenizer(WORLD, "hybrid") if template.recall else TOKENIZER
    for tag in template.tags:
        for text in (f"<{tag}>", f"</{tag}>"):
            [i] = tokenizer(text, add_special_tokens=False).input_ids
            assert i != tokenizer.unk_token_id and detokenize(tokenizer, [i]) == text


def test_no_word_of_the_world_is_unknown():
    """Every word of a transcript is in the vocabulary."""
    for method in DIALECTS:
        assert not any("<unk>" in text or "<unk>" in prompt for prompt, text in transcripts(method, 200))
    assert "<unk>" not in detokenize(TOKENIZER, TOKENIZER("\\boxed{ oslo }").input_ids)


def test_a_result_states_no_fact_twice():
    """A result with two values of one fact would teach the base model nothing."""
    rng = random.Random(0)
    for name in WORLD.unknown * 20:
        docs = toy.results(WORLD, rng, "home", name, "oslo")
        facts = [doc.text.rpartition(" is ")[0] for doc in docs]
        assert len(facts) == len(set(facts)) == 2 and f"home of {name} is oslo ." in [
            doc.text for doc in docs
        ]


@pytest.mark.parametrize(
    "change",
    [{"method": "semm"}, {"steps": -1}, {"batch_size": 0}, {"layers": 0}, {"hidden_size": 97}],
)
def test_bad_settings_build_no_world(tmp_path, change):
    [(name, value)] = change.items()
    with pytest.raises(InputError, match=f"--{name} {value}: must be"):
        toy.build(toy.Config(output_dir=str(tmp_path / "world"), **change))
    assert not list(tmp_path.iterdir())


def test_what_is_no_toy_world_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(toy, "train", lambda *args: pytest.fail("trained"))
    (tmp_path / "out").mkdir()
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_text("a night's work")
    (tmp_path / "out" / "world.json").write_text("{}")  # even with this file it is no toy world
    for place in (tmp_path / "out", weights):
        with pytest.raises(InputError, match="holds something that is not a toy world; it is left as it is"):
            toy.build(toy.Config(output_dir=str(place)))
    assert weights.read_text() == "a night's work" and list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("method", DIALECTS)
@pytest.mark.parametrize("wrong, expected", [([], (1, 1)), ([-1], (0, 1)), ([-2], (1, 0))])
def test_exam_checks_the_answer_and_the_thought_after_a_result(method, wrong, expected):
    """The answer after that thought is not checked, because it only repeats the thought. The stand-in for the
    model predicts every next token right, except for those values (homes and colours) of a text whose indices
    are in `wrong`."""
    values = set(TOKENIZER.convert_tokens_to_ids(toy.HOMES + toy.COLOURS))

    def model(input_ids):
        predicted = input_ids.roll(-1, 1)
        for row in predicted:
            named = [i for i, token in enumerate(row.tolist()) if token in values]
            for i in wrong:
                row[named[i] if len(named) >= -i else 0] = toy.PAD
        return SimpleNamespace(logits=torch.nn.functional.one_hot(predicted, len(TOKENIZER)))

    assert toy.exam(model, WORLD, TOKENIZER, method) == expected


@pytest.mark.parametrize("readings, rounds", [([0.9], 1), ([0.1, 0.9], 2), ([0.1, 0.1, 0.1], 3)])
def test_a_base_model_that_cannot_read_is_trained_further(monkeypatch, tmp_path, capsys, readings, rounds):
    trained, marks = [], iter(readings)
    monkeypatch.setattr(toy, "train", lambda model, *args: trained.append(model))
    monkeypatch.setattr(toy, "exam", lambda *args: (1.0, next(marks)))
    config = toy.Config(output_dir=str(tmp_path / "world"))
    if readings[-1] < toy.READING:
        with pytest.raises(InputError, match="more than 3 x 700 steps"):
            toy.build(config)
        assert not list(tmp_path.iterdir())
    else:
        assert (toy.build(config) / "world.json").exists()
    assert len(trained) == rounds and len(set(map(id, trained))) == 1


def test_a_base_model_is_trained_on_what_follows_the_prompt(monkeypatch):
    batches = []
    monkeypatch.setattr(toy, "fit", lambda model, rows, *args, **options: batches.extend(rows))
    config = toy.Config(steps=3, batch_size=20)
    model = SimpleNamespace(cpu=lambda: None)
    toy.train(model, WORLD, random.Random(0), config, TOKENIZER)
    assert [len(rows) for rows in batches] == [20] * 3
    for ids, mask in (row for rows in batches for row in rows):
        at = mask.index(True)
        assert TOKENIZER.decode(ids[at - 1]) == "<assistant>" and all(mask[at:]) and len(mask) == len(ids)


def test_a_world_that_starts_from_another_trains_its_model_further(monkeypatch, tmp_path):
    trained = []  # the embeddings of each model, before it is trained

    @torch.no_grad()
    def train(model, *args):
        trained.append(model.get_input_embeddings().weight.clone())
        model.get_input_embeddings().weight.add_(1)

    monkeypatch.setattr(toy, "train", train)
    monkeypatch.setattr(toy, "exam", lambda *args: (1.0, 1.0))
    first = toy.Config(output_dir=str(tmp_path / "a"), hidden_size=16)
    second = replace(first, output_dir=str(tmp_path / "b"), start=str(toy.build(first)), search_known=0.95)
    toy.build(second)
    assert torch.equal(trained[1], trained[0] + 1)
    assert "start" not in (tmp_path / "a" / "world.json").read_text()
    for i, content in enumerate(("[1]", "{", '"a"')):
        (tmp_path / f"damaged{i}").mkdir()
        (tmp_path / f"damaged{i}" / "world.json").write_text(content)
    for change, reason in (
        ({"seed": 1}, "its seed is 0"),
        ({"between": 96}, "its between is 0"),
        ({"layers": 2}, "its layers is 3"),
        ({"method": "search-r1"}, "its method is sem"),
        ({"start": str(tmp_path / "c")}, "it is the --output_dir"),
        *(
            ({"start": str(tmp_path / name)}, "not a toy world")
            for name in ("damaged0", "damaged1", "damaged2", "d")
        ),
    ):
        with pytest.raises(InputError, match=reason):
            toy.build(replace(second, output_dir=str(tmp_path / "c"), **change))
    assert len(trained) == 2 and not (tmp_path / "c").exists()


# ------------------------------------------------------------------------------------------------------------
# --between

MIXED = toy.World.make(0, between=96)
MIXED_TOKENIZER = toy.make_tokenizer(MIXED)


def test_the_world_without_such_questions_is_the_one_before_there_were_any():
    """The names, facts, documents, questions, tokens and transcripts of the default world, as one digest. It
    was computed with toy.py of commit a693908. Whoever changes that world on purpose has to change it. (Since
    then the ids of one file have got a suffix.)"""
    sets = {
        name: [[q.id.removesuffix("-two"), q.text, q.answers, q.source, q.choices] for q in rows]
        for name, rows in toy.splits(WORLD).items()
    }
    rows = [
        WORLD.known,
        WORLD.unknown,
        sorted(map(str, WORLD.facts.items())),
        list(map(str, WORLD.docs())),
        sets,
    ]
    rows.append(sorted(TOKENIZER.get_vocab().items()))
    for method in ("sem", "research"):
        rng, config = random.Random(f"transcripts {method}"), toy.Config(method=method)
        rows.append([toy.transcript(WORLD, rng, config, TOKENIZER) for _ in range(200)])
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "a0da08615c4c53662663e89759093ae0b0c457d2c4281f8114291f49f4bd0953"


def test_the_stamp_of_the_default_world_does_not_name_the_flag(monkeypatch, tmp_path):
    """So a world that was built before is not built again."""
    monkeypatch.setattr(toy, "train", lambda *args: None)
    monkeypatch.setattr(toy, "exam", lambda *args: (1.0, 1.0))
    monkeypatch.setattr(toy, "half_known", lambda *args: True)
    stamps = {}
    for people in (0, 96):
        out = toy.build(toy.Config(output_dir=str(tmp_path / str(people)), between=people))
        stamps[people] = json.loads((out / "world.json").read_text())
        assert (
            (out / "train" / "between.jsonl").exists()
            == (out / "test" / "absent.jsonl").exists()
            == (people > 0)
        )
    assert "between" not in stamps[0] and stamps[96] == stamps[0] | {"between": 96}


def test_the_rest_of_the_world_is_the_same():
    assert MIXED.known == WORLD.known and MIXED.unknown == WORLD.unknown
    assert list(MIXED.facts.items())[: len(WORLD.facts)] == list(WORLD.facts.items())
    assert MIXED.docs()[: len(WORLD.docs())] == WORLD.docs()
    people = MIXED.known + MIXED.unknown + MIXED.between + MIXED.absent
    assert len(people) == len(set(people)) == 192 + 96 + 48
    for name in people:
        [i] = MIXED_TOKENIZER(name, add_special_tokens=False).input_ids
        assert i != MIXED_TOKENIZER.unk_token_id


def test_the_corpus_lacks_some_of_the_answers():
    """It has no fact about absent people, and lacks 35 % of those about people of `between`. What it has is
    true, and the other value of a half-known fact is another one."""
    texts = {doc.text for doc in MIXED.docs()}
    assert len(texts) == len(MIXED.docs()) == len({doc.id for doc in MIXED.docs()})
    missing = Counter()
    for (relation, name), (value, other) in MIXED.conflicting.items():
        assert value == MIXED.facts[relation, name] != other and other in toy.VALUES[relation]
        held = toy.statement(relation, name, value) in texts
        assert held == ((relation, name) not in MIXED.lacking)
        missing[name in MIXED.absent] += not held
    assert missing[True] == 2 * len(MIXED.absent) and missing[False] == round(0.35 * 192)
    assert not any(f" {name} " in text for name in MIXED.absent for text in texts)


def mixed_transcripts(n: int, **options):
    """(relation, name, text after the prompt) of transcripts about people of `between` and `absent`."""
    rng, config = random.Random("mixed"), toy.Config(between=96, **options)
    for _ in range(n):
        text = detokenize(MIXED_TOKENIZER, toy.transcript(MIXED, rng, config, MIXED_TOKENIZER))
        found = re.match(r".*what is the (\w+) of (\w+) \? <assistant> (.*)", text)
        if found and found[2] in MIXED.between + MIXED.absent:
            yield found[1], found[2], found[3]


def test_transcripts_state_both_values_of_a_half_known_fact_equally_often():
    """Drafts, and the results of searches. The answer after a result is the value that it states; if the
    corpus lacks the fact, no result states it, and the answer is a guess."""
    true, guesses = Counter(), []
    for relation, name, text in mixed_transcripts(6000, closed_book=0.0, search_known=1.0):
        draft = re.search(r"</think> <answer> (\w+) </answer>", text)[1]
        stated = re.findall(rf"{relation} of {name} is (\w+) \.", text)
        if name in MIXED.absent:
            assert not re.search(rf"of {name} is \w+ \.", text)
            continue
        assert draft in MIXED.conflicting[relation, name]
        true["drafts"] += 1
        true["right drafts"] += draft == MIXED.facts[relation, name]
        for other, value in re.findall(rf"(\w+) of {name} is (\w+) \.", text):  # a distractor, too
            assert value in MIXED.conflicting[other, name] and (other, name) not in MIXED.lacking
        last = re.findall(r"<answer> (\w+) </answer>", text)[-1]
        if (relation, name) in MIXED.lacking:
            assert not stated
            guesses.append(last in MIXED.conflicting[relation, name])
        else:
            assert stated == [last]
            true["results"] += 1
            true["right results"] += last == MIXED.facts[relation, name]
    assert true["right drafts"] / true["drafts"] == pytest.approx(0.5, abs=0.06)
    assert true["right results"] / true["results"] == pytest.approx(0.5, abs=0.06)
    assert sum(guesses) / len(guesses) == pytest.approx(2 / 12, abs=0.08)


def test_closed_book_transcripts_state_both_values(n=4000):
    rows = list(mixed_transcripts(n, closed_book=1.0))
    right = [
        text == f"{MIXED.facts[relation, name]} <eos>"
        for relation, name, text in rows
        if name in MIXED.between
    ]
    assert sum(right) / len(right) == pytest.approx(0.5, abs=0.06)
    assert len({name for _, name, _ in rows}) > 130  # of 144


def stand_in(rates: dict[tuple[str, str], tuple[float, float]]):
    """A model that gives the true value of a fact with the first probability closed-book and with the second
    one in a draft, and the other value else."""
    texts = {}

    def model(input_ids):
        text = detokenize(MIXED_TOKENIZER, input_ids[0].tolist())
        relation, name = re.search(r"what is the (\w+) of (\w+) \?", text).groups()
        texts[text] = draft = text.endswith("<answer>") or text.endswith("{")
        p = rates.get((relation, name), (0.0, 0.0))[draft]
        logits = torch.full((1, input_ids.shape[1], len(MIXED_TOKENIZER)), -1e9)
        for value, share in zip(MIXED.conflicting[relation, name], (p, 1 - p), strict=True):
            logits[0, -1, MIXED_TOKENIZER.convert_tokens_to_ids(value)] = (
                torch.tensor(share).clamp(1e-9).log()
            )
        return SimpleNamespace(logits=logits)

    return model, texts


@pytest.mark.parametrize("method", DIALECTS)
def test_half_known_facts_are_those_with_both_rates_in_the_middle(monkeypatch, method):
    facts = [("home", name) for name in MIXED.between[:8]] + [("home", MIXED.absent[0])]
    pairs = [
        (0.5, 0.5),
        (0.26, 0.74),
        (0.24, 0.5),
        (0.5, 0.24),
        (0.76, 0.5),
        (0.5, 0.76),
        (1.0, 1.0),
        (0.0, 0.0),
    ]
    model, texts = stand_in(dict(zip(facts, [*pairs, (0.5, 0.5)], strict=True)))
    monkeypatch.setattr(MIXED, "half_known", {"from an earlier round"})
    template = METHODS[method].template
    assert not between.half_known(model, MIXED, template, MIXED_TOKENIZER)  # two are not enough
    assert MIXED.half_known == set(facts[:2])
    drafts = [text for text, draft in texts.items() if draft]
    assert len(drafts) == 4 and all("<tool>" in text for text in drafts)
    assert all(text.endswith("\\boxed{") == template.boxed for text in drafts)
    assert not any("<tool>" in text for text, draft in texts.items() if not draft)


@pytest.mark.parametrize("train, held_out, enough", [(32, 16, True), (31, 16, False), (32, 15, False)])
def test_a_world_needs_32_half_known_questions_to_train_on_and_16_held_out(
    monkeypatch, train, held_out, enough
):
    facts = [("home", name) for name in MIXED.between[:train]]
    facts += [("colour", name) for name in MIXED.between[64 : 64 + held_out]]
    monkeypatch.setattr(MIXED, "half_known", set())
    model, _ = stand_in(dict.fromkeys(facts, (0.5, 0.5)))
    assert between.half_known(model, MIXED, METHODS["sem"].template, MIXED_TOKENIZER) == enough
    sets = toy.splits(MIXED)
    assert [len(sets[f"{split}/between"]) for split in ("train", "test")] == [train, held_out]
    assert [q.answers for q in sets["test/between"]] == [[MIXED.facts[fact]] for fact in facts[train:]]


def test_no_held_out_question_is_about_somebody_that_is_trained_on(monkeypatch):
    monkeypatch.setattr(MIXED, "half_known", set(MIXED.conflicting))
    sets, names = toy.splits(MIXED), {}
    for name in ("train/between", "test/between", "train/absent", "test/absent"):
        names[name] = {q.text.split()[-2] for q in sets[name]}
        assert len(sets[name]) == 2 * len(names[name])
        assert {q.source for q in sets[name]} == {name.partition("/")[2]}
    assert {name: len(people) for name, people in names.items()} == {
        "train/between": 64, "test/between": 32, "train/absent": 32, "test/absent": 16,
    }  # fmt: skip
    assert len(set.union(*names.values())) == 64 + 32 + 32 + 16
    assert {name: rows for name, rows in sets.items() if name in toy.splits(WORLD)} == toy.splits(WORLD)


def test_the_exam_does_not_count_questions_in_between():
    """The stand-in for the model is wrong about everybody of `between` and `absent`, and right else."""
    uncertain = set(MIXED_TOKENIZER.convert_tokens_to_ids(MIXED.between + MIXED.absent))

    def model(input_ids):
        predicted = input_ids.roll(-1, 1)
        for row, text in zip(predicted, input_ids.tolist(), strict=True):
            if uncertain & set(text):
                row[:] = toy.PAD
        return SimpleNamespace(logits=torch.nn.functional.one_hot(predicted, len(MIXED_TOKENIZER)))

    assert toy.exam(model, MIXED, MIXED_TOKENIZER, "sem") == (1, 1)


def test_a_base_model_that_half_knows_too_little_is_trained_further(monkeypatch, tmp_path):
    trained, enough = [], iter([False, True])
    monkeypatch.setattr(toy, "train", lambda model, *args: trained.append(model))
    monkeypatch.setattr(toy, "exam", lambda *args: (1.0, 1.0))
    monkeypatch.setattr(toy, "half_known", lambda *args: next(enough))
    toy.build(toy.Config(output_dir=str(tmp_path / "world"), between=96))
    assert len(trained) == 2


@pytest.mark.parametrize("people", [-1, 1, 47, 177])
def test_too_few_or_too_many_people_are_refused(monkeypatch, tmp_path, people):
    monkeypatch.setattr(toy, "train", lambda *args: pytest.fail("trained"))
    with pytest.raises(InputError, match=f"--between {people}: must be 0 or between 48 and 176"):
        toy.build(toy.Config(output_dir=str(tmp_path / "world"), between=people))
    assert len(toy.World.make(1, between=176).between) == 176
