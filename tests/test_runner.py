"""python -m pytest tests/test_runner.py

CUDA graphs are tested on a GPU where there is one. A stand-in, which runs on any machine, replays a step by
running it again, and a second test checks that no operation of a step in plain torch needs the host. The
attention kernel runs on the GPU or in Triton's interpreter.
"""

import contextlib
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import attention as kernel  # made for the interpreter where there is no GPU
from test_rollout import REFUSED, SHAPES, Shelf, build, questions, random_model, words
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import rollout as loop
import runner as module
from config import Config, parse
from data import InputError
from grpo import train_step
from model import load_model, probe
from prompts import RESEARCH, SEARCH_R1, SEM, SSRL
from rollout import rollout
from run import Run, resolve
from runner import ModelRunner, attend, round_up

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


class Graph:
    """Stands in for torch.cuda.CUDAGraph. A replay runs the recorded step again, and fills the recorded
    tensors. `noise` is added to a logit, and with `fails` the recording raises an error."""

    recording, made, noise, fails, stream = None, [], 0, False, None

    def __init__(self):
        Graph.made.append(self)

    def replay(self):
        for old, new in zip(self.drawn, self.run(), strict=True):
            old.copy_(new)
        self.drawn[2][:, 0] += Graph.noise

    @staticmethod
    @contextlib.contextmanager
    def record(graph, pool):
        assert pool == "pool"
        Graph.recording = graph
        yield
        Graph.recording = None
        if Graph.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand a second line")


class Device(str):
    """A CPU that says it is a GPU, so that a rollout records graphs. For everything else it is the CPU."""

    type = "cuda"


