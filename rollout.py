"""Batched sampling through the search loop: questions in, token-exact episodes out. No `generate`, no
re-tokenising, no re-prefilling.

Two groups of two rows, and slots in the cache for one of them (columns are tokens, not to scale):

    row 0   PPPP think.. answer.. search.. ~~~~ RRRR think.. answer.. <eos>
    slot    0000 0000000000000000000000000 1111 1111 0000000000000000000000
    mask    0000 1111111111111111111111111      0000 1111111111111111111111
    row 1   pppp think.. answer.. think.. answer.. <eos>
    slot    1111 1111111111111111111111111 0000000000000
    row 2                                                                   PPPP think..

    P  a prompt, prefilled once for the group      p  the same, copied from row 0's slot
    R  a result, appended as one ragged prefill    ~  waits for it; the rows that decode have the first slots
    mask  true where the policy chose the token and learns from it

A row stops for one of these reasons (`Episode.stop`):

    eos             an end token               turns       it asked for one search more than the budget
    length          token or context budget    bad_query   an empty query, or </search> without <search>
    search_failed   the retriever failed: the episode tells nothing of the policy, the update leaves it out
    answer          </answer>, where the template says that it ends the episode

Sampling is softmax(logits / temperature) over the tokenizer's vocabulary and nothing else: no top-k, no
penalty, and no generation_config of a checkpoint. A row draws from a random stream of its own, keyed by
(seed, step, row), one number a token, so what it samples depends neither on its slot nor on its batch mates.

    episodes = rollout(model, tokenizer, SEM, questions, group_size=8, retriever=BM25(docs))
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from tqdm import tqdm

from data import SEM, DataError, Question, Template, encode_result, render
from retriever import RetrieverError
from runner import Runner, SlotCache

SERVE_EVERY = 8  # decode steps between two looks at the rows that wait; not a time, so a run can be repeated
PREFILL_TOKENS = 16384  # padded tokens of one prefill pass: bounds its activations


@dataclass
class Segment:
    kind: str  # "model": the policy wrote it; "env": a result; "retry" and "forced": see Template, `rollout`
    ids: list[int]
    text: str  # the ids decoded; of a model segment without the end token


@dataclass
class Episode:
    """One rollout, token-exact: `ids` are the segments' ids one after the other, and nothing in them was ever
    decoded and encoded."""

    question: Question
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)  # everything after the prompt
    loss_mask: list[bool] = field(default_factory=list)  # per id: the policy chose it and is trained on it
    logps: list[float] = field(default_factory=list)  # per id, under the sampling distribution; env text: 0.0
    segments: list[Segment] = field(default_factory=list)
    searches: int = 0  # searches that the environment answered
    stop: str = ""
    template: Template = SEM  # how it talks: whoever reads the segments needs to know


@dataclass(eq=False)
class Row:
    """An episode in flight."""

    episode: Episode
    cap: int  # tokens it may hold after the prompt, results included
    uniforms: list[float]  # its random stream: one number for each token it samples
    length: int = 0  # positions of the cache that are filled
    sampled: list[int] = field(
        default_factory=list
    )  # the open segment; its last token is not in the cache yet
    query: str | None = None  # what it asks, if it waits for a result
    reply: Segment | None = None  # what it is told next, if it waits to go on
    turns: int = 0  # results and retries so far
    inside: bool = False  # of a result block of its own
    uncertainty: float | None = None  # of its last query, see `Sampler.rose`

    @property
    def waits(self) -> bool:
        return self.query is not None or self.reply is not None


def rollout(
    model,
    tokenizer,
    template: Template,
    questions: list[Question],
    *,
    group_size: int = 1,
    retriever=None,
    topk: int = 3,
    max_searches: int = 4,
    max_completion_length: int = 1024,
    max_doc_tokens: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
    slots: int | None = None,
    force_search: bool = False,
    rising: bool = False,
    counts: dict | None = None,
    progress: str | None = None,
) -> list[Episode]:
    """Samples `group_size` episodes of every question: [question 0, question 0, .., question 1, ..].

    temperature 0 is greedy. `retriever.search(queries, topk)` returns a list of documents for each query, or
    raises RetrieverError; without a retriever any search is one too many. A retriever with `simulates` true
    gets the questions too, as a third argument; one with `remote` true is asked in a thread while the other
    rows go on. At most `slots` rows are in flight (default: all), whole groups at a time. Where the
    template's model writes its own results, `max_searches` of them are replaced by real ones if there is a
    retriever (Sim2Real, arXiv 2508.10874); with `rising` only the first, and those whose query was less
    certain than the one before. `force_search` puts a <search> behind the first answer
    (the first thought, where the template has no draft): tokens that are not the policy's.
    `counts`, if given, is increased by the exact numbers of prefill_tokens and decode_tokens that the model
    was fed. Raises DataError if a prompt leaves no room in the model's context."""
    prompts = [render(template, question, tokenizer) for question in questions]
    caps = [room(model, p, q, max_completion_length) for p, q in zip(prompts, questions, strict=True)]
    rows = [
        Row(
            Episode(question, prompt, template=template),
            cap,
            uniforms(cap, seed, step, number * group_size + member),
        )
        for number, (question, prompt, cap) in enumerate(zip(questions, prompts, caps, strict=True))
        for member in range(group_size)
    ]
    slots = min(len(rows), max(1, (slots or len(rows)) // group_size) * group_size)
    max_len = max((len(p) + cap for p, cap in zip(prompts, caps, strict=True)), default=0)
    cache = SlotCache(model.config, slots, max_len, model.device, model.dtype)
    sampler = Sampler(
        model=model,
        tokenizer=tokenizer,
        template=template,
        retriever=retriever,
        topk=topk,
        max_searches=max_searches,
        max_doc_tokens=max_doc_tokens,
        force_search=force_search,
        rising=rising,
        cache=cache,
        runner=Runner(model, cache, len(tokenizer), temperature, records=model.device.type == "cuda"),
        table=[None] * slots,
        bar=tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False),
    )
    was_training = model.training
    model.eval()  # no dropout while sampling
    try:
        sampler.run(deque(rows[i : i + group_size] for i in range(0, len(rows), group_size)))
    finally:
        model.train(was_training)
        sampler.bar.close()
    for name, count in sampler.counts.items():
        if counts is not None:
            counts[name] = counts.get(name, 0) + count
    return [row.episode for row in rows]


@dataclass
class Sampler:
    """One rollout at work: a table that says which row holds which slot of the cache."""

    model: torch.nn.Module
    tokenizer: object
    template: Template
    retriever: object
    topk: int
    max_searches: int
    max_doc_tokens: int
    force_search: bool
    rising: bool
    cache: SlotCache
    runner: Runner
    table: list[Row | None]  # slot -> row
    bar: tqdm
    counts: dict = field(default_factory=lambda: {"prefill_tokens": 0, "decode_tokens": 0})
    call: tuple[list[Row], Future] | None = None  # what a remote retriever is at
    searches: int = 0  # of the rows that have ended

    def __post_init__(self):
        self.ends = end_ids(self.model, self.tokenizer)
        self.closers = closers(self.tokenizer)
        self.retry = self.tokenizer(self.template.retry, add_special_tokens=False).input_ids
        self.force = self.tokenizer(f"\n<{self.template.search}>", add_special_tokens=False).input_ids

    @torch.inference_mode()
    def run(self, queue: deque[list[Row]]):
        step = 0
        while queue or any(self.table):
            self.admit(queue)
            waiting = [slot for slot, row in enumerate(self.table) if row and row.waits]
            idle = len(waiting) == sum(row is not None for row in self.table)
            if waiting and (step % SERVE_EVERY == 0 or idle):
                self.serve(waiting, idle)
            if n := self.settle():
                self.decode(self.table[:n])
            step += 1

    def admit(self, queue: deque[list[Row]]):
        """Gives free slots to whole groups of the queue. A prompt is prefilled once; the group's other slots
        get a copy."""
        free = [slot for slot, row in enumerate(self.table) if row is None]
        groups = []  # (the group's slots, the prompt)
        while queue and len(free) >= len(queue[0]):
            group = queue.popleft()
            slots, free = free[: len(group)], free[len(group) :]
            for slot, row in zip(slots, group, strict=True):
                self.table[slot] = row
            groups.append((slots, group[0].episode.prompt_ids))
        for part in by_tokens(groups):
            logits = self.prefill([slots[0] for slots, _ in part], [prompt for _, prompt in part])
            for slots, prompt in part:
                self.cache.copy(slots[0], slots[1:], len(prompt))
                for slot in slots:
                    self.table[slot].length = len(prompt)
                self.counts["prefill_tokens"] += len(prompt)
            rows = [self.table[slot] for slots, _ in part for slot in slots]
            copies = torch.tensor([len(slots) for slots, _ in part], device=logits.device)
            self.take(rows, *self.runner.draw(logits.repeat_interleave(copies, 0), numbers(rows)))

    def serve(self, waiting: list[int], idle: bool):
        """One retriever call for all rows that ask; what a row is told follows its last token as one ragged
        prefill. `idle`: no row decodes."""
        asking = [self.table[slot] for slot in waiting if self.table[slot].query is not None]
        if getattr(self.retriever, "remote", False):
            answered = self.overlap(asking, idle and len(asking) == len(waiting))
        else:
            answered = zip(asking, self.search(asking) if asking else [], strict=True)
        for row, docs in answered:
            if docs is None:
                self.finish(row, "search_failed")
            else:
                ids = encode_result(docs, self.tokenizer, self.template, self.max_doc_tokens)
                row.reply = Segment("env", ids, decode(self.tokenizer, ids))
        told = []  # (slot, the row's last token and what it is told)
        for slot in waiting:
            if (row := self.table[slot]) is None or row.reply is None:
                continue
            episode, reply = row.episode, row.reply
            if len(episode.ids) + len(reply.ids) >= row.cap:
                self.finish(row, "length")  # dropped, not cut: half a result has no closing tag
                continue
            told.append((slot, [row.sampled[-1], *reply.ids]))
            self.end_segment(row)
            episode.segments.append(reply)
            episode.ids += reply.ids
            episode.loss_mask += [False] * len(reply.ids)
            episode.logps += [0.0] * len(reply.ids)
            episode.searches += row.query is not None
            row.turns += reply.kind != "forced"
            row.query = row.reply = None
        for part in by_tokens(told):
            self.counts["prefill_tokens"] += sum(len(chunk) - 1 for _, chunk in part)
            self.counts["decode_tokens"] += len(part)
            slots = [slot for slot, _ in part]
            rows = [self.table[slot] for slot in slots]
            logits = self.prefill(slots, [chunk for _, chunk in part])
            self.take(rows, *self.runner.draw(logits, numbers(rows)))

    def overlap(self, asking: list[Row], wait: bool) -> Iterable:
        """(row, documents) of the rows that a remote retriever has answered, after a `wait` if so told. It
        works in a thread, one call at a time: who asks meanwhile is in the next one."""
        answered = []
        if self.call and (wait or self.call[1].done()):
            asked, documents = self.call
            answered, self.call = zip(asked, documents.result(), strict=True), None
            asking = [row for row in asking if row not in asked]
        if asking and not self.call:
            self.call = asking, ThreadPoolExecutor(1).submit(self.search, asking)
        return answered

    def settle(self) -> int:
        """Moves the rows that decode into the first slots, so that a decode step works on a view of the
        cache. Returns how many."""
        decoding = [row is not None and not row.waits for row in self.table]
        n = sum(decoding)
        holes = [slot for slot in range(n) if not decoding[slot]]
        strays = [slot for slot in range(n, len(decoding)) if decoding[slot]]
        if holes:
            self.cache.swap(holes, strays, max(row.length for row in self.table if row))
            for hole, stray in zip(holes, strays, strict=True):
                self.table[hole], self.table[stray] = self.table[stray], self.table[hole]
        return n

    def decode(self, rows: list[Row]):
        """One token more for the rows in the first slots."""
        self.counts["decode_tokens"] += len(rows)
        tokens, positions = [row.sampled[-1] for row in rows], [row.length for row in rows]
        drawn = self.runner.decode(tokens, positions, numbers(rows))
        for row in rows:
            row.length += 1
        self.take(rows, *drawn)

    def prefill(self, slots: list[int], chunks: list[list[int]]) -> torch.Tensor:
        """Feeds each slot its chunk of ids, behind what its row has in the cache, and returns the last logits
        [rows, vocab] fp32."""
        rows = [self.table[slot] for slot in slots]
        logits = self.runner.prefill(slots, [row.length for row in rows], chunks)
        for row, chunk in zip(rows, chunks, strict=True):
            row.length += len(chunk)
        return logits

    def take(self, rows: list[Row], tokens: torch.Tensor, logps: torch.Tensor):
        """Gives each row its next token, and acts on it."""
        for row, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
            episode = row.episode
            episode.ids.append(token)
            episode.loss_mask.append(not row.inside)
            episode.logps.append(logp)
            row.sampled.append(token)
            if token in self.ends:
                self.misstep(row, "eos")
            elif token in self.closers:
                self.tag(row)
            if not episode.stop and not row.waits and len(episode.ids) >= row.cap:
                self.finish(row, "length")

    def tag(self, row: Row):
        """The row's last token may have completed a tag; acts on those that mean something. What the token
        holds beyond the tag (">." is one token) stays, unread."""
        t = self.template
        if t.own_results:
            self.mask_result(row)
        if row.inside:
            return
        if self.completed(row, f"</{t.search}>"):
            self.ask(row)
        elif t.answer_ends and self.completed(row, f"</{t.answer}>"):
            if f"<{t.answer}>" in decode(self.tokenizer, row.sampled):
                self.finish(row, "answer")
            else:
                self.misstep(row, "answer")
        elif self.force_search and not row.episode.segments:
            if self.completed(row, f"</{t.answer if t.draft else t.think}>"):
                row.reply = Segment("forced", self.force, f"\n<{t.search}>")

    def completed(self, row: Row, tag: str) -> int:
        """How many of the row's last tokens hold `tag`, if the last one completed it; else 0."""
        tail = row.sampled[-len(tag) :]  # a token has at least one character
        if tag not in decode(self.tokenizer, tail):
            return 0
        n = next(n for n in range(1, len(tail) + 1) if tag in decode(self.tokenizer, tail[-n:]))
        return 0 if tag in decode(self.tokenizer, tail[-n:-1]) else n

    def mask_result(self, row: Row):
        """Takes a result block that the model writes itself out of the loss: every token of which any
        character lies in the block, tags included; a block that is never closed goes on to the end."""
        if row.inside:
            row.inside = not self.completed(row, f"</{self.template.result}>")
        elif n := self.completed(row, f"<{self.template.result}>"):
            row.inside = True
            row.episode.loss_mask[-n:] = [False] * n

    def ask(self, row: Row):
        """The row has just closed a search tag."""
        t = self.template
        closed = f"</{t.search}>"
        before = decode(self.tokenizer, row.sampled).rpartition(closed)[0]
        _, earlier, before = before.rpartition(closed)  # a query that the model was left to answer is over
        _, opened, query = before.rpartition(f"<{t.search}>")
        segments = row.episode.segments
        if segments and segments[-1].kind == "forced" and not opened and not earlier:
            opened = query = before
        query = query.strip() if opened else ""
        over = self.retriever is None or row.turns >= self.max_searches
        if t.own_results and (over or not query or (self.rising and not self.rose(row))):
            return  # the model goes on and answers itself
        if over:
            self.finish(row, "turns")
        elif not query:
            self.misstep(row, "bad_query")
        else:
            row.query = query

    def rose(self, row: Row) -> bool:
        """Whether the row's query was less certain than the one before, or is the first (SSRL's
        entropy-guided search).

        Uncertainty is the mean of -p log2 p over the tokens of the query and its tags, p the probability of
        the sampled token."""
        opened, n = f"<{self.template.search}>", 1  # a forced one is not among what was sampled
        while n < len(row.sampled) and opened not in decode(self.tokenizer, row.sampled[-n:]):
            n += 1
        bits = [-math.exp(logp) * logp / math.log(2) for logp in row.episode.logps[-n:]]
        before, row.uncertainty = row.uncertainty, sum(bits) / n
        return before is None or row.uncertainty > before

    def misstep(self, row: Row, stop: str):
        """A turn without a query and without an answer: the template says what the row is told, if
        anything."""
        if self.retry and row.turns < self.max_searches:
            row.reply = Segment("retry", self.retry, self.template.retry)
        else:
            self.finish(row, stop)

    def search(self, rows: list[Row]) -> list:
        """Documents for each row's query, in one call. If it fails: None for each; these episodes end, the
        run goes on."""
        queries, simulates = [row.query for row in rows], getattr(self.retriever, "simulates", False)
        questions = [[row.episode.question for row in rows]] if simulates else []
        try:
            results = self.retriever.search(queries, self.topk, *questions)
            if len(results) != len(queries):
                raise RetrieverError(f"{len(queries)} queries, {len(results)} results")
            return results
        except RetrieverError as error:
            tqdm.write(f"warning: search failed: {error}")
            return [None] * len(queries)

    def end_segment(self, row: Row):
        said = row.sampled[:-1] if row.sampled[-1] in self.ends else row.sampled
        row.episode.segments.append(Segment("model", row.sampled, decode(self.tokenizer, said)))
        row.sampled = []

    def finish(self, row: Row, stop: str):
        self.end_segment(row)
        row.episode.stop = stop
        self.table[self.table.index(row)] = None
        self.searches += row.episode.searches
        if not self.bar.disable:
            rate = self.counts["decode_tokens"] / max(self.bar.format_dict["elapsed"], 1e-3)
            self.bar.set_postfix_str(f"{rate:,.0f} tokens/s, {self.searches} searches", refresh=False)
        self.bar.update()


def numbers(rows: list[Row]) -> list[float]:
    """The random number of each row's next token."""
    return [row.uniforms[len(row.episode.ids)] for row in rows]


def uniforms(n: int, seed: int, step: int, row: int) -> list[float]:
    """The random stream of one row: `n` numbers in [0, 1), the same whatever else is in the batch."""
    key = int.from_bytes(hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=7).digest(), "big")
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(key)).tolist()


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def by_tokens(items: list[tuple], budget: int = PREFILL_TOKENS) -> list[list[tuple]]:
    """Cuts [(.., ids), ..] into parts of at most `budget` padded tokens (one item at least), short ones
    first: little padding."""
    parts: list[list[tuple]] = []
    for item in sorted(items, key=lambda item: len(item[1])):
        if parts and (len(parts[-1]) + 1) * len(item[1]) <= budget:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


@lru_cache(maxsize=8)
def closers(tokenizer) -> frozenset[int]:
    """Ids of the tokens whose text holds ">": only these can complete a tag, so only after these is anything
    decoded."""
    return frozenset(i for token, i in tokenizer.get_vocab().items() if ">" in token)


def end_ids(model, tokenizer) -> set[int]:
    """Every id that ends a turn: the tokenizer's and the checkpoint's own (chat models often have two)."""
    own = [
        tokenizer.eos_token_id,
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(model.generation_config, "eos_token_id", None),
    ]
    return {i for ids in own if ids is not None for i in (ids if isinstance(ids, list) else [ids])}


def room(model, prompt: list[int], question: Question, max_completion_length: int) -> int:
    """Tokens that fit behind a prompt: the budget, or what the model's context leaves."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    if len(prompt) >= context:
        where = f"question {question.id} of {question.source}"
        raise DataError(
            f"the prompt of {where} has {len(prompt)} tokens, the model's context holds {context}"
        )
    return min(max_completion_length, context - len(prompt))
