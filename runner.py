"""The model's side of a rollout: one forward pass through the cache, and the next token.

`step_hidden` feeds any of the rows any number of tokens, each at its own position. `ModelRunner` puts it
together with the draw, for prefills and for the decode steps, of which a rollout makes thousands. Which row
has which slot of the cache is decided in rollout.py.

    runner = ModelRunner(model, len(tokenizer), slots=8, max_len=4096)
    runner.prepare(slots=8, max_len=4096, temperature=1.0)            # before every rollout
    logits = runner.prefill([0, 1], [0, 0], [prompt, another])        # into slots 0 and 1, from position 0
    tokens, logps = runner.draw(logits, [0.3, 0.8])
    for tokens, logps in runner.decode(tokens, [len(prompt), len(another)], [[0.1, 0.6], [0.9, 0.2]]):
        ...                                                           # two steps of both rows
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cache import SlotCache, context_length
from kernels import sample, use_triton

# cuDNN's attention, torch's first choice on a GPU, is left out: its results in bf16 can differ each time.
REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def step_hidden(model, cache: SlotCache, slots, ids, positions, last, kv_len: int) -> torch.Tensor:
    """One forward pass through the cache. ids and positions are [rows, new]; last [rows] is the last position
    of each row that is not padding. Returns hidden states [rows, new, H].

    Every position attends to all positions up to its own. Where Triton runs, the attention of a step of one
    token is the kernel of attention.py, if the model hands `lengths` on to it."""
    sees = torch.arange(kv_len, device=ids.device) <= positions[..., None]  # [rows, new, kv_len]
    padding = positions > last[:, None]
    cache.select(slots, positions.masked_fill(padding, cache.max_len), kv_len)
    config, options = model.config.get_text_config(), {}
    before = config._attn_implementation
    if ids.shape[1] == 1 and use_triton(ids) and model._supports_attention_backend:
        # The implementation is switched for this step only. At loading transformers checks whether SDPA can
        # compute the model, and refuses gpt-oss for its sinks. Of our function it would check nothing.
        config._attn_implementation, options = "decode_attention", {"lengths": last + 1}
    try:
        with sdpa_kernel(REPEATABLE):
            return model.base_model(
                input_ids=ids,
                attention_mask=sees[:, None],  # boolean [rows, 1, new, kv_len], as SDPA takes it
                position_ids=positions.masked_fill(padding, 0),
                past_key_values=cache,
                use_cache=True,
                **options,
            ).last_hidden_state
    finally:
        config._attn_implementation = before


# Options that change nothing here: sampling has no dropout, one token sees all before it, and model.probe has
# refused windows that are shorter than the rows.
HARMLESS = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "sliding_window"}


def attend(module, query, key, value, attention_mask, lengths=None, scaling=None, **options):
    """The attention of one token a row, as transformers calls it: query [rows, heads, 1, D] -> ([rows, 1,
    heads, D], None). `lengths` [rows] says the same as the mask of `step_hidden`. Some models do not pass
    their keyword arguments on to the attention. Then it is None, and SDPA computes the same with the mask.

    Raises ValueError for anything that would change the result and is not computed here, such as a cap."""
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if unknown := [name for name, x in options.items() if name not in HARMLESS and x is not None]:
        raise ValueError(f"attention with {', '.join(unknown)}")
    from kernels import attention  # here: a CPU needs no triton

    return attention.decode_attention(query[:, :, 0], key, value, lengths, scaling)[:, None], None


AttentionInterface.register("decode_attention", attend)


@dataclass
class ModelRunner:
    """A model with its cache: prefills of any slots, and decode steps of the first n slots. It can be kept
    for many rollouts, while the weights are changed in place.

    On a GPU a decode step is replayed as a CUDA graph, because launching its kernels one by one takes longer
    than they run. A graph is recorded once for each number of rows, which is rounded up, so that there are
    few; they share one pool of memory. All that changes from step to step is read from memory: tokens,
    positions, random numbers, the temperature. If a step cannot be recorded, all steps from then on run by
    the same code without graphs. If a graph gives other logits than the eager step, only steps with that
    number of rows run without one. All calls must come from one CUDA stream, because their order there is
    relied on."""

    model: torch.nn.Module
    vocab_size: int  # ids beyond the tokenizer (a padded lm_head) are never sampled
    slots: int = 0  # the size of the cache; 0: `prepare` makes it as large as the first rollout needs
    max_len: int = 0
    cuda_graphs: bool = True  # becomes false without a GPU, and if a recording fails

    def __post_init__(self):
        self.on_gpu = self.model.device.type == "cuda"
        self.cuda_graphs = self.cuda_graphs and self.on_gpu
        first, self.slots, self.max_len, self.cache = (self.slots, self.max_len), 0, 0, None
        self.prepare(*first, 1.0)

    @torch.inference_mode(False)  # a rollout of a simulator begins inside of another rollout
    def prepare(self, slots: int, max_len: int, temperature: float):
        """Sets the temperature (0: greedy) of the next rollout, and gives it an empty cache with that many
        slots of that length. It is cleared, because attention multiplies masked values by 0, and 0 times a
        NaN that an earlier rollout left is NaN. On a GPU the cache is used again if it is large enough.
        Otherwise a larger one takes its place, and the graphs are recorded anew."""
        if self.on_gpu:
            # Lengths are rounded up, so that a prompt that is a few tokens longer needs no new cache.
            max_len = min(-(-max_len // 128) * 128, context_length(self.model.config))
            slots, max_len = max(slots, self.slots), max(max_len, self.max_len)
        if self.on_gpu and self.cache is not None and (slots, max_len) == (self.slots, self.max_len):
            self.cache.clear()
        else:
            self.slots, self.max_len = slots, max_len
            self.graphs, self.cache = {}, None  # rows -> (graph, what it draws), or None if it is not used
            config, device, dtype = self.model.config, self.model.device, self.model.dtype
            self.cache = SlotCache(config, slots, max_len, device, dtype)
            # [3, slots]: token, position and random number of each row, read by a decode step. A row of
            # padding has -1 as its position and its number.
            self.inputs = torch.zeros(3, slots, dtype=torch.float64, device=device)
            self.temperature = torch.ones((), device=device)
            self.pool = torch.cuda.graph_pool_handle() if self.cuda_graphs else None
        self.temperature.fill_(temperature)

    @torch.inference_mode()
    def prefill(self, slots: list[int], starts: list[int], chunks: list[list[int]]) -> torch.Tensor:
        """Feeds each slot its chunk of ids, from its start position on. Returns the logits after the last id
        of each chunk, [rows, V]."""
        device, new = self.model.device, max(map(len, chunks))
        ids = torch.tensor([chunk + [0] * (new - len(chunk)) for chunk in chunks], device=device)
        start, slots = torch.tensor(starts, device=device), torch.tensor(slots, device=device)
        last = torch.tensor([len(chunk) - 1 for chunk in chunks], device=device)
        positions = start[:, None] + torch.arange(new, device=device)  # [rows, new]
        kv_len = max(s + len(chunk) for s, chunk in zip(starts, chunks, strict=True))
        hidden = step_hidden(self.model, self.cache, slots, ids, positions, start + last, kv_len)
        return self.logits(hidden[torch.arange(len(chunks), device=device), last])

    @torch.inference_mode()
    def decode(self, tokens: list[int], positions: list[int], u: list[list[float]]):
        """Feeds each of the first n slots one token at its position and draws the next token, which is fed in
        the next step. There are as many steps as u [steps][n] has rows of random numbers. Yields for each
        step the tokens and their log-probs, two lists of n. While the caller works on those of one step, a
        GPU computes the next.

        So a row that has ended is fed on. This does no harm, because every position is written anew before
        attention reads it."""
        n = rows = len(tokens)
        # On a GPU shapes do not depend on the rows of the moment, since a graph freezes them. This also holds
        # without graphs, because sums of other shapes are rounded differently. So rows are padded, and the
        # view has the length of the cache, of which the kernel reads no more than each row's length.
        kv_len = self.max_len if self.on_gpu else min(max(positions) + len(u), self.max_len)
        if self.on_gpu:
            rows = min(round_up(n), self.slots)
            self.inputs[1:, n:rows] = -1
        self.inputs[:2, :n] = torch.tensor([tokens, positions], dtype=torch.float64)
        u = torch.tensor(u, dtype=torch.float64).to(self.inputs.device)
        previous = None
        for numbers in u:
            self.inputs[2, :n] = numbers
            drawn, logps = self.replay(rows, kv_len)
            # What was drawn is copied before the next replay, which overwrites it. A row that is fed on past
            # the end of the cache stays at the last position.
            self.inputs[0, :n] = drawn[:n]
            self.inputs[1, :n] = (self.inputs[1, :n] + 1).clamp(max=self.max_len - 1)
            copy = HostCopy(drawn[:n], logps[:n])
            if previous:
                yield previous.lists()
            previous = copy
        yield previous.lists()

    def replay(self, rows: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A decode step, by its graph if there are graphs. Returns the tokens and their log-probs, [rows]
        each, which the next step can overwrite."""
        if self.cuda_graphs and rows not in self.graphs:
            self.graphs[rows] = self.record(rows, kv_len)
        if self.cuda_graphs and self.graphs[rows]:
            graph, drawn = self.graphs[rows]
            graph.replay()
            return drawn
        return self.step(rows, kv_len)[:2]

    def step(self, rows: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One decode step of the first `rows` slots: tokens [rows], their log-probs [rows], and the logits.
        It reads `inputs` and, with the kernels, touches nothing on the host, as a CUDA graph requires. A row
        of padding writes into the scratch position of its slot."""
        tokens, last, u = self.inputs[:, :rows]
        tokens, last = tokens.long()[:, None], last.long()
        positions = last.clamp(min=0)[:, None]
        hidden = step_hidden(self.model, self.cache, rows, tokens, positions, last, kv_len)
        logits = self.logits(hidden[:, 0])
        return *sample(logits, u, self.temperature, self.vocab_size), logits

    def record(self, rows: int, kv_len: int) -> tuple | None:
        """(graph, the tokens and log-probs that a replay fills), or None if there is no graph that repeats
        the eager step.

        A step can be run twice, because it writes the same keys and values into the same places."""
        eager = self.step(rows, kv_len)[2]  # it also loads kernels, which is not allowed while recording
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                *drawn, logits = self.step(rows, kv_len)
            graph.replay()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed recording leaves its stream as the current one
            self.cuda_graphs, self.graphs = False, {}
            reason = str(error).splitlines()[0]
            tqdm.write(f"warning: decoding runs without CUDA graphs (see --no-cuda_graphs): {reason}")
            return None
        # The same bits are expected, since both run the same kernels. A difference within rounding would
        # still be right. Tokens are not compared, because the least difference can change one.
        gap = (logits - eager).abs().max().item()  # log-probs differ by at most twice as much
        if not gap <= (1e-3 if self.model.dtype == torch.float32 else 5e-2):
            tqdm.write(f"warning: no CUDA graph of {rows} rows: its logits differ by {gap:.2g}")
            self.pool = torch.cuda.graph_pool_handle()  # torch cannot use the pool of a discarded graph again
            return None
        return graph, drawn

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, H] -> logits [rows, V] in the model's dtype. All columns of the head, because an odd
        width is slow on a GPU; `sample` leaves out those beyond the vocabulary."""
        return hidden @ self.model.get_output_embeddings().weight.T

    def draw(self, logits: torch.Tensor, u: list[float]) -> tuple[list[int], list[float]]:
        """As `sample`, with lists."""
        u = torch.tensor(u, dtype=torch.float64, device=logits.device)
        tokens, logps = sample(logits, u, self.temperature, self.vocab_size)
        return tokens.tolist(), logps.tolist()


class HostCopy:
    """A copy of tokens and log-probs [n] to the host, which runs while the host does something else."""

    def __init__(self, tokens: torch.Tensor, logps: torch.Tensor):
        self.both = torch.stack([tokens.double(), logps.double()]).to("cpu", non_blocking=True)  # exact
        self.arrived = None
        if tokens.is_cuda:
            self.arrived = torch.cuda.current_stream(tokens.device).record_event()

    def lists(self) -> tuple[list[int], list[float]]:
        if self.arrived:
            self.arrived.synchronize()  # waits for the copy, not for what the GPU was given to do after it
        tokens, logps = self.both.tolist()
        return [int(token) for token in tokens], logps


def round_up(n: int) -> int:
    """Rounds `n` up to a multiple of 8 or, if it is large, by at most a quarter, so that few different sizes
    occur."""
    step = max(8, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step
