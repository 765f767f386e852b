"""Log-probs, entropy, KL and the GRPO loss at the language-model head. No more than one chunk of logits
exists at a time: the logits of all tokens of a batch would be the largest tensor of the training.

    loss, stats = grpo_loss(hidden, weight, target, old_logps, ref_logps, advantages, scale,
                            epsilon=0.2, epsilon_high=0.2, beta=0.001)
    logps, entropy = token_logps(hidden, weight, target)

reference.py     the loss of rows of logits and its gradient, in plain torch; read this first
chunked.py       the two functions above: for one chunk of rows at a time, the product that makes the logits,
                 their loss, and the products that carry its gradient back
triton_loss.py   reference.py as one Triton kernel
"""

import os
from importlib.util import find_spec

from kernels.chunked import grpo_loss, token_logps

__all__ = ["grpo_loss", "grpo_loss_from_logits", "token_logps"]


def grpo_loss_from_logits(logits, target, old_logps, ref_logps, advantages, scale, **options):
    """The loss of rows of logits, and their gradient in place: see reference.grpo_loss_from_logits.

    Tensors on a GPU go to the Triton kernel if triton is installed, others to plain torch. With
    TRITON_INTERPRET=1 in the environment CPU tensors go to the kernel too, in Triton's interpreter, which is
    slow but can be debugged."""
    if os.environ.get("TRITON_INTERPRET") == "1" or (logits.is_cuda and find_spec("triton")):
        from kernels.triton_loss import grpo_loss_from_logits as run  # here: a CPU needs no triton
    else:
        from kernels.reference import grpo_loss_from_logits as run
    return run(logits, target, old_logps, ref_logps, advantages, scale, **options)
