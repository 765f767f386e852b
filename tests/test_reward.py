"""python -m pytest tests/test_reward.py          (SEM_DATA=FOLDER: also on real answers)

Every case of SEM's reward stands in a table. Further tests are about the structure of an episode, arbitrary
text, and tricks that must not pay. Answer matching is compared with the official rules, which are written
here a second time. The rewards of all methods are compared with their published rules, and every entry of
REWARDS must be finite and a pure function.
"""

import copy
import json
import math
import os
import re
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import boundary
import prompts
import reward
from data import Episode, InputError, Question, Segment, load, number
from prompts import RESEARCH, SEARCH_R1, SEM, SSRL, Template
from reward import METHODS, REWARDS, Reward, exact_match, f1, letter, normalise, parse_episode, sem

REAL = Path(os.environ.get("SEM_DATA", "/nowhere"))
GOLD = Question("1", "Who found radium?", ["Marie Curie"], "people")

T = "<think>hm</think>"
S = "<search>radium</search>"
R = "\n<result>\nRadium: found in 1898\n</result>\n"
ANSWERS = {  # in the order of their F1: 1, 2/3, 1/2, 4/9, 0
    "right": "Marie Curie",
    "half": "Curie",
    "tie": "Marie Rose",
    "part": "Marie Curie or Rose or Niels Bohr",
    "wrong": "Niels Bohr",
}
WORDS = {"T": T, "S": S, "blank": "<answer> \n</answer>"} | {
    name: f"<answer>{text}</answer>" for name, text in ANSWERS.items()
}


