"""Low-rank adapters (LoRA, arXiv 2106.09685): most weights are frozen, so that a larger model can be trained.

To train all weights takes 16 bytes a parameter (optim.py). With --lora_r each torch.nn.Linear of the decoder
blocks keeps its weight W [out, in] and bias as they are, and learns a small change beside it:

    y = x W^T + b + (x A^T) B^T alpha / r        A [r, in] and B [out, r], fp32

A frozen weight takes 2 bytes in bf16, or 4 in fp32, and is also the start model's: the KL term needs no copy
of it. An fp32 checkpoint is simply rounded to bf16, because lower halves are of use only to weights that
move. A and B take 16 bytes a parameter, and there are few of them (at rank 32 they are 1 % of Qwen2.5-7B).

    start = add_adapters(model, r=32, alpha=32, seed=0)    # from now on the model learns A and B alone
    save_adapter(model, folder, config)                    # two files, as peft writes and reads them
    load_adapter(model, folder)                            # InputError if it is not one of this model

The sampler uses A and B too, beside W. If their product was added to W, rounding would take most of it: after
one step at a learning rate of 4e-5 a bf16 sum W + B A differs from W in few places. Only at the end a merged
model is written, and `merge_cost` says what its rounding changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from data import InputError
from model import first_line

# What adapter_config.json has to say of these, and entries that do not change what an adapter computes. Peft
# sets megatron_core and qalora_group_size in every file; they matter only with entries that are refused here.
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "init_lora_weights": True}
HARMLESS = set("base_model_name_or_path revision inference_mode peft_version lora_dropout".split())
HARMLESS |= set("r lora_alpha target_modules auto_mapping megatron_core qalora_group_size".split())


class LoRALinear(torch.nn.Module):
    """A linear layer with an adapter. Weight and bias are those of `base`, and keep their names."""

    def __init__(self, base: torch.nn.Linear, r: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / r
        a = torch.empty(r, base.in_features).uniform_(-1, 1, generator=generator) / base.in_features**0.5
        self.lora_A = torch.nn.Parameter(a.to(base.weight.device))  # distributed as in peft
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of x. The change is added to x W^T inside of that product,
        which is summed in fp32 and rounded once. A bias is added after that, with a second rounding.

        If x W^T was rounded first, a change of less than half the distance to the next number would be lost.
        In bf16, after one step at a learning rate of 4e-5, that is 92 % of the change; merged weights lose as
        much. (A and B are rounded too, but this moves the change by a share of 2^-9 alone.)"""
        change = linear(linear(x, self.lora_A.to(x.dtype)), (self.lora_B * self.scale).to(x.dtype))
        y = torch.addmm(change.flatten(0, -2), x.flatten(0, -2), self.weight.T).view(change.shape)
        return y if self.bias is None else y + self.bias

    def merged(self) -> torch.Tensor:
        """W + B A alpha / r, [out, in] in fp32, without a gradient."""
        return torch.addmm(self.weight.float(), self.lora_B, self.lora_A, alpha=self.scale).detach()


def block_layers(model, kind) -> dict[str, torch.nn.Module]:
    """{name: layer of that class in a decoder block}. The name of a block has a number, that of the head has
    none."""
    return {n: m for n, m in model.named_modules() if type(m) is kind and any(map(str.isdigit, n.split(".")))}


def adapters(model) -> dict[str, torch.nn.Parameter]:
    """{name that peft gives it: A or B of a layer}"""
    return {f"base_model.model.{n}.weight": p for n, p in model.named_parameters() if ".lora_" in n}