@pytest.fixture
def graphs(monkeypatch):
    """Replaces torch's CUDA graphs by the stand-in."""
    step = ModelRunner.step

    def recorded(self, rows, kv_len):
        drawn = step(self, rows, kv_len)
        if graph := Graph.recording:
            graph.run, graph.drawn = partial(step, self, rows, kv_len), tuple(t.clone() for t in drawn)
            return graph.drawn
        return drawn

    values = {"made": [], "noise": 0, "fails": False, "recording": None, "stream": None}
    for name, value in values.items():
        monkeypatch.setattr(Graph, name, value)
    monkeypatch.setattr(ModelRunner, "step", recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main stream")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(Graph, "stream", stream))
    if not GPU:
        monkeypatch.setattr(PreTrainedModel, "device", property(lambda model: Device("cpu")))


def make(shape, **options):
    return ModelRunner(build(shape, words()).to(DEVICE), len(words()), **options)


def sample(runner, n=7, template=SEM, **options):
    options = {"slots": 9, "temperature": 1.0, "max_completion_length": 90, "group_size": 3} | options
    return rollout(runner.model, words(), template, questions(n), retriever=Shelf(), runner=runner, **options)


def content(episodes):
    return [(e.ids, e.stop, e.loss_mask) for e in episodes]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 9, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_replayed_steps_are_the_eager_ones(graphs, shape, slots, temperature):
    """The number of rows is rounded up, and the rows of padding have the slots of other rows, which must not
    change. The eager steps are those of a CPU, one at a time and without padding."""
    plain = make(shape, cuda_graphs=False)
    plain.on_gpu = False
    eager = sample(plain, slots=slots, temperature=temperature)
    assert not Graph.made
    runner = make(shape)
    replayed = sample(runner, slots=slots, temperature=temperature)
    assert content(replayed) == content(eager)
    assert sum(e.searches for e in eager) > 3
    for a, b in zip(eager, replayed, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-4)
    assert 0 < len(Graph.made) == len(runner.graphs) <= 3  # of 8, 16 and 21 rows


def test_a_runner_is_kept_from_rollout_to_rollout(graphs):
    """Greedy and sampled rollouts share their graphs. Only a longer or wider rollout needs a larger cache,
    and then new graphs. What an earlier rollout left in the cache changes nothing."""
    runner = make("llama", slots=9, max_len=120)
    cache = runner.cache
    for temperature in (1.0, 0.0, 0.7):
        fresh = sample(make("llama", cuda_graphs=False), temperature=temperature)
        assert content(sample(runner, temperature=temperature)) == content(fresh)
    assert runner.cache is cache and len(Graph.made) == len(runner.graphs) == 2  # of 8 and of 9 rows
    wider = sample(runner, slots=12, max_completion_length=150)
    assert content(wider) == content(sample(make("llama", cuda_graphs=False), max_completion_length=150))
    assert runner.cache is not cache and runner.cache.slots == 12 and runner.cache.max_len == 256
    assert len(Graph.made) == 2 + len(runner.graphs)


def test_what_is_no_number_does_not_outlast_its_rollout(graphs):
    """What is masked is multiplied by 0, and 0 * NaN is NaN."""
    runner = make("llama", slots=9, max_len=128)
    for tensor in (*runner.cache.keys, *runner.cache.values):
        tensor.fill_(float("nan"))
    assert content(sample(runner)) == content(sample(make("llama")))


def test_a_runner_of_another_model_is_an_error():
    runner = make("llama")
    with pytest.raises(ValueError, match="another model"):
        rollout(build("llama", words()), words(), SEM, questions(1), runner=runner)
    runner.vocab_size -= 1
    with pytest.raises(ValueError, match="another model or tokenizer"):
        sample(runner)


def test_the_cache_is_not_longer_than_the_context(graphs):
    runner = make("llama", slots=2, max_len=1000)
    assert runner.cache.max_len == runner.max_len == 256
    cache = runner.cache
    runner.prepare(2, 1000, 1.0)
    assert runner.cache is cache


@pytest.mark.parametrize("slots, max_len", [(3, 100), (2, 129), (3, 129)])
def test_a_cache_that_is_too_small_is_replaced(graphs, slots, max_len):
    """Lengths are rounded up to 128 positions, so that a few more tokens need no new cache."""
    runner = make("llama", slots=2, max_len=100)
    cache = runner.cache
    runner.prepare(2, 128, 1.0)
    assert runner.cache is cache
    runner.prepare(slots, max_len, 1.0)
    assert (runner.cache.slots, runner.cache.max_len) == (slots, 128 if max_len == 100 else 256)


def test_one_recording_for_each_number_of_rows_in_a_whole_run(graphs, world, lively, monkeypatch):
    """Three steps of training, with an evaluation before and after them. The weights are changed in place, so
    the replayed steps follow them."""
    rows, step = [], ModelRunner.decode

    def decode(self, tokens, positions, u):
        rows.append(round_up(len(tokens)))
        return step(self, tokens, positions, u)

    monkeypatch.setattr(ModelRunner, "decode", decode)

    def train(*switches):
        flags = [f"--{name}={value}" for name, value in world.items() if name != "output_dir"]
        flags += ["--max_steps=3", "--no-bf16", "--eval_size=12", "--eval", world["train"], *switches]
        run = Run(resolve(*parse(Config, "grpo.py", flags)))
        run.start()
        losses = [train_step(run)[0]["loss"] for _ in range(3)]
        run.finish()
        return losses, run.tables, {name: p.detach().clone() for name, p in run.model.named_parameters()}

    replayed = train(f"--output_dir={world['output_dir']}-1")
    assert len(Graph.made) == len(set(rows)) > 1 and len(rows) > 20
    eager = train(f"--output_dir={world['output_dir']}-2", "--no-cuda_graphs")
    assert len(Graph.made) == len(set(rows))
    assert replayed[0] == pytest.approx(eager[0], abs=1e-4) and replayed[1] == eager[1]
    for name, weight in replayed[2].items():
        torch.testing.assert_close(weight, eager[2][name], atol=1e-3, rtol=0)


def test_what_cannot_be_recorded_runs_eagerly(graphs, capsys, monkeypatch):
    """A runner tries once and then decodes without graphs, on the stream that it had before. The next runner
    tries again."""
    eager = sample(make("llama", cuda_graphs=False))
    Graph.fails = True
    reason = "operation not permitted when stream is capturing"
    warning = f"warning: decoding runs without CUDA graphs (see --no-cuda_graphs): {reason}\n"
    for tries in (1, 2):
        Graph.stream = None
        runner = make("llama")
        assert content(sample(runner)) == content(eager) and len(Graph.made) == tries
        assert content(sample(runner)) == content(eager) and len(Graph.made) == tries
        assert capsys.readouterr().out == warning and Graph.stream == "main stream"
    Graph.fails = False
    runner = make("llama")
    assert content(sample(runner)) == content(eager) and len(Graph.made) > 3
    assert capsys.readouterr().out == ""
    made, Graph.fails = len(Graph.made), True
    sample(runner, slots=21)  # 16 rows and more are new
    assert len(Graph.made) == made + 1 and not runner.cuda_graphs and capsys.readouterr().out == warning


@pytest.mark.parametrize("noise", [1.0, float("nan")])
def test_a_graph_with_other_logits_is_not_used(graphs, capsys, noise):
    eager = sample(make("llama", cuda_graphs=False))
    Graph.noise = noise
    runner = make("llama")
    assert content(sample(runner)) == content(eager) and len(Graph.made) > 1
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == len(Graph.made) and f"its logits differ by {noise:.2g}" in warnings[0]
    assert not any(runner.graphs.values())


def test_graphs_are_for_a_gpu_and_can_be_switched_off(graphs, monkeypatch):
    sample(make("llama", cuda_graphs=False))
    assert not Graph.made
    if not GPU:
        monkeypatch.setattr(Device, "type", "cpu")
        sample(make("llama"))
        assert not Graph.made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 9, 21])