def episode(*texts, stop="eos", question=GOLD):
    """An episode of SEM from the texts of the policy and of the environment in turn. The policy begins."""
    segments = [Segment("env" if i % 2 else "model", [], text) for i, text in enumerate(texts)]
    return Episode(question, [], segments=segments, searches=len(texts) // 2, stop=stop, template=SEM)


def written(line, stop="eos"):
    """An episode from a line such as "T wrong S R right". Words of WORDS stand for its texts and R stands for
    a result of the environment. All other words are taken as they are."""
    texts = [" ".join(WORDS.get(word, word) for word in part.split(" ")) for part in line.split(" R")]
    return episode(*[text for part in texts for text in (part, R)][:-1], stop=stop)


# ------------------------------------------------------------------------------------------------------------
# every case of SEM

# The column cost holds the reward with search_cost=0.1, a1 and a2 hold the F1 of the first and of the last
# answer, and the column final names the final answer.
CASES = """
episode                             stop           reward  cost  f s t u  a1   a2   final
-- a right draft, no search
T right                             eos            1       1     1 0 1 0  1    0    right
T half                              eos            2/3     2/3   1 0 1 0  2/3  0    half
T tie                               eos            1/2     1/2   1 0 1 0  1/2  0    tie
-- a right draft, then a search
T right S R right                   eos            0       9/10  1 1 0 1  1    1    right
T right S R T right                 eos            0       9/10  1 1 0 1  1    1    right
T right S R T S R half              eos            0       6/10  1 1 0 1  1    2/3  half
T tie S R half                      eos            0       6/10  1 1 0 1  1/2  2/3  half
T right S R wrong                   eos            0       0     1 1 0 1  1    0    wrong
-- a wrong draft, no search
T wrong                             eos            0       0     1 0 1 0  0    0    wrong
T part                              eos            0       0     1 0 1 0  4/9  0    part
-- a wrong draft, then a search
T wrong S R right                   eos            1       1     1 1 0 1  0    1    right
T wrong S R T right                 eos            1       1     1 1 0 1  0    1    right
T part S R half                     eos            2/3     2/3   1 1 0 1  4/9  2/3  half
T wrong S R part                    eos            4/9     4/9   1 1 0 1  0    4/9  part
T wrong S R wrong                   eos            0       0     1 1 0 1  0    0    wrong
T wrong S R S R right               eos            1       1     1 1 0 1  0    1    right
T wrong S R T S R T right           eos            1       1     1 1 0 1  0    1    right
T wrong S R S R T S R half          eos            2/3     2/3   1 1 0 1  0    2/3  half
-- a search without a result, a result without an answer
T wrong S                           turns          0       0     0 1 1 0  0    0    -
T right S                           turns          0       0     0 1 1 0  1    0    -
T right S                           search_failed  0       0     0 1 1 0  1    0    -
T right S right                     eos            0       0     0 1 0 0  1    0    -
T wrong S S R right                 eos            0       0     0 1 0 0  0    1    right
T wrong S R                         length         0       0     0 1 1 1  0    0    -
T wrong S R T                       eos            0       0     0 1 0 1  0    0    -
T wrong S R right S                 turns          0       0     0 1 0 0  0    1    right
T wrong S R right S right           eos            0       0     0 1 0 0  0    1    right
T wrong R right                     eos            0       0     0 1 0 0  0    1    right
T wrong R S right                   eos            0       0     0 1 0 0  0    1    right
T S right                           eos            0       0     0 1 1 0  0    0    -
-- too many answers
T right right                       eos            0       0     0 0 0 0  1    0    right
T wrong right                       eos            0       0     0 0 0 0  0    0    wrong
T wrong S R right half              eos            0       0     0 1 0 1  0    2/3  half
T wrong S R right S R half          eos            0       0     0 1 0 1  0    2/3  half
T wrong S R right S R               eos            0       0     0 1 0 1  0    0    -
-- wrong order, something missing
right                               eos            0       0     0 0 0 0  1    0    right
right T                             eos            0       0     0 0 1 0  1    0    right
T T right                           eos            0       0     0 0 0 0  1    0    right
T right T                           eos            0       0     0 0 0 0  1    0    right
T                                   eos            0       0     0 0 0 0  0    0    -
T S R right                         eos            0       0     0 1 1 1  0    1    right
S R T right                         eos            0       0     0 1 1 1  0    1    right
right S R right                     eos            0       0     0 1 0 1  1    1    right
T wrong T S R right                 eos            0       0     0 1 0 1  0    1    right
T wrong S R T T right               eos            0       0     0 1 0 1  0    1    right
T wrong S R right T                 eos            0       0     0 1 0 1  0    1    right
-- text outside the tags
so T right                          eos            0       0     0 0 1 0  1    0    right
T so right                          eos            0       0     0 0 1 0  1    0    right
T right so                          eos            0       0     0 0 1 0  1    0    right
T wrong so S R right                eos            0       0     0 1 0 1  0    1    right
T wrong S R so right                eos            0       0     0 1 0 1  0    1    right
T wrong S R right so                eos            0       0     0 1 0 1  0    1    right
<Think>hm</Think> right             eos            0       0     0 0 0 0  1    0    right
T < answer>Curie</answer>           eos            0       0     0 0 0 0  0    0    -
-- empty blocks
<think></think> right               eos            0       0     0 0 0 0  1    0    right
T <answer></answer>                 eos            0       0     0 0 0 0  0    0    -
T blank                             eos            0       0     0 0 0 0  0    0    -
T blank right                       eos            0       0     0 0 1 0  1    0    right
T wrong <search></search>           bad_query      0       0     0 0 1 0  0    0    wrong
T wrong S R <think></think> right   eos            0       0     0 1 0 1  0    1    right
T wrong S R blank                   eos            0       0     0 1 1 1  0    0    -
-- nested, unclosed, unopened
<think>hm right </think>            eos            0       0     0 0 0 0  1    0    right
T <answer> right </answer>          eos            0       0     0 0 1 0  1    0    right
T wrong <search>a T b</search> R right  eos        0       0     0 1 0 0  0    1    right
T <search>a<think>b</search> R right    eos        0       0     0 1 1 0  0    1    right
T right <search>a<think>b</search> R wrong  eos    0       0     0 1 0 0  1    0    wrong
<think>hm right                     eos            0       0     0 0 0 0  1    0    right
T <answer>Marie                     eos            0       0     0 0 0 0  0    0    -
T right <search>radium              eos            0       0     0 0 1 0  1    0    right
hm</think> right                    eos            0       0     0 0 0 0  1    0    right
T Marie</answer>                    eos            0       0     0 0 0 0  0    0    -
T right radium</search>             bad_query      0       0     0 0 1 0  1    0    right
<think>hm</answer> right            eos            0       0     0 0 0 0  1    0    right
-- a result that the policy wrote
T wrong <result>Curie</result> right    eos        0       0     0 0 0 0  0    0    wrong
T wrong S <result>Curie</result> right  eos        0       0     0 1 0 0  0    0    -
T wrong S R <result>x</result> right    eos        0       0     0 1 0 1  0    1    right
T right </result>                   eos            0       0     0 0 1 0  1    0    right
<think><result>x</result></think> right  eos       0       0     0 0 0 0  1    0    right
T <answer>Curie <result></answer>   eos            0       0     0 0 0 0  0    0    -
-- cut off
T right                             length         0       0     0 0 1 0  1    0    right
T right                             search_failed  0       0     0 0 1 0  1    0    right
T wrong S R right                   length         0       0     0 1 0 1  0    1    right
T wrong S R right                   turns          0       0     0 1 0 1  0    1    right
T right S R right                   length         0       0     0 1 0 1  1    1    right
"""
ROWS = [re.split(r"\s{2,}", row) for row in CASES.split("\n")[2:] if row and not row.startswith("--")]


@pytest.mark.parametrize(
    "line, stop, paid, with_cost, flags, a1, a2, final", ROWS, ids=[" ".join(r[:2]) for r in ROWS]
)
def test_case(line, stop, paid, with_cost, flags, a1, a2, final):
    e = written(line, stop)
    parts = dict(zip("fstu", map(float, flags.split()), strict=True))
    parts |= {name: pytest.approx(float(Fraction(x))) for name, x in (("f1_a1", a1), ("f1_a2", a2))}
    assert sem(e, GOLD) == parts | {"reward": pytest.approx(float(Fraction(paid)))}
    assert sem(e, GOLD, search_cost=None) == sem(e, GOLD)
    assert sem(e, GOLD, search_cost=0.1) == parts | {"reward": pytest.approx(float(Fraction(with_cost)))}
    assert parse_episode(e).answer == ANSWERS.get(final)


def test_search_cost_changes_only_a_search_after_a_right_draft():
    differ = [row[0] for row in ROWS if row[2] != row[3]]
    searched = [row for row in ROWS if row[4] == "1 1 0 1" and Fraction(row[5]) >= 0.5]
    assert differ == [row[0] for row in searched if row[6] != "0"] != []
    assert sem(written("T right S R half"), GOLD, search_cost=0.0)["reward"] == pytest.approx(2 / 3)
    assert sem(written("T right S R half"), GOLD, search_cost=1.0)["reward"] == 0


@pytest.mark.parametrize(
    "tau, good, bad",
    [
        (0.0, "right tie part wrong", ""),
        (4 / 9, "right half tie part", "wrong"),
        (0.5, "right half tie", "part wrong"),
        (0.51, "right half", "tie part wrong"),
        (2 / 3, "right half", "tie part wrong"),
        (1.0, "right", "half tie part wrong"),
    ],
)
def test_tau(tau, good, bad):
    for draft in good.split():
        parts = sem(written(f"T {draft}"), GOLD, tau=tau)
        assert parts["reward"] == parts["f1_a1"] == f1(ANSWERS[draft], GOLD)
        assert sem(written(f"T {draft} S R right"), GOLD, tau=tau)["reward"] == 0
        assert sem(written(f"T {draft} S R right"), GOLD, tau=tau, search_cost=0.1)["reward"] == 0.9
    for draft in bad.split():
        assert sem(written(f"T {draft}"), GOLD, tau=tau)["reward"] == 0
        searched = written(f"T {draft} S R half")
        assert sem(searched, GOLD, tau=tau)["reward"] == f1(ANSWERS["half"], GOLD)
        assert sem(searched, GOLD, tau=tau, search_cost=0.1)["reward"] == f1(ANSWERS["half"], GOLD)


def test_table_of_the_docstring():
    """The table in the docstring of reward.py is true, row by row, for every draft and every final answer."""
    _, after = reward.__doc__.split("first answer        searched    reward\n")
    rows = [re.split(r"\s{2,}", row.strip()) for row in after.split("\n\n")[0].splitlines()]
    *cases, (broken, nothing) = rows
    assert broken == "broken structure" and nothing == "0"
    seen = set()
    for draft, searched, paid in cases:
        seen.add((draft, searched))
        names = {"F1(a1) >= tau": ("right", "half", "tie"), "F1(a1) < tau": ("part", "wrong")}[draft]
        for name in names:
            for final in ANSWERS if searched == "yes" else [""]:
                line = f"T {name} S R T {final}" if final else f"T {name}"
                value = {"F1(a1)": f1(ANSWERS[name], GOLD), "F1(a2)": f1(ANSWERS.get(final), GOLD), "0": 0}
                assert sem(written(line), GOLD)["reward"] == value[paid.split(":")[0]]
                assert sem(written(f"{line} so"), GOLD)["reward"] == 0
    assert len(cases) == len(seen) == 4


# ------------------------------------------------------------------------------------------------------------
# structure

TAGS = [f"<{slash}{tag}>" for tag in ("think", "answer", "search", "result") for slash in ("", "/")]
NEAR_TAGS = ["<", ">", "</", "<think", "< answer>", "<answer/>", "<RESULT>", "<|im_end|>", "</answer"]
NEAR_TAGS += ["search>"]
texts_and_tags = st.sampled_from([*TAGS, *NEAR_TAGS, *WORDS.values(), "\n"]) | st.text(max_size=8)
any_text = st.lists(texts_and_tags).map("".join)


@settings(max_examples=100, deadline=None)
@given(any_text)
@example("</result></search></think><answer>Marie Curie</answer><|im_end|>")
@example("<answer>Niels Bohr</answer>")
@example("")
def test_retrieved_text_is_never_parsed(foreign):
    for line in ("T wrong S R right", "T wrong S R T S R half", "T right S R right", "T wrong S R T"):
        plain, e = written(line), written(line)
        for segment in e.segments[1::2]:
            segment.text = foreign
        assert parse_episode(e) == parse_episode(plain)
        assert sem(e, GOLD) == sem(plain, GOLD)


OVERHANGS = [".", "\n", "<", "></", ">\n\n", " .", "\ufffd", "?"]


@pytest.mark.parametrize("overhang", OVERHANGS)
def test_overhang_after_a_search_tag(overhang):
    """The token that ends a tag may hold more text. Before a result this is no mistake; elsewhere it is
    one."""
    draft, blank = T + WORDS["wrong"], not overhang.strip()
    answered = [
        episode(draft + S + overhang, R, WORDS["right"]),
        episode(draft + S + overhang, R, S + overhang, R, WORDS["right"]),
    ]
    assert [sem(e, GOLD)["reward"] for e in answered] == [1, 1]
    elsewhere = [
        episode(draft + overhang + S, R, WORDS["right"]),
        episode(draft + S, R, overhang + WORDS["right"]),
        episode(draft + S, R, WORDS["right"] + overhang),
        episode(overhang + draft + S, R, WORDS["right"]),
    ]
    assert [sem(e, GOLD)["reward"] for e in elsewhere] == [float(blank)] * 4
    assert sem(episode(T + WORDS["right"] + overhang), GOLD)["reward"] == float(blank)
    assert parse_episode(episode(draft + S + overhang, stop="turns")).shape == ("TAS" if blank else "TAS!")


def test_a_tag_does_not_reach_across_a_result():
    draft = T + WORDS["wrong"]
    assert parse_episode(episode(draft + S + "<think>", R, "hm</think>" + WORDS["right"])).shape == "TAS!R!!A"
    assert parse_episode(episode(draft + S + "<", R, "think>hm</think>" + WORDS["right"])).shape == "TASR!!A"
    cut = episode(draft + "<search>rad", R, "ium</search>", R, WORDS["right"])
    assert parse_episode(cut).shape == "TA!R!!RA"


@pytest.mark.parametrize(
    "unit",
    [
        *("<think>", "</search>", "<", "<thin", "<think>x</think>", "<answer>x</answer>", S, "<result>", " "),
        *("<think>x<answer>y", "<answer>x</think>", "the ", "a. "),
    ],
)
def test_linear_time(unit):
    text = unit * (100_000 // len(unit))
    tries = [
        episode(text),
        episode(text, text, text),
        episode(f"{T}<answer>{text}</answer>"),
        episode(text[:50_000] + S + text[:50_000], R, "<answer>x</answer>" * 5000),
    ]
    start = time.process_time()
    for e in tries:
        sem(e, GOLD)
    assert time.process_time() - start < 1


def test_many_turns():
    turns = [T + WORDS["wrong"] + S, R, *[S, R] * 20_000, WORDS["right"]]
    assert sem(episode(*turns), GOLD)["reward"] == 1


# The grammar of reward.py is written here a second time, as one pattern for the whole text. In that text
# \ue000 stands for a result.
ANY = r"</?(?:think|answer|search|result)>"
BODY = rf"(?!\s*{ANY})(?:(?!{ANY})[^\ue000])+"
THINK, ANSWER = rf"\s*<think>{BODY}</think>", rf"\s*<answer>{BODY}</answer>"
TURN = rf"\s*<search>{BODY}</search>(?:(?!{ANY})[^\ue000])*\ue000(?:{THINK})?"
GRAMMAR = re.compile(rf"{THINK}{ANSWER}(?:(?:{TURN})+{ANSWER})?\s*", re.DOTALL)


@st.composite
def texts(draw):
    """The policy's texts between the results. Their structure is right except for up to three faults."""
    pieces = [T, WORDS[draw(st.sampled_from(list(ANSWERS)))]]
    for _ in range(draw(st.integers(0, 2))):
        pieces += [S, "\ue000", *[T] * draw(st.integers(0, 1))]
    if "\ue000" in pieces:
        pieces.append(WORDS[draw(st.sampled_from(list(ANSWERS)))])
    piece = st.sampled_from([*TAGS, *NEAR_TAGS, *WORDS.values(), "\ue000", " ", "\n"])
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(pieces) - 1))
        pieces[at : at + draw(st.integers(0, 1))] = [draw(piece | st.text(max_size=5))]
    return "".join(pieces).split("\ue000")


