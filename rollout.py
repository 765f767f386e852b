"""Batched sampling through the search loop: questions in, episodes out. Each episode keeps exactly the token
ids that were sampled. There is no call of `generate`, and no text is tokenised or prefilled a second time.

The picture shows two groups of two rows (0 and 1, 2 and 3) and a cache with two slots. Time runs to the
right, not to scale.

    row 0   PPPP think.. answer.. search.. ~~~~~~~~~~~ RRRR think.. answer.. <eos>
    slot    0000 0000000000000000000000000 11111111111 1111 0000000000000000000000
    mask    0000 1111111111111111111111111             0000 1111111111111111111111
    row 1   pppp think.......... answer.......... <eos>
    slot    1111 1111111111111111111111111 00000000000
    rows 2, 3                                           (they wait until both slots are free)

    P  a prompt, prefilled once for the group      p  its copy, from the slot of row 0
    R  a search result, appended by a prefill      ~  the row waits; it has left slot 0 to a row that decodes
    mask  1 where the policy chose the token and is trained on it

There is no left padding. A batched `generate` needs it, because all rows grow at the same column: a row whose
result is long then makes every other row longer. Here every row has its own positions in the cache, so it can
grow by one token or by a whole result, or wait. Inside one prefill, chunks of different lengths are padded on
the right. What is sampled in a row does not depend on its slot or on the other rows, except through the
rounding of sums.

Every episode ends for one of these reasons (`Episode.stop`):

    eos             an end token               turns       it asked for a search beyond the budget
    length          token or context budget    bad_query   an empty query, or </search> without <search>
    search_failed   the retriever failed      answer      </answer>, if `Template.answer_ends`

If a call of the retriever fails, every episode with a query in that call ends. This says nothing about the
policy, so these episodes get no reward, and are in no group, loss or metric of the policy (grpo.train_step,
measures.step_metrics).

Sampling is softmax(logits / temperature) over the tokenizer's vocabulary and nothing else: no top-k and
no penalty. From a checkpoint's generation_config only the end tokens are used. Each row has its own stream of
random numbers, keyed by (seed, step, row), with one number for each token.

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

from cache import context_length
from data import Episode, InputError, Question, Segment
from prompts import Template, closing_token, encode_result, render
from retriever import RetrieverError
from runner import ModelRunner

# Decode steps between two looks at the rows that wait: one search for several rows is cheaper than one for
# each. It is a number of steps and not a time, so that runs can be repeated. On a GPU free slots are given to
# new rows only at these moments.
SERVE_EVERY = 8
PREFILL_TOKENS = 16384  # padded tokens of one prefill; this bounds the memory of its activations


@dataclass(eq=False)
class Row:
    """An episode that is being sampled."""

    episode: Episode
    max_tokens: int  # tokens that it may hold after the prompt, results included
    uniforms: list[float]  # its random stream: one number in [0, 1) for each token
    length: int = 0  # filled positions of its cache slot
    sampled: list[int] = field(default_factory=list)  # the open segment; its last id is not in the cache yet
    query: str | None = None  # set while the row waits for a search result
    reply: Segment | None = None  # set while the row waits for this segment to be appended
    turns: int = 0  # results and reminders so far
    in_result: bool = False  # the model is writing a result block itself
    uncertainty: float | None = None  # of its last query, see `SearchLoop.is_less_certain`

    @property
    def waits(self) -> bool:
        return self.query is not None or self.reply is not None

    @property
    def decodes(self) -> bool:
        return not self.episode.stop and not self.waits


def rollout(
    model, tokenizer, template: Template, questions: list[Question], *,
    group_size: int = 1, retriever=None, topk: int = 3, max_searches: int = 4,
    max_completion_length: int = 1024, max_doc_tokens: int = 512, temperature: float = 1.0,
    seed: int = 0, step: int = 0, first_row: int = 0, slots: int | None = None,
    runner: ModelRunner | None = None, engine: list[bool] | None = None, force_search: bool = False,
    entropy_guided: bool = False, counts: dict | None = None, progress: str | None = None,
) -> list[Episode]:  # fmt: skip
    """Samples `group_size` episodes of every question: [question 0, question 0, .., question 1, ..]. Each has
    at most `max_completion_length` tokens after its prompt, results included. Its random stream is a function
    of `seed`, `step` and its row.

    temperature     0 is greedy.
    topk            Documents a search returns, each cut to `max_doc_tokens` tokens.
    retriever       `retriever.search(queries, topk)` returns a list of documents for each query, or raises
                    RetrieverError. With the attribute `simulates` it gets the questions as a third argument;
                    with `remote` it is called in a thread while the other rows go on. Without a retriever
                    any search is beyond the budget.
    max_searches    The most results and reminders, together, that an episode may get. Where the model
                    writes its own results (`template.self_search`) and there is a retriever, that many of
                    them are replaced by real ones (Sim2Real of SSRL, arXiv 2508.10874).
    entropy_guided  Of the results that the model would write itself, only these are replaced by real ones:
                    the first, and each whose query is less certain than the query before it (SSRL).
    first_row       The number of the first row in the random streams: several processes that share the
                    questions of a step draw the numbers that one process would draw.
    slots           Rows that are sampled at once, in whole groups; default: all.
    runner          The ModelRunner of `model`, if there are several rollouts: its cache and its CUDA graphs
                    are then used again. Default: a new one.
    engine          One flag for each member of a group, the same in every group: whether the search engine is
                    there. Where it is not, any search is beyond the budget. Default: it is there for all.
    force_search    Adds <search> after the first answer, or after the first thought where the template has
                    no draft. These tokens are not the policy's.
    counts          A dict whose prefill_tokens and decode_tokens are increased by the tokens of episodes that
                    the model was fed.
    progress        The label of a progress bar; None: no bar.

    Raises InputError if a prompt leaves no room in the model's context, and ValueError for a runner of
    another model or tokenizer."""
    prompts = [render(template, question, tokenizer) for question in questions]
    rooms = [room(model, p, q, max_completion_length) for p, q in zip(prompts, questions, strict=True)]
    rows = []
    for number, (question, prompt, tokens) in enumerate(zip(questions, prompts, rooms, strict=True)):
        for member, on in zip(range(group_size), engine or [True] * group_size, strict=True):
            uniforms = uniform_stream(tokens, seed, step, first_row + number * group_size + member)
            rows.append(Row(Episode(question, prompt, engine=on, template=template), tokens, uniforms))
    slots = min(len(rows), max(1, (slots or len(rows)) // group_size) * group_size)
    max_len = max((len(p) + tokens for p, tokens in zip(prompts, rooms, strict=True)), default=0)
    runner = runner or ModelRunner(model, len(tokenizer))
    if runner.model is not model or runner.vocab_size != len(tokenizer):
        raise ValueError("the runner is that of another model or tokenizer")
    runner.prepare(slots, max_len, temperature)
    loop = SearchLoop(
        model=model, tokenizer=tokenizer, template=template, retriever=retriever, topk=topk,
        max_searches=max_searches, max_doc_tokens=max_doc_tokens, force_search=force_search,
        entropy_guided=entropy_guided, table=[None] * slots, runner=runner,
        bar=tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False),
    )  # fmt: skip
    was_training = model.training
    model.eval()  # no dropout while sampling
    try:
        loop.run(deque(rows[i : i + group_size] for i in range(0, len(rows), group_size)))
    finally:
        model.train(was_training)
        loop.bar.close()
    for name, count in loop.counts.items():
        if counts is not None:
            counts[name] = counts.get(name, 0) + count
    return [row.episode for row in rows]


@dataclass
class SearchLoop:
    """The state of one rollout. `table` says which row has which slot of the cache."""

    model: torch.nn.Module
    tokenizer: object
    template: Template
    retriever: object
    topk: int
    max_searches: int
    max_doc_tokens: int
    force_search: bool
    entropy_guided: bool
    table: list[Row | None]  # slot -> row
    runner: ModelRunner
    bar: tqdm
    counts: dict = field(default_factory=lambda: {"prefill_tokens": 0, "decode_tokens": 0})
    remote_call: tuple[list[Row], Future] | None = None  # the rows and the result of a search under way
    searches: int = 0  # of the episodes that have ended

    def __post_init__(self):
        self.ends = end_ids(self.model, self.tokenizer)
        self.closers = closing_ids(self.tokenizer)
        self.reminder_ids = self.tokenizer(self.template.reminder, add_special_tokens=False).input_ids
        self.forced_text = f"\n<{self.template.search}>"
        self.forced_ids = self.tokenizer(self.forced_text, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def run(self, queue: deque[list[Row]]):
        """Samples all groups of the queue to their ends."""
        step, on_gpu = 0, self.runner.on_gpu  # on a GPU one call of `decode` already makes SERVE_EVERY steps
        while queue or any(self.table):
            self.admit(queue)
            waiting = [slot for slot, row in enumerate(self.table) if row and row.waits]
            all_wait = len(waiting) == sum(row is not None for row in self.table)
            if waiting and (on_gpu or step % SERVE_EVERY == 0 or all_wait):
                self.serve(waiting, all_wait)
            if n := self.compact():
                self.decode(self.table[:n])
            step += 1

    # the stages of the loop

    def admit(self, queue: deque[list[Row]]):
        """Gives free slots to whole groups of the queue. The prompt of a group is prefilled once, into one
        slot, and copied to the others."""
        free_slots = [slot for slot, row in enumerate(self.table) if row is None]
        groups = []  # (slots of the group, prompt)
        while queue and len(free_slots) >= len(queue[0]):
            group = queue.popleft()
            slots, free_slots = free_slots[: len(group)], free_slots[len(group) :]
            for slot, row in zip(slots, group, strict=True):
                self.table[slot] = row
            groups.append((slots, group[0].episode.prompt_ids))
        for part in split_by_tokens(groups):
            logits = self.prefill([slots[0] for slots, _ in part], [prompt for _, prompt in part])
            for slots, prompt in part:
                self.runner.cache.copy(slots[0], slots[1:], len(prompt))
                for slot in slots:
                    self.table[slot].length = len(prompt)
                self.counts["prefill_tokens"] += len(prompt)
            rows = [self.table[slot] for slots, _ in part for slot in slots]
            sizes = torch.tensor([len(slots) for slots, _ in part], device=logits.device)
            self.append_tokens(
                rows, *self.runner.draw(logits.repeat_interleave(sizes, 0), next_uniforms(rows))
            )

    def serve(self, waiting: list[int], all_wait: bool):
        """Searches for the rows that have a query, in one call, which for a remote retriever runs in a
        thread. Then appends the replies that have arrived; replies of similar lengths share a prefill.
        `all_wait`: no row is left that could decode meanwhile."""
        searching = [self.table[slot] for slot in waiting if self.table[slot].query is not None]
        if getattr(self.retriever, "remote", False):
            results = self.search_in_thread(searching, all_wait and len(searching) == len(waiting))
        else:
            results = zip(searching, self.search(searching) if searching else [], strict=True)
        for row, docs in results:
            if docs is None:
                self.finish(row, "search_failed")
            else:
                ids = encode_result(docs, self.tokenizer, self.template, self.max_doc_tokens)
                row.reply = Segment("env", ids, detokenize(self.tokenizer, ids))
        chunks = []  # (slot, the row's last token and its reply)
        for slot in waiting:
            if (row := self.table[slot]) is None or row.reply is None:
                continue
            episode, reply = row.episode, row.reply
            if len(episode.ids) + len(reply.ids) >= row.max_tokens:
                self.finish(row, "length")  # the reply is left out as a whole; half of it has no closing tag
                continue
            chunks.append((slot, [row.sampled[-1], *reply.ids]))
            self.end_segment(row)
            episode.segments.append(reply)
            episode.ids += reply.ids
            episode.loss_mask += [False] * len(reply.ids)
            episode.logps += [0.0] * len(reply.ids)
            episode.searches += row.query is not None
            row.turns += reply.kind != "forced"
            row.query = row.reply = None
        for part in split_by_tokens(chunks):
            self.counts["prefill_tokens"] += sum(len(chunk) - 1 for _, chunk in part)
            self.counts["decode_tokens"] += len(part)
            slots = [slot for slot, _ in part]
            rows = [self.table[slot] for slot in slots]
            logits = self.prefill(slots, [chunk for _, chunk in part])
            self.append_tokens(rows, *self.runner.draw(logits, next_uniforms(rows)))

    def search_in_thread(self, searching: list[Row], wait: bool) -> Iterable:
        """(row, documents) of the rows that a remote retriever has answered. With `wait`, waits for it first.

        The retriever works in a thread, one call at a time. Queries that come up during a call go into the
        next one."""
        results = []
        if self.remote_call and (wait or self.remote_call[1].done()):
            rows, documents = self.remote_call
            results, self.remote_call = zip(rows, documents.result(), strict=True), None
            searching = [row for row in searching if row not in rows]
        if searching and not self.remote_call:
            self.remote_call = searching, ThreadPoolExecutor(1).submit(self.search, searching)
        return results

    def compact(self) -> int:
        """Moves the rows that decode into the first slots, so that a decode step works on a view of the
        cache. Returns their number."""
        decoding = [row is not None and row.decodes for row in self.table]
        n = sum(decoding)
        holes = [slot for slot in range(n) if not decoding[slot]]
        strays = [slot for slot in range(n, len(decoding)) if decoding[slot]]
        if holes:
            self.runner.cache.swap(holes, strays, max(row.length for row in self.table if row))
            for hole, stray in zip(holes, strays, strict=True):
                self.table[hole], self.table[stray] = self.table[stray], self.table[hole]
        return n

    def decode(self, rows: list[Row]):
        """Samples one token for each of the rows in the first slots, or SERVE_EVERY tokens on a GPU. The GPU
        computes one step while this loop handles the tokens of the step before. A row that ends or waits
        meanwhile is fed on to the end of the loop, and what is drawn for it is dropped."""
        steps = SERVE_EVERY if self.runner.on_gpu else 1
        last, positions = [row.sampled[-1] for row in rows], [row.length for row in rows]
        u = [next_uniforms(rows, step) for step in range(steps)]
        for drawn in self.runner.decode(last, positions, u):
            going = [(row, token, logp) for row, token, logp in zip(rows, *drawn, strict=True) if row.decodes]
            self.counts["decode_tokens"] += len(going)
            for row, *_ in going:
                row.length += 1
            self.append_tokens(*zip(*going, strict=True))
            if not any(row.decodes for row in rows):
                break

    def prefill(self, slots: list[int], chunks: list[list[int]]) -> torch.Tensor:
        """Feeds each slot its chunk of ids, after what the slot already holds. Returns the last logits [rows,
        V]."""
        rows = [self.table[slot] for slot in slots]
        logits = self.runner.prefill(slots, [row.length for row in rows], chunks)
        for row, chunk in zip(rows, chunks, strict=True):
            row.length += len(chunk)
        return logits

    # what happens to one row after a token

    def append_tokens(self, rows: list[Row], tokens: Iterable[int], logps: Iterable[float]):
        """Gives each row its next token, and acts on end tokens, tags and the token budget."""
        for row, token, logp in zip(rows, tokens, logps, strict=True):
            episode = row.episode
            episode.ids.append(token)
            episode.loss_mask.append(not row.in_result)
            episode.logps.append(logp)
            row.sampled.append(token)
            if token in self.ends:
                self.end_turn(row, "eos")
            elif token in self.closers:
                self.handle_tag(row)
            if row.decodes and len(episode.ids) >= row.max_tokens:
                self.finish(row, "length")

    def handle_tag(self, row: Row):
        """Called when the row's last token contains ">". Acts on the tag that the token completed, if any.

        A token can hold more than the end of a tag: ">." is one token of Qwen2.5. Such a token stays in the
        episode as it was sampled, and is trained on; the reply follows it. What it holds after the tag is no
        part of the query, and reward.parse_episode does not count it as a mistake. (`completes` notices the
        tag, `handle_query` reads the query, `serve` feeds the token together with the reply.)"""
        t = self.template
        if t.own_result:
            self.mask_result(row)
        if row.in_result:
            return
        if self.completes(row, f"</{t.search}>"):
            self.handle_query(row)
        elif t.answer_ends and self.completes(row, f"</{t.answer}>"):
            if f"<{t.answer}>" in detokenize(self.tokenizer, row.sampled):
                self.finish(row, "answer")
            else:
                self.end_turn(row, "answer")
        elif self.force_search and not row.episode.segments:
            if self.completes(row, f"</{t.answer if t.draft else t.think}>"):
                row.reply = Segment("forced", self.forced_ids, self.forced_text)

    def completes(self, row: Row, tag: str) -> int:
        """If the row's last token completed `tag`: how many tokens at the end contain it. Otherwise 0.

        For the tokens "</", "search", ">." and the tag </search> it is 3. After one more token it is 0,
        because the tag was complete before."""
        tail = row.sampled[-len(tag) :]  # enough, because a token has at least one character
        if tag not in detokenize(self.tokenizer, tail):
            return 0
        n = next(n for n in range(1, len(tail) + 1) if tag in detokenize(self.tokenizer, tail[-n:]))
        return 0 if tag in detokenize(self.tokenizer, tail[-n:-1]) else n

    def mask_result(self, row: Row):
        """Excludes a result block that the model writes itself from the loss (SSRL, arXiv 2508.10874): its
        tags, and every token with a character inside it. A block that is never closed goes on to the end."""
        if row.in_result:
            row.in_result = not self.completes(row, f"</{self.template.own_result}>")
        elif n := self.completes(row, f"<{self.template.own_result}>"):
            row.in_result = True
            row.episode.loss_mask[-n:] = [False] * n

    def handle_query(self, row: Row):
        """The row has just closed a search tag: reads the query, and lets the row wait for its result."""
        t = self.template
        closing = f"</{t.search}>"
        before = detokenize(self.tokenizer, row.sampled).rpartition(closing)[0]
        _, earlier, before = before.rpartition(closing)  # SSRL: an earlier query, already answered
        if t.memory:
            before = before.rpartition(f"</{t.memory}>")[2]  # a memory holds no query
        _, opening, query = before.rpartition(f"<{t.search}>")
        segments = row.episode.segments
        if segments and segments[-1].kind == "forced" and not opening and not earlier:
            opening = query = before
        query = query.strip() if opening else ""
        engine = self.retriever is not None and row.episode.engine
        over_budget = not engine or row.turns >= self.max_searches
        if t.self_search and (
            over_budget or not query or (self.entropy_guided and not self.is_less_certain(row))
        ):
            return  # the model goes on and writes the result itself
        if over_budget:
            self.finish(row, "turns")
        elif not query:
            self.end_turn(row, "bad_query")
        else:
            row.query = query

    def is_less_certain(self, row: Row) -> bool:
        """Whether the row's query is its first, or less certain than its query before (entropy-guided search
        of SSRL, arXiv 2508.10874). Keeps the uncertainty for the next call.

        Uncertainty is the mean of -p log2 p over the tokens of the query and its tags, where p is the
        probability of the sampled token."""
        opening, n = f"<{self.template.search}>", 1  # a forced opening tag is not among the sampled ids
        while n < len(row.sampled) and opening not in detokenize(self.tokenizer, row.sampled[-n:]):
            n += 1
        bits = [-math.exp(logp) * logp / math.log(2) for logp in row.episode.logps[-n:]]
        before, row.uncertainty = row.uncertainty, sum(bits) / n
        return before is None or row.uncertainty > before

    def end_turn(self, row: Row, stop: str):
        """Ends a turn without a query: with the template's reminder if it has one and the budget allows a
        further turn, otherwise by ending the episode for the reason `stop`."""
        if self.reminder_ids and row.turns < self.max_searches:
            row.reply = Segment("reminder", self.reminder_ids, self.template.reminder)
        else:
            self.finish(row, stop)

    def search(self, rows: list[Row]) -> list:
        """The documents for each row's query, in one call. If it fails, None for each: their episodes end,
        and the run goes on."""
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
        """Turns the sampled ids into a segment; the end token is among its ids, but not in its text."""
        text_ids = row.sampled[:-1] if row.sampled[-1] in self.ends else row.sampled
        row.episode.segments.append(Segment("model", row.sampled, detokenize(self.tokenizer, text_ids)))
        row.sampled = []

    def finish(self, row: Row, stop: str):
        """Ends the row's episode and frees its slot."""
        self.end_segment(row)
        row.episode.stop = stop
        self.table[self.table.index(row)] = None
        self.searches += row.episode.searches
        if not self.bar.disable:
            rate = self.counts["decode_tokens"] / max(self.bar.format_dict["elapsed"], 1e-3)
            self.bar.set_postfix_str(f"{rate:,.0f} tokens/s, {self.searches} searches", refresh=False)
        self.bar.update()


