"""The model's side of a rollout: keys and values in slots, one forward pass through them, the next token.

`SlotCache` has a slot for every row in flight. `step_hidden` feeds any of the rows any number of tokens, each
at its own position. `sample` draws the next token. `ModelRunner` puts these together, for prefills and for
the decode steps, of which a rollout makes thousands. Which row has which slot is decided in rollout.py.

    cache = SlotCache(model.config, slots=8, max_len=4096, device=model.device, dtype=model.dtype)
    runner = ModelRunner(model, cache, len(tokenizer), temperature=1.0, cuda_graphs=False)
    logits = runner.prefill([0, 1], [0, 0], [prompt, another])        # into slots 0 and 1, from position 0
    tokens, logps = runner.draw(logits, [0.3, 0.8])
    tokens, logps = runner.decode(tokens.tolist(), [len(prompt), len(another)], [0.1, 0.6])
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers.cache_utils import Cache


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


def kv_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of one token in the cache."""
    return 2 * math.prod(kv_shape(config)) * dtype.itemsize


def step_hidden(model, cache: SlotCache, slots, ids, positions, last, kv_len: int) -> torch.Tensor:
    """One forward pass through the cache. ids and positions are [rows, new]; last [rows] is the last position
    of each row that is not padding. Returns hidden states [rows, new, H].

    Every position attends to all positions up to its own."""
    sees = torch.arange(kv_len, device=ids.device) <= positions[..., None]  # [rows, new, kv_len]
    padding = positions > last[:, None]
    cache.select(slots, positions.masked_fill(padding, cache.max_len), kv_len)
    return model.base_model(
        input_ids=ids,
        attention_mask=sees[:, None],  # boolean [rows, 1, new, kv_len], as SDPA takes it
        position_ids=positions.masked_fill(padding, 0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def sample(logits: torch.Tensor, u: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [rows, vocab] fp32, u [rows] fp64 in [0, 1) -> tokens [rows], their log-probs [rows] fp32.
    Temperature 0 takes the most probable token; its log-prob is then that of temperature 1.

    Samples by inverting the distribution function: the first token whose cumulative probability exceeds u.
    The sum is in fp64, because in fp32 the sum over 150,000 tokens would round small probabilities away."""
    logp = torch.log_softmax(logits / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        cdf = logp.double().exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)
    return tokens[:, 0], logp.gather(1, tokens)[:, 0]


@dataclass
class ModelRunner:
    """A model with its cache: prefills of any slots, and decode steps of the first n slots.

    On a GPU a decode step is replayed as a CUDA graph, because launching its kernels one by one takes longer
    than they run. A graph is recorded once in a rollout for each number of rows and each length of the cache;
    both are rounded up, so that there are few graphs, which share one pool of memory. A step that cannot be
    recorded, or whose graph draws other tokens than the eager step, runs by the same code without a graph."""

    model: torch.nn.Module
    cache: SlotCache
    vocab_size: int  # ids beyond the tokenizer (a padded lm_head) are never sampled
    temperature: float
    cuda_graphs: bool  # becomes false if a recording fails
    graphs: dict = field(default_factory=dict)  # (rows, kv_len) -> (graph, its outputs), or None if unusable

    def __post_init__(self):
        # [3, slots]: token, position and random number of each row, read by a decode step. Position -1 marks
        # a row of padding.
        self.inputs = torch.zeros(3, self.cache.slots, dtype=torch.float64, device=self.model.device)
        self.pool = torch.cuda.graph_pool_handle() if self.cuda_graphs else None

    def prefill(self, slots: list[int], starts: list[int], chunks: list[list[int]]) -> torch.Tensor:
        """Feeds each slot its chunk of ids, from its start position on. Returns the logits after the last id
        of each chunk, [rows, vocab] fp32."""
        device, new = self.model.device, max(map(len, chunks))
        ids = torch.tensor([chunk + [0] * (new - len(chunk)) for chunk in chunks], device=device)
        start, slots = torch.tensor(starts, device=device), torch.tensor(slots, device=device)
        last = torch.tensor([len(chunk) - 1 for chunk in chunks], device=device)
        positions = start[:, None] + torch.arange(new, device=device)  # [rows, new]
        kv_len = max(s + len(chunk) for s, chunk in zip(starts, chunks, strict=True))
        hidden = step_hidden(self.model, self.cache, slots, ids, positions, start + last, kv_len)
        return self.logits(hidden[torch.arange(len(chunks), device=device), last])

    def decode(self, tokens: list[int], positions: list[int], u: list[float]):
        """Feeds each of the first n slots one token at its position, and samples the next one with the random
        number u. Returns the tokens and their log-probs, [n] each. The next call overwrites both."""
        n, rows, kv_len = len(tokens), len(tokens), max(positions) + 1
        if self.cuda_graphs:
            rows, kv_len = (
                min(round_up(n, 8), self.cache.slots),
                min(round_up(kv_len, 64), self.cache.max_len),
            )
            self.inputs[1, n:rows] = -1
        self.inputs[:, :n] = torch.tensor([tokens, positions, u], dtype=torch.float64)
        if self.cuda_graphs and (rows, kv_len) not in self.graphs:
            self.graphs[rows, kv_len] = self.record(rows, kv_len)
        if recorded := self.graphs.get((rows, kv_len)):
            graph, drawn = recorded
            graph.replay()
        else:
            drawn = self.step(rows, kv_len)
        return drawn[0][:n], drawn[1][:n]

    def step(self, rows: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One decode step of the first `rows` slots. It reads `inputs` and touches nothing on the host, as a
        CUDA graph requires. A row of padding writes into the scratch position of its slot."""
        tokens, last, u = self.inputs[:, :rows]
        tokens, last = tokens.long()[:, None], last.long()
        positions = last.clamp(min=0)[:, None]
        hidden = step_hidden(self.model, self.cache, rows, tokens, positions, last, kv_len)
        return sample(self.logits(hidden[:, 0]), u, self.temperature)

    def record(self, rows: int, kv_len: int) -> tuple | None:
        """(graph, the tensors that a replay fills), or None if there is no graph that repeats the eager step.

        A step can be run twice, because it writes the same keys and values into the same places."""
        eager = self.step(rows, kv_len)  # it also loads kernels, which is not allowed while recording
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                drawn = self.step(rows, kv_len)
            graph.replay()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed recording leaves its stream as the current one
            self.cuda_graphs = False
            reason = str(error).splitlines()[0]
            tqdm.write(f"warning: this rollout decodes without CUDA graphs (see --no-cuda_graphs): {reason}")
            return None
        if not torch.equal(drawn[0], eager[0]):
            tqdm.write(f"warning: no CUDA graph of {rows} rows and {kv_len} positions: it draws other tokens")
            return None
        return graph, drawn

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, H] -> logits [rows, vocab] fp32."""
        head = self.model.get_output_embeddings().weight
        logits = hidden @ head.T  # all columns, since an odd width is slow on a GPU; cut below
        return logits[:, : self.vocab_size].float()

    def draw(self, logits: torch.Tensor, u: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `sample`, with the random numbers as a list."""
        u = torch.tensor(u, dtype=torch.float64, device=logits.device)
        return sample(logits, u, self.temperature)


def round_up(n: int, least: int) -> int:
    """Rounds `n` up to a multiple of `least` or, if it is large, by at most a quarter, so that few different
    sizes occur."""
    step = max(least, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step
