"""python -m pytest tests/test_runner.py

CUDA graphs are tested on a GPU where there is one. Without, a stand-in replays by running the step again;
that a step asks nothing of the host is shown on the meta device.
"""

import contextlib
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_rollout import SHAPES, Shelf, build, questions, words

import rollout as module
from data import SEM
from rollout import rollout
from runner import Runner, SlotCache, roomy

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Graph:
    """Stands in for torch.cuda.CUDAGraph. A replay runs the recorded step again, and fills the recorded
    tensors."""

    now, made, noise, fails = None, [], 0, False

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

    for name, value in {"made": [], "noise": 0, "fails": False, "now": None}.items():
        monkeypatch.setattr(Graph, name, value)
    monkeypatch.setattr(Runner, "step", recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

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


def test_what_can_not_be_recorded_runs_eagerly(graphs, capsys):
    eager = sample("llama")
    graphs()
    Graph.fails = True
    assert said(sample("llama")) == said(eager) and len(Graph.made) == 1
    warning = "warning: decoding without CUDA graphs: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().out == warning


def test_a_graph_that_draws_something_else_is_not_used(graphs):
    eager = sample("llama")
    graphs()
    Graph.noise = 1
    assert said(sample("llama")) == said(eager) and len(Graph.made) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decode_step_stays_on_the_device(shape, temperature):
    """On the meta device there are no numbers: whoever reads one, or brings a tensor of the host, fails. A
    recording would fail, or freeze it."""
    model = build(shape, words()).to("meta")
    cache = SlotCache(model.config, 8, 64, "meta", torch.float32)
    runner = Runner(model, cache, len(words()), temperature, records=False)
    tokens, logps = runner.step(8, 32)
    assert tokens.shape == logps.shape == (8,) and tokens.device.type == "meta"
    with pytest.raises(RuntimeError):
        tokens.tolist()


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
    assert runners[0].records and sum(g is not None for g in runners[0].graphs.values()) > 0
    monkeypatch.setattr(module, "Runner", lambda *args, records: Runner(*args, records=False))
    assert said(sample(shape)) == said(replayed)