def next_uniforms(rows: list[Row], ahead: int = 0) -> list[float]:
    """The random number for each row's next token, or for one some steps ahead. Beyond the end of a row's
    stream it is 0; that token is not used."""
    places = [len(row.episode.ids) + ahead for row in rows]
    return [row.uniforms[i] if i < len(row.uniforms) else 0.0 for row, i in zip(rows, places, strict=True)]


def uniform_stream(n: int, seed: int, step: int, row: int) -> list[float]:
    """The random stream of one row: `n` numbers in [0, 1). It depends on no other row."""
    key = int.from_bytes(hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=7).digest(), "big")
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(key)).tolist()


def detokenize(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def split_by_tokens(items: list[tuple], budget: int = PREFILL_TOKENS) -> list[list[tuple]]:
    """Cuts [(.., ids), ..] into parts of at most `budget` padded tokens, and at least one item. Short items
    come first, so that items of like lengths share a part and little is padding."""
    parts: list[list[tuple]] = []
    for item in sorted(items, key=lambda item: len(item[1])):
        if parts and (len(parts[-1]) + 1) * len(item[1]) <= budget:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


@lru_cache(maxsize=8)
def closing_ids(tokenizer) -> frozenset[int]:
    """Ids of the tokens that contain ">". Only these can complete a tag, so nothing has to be decoded after
    any other token."""
    return frozenset(i for token, i in tokenizer.get_vocab().items() if ">" in token)


def end_ids(model, tokenizer) -> set[int]:
    """All ids that end a turn: the tokenizer's, the checkpoint's, and the token that the chat template writes
    after an answer. They can be three different ones."""
    ends = [
        tokenizer.eos_token_id,
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(model.generation_config, "eos_token_id", None),
        closing_token(tokenizer),
    ]
    return {i for ids in ends if ids is not None for i in (ids if isinstance(ids, list) else [ids])}


def room(model, prompt: list[int], question: Question, max_completion_length: int) -> int:
    """How many tokens fit after a prompt: the budget, or what is left of the model's context if that is less.
    Raises InputError if nothing is left."""
    context = context_length(model.config)
    if len(prompt) >= context:
        where = f"question {question.id} of {question.source}"
        raise InputError(
            f"the prompt of {where} has {len(prompt)} tokens, the model's context holds {context}"
        )
    return min(max_completion_length, context - len(prompt))
