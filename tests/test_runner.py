"""python -m pytest tests/test_runner.py

CUDA graphs are tested on a GPU where there is one. Elsewhere a stand-in replays a step by running it again,
and a second test checks that no operation of a step needs the host.
"""

import contextlib
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_rollout import SHAPES, Shelf, build, questions, words
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import rollout as module
from prompts import SEM
from rollout import rollout
from runner import ModelRunner, SlotCache, round_up

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Graph:
    """Stands in for torch.cuda.CUDAGraph. A replay runs the recorded step again, and fills the recorded
    tensors. With `noise` it draws other tokens, and with `fails` the recording raises an error."""

    recording, made, noise, fails, stream = None, [], 0, False, None

    def __init__(self):
        Graph.made.append(self)

    def replay(self):
        for old, new in zip(self.drawn, self.run(), strict=True):
            old.copy_(new)
        self.drawn[0].add_(Graph.noise)

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
    if not torch.cuda.is_available():
        monkeypatch.setattr(PreTrainedModel, "device", property(lambda model: Device("cpu")))


def sample(shape, **options):
    model = build(shape, words()).to("cuda" if torch.cuda.is_available() else "cpu")
    options = {"slots": 9, "temperature": 1.0} | options
    return rollout(
        model, words(), SEM, questions(7), group_size=3, retriever=Shelf(), max_completion_length=90,
        **options,
    )  # fmt: skip


def content(episodes):
    return [(e.ids, e.stop, e.loss_mask) for e in episodes]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 9, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_replayed_steps_are_the_eager_ones(graphs, shape, slots, temperature):
    """The numbers of rows and of cache positions are rounded up, and the rows of padding have the slots of
    other rows, which must not change."""
    eager = sample(shape, slots=slots, temperature=temperature, cuda_graphs=False)
    assert not Graph.made
    replayed = sample(shape, slots=slots, temperature=temperature)
    assert content(replayed) == content(eager)
    assert sum(e.searches for e in eager) > 3
    for a, b in zip(eager, replayed, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-4)
    assert 0 < len(Graph.made) < 12


def test_what_cannot_be_recorded_runs_eagerly(graphs, capsys):
    """A rollout tries once and then decodes without graphs, on the stream that it had before. The next
    rollout tries again."""
    eager = sample("llama", cuda_graphs=False)
    Graph.fails = True
    reason = "operation not permitted when stream is capturing"
    warning = f"warning: this rollout decodes without CUDA graphs (see --no-cuda_graphs): {reason}\n"
    for tries in (1, 2):
        Graph.stream = None
        assert content(sample("llama")) == content(eager) and len(Graph.made) == tries
        assert capsys.readouterr().out == warning and Graph.stream == "main stream"
    Graph.fails = False
    assert content(sample("llama")) == content(eager) and len(Graph.made) > 3
    assert capsys.readouterr().out == ""


def test_a_graph_that_draws_something_else_is_not_used(graphs, capsys):
    eager = sample("llama", cuda_graphs=False)
    Graph.noise = 1
    assert content(sample("llama")) == content(eager) and len(Graph.made) > 1
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == len(Graph.made) and "it draws other tokens" in warnings[0]


def test_graphs_are_for_a_gpu_and_can_be_switched_off(graphs, monkeypatch):
    sample("llama", cuda_graphs=False)
    assert not Graph.made
    if not torch.cuda.is_available():
        monkeypatch.setattr(Device, "type", "cpu")
        sample("llama")
        assert not Graph.made


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
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decode_step_stays_on_the_device(shape, temperature):
    model = build(shape, words())
    cache = SlotCache(model.config, 8, 64, "cpu", torch.float32)
    runner = ModelRunner(model, cache, len(words()), temperature, cuda_graphs=False)
    with OnTheDevice():
        t, _ = runner.step(8, 32)
        # these need the host, and the mode refuses them
        for refused in (
            lambda: t[0].item(), lambda: bool(t[0]), lambda: t[t > 1], lambda: t[[0, 1]],
            lambda: torch.tensor([1]),
        ):  # fmt: skip
            with pytest.raises(OffTheDevice):
                refused()


@given(st.integers(1, 100_000), st.sampled_from([8, 64]))
def test_round_up(n, least):
    assert n <= round_up(n, least) < n + max(least, n / 4 + 1)
    assert round_up(round_up(n, least), least) == round_up(n, least)
    assert len({round_up(i, 64) for i in range(1, 8193)}) == 8 + 4 * 4


@gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_replayed_steps_on_a_gpu_are_the_eager_ones(shape, monkeypatch):
    runners = []

    def runner(*args):
        runners.append(ModelRunner(*args))
        return runners[-1]

    monkeypatch.setattr(module, "ModelRunner", runner)
    replayed, eager = sample(shape), sample(shape, cuda_graphs=False)
    assert runners[0].cuda_graphs and runners[0].graphs and all(runners[0].graphs.values())
    assert not runners[1].cuda_graphs and not runners[1].graphs
    assert content(eager) == content(replayed)