@settings(max_examples=300, deadline=None)
@given(
    texts() | st.lists(any_text, min_size=1, max_size=3),
    st.sampled_from(["eos", "eos", "eos", "length", "turns", "bad_query", "search_failed", ""]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([None, 0.0, 0.1, 1.0]),
)
def test_any_text(pieces, stop, tau, search_cost):
    pieces = [text.replace("\ue000", "") for text in pieces]
    e = episode(*[text for piece in pieces for text in (piece, R)][:-1], stop=stop)
    parts = sem(e, GOLD, tau=tau, search_cost=search_cost)
    assert list(parts) == ["reward", "f", "s", "t", "u", "f1_a1", "f1_a2"]
    assert all(type(x) is float and math.isfinite(x) and 0 <= x <= 1 for x in parts.values())
    assert all(parts[name] in (0, 1) for name in "fstu")
    valid = stop == "eos" and GRAMMAR.fullmatch("\ue000".join(pieces)) is not None
    assert parts["f"] == valid
    if not valid:
        assert parts["reward"] == 0
    elif len(pieces) == 1:
        assert parts["reward"] == parts["f1_a1"] * (parts["f1_a1"] >= tau)
    elif parts["f1_a1"] < tau:
        assert parts["reward"] == parts["f1_a2"]
    else:
        assert parts["reward"] == (0 if search_cost is None else (1 - search_cost) * parts["f1_a2"])
    if len(pieces) > 1:
        assert parts["s"] == 1


def test_no_segments():
    assert sem(episode(), GOLD) == dict.fromkeys(["reward", "f", "s", "t", "u", "f1_a1", "f1_a2"], 0.0)


# ------------------------------------------------------------------------------------------------------------
# tricks

OPTIONS = replace(GOLD, answers=["B"], choices=["Rome", "Paris", "Oslo", "Lima"])
LETTERS = "A or B or C or D"

TRICKS = {
    "ten answers": T + "<answer>{}</answer>" * 10,
    "empty answer": T + "<answer></answer>",
    "a full stop": T + "<answer>.</answer>",
    "an article": T + "<answer>the</answer>",
    "all letters": T + f"<answer>{LETTERS}</answer>",
    "all letters, commas": T + "<answer>A, B, C, D</answer>",
    "all options": T + "<answer>Rome Paris Oslo Lima</answer>",
    "a letter, another option's text": T + "<answer>B. Rome</answer>",
    "only a thought": "<think>I say {}</think>",
    "an answer inside the thought": "<think><answer>{}</answer></think>",
    "a thought that does not end": "<think>x<answer>{}</answer>",
    "an answer that does not end": T + "<answer>{}",
    "its own result": T + "<result>{}</result><answer>{}</answer>",
    "the prompt": SEM.system,
    "the prompt as an answer": T + f"<answer>{re.sub('<.*?>', '', SEM.system)}</answer>",
    "words of the prompt": T + "<answer>a few words, or the letter alone</answer>",
    "the question": T + f"<answer>{GOLD.text}</answer>",
}


@pytest.mark.parametrize("question", [GOLD, OPTIONS], ids=["open", "options"])
@pytest.mark.parametrize("before", ["", T + WORDS["wrong"] + S], ids=["draft", "after a search"])
@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS)
def test_tricks_earn_no_more_than_an_honest_wrong_answer(trick, before, question):
    right = "Marie Curie" if question is GOLD else "B"
    honest, tricky = T + f"<answer>{right}</answer>", trick.replace("{}", right)
    for text, paid in [(honest, 1), (tricky, 0)]:
        e = episode(before, R, text) if before else episode(text)
        assert sem(e, question)["reward"] == sem(e, question, search_cost=0.1)["reward"] == paid


@pytest.mark.parametrize("text", ["Marie Curie Rome", "Marie Curie or Niels Bohr", "Marie Curie Marie Curie"])
def test_stuffing_costs(text):
    assert 0 < sem(episode(f"{T}<answer>{text}</answer>"), GOLD)["reward"] < 1


# ------------------------------------------------------------------------------------------------------------
# answer matching


def gold(*answers, source="s", choices=None):
    return Question("1", "?", list(answers), source, choices)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("U.S.A.", "usa"),
        ("twenty-one", "twentyone"),
        ("  much \t\n space  ", "much space"),
        ("Theatre Anthem Banana", "theatre anthem banana"),
        ("The", "the"),
        ("A", "a"),
        ("An", "an"),
        ("The The", "the the"),
        ("A.", "a"),
        ("!!!", "!!!"),
        (" ? ", "?"),
        ("The?", "the"),
        ("", ""),
        (" \n", ""),
        ("Zürich’s Straße", "zürich’s straße"),
        ("東京 の 塔", "東京 の 塔"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    "text, answers, em, score",
    [
        ("the Eiffel tower.", ["Eiffel Tower"], 1, 1),
        ("Eiffel", ["Eiffel Tower"], 0, "2/3"),
        ("tower Eiffel", ["Eiffel Tower"], 0, 1),
        ("the tall Eiffel Tower in Paris", ["Eiffel Tower"], 0, "4/7"),
        ("Paris Paris", ["Paris"], 0, "2/3"),
        ("Paris Paris", ["Paris, Paris"], 1, 1),
        ("Paris Rome", ["Paris"], 0, "2/3"),
        ("Paris or Rome or Oslo or Lima", ["Paris"], 0, "1/4"),
        ("big apple", ["New York City", "The Big Apple"], 1, 1),
        ("New York", ["New York City", "York", "Rome"], 0, "4/5"),
        ("Zurich", ["Zürich"], 0, 0),
        ("zürich", ["ZÜRICH"], 1, 1),
        ("The", ["The The"], 0, "2/3"),
        ("The", ["The"], 1, 1),
        ("the", ["A"], 0, 0),
        ("a", ["A"], 1, 1),
        ("A", ["An", "The"], 0, 0),
        ("!!!", ["!!!"], 1, 1),
        ("...", ["!!!"], 0, 0),
        ("", ["!!!"], 0, 0),
        ("", ["The"], 0, 0),
        (" ", [" "], 0, 0),
        ("yes", ["Yes."], 1, 1),
        ("yes", ["no"], 0, 0),
        ("Paris", [], 0, 0),
        (None, ["Paris"], 0, 0),
    ],
)
def test_open_answers(text, answers, em, score):
    assert exact_match(text, gold(*answers)) == em
    assert f1(text, gold(*answers)) == pytest.approx(float(Fraction(score)))


@pytest.mark.parametrize(
    "text, answers, plain, strict",
    [
        ("yes it is", ["yes"], "1/2", 0),
        ("yes", ["yes it is"], "1/2", 0),
        ("Yes!", ["no", "the yes"], 1, 1),
        ("yes", ["no", "yes sir"], "2/3", 0),
        ("yes or no", ["no", "yes"], "1/2", 0),
        ("noanswer", ["noanswer given"], "2/3", 0),
        ("noanswer", ["noanswer"], 1, 1),
        ("no way", ["way"], "2/3", "2/3"),
        ("no way", ["no"], "2/3", 0),
        ("no way", ["no", "no way"], 1, 1),
    ],
)
def test_yes_and_no_match_only_themselves_where_the_data_set_says_so(text, answers, plain, strict):
    plain, strict = float(Fraction(plain)), float(Fraction(strict))
    for source in ("hotpotqa", "2wikimultihopqa"):
        assert f1(text, gold(*answers, source=source)) == pytest.approx(strict)
        assert f1(text, gold(*answers, source=source), yes_no=False) == pytest.approx(plain)
    for source in ("musique", "nq", "triviaqa", "popqa", "bamboogle", "hotpotqa-like", "towers"):
        assert f1(text, gold(*answers, source=source)) == pytest.approx(plain)
        assert f1(text, gold(*answers, source=source), yes_no=True) == pytest.approx(strict)


TEN = "Rome Paris Oslo Lima Cairo Quito Delhi Tokyo Accra Seoul".split()


@pytest.mark.parametrize("right", range(10), ids=lambda i: chr(65 + i))
def test_letters(right):
    name, town = chr(65 + right), TEN[right]
    question = Question("1", "?", [name], "s", TEN)
    small, capitals = name.lower(), town.upper()
    good = [name, small, f"({name})", f"({small})", f"{name}.", f"{name})", f"{name}:", f" {name}\n"]
    good += [f"{name}) {town}", f"{name}. {town}", f"({name}) {town}", f"{small}. the {capitals}!"]
    for text in [*good, f"{name}.\n{town}", town, f" The {town}."]:
        assert letter(text, TEN) == name, text
        assert exact_match(text, question) == f1(text, question) == 1
    bad = ["", " ", "the", "an", ".", "()", "K", "k.", "1", name * 2, f"{town} {town}", LETTERS, None]
    for wrong, elsewhere in zip("ABCDEFGHIJ", TEN, strict=True):
        if wrong != name:
            bad += [wrong, wrong.lower(), f"({wrong})", f"{wrong}.", elsewhere, f"{wrong}. {elsewhere}"]
            bad += [f"{name}. {elsewhere}", f"{wrong}. {town}", f"{name} {wrong}", f"{name} or {wrong}"]
    for text in bad:
        assert exact_match(text, question) == f1(text, question) == 0, text


@pytest.mark.parametrize(
    "text, choices, name",
    [
        ("d", ["Rome", "Paris", "Oslo", "Lima"], "D"),
        ("E", ["Rome", "Paris", "Oslo", "Lima"], None),
        ("-1", ["1", "-1", "2", "-2"], "B"),
        ("1", ["1", "-1", "2", "-2"], "A"),
        ("18", ["1.8", "18", "180", "1800"], "B"),
        ("B. 1.8", ["1.8", "18", "180", "1800"], None),
        ("A. 1.8", ["1.8", "18", "180", "1800"], "A"),
        ("B) two\nlines", ["one line", "two\nlines"], "B"),
        ("p<9", ["p<9", "p>9"], "A"),
        ("p=9", ["p<9", "p>9"], None),
        ("+", ["+", "-", "x"], "A"),
        ("?", ["+", "cat", "dog"], None),
        ("", ["", "cat"], None),
        ("B", ["", "cat"], "B"),
        ("The", ["The", "A", "An"], "A"),
        ("an", ["The", "A", "An"], "C"),
        ("a", ["The", "A", "An"], "A"),
        ("687", ["687", "687", "12"], None),
        ("A. 687", ["687", "687", "12"], "A"),
        ("B. 687", ["687", "687", "12"], "B"),
        ("A. Smith", ["J. Doe", "A. Smith"], "B"),
        ("A. Paris", ["Rome", "Paris"], None),
        ("B. Rome", ["Rome", "Paris"], None),
        ("e. Coli", ["S. aureus", "E. coli"], "B"),
        ("C. difficile", ["S. aureus", "C. difficile", "E. coli"], "B"),
        ("All of the above", ["one", "two", "all of above."], "C"),
    ],
)
def test_options_written_out(text, choices, name):
    assert letter(text, choices) == name


# The official rules are written here a second time, as the scripts of the data sets have them.

PUNCTUATION = r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~"""


def squad(text):
    """The words that SQuAD's normaliser leaves. MuSiQue, HotpotQA and 2Wiki have the same normaliser."""
    text = text.lower().translate(dict.fromkeys(map(ord, PUNCTUATION)))
    return [word for word in re.split(r"\s+", re.sub(r"\b(?:the|an|a)\b", " ", text)) if word]


