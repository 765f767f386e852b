"""The GRPO loss beside other ways to compute it: from given logits, and from hidden states with the head.

    pip install liger-kernel trl cut-cross-entropy      # only for the comparison, and marked where absent
    python bench/kernels.py                             # on a CPU: a minute; on a GPU: some minutes
    python bench/kernels.py --quick                     # on a GPU: under a minute, one N, no torch.compile

It writes its tables into bench/RESULTS.md: with a GPU those of the GPU, without one that of the CPU.

On a CPU: one thread, CPU time, both sides take turns, and the best of the rounds counts. The logits are fresh
before every turn, outside of its time. Memory is the peak of what torch allocates beyond the logits.

On a GPU: the inputs are random bf16 numbers, drawn anew before every run and outside of its time, which
also takes older data out of the cache. Times are from CUDA events, the median of several runs after two
that do not count. Memory is the peak beyond the inputs, gradients included. Before anything is timed the
kernel is compared with float64. Density is the share of tokens whose loss mask is 1. From hidden states
ours gathers their rows first, in the measured time; from logits it is given these rows alone. The others
get the mask: plain torch multiplies by it, Liger skips work in rows whose mask is 0, cut-cross-entropy
leaves them out.
"""

import platform
import statistics
import sys
import time
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from results import write
from torch.profiler import ProfilerActivity, profile

import kernels

VOCAB, CPU_ROWS, ROUNDS = 151_936, 64, 15
QUICK = "--quick" in sys.argv
ROWS, WIDTHS, DENSITIES = (1024, 8192, 32768), (896, 2048, 3584), (1.0, 0.5, 0.25)
if QUICK:
    ROWS, WIDTHS, DENSITIES = (8192,), (896, 3584), (1.0, 0.25)
