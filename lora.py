"""Low-rank adapters (LoRA, arXiv 2106.09685): most weights are frozen, so that a larger model can be trained.

To train all weights takes 16 bytes a parameter (optim.py). With --lora_r each linear layer of the decoder
blocks keeps its weight W [out, in] and bias as they are, and learns a small change beside it:

    y = x W^T + b + (x A^T) B^T alpha / r        A [r, in] and B [out, r], fp32

A frozen weight takes 2 bytes in bf16, or 4 in fp32, and is also the start model's: the KL term needs no copy
of it. An fp32 checkpoint is simply rounded to bf16, because lower halves are of use only to weights that
move. A and B take 16 bytes a parameter, and there are few of them (at rank 32 in Qwen2.5-7B 1 %).

    start = add_adapters(model, r=32, alpha=32, seed=0)  # from now on the model learns A and B alone
    save_adapter(model, folder, base="Qwen/Qwen2.5-7B-Instruct")  # two files, as peft writes and reads them
    load_adapter(model, folder)                          # InputError if it is not one of this model

The sampler uses A and B too, beside W. To add their product to W would lose most of it: after one step at a
learning rate of 4e-5 a bf16 sum W + B A differs from W in few places. Only at the end a merged model is
written, and `merge_cost` says what its rounding changes."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from data import InputError

# Entries of adapter_config.json that do not change what an adapter computes. Two of them are set in every
# file of peft, for methods that other entries switch on.
HARMLESS = set("peft_type task_type base_model_name_or_path revision inference_mode peft_version".split())
HARMLESS |= set("r lora_alpha target_modules lora_dropout megatron_core qalora_group_size".split())
PLAIN = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}  # the other kinds are refused


class LoRALinear(torch.nn.Module):
    """A linear layer with an adapter. Weight and bias are those of `base`, and keep their names."""

    def __init__(self, base: torch.nn.Linear, r: int, alpha: float, generator: torch.Generator):
        super().__init__()
        (size_out, size_in), device = base.weight.shape, base.weight.device
        self.weight, self.bias, self.alpha = base.weight, base.bias, alpha
        start = torch.nn.init.kaiming_uniform_(torch.empty(r, size_in), math.sqrt(5), generator=generator)
        self.lora_A = torch.nn.Parameter(start.to(device))  # uniform within 1 / sqrt(in), as in peft
        self.lora_B = torch.nn.Parameter(torch.zeros(size_out, r, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of x.

        A and B are rounded to that dtype, which changes the small second term by a share of 2^-9 in bf16.
        An fp32 copy of x would be as large as the activations."""
        y, thin = linear(x, self.weight, self.bias), linear(x, self.lora_A.to(x.dtype))
        b = self.lora_B.to(x.dtype).T
        return torch.addmm(y.flatten(0, -2), thin.flatten(0, -2), b, alpha=self.scale).view(y.shape)

    @property
    def scale(self) -> float:
        return self.alpha / len(self.lora_A)

    def merged(self) -> torch.Tensor:
        """W + B A alpha / r, [out, in] in fp32."""
        return torch.addmm(self.weight.float(), self.lora_B, self.lora_A, alpha=self.scale)


def block_layers(model) -> dict[str, torch.nn.Module]:
    """{name: linear layer of a decoder block}, with an adapter or without. The head is in no block."""
    layers = {n: m for n, m in model.named_modules() if type(m) in (torch.nn.Linear, LoRALinear)}
    return {name: layer for name, layer in layers.items() if re.search(r"\.\d+\.", name)}


def adapted(model) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in block_layers(model).items() if isinstance(layer, LoRALinear)}


def add_adapters(model, r: int, alpha: float, seed: int):
    """Freezes the weights of the model, and gives each linear layer of its blocks an adapter, with B = 0 and
    an A that is a function of the seed. Returns the start model: the same frozen weights without adapters.
    Raises InputError for a model without such layers."""
    if not (layers := block_layers(model)):
        kind = model.config.model_type
        raise InputError(f"--lora_r: the blocks of --model ({kind}) have no torch.nn.Linear to adapt")
    model.requires_grad_(False)
    start = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, r, alpha, generator))
    return start