def open_nq(text):
    return squad(unicodedata.normalize("NFD", text))


def trivia(text):
    text = text.replace("_", " ").lower().translate(dict.fromkeys(map(ord, PUNCTUATION + "‘’´`"), " "))
    return squad(text)


def overlap(words, golds):
    common = sum(min(words.count(word), golds.count(word)) for word in set(words))
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(golds)
    return 2 * precision * recall / (precision + recall)


def musique_overlap(words, golds):
    return overlap(words, golds) if words and golds else float(words == golds)


def yes_no_overlap(words, golds):
    if words != golds and any(side in (["yes"], ["no"], ["noanswer"]) for side in (words, golds)):
        return 0.0
    return overlap(words, golds)


OFFICIAL = {  # data set: its normaliser, its F1 (NQ, PopQA and Bamboogle have no F1; theirs here is SQuAD's)
    "musique": (squad, musique_overlap),
    "hotpotqa": (squad, yes_no_overlap),
    "2wikimultihopqa": (squad, yes_no_overlap),
    "nq": (open_nq, overlap),
    "triviaqa": (trivia, overlap),
    "popqa": (squad, overlap),
    "bamboogle": (squad, overlap),
    "s": (squad, overlap),
}


def official(text, question):
    """(EM, F1) by the rule of the question's data set."""
    if question.source == "gsm8k":  # the script reads what follows ####
        found = re.search(r"#### (-?[0-9.,]+)", f"#### {text}")
        em = found is not None and found[1].strip().replace(",", "") == question.answers[0]
        return float(em), float(em)
    if question.choices:
        return float(text == question.answers[0]), float(text == question.answers[0])
    normaliser, score = OFFICIAL[question.source]
    words, golds = normaliser(text), [normaliser(answer) for answer in question.answers]
    return float(words in golds), max(score(words, gold) for gold in golds)


def agrees_with_the_official_rule(text, question):
    """Compares both rules, and returns whether that was possible. It is not possible where the official rule
    leaves nothing of a text, because reward.py differs there."""
    if question.source in OFFICIAL:
        normaliser, _ = OFFICIAL[question.source]
        if not all(normaliser(side) for side in (text, *question.answers)):
            return False
    em, score = official(text, question)
    assert exact_match(text, question) == em, (text, question)
    assert f1(text, question) == pytest.approx(score), (text, question)
    return True


