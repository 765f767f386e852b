"""The prompt and the tags of each method, and how text becomes token ids.

Here: `Template` (a method's system prompt, its tags and its rules), the template of every method, and the
functions that turn prompts and results into ids: `render` and `encode_result`. Text that somebody else wrote
must not act as a tag or as a special token, so it goes through `neutralise` first.
Not here: the sampling itself (rollout.py), and reading an episode back (reward.py).

    ids = render(SEM, question, tokenizer)             # the prompt, through the tokenizer's own chat template
    ids = encode_result(docs, tokenizer, SEM)          # a <result> block that holds the documents
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache

from data import Doc, InputError, Question


@dataclass(frozen=True)
class Template:
    """The dialect of a method: its system prompt, the names of its tags, and the rules of an episode."""

    system: str  # the instructions; the question stands alone in the user's turn
    think: str = "think"
    answer: str = "answer"
    search: str = "search"
    result: str = "result"
    recall: str = ""  # a query to itself, beside those to the search engine (hybrid.py)
    memory: str = ""  # the result that the model writes to such a query
    draft: bool = False  # the model gives a first answer before any search, and may stop there
    boxed: bool = False  # the answer stands in \boxed{} inside the answer tags
    raw: bool = False  # there are no tags: the whole text is the answer
    self_search: bool = False  # the model writes the results itself; these tokens are not trained on
    answer_ends: bool = False  # </answer> ends the episode
    reminder: str = ""  # reminder after a turn without query and answer; empty: that turn ends the episode

    @property
    def tags(self) -> tuple[str, ...]:
        names = self.think, self.answer, self.search, self.result, self.recall, self.memory
        return tuple(filter(None, names))

    @property
    def own_result(self) -> str:
        """The tag of the results that the model writes itself, which are not trained on; empty: it writes
        none."""
        return self.result if self.self_search else self.memory


# The tags, their order and the rules are those of the papers; the wording of every prompt is ours. No prompt
# holds an example with placeholders, because small models copy placeholders. Search-R1 and ZeroSearch put
# their instructions into the user's message. Here they are the system message for every method, so that the
# user's message is the question alone.

ANSWER_RULE = "An answer is a few words, or the letter alone if options are given."

# SEM, arXiv 2505.07903. The prompt of the paper (its section 2.3) is not public in text form.
SEM = Template(
    "You answer questions, and you may use a search engine when your own knowledge is not enough. First "
    "reason between <think> and </think>, then give your best answer between <answer> and </answer>. If you "
    "are sure of it, stop there. If you are not, write a query between <search> and </search>; what the "
    "search engine finds comes back between <result> and </result>. After a result you may reason again "
    "between <think> and </think>, and search again with another query. When you know enough, give the final "
    f"answer between <answer> and </answer>. {ANSWER_RULE}",
    draft=True,
)

# arXiv 2503.09516 and github.com/PeterGriffinJin/Search-R1. ZeroSearch (arXiv 2505.04588) uses it as well.
SEARCH_R1 = Template(
    "You answer questions, and you may use a search engine. Reason between <think> and </think> every time "
    "you learn something new. If you find that some knowledge is missing, write a query between <search> and "
    "</search>; what the search engine finds comes back between <information> and </information>. Search as "
    "often as you want. When nothing more is needed, give the answer alone between <answer> and </answer>. "
    f"{ANSWER_RULE}",
    result="information",
    answer_ends=True,
    reminder="\nThat was neither a query nor an answer. I have to write a query between <search> and "
    "</search>, or the answer between <answer> and </answer>. Let me try again.\n",
)

# arXiv 2503.19470 and github.com/Agent-RL/ReCall, branch re-search.
RESEARCH = Template(
    "You solve questions step by step, with a search tool. First reason between <think> and </think>. "
    "When you need a fact, write a query between <search> and </search>; what the tool finds comes back "
    "between <result> and </result>, and you reason on. At the end write one answer between <answer> and "
    f"</answer>, with the final exact answer in \\boxed{{}} inside it. {ANSWER_RULE}",
    boxed=True,
)

# arXiv 2508.10874 and github.com/TsinghuaC3I/SSRL. It is Search-R1's instruction, except that the model
# plays the search engine too.
SSRL = Template(
    "You answer questions by searching your own knowledge. Reason between <think> and </think> every time "
    "you learn something new. If some knowledge is missing, write a query between <search> and </search>, "
    "and then yourself write what a search engine would find, its top results, between <information> and "
    "</information>. Search as often as you want. When nothing more is needed, reason a last time between "
    f"<think> and </think> and give the answer alone between <answer> and </answer>. {ANSWER_RULE}",
    result="information",
    self_search=True,
)

# The baselines. DIRECT is also the closed-book prompt that measures what a model knows. For that purpose it
# mentions neither a tool nor tags. Under the prompt of its method, a policy that has learnt to search may
# write a junk draft, which would make a question look unknown although the model knows the answer.
DIRECT = Template(f"Answer the question. Write only the answer, nothing else. {ANSWER_RULE}", raw=True)
COT = Template(
    "Answer the question. First reason step by step between <think> and </think>, then give the answer alone "
    f"between <answer> and </answer>. {ANSWER_RULE}"
)
RAG = Template(  # naive RAG as in FlashRAG (github.com/RUC-NLPIR/FlashRAG): one retrieval, no reasoning
    f"Answer the question by the documents given. Write only the answer, nothing else. {ANSWER_RULE}",
    raw=True,
)


# ------------------------------------------------------------------------------------------------------------
# from text to token ids


@lru_cache(maxsize=8)
def _forbidden(tokenizer, template: Template) -> tuple[re.Pattern, frozenset[int]]:
    """What foreign text must not contain: a pattern that matches the template's tags and the text of every
    added token, and the ids of the added tokens."""
    added = tokenizer.added_tokens_decoder  # id -> AddedToken
    texts = sorted((t.content for t in added.values() if t.content.strip()), key=len, reverse=True)
    tags = rf"<\s*(?:/\s*)?(?:{'|'.join(template.tags)})\s*(?:/\s*)?>"
    return re.compile("|".join([tags, *map(re.escape, texts)]), re.IGNORECASE), frozenset(added)


def neutralise(text: str, tokenizer, template: Template) -> str:
    """Returns `text` with a space after the first character of every tag of the template and of every added
    token of the tokenizer, so that it can neither close a tag nor become a special token. A text that holds
    such a tag or token is also normalised (NFKC), and loses its invisible characters.

    The tokenizer option `split_special_tokens=True` is not enough for this. It covers only tokens that are
    marked as special, so <tool_call> of Qwen2.5 and </s> of Phi-3 would still become single tokens."""
    pattern, _ = _forbidden(tokenizer, template)
    # A tokenizer may normalise its input: full-width letters become ASCII, and characters without width
    # disappear. So a tag is looked for in the text as the tokenizer may see it.
    plain = unicodedata.normalize("NFKC", "".join(c for c in text if unicodedata.category(c) != "Cf"))
    text = plain if pattern.search(plain) else text
    return pattern.sub(lambda m: m[0][0] + " " + m[0][1:], text)


@lru_cache(maxsize=4096)  # the episodes of a group write similar queries and get the same passages
def encode_foreign(text: str, tokenizer, template: Template) -> tuple[int, ...]:
    """Token ids of a text that somebody else wrote, such as a passage. They hold no tag of the template and
    no added token.

    Every run of whitespace becomes one blank, because some tokenizers have added tokens that consist of
    blanks or newlines."""
    _, added = _forbidden(tokenizer, template)
    # blanks are joined twice, because "< think>" has become "<  think>", with two blanks
    text = " ".join(neutralise(" ".join(text.split()), tokenizer, template).split())
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return tuple(i for i in ids if i not in added)  # no space can break an added token of one character


def passage(doc: Doc) -> str:
    """A document as a model sees it: "title: text", or the text alone if there is no title."""
    return f"{doc.title}: {doc.text}" if doc.title.strip() else doc.text


def encode_result(docs: list[Doc], tokenizer, template: Template, max_doc_tokens: int = 512) -> list[int]:
    """Token ids of a search result: the documents between the result tags, each as "title: text" and cut to
    `max_doc_tokens` tokens. The layout is our choice.

    Each document is cut before the tags are added. Cutting the finished block would lose the closing tag."""
    opening, newline, closing, nothing_found = _result_frame(tokenizer, template)
    ids = [*opening]
    for doc in docs:
        ids += encode_foreign(passage(doc), tokenizer, template)[:max_doc_tokens]
        ids += newline
    return ids + (closing if docs else nothing_found)


@lru_cache(maxsize=8)
def _result_frame(tokenizer, template: Template) -> list[list[int]]:
    """Token ids around the documents of a result: before the first, after each one, after the last, and in
    place of documents if there are none."""
    tag = template.result
    texts = f"\n<{tag}>\n", "\n", f"</{tag}>\n", f"No results.\n</{tag}>\n"
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def render(template: Template, question: Question, tokenizer) -> list[int]:
    """Token ids of a prompt: the template's system prompt and the question, through the tokenizer's own chat
    template.

    Some chat templates have no system role: they raise an error (Gemma's), or drop the message silently. Then
    the system prompt stands at the start of the user's message. Raises InputError if the prompt that the chat
    template makes still lacks the system prompt or the question.

    This is done once in an episode. Rendering the conversation again at a later turn would be unsafe: some
    chat templates drop the thoughts of earlier turns, and the ids would no longer be the sampled ones."""
    options = (f"\n{chr(65 + i)}. {choice}" for i, choice in enumerate(question.choices or []))
    text = neutralise(question.text + "".join(options), tokenizer, template)
    apart = [{"role": "system", "content": template.system}, {"role": "user", "content": text}]
    merged = [{"role": "user", "content": f"{template.system}\n\n{text}"}]
    for messages in (apart, merged):
        try:
            prompt = apply_chat_template(tokenizer, messages, add_generation_prompt=True)
            if template.system.strip() in prompt and text.strip() in prompt:
                return tokenizer(prompt, add_special_tokens=False).input_ids
            reason = "it leaves out the instructions or the question"
        except Exception as error:  # a template can raise anything: it is a program
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise InputError(f"the chat template of the tokenizer cannot be used: {reason}")


def set_date(tokenizer, text: str):
    """Sets the date, such as "2026-11-26", that the chat template of this tokenizer prints from now on."""
    tokenizer.run_date = text


@lru_cache(maxsize=8)
def clock(text: str) -> str:
    """A Jinja macro that takes the place of `strftime_now`, with which a chat template prints the date (Llama
    3.2, Granite). The function of transformers reads the clock, so a run that is resumed on another day would
    have other prompts. This one prints midnight of the day `text`.

    It goes in front of a template. Jinja removes the line break at its end, so the template itself is
    rendered as before. A datetime cannot be passed to it: transformers passes texts and numbers only."""
    day = datetime.fromisoformat(text)
    texts = {f"%{c}": day.strftime(f"%{c}") for c in "aAbBcdDeFfGgHhIjklMmnpPrRSTtUuVWwXxYyZz"}
    texts |= {f"%-{c[1]}": text.lstrip("0") or "0" for c, text in texts.items() if text.isdecimal()}
    return (
        "{% macro strftime_now(format) %}{% set ns = namespace(text=format.replace('%%', '\x01')) %}"
        f"{{% for code, text in {texts}.items() %}}"
        "{% set ns.text = ns.text.replace(code, text) %}{% endfor %}"
        "{{ ns.text.replace('\x01', '%') }}{% endmacro %}\n"
    )


def apply_chat_template(tokenizer, messages: list[dict[str, str]], **options) -> str:
    """The text that the tokenizer's chat template makes of the messages. A date in it is that of `set_date`,
    or today's."""
    chat_template = tokenizer.get_chat_template()
    if "strftime_now" in chat_template:
        chat_template = clock(getattr(tokenizer, "run_date", "") or date.today().isoformat()) + chat_template
    return tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **options)


def closing_token(tokenizer) -> int | None:
    """The id of the token with which the chat template closes an assistant's message: the first added token
    after its content. None if there is none, for instance because the closing is plain text."""
    word = "zebra"  # any word that no template contains
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": word}]
    try:
        text = apply_chat_template(tokenizer, messages)
    except Exception:  # as in `render`
        return None
    _, found, closing = text.rpartition(word)
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    ids = tokenizer(closing, add_special_tokens=False).input_ids if found else []
    return next((i for i in ids if i in added), None)
