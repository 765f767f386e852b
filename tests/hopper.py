"""Compiles the loss kernel for an H200 on a machine that has none, and prints properties of the result as one
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

from kernels import triton_loss


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


def usage(cubin: bytes) -> dict[str, int]:
    """How many registers a thread uses, and how many bytes did not fit into them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def main():
    triton.runtime.driver.set_active(Hopper())
    launches = triton_loss._visit_row = WarmUp(triton_loss._visit_row)
    vocab, options = 151_936, {"epsilon": 0.2, "epsilon_high": 0.3, "beta": 0.1}
    logits, target = torch.empty(50, vocab, dtype=torch.bfloat16), torch.zeros(100, dtype=torch.int64)
    columns = [torch.zeros(100) for _ in range(4)]
    for n in range(1, 51):  # 1, odd n and multiples of 16; with an odd n the columns begin at odd addresses
        cut = [x[n : 2 * n] for x in (target, *columns)]
        triton_loss.grpo_loss_from_logits(logits[:n], *cut, **options)
    kernel = launches.compiled[-1]
    accesses = re.findall(r"(?:ld|st)\.global\.(\S+)", kernel.asm["ptx"])  # v4.b32: 16 bytes at once
    result = {
        "launches": len(launches.compiled),
        "compilations": len({id(k) for k in launches.compiled}),
        "accesses": {kind: accesses.count(kind) for kind in accesses},
        **usage(kernel.asm["cubin"]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
