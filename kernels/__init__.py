"""The computations that have kernels of their own: the GRPO loss at the language-model head, with log-probs,
entropy and KL; and two parts of a decode step (a step with one new token for each row), the attention and the
draw.

    loss, stats = grpo_loss(hidden, weight, target, old_logps, ref_logps, advantages, scale,
                            epsilon=0.2, epsilon_high=0.2, beta=0.001)
    logps, entropy = token_logps(hidden, weight, target)
    tokens, logps = sample(logits, u, temperature, vocab_size)

reference.py     the loss of rows of logits, its gradient, and the draw, in plain torch; read this first
chunked.py       `grpo_loss` and `token_logps`, for one chunk of rows at a time: the product that makes the
                 logits, their loss, and the products that carry its gradient back. The logits of all tokens
                 of a batch would be the largest tensor of the training, so only those of one chunk exist
triton_loss.py   reference.py as one Triton kernel
attention.py     a Triton kernel for the attention of a decode step, which runner.py calls
sampling.py      the draw of reference.py as two Triton kernels
"""

import os
from importlib.util import find_spec

import torch

from kernels.chunked import grpo_loss, token_logps

__all__ = ["grpo_loss", "grpo_loss_from_logits", "sample", "token_logps"]


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether a tensor goes to the Triton kernels: on a GPU if triton is installed. With TRITON_INTERPRET=1
    in the environment tensors on a CPU go there too, in Triton's interpreter, which is slow but can be
    debugged. All others go to plain torch."""
    return os.environ.get("TRITON_INTERPRET") == "1" or (tensor.is_cuda and find_spec("triton") is not None)


def grpo_loss_from_logits(logits, target, old_logps, ref_logps, advantages, scale, **options):
    """The loss of rows of logits, and their gradient in place: see reference.grpo_loss_from_logits."""
    if use_triton(logits):
        from kernels.triton_loss import grpo_loss_from_logits as run  # here: a CPU needs no triton
    else:
        from kernels.reference import grpo_loss_from_logits as run
    return run(logits, target, old_logps, ref_logps, advantages, scale, **options)


def sample(logits, u, temperature, vocab_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The draw of the next token: see reference.sample."""
    if use_triton(logits):
        from kernels.sampling import sample as run
    else:
        from kernels.reference import sample as run
    return run(logits, u, temperature, vocab_size)
