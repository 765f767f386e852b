"""python -m pytest tests/test_model.py

What load_model refuses: anything but a plain checkpoint of floating-point weights. (test_rollout.py has the
directories in which something is missing.)
"""

import builtins
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import InputError
from model import load_model

UP = "model.layers.0.mlp.up_proj"


def add_adapter(folder):
    config = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "nowhere", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def adapter_alone(folder):
    add_adapter(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()


def change(**values):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def weights(edit):
    def change_file(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change_file


def stored_as(dtype):
    return weights(lambda w: w.update({f"{UP}.weight": (w[f"{UP}.weight"] * 100).to(dtype)}))


def added(name):
    return weights(lambda w: w.update({name: torch.zeros(2)}))


def foreign_code(folder):
    """Code that comes with a checkpoint leaves a file if it runs, and anybody who asks gets a yes."""
    names = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    change(model_type="custom", auto_map=names)(folder)
    (folder / "code.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")


def foreign_tokenizer(folder):
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {
        "tokenizer_class": "Odd",
        "auto_map": {"AutoTokenizer": ["code.T", None]},
    }
    path.write_text(json.dumps(content))
    (folder / "code.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w')\nclass T: pass\n")


def in_a_pickle(change):
    """The weights as older checkpoints hold them."""

    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")

    return edit


def int8(tensors):
    tensors[f"{UP}.weight"] = (tensors[f"{UP}.weight"] * 100).to(torch.int8)


def pointer(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def set_to(name, value):
    return weights(lambda w: w[name].view(-1)[0].fill_(value))


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
REFUSED = {
    "an adapter beside whole weights": (add_adapter, "holds an adapter"),
    "an adapter alone": (adapter_alone, "holds an adapter"),
    "quantized, bitsandbytes": (change(quantization_config=BNB), "quantized"),
    "quantized, fp8": (change(quantization_config=FP8), "quantized"),
    "quantized, a method without a name": (change(quantization_config={"bits": 4}), "quantized"),
    "int8 without a word about it": (stored_as(torch.int8), "stored as I8"),
    "fp8 without a word about it": (stored_as(torch.float8_e4m3fn), "stored as F8_E4M3"),
    "int8 in a pickle": (in_a_pickle(int8), "stored as torch.int8"),
    "a pointer to a pickle": (pointer, "no model and tokenizer from this directory"),
    "NaN": (set_to(f"{UP}.weight", math.nan), f"1 of its weights hold NaN or infinity, {UP}.weight"),
    "infinity in the head": (set_to("lm_head.weight", math.inf), "lm_head.weight for one"),
    "weights of another size": (change(intermediate_size=65), "have another size"),
    "a text for a number": (change(hidden_size="16"), "no model and tokenizer from this directory"),
    "an end token in words": (change(eos_token_id="</s>"), "eos_token_id"),
    "an unknown activation": (change(hidden_act="zzz"), "zzz"),
    "no heads": (change(num_attention_heads=0), "no model and tokenizer from this directory"),
    "scales of a quantization": (added(f"{UP}.weight_scale_inv"), "1 of its weights have no place"),
    "an adapter inside": (added(f"{UP}.lora_A.default.weight"), "no place in the model"),
    "a bias that the config denies": (added(f"{UP}.bias"), f"{UP}.bias for one"),
    "a bias of the head": (added("lm_head.bias"), "lm_head.bias for one"),
    "fewer layers in the config": (change(num_hidden_layers=1), "9 of its weights have no place"),
    "foreign code": (foreign_code, "no model and tokenizer from this directory"),
    "foreign code of the tokenizer": (foreign_tokenizer, "no model and tokenizer from this directory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_checkpoint_is_one_line(world, monkeypatch, case):
    folder = Path(world["model"])
    spoil, reason = REFUSED[case]
    spoil(folder)
    monkeypatch.setattr(builtins, "input", lambda *prompt: "y")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(InputError) as error:
        load_model(str(folder), "cpu")
    message = str(error.value)
    assert message.startswith(f"--model {folder}: ") and reason in message and "\n" not in message
    assert not (folder / "it-ran").exists()


def test_a_package_that_is_missing_is_one_line(world, monkeypatch):
    import model

    def missing(*arguments, **options):
        raise ImportError("Using this needs `optimum`\nand more")

    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(InputError, match=r"this directory: Using this needs `optimum`$"):
        load_model(world["model"], "cpu")


def test_an_adapter_that_was_applied_while_loading_is_refused(world, monkeypatch):
    """On the hub an adapter is seen only by peft, which applies it."""
    import model

    real = model.AutoModelForCausalLM.from_pretrained

    def with_adapter(*arguments, **options):
        loaded, report = real(*arguments, **options)
        loaded._hf_peft_config_loaded = True
        return loaded, report

    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", with_adapter)
    with pytest.raises(InputError, match="holds an adapter"):
        load_model(world["model"], "cpu")


@pytest.mark.parametrize(
    "change",
    [
        stored_as(torch.float64),
        stored_as(torch.bfloat16),
        added("v_head.weight"),
        added("model.rotary_emb.inv_freq"),
    ],
)
def test_what_does_no_harm_is_taken(world, change):
    change(Path(world["model"]))
    model, _ = load_model(world["model"], "cpu")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("place", ["file", "folder", "hub"])
def test_gguf_is_refused_with_the_way_to_convert_it(tmp_path, place):
    (tmp_path / "model.Q4_1.gguf").write_bytes(b"GGUF")
    name = {"file": f"{tmp_path}/model.Q4_1.gguf", "folder": str(tmp_path), "hub": "owner/name-GGUF"}[place]
    with pytest.raises(InputError, match=r"GGUF; 'A real model' in README.md says how to convert it"):
        load_model(name, "cpu")


def test_a_model_beside_a_gguf_file_is_loaded(world):
    Path(world["model"], "model.gguf").write_bytes(b"GGUF")
    load_model(world["model"], "cpu")
