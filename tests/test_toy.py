"""python -m pytest tests/test_toy.py

The tests are about the texts that the toy world's base models are trained on. A transcript has the form of
its dialect and is right by the reward of that dialect. A closed-book part has neither tool nor tags. Other
tests are about the exam of a base model and about `build`. No test trains a base model, because that takes
minutes.
"""

import random
import re
from types import SimpleNamespace

import pytest
import torch

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
    for tag in template.tags:
        for text in (f"<{tag}>", f"</{tag}>"):
            [i] = TOKENIZER(text, add_special_tokens=False).input_ids
            assert i != TOKENIZER.unk_token_id and detokenize(TOKENIZER, [i]) == text


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
    [{"method": "semm"}, {"steps": 0}, {"batch_size": 0}, {"layers": 0}, {"hidden_size": 97}],
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
        with pytest.raises(InputError, match="more than 3 x 800 steps"):
            toy.build(config)
        assert not list(tmp_path.iterdir())
    else:
        assert (toy.build(config) / "world.json").exists()
    assert len(trained) == rounds and len(set(map(id, trained))) == 1
