"""Rule-based rewards: how an answer is matched, how an episode is read, and what each method pays for it.

SEM (arXiv 2505.07903; the formula is second-hand, from reviews of the paper, and `f` on both terms is our
reading):

    R = f * 1[F1(a1) >= tau and s = 0 and t = 1] * F1(a1)  +  f * 1[F1(a1) < tau and u = 1] * F1(a2)

    first answer        searched    reward
    F1(a1) >= tau       no          F1(a1)
    F1(a1) >= tau       yes         0: the search was not needed
    F1(a1) < tau        yes         F1(a2)
    F1(a1) < tau        no          0
    broken structure                0

    f   the structure is valid, see `parse_episode`   s   it searched
    t   exactly one <think> and one <answer>          u   every search is well-formed and was answered
    a1  the first answer, before any search           a2  the last answer after the last result; none: F1 is 0

Two weaknesses are the formula's own, and are kept: a right draft followed by a search earns less than a junk
draft followed by the same search (so training logs `sandbag_suspects`), and nothing here says when to stop
searching.

The methods that SEM is compared with pay for the final answer; nothing in these says when to search:

    search-r1   EM          zerosearch   F1          research   F1, at least 0.1 for a sound format, else 0
    ssrl        0.9 EM + 0.1 format

Only what the policy wrote is ever read, segment by segment. Retrieved text cannot answer, close a tag or
break the structure. To add a reward, write a function and name it in the tables at the end."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from data import RESEARCH, SEARCH_R1, SEM, SSRL, Question, Template
from rollout import Episode

# ----------------------------------------------------------------------------------------------------------
# answer matching
#
# The official rules of the data sets, and where we leave them:
#
#   HotpotQA, 2WikiMultihopQA   SQuAD's normaliser; F1 is 0 where yes, no or noanswer meets anything else.
#                               2Wiki's script also takes aliases, from a file that we do not read
#   MuSiQue, NQ, Bamboogle      SQuAD's normaliser, the best over all golds. NQ's script takes accents apart
#                               first (NFD); here an accent in two characters differs from one in one
#   TriviaQA                    the same, but punctuation, and ‘ ’ and ´, becomes a blank
#   GSM8K                       the number, without commas, compared as text; officially what follows ####,
#                               here the only number of the answer. F1 is EM
#   MMLU                        the letter; an option written out counts as its letter. F1 is EM
#   PopQA                       its paper counts an answer that contains a gold; here EM, as in Search-R1
#   every set                   a text that it would leave nothing of keeps its articles, else its
#                               punctuation: "The", "A", "!!!" match only themselves, and "" nothing


def normalise(text: str, blanks: bool = False) -> str:
    """SQuAD's rule (lower case, no punctuation, no articles, single blanks), but what would leave nothing
    keeps its articles, and then its punctuation. `blanks`: punctuation becomes a blank (TriviaQA).

    The deviation is for titles such as "The", "A" and "!!!": by the plain rule they become "", and "" equals
    every other ""."""
    text = " ".join(text.lower().split())
    if blanks:
        bare = "".join(" " if c in string.punctuation + "\u2018\u2019\u00b4" else c for c in text)
    else:
        bare = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()) or " ".join(bare.split()) or text


def number(text: str) -> str | None:
    """The only number in a text, without commas; None if there is not exactly one."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    return found[0].replace(",", "") if len(found) == 1 else None


def letter(text: str, choices: list[str]) -> str | None:
    """The option that an answer names: "b", "(B)", "B. Paris" or "Paris" -> "B"; None if it names none.

    Letters are compared as letters: the rule above would delete "A" as an article. An option written out
    exactly comes first: by the rule above "-1" is "1"."""
    options = [(chr(65 + i), choice) for i, choice in enumerate(choices)]

    def spelt(text: str, form: Callable) -> list[str]:
        return [name for name, choice in options if form(choice) == form(text)]

    exact, loose = spelt(text, str.strip), spelt(text, normalise)
    found = re.fullmatch(r"\(?([A-Za-z])\)?(?:[.:)]\s*(.*))?", text.strip(), re.DOTALL)
    if found and found[1].upper() in dict(options):
        named, rest = found[1].upper(), found[2]
        if not rest or named in (spelt(rest, str.strip) or spelt(rest, normalise)):
            return named
        loose = []  # "A. Paris", and Paris is B: it names none, though without the article it is "Paris"
    names = exact or loose
    return names[0] if len(names) == 1 and text.strip() else None


