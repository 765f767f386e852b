"""Rule-based rewards: how an answer is matched, how an episode is read, and what each method pays for it.

SEM (arXiv 2505.07903; the formula is second-hand, from reviews of the paper, and `f` on both terms is our
reading of it):

    R = f * 1[F1(a1) >= tau and s = 0 and t = 1] * F1(a1)  +  f * 1[F1(a1) < tau and u = 1] * F1(a2)

    first answer        searched    reward
    F1(a1) >= tau       no          F1(a1)
    F1(a1) >= tau       yes         0: the search was not needed
    F1(a1) < tau        yes         F1(a2)
    F1(a1) < tau        no          0
    broken structure                0

    f   the structure is valid, see `parse_episode`   s   the episode searched
    t   exactly one <think> and one <answer>          u   it searched, every search well-formed and answered
    a1  the first answer, before any search           a2  the last answer after the last result (none: F1 = 0)

The formula has two weaknesses, which are kept here because they belong to the method. If a policy searches, a
right draft earns 0 and a wrong draft earns F1(a2), so a junk draft pays; training logs `sandbag_suspects` to
show this. And nothing in the formula says when to stop searching.

The methods that SEM is compared with pay for the final answer, and nothing in them says when to search:

    search-r1     EM               zerosearch    F1
    ssrl          0.9 EM + 0.1 format
    research      F1, or 0.1 where F1 is 0; in a broken format 0

No reward reads retrieved text, so such a text cannot answer, close a tag or break the structure. To add a
reward, write a function and an entry of REWARDS, at the end of this file. (boundary.py has one for which half
of each group is sampled in another way.)

    reward = REWARDS["sem"](episode, episode.question, tau=0.5)["reward"]
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from data import Episode, Question, number
from prompts import RESEARCH, SEARCH_R1, SEM, SSRL, Template

# ----------------------------------------------------------------------------------------------------------
# answer matching
#
# Each data set has an official rule. These are the rules, and where this file differs from them:
#
#   HotpotQA, 2WikiMultihopQA   SQuAD's normaliser. F1 is 0 if one side is yes, no or noanswer and the other
#                               side differs. The script of 2Wiki also accepts aliases from another file,
#                               which is not read here.
#   MuSiQue, NQ, Bamboogle      SQuAD's normaliser, and the best score over all golds. The script of NQ also
#                               separates accents from letters (NFD). That is not done here, so an accented
#                               letter that is one character does not match letter plus accent.
#   TriviaQA                    the same, but punctuation, and ‘ ’ and ´, becomes a blank
#   GSM8K                       the value of the number, see data.number. The official rule compares the text
#                               after #### without its commas; here it is the only number of the answer, and
#                               18.00 is 18. F1 is EM.
#   MMLU                        the letter. An option written out counts as its letter. F1 is EM.
#   PopQA                       its paper accepts an answer that contains a gold; here EM, as in Search-R1
#   every data set              see `normalise` for answers that consist of articles or punctuation alone


def normalise(text: str, blanks: bool = False) -> str:
    """SQuAD's rule: lower case, no punctuation, no articles, single blanks. With `blanks`, punctuation
    becomes a blank instead of nothing (TriviaQA).

    There is one deviation. The plain rule turns titles such as "The", "A" and "!!!" into the empty text, and
    then all of them are equal. So a text that would become empty keeps its articles, and if it is still empty
    its punctuation too."""
    text = " ".join(text.lower().split())
    if blanks:
        bare = "".join(" " if c in string.punctuation + "\u2018\u2019\u00b4" else c for c in text)
    else:
        bare = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()) or " ".join(bare.split()) or text


# What may surround the letter of an option: marks, LaTeX such as \boxed{ and \text{, and a few words.
_MARKS = r"[\s()\[\]{}<>*_`$#\"'“”‘’«»「」【】（）|•;：。-]|\\[()\[\]]|\\(?:boxed|text|math|bf)[a-z]*\{"
_WORDS = (
    r"(?:the|my|correct|right|best|final|answer|ans|option|choice|letter|so|therefore|thus|hence|it['’]s|it|is)"
    r"\b[.:,!]?"
)
_BEFORE = re.compile(rf"(?:{_MARKS}|{_WORDS})*+", re.IGNORECASE)
_LETTER = re.compile(rf"(?:{_MARKS}|{_WORDS})*([A-Z])(?![^\W_]|['’]\w)(.*)", re.IGNORECASE | re.DOTALL)
_AFTER = re.compile(rf"(?:{_MARKS}|{_WORDS}|[.:,!])*+", re.IGNORECASE)  # *+: "is," can be read in two ways
_WIDE = {0xFF21 + 32 * case + i: 65 + 32 * case + i for case in range(2) for i in range(26)}  # Ｂ -> B


def letter(text: str, choices: list[str]) -> str | None:
    """The letter of the option that an answer names: "b", "(B)", "**B**", "the answer is B", "B - Paris" or
    "Paris" -> "B". None if it names no option, or two.

    A letter is compared as a letter, because `normalise` would delete "A" as an article. An option that
    matches exactly takes precedence over one that matches after `normalise`, and numbers have to be equal,
    because `normalise` makes "-1" and ".1" equal to "1"."""
    options = [(chr(65 + i), choice) for i, choice in enumerate(choices)]

    def exact(text: str) -> list[str]:
        return [name for name, choice in options if choice.strip() == text.strip()]

    def loose(text: str) -> list[str]:
        form, value = normalise(text), number(text)
        return [name for name, choice in options if normalise(choice) == form and number(choice) == value]

    def bare(text: str) -> str:
        return text[_BEFORE.match(text).end() :].rstrip(" \n)]}*_`$\"'.")

    if not text.strip():
        return None
    if (same := exact(text)) and len(text.strip()) > 1:
        return same[0] if len(same) == 1 else None
    names = same or loose(text)
    text = "".join(c for c in text.translate(_WIDE) if unicodedata.category(c) != "Cf")
    found = _LETTER.fullmatch(text)
    if found and found[1].upper() in dict(options):
        named, rest = found[1].upper(), found[2]
        if _AFTER.fullmatch(rest):
            return named
        # what separates the letter from its option
        mark = re.match(r"[\s)\]}*_`\"']*[.:,)\]\-–—：]?", rest)[0]
        option = rest[len(mark) :].strip(" \n*_`()[]\"'")
        # "B -1": the hyphen may belong to the option, so both readings are tried
        if named in (exact(rest) or exact(option) or loose(option) or loose(bare(option))):
            return named
        if mark.strip():
            return None  # "A. Paris" where Paris is B; `normalise` would drop the "A" as an article
    inner = bare(text)
    if not names and number(inner) == number(text):  # "The answer is Paris"; the hyphen of -5 is no mark
        names = exact(inner) or loose(inner)
    return names[0] if len(names) == 1 else None


def exact_match(text: str | None, question: Question) -> float:
    """1.0 if the answer equals one of the golds by the rule of its data set, or names the right option, else
    0.0. `text` is None if there is no answer."""
    if text is None:
        return 0.0
    if question.choices:
        return float(letter(text, question.choices) in question.answers)
    if question.source == "gsm8k":
        value = number(text)
        return float(value is not None and value in map(number, question.answers))
    blanks = question.source == "triviaqa"
    answer = normalise(text, blanks)
    return float(answer != "" and answer in (normalise(gold, blanks) for gold in question.answers))


def f1(text: str | None, question: Question, yes_no: bool | None = None) -> float:
    """Token F1 after `normalise`, the best over the golds (SQuAD, arXiv 1606.05250), in [0, 1]. Multiple
    choice and GSM8K have no partial credit.

    With `yes_no`, the answers yes, no and noanswer match only themselves. The default is the rule of the data
    set."""
    if text is None or question.choices or question.source == "gsm8k":
        return exact_match(text, question)
    yes_no = question.source in ("hotpotqa", "2wikimultihopqa") if yes_no is None else yes_no
    blanks = question.source == "triviaqa"
    answer = normalise(text, blanks)
    return max((_f1(answer, normalise(gold, blanks), yes_no) for gold in question.answers), default=0.0)


def _f1(text: str, gold: str, yes_no: bool) -> float:
    if yes_no and text != gold and {text, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    answer_words, gold_words = text.split(), gold.split()
    common = sum((Counter(answer_words) & Counter(gold_words)).values())
    return 2 * common / (len(answer_words) + len(gold_words)) if common else 0.0


# ----------------------------------------------------------------------------------------------------------
# structure


@dataclass
class Parse:
    """What `parse_episode` found. `shape` has one letter for each block: T think, A answer, S search, R
    result, Q a query of the model to itself, O its own result, M a reminder of the environment, ! a mistake.

    A mistake is text outside the tags, an empty block, a tag without its partner, or a result block that the
    policy wrote although its method has a search engine."""

    shape: str
    first: str | None  # a1: the first answer before any search
    last: str | None  # a2: the last answer after the last result
    valid: bool  # f, by SEM's grammar
    answer: str | None  # the final answer: the last one; for SEM a2 if the episode searched, else a1

    @property
    def searched(self) -> bool:
        """s. A result counts as well, because the environment may answer a query whose block is a mistake."""
        return "S" in self.shape or "R" in self.shape


@lru_cache(maxsize=8)
def tag_pattern(template: Template) -> re.Pattern:
    return re.compile(rf"(</?(?:{'|'.join(template.tags)})>)")


def parse_episode(episode: Episode) -> Parse:
    """Reads the blocks of an episode, segment by segment.

    An episode is valid (f = 1) if an end token ended it and its blocks are

        think answer    or    think answer (search result think?)+ answer"""
    t = episode.template
    letters = dict(zip(t.tags, "TASRQO", strict=False))
    shape, first, last, final, forced = "", None, None, None, ""
    for i, segment in enumerate(episode.segments):
        if segment.kind == "env":
            shape, last = shape + "R", None
            continue
        if segment.kind == "reminder":
            shape += "M"
            continue
        if segment.kind == "forced":  # an opening tag: what the policy writes next belongs to its block
            forced = segment.text
            continue
        replied = i + 1 < len(episode.segments)  # the environment replied to the end of this segment
        pieces = tag_pattern(t).split(forced + segment.text)  # text, tag, text, tag, .., text
        at, forced = 0, ""
        while at < len(pieces):
            piece = pieces[at]
            kind = piece[1:-1] if at % 2 else ""
            if at % 2 == 0:  # text outside the tags
                # The token that ended the last tag may hold further text, which is no mistake.
                leftover = replied and at == len(pieces) - 1
                shape += "!" if piece.strip() and not leftover else ""
            elif kind == t.memory:  # what stands in it is no block, as in rollout.mask_result
                end = pieces.index(f"</{kind}>", at) if f"</{kind}>" in pieces[at:] else len(pieces)
                shape += "O" if "".join(pieces[at + 1 : end]).strip() and end < len(pieces) else "!"
                at = end
            elif pieces[at + 2 : at + 3] == [f"</{kind}>"] and (kind != t.result or t.self_search):
                body = pieces[at + 1].strip()
                shape += letters[kind] if body else "!"
                if kind == t.answer:
                    final = body or None
                    if body:
                        first = body if first is None and "S" not in shape and "R" not in shape else first
                        last = body if "R" in shape else None
                elif kind == t.result:
                    last = None
                at += 2
            else:  # a tag without partner, another tag inside the block, or a result that the policy wrote
                shape += "!"
            at += 1
    valid = episode.stop == "eos" and re.fullmatch(r"TA((SRT?)+A)?", shape) is not None
    parse = Parse(shape, first, last, valid, final)
    if t.draft:
        parse.answer = last if parse.searched else first
    elif t.boxed:
        parse.answer = unbox(final or "")
    elif t.raw:
        # A policy that was trained on tags may use them even where the prompt does not mention them.
        parse.answer = final or model_text(episode).strip() or None
    return parse


def model_text(episode: Episode) -> str:
    return "".join(s.text for s in episode.segments if s.kind == "model")


def outline(episode: Episode) -> str:
    """The text that a format rule is checked on: the policy's text, a placeholder for every result, and no
    reminders."""
    t = episode.template
    replaced = {"env": f"<{t.result}>found</{t.result}>", "reminder": ""}
    return "".join(replaced.get(s.kind, s.text) for s in episode.segments)


def unbox(text: str) -> str | None:
    r"""The content of the last \boxed{..} of a text, with balanced braces. None if there is none."""
    start = text.rfind(r"\boxed{")
    depth = 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 7 : i].strip() or None
    return None


# ----------------------------------------------------------------------------------------------------------
# rewards: (episode, question, **options) -> {"reward": .., and its named parts}
#
# The options are tau, search_cost, and group (the episodes of the same question whose searches did not fail).
# A rule names the options that it needs and ignores the others.


def sem(
    episode: Episode, question: Question, *, tau: float = 0.5, search_cost: float | None = None, **_
) -> dict[str, float]:
    """SEM's reward, in [0, 1], and its parts f, s, t, u, f1_a1, f1_a2.

    `tau` is not published; 0.5 is our choice. `search_cost` (--sem_kept) is a repair of ours for the junk
    draft: a right draft that is followed by a search earns (1 - search_cost) * F1(a2) instead of 0. A junk
    draft still earns more, but by that share only."""
    p = parse_episode(episode)
    f, s, t = p.valid, p.searched, p.shape.count("T") == 1 and p.shape.count("A") == 1
    u = p.shape.count("S") > 0 and p.shape.count("SR") == p.shape.count("S") == p.shape.count("R")
    f1_a1, f1_a2 = f1(p.first, question), f1(p.last, question)
    good = f1_a1 >= tau
    reward = f * (good and not s and t) * f1_a1 + f * (not good and u) * f1_a2
    if search_cost is not None and f and u and good:
        reward = (1 - search_cost) * f1_a2
    flags = {"f": float(f), "s": float(s), "t": float(t), "u": float(u)}
    return {"reward": float(reward), **flags, "f1_a1": f1_a1, "f1_a2": f1_a2}


def search_r1(episode: Episode, question: Question, **_) -> dict[str, float]:
    """EM of the answer (arXiv 2503.09516), in {0, 1}.

    The published code searches the whole text for the last <answer>, prompt and results included, so that a
    document with an answer block can earn 1. Here only the policy's text is read."""
    em = exact_match(parse_episode(episode).answer, question)
    return {"reward": em, "em": em}


