"""Supervised fine-tuning on rows of ids with a loss mask. The base model of the toy world (toy.py) and the
cold start of a real model (coldstart.py) are trained here.

    fit(model, batches, steps=142, learning_rate=3e-4, warmup=20, desc="cold start", bf16=True)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from files import InputError


def fit(
    model, batches: Iterable[list[tuple[list[int], list[bool]]]], steps: int, learning_rate: float,
    warmup: int, desc: str, bf16: bool = False, beta2: float = 0.999,
):  # fmt: skip
    """Supervised next-token prediction, on a GPU if there is one. A row is (ids, mask), where mask[i] says
    that ids[i] is trained on. The loss of a batch is the mean over such tokens; nothing predicts the first id
    of a row. AdamW, with `beta2`, on fp32 weights; with `bf16` the products are computed in bf16. Raises
    InputError if the loss is not finite."""
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, beta2), weight_decay=0.01, fused=True)
    bar = tqdm(batches, desc=desc, total=steps)
    for step, rows in enumerate(bar):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / warmup, decay)
        rows = sorted(rows, key=lambda row: len(row[0]))
        tokens, total = sum(sum(mask[1:]) for _, mask in rows), 0.0
        quarter = -(-len(rows) // 4)  # four parts of similar lengths need half the padding of one
        for part in (rows[i : i + quarter] for i in range(0, len(rows), quarter)):
            width = max(len(ids) for ids, _ in part)
            target = [[t if on else -100 for t, on in zip(*row, strict=True)][1:] for row in part]
            target = torch.tensor([t + [-100] * (width - len(t)) for t in target], device=model.device)
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part], device=model.device)
            keep = (target >= 0).flatten()  # the tokens trained on; the large head is applied to these alone
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
                logits = model.get_output_embeddings()(hidden[keep])
            loss = cross_entropy(logits.float(), target.flatten()[keep], reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise InputError(f"{desc}: the loss of step {step + 1} is {total}; try a lower --learning_rate")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)
    model.eval()