WORDY = ["the", "A", "an", "Yes", "no", "noanswer", "Paris", "paris,", "x-y", "-", "_", "’s", "Ünı", " "]
phrases = st.lists(st.sampled_from(WORDY) | st.text(max_size=4), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(phrases, st.lists(phrases, min_size=1, max_size=3), st.sampled_from(list(OFFICIAL)))
@example("Yes", ["Yes Yes"], "hotpotqa")
@example("Yes", ["Yes Yes"], "musique")
@example("x-y’s", ["x y s"], "triviaqa")
def test_any_phrase(text, answers, source):
    if source == "nq":  # the official rule splits off accents, so they are split off here too
        text, answers = unicodedata.normalize("NFD", text), [unicodedata.normalize("NFD", a) for a in answers]
    agrees_with_the_official_rule(text, gold(*answers, source=source))
    among_golds = gold(text, *answers, source=source)
    assert exact_match(text, among_golds) == f1(text, among_golds) == bool(text.strip())
    question = gold(*answers, source=source)
    assert 0 <= exact_match(text, question) <= f1(text, question) <= 1


@settings(max_examples=150, deadline=None)
@given(phrases, st.lists(phrases, min_size=2, max_size=6))
def test_any_option(text, choices):
    named = letter(text, choices)
    assert named is None or named in "ABCDEF"[: len(choices)]
    for i, choice in enumerate(choices):
        alone = sum(choice.strip() == other.strip() for other in choices) == 1
        if alone and not re.match(r"\s*\(?[A-Za-z]\)?([.:)]|\s*$)", choice) and choice.strip():
            assert letter(choice, choices) == chr(65 + i)


@pytest.mark.parametrize(
    "source, text, answers, em, score",
    [
        ("musique", "the United States", ["US", "United States of America"], 0, "2/3"),
        ("musique", "USA", ["America", "U.S.A."], 1, 1),
        ("musique", "1,200", ["1200 men"], 0, "2/3"),
        ("nq", "Café de Flore", ["café de Flore"], 1, 1),
        ("nq", "14 December 1972", ["14 December 1972 UTC", "December 1972"], 0, "6/7"),
        ("hotpotqa", "Spider-Man", ["Spider Man"], 0, 0),
        ("triviaqa", "Spider-Man", ["Spider Man"], 1, 1),
        ("triviaqa", "Spider_Man", ["Spider’Man"], 1, 1),
        ("triviaqa", "O´Neill`s", ["O‘Neill's"], 1, 1),
        ("musique", "O´Neill", ["O’Neill"], 0, 0),
        ("triviaqa", "U.S.A.", ["USA"], 0, 0),
        ("triviaqa", "A-ha", ["Ha"], 1, 1),
        ("musique", "A-ha", ["Ha"], 0, 0),
        ("2wikimultihopqa", "12 May 1910", ["12 May 1901"], 0, "2/3"),
        ("popqa", "the politician", ["politician", "political leader"], 1, 1),
        ("bamboogle", "James A. Garfield", ["James Garfield"], 1, 1),
        ("gsm8k", "1,234", ["1234"], 1, 1),
        ("gsm8k", "-5", ["5"], 0, 0),
    ],
)
def test_the_rule_of_each_data_set(source, text, answers, em, score):
    question = gold(*answers, source=source)
    assert agrees_with_the_official_rule(text, question)
    assert (exact_match(text, question), f1(text, question)) == (em, pytest.approx(float(Fraction(score))))


@pytest.mark.parametrize(
    "source, text, answers, theirs, ours",  # both are (EM, F1)
    [
        ("musique", "the", ["A"], (1, 1), (0, 0)),
        ("hotpotqa", "The", ["The"], (1, 0), (1, 1)),
        ("hotpotqa", "The", ["The The"], (1, 0), (0, 2 / 3)),
        ("triviaqa", "?", ["!!!"], (1, 0), (0, 0)),
        ("nq", "", ["The"], (1, 0), (0, 0)),
        ("nq", "Caf\u00e9", ["Cafe\u0301"], (1, 1), (0, 0)),
        ("gsm8k", "$18", ["18"], (0, 0), (1, 1)),
        ("gsm8k", "18 dollars", ["18"], (1, 1), (1, 1)),
        ("gsm8k", "18.", ["18"], (0, 0), (1, 1)),
        ("gsm8k", "18 or 19", ["18"], (1, 1), (0, 0)),
        ("gsm8k", "18.00", ["18"], (0, 0), (1, 1)),
        ("gsm8k", "12,34", ["1234"], (1, 1), (0, 0)),
    ],
)
def test_where_reward_py_differs_from_the_official_rules(source, text, answers, theirs, ours):
    question = gold(*answers, source=source)
    assert official(text, question) == pytest.approx(theirs)
    assert (exact_match(text, question), f1(text, question)) == pytest.approx(ours)


@pytest.mark.parametrize("source", OFFICIAL)
@pytest.mark.parametrize("title", ["A", "The", "An", "The The", "A.", "!!!", "?"])
def test_titles_of_articles_and_punctuation_match_only_themselves(title, source):
    others = {"A", "The", "An", "The The", "!!!", "?", "...", "", " "} - {title.strip(".")}
    question = gold(title, source=source)
    assert exact_match(title.lower(), question) == f1(title.upper(), question) == 1
    if title[0].isalpha():
        assert exact_match(f"'{title}'!", question) == f1(title.strip("."), question) == 1
    assert all(exact_match(other, question) == 0 for other in others)
    assert all(f1(other, question) == 0 for other in others if not {other, title} <= {"The", "The The"})


SETS = {
    **{name: name for name in ("musique", "hotpotqa", "2wikimultihopqa", "gsm8k")},
    **{name: f"flashrag/{name}" for name in ("nq", "triviaqa", "popqa", "bamboogle")},
}


@cache
def real(name, folder):
    if not REAL.joinpath(folder).exists():
        pytest.skip("no SEM_DATA")
    return load(f"{name}:{REAL / folder}", "test")


def perturbed(answer, other):
    """Variants of an answer that a model may write, some of which the rules tell apart."""
    yield from (f"The {answer}.", f"an {answer.upper()}!", f"  {answer}\n", f"“{answer}”", f"*{answer}*")
    yield from (answer.replace(" ", "_"), answer.replace(" ", "-"), answer.replace("-", " "))
    yield from (answer.replace("'", "’"), answer.replace("'", "`"), answer.replace(".", ""), answer + "'s")
    yield from (answer.replace(",", ""), f"{answer}, 2", answer.replace("1", "one"), f"{answer} 1,000")
    yield from (f"{answer} or {other}", " ".join(answer.split()[1:]), " ".join(answer.split()[::-1]), other)
    yield from (unicodedata.normalize("NFKD", answer), answer.encode("ascii", "ignore").decode())
    yield from ("yes", "No.", f"yes, {answer}", f"noanswer {answer}", "", answer[:-1], answer + answer)


@pytest.mark.parametrize("name", SETS)
def test_real_answers(name):
    questions, compared = real(name, SETS[name]), 0
    for i, question in enumerate(questions):
        answer, other = question.answers[i % len(question.answers)], questions[i - 1].answers[0]
        for alias in question.answers[:20]:
            assert exact_match(alias, question) == f1(alias, question) == 1
        if name == "gsm8k":
            grouped = f"{int(answer):,}" if answer.isdecimal() else answer
            tries = [answer, grouped, f"{answer}0", f"-{answer}", answer[:-1], other]
            tries = [text for text in tries if re.fullmatch(r"-?[0-9,]+(\.[0-9]+)?", text)]
        else:
            tries = [*perturbed(answer, other), question.text]
        shortened = replace(question, answers=list({answer: 0} | dict.fromkeys(question.answers[:10])))
        for text in tries[i % 3 :: 3]:
            if name == "nq":  # reward.py does not match the two ways to write an accented letter
                text = unicodedata.normalize("NFC", text)
            compared += agrees_with_the_official_rule(text, shortened)
    assert compared > len(questions)


def test_real_letters():
    """For a letter both rules agree. SQuAD's normaliser would delete the letter A as an article."""
    for question in real("mmlu", "mmlu")[::8]:
        for text in "ABCD":
            assert agrees_with_the_official_rule(text, question)
    assert squad("A") == []


def test_real_options():
    for question in real("mmlu", "mmlu")[::8]:
        for name, choice in zip("ABCD", question.choices, strict=True):
            lone = question.choices.count(choice) == 1 and choice.strip().upper() not in "ABCD"
            assert letter(choice, question.choices) == name or not lone, (choice, question.choices)
            assert letter(f"{name}. {choice}", question.choices) == name
        assert sum(exact_match(name, question) for name in "ABCD") == 1


# ------------------------------------------------------------------------------------------------------------
# what the methods pay, next to their published rules
#
# Each function peer_* is a published rule, written from its paper and its public code. It reads what that
# code reads: one text that contains the results and, if the code reads the prompt too, begins with the
# example of the prompt.

EXAMPLE = "Write it inside <answer> and </answer>, for example <answer> Beijing </answer>. Question: .."


def whole(e):
    return "".join(segment.text for segment in e.segments)


def last_answer(text, least=1):
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[-1].strip() if len(found) >= least else None


def peer_em(text, question):
    return float(text is not None and squad(text) in map(squad, question.answers))


def peer_f1(text, question, score):
    return 0.0 if text is None else max(score(squad(text), squad(gold)) for gold in question.answers)


def peer_search_r1(e, question, group):
    """arXiv 2503.09516: EM of the last <answer> in prompt and episode, if there are at least two, because the
    prompt has one."""
    return peer_em(last_answer(EXAMPLE + whole(e), least=2), question)


def peer_zerosearch(e, question, group):
    """arXiv 2505.04588: F1 of the same answer, without a rule for yes and no."""
    return peer_f1(last_answer(EXAMPLE + whole(e), least=2), question, overlap)


def peer_ssrl(e, question, group):
    """arXiv 2508.10874: 0.9 times the EM of the last <answer> plus 0.1 times the format."""
    text = whole(e).strip()
    names = re.findall(r"<(/?\w+)>", text)
    blocks = [
        (kind, body)
        for kind in ("think", "search", "information", "answer")
        for body in re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
    ]
    placeholders = {
        "think": "your thoughts",
        "search": "your query",
        "information": "your information",
        "answer": "your answer",
    }
    thoughts, searches = names.count("think"), names.count("search")
    sound = (
        all(name.strip("/") in placeholders for name in names)
        and text.startswith("<think>")
        and text.endswith("</answer>")
        and len(names) >= 4
        and all(body.strip() and placeholders[kind] not in body for kind, body in blocks)
        and not any(kind == "search" and "\n" in body.strip() for kind, body in blocks)
        and names[:2] == ["think", "/think"]
        and names[-2:] == ["answer", "/answer"]
        and " ".join(names).count("search /search information /information") == searches
        and names.count("information") == searches
        and thoughts <= 8
    )
    turns = searches + 1
    shape = min(1, thoughts / 2) * min(thoughts, turns) / max(thoughts, turns) if sound else 0
    return 0.9 * peer_em(last_answer(text), question) + 0.1 * shape


def peer_research(e, question, group, paper=False):
    """arXiv 2503.19470 and its code: F1 of the boxed answer, or 0.1 if that is 0 and the format is right. In
    a wrong format the code pays 0, and the equation of the paper pays F1."""
    text, tags = whole(e), ["<search>", "</search>", "<result>", "</result>"]
    answer = last_answer(text) if paper or text.count("<answer>") == text.count("</answer>") == 1 else None
    calls = re.findall("|".join(tags), text)
    sound = (
        text.count("<think>") == text.count("</think>") > 0
        and text.count("<answer>") == text.count("</answer>") == 1
        and all(calls[i : i + 4] == tags for i, tag in enumerate(calls) if tag == tags[0])
        and answer is not None
        and "\\boxed{" in answer
        and e.stop == "eos"
    )
    depth, boxed = 0, None
    start = (answer or "").rfind("\\boxed{")
    for end in range(start + 6, len(answer) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(answer[end], 0)
        if depth == 0:
            boxed = answer[start + 7 : end]
            break
    if boxed is None or not (sound or paper):
        return 0.0
    return peer_f1(boxed, question, yes_no_overlap) or 0.1 * sound


def peer_research_paper(e, question, group):
    return peer_research(e, question, group, paper=True)


def peer_sem(e, question, group, search_cost=None):
    """arXiv 2505.07903: the formula, term by term. Its code is not public, so the grammar above is
    used, which reads only what the policy wrote."""
    policy = "".join("\ue000" if s.kind == "env" else s.text for s in e.segments)
    before, tag, _ = policy.partition("<search>")
    answers = re.findall(r"<answer>(.*?)</answer>", policy.rpartition("\ue000")[2], re.DOTALL)
    a1, a2 = last_answer(before.partition("</answer>")[0] + "</answer>"), answers[-1] if answers else None
    first, last = peer_f1(a1, question, overlap), peer_f1(a2, question, overlap)
    f = e.stop == "eos" and GRAMMAR.fullmatch(policy) is not None
    s, t = bool(tag), policy.count("<think>") == policy.count("<answer>") == 1
    u = s and policy.count("\ue000") == policy.count("<search>")
    if search_cost is not None and first >= 0.5 and u:
        return f * (1 - search_cost) * last
    return f * (first >= 0.5 and not s and t) * first + f * (first < 0.5 and u) * last


def peer_otc(e, question, group):
    """arXiv 2504.14870 as secondary sources describe it, with c = 1."""
    right = [other.searches for other in group if peer_em(last_answer(whole(other)), question)]
    m, n = e.searches, min(right, default=0)
    nearest = 2 * m * n / (m + n) if n else m
    if m == n == 0:
        tool = 1
    else:
        tool = math.sin(nearest * math.pi / (2 * n)) if n else math.cos(m * math.pi / (2 * m + 1))
    return tool * peer_em(last_answer(whole(e)), question)


def peer_flat(e, question, group):
    """EM minus a tenth for every search, as in arXiv 2605.29796."""
    return peer_em(last_answer(whole(e)), question) - e.searches / 10


def peer_ikea(e, question, group):
    """arXiv 2505.07596, the code for a training question: 1 plus a bonus by the number of <search>, or 0.05
    for a wrong answer beside a <search>, or -1 if the text has one of the faults."""
    text = EXAMPLE.replace("<answer>", "").replace("</answer>", "") + whole(e)
    faults = [SEARCH_R1.reminder]  # in the place of theirs
    faults += [c + name for c in "([" for name in ("think", "search", "answer")]
    faults += [name + c for c in ")]" for name in ("think", "search", "answer")]
    if "<think>" not in text or "</think>" not in text or any(fault in text for fault in faults):
        return -1
    searches = text.count("<search>")
    if peer_em(last_answer(text), question):
        return 1 + {0: 0.6, 1: 0.4, 2: 0.2}.get(searches, 0)
    return 0.05 if searches else 0


@dataclass(frozen=True)
class Rule:
    """A rule of the table below, as it was published and as reward.py computes it."""

    published: Callable  # (episode, question, group) -> the reward
    ours: Callable  # an entry of REWARDS, or a function of reward.py
    template: Template  # how the episodes of the table are written


RULES = {
    "search-r1": Rule(peer_search_r1, REWARDS["search-r1"], SEARCH_R1),
    "zerosearch": Rule(peer_zerosearch, REWARDS["zerosearch"], SEARCH_R1),
    "ssrl": Rule(peer_ssrl, REWARDS["ssrl"], SSRL),
    "research": Rule(peer_research, REWARDS["research"], RESEARCH),
    "research_paper": Rule(peer_research_paper, REWARDS["research_paper"], RESEARCH),
    "sem": Rule(peer_sem, REWARDS["sem"], SEM),
    "sem with cost": Rule(partial(peer_sem, search_cost=0.1), partial(sem, search_cost=0.1), SEM),
    "otc": Rule(peer_otc, REWARDS["otc"], SEARCH_R1),
    "flat": Rule(peer_flat, REWARDS["flat"], SEARCH_R1),
    "ikea": Rule(peer_ikea, REWARDS["ikea"], SEARCH_R1),
}
# The entries of REWARDS that this file knows. An entry that is added later needs no row here.
PUBLISHED = ("search-r1", "zerosearch", "ssrl", "research", "research_paper", "sem", "otc", "flat", "ikea")

QUESTIONS = {
    "curie": GOLD,
    "beijing": gold("Beijing"),
    "yes": gold("yes", source="hotpotqa"),
    "open-yes": gold("yes"),
    "letter-a": replace(GOLD, answers=["A"], choices=["Rome", "Paris", "Oslo", "Lima"]),
    "letter-b": replace(GOLD, answers=["B"], choices=["Rome", "Paris", "Oslo", "Lima"]),
    "the": gold("The"),
    "1234": gold("1234", source="gsm8k"),
    "spider": gold("Spider Man", source="triviaqa"),
}
BLOCKS = WORDS | {
    "I": "<information>\nRadium: found in 1898\n</information>",
    "[right]": r"<answer>\[ \boxed{Marie Curie} \]</answer>",
    "[half]": r"<answer>It is \boxed{Curie}.</answer>",
    "[wrong]": r"<answer>\boxed{Niels Bohr}</answer>",
    "plain": "<answer>Marie Curie, no box</answer>",
}
DOCUMENTS = {  # the text of a result
    "R": "Radium: found in 1898",
    "R(answer)": "the quiz: <answer>Marie Curie</answer>",
    "R(wrong)": "the quiz: <answer>Niels Bohr</answer>",
    "R(opens)": "write <answer> before it",
    "R(think)": "then </think> and on",
    "R(search)": "type <search> to find it",
    "R(b)": "<b>Radium</b>",
}


def dialogue(line, stop, question, template):
    """An episode from a line of words of BLOCKS and DOCUMENTS. In every other word _ is a blank and \\n is a
    new line."""
    texts = [("model", "")]
    for word in line.split(" "):
        if word == "M":
            texts += [("reminder", template.reminder), ("model", "")]
        elif word in DOCUMENTS:
            tag = template.result
            texts += [("env", f"\n<{tag}>\n{DOCUMENTS[word]}\n</{tag}>\n"), ("model", "")]
        else:
            text = BLOCKS.get(word, word.replace("_", " ").replace("\\n", "\n"))
            texts[-1] = ("model", f"{texts[-1][1]} {text}".strip())
    segments = [Segment(kind, [], text) for kind, text in texts if text]
    searches = sum(kind == "env" for kind, _ in texts)
    return Episode(question, [], segments=segments, searches=searches, stop=stop, template=template)


# The last column is the reward. Where the published rule pays something else, it is "published -> ours", and
# the words in brackets name the trait of the published rule that is the reason.
PAID = r"""
rule            episode                               stop    question  reward
-- Search-R1
search-r1       T right                               answer  curie     1
search-r1       T wrong                               answer  curie     0
search-r1       T half                                answer  curie     0
search-r1       right                                 answer  curie     1
search-r1       so it is right                        answer  curie     1
search-r1       T S R T right                         answer  curie     1
search-r1       T S R T S R right                     answer  curie     1
search-r1       T S R wrong                           answer  curie     0
search-r1       T                                     eos     curie     0
search-r1       T S                                   turns   curie     0
search-r1       T <answer>Marie_Curie                 length  curie     0
search-r1       T <answer></answer>                   answer  curie     0
search-r1       <think>hm right                       answer  curie     1
search-r1       T <answer>the_Marie_Curie!</answer>   answer  curie     1
search-r1       T <answer>yes</answer>                answer  yes       1
search-r1       T <answer>A</answer>                  answer  letter-a  1
search-r1       T <answer>1,234</answer>              answer  1234      1
search-r1       T                                     eos     beijing   1 -> 0 (the prompt's example answers)
search-r1       T <answer>Paris                       length  beijing   1 -> 0 (the prompt's example answers)
search-r1       T S R(answer) T                       length  curie     1 -> 0 (a document answers)
search-r1       T S R(answer)                         turns   curie     1 -> 0 (a document answers)
search-r1       T S R(wrong) T right                  answer  curie     1
search-r1       T S R(opens) T right                  answer  curie     0 -> 1 (a document opens the answer)
search-r1       T <answer>the</answer>                answer  letter-a  1 -> 0 (articles are deleted)
search-r1       T <answer>.</answer>                  answer  letter-a  1 -> 0 (articles are deleted)
search-r1       T <answer>An</answer>                 answer  the       1 -> 0 (articles are deleted)
search-r1       T <answer>B._Paris</answer>           answer  letter-b  0 -> 1 (an option is no letter)
search-r1       T <answer>Paris</answer>              answer  letter-b  0 -> 1 (an option is no letter)
search-r1       T <answer>12.34</answer>              answer  1234      1 -> 0 (points and signs are deleted)
search-r1       T <answer>-1234</answer>              answer  1234      1 -> 0 (points and signs are deleted)
search-r1       T <answer>1234_men</answer>           answer  1234      0 -> 1 (a number is a text)
search-r1       T <answer>Spider-Man</answer>         answer  spider    0 -> 1 (one rule for all sets)
search-r1       T <answer>Rome right                  answer  curie     0 -> 1 (a tag in the answer is text)
-- ZeroSearch
zerosearch      T right                               answer  curie     1
zerosearch      T half                                answer  curie     2/3
zerosearch      T part                                answer  curie     4/9
zerosearch      T wrong                               answer  curie     0
zerosearch      T S R T half                          answer  curie     2/3
zerosearch      T S                                   turns   curie     0
zerosearch      T <answer>yes_it_is</answer>          answer  yes       1/2
zerosearch      T                                     eos     beijing   1 -> 0 (the prompt's example answers)
zerosearch      T S R(answer) T                       length  curie     1 -> 0 (a document answers)
zerosearch      T <answer>A</answer>                  answer  letter-a  0 -> 1 (articles are deleted)
zerosearch      T <answer>The</answer>                answer  the       0 -> 1 (articles are deleted)
zerosearch      T <answer>Marie_<think>_Curie</answer>  answer  curie  4/5 -> 0 (a tag in the answer is text)
-- SSRL
ssrl            T right                               eos     curie     .95
ssrl            T wrong                               eos     curie     .05
ssrl            T S I T right                         eos     curie     1
ssrl            T S I T wrong                         eos     curie     .1
ssrl            T S I T half                          eos     curie     .1
ssrl            T S I right                           eos     curie     .925
ssrl            T T right                             eos     curie     .95
ssrl            T S I T S I T right                   eos     curie     1
ssrl            T S I S I T right                     eos     curie     .9 + .1 * 2/3
ssrl            T T T T T T T T right                 eos     curie     .9 + .1 * 1/8
ssrl            T T T T T T T T T right               eos     curie     .9
ssrl            T S I T right                         length  curie     1
ssrl            right                                 eos     curie     .9
ssrl            so T right                            eos     curie     .9
ssrl            T right so                            eos     curie     .9
ssrl            T                                     eos     curie     0
ssrl            T S I                                 length  curie     0
ssrl            T S T right                           eos     curie     .9
ssrl            T I T right                           eos     curie     .9
ssrl            T S I I T right                       eos     curie     .9
ssrl            T S T I right                         eos     curie     .9
ssrl            T S <information></information> right  eos    curie     .9
ssrl            <think></think> right                 eos     curie     .9
ssrl            T <search>a\nb</search> I T right     eos     curie     .9
ssrl            T <search>\na\n</search> I T right    eos     curie     1
ssrl            T <search>your_query</search> I T right  eos  curie     .9
ssrl            <think>_your_thoughts_</think> right  eos     curie     .9
ssrl            T <b>so</b> right                     eos     curie     .9
ssrl            T wrong right                         eos     curie     .95
ssrl            T right wrong                         eos     curie     .05
ssrl            T right <answer></answer>             eos     curie     0
ssrl            T right blank                         eos     curie     0
ssrl            T right right right                   eos     curie     .95
ssrl            T S <information> right </information>  eos   curie     .9
ssrl            T S R T right                         eos     curie     1
ssrl            T S R T S I T right                   eos     curie     1
ssrl            T                                     eos     beijing   0
ssrl            T S R(answer) T                       length  curie     .9 -> 0 (a document answers)
ssrl            T S R(b) T right                      eos     curie     .9 -> 1 (a document breaks the format)
ssrl            T <answer>the</answer>                eos     letter-a  .95 -> .05 (articles are deleted)
ssrl            <think>hm T right                     eos     curie     .9
-- ReSearch: the code
research        T [right]                             eos     curie     1
research        T [half]                              eos     curie     2/3
research        T [wrong]                             eos     curie     .1
research        T S R T [right]                       eos     curie     1
research        T S R T S R [half]                    eos     curie     2/3
research        so T so [right] so                    eos     curie     1
research        [right]                               eos     curie     0
research        T [right]                             length  curie     0
research        T S                                   turns   curie     0
research        T plain                               eos     curie     0
research        T [right] [right]                     eos     curie     0
research        T </think> [right]                    eos     curie     0
research        T S [right]                           eos     curie     0
research        T <answer>\boxed{Marie_Curie</answer>  eos    curie     0
research        T \boxed{Marie_Curie} plain           eos     curie     0
research        T <answer>\boxed{Rome}\boxed{\text{Marie_Curie}}</answer>  eos  curie  1/2
research        T <answer>\boxed{yes_it_is}</answer>  eos     yes       .1
research        T <answer>\boxed{yes_it_is}</answer>  eos     open-yes  .1
research        T S R(answer) T [right]               eos     curie     0 -> 1 (a document breaks the format)
research        T S R(opens) T [wrong]                eos     curie     0 -> .1 (a document breaks the format)
research        T S R(think) T [right]                eos     curie     0 -> 1 (a document breaks the format)
research        T S R(search) T [right]               eos     curie     0 -> 1 (a document breaks the format)
research        T <answer>\boxed{A}</answer>          eos     letter-a  .1 -> 1 (articles are deleted)
research        T <answer>\boxed{}</answer>           eos     curie     .1 -> 0 (an empty box is an answer)
research        T <answer> T \boxed{Marie_Curie}</answer>  eos  curie   1 -> 0 (a tag in the answer is text)
-- ReSearch: the equation
research_paper  T [right]                             eos     curie     1
research_paper  T [wrong]                             eos     curie     .1
research_paper  [right]                               eos     curie     1
research_paper  [half]                                length  curie     2/3
research_paper  [wrong]                               eos     curie     0
research_paper  T [wrong] [right]                     eos     curie     1
research_paper  T S [right]                           eos     curie     1
research_paper  T plain                               eos     curie     0
research_paper  T S R(answer) T [right]               eos     curie     1
research_paper  T S R(answer) T [wrong]               eos     curie     0 -> .1 (a document breaks the format)
-- SEM
sem             T right                               eos     curie     1
sem             T half                                eos     curie     2/3
sem             T part                                eos     curie     0
sem             T right S R right                     eos     curie     0
sem             T wrong S R right                     eos     curie     1
sem             T part S R T half                     eos     curie     2/3
sem             T wrong S R S R T right               eos     curie     1
sem             T wrong S R wrong                     eos     curie     0
sem             T wrong S R(answer) T wrong           eos     curie     0
sem             T wrong S R(opens) T right            eos     curie     1
sem             T right                               length  curie     0
sem             T right T                             eos     curie     0
sem             T S R T right                         eos     curie     0
sem             T <answer>A</answer>                  eos     letter-a  0 -> 1 (articles are deleted)
sem with cost   T right                               eos     curie     1
sem with cost   T right S R right                     eos     curie     .9
sem with cost   T right S R half                      eos     curie     .9 * 2/3
sem with cost   T wrong S R right                     eos     curie     1
-- a penalty for every search
flat            T right                               answer  curie     1
flat            T S R right                           answer  curie     .9
flat            T S R S R wrong                       answer  curie     -.2
flat            T S R T S                             turns   curie     -.1
flat            T S R(answer) T                       length  curie     .9 -> -.1 (a document answers)
-- IKEA
ikea            T right                               answer  curie     1.6
ikea            T S R T right                         answer  curie     1.4
ikea            T S R T S R right                     answer  curie     1.2
ikea            T S R S R S R right                   answer  curie     1
ikea            T S R S R S R S R right               answer  curie     1
ikea            T S R T wrong                         answer  curie     .05
ikea            T S R T half                          answer  curie     .05
ikea            T S R S R S R                         length  curie     .05
ikea            T wrong                               answer  curie     0
ikea            T                                     eos     curie     0
ikea            right                                 answer  curie     -1
ikea            S R right                             answer  curie     -1
ikea            <think>hm right                       answer  curie     -1
ikea            T M T right                           answer  curie     -1
ikea            T (think) right                       answer  curie     -1
ikea            T answer] right                       answer  curie     -1
ikea            T [search]radium S R right            answer  curie     -1
ikea            so T so right                         answer  curie     1.6
ikea            T right radium</search>               bad_query  curie  1.6 -> -1 (no reminder follows)
ikea            T S                                   turns   curie     .05 -> 0 (a query counts)
ikea            T S R right S                         turns   curie     1.2 -> 1.4 (a query counts)
ikea            T S R(answer) T                       length  curie     1.4 -> .05 (a document answers)
ikea            S R(think) right                      answer  curie     -1
ikea            <think>hm S R(think) right            answer  curie     1.4 -> -1 (a document ends a thought)
"""
PAID = [re.split(r"\s{2,}", row, maxsplit=4) for row in PAID.split("\n")[2:] if row and row[0] != "-"]
TRAITS = {
    "the prompt's example answers",
    "a document answers",
    "a document opens the answer",
    "a document breaks the format",
    "articles are deleted",
    "points and signs are deleted",
    "an option is no letter",
    "a number is a text",
    "one rule for all sets",
    "a tag in the answer is text",
    "an empty box is an answer",
    "a query counts",
    "no reminder follows",
    "a document ends a thought",
}


def value(text):
    """The number that a text such as ".9 + .1 * 2/3" stands for, for an approximate comparison."""
    terms = [[Fraction(factor) for factor in term.split("*")] for term in text.replace(" ", "").split("+")]
    return pytest.approx(float(sum(math.prod(term) for term in terms)))


@pytest.mark.parametrize(
    "name, line, stop, question, paid", PAID, ids=[" ".join(r[:2] + r[3:4]) for r in PAID]
)
def test_the_published_rule_and_ours(name, line, stop, question, paid):
    """Both rules pay the same, or the row names the trait of the published rule that makes the difference."""
    paid, _, why = paid.partition(" (")
    published, _, ours = paid.partition(" -> ")
    assert why.strip(")") in (TRAITS if ours else {""})
    rule = RULES[name]
    e = dialogue(line, stop, QUESTIONS[question], rule.template)
    assert rule.published(e, e.question, [e]) == value(published)
    assert rule.ours(e, e.question, group=[e])["reward"] == value(ours or published)


def test_the_table_is_complete():
    assert {row[0] for row in PAID} | {"otc"} == set(RULES) == {*PUBLISHED, "sem with cost"}
    assert {row[4].partition(" (")[2].strip(")") for row in PAID} == TRAITS | {""}
    for name in PUBLISHED:
        assert RULES[name].ours is REWARDS[name] and REWARDS[name].fits(RULES[name].template)
    for name in ("sem", "ssrl", "search-r1", "research", "zerosearch"):  # the methods that were published
        assert METHODS[name].reward is REWARDS[name] and METHODS[name].template == RULES[name].template
    assert REWARDS["sem"].function is sem
    assert REWARDS["boundary"].function is boundary.boundary  # from a file of its own


@pytest.mark.parametrize(
    "name, methods",
    [
        ("sem", {"sem"}),
        ("search-r1", {"sem", "ssrl", "search-r1", "research", "zerosearch"}),
        ("zerosearch", {"sem", "ssrl", "search-r1", "research", "zerosearch"}),
        ("research", {"research"}),
        ("research_paper", {"research"}),
        ("ssrl", {"ssrl"}),
        ("otc", {"sem", "search-r1", "research", "zerosearch"}),  # it does not count self-searches
        ("flat", {"sem", "search-r1", "research", "zerosearch"}),
        ("ikea", {"sem", "search-r1", "research", "zerosearch"}),
        ("boundary", {"sem", "search-r1", "research", "zerosearch"}),
    ],
)
def test_which_methods_a_reward_fits(name, methods):
    known = ("sem", "ssrl", "search-r1", "research", "zerosearch")
    assert {method for method in known if REWARDS[name].fits(METHODS[method].template)} == methods


@pytest.mark.parametrize("name", METHODS)
def test_the_reward_of_a_method_fits_its_template(name):
    method = METHODS[name]
    if isinstance(method.reward, Reward):  # a method may also have a plain function
        assert method.reward.fits(method.template)
    e = dialogue("T S R T right", "eos", GOLD, method.template)
    assert math.isfinite(method.reward(e, GOLD, group=[e], tau=0.5, search_cost=None)["reward"])


@pytest.mark.parametrize(
    "group, paid",
    [
        (["T right", "T S R right", "T S R S R right", "T S R S R S R right"], [1, 0.5, 0.309, 0.2225]),
        (["T wrong", "T S R right", "T S R S R right", "T S R S R S R right"], [0, 1, 0.866, 0.7071]),
        (["T wrong", "T S R wrong", "T S R S R right", "T S R S R S R right"], [0, 0, 1, 0.9511]),
        (["T S R wrong", "T S R S R S R right"], [0, 1]),
        (["T right", "T right"], [1, 1]),
        (["T wrong", "T S R wrong"], [0, 0]),
    ],
)
def test_otc_within_its_group(group, paid):
    """The numbers are those of the formula at c = 1, to four places."""
    group = [dialogue(line, "answer", GOLD, SEARCH_R1) for line in group]
    for e, expected in zip(group, paid, strict=True):
        ours = REWARDS["otc"](e, GOLD, group=group)["reward"]
        assert ours == pytest.approx(expected, abs=5e-5)
        assert ours == pytest.approx(peer_otc(e, GOLD, group))


METHOD_TAGS = [*TAGS, "<information>", "</information>"]
CHUNKS = [*METHOD_TAGS, *NEAR_TAGS, *BLOCKS.values(), r"\boxed{", "}", "{", "your query", "yes", "A", "\n"]
CHUNKS += [" "]
anything = st.lists(st.sampled_from(CHUNKS) | st.text(max_size=5), max_size=12).map("".join)
kinds = st.sampled_from(["model", "model", "env", "reminder", "forced"])
any_pieces = st.lists(st.tuples(kinds, anything))
stops = st.sampled_from(["eos", "eos", "answer", "length", "turns", "bad_query", "search_failed", ""])
method_templates = [method.template for method in METHODS.values()]
RETRIED = [("model", T), ("reminder", "no"), ("model", "<answer>\\boxed{Marie Curie}</answer>")]


def assembled(pieces, stop, question, template, tokens=0):
    """An episode from (kind, text) pairs, with `tokens` policy tokens."""
    e = Episode(question, [], stop=stop, template=template)
    e.segments = [Segment(kind, [], text) for kind, text in pieces]
    e.searches = sum(kind == "env" for kind, _ in pieces)
    e.ids, e.loss_mask, e.logps = [0] * tokens, [True] * tokens, [0.0] * tokens
    return e


@settings(max_examples=150, deadline=None)
@example("research", SEARCH_R1, GOLD, RETRIED, "eos", "write <search> and </search>")
@given(
    st.sampled_from(PUBLISHED),
    st.sampled_from(method_templates),
    st.sampled_from(list(QUESTIONS.values())),
    any_pieces,
    stops,
    anything,
)
def test_any_episode_is_paid_within_bounds_and_retrieved_text_pays_nothing(
    name, template, question, pieces, stop, foreign
):
    """A published reward is finite and in its range, a second call returns the same, and the episode is not
    changed. Other retrieved text in its place gives the same reward."""
    e, right = assembled(pieces, stop, question, template), dialogue("T right", "eos", question, template)
    before = copy.deepcopy(e)
    paid = REWARDS[name](e, question, group=[e, right])
    assert paid == REWARDS[name](e, question, group=[e, right]) and e == before
    least, most = {"flat": (-0.1 * e.searches, 1), "ikea": (-1, 1.6)}.get(name, (0, 1))
    assert all(type(part) is float and math.isfinite(part) for part in paid.values())
    assert least - 1e-9 <= paid["reward"] <= most + 1e-9
    pieces = [(kind, foreign if kind in ("env", "reminder") else text) for kind, text in pieces]
    other = assembled(pieces, stop, question, template)
    assert REWARDS[name](other, question, group=[other, right]) == paid


def templates_of(name):
    """The templates of methods that a reward can read or, if there are none, those of prompts.py."""
    others = [template for template in vars(prompts).values() if isinstance(template, Template)]
    fits = REWARDS[name].fits
    return list(filter(fits, method_templates)) or list(filter(fits, others))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(name, template) for name in REWARDS for template in templates_of(name)]),
    st.sampled_from(list(QUESTIONS.values())),
    st.lists(st.tuples(any_pieces, stops, st.integers(0, 200)), min_size=1, max_size=4),
)
def test_any_reward_is_finite_and_a_function_of_episode_question_and_group(entry, question, members):
    """This holds for every entry of REWARDS, also for one that was added later. It is called for every member
    of a group, with the options that grpo.py gives it."""
    name, template = entry
    group = [assembled(pieces, stop, question, template, tokens) for pieces, stop, tokens in members]
    copies, options = copy.deepcopy(group), {"tau": 0.5, "search_cost": None}
    paid = [REWARDS[name](e, question, group=group, **options) for e in group]
    assert all("reward" in parts and all(map(math.isfinite, parts.values())) for parts in paid)
    assert group == copies  # nothing was changed
    backwards = [REWARDS[name](e, copy.deepcopy(question), group=copies, **options) for e in copies[::-1]]
    assert backwards == paid[::-1]  # neither earlier calls nor the identity of an object matter