def save_adapter(model, folder: Path, base: str):
    """Writes adapter_config.json and adapter_model.safetensors, with the names of peft. `base` is the hub id
    or directory of the frozen model."""
    layers = adapted(model)
    first = next(iter(layers.values()))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    config |= {"r": len(first.lora_A), "lora_alpha": first.alpha}
    config |= {"target_modules": sorted({name.rpartition(".")[2] for name in layers})}
    config |= {"bias": "none", "lora_dropout": 0.0, "inference_mode": True}
    tensors = {f"base_model.model.{n}.weight": p for n, p in model.named_parameters() if p.requires_grad}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


@torch.no_grad()
def load_adapter(model, folder: str | Path, flag: str = "--adapter"):
    """Gives the model the adapter of a directory, written here or by peft. A model that has adapters must
    have the same. Raises InputError for tensors that do not fit, and for a kind that is not computed here."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        r, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
        if other := [k for k, x in config.items() if x and k not in HARMLESS and x != PLAIN.get(k)]:
            raise ValueError(f"its {other[0]} is {config[other[0]]}, which is not computed here")
        layers = {n: m for n, m in block_layers(model).items() if any(f".{n}".endswith(f".{t}") for t in targets)}
        keys = {f"base_model.model.{n}.lora_{half}.weight": (n, half) for n in layers for half in "AB"}
        tensors = load_file(folder / "adapter_model.safetensors")
        if not keys or (odd := sorted(keys ^ tensors.keys())):
            raise ValueError(f"{len(odd)} tensors are missing or fit no layer" if keys else "it fits no layer")
        for name, layer in layers.items():
            if not isinstance(layer, LoRALinear):
                model.set_submodule(name, LoRALinear(layer, r, alpha, torch.Generator()))
        if adapted(model).keys() != layers.keys() or any(x.alpha != alpha for x in adapted(model).values()):
            raise ValueError("the run has another one")
        for key, (name, half) in keys.items():
            own, stored = getattr(model.get_submodule(name), f"lora_{half}"), tensors[key]
            if stored.shape != own.shape or not stored.isfinite().all():
                raise ValueError(f"{key} has another shape than its layer, or holds NaN or infinity")
            own.copy_(stored)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{flag} {folder}: no adapter of this model: {reason}") from error


def merged_weights(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """{name: weights of the model without adapters, which are added to them}, in `dtype`, on the CPU."""
    layers = {f"{name}.weight": layer for name, layer in adapted(model).items()}
    names = {name: p for name, p in model.named_parameters() if not name.endswith((".lora_A", ".lora_B"))}
    return {
        name: (layers[name].merged() if name in layers else p).detach().to("cpu", dtype)
        for name, p in names.items()
    }


@torch.no_grad()
def merge_cost(model, prompts: list[list[int]]) -> str:
    """One line: how far the logits of merged weights, rounded to the model's dtype, are from those with the
    adapter apart, and how far these are from the start model's. They are root mean squares over the last 64
    positions of each prompt. The merged weights exist one layer at a time, so this needs no second model."""
    layers, head = adapted(model).values(), model.get_output_embeddings().weight

    def logits(weight=None):
        for layer in layers if weight else ():
            layer.forward = lambda x, layer=layer: linear(x, weight(layer).to(x.dtype), layer.bias)
        batches = [torch.tensor([ids], device=head.device) for ids in prompts]
        hidden = [model.base_model(input_ids=x, use_cache=False).last_hidden_state[0, -64:] for x in batches]
        for layer in layers if weight else ():
            del layer.forward
        return (torch.cat(hidden) @ head.T).float()

    apart = logits()
    lost, moved = ((logits(f) - apart).square().mean().sqrt().item() for f in (LoRALinear.merged, lambda x: x.weight))
    kind = str(model.dtype).removeprefix("torch.")
    return (
        f"merged in {kind}, the adapter gives logits that are {lost:.2g} away from those of the adapter apart, "
        f"which are {moved:.2g} away from the start model's"
    )