def zerosearch(episode: Episode, question: Question, **_) -> dict[str, float]:
    """F1 of the answer (arXiv 2505.04588), in [0, 1]. This F1 treats yes and no like any other word."""
    p = parse_episode(episode)
    reward = f1(p.answer, question, yes_no=False)
    return {"reward": reward, "em": exact_match(p.answer, question)}


def research(episode: Episode, question: Question, *, paper: bool = False, **_) -> dict[str, float]:
    """The rule of ReSearch's code, in [0, 1]: 0 for a broken format, a missing end token or a missing box,
    else F1, or 0.1 if F1 is 0. So an F1 of 0.05 earns less than one of 0, as in the code. (In the code an
    empty box earns 0.1 too; here it counts as missing.)

    A format is sound under three conditions: there are as many <think> as </think>, and at least one; there
    is exactly one <answer>, which holds a box; and a result follows every search. `paper` selects eq. 2 of
    arXiv 2503.19470 instead, where F1 is paid in a broken format too."""
    t, p = episode.template, parse_episode(episode)
    text = outline(episode)
    turns = re.findall(rf"</?(?:{t.search}|{t.result})>", text)
    once = [f"<{t.search}>", f"</{t.search}>", f"<{t.result}>", f"</{t.result}>"]
    sound = text.count(f"<{t.think}>") == text.count(f"</{t.think}>") >= 1
    sound &= text.count(f"<{t.answer}>") == text.count(f"</{t.answer}>") == 1
    sound &= turns == once * (len(turns) // 4) and p.answer is not None and episode.stop == "eos"
    score = f1(p.answer, question, yes_no=True) if sound or paper else 0.0
    em = exact_match(p.answer, question)
    return {"reward": score or 0.1 * sound, "f": float(sound), "f1": score, "em": em}


def research_paper(episode: Episode, question: Question, **options) -> dict[str, float]:
    return research(episode, question, paper=True, **options)


def ssrl(episode: Episode, question: Question, **_) -> dict[str, float]:
    """0.9 EM + 0.1 format (SSRL's code, arXiv 2508.10874), in [0, 1]."""
    em, form = exact_match(parse_episode(episode).answer, question), ssrl_format(outline(episode))
    return {"reward": 0.9 * em + 0.1 * form, "em": em, "f": form}


def block_bodies(text: str, tag: str) -> list[str]:
    """What the pattern <tag>(.*?)</tag> finds, in linear time: the pattern would search for the end of the
    text again at each opening tag without a partner."""
    bodies, start = [], None
    for found in re.finditer(rf"<(/?){tag}>", text):
        if not found[1]:
            start = found.end() if start is None else start
        elif start is not None:
            bodies.append(text[start : found.start()])
            start = None
    return bodies


def ssrl_format(text: str) -> float:
    """SSRL's format score, in [0, 1]. It is 0 if the text has one of the faults listed below. Otherwise, with
    T <think> blocks and S <search> blocks, it is

        min(1, T / 2) * min(T, S + 1) / max(T, S + 1)

    so that one thought without a search gives 0.5, and think search information think answer gives 1."""
    text = text.strip()
    tags = re.findall(r"<(/?\w[^<>]*)>", text)
    blocks = {k: block_bodies(text, k) for k in SSRL.tags}
    t, s = tags.count("think"), tags.count("search")
    placeholders = dict(think="thoughts", answer="answer", search="query", information="information")
    searches = [i for i, tag in enumerate(tags) if tag == "search"]
    faults = (
        {tag.removeprefix("/") for tag in tags} - set(SSRL.tags)  # a tag of another name
        or tags[:2] != ["think", "/think"]
        or tags[-2:] != ["answer", "/answer"]
        or len(tags) < 4
        or not text.startswith("<think>")
        or not text.endswith("</answer>")
        or any(not body.strip() or f"your {placeholders[k]}" in body for k in blocks for body in blocks[k])
        or any("\n" in body.strip() for body in blocks["search"])
        or any(tags[i + 1 : i + 4] != ["/search", "information", "/information"] for i in searches)
        or tags.count("information") != s
        or t > 8
    )
    return 0.0 if faults else min(1.0, t / 2) * min(t, s + 1) / max(t, s + 1)


def otc(episode: Episode, question: Question, *, group: list[Episode], **_) -> dict[str, float]:
    """EM times a factor, in [0, 1] (OTC-GRPO, arXiv 2504.14870, second-hand). The factor is 1 if no right
    episode of the group has fewer searches. The constant c of the paper is not known; it is taken to be 1.

    With m searches in this episode, and n the fewest among the right episodes of the group, the factor is

        n = 0: cos(m pi / (2 m + 1))        n > 0: sin(m pi / (m + n))"""
    em, m = exact_match(parse_episode(episode).answer, question), episode.searches
    right = [e.searches for e in group if exact_match(parse_episode(e).answer, question)]
    n = min(right, default=0)
    factor = math.sin(math.pi * m / (m + n)) if n else math.cos(m * math.pi / (2 * m + 1))
    return {"reward": em * factor, "em": em}


def flat(episode: Episode, question: Question, **_) -> dict[str, float]:
    """EM - 0.1 for each search: a plain penalty, which two papers report to fail (arXiv 2605.29796,
    2512.16883)."""
    em = exact_match(parse_episode(episode).answer, question)
    return {"reward": em - 0.1 * episode.searches, "em": em}


def ikea(episode: Episode, question: Question, **_) -> dict[str, float]:
    """The rule of IKEA's code (arXiv 2505.07596), in [-1, 1.6]: 1.6, 1.4, 1.2 or 1 for a right answer after
    0, 1, 2 or more searches; for a wrong one 0.05 after a search, and 0 without; -1 for a broken format.

    A format is broken if there is no <think> or no </think>, if a query was empty, if the environment had to
    remind the policy (in dialects with a reminder), or if one of the words think, search and answer stands
    directly inside another bracket, as in (think or answer]. (The code reads results and the prompt's example
    too, and counts queries that were not answered.)"""
    t, em = episode.template, exact_match(parse_episode(episode).answer, question)
    text, names = model_text(episode), f"(?:{t.think}|{t.search}|{t.answer})"
    sound = f"<{t.think}>" in text and f"</{t.think}>" in text and episode.stop != "bad_query"
    sound &= all(s.kind != "reminder" for s in episode.segments)
    sound &= re.search(rf"[(\[]{names}|{names}[)\]]", text) is None
    right, wrong = 1 + max(0.0, 0.6 - 0.2 * episode.searches), 0.05 * (episode.searches > 0)
    return {"reward": (right if em else wrong) if sound else -1.0, "f": float(sound), "em": em}


@dataclass(frozen=True)
class Reward:
    """An entry of REWARDS, called like the function in it."""

    function: Callable
    fits: Callable[[Template], bool] = lambda template: True  # whether the reward can read this dialect
    halves: bool = False  # half of each group is sampled without the search engine, see boundary.py
    trains_off: bool = True  # that half is trained on too
    priced: bool = False  # a search can cost something, see alarms.py

    def __call__(self, episode: Episode, question: Question, **options) -> dict[str, float]:
        return self.function(episode, question, **options)


REWARDS = {  # --reward
    "sem": Reward(sem, fits=lambda template: template.draft, priced=True),
    "search-r1": Reward(search_r1),
    "zerosearch": Reward(zerosearch),
    "research": Reward(research, fits=lambda template: template.boxed),
    "research_paper": Reward(research_paper, fits=lambda template: template.boxed),
    "ssrl": Reward(ssrl, fits=lambda template: template.self_search),
    # what follows does not count self-searches
    "otc": Reward(otc, fits=lambda template: not template.self_search, priced=True),
    "flat": Reward(flat, fits=lambda template: not template.self_search, priced=True),
    "ikea": Reward(ikea, fits=lambda template: not template.self_search, priced=True),
}


@dataclass(frozen=True)
class Method:
    template: Template
    reward: Callable  # an entry of REWARDS, or any function with the same arguments
    simulated: bool = False  # while training, a simulator takes the place of the search engine


METHODS = {  # --method
    "sem": Method(SEM, REWARDS["sem"]),
    "ssrl": Method(SSRL, REWARDS["ssrl"]),
    "search-r1": Method(SEARCH_R1, REWARDS["search-r1"]),
    "research": Method(RESEARCH, REWARDS["research"]),
    "zerosearch": Method(SEARCH_R1, REWARDS["zerosearch"], simulated=True),
}


def dialect(method: str) -> str:
    """The first method with the same template: such methods share a base model in the toy world."""
    return next(name for name, m in METHODS.items() if m.template == METHODS[method].template)