# ------------------------------------------------------------------------------------------------------------
# numbers and letters as models write them

NUMBERS = {  # the value, and texts that mean it; None: a text that is not one number
    "9500": r"""$9{,}500 | 9,500 | $9,500.00 | 9500.0 | \$9\,500 | 9,500 dollars | \boxed{9{,}500} | $9500$
    | ９５００ | 9.5e3 | USD: 9,500 | = 9,500. | **9,500** | \text{}9500 | +9500 | Rs.9500 | 9500kg""",
    "-9500": r"""‑9500 | ﹣9500 | minus 9,500 | negative $9,500 | -9,500 | −9500 | –9500 | -$9,500 | $-9500
    | (-9500) | x = -9500 | \boxed{-9500} | -\$9500""",
    "3/4": r"""¾ | 3⁄4 | \cfrac{3}{4} | 3/4 | 0.75 | .75 | 0.750 | \frac{3}{4} | \dfrac34 | $\frac{3}{4}$
    | 3 / 4""",
    "5/2": r"""2½ | 2 ½ | 2.5 | 2 1/2 | 2\frac{1}{2} | 5/2 | 2.50%""",
    "-3/4": r"""-0.75 | -\frac{3}{4} | −3/4""",
    "5": r"""x-5 | f(x)-5 | CO2: 5 | 5% | Answer - 5 | - 5 | 5+ | 5th""",
    "100": r"""100 m^2 | 100 m² | 100\text{ cm}^2 | 100 sq. ft | 100!""",
    "5000": r"""5，000 | 5~000 | 5\ 000""",
    None: r"""10² | 10³ | 2⁻¹ | \sqrt{16} | √16 | 5k | $1.2M | 5 million | 18 hundred | ±5 | 3-5 | 3 - 5
    | 9,50 | 1,2,3 | 1234,567 | 0,123 | 12,34,567 | 1,2345 | V1004 | 5x10 | 10^3 | 3/4/2020 | 1/0
    | 9 500 | 3:30 | five | 1.2.3""",
}
BLANKS = {"5000": ["5\u00a0000", "5\u202f000", "5\u2009000"]}  # between groups of three


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers(value):
    for text in [*map(str.strip, NUMBERS[value].split(" | ")), *BLANKS.get(value, ())]:
        assert number(text) == (None if value is None else Fraction(value)), text
        if value is not None:
            for answer in (value, text):
                assert exact_match(text, gold(answer, source="gsm8k")) == 1, (text, answer)
                assert f1(text, gold("77", answer, source="gsm8k")) == 1
        assert exact_match(text, gold("7", source="gsm8k")) == 0
        assert exact_match(text, gold("no number", source="gsm8k")) == 0  # two texts without a number differ


