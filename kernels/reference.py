"""The GRPO loss in plain torch: what it computes, and its gradient written out. It runs on any device. At the
end is `sample`, the draw of the next token.

For one row of logits, z [V] = logits / temperature, the sampled token y, and p = softmax(z):

    logp      = z_y - logsumexp(z)                   d logp / d z_j = 1[j = y] - p_j
    entropy   = logsumexp(z) - sum_j p_j z_j         (reported, not trained on)
    ratio     = exp(clamp(logp - old_logp, -20, 20))
    surrogate = -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)      GRPO, arXiv 2402.03300, eq. 3
    kl (k3)   = exp(x) - x - 1,  x = clamp(ref_logp - logp, -20, 20)             the same, eq. 4
    loss      = sum over rows of scale * (surrogate + beta kl)

logp and entropy do not change when a constant is subtracted from z. With the maximum subtracted, no exp
overflows:

    z <- z - max z,  e_j = exp(z_j),  s = sum_j e_j
    logp = z_y - log s,  entropy = log s - sum_j e_j z_j / s

The gradient is known as soon as logp is. A log-ratio outside of its clamp has no gradient.

    d surrogate / d logp      where the clip is active           elsewhere
    A > 0                     0, if ratio > 1 + epsilon_high     -ratio A
    A < 0                     0, if ratio < 1 - epsilon          -ratio A

    d kl / d logp        = 1 - exp(x)                            (dx / d logp = -1)
    d loss / d z_j       = g (1[j = y] - p_j),  g = scale (d surrogate / d logp + beta d kl / d logp)
    d loss / d logits_j  = d loss / d z_j / temperature

So the pass that reads the logits can write their gradient into the same memory, and nothing has to be kept
for a backward pass. chunked.py does this for a chunk of rows at a time."""

from __future__ import annotations

import torch

# Logits of one block: 1 MiB in fp32, so that every pass over them but the first reads from the cache.
BLOCK_ELEMENTS = 1 << 18
FLOOR = -1e20  # in place of -inf, since 0 * -1e20 is 0 where 0 * -inf would be NaN; its probability is 0 too


@torch.no_grad()
def grpo_loss_from_logits(
    logits,
    target,
    old_logps,
    ref_logps,
    advantages,
    scale,
    *,
    epsilon: float,
    epsilon_high: float,
    beta: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    gradient: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of N rows of logits [N, V]. The gradient of the loss replaces the logits in place, unless
    `gradient` is False.

    logits fp32 or bf16; target [N] int64, from 0 to below `vocab_size` (else RuntimeError on a CPU);
    old_logps, ref_logps, advantages, scale [N] fp32. If old_logps is None, they are the policy's present
    log-probs (ratio 1, as in the first pass over a batch). If ref_logps is None, there is no KL term. Ids >=
    `vocab_size` count as logits of -inf. Returns the loss (a scalar, fp32) and stats: logps, entropy, kl,
    clipped, [N] fp32 each. The result is not differentiable, so loss.backward() raises: the gradient is
    already there."""
    n, width = logits.shape
    vocab = vocab_size or width
    stats = {name: logits.new_zeros(n, dtype=torch.float32) for name in ("logps", "entropy", "kl", "clipped")}
    loss = logits.new_zeros((), dtype=torch.float32)
    step = max(1, BLOCK_ELEMENTS // width)
    work = logits.new_empty(2, min(step, n), vocab, dtype=torch.float32)
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        y = target[rows, None]
        z, e = work[:, : rows.stop - i]  # [rows, vocab] each
        z.copy_(logits[rows, :vocab])  # fp32 from here on
        z -= z.amax(1, keepdim=True)  # before dividing, since near the maximum the difference is exact
        z.clamp_(min=FLOOR)
        if temperature != 1:
            z /= temperature
        total = torch.exp(z, out=e).sum(1)
        logp = z.gather(1, y)[:, 0] - total.log()
        entropy = total.log() - z.mul_(e).sum(1) / total
        old = logp if old_logps is None else old_logps[rows]
        ref = None if ref_logps is None else ref_logps[rows]
        value, g, kl, clipped = token_loss(logp, old, ref, advantages[rows], epsilon, epsilon_high, beta)
        loss += (scale[rows] * value).sum()
        for name, value in zip(stats, (logp, entropy, kl, clipped), strict=True):
            stats[name][rows] = value
        if gradient:
            g = (g * scale[rows] / temperature)[:, None]
            e.mul_(-g / total[:, None])  # -g p
            e.scatter_add_(1, y, g)
            logits[rows, :vocab] = e  # the only rounding to the dtype of the logits
            logits[rows, vocab:] = 0
    return loss, stats


def token_loss(logp, old_logps, ref_logps, advantages, epsilon, epsilon_high, beta):
    """Four results: the objective of each token (surrogate + beta kl), d objective / d logp, the kl, and
    whether the clip is active. Arguments and results are [N] fp32."""
    gap = logp - old_logps
    ratio = gap.clamp(-20, 20).exp()
    unclipped, bounded = ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages
    clipped = bounded < unclipped
    value = -torch.minimum(unclipped, bounded)
    grad = -unclipped * ~(clipped | (gap.abs() > 20))
    kl = torch.zeros_like(logp)
    if ref_logps is not None:
        x = ref_logps - logp
        inside, x = x.abs() <= 20, x.clamp(-20, 20)
        kl = x.expm1() - x  # exp(x) - x - 1 without the cancellation at small x
        value = value + beta * kl
        grad = grad - beta * x.expm1() * inside
    return value, grad, kl, clipped.float()


@torch.no_grad()
def sample(logits, u, temperature, vocab_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The draw of the next token: logits [rows, V], u [rows] fp64 in [0, 1) -> tokens [rows] int64, their
    log-probs [rows] fp32. Columns from `vocab_size` on are never drawn. Temperature 0, a number or a tensor
    [], takes the most probable token; its log-prob is then that of temperature 1.

    Samples by inverting the distribution function: the first token whose cumulative probability exceeds u.
    The sum is in fp64, because in fp32 the sum over 150,000 tokens would round small probabilities away."""
    logits, temperature = logits[:, :vocab_size].float(), float(temperature)
    logp = torch.log_softmax(logits / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        cdf = logp.double().exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)
    return tokens[:, 0], logp.gather(1, tokens)[:, 0]