@pytest.mark.parametrize("template", [SEM, SEARCH_R1, RESEARCH, SSRL], ids=lambda t: t.search + t.result)
def test_a_gpu_that_is_a_step_ahead_changes_no_episode(monkeypatch, template, slots, temperature):
    """What is drawn for rows that have ended, wait or ran out of tokens is not used. Rows run into the length
    limit, which is the end of the cache and of the context too."""
    if not GPU:
        monkeypatch.setattr(PreTrainedModel, "device", property(lambda model: Device("cpu")))
    results = []
    for every in (1, 8):
        monkeypatch.setattr(loop, "SERVE_EVERY", every)
        counts, model = {}, build("llama", words(), context=56).to(DEVICE)
        runner = ModelRunner(model, len(words()), cuda_graphs=GPU)
        episodes = sample(
            runner, slots=slots, temperature=temperature, template=template, counts=counts,
            max_completion_length=50,
        )  # fmt: skip
        segments = [[(s.kind, s.ids, s.text) for s in e.segments] for e in episodes]
        results.append((content(episodes), segments, counts))
    assert results[0] == results[1] and "length" in {e.stop for e in episodes}


def test_the_next_step_begins_before_the_tokens_of_a_step_are_handed_out(monkeypatch):
    """So a GPU has work while the caller reads the tokens."""
    runner = ModelRunner(build("llama", words()).to(DEVICE), len(words()), slots=1, max_len=32)
    begun, real = [], runner.replay
    monkeypatch.setattr(runner, "replay", lambda *args: begun.append(len(begun)) or real(*args))
    runner.prefill([0], [0], [[5, 6, 7]])
    counts = [len(begun) for _ in runner.decode([9], [3], [[0.2], [0.4], [0.6]])]
    assert counts == [2, 3, 3]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_fed_on_past_the_end_of_the_cache(shape):
    """That can also be the end of the context. The tokens up to there are those of single steps."""
    model, prompt = build(shape, words(), context=16).to(DEVICE), [5 + i for i in range(13)]

    def decode(*steps):
        runner = ModelRunner(model, len(words()), slots=1, max_len=16, cuda_graphs=False)
        runner.prefill([0], [0], [prompt])
        tokens, drawn = [9], []
        for u in steps:
            position = len(prompt) + len(drawn)
            drawn += [row[0] for row, _ in runner.decode(tokens, [position], u)]
            tokens = drawn[-1:]
        return drawn

    u = [[0.2], [0.7], [0.4], [0.9], [0.1], [0.6]]
    together = decode(u)
    assert len(together) == 6 and together[:3] == decode([u[0]], [u[1]], [u[2]])