def test_a_gold_number_comes_from_any_loader(tmp_path):
    rows = {"id": "1", "question": "how much?", "golden_answers": ["70,000"]}
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(rows))
    (tmp_path / "named.jsonl").write_text(json.dumps(rows | {"data_source": "gsm8k"}))
    for spec in (f"{tmp_path}/gsm8k.jsonl", f"gsm8k:{tmp_path}/gsm8k.jsonl", f"{tmp_path}/named.jsonl"):
        [question] = load(spec)
        assert exact_match("$70{,}000.00", question) == 1 and exact_match("70", question) == 0
    for wrong in ("V1004", "seven", "3-5"):
        (tmp_path / "gsm8k.jsonl").write_text(json.dumps(rows | {"golden_answers": [wrong]}))
        with pytest.raises(InputError, match=f"gsm8k.jsonl:1: the answer '{wrong}' is not a number"):
            load(f"{tmp_path}/gsm8k.jsonl")
    assert exact_match("18.0", gold("18", source="musique")) == 0  # other sets keep the rule of SQuAD


CITIES = ["Oslo", "Paris", "Rome", "Lima"]
NAMED = {
    "B": r"""\(B\) | \[B\] | 'B' | ‘B’ | 「B」 | （B） | 【B】 | «B» | Ｂ | B。 | B; | - B | • B
    | Therefore, the answer is B | Thus B | Answer - B | Answer: Paris | The answer is Paris
    | \boxed{Paris} | \text{Paris} | \boxed{\text{Paris}} | B: \text{Paris} | B | b | (B) | [B]
    | {B} | **B** | *B* | `B` | "B" | B. | B) | (b). | **B.** | $B$ | \boxed{B} | \text{B} | _B_
    | Answer: B | The answer is B. | the correct answer is (B) | Option B | option b)
    | **Answer:** B | It's B | So B | B is correct. | B is the right answer | B - Paris | B – Paris
    | B — Paris | B: Paris | B) Paris | (B) Paris | B, Paris | [B] Paris | **B. Paris**
    | **B.** Paris | B. paris! | B Paris | B (Paris) | B.Paris | B/Paris | ### B
    | The answer is B: Paris | Paris | **Paris** | the Paris | A Paris""",
    None: r"""\cancel{B} | \sout{B} | B-C | the answer is Berlin | B/C | B or C | B and C | A, B | B & C
    | not B | ~B | B is wrong | B because it is large | B - Rome | A. Paris | A - Paris | E | AB
    | B2 | B's | an answer | I think | B/Rome | B+C | BB | none | B?C | a dog""",
}