def exact_match(text: str | None, question: Question) -> float:
    """1.0 if the answer equals one of the golds by the rule of its data set, or names the right option; else
    0.0. None is no answer."""
    if text is None:
        return 0.0
    if question.choices:
        return float(letter(text, question.choices) in question.answers)
    if question.source == "gsm8k":
        return float(number(text) in question.answers)
    blanks = question.source == "triviaqa"
    said = normalise(text, blanks)
    return float(said != "" and said in (normalise(gold, blanks) for gold in question.answers))


def f1(text: str | None, question: Question, yes_no: bool | None = None) -> float:
    """Token F1 after `normalise`, the best over the golds (SQuAD). Multiple choice and GSM8K have no partial
    credit.

    `yes_no`: yes, no and noanswer match only themselves; by default where the data set says so."""
    if text is None or question.choices or question.source == "gsm8k":
        return exact_match(text, question)
    yes_no = question.source in ("hotpotqa", "2wikimultihopqa") if yes_no is None else yes_no
    blanks = question.source == "triviaqa"
    said = normalise(text, blanks)
    return max((_f1(said, normalise(gold, blanks), yes_no) for gold in question.answers), default=0.0)


def _f1(text: str, gold: str, yes_no: bool) -> float:
    if yes_no and text != gold and {text, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    said, wanted = text.split(), gold.split()
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


# ----------------------------------------------------------------------------------------------------------
# structure


@dataclass
class Parse:
    """An episode as blocks. `shape` has a letter for each: T think, A answer, S search, R result, M a message
    of the environment, ! a mistake.

    A mistake is text outside the tags, an empty block, a tag without its partner, or a result block that the
    policy wrote though it is not its own search engine."""

    shape: str
    first: str | None  # a1: the first answer before any search
    last: str | None  # a2: the last answer after the last result; None without one
    valid: bool  # f, by SEM's grammar
    answer: str | None  # the final answer: in SEM a2 if it searched, else a1; elsewhere the last one

    @property
    def searched(self) -> bool:
        """s. A result counts too: the environment answers any query, also one whose block is a mistake."""
        return "S" in self.shape or "R" in self.shape


@lru_cache(maxsize=8)
def tag_pattern(template: Template) -> re.Pattern:
    return re.compile(rf"(</?(?:{'|'.join(template.tags)})>)")


def parse_episode(episode: Episode) -> Parse:
    """Reads the blocks of an episode, segment by segment, in linear time.

    Valid (f = 1) is  think answer  or  think answer (search result think?)+ answer , ended by an end
    token."""
    t = episode.template
    letters = {t.think: "T", t.answer: "A", t.search: "S", t.result: "R"}
    shape, first, last, final, forced = "", None, None, None, ""
    for i, segment in enumerate(episode.segments):
        if segment.kind == "env":
            shape, last = shape + "R", None
            continue
        if segment.kind == "retry":
            shape += "M"
            continue
        if segment.kind == "forced":  # the policy's next words belong into this block
            forced = segment.text
            continue
        replied = i + 1 < len(episode.segments)  # the segment ended with the tag that brought about a reply
        pieces = tag_pattern(t).split(forced + segment.text)  # text, tag, text, tag, .., text
        at, forced = 0, ""
        while at < len(pieces):
            piece = pieces[at]
            kind = piece[1:-1] if at % 2 else ""
            if at % 2 == 0:  # text outside the tags; behind the last tag it came along with its last token
                shape += "!" if piece.strip() and not (replied and at == len(pieces) - 1) else ""
            elif pieces[at + 2 : at + 3] == [f"</{kind}>"] and (kind != t.result or t.own_results):
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
            else:  # no partner, another tag in between, or a result of the policy's own
                shape += "!"
            at += 1
    valid = episode.stop == "eos" and re.fullmatch(r"TA((SRT?)+A)?", shape) is not None
    parse = Parse(shape, first, last, valid, final)
    if t.draft:
        parse.answer = last if parse.searched else first
    elif t.boxed:
        parse.answer = unbox(final or "")
    elif t.raw:
        # a trained policy may use its tags all the same
        parse.answer = final or model_text(episode).strip() or None
    return parse


def model_text(episode: Episode) -> str:
    return "".join(s.text for s in episode.segments if s.kind == "model")


def outline(episode: Episode) -> str:
    """What a format is read from: the policy's text, a dummy for every result, no messages."""
    t = episode.template
    dummy = {"env": f"<{t.result}>found</{t.result}>", "retry": ""}
    return "".join(dummy.get(s.kind, s.text) for s in episode.segments)


def unbox(text: str) -> str | None:
    r"""What the last \boxed{..} of a text holds, braces balanced; None without one."""
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
# The options are tau, kept, and group, the episodes of the same question; a rule takes what it needs.


def sem(
    episode: Episode, question: Question, *, tau: float = 0.5, kept: float | None = None, **_
) -> dict[str, float]:
    """SEM's reward, in [0, 1], and its parts f, s, t, u, f1_a1, f1_a2.

    `tau` is not published; 0.5 is our choice. `kept`, ours too, repairs the first weakness: a right draft
    followed by a search keeps (1 - kept) * F1(a2) in place of 0."""
    p = parse_episode(episode)
    f, s, t = p.valid, p.searched, p.shape.count("T") == 1 and p.shape.count("A") == 1
    u = p.shape.count("S") > 0 and p.shape.count("SR") == p.shape.count("S") == p.shape.count("R")
    f1_a1, f1_a2 = f1(p.first, question), f1(p.last, question)
    good = f1_a1 >= tau
    reward = f * (good and not s and t) * f1_a1 + f * (not good and u) * f1_a2
    if kept is not None and f and u and good:
        reward = (1 - kept) * f1_a2
    return {
        "reward": float(reward),
        "f": float(f),
        "s": float(s),
        "t": float(t),
        "u": float(u),
        "f1_a1": f1_a1,
        "f1_a2": f1_a2,
    }


def sem_kept(episode: Episode, question: Question, *, kept: float | None = None, **options):
    """SEM with the first weakness repaired (ours): `kept` is 0.1 unless given."""
    return sem(episode, question, kept=0.1 if kept is None else kept, **options)


def search_r1(episode: Episode, question: Question, **_) -> dict[str, float]:
    """EM of the answer (arXiv 2503.09516), in {0, 1}.

    The published code reads prompt and results too, and needs a second <answer>, since the first is the
    prompt's example: a document that holds one earns 1 there, and never here."""
    em = exact_match(parse_episode(episode).answer, question)
    return {"reward": em, "em": em}


def zerosearch(episode: Episode, question: Question, **_) -> dict[str, float]:
    """F1 of the answer (arXiv 2505.04588), in [0, 1]; their F1 gives yes and no no rule of their own."""
    p = parse_episode(episode)
    reward = f1(p.answer, question, yes_no=False)
    return {"reward": reward, "em": exact_match(p.answer, question)}


def research(episode: Episode, question: Question, *, paper: bool = False, **_) -> dict[str, float]:
    """The rule of ReSearch's code: 0 for a broken format, a missing end or a missing box, else F1, at least
    0.1. (There an empty box earns 0.1 too; here it is none.)

    `paper`: eq. 2 of arXiv 2503.19470, where F1 > 0 is paid in a broken format too. Sound are: as many
    <think> as </think>, one at least; one <answer>, with a box; behind every search its result."""
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
    em, shape = exact_match(parse_episode(episode).answer, question), ssrl_format(outline(episode))
    return {"reward": 0.9 * em + 0.1 * shape, "em": em, "f": shape}


def ssrl_format(text: str) -> float:
    """SSRL's format score, in [0, 1]: 0 for any fault below, else for T <think> and S <search> blocks
    min(1, T / 2) * min(T, S + 1) / max(T, S + 1).

    One thought and no search is 0.5, think search information think answer is 1."""
    text = text.strip()
    tags = re.findall(r"<(/?\w[^<>]*)>", text)
    blocks = {k: re.findall(rf"<{k}>(.*?)</{k}>", text, re.DOTALL) for k in SSRL.tags}
    t, s = tags.count("think"), tags.count("search")
    copied = {
        "think": "your thoughts",
        "answer": "your answer",
        "search": "your query",
        "information": "your information",
    }
    asks = [i for i, tag in enumerate(tags) if tag == "search"]
    faults = (
        {tag.removeprefix("/") for tag in tags} - set(SSRL.tags)  # a tag of another name
        or tags[:2] != ["think", "/think"]
        or tags[-2:] != ["answer", "/answer"]
        or len(tags) < 4
        or not text.startswith("<think>")
        or not text.endswith("</answer>")
        or any(not body.strip() or copied[k] in body for k in blocks for body in blocks[k])
        or any("\n" in body.strip() for body in blocks["search"])
        or any(tags[i + 1 : i + 4] != ["/search", "information", "/information"] for i in asks)
        or tags.count("information") != s
        or t > 8
    )
    return 0.0 if faults else min(1.0, t / 2) * min(t, s + 1) / max(t, s + 1)


def otc(episode: Episode, question: Question, *, group: list[Episode], **_) -> dict[str, float]:
    """EM times a factor for few searches within the group (OTC-GRPO, arXiv 2504.14870; its formula as two
    secondary sources have it, its constant c is not known, 1 here), in [0, 1].

    m searches here, n the fewest among the right episodes of the group."""
    em, m = exact_match(parse_episode(episode).answer, question), episode.searches
    right = [e.searches for e in group if exact_match(parse_episode(e).answer, question)]
    n = min(right, default=0)
    if n == 0:
        tool = math.cos(m * math.pi / (2 * m + 1))  # 1 at m = 0
    else:
        tool = math.sin(math.pi * m / (m + n))  # 1 at m = n
    return {"reward": em * tool, "em": em}


def flat(episode: Episode, question: Question, **_) -> dict[str, float]:
    """EM - 0.1 a search: the plain penalty that is published as a failure (arXiv 2605.29796, 2512.16883)."""
    em = exact_match(parse_episode(episode).answer, question)
    return {"reward": em - 0.1 * episode.searches, "em": em}


@dataclass(frozen=True)
class Method:
    template: Template
    reward: Callable
    simulated: bool = False  # while training, a simulator stands in for the search engine


METHODS = {  # --method
    "sem": Method(SEM, sem),
    "ssrl": Method(SSRL, ssrl),
    "search-r1": Method(SEARCH_R1, search_r1),
    "research": Method(RESEARCH, research),
    "zerosearch": Method(SEARCH_R1, zerosearch, simulated=True),
}
REWARDS = {name: method.reward for name, method in METHODS.items()}  # --reward; by default the method's own
REWARDS |= {"sem_kept": sem_kept, "research_paper": research_paper, "otc": otc, "flat": flat}


def dialect(method: str) -> str:
    """The first method that talks as this one does: methods of one dialect share a base model in the toy
    world."""
    return next(name for name, m in METHODS.items() if m.template == METHODS[method].template)


def sandbag_suspects(parts: list[dict[str, float]], group_size: int, tau: float = 0.5) -> tuple[int, int]:
    """(suspects, searched): of the episodes that searched although a sibling earned its reward without, those
    with a wrong draft.

    The share suspects / searched is logged while training: a policy that learns to draft junk in order to
    search drives it up."""
    suspects = searched = 0
    for i in range(0, len(parts), group_size):
        group = parts[i : i + group_size]
        if any(p["reward"] > 0 and not p["s"] for p in group):
            searched += sum(p["s"] == 1 for p in group)
            suspects += sum(p["s"] == 1 and p["f1_a1"] < tau for p in group)
    return suspects, searched