def add_adapters(model, r: int, alpha: float, seed: int, targets: tuple[str, ...] = ("",)):
    """Freezes the weights of the model, and gives the linear layers of its blocks adapters (those whose names
    end with one of `targets`), with B = 0 and an A that is a function of the seed.

    Returns the start model. It shares all tensors, and its adapters have the scale 0. So it is computed by
    the same kernels, and as long as B is 0 both models give the same bits. Raises InputError for a model
    without such layers, such as GPT-2."""
    layers = {n: m for n, m in block_layers(model, torch.nn.Linear).items() if f".{n}".endswith(targets)}
    if not layers:
        raise InputError(f"--lora_r {r}: no torch.nn.Linear in the blocks of {model.config.model_type}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, r, alpha, generator))
    start = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    for layer in block_layers(start, LoRALinear).values():
        layer.scale = 0.0
    return start


def save_adapter(model, folder: Path, config):
    """Writes adapter_config.json and adapter_model.safetensors as peft does. `config` has the settings of the
    run: lora_r, lora_alpha and the frozen model. Raises OSError and SafetensorError."""
    entries = {"base_model_name_or_path": config.model, "r": config.lora_r, "lora_alpha": config.lora_alpha}
    entries["target_modules"] = sorted({name.split(".")[-1] for name in block_layers(model, LoRALinear)})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapters(model), folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | entries, indent=2))


@torch.no_grad()
def load_adapter(model, folder: str | Path, flag: str = "--adapter"):
    """Gives the model the adapter of a directory, written here or by peft. In a resumed run the model has
    adapters already, which must have the same names and shapes. Raises InputError for tensors that do not
    fit, and for kinds of adapters that are not computed here."""
    try:
        entries = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        if other := [k for k, x in entries.items() if x and k not in HARMLESS and x != PLAIN.get(k)]:
            raise ValueError(f"its {other[0]} is {entries[other[0]]}, which is not computed here")
        if not adapters(model):
            targets = tuple(f".{name}" for name in entries["target_modules"])
            add_adapters(model, entries["r"], entries["lora_alpha"], 0, targets)
        stored, own = load_file(Path(folder, "adapter_model.safetensors")), adapters(model)
        if odd := sorted(own.keys() ^ stored.keys()):
            raise ValueError(f"{len(odd)} tensors are missing or have no place, {odd[0]} for one")
        for name, p in own.items():
            if stored[name].shape != p.shape or not stored[name].isfinite().all():
                raise ValueError(f"{name} has another shape than its layer, or holds NaN or infinity")
            p.copy_(stored[name])
    except Exception as error:  # a broken file raises errors of many classes, as in load_model
        raise InputError(f"{flag} {folder}: no adapter of this model: {first_line(error)}") from error


def merged_weights(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """{name: weights of the model, with the adapters added to them}, in `dtype`, on the CPU."""
    base = {n: p.detach().to("cpu", dtype) for n, p in model.named_parameters() if ".lora_" not in n}
    layers = block_layers(model, LoRALinear).items()
    return base | {f"{name}.weight": layer.merged().to("cpu", dtype) for name, layer in layers}


def merge(model, folder: Path, config, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """The end of a run: writes the adapter, prints what its merging costs, and returns the merged weights."""
    save_adapter(model, folder, config)
    print(merge_cost(model, prompts))
    return merged_weights(model, torch.float32 if config.save_fp32 else model.dtype)


@torch.no_grad()
def merge_cost(model, prompts: list[list[int]]) -> str:
    """One line: how far the logits of merged weights, rounded to the model's dtype, are from those with the
    adapters apart, and how far these are from the start model's, as root mean squares over the last 64
    positions of each prompt. The merged weights exist one layer at a time, so that no second model is in
    memory."""
    layers, logits = block_layers(model, LoRALinear).values(), []
    for weight in None, LoRALinear.merged, lambda layer: layer.weight:
        for layer in layers if weight else ():
            layer.forward = lambda x, f=weight, own=layer: linear(x, f(own).to(x.dtype), own.bias)
        inputs = (torch.tensor([ids], device=model.device) for ids in prompts)
        logits.append(torch.cat([model(ids).logits[0, -64:].float() for ids in inputs]))
    for layer in layers:
        del layer.forward
    lost, moved = ((x - logits[0]).square().mean().sqrt().item() for x in logits[1:])
    advice = "; with --save_fp32 they are not rounded" if lost > moved / 2 else ""
    line = f"rounding the merged weights moves the logits by {lost:.2g}"
    return f"{line}, the adapters moved them by {moved:.2g}{advice}"