@pytest.mark.parametrize("named", NAMED)
def test_letters_with_marks_and_words_around_them(named):
    for text in map(str.strip, NAMED[named].split(" | ")):
        assert letter(text, CITIES) == letter(f"\n{text} ", CITIES) == named, text
        assert exact_match(text, gold("B", choices=CITIES)) == (named == "B"), text


@pytest.mark.parametrize(
    "text, choices, named",
    [
        ("-1", ["1", "-1", "2", "A"], "B"),
        ("A -1", ["-1", "1", "2", "3"], "A"),
        ("A - 1", ["1", "-1", "2", "3"], "A"),
        ("A. 1", ["-1", "1", "2", "3"], None),
        ("B. 1", ["-1", "1", "2", "3"], "B"),
        ("Option A", ["x", "y", "Option A", "z"], "C"),
        ("B", ["B", "A", "C", "D"], "B"),
        ("the answer is A", ["a cat", "b"], "A"),
        ("B\u200b", CITIES, "B"),
        ("\u00ad", ["the", "\u00ad"], "B"),
        ("The answer is -5", ["5", "6"], None),
        (".5", ["5", "6"], None),
        ("1/2", ["12", "3"], None),
        ("10^2", ["102", "3"], None),
        ("-5", ["5", "6"], None),
        ("$6$", ["5", "6"], "B"),
        ("20%", ["20", "30"], "A"),
        ("x²", ["x2", "x²"], "B"),
        ("A cat", ["a cat", "b"], "A"),
        ("B) f(x)", ["x", "f(x)"], "B"),
        ("B", ["only one"], None),
        ("B\n\nParis", CITIES, "B"),
    ],
)
def test_letters_beside_options_that_look_like_them(text, choices, named):
    assert letter(text, choices) == named


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    [
        "the ",
        " is,",
        " answer.",
        " ",
        "(",
        "the  ",
        "\\boxed{",
        "it's",
        "B (",
        "B -",
        "1,1",
        "$ ",
        "\\frac{1}",
        "-",
    ],
)
def test_long_answers_take_no_longer_than_they_are(piece):
    start = time.process_time()
    for text in (piece * 20_000, piece * 20_000 + "!x", "B" + piece * 20_000 + "x"):
        letter(text, CITIES)
        number(text)
    assert time.process_time() - start < 5


REPEATED = (
    "<think> <think>your_thoughts </think> <answer>a</answer> <search>q</search> <a< \\boxed{ the_ (B 1,1"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("piece", REPEATED.split())
def test_every_reward_is_linear_in_the_text(name, piece):
    """Sixteen times the text may take about sixteen times as long. A quadratic rule takes 256 times as long;
    forty leaves room for a busy machine."""
    piece = piece.replace("_", " ")
    template = next(m.template for m in METHODS.values() if REWARDS[name].fits(m.template))
    questions = {"(B": gold("B", choices=CITIES), "1,1": gold("7", source="gsm8k")}

    def seconds(n):
        text = f"<think>a</think>{piece * n}<answer>{piece * n}</answer>"
        e = Episode(GOLD, [], stop="eos", segments=[Segment("model", [], text)], template=template)
        times = []
        for _ in range(3):
            start = time.process_time()
            REWARDS[name](e, questions.get(piece, GOLD), group=[e])
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(8000) < max(0.1, 40 * seconds(500))
