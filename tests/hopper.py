"""Compiles the kernels for an H200 on a machine that has none, and prints properties of the results as one
line of JSON. It is a separate program, because a process with TRITON_INTERPRET=1 cannot compile.

    PYTHONPATH=. python tests/hopper.py

Triton asks its driver which GPU to compile for, and only a launch needs a real GPU. So the driver is
replaced, and `warmup` is called, which does everything that comes before a launch.
"""

import json
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels import attention, sampling, triton_loss


class Hopper:
    """The part of a driver that a compilation uses."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class WarmUp:
    """Takes the place of a kernel: `kernel[grid](..)` compiles the kernel and keeps the result."""

    def __init__(self, kernel):
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))

        return launch

    def result(self) -> dict:
        """Numbers of launches and of compilations, and what the last one uses: registers, bytes that did not
        fit into them, and how it reads and writes global memory ({"v4.b32": 2} is twice 16 bytes at once)."""
        accesses = re.findall(r"(?:ld|st)\.global\.(\S+)", self.compiled[-1].asm["ptx"])
        return {
            "launches": len(self.compiled),
            "compilations": len({id(k) for k in self.compiled}),
            "accesses": {kind: accesses.count(kind) for kind in accesses},
            **usage(self.compiled[-1].asm["cubin"]),
        }


def usage(cubin: bytes) -> dict[str, int]:
    """How many registers a thread uses, and how many bytes did not fit into them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def loss() -> dict:
    kernel = triton_loss._visit_row
    launches = triton_loss._visit_row = WarmUp(kernel)
    vocab, options = 151_936, {"epsilon": 0.2, "epsilon_high": 0.3, "beta": 0.1}
    logits, target = torch.empty(50, vocab, dtype=torch.bfloat16), torch.zeros(100, dtype=torch.int64)
    columns = [torch.zeros(100) for _ in range(4)]
    for n in range(1, 51):  # 1, odd n and multiples of 16; with an odd n the columns begin at odd addresses
        cut = [x[n : 2 * n] for x in (target, *columns)]
        triton_loss.grpo_loss_from_logits(logits[:n], *cut, **options)
    triton_loss._visit_row = kernel
    return launches.result()


def draw() -> dict:
    kernels = sampling._sum_blocks, sampling._pick
    launches = sampling._sum_blocks, sampling._pick = WarmUp(kernels[0]), WarmUp(kernels[1])
    logits, u = torch.empty(256, 151_936, dtype=torch.bfloat16), torch.zeros(256, dtype=torch.float64)
    for n in (1, 7, 16, 256):
        sampling.sample(logits[:n], u[:n], torch.ones(()), 151_665)
    sampling._sum_blocks, sampling._pick = kernels
    return {"_sum_blocks": launches[0].result(), "_pick": launches[1].result()}


def decode(size: int, dtype: torch.dtype, group: int = 7) -> dict:
    """The attention of some numbers of rows, two of which have their keys divided among several programs."""
    kernels = attention._attend, attention._merge
    launches, merges = attention._attend, attention._merge = WarmUp(kernels[0]), WarmUp(kernels[1])
    cache = torch.empty(256, 2, 2049, size, dtype=dtype)
    for n in (8, 24, 256):
        q, lengths = torch.empty(n, 2 * group, size, dtype=dtype), torch.zeros(n, dtype=torch.int64)
        attention.decode_attention(q, cache[:n, :, :2048], cache[:n, :, :2048], lengths)
    attention._attend, attention._merge = kernels
    compiled = [*launches.compiled, *merges.compiled]
    return launches.result() | {
        "spilled": sum(usage(k.asm["cubin"])["spilled"] for k in compiled),
        "shared": max(k.metadata.shared for k in compiled),
        "products": "mma" if "mma" in launches.compiled[-1].asm["ptx"] else "none",
    }


def main():
    triton.runtime.driver.set_active(Hopper())
    result = {"loss": loss(), **draw()}
    for size in (8, 64, 80, 96, 128, 256):
        result[f"attention {size}"] = decode(size, torch.bfloat16)
    result["attention 8 fp32"] = decode(8, torch.float32, group=2)
    result["attention 256 fp32"] = decode(256, torch.float32, group=16)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
