"""The model's side of a rollout: keys and values in slots, one forward pass through them, the next token.

`SlotCache` has a slot for every row in flight. `step_hidden` feeds any of the rows any number of tokens, each
at its own position. `sample` draws the next token. `ModelRunner` puts these together, for prefills and for
the decode steps, of which a rollout makes thousands. Which row has which slot is decided in rollout.py.

    runner = ModelRunner(model, len(tokenizer), slots=8, max_len=4096)
    runner.prepare(slots=8, max_len=4096, temperature=1.0)            # before every rollout
    logits = runner.prefill([0, 1], [0, 0], [prompt, another])        # into slots 0 and 1, from position 0
    tokens, logps = runner.draw(logits, [0.3, 0.8])
    tokens, logps = runner.decode(tokens.tolist(), [len(prompt), len(another)], [0.1, 0.6])
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kernels import sample, use_triton


class SlotCache(Cache):
    """Keys and values of every row at the row's own positions: for each layer two tensors [slots, kv_heads,
    max_len + 1, head_dim].

    So a row can be extended by one token or by a whole search result, some rows can be stepped without the
    others, and a slot can be copied or given to another row. The last position is scratch space: the padding
    inside a ragged step is written there."""

    def __init__(self, config, slots: int, max_len: int, device, dtype):
        super().__init__(layers=[])
        shape = (slots, kv_shape(config)[1], max_len + 1, kv_shape(config)[2])
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(kv_shape(config)[0])]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.slots, self.max_len = slots, max_len

    def select(self, rows: int | torch.Tensor, positions: torch.Tensor, kv_len: int):
        """Sets where the next forward pass writes, `positions` [rows, new], and how many positions it reads.
        `rows` is an int n, for the first n slots, or a tensor of slots."""
        first = isinstance(rows, int)
        index = torch.arange(rows, device=positions.device) if first else rows
        self.rows = slice(rows) if first else rows  # a slice: attention reads a view, not a copy
        self.where = index[:, None], slice(None), positions  # [rows, new, kv_heads, head_dim] of a layer
        self.kv_len = kv_len

    def update(self, key, value, layer, *args, **kwargs):  # key, value [rows, kv_heads, new, head_dim]
        keys, values = self.keys[layer], self.values[layer]
        keys[self.where] = key.transpose(1, 2).to(keys.dtype)
        values[self.where] = value.transpose(1, 2).to(values.dtype)
        return keys[self.rows, :, : self.kv_len], values[self.rows, :, : self.kv_len]

    def get_seq_length(self, layer: int = 0) -> int:
        return 0  # the caller passes position_ids and a mask, so transformers must not count positions itself

    def clear(self):
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def copy(self, source: int, targets: list[int], length: int):
        if targets:
            index = torch.tensor(targets, device=self.keys[0].device)  # one transfer, not one a layer
            for tensor in (*self.keys, *self.values):
                tensor[index, :, :length] = tensor[source, :, :length]

    def swap(self, a: list[int], b: list[int], length: int):
        index = torch.tensor([a + b, b + a], device=self.keys[0].device)
        for tensor in (*self.keys, *self.values):
            tensor[index[0], :, :length] = tensor[index[1], :, :length]


def kv_shape(config) -> tuple[int, int, int]:
    """(layers, key-value heads, head size) of a model."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, head_dim


def context_length(config) -> int:
    """The most tokens that a model can read; 2^30 if its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def kv_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of one token in the cache."""
    return 2 * math.prod(kv_shape(config)) * dtype.itemsize


# cuDNN's attention, torch's first choice on a GPU, is left out: in bf16 it can give other sums each time.
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
    the same code without graphs. So does the step of a graph that gives other logits than the eager step."""

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
        """Sets the temperature (0: greedy) of the next rollout, which needs that many slots of that length,
        and clears the cache: what is masked is multiplied by 0, and a NaN of an earlier rollout would stay
        one. If the cache is smaller, a larger one takes its place, and the graphs are recorded anew."""
        # Lengths are rounded up, so that a prompt that is a few tokens longer needs no new cache.
        max_len = min(-(-max_len // 128) * 128, context_length(self.model.config))
        if self.cache is None or slots > self.slots or max_len > self.max_len:
            self.slots, self.max_len = max(slots, self.slots), max(max_len, self.max_len)
            self.graphs, self.cache = {}, None  # rows -> (graph, what it draws), or None if it is not used
            config, device, dtype = self.model.config, self.model.device, self.model.dtype
            self.cache = SlotCache(config, self.slots, self.max_len, device, dtype)
            # [3, slots]: token, position and random number of each row, read by a decode step. A row of
            # padding has -1 as its position and its number.
            self.inputs = torch.zeros(3, self.slots, dtype=torch.float64, device=device)
            self.temperature = torch.ones((), device=device)
            self.pool = torch.cuda.graph_pool_handle() if self.cuda_graphs else None
        self.cache.clear()
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
    def decode(self, tokens: list[int], positions: list[int], u: list[float]):
        """Feeds each of the first n slots one token at its position, and samples the next one with the random
        number u. Returns the tokens and their log-probs, [n] each. The next call can overwrite both."""
        n = rows = len(tokens)
        # On a GPU shapes do not depend on the rows of the moment, since a graph freezes them. This also holds
        # without graphs, because sums of other shapes are rounded differently. So rows are padded, and the
        # view has the length of the cache, of which the kernel reads no more than each row's length.
        kv_len = self.max_len if self.on_gpu else max(positions) + 1
        if self.on_gpu:
            rows = min(round_up(n), self.slots)
            self.inputs[1:, n:rows] = -1
        self.inputs[:, :n] = torch.tensor([tokens, positions, u], dtype=torch.float64)
        if self.cuda_graphs and rows not in self.graphs:
            self.graphs[rows] = self.record(rows, kv_len)
        if self.cuda_graphs and self.graphs[rows]:
            graph, drawn = self.graphs[rows]
            graph.replay()
        else:
            *drawn, _ = self.step(rows, kv_len)
        return drawn[0][:n], drawn[1][:n]

    def step(self, rows: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One decode step of the first `rows` slots: tokens [rows], their log-probs [rows], and the logits.
        It reads `inputs` and touches nothing on the host, as a CUDA graph requires. A row of padding writes
        into the scratch position of its slot."""
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
            self.cuda_graphs = False
            reason = str(error).splitlines()[0]
            tqdm.write(f"warning: decoding runs without CUDA graphs (see --no-cuda_graphs): {reason}")
            return None
        # The same bits are expected, since both run the same kernels. A difference within rounding would
        # still be right. Tokens are not compared, because the least difference can change one.
        gap = (logits - eager).abs().max().item()  # log-probs differ by at most twice as much
        if not gap <= (1e-3 if self.model.dtype == torch.float32 else 5e-2):
            tqdm.write(f"warning: no CUDA graph of {rows} rows: its logits differ by {gap:.2g}")
            return None
        return graph, drawn

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, H] -> logits [rows, V] in the model's dtype. All columns of the head, because an odd
        width is slow on a GPU; `sample` leaves out those beyond the vocabulary."""
        return hidden @ self.model.get_output_embeddings().weight.T

    def draw(self, logits: torch.Tensor, u: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `sample`, with the random numbers as a list."""
        u = torch.tensor(u, dtype=torch.float64, device=logits.device)
        return sample(logits, u, self.temperature, self.vocab_size)


def round_up(n: int) -> int:
    """Rounds `n` up to a multiple of 8 or, if it is large, by at most a quarter, so that few different sizes
    occur."""
    step = max(8, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step