class OnTheDevice(TorchDispatchMode):
    """Refuses every operation that reads a number on the host or brings one from there. A recording would
    fail at it, or freeze the number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        reads = name in ("item", "_local_scalar_dense", "is_nonzero", "nonzero")
        if name.startswith("index"):  # by a mask: the host must know how many it selects
            reads = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1])
        if reads or name == "lift_fresh":
            raise OffTheDevice(name)
        return func(*args, **(kwargs or {}))


class OffTheDevice(Exception):
    pass


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decode_step_stays_on_the_device(shape, monkeypatch):
    """Up to the logits; the draw on a GPU is a kernel."""
    runner = ModelRunner(build(shape, words()), len(words()), slots=8, max_len=64)
    monkeypatch.setattr(module, "sample", lambda logits, *_: (logits.argmax(-1), logits[:, 0]))
    with OnTheDevice():
        t, *_ = runner.step(8, 32)
        # these need the host, and the mode refuses them
        for refused in (
            lambda: t[0].item(), lambda: bool(t[0]), lambda: t[t > 1], lambda: t[[0, 1]],
            lambda: torch.tensor([1]),
        ):  # fmt: skip
            with pytest.raises(OffTheDevice):
                refused()


@given(st.integers(1, 100_000))
def test_round_up(n):
    assert n <= round_up(n) < n + max(8, n / 4 + 1)
    assert round_up(round_up(n)) == round_up(n)
    assert len({round_up(i) for i in range(1, 1025)}) == 8 + 4 * 4


# ------------------------------------------------------------------------------------------------------------
# the attention kernel


@pytest.fixture
def calls(monkeypatch):
    """Lets decode steps go through the kernel, and collects the numbers of rows of its calls."""
    rows, run = [], kernel.decode_attention

    def spied(q, *args):
        rows.append(len(q))
        return run(q, *args)

    monkeypatch.setattr(kernel, "decode_attention", spied)
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, temperature", [("qwen2", 0.0), ("qwen2", 1.0), ("qwen3", 1.0), ("llama", 0.0), ("gpt2", 1.0)]
)
def test_a_rollout_through_the_kernel_has_the_tokens_of_sdpa(calls, monkeypatch, shape, temperature):
    """In fp32, with ragged rows and with searches."""
    runner = make(shape, cuda_graphs=False)
    implementation = runner.model.config._attn_implementation
    options = {"temperature": temperature, "n": 4, "group_size": 1, "slots": 3, "max_completion_length": 24}
    ours = sample(runner, **options)
    assert calls and runner.model.config._attn_implementation == implementation == "sdpa"
    with monkeypatch.context() as patch:
        patch.setattr(module, "use_triton", lambda tensor: False)
        before = len(calls)
        theirs = sample(runner, **options)
        assert len(calls) == before
    assert content(ours) == content(theirs)
    assert sum(e.searches for e in ours) > 0 and len({len(e.prompt_ids + e.ids) for e in ours}) > 1
    for a, b in zip(ours, theirs, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-4)


def test_a_model_that_keeps_the_lengths_to_itself_is_computed_with_the_mask(calls):
    """nemotron drops the keyword arguments before its attention. stablelm does not declare
    `_supports_attention_backend`."""
    for name in ("nemotron", "stablelm"):
        probe(random_model(name).to(DEVICE), words(), 64)
    assert not calls


@pytest.mark.parametrize("case", REFUSED)
def test_probe_refuses_the_same_models(calls, case):
    model, reason = REFUSED[case]
    with pytest.raises(InputError, match=re.escape(reason)):
        probe(model().to(DEVICE), words(), 64)


@pytest.mark.parametrize("name", [*SHAPES, "mistral", "gemma3_text", "phi3", "olmo2"])
def test_probe_tries_the_kernel(calls, monkeypatch, name):
    """This includes models whose window is as long as the sequence. If the kernel is wrong for a model,
    `probe` refuses the model."""
    model = (build(name, words()) if name in SHAPES else random_model(name)).to(DEVICE)
    if name in ("mistral", "gemma3_text"):
        model.config.sliding_window = 64
    probe(model, words(), 64)
    assert calls == [2] * model.config.num_hidden_layers
    right = kernel.decode_attention
    monkeypatch.setattr(kernel, "decode_attention", lambda q, k, v, n, scale: right(q, k, v, n - 1, scale))
    with pytest.raises(InputError, match="attention through the slot cache differs"):
        probe(model, words(), 64)
    assert model.config._attn_implementation == "sdpa"


def test_an_error_in_a_step_leaves_the_attention_as_it_was(calls, monkeypatch):
    def fails(*args):
        raise RuntimeError

    runner = make("llama", slots=8, max_len=16)
    monkeypatch.setattr(kernel, "decode_attention", fails)
    with pytest.raises(RuntimeError):
        runner.step(8, 16)
    assert runner.model.config._attn_implementation == "sdpa"


def test_sinks_are_refused_at_loading(tmp_path):
    """gpt-oss has a probability that goes to no key. transformers knows that SDPA cannot compute it."""
    random_model("gpt_oss", "eager", num_local_experts=2, num_experts_per_tok=1).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="scaled_dot_product_attention"):
        load_model(str(tmp_path), "cpu")


def test_what_the_kernel_does_not_compute_is_an_error():
    q, kv, n = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.tensor([2, 5])
    for option in ({"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"of_tomorrow": 1}):
        with pytest.raises(ValueError, match=next(iter(option))):
            attend(None, q, kv, kv, None, lengths=n, **option)


# ------------------------------------------------------------------------------------------------------------
# on a GPU


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_replayed_steps_on_a_gpu_have_the_bits_of_eager_ones(shape, dtype):
    def run(**options):
        runner = ModelRunner(build(shape, words()).to(DEVICE, dtype), len(words()), **options)
        return runner, sample(runner)

    (graphs, replayed), (_, eager), (_, again) = run(), run(cuda_graphs=False), run(cuda_graphs=False)
    assert graphs.cuda_graphs and graphs.graphs and all(graphs.graphs.values())
    for a, b in ((eager, again), (eager, replayed)):
        assert content(a) == content(b) and [e.logps for e in a] == [e.logps for e in b]


@gpu
@torch.inference_mode()
@pytest.mark.parametrize("shape", ["qwen2", "gpt2"])
def test_a_step_of_many_ragged_rows_in_bf16_repeats_itself(shape):
    """A real width. The attention that torch prefers there, cuDNN's, gives other logits each time."""
    model = build(shape, words(), context=1024, hidden=256, dtype="bfloat16").to("cuda", torch.bfloat16)
    runner = ModelRunner(model, len(words()), slots=64, max_len=700)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(5, 600, (64,), generator=generator).tolist()
    chunks = [[i % 40 for i in range(n)] for n in starts]
    results = []
    for _ in range(3):
        results.append(runner.prefill(list(range(64)), [0] * 64, chunks))
    assert all(torch.equal(results[0], other) for other in results)
    runner.inputs[:] = torch.tensor([[3] * 64, starts, [0.5] * 64], dtype=torch.float64)
    steps = [runner.step(64, 700)[2] for _ in range(3)]
    assert all(torch.equal(steps[0], other) for other in steps)


@gpu
def test_gpt2_with_a_pad_token_does_not_wait_for_the_host(capsys):
    """gpt2 looks for its pad_token_id among the ids, unless it gets a mask."""
    runner = ModelRunner(build("gpt2", words(), pad_token_id=0).to(DEVICE), len(words()))
    sample(runner)
    assert runner.cuda_graphs and all(runner.graphs.values()) and not capsys.readouterr().out
