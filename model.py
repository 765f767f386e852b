"""Loads a model and its tokenizer from a directory or the hub, and checks that this code handles it right.

`load_model` takes a plain checkpoint of floating-point weights and refuses one that is incomplete, quantized
or an adapter. `check_prompts` refuses prompts that do not fit. `probe` refuses a model that the sampler's
cache, or the loss, would get wrong. All of them say why in one line, before anything is trained. The forward
passes of sampling are in runner.py, and disk.write_model writes a model.

    model, tokenizer = load_model("Qwen/Qwen2.5-3B-Instruct", "cuda")
    longest = check_prompts(model, tokenizer, SEM, questions)
    probe(model, tokenizer, longest + 4096)            # InputError if it cannot be sampled at that length
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from cache import SlotCache, context_length
from data import InputError, Question
from prompts import Template, render
from runner import step_hidden

transformers_logging.disable_progress_bar()  # grpo.py and evaluate.py show bars of their own


def load_model(name: str, device, dtype=torch.float32, flag: str = "--model"):
    """(model, tokenizer) of a hub id or a local directory, without any dropout. Raises InputError, which
    names the `flag`, for anything that is missing, quantized or an adapter.

    Code that comes with a checkpoint is never run. Attention is SDPA, because the masks of the sampler are
    boolean; only decode steps on a GPU have a kernel of their own (runner.step_hidden)."""
    in_folder = list(Path(name).glob("*.gguf")) and not Path(name, "config.json").exists()
    if in_folder or name.lower().endswith("gguf"):
        raise InputError(f"{flag} {name}: GGUF; 'A real model' in README.md says how to convert it")
    if name.startswith(("/", ".")) and not os.path.isdir(name):
        raise InputError(f"{flag} {name}: no such directory")
    adapter = (
        "it holds an adapter (adapter_config.json): give its base model as --model, and this as --adapter "
    )
    adapter += "of evaluate.py or look.py; to train, merge it first"
    # peft would apply it, to merged weights too
    if os.path.exists(os.path.join(name, "adapter_config.json")):
        raise InputError(f"{flag} {name}: {adapter}, or remove that file if the weights are merged already")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if any(getattr(c, "quantization_config", None) for c in (config, config.get_text_config())):
            raise ValueError("its weights are quantized (quantization_config), and cannot be trained here")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        kinds = stored_types(name)
    except Exception as error:  # the libraries raise errors of some twenty classes for what is broken
        kind = "directory" if os.path.isdir(name) else "hub id"
        reason = first_line(error)
        raise InputError(f"{flag} {name}: no model and tokenizer from this {kind}: {reason}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"{flag} {name}: {adapter}")
    if other := sorted(kinds - {"F64", "F32", "F16", "BF16"}):  # transformers casts without the scales
        raise InputError(f"{flag} {name}: some of its weights are stored as {other[0]}, and not as floats")
    if sizes := sorted(map(str, report["mismatched_keys"])):
        raise InputError(f"{flag} {name}: {len(sizes)} of its weights have another size, {sizes[0]} for one")
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise InputError(f"{flag} {name}: {len(missing)} of its weights are missing, {missing[0]} for one")
    # transformers drops weights for which the model has no place: scales, biases, adapters, further layers
    if extra := sorted(k for k in report["unexpected_keys"] if hasattr(model, k.partition(".")[0])):
        raise InputError(
            f"{flag} {name}: {len(extra)} of its weights have no place in the model, {extra[0]} for one"
        )
    if bad := [n for n, p in model.named_parameters() if not p.sum(dtype=torch.float32).isfinite()]:
        raise InputError(f"{flag} {name}: {len(bad)} of its weights hold NaN or infinity, {bad[0]} for one")
    if not len(tokenizer) or not tokenizer.is_fast:
        raise InputError(f"{flag} {name}: it has no tokenizer.json")
    if not tokenizer.chat_template:
        raise InputError(f"{flag} {name}: its tokenizer has no chat template")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{flag} {name}: its tokenizer has no end token")
    if len(tokenizer) > model.get_output_embeddings().weight.shape[0]:
        raise InputError(f"{flag} {name}: its tokenizer has more tokens than the model has logits")
    for module in model.modules():  # with dropout every ratio of the objective would be noisy
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.to(device), tokenizer


def stored_types(name: str) -> set[str]:
    """The types of the weights in the files of a hub id or a directory, such as {"BF16"}. Of .bin files only
    those that are not floating-point, such as {"torch.int8"}."""
    folder = Path(cached_file(name, "config.json")).parent
    kinds, paths = set(), list(folder.glob("*.safetensors"))
    for path in (p for p in paths if not p.name.startswith(("consolidated", "optimizer"))):
        with safe_open(path, "pt") as file:
            kinds |= {file.get_slice(k).get_dtype() for k in file.keys() if k.endswith(".weight")}
    for path in [] if paths else folder.glob("pytorch_model*.bin"):
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        kinds |= {
            str(w.dtype) for k, w in state.items() if k.endswith(".weight") and not w.is_floating_point()
        }
    return kinds


def check_prompts(model, tokenizer, template: Template, questions: list[Question]) -> int:
    """Returns the number of tokens of the prompt with the longest text. Raises InputError, before anything is
    sampled, for a prompt that does not fit the model's context, and for a chat template that writes <think>
    into the prompt: the model would then not write it, and its episodes would not be valid.

    A text has at most as many tokens as bytes, so only long texts have to be tokenised for the check."""
    context = context_length(model.config)
    longest = max(questions, key=lambda q: len(q.text) + sum(map(len, q.choices or [])))
    empty = len(render(template, replace(longest, text="", choices=None), tokenizer))
    for q in questions:
        size = empty + len("".join([q.text, *(q.choices or [])]).encode()) + 8 * len(q.choices or [])
        if size >= context and (n := len(render(template, q, tokenizer))) >= context:
            why = f"has {n} tokens; the context of --model holds {context}"
            raise InputError(f"the prompt of {q.id} ({q.source}) {why}")
    prompt = render(template, longest, tokenizer)
    if any(render(template, longest, tokenizer) != prompt for _ in range(3)):
        raise InputError(
            "the chat template of --model makes another prompt each time (a random choice in it)"
        )
    if not template.raw and "<think>" in tokenizer.decode(prompt[-8:]):
        raise InputError("the chat template of --model writes <think> itself; the model is expected to do it")
    return len(prompt)


def first_line(error: Exception) -> str:
    text = f"no key {error}" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
    first, _, second = text.partition("\n")
    return (
        f"{first} {second.partition(chr(10))[0].strip()}"
        if first.endswith(":") and second
        else first.rstrip(": ")
    )


@torch.no_grad()
def probe(model, tokenizer, max_len: int):
    """Raises InputError, one line, for a model that the sampler or the loss would get wrong: one with

        a sliding window shorter than `max_len`
        rotary angles that change with the longest row of a batch (longrope)
        attention that is wrong under the masks of the sampler
        logits other than hidden @ lm_head.T (a bias, soft-capping, a scale): kernels/ computes that product

    The last two are tried: attention by a ragged prefill and a decode step (on a GPU with the kernel), and
    the logits on a plain batch."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window and slides and getattr(config, "use_sliding_window", True) and max_len > window:
        length = f"{max_len} tokens of prompt and completion"
        raise InputError(f"{config.model_type}: its sliding window of {window} is shorter than {length}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and max_len > (n := rope["original_max_position_embeddings"]):
        raise InputError(f"{config.model_type}: its longrope changes at {n} tokens, {max_len} are needed")
    size = min(len(tokenizer), config.vocab_size)
    ids = torch.arange(14, device=model.device).view(2, 7) * 37 % size
    was_training = model.training
    model.eval()
    try:
        plain = model(input_ids=ids)
        hidden = model.base_model(input_ids=ids).last_hidden_state
        cache = SlotCache(model.config, 2, 8, model.device, model.dtype)
        # Each row is once the shorter one, so that each has padding, which must not be read.
        lengths, both = torch.tensor([4, 2], device=model.device), torch.tensor([0, 1], device=model.device)
        place = torch.arange(4, device=model.device)
        step_hidden(model, cache, both, ids[:, :4], place.expand(2, 4), lengths - 1, 4)
        rest = torch.stack([ids[0, [4, 5, 5, 5]], ids[1, 2:6]])
        ours = step_hidden(model, cache, 2, rest, lengths[:, None] + place, torch.full_like(lengths, 5), 6)
        last = torch.full_like(lengths, 6)
        after = step_hidden(model, cache, 2, ids[:, 6:], last[:, None], last, 7)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(
            f"{config.model_type}: cannot be sampled through the slot cache: {first_line(error)}"
        ) from error
    finally:
        model.train(was_training)
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    scale = hidden.abs().max().item()
    pairs = (ours[0, :2], hidden[0, 4:6]), (ours[1], hidden[1, 2:6]), (after, hidden[:, 6:])
    if not max((a - b).abs().max().item() for a, b in pairs) <= tolerance * scale:
        raise InputError(
            f"{config.model_type}: attention through the slot cache differs from a plain forward pass"
        )
    head = model.get_output_embeddings()
    gap = (hidden @ head.weight.T - plain.logits).abs().max().item()
    # The attributes are checked too: the gap of a small bias, or of a cap far above the logits, would be
    # within the tolerance.
    changed = getattr(head, "bias", None) is not None or getattr(config, "final_logit_softcapping", None)
    if changed or gap > tolerance * plain.logits.abs().max().item():
        raise InputError(
            f"{config.model_type}: its logits are not hidden @ lm_head.T (a bias, soft-capping or a scale)"
        )