LENGTH = 1024  # tokens of an episode: Liger wants [episodes, tokens]
CLIP = {"epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.001}


def peer(name: str):
    """A module of a peer, None where the package is not installed or does not work here."""
    try:
        return import_module(name)
    except Exception:
        return None


LIGER, LIGER_LINEAR = peer("liger_kernel.ops.grpo_loss"), peer("liger_kernel.chunked_loss")
TRL, CCE = peer("trl.trainer.utils"), peer("cut_cross_entropy")


def columns(n: int, device, density: float = 1.0) -> SimpleNamespace:
    """Target, log-probs, advantages, mask and scale of n tokens; one advantage an episode."""
    generator = torch.Generator(device).manual_seed(n)
    rand = {"generator": generator, "device": device}
    target = torch.randint(VOCAB, (n,), **rand)
    old, ref = torch.randn(2, n, **rand) * 0.1 - 12
    length = min(LENGTH, n)
    episode = torch.randn(n // length, **rand)
    mask = torch.zeros(n, device=device)
    mask[torch.randperm(n, **rand)[: int(n * density)]] = 1
    scale = mask / mask.sum()
    return SimpleNamespace(
        target=target, old=old, ref=ref, episode=episode, advantages=episode.repeat_interleave(length),
        mask=mask, scale=scale, kept=mask.nonzero()[:, 0], shape=(n // length, length),
    )  # fmt: skip


def grpo(logp, c):
    """The objective of log-probs [n], as a graph."""
    ratio, x = (logp - c.old).clamp(-20, 20).exp(), (c.ref - logp).clamp(-20, 20)
    held = ratio.clamp(1 - CLIP["epsilon"], 1 + CLIP["epsilon_high"])
    kl = x.exp() - x - 1
    return (c.scale * (CLIP["beta"] * kl - torch.minimum(ratio * c.advantages, held * c.advantages))).sum()


def autograd(logits, c):
    """(loss, entropy) in plain torch: log_softmax and gather, with a graph for autograd."""
    logps = logits.float().log_softmax(1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(1)
    return grpo(logps.gather(1, c.target[:, None])[:, 0], c), entropy


def ours_from_logits(logits, c, **options):
    given = c.target, c.old, c.ref, c.advantages, c.scale
    return kernels.grpo_loss_from_logits(logits, *(x[c.kept] for x in given), **CLIP, **options)


# ------------------------------------------------------------------------------------------------------------
# CPU


def cpu_peak(function) -> float:
    """The peak of the memory that torch allocates meanwhile, in MB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak / 1e6


def cpu_row(dtype) -> list[str]:
    c = columns(CPU_ROWS, "cpu")
    fresh = (2 * torch.randn(CPU_ROWS, VOCAB, generator=torch.Generator().manual_seed(0))).to(dtype)
    logp = fresh.float().log_softmax(1).gather(1, c.target[:, None])[:, 0]
    c.old, c.ref = c.old + 12 + logp, c.ref + 12 + logp
    buffer = fresh.clone()

    def peer():
        leaf = buffer.requires_grad_()
        loss, _ = autograd(leaf, c)
        return loss, *torch.autograd.grad(loss, leaf)

    def twin():
        return ours_from_logits(buffer, c)[0], buffer

    results = []
    for side in (peer, twin):  # both have the same results, which is tested before they are timed
        buffer = fresh.clone()
        results.append(side())
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    error = (results[0][1] - results[1][1]).float().norm() / results[0][1].float().norm()
    assert error <= (1e-5 if dtype == torch.float32 else 8e-3)
    best = [float("inf")] * 2
    for _ in range(ROUNDS):
        for i, side in enumerate((peer, twin)):
            buffer = fresh.clone()
            start = time.process_time()
            side()
            best[i] = min(best[i], time.process_time() - start)
    peaks = []
    for side in (peer, twin):
        buffer = fresh.clone()
        peaks.append(cpu_peak(side))
    name = str(dtype).removeprefix("torch.")
    ratio = f"{best[0] / best[1]:.1f}x"
    return [name, f"{best[0] * 1e3:.0f}", f"{best[1] * 1e3:.0f}", ratio, *(f"{peak:.1f}" for peak in peaks)]


# ------------------------------------------------------------------------------------------------------------
# GPU


def gpu_cell(run, prepare) -> tuple[float, float]:
    """Milliseconds of `run`, each time after `prepare`, and its peak memory in GB."""
    times = []
    while len(times) < 2 + 3 or (len(times) < 2 + 20 and sum(times) < 500):
        prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(
            2_000_000
        )  # about a millisecond, in which the host launches the kernels that follow
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:]), (torch.cuda.max_memory_allocated() - before) / 1e9


def gpu_row(ways: dict, prepare) -> dict[str, tuple[float, float] | str]:
    """A cell for each way. A way that is None has no package here, or is left out. If a way fails, its cell
    names the error."""
    cells = {}
    for name, run in ways.items():
        try:
            cells[name] = gpu_cell(run, prepare) if run else "-"
        except Exception as error:
            full = isinstance(error, torch.OutOfMemoryError)
            cells[name] = "out of memory" if full else type(error).__name__
        torch.cuda.empty_cache()
    return cells


def show(cell, floor: float | None = None) -> str:
    """Time, memory, and `floor` (the time at the machine's rates) as a share of the time."""
    if isinstance(cell, str):
        return cell
    share = f", {floor / cell[0]:.0%}" if floor else ""
    return f"{cell[0]:.2f} ms{share}, {cell[1]:.2f} GB"


def ceilings() -> tuple[float, float]:
    """(bytes/s of a copy, read and written; FLOP/s of a bf16 product)."""
    a, b = torch.randn(2, 1 << 30, device="cuda").bfloat16()
    copy = 2 * a.nbytes / gpu_cell(lambda: a.copy_(b), lambda: b.neg_())[0] * 1e3
    a, b, out = torch.randn(3, 8192, 8192, device="cuda").bfloat16()
    return copy, 2 * 8192**3 / gpu_cell(lambda: torch.mm(a, b, out=out), lambda: a.neg_())[0] * 1e3


def check_on_gpu():
    """Compares the kernel with float64 of the same logits."""
    c = columns(32, "cuda")
    logits = (2 * torch.randn(32, VOCAB, device="cuda")).bfloat16()
    leaf = logits.double().requires_grad_()
    logps = leaf.log_softmax(1).gather(1, c.target[:, None])[:, 0]
    c.old, c.ref = (logps.detach().float() + x for x in (0.3, -0.3))
    grpo(logps, c).backward()
    _, stats = ours_from_logits(logits, c)
    assert (stats["logps"] - logps).abs().max() < 1e-5
    assert (logits - leaf.grad).norm() < 4e-3 * leaf.grad.norm()


def from_logits(n: int, density: float, compiled) -> dict:
    """Ways from logits [n, VOCAB] to log-prob and entropy, and to loss and dlogits."""
    c = columns(n, "cuda", density)
    episodes, length = c.shape
    buffer = torch.empty(episodes, length + 1, VOCAB, dtype=torch.bfloat16, device="cuda")  # Liger's shape
    logits = buffer.view(-1, VOCAB)[:n]
    rows = logits[: len(c.kept)]  # a caller that gathers first has these rows alone

    def leaf():
        return logits.detach().requires_grad_()

    def graph(function):
        x = leaf()
        torch.autograd.grad(function(x, c)[0], x)

    ways = {
        "forward, ours": lambda: ours_from_logits(rows, c, gradient=False),
        "forward, TRL": None,
        "with gradient, ours": lambda: ours_from_logits(rows, c),
        "with gradient, torch": lambda: graph(autograd),
        "with gradient, torch.compile": compiled and (lambda: graph(compiled)),
        "with gradient, Liger in place": None,
    }
    if TRL:

        def trl_forward():
            with torch.no_grad():
                TRL.selective_log_softmax(logits, c.target), TRL.entropy_from_logits(logits)

        ways["forward, TRL"] = trl_forward
    if LIGER:
        ids, old, ref, mask = (x.view(c.shape) for x in (c.target, c.old, c.ref, c.mask))
        clip = CLIP["beta"], CLIP["epsilon"], CLIP["epsilon_high"]

        def liger():
            x = buffer.detach().requires_grad_()
            loss, *_ = LIGER.GrpoLossFunction.apply(x, old, ref, ids, c.episode, mask, 1.0, *clip, True)
            loss.backward()

        ways["with gradient, Liger in place"] = liger
    return gpu_row(ways, lambda: buffer.normal_(std=2))


def from_hidden(n: int, width: int, density: float, compiled) -> dict:
    """Ways from hidden [n, width] and weight [VOCAB, width] to loss and both gradients."""
    c = columns(n, "cuda", density)
    hidden = torch.empty(n, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.empty(VOCAB, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    def prepare():
        hidden.data.normal_()
        weight.data.normal_(std=2 * width**-0.5)

    def gradients(loss):
        torch.autograd.grad(loss, (hidden, weight))

    def products():
        """The three matrix products that every way needs, of the rows under the mask, in the same chunks."""
        for h in hidden.detach()[: len(c.kept)].split(8192):
            logits = h @ weight.detach().T
            logits @ weight.detach(), logits.T @ h

    def ours():
        given = c.target, c.old, c.ref, c.advantages, c.scale
        gradients(kernels.grpo_loss(hidden[c.kept], weight, *(x[c.kept] for x in given), **CLIP)[0])

    ways = {
        "three products": products,
        "ours": ours,
        "torch": lambda: gradients(autograd(hidden @ weight.T, c)[0]),
        "torch.compile": compiled and (lambda: gradients(compiled(hidden @ weight.T, c)[0])),
        "Liger fused linear": None,
        "cut-cross-entropy": None,
    }
    if LIGER_LINEAR:
        ids, old, ref, mask = (x.view(c.shape) for x in (c.target, c.old, c.ref, c.mask))
        loss_of = LIGER_LINEAR.LigerFusedLinearGRPOLoss(
            beta=CLIP["beta"], epsilon_low=CLIP["epsilon"], epsilon_high=CLIP["epsilon_high"]
        )
        extra = {"ref_per_token_logps": ref, "old_per_token_logps": old}
        args = hidden.view(*c.shape, width), weight, ids, mask, c.episode
        ways["Liger fused linear"] = lambda: gradients(loss_of(*args, **extra)[0])
    if CCE:
        target = c.target.masked_fill(c.mask == 0, -100)

        def cce():
            gradients(grpo(-CCE.linear_cross_entropy(hidden, weight, target, reduction="none"), c))

        ways["cut-cross-entropy"] = cce
    return gpu_row(ways, prepare)


def gpu_text() -> str:
    """Both GPU tables."""
    logit_ways = ("forward, ours", "forward, TRL", "with gradient, ours", "with gradient, torch",
                  "with gradient, torch.compile", "with gradient, Liger in place")  # fmt: skip
    hidden_ways = (
        "three products", "ours", "torch", "torch.compile", "Liger fused linear", "cut-cross-entropy",
    )  # fmt: skip
    check_on_gpu()
    copy, rate = ceilings()
    compiled = None if QUICK else torch.compile(autograd)
    first = [["N", "density", *logit_ways], ["---:"] * 8]
    for n in ROWS:
        for density in DENSITIES:
            cells = from_logits(n, density, compiled)
            # ms to read the rows once; with the gradient they are also written
            read = n * density * VOCAB * 2 / copy * 1e3
            floors = [read, None, 2 * read, None, None, None]
            row = [show(cells[name], floor) for name, floor in zip(logit_ways, floors, strict=True)]
            first.append([f"{n:,}", str(density), *row])
    second = [["N", "H", "density", *hidden_ways], ["---:"] * 9]
    for n in ROWS:
        for width in WIDTHS:
            for density in DENSITIES:
                cells = from_hidden(n, width, density, compiled)
                floor = 6 * n * density * width * VOCAB / rate * 1e3
                row = [show(cells[name], floor if name == "ours" else None) for name in hidden_ways]
                second.append([f"{n:,}", f"{width:,}", str(density), *row])
    peers = {"liger-kernel": LIGER, "trl": TRL, "cut-cross-entropy": CCE}
    there = [f"{name} {version(name)}" for name, module in peers.items() if module]
    absent = [name for name, module in peers.items() if not module]
    gpu = torch.cuda.get_device_properties(0)
    return f"""## The loss at the head on a GPU: ours beside torch, TRL, Liger, cut-cross-entropy

`python bench/kernels.py{" --quick" if QUICK else ""}`, {date.today()}, {gpu.name}, torch {torch.__version__},
triton {version("triton")}, {", ".join(there) or "no other package"}{"; absent: " if absent else ""}\
{", ".join(absent)}. In the same run a copy moved {copy / 1e12:.2f} TB/s and a bf16 product of 8,192 cubed ran
at {rate / 1e12:.0f} TFLOP/s. The percentage is the least possible time divided by the measured one. The least
possible time is that of one reading of the kept rows (forward), of one reading and one writing
(with gradient), or of 6 N H V operations, where N counts the kept rows. "-" was not run.

From given logits, bf16, V = {VOCAB:,}: time and memory beyond the logits.

{table(first)}

From hidden states, bf16, V = {VOCAB:,}, forward and both gradients: time and memory beyond the inputs.
Density is the share of tokens whose loss mask is 1. "Three products" are the matrix products alone.

{table(second)}"""


def cpu_text() -> str:
    torch.set_num_threads(1)
    head = "logits", "autograd, CPU ms", "ours, CPU ms", "ratio", "autograd, MB", "ours, MB"
    rows = [[*head], ["---:"] * 6, cpu_row(torch.float32), cpu_row(torch.bfloat16)]
    return f"""## The loss at the head on a CPU: ours beside autograd

`python bench/kernels.py`, {date.today()}, Python {platform.python_version()}, torch {torch.__version__}.

On a CPU: the input is {CPU_ROWS} rows of {VOCAB:,} logits, the output is the loss, the entropy and the
gradient at the logits. Ours is kernels/reference.py; the peer is log_softmax in fp32, gather and entropy with
autograd. CPU time, one thread, the best of {ROUNDS} turns; MB at the peak beyond the logits.

{table(rows)}"""


def table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main():
    on_gpu = torch.cuda.is_available()
    text = gpu_text() if on_gpu else cpu_text()
    print(text)
    write("kernels on a GPU" if on_gpu else "kernels", text)


if __name__ == "__main__":
    main()
