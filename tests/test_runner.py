"""python -m pytest tests/test_runner.py

CUDA graphs are tested on a GPU where there is one. Without, a stand-in replays by running the step again, and
every operation of a step is asked whether it needs the host.
"""

import contextlib
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_rollout import SHAPES, Shelf, build, questions, words
from torch.utils._python_dispatch import TorchDispatchMode

import rollout as module
from data import SEM
from rollout import rollout
from runner import Runner, SlotCache, roomy

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Graph:
    """Stands in for torch.cuda.CUDAGraph. A replay runs the recorded step again, and fills the recorded
    tensors."""

    now, made, noise, fails, stream = None, [], 0, False, None

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
        Graph.now = graph
        yield
        Graph.now = None
        if Graph.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.fixture
def graphs(monkeypatch):
    step = Runner.step

    def recorded(self, rows, kv_len):
        drawn = step(self, rows, kv_len)
        if graph := Graph.now:
            graph.run, graph.drawn = partial(step, self, rows, kv_len), tuple(t.clone() for t in drawn)
            return graph.drawn
        return drawn

    for name, value in {"made": [], "noise": 0, "fails": False, "now": None, "stream": None}.items():
        monkeypatch.setattr(Graph, name, value)
    monkeypatch.setattr(Runner, "step", recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main stream")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(Graph, "stream", stream))
    monkeypatch.setattr(Runner, "cuda_graphs", True)

    def start():
        monkeypatch.setattr(module, "Runner", lambda *args, records: Runner(*args, records=True))

    return start


def sample(shape, **options):
    model = build(shape, words()).to("cuda" if torch.cuda.is_available() else "cpu")
    options = {"slots": 9, "temperature": 1.0} | options
    return rollout(
        model,
        words(),
        SEM,
        questions(7),
        group_size=3,
        retriever=Shelf(),
        max_completion_length=90,
        **options,
    )


def said(episodes):
    return [(e.ids, e.stop, e.loss_mask) for e in episodes]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 9, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_replayed_steps_are_the_eager_ones(graphs, shape, slots, temperature):
    """Rounded up to more rows and a longer cache, and with other rows' slots among the padding."""
    eager = sample(shape, slots=slots, temperature=temperature)
    graphs()
    replayed = sample(shape, slots=slots, temperature=temperature)
    assert said(replayed) == said(eager)
    assert sum(e.searches for e in eager) > 3
    for a, b in zip(eager, replayed, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-4)
    assert 0 < len(Graph.made) < 12


def test_what_cannot_be_recorded_runs_eagerly(graphs, capsys):
    """Tried once in a process, not in every rollout; and the process is back on its own stream."""
    eager = sample("llama")
    graphs()
    Graph.fails = True
    for _ in range(2):
        assert said(sample("llama")) == said(eager) and len(Graph.made) == 1
    warning = "warning: decoding without CUDA graphs: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().out == warning and Graph.stream == "main stream"


def test_a_graph_that_draws_something_else_is_not_used(graphs, capsys):
    eager = sample("llama")
    graphs()
    Graph.noise = 1
    assert said(sample("llama")) == said(eager) and len(Graph.made) > 1
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == len(Graph.made) and "it draws other tokens" in warnings[0]


def test_graphs_can_be_switched_off(graphs):
    graphs()
    Runner.cuda_graphs = False
    sample("llama")
    assert not Graph.made


class OnTheDevice(TorchDispatchMode):
    """Refuses what reads a number on the host or brings one from there. A recording would fail at it, or
    freeze the number."""

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
    runner = Runner(model, cache, len(words()), temperature, records=False)
    with OnTheDevice():
        t, _ = runner.step(8, 32)
        off = t[0].item, lambda: bool(t[0]), lambda: t[t > 1], lambda: t[[0, 1]], lambda: torch.tensor([1])
        for on_the_host in off:
            with pytest.raises(OffTheDevice):
                on_the_host()


@given(st.integers(1, 100_000), st.sampled_from([8, 64]))
def test_roomy(n, least):
    assert n <= roomy(n, least) < n + max(least, n / 4 + 1)
    assert roomy(roomy(n, least), least) == roomy(n, least)
    assert len({roomy(i, 64) for i in range(1, 8193)}) == 8 + 4 * 4


@gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu(shape, monkeypatch):
    runners = []

    def runner(*args, records):
        runners.append(Runner(*args, records=records))
        return runners[-1]

    monkeypatch.setattr(module, "Runner", runner)
    replayed = sample(shape)
    assert runners[0].records and runners[0].graphs and all(runners[0].graphs.values())
    monkeypatch.setattr(module, "Runner", lambda *args, records: Runner(*args, records=False))
    assert said(sample(shape)) == said(replayed)
