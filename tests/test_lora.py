"""python -m pytest tests/test_lora.py

Adapters: one layer, a model with them, whole runs, the files, and what is refused. The tests that compare
with peft are skipped where it is not installed (pip install peft).
"""

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bf16 import MODELS, assert_equal, tensors
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM
from worlds import VOCABULARY, arguments, episodes_with_results, lively_reward, run_main, timeless

import evaluate
import grpo
import look
import run as module
from config import LORA, TOY_LORA, Config, check, parse
from data import InputError
from kernels import chunked
from lora import (
    LoRALinear,
    adapters,
    add_adapters,
    block_layers,
    load_adapter,
    merge_cost,
    merged_weights,
    save_adapter,
)
from model import load_model
from optim import AdamW
from reward import METHODS
from run import Run, resolve

BLOCK = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
LINEAR = "llama", "tied qwen3"  # models whose blocks have linear layers; in the second they have biases
SETTINGS = Config(model="base", lora_r=4, lora_alpha=6)
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_model(name: str = "llama", dtype=torch.float32, **changed):
    torch.manual_seed(0)
    options = MODELS[name] | changed | {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(**options)
    model = AutoModelForCausalLM.from_config(config)
    for key, p in model.named_parameters():
        if key.endswith(".bias"):  # 0 at first
            torch.nn.init.normal_(p)
    return model.to(dtype).eval()


def with_adapters(name: str = "llama", dtype=torch.float32, size: float = 0.1):
    """(model whose adapters do something, its start model)"""
    model = make_model(name, dtype)
    start = add_adapters(model, 4, 6, 0)
    for i, layer in enumerate(block_layers(model, LoRALinear).values()):
        layer.lora_B.data = size * normal(*layer.lora_B.shape, seed=i)
    return model, start


def logits(model, rows: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12 * rows).view(rows, 12) % VOCABULARY).logits


@pytest.fixture
def as_model(world):
    """A function that gives the world another start model, stored in fp32."""

    def write(name: str):
        make_model(name).save_pretrained(world["model"])
        return world

    return write


# ------------------------------------------------------------------------------------------------------------
# one layer


def a_layer(dtype=torch.float32, bias: bool = True, size: int = 96, r: int = 4) -> LoRALinear:
    base = torch.nn.Linear(size, 2 * size, bias=bias).requires_grad_(False)
    base.weight.copy_(normal(2 * size, size, seed=1) / size**0.5)
    if bias:
        base.bias.copy_(normal(2 * size, seed=2))
    return LoRALinear(base.to(dtype), r, 6, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_one_dense_matrix(bias):
    layer = a_layer(torch.float64, bias)
    layer.lora_B.data = normal(*layer.lora_B.shape, seed=3)
    x, a, b = (t.detach().double().requires_grad_() for t in (normal(2, 3, 96), layer.lora_A, layer.lora_B))
    expected = linear(x, layer.weight + 6 / 4 * b @ a, layer.bias)
    weights = normal(*expected.shape, seed=4).double()
    expected.mul(weights).sum().backward()
    ours = x.detach().clone().requires_grad_()
    y = layer(ours)
    y.mul(weights).sum().backward()
    for got, want in [
        (y, expected),
        (ours.grad, x.grad),
        (layer.lora_A.grad, a.grad),
        (layer.lora_B.grad, b.grad),
    ]:
        assert (got - want).abs().max() < 1e-6 * want.abs().max()
    assert layer.weight.grad is None


@PRECISIONS
def test_with_b_at_0_the_layer_is_its_base(dtype):
    layer, x = a_layer(dtype, bias=False), normal(2, 3, 96).to(dtype)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert torch.equal(layer(x), linear(x, layer.weight))
    layer.lora_B.data += 1
    assert not torch.equal(layer(x), linear(x, layer.weight))


@pytest.mark.parametrize("bias", [False, True])
def test_a_change_that_is_smaller_than_the_rounding_is_not_lost(bias):
    """B as after one step at a learning rate of 4e-5: the change is 1e-4 of the output, and bf16 has steps of
    1e-2. On average the outputs move by the change. In merged weights, or if the change is added to a product
    that is rounded already, 9 of 10 parts of it are lost."""
    layer, x = a_layer(torch.bfloat16, bias, size=512, r=32), normal(1024, 512).bfloat16()
    with torch.no_grad():
        before = layer(x)
        layer.lora_B.copy_(4e-5 * normal(*layer.lora_B.shape, seed=3).sign())
        change = linear(linear(x.double(), layer.lora_A.double()), layer.lora_B.double()) * layer.scale
        rounded = linear(x, layer.weight, layer.bias)
        merged = linear(x.double(), layer.merged().bfloat16().double() - layer.weight.double())

    def share(moved) -> float:
        return ((moved.double() * change).sum() / change.square().sum()).item()

    assert share(layer(x).double() - before.double()) == pytest.approx(1, abs=0.2)
    assert share((rounded + change).bfloat16().double() - rounded.double()) < 0.2
    assert share(merged) < 0.2


# ------------------------------------------------------------------------------------------------------------
# a model with adapters


@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_layer_of_the_blocks_and_nothing_else(name):
    model, plain = make_model(name), make_model(name)
    add_adapters(model, 4, 6, 0)
    expected = {n for n, m in plain.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}
    assert block_layers(model, LoRALinear).keys() == expected and len(expected) == 2 * len(BLOCK)
    assert not block_layers(model, torch.nn.Linear)
    assert_equal({n: x for n, x in model.state_dict().items() if ".lora_" not in n}, plain.state_dict())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.lora_{half}" for layer in expected for half in "AB"
    }
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "tied qwen3")


@PRECISIONS
@pytest.mark.parametrize("name", LINEAR)
def test_the_start_model_is_the_model_at_first_and_takes_no_memory(name, dtype):
    model, plain = make_model(name, dtype), make_model(name, dtype)
    start = add_adapters(model, 4, 6, 0)
    assert torch.equal(logits(model), logits(start))
    assert {x.data_ptr() for x in start.state_dict().values()} == {
        x.data_ptr() for x in model.state_dict().values()
    }
    for layer in block_layers(model, LoRALinear).values():
        layer.lora_B.data += 0.1
    assert not torch.equal(logits(model), logits(start))
    gap = (logits(start) - logits(plain)).abs().max()  # with biases the sum is rounded in another order
    assert gap == 0 if name == "llama" else gap < (1e-6 if dtype == torch.float32 else 0.05)
    assert start.config is not model.config  # runner.step_hidden changes the model's for a moment


def test_a_is_a_function_of_the_seed():
    def drawn(seed):
        torch.manual_seed(torch.seed())
        model = make_model()
        add_adapters(model, 4, 6, seed)
        return [layer.lora_A.detach() for layer in block_layers(model, LoRALinear).values()]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])
    for a in first:  # uniform within 1 / sqrt(in)
        bound = a.shape[1] ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound and abs(a.std() * 3**0.5 / bound - 1) < 0.2


def policy_gradient(model, **options):
    config = Config(**{"micro_batch_tokens": 64, "beta": 0.0, "max_completion_length": 24} | options)
    episodes = episodes_with_results()
    for batch in grpo.make_batches(episodes, [1.0, -1.0, 0.5, 2.0, -0.3], config, "cpu"):
        grpo.policy_loss(model, batch, config, VOCABULARY)[0].backward()


@PRECISIONS
@pytest.mark.parametrize("name", LINEAR)
def test_the_first_gradient(name, dtype):
    """That of A is 0, because B is. Frozen weights get none, and none is computed for the head."""
    model = make_model(name, dtype)
    add_adapters(model, 4, 6, 0)
    policy_gradient(model)
    for layer in block_layers(model, LoRALinear).values():
        assert layer.lora_A.grad.abs().max() == 0 and layer.lora_B.grad.abs().max() > 0
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora_" not in n)


def test_no_gradient_of_a_frozen_head(monkeypatch):
    """It would be the largest tensor of the update: [V, H] in fp32."""

    def refused(*arguments, **options):
        raise AssertionError("the gradient of the head was computed")

    monkeypatch.setattr(chunked, "add_product", refused)
    model = make_model()
    with pytest.raises(AssertionError, match="gradient of the head"):
        policy_gradient(model)
    add_adapters(model, 4, 6, 0)
    policy_gradient(model)


def test_the_optimizer_has_the_adapters_alone():
    model, _ = with_adapters("tied qwen3")
    optimizer = AdamW(model, 0.01, 0.1)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert optimizer.parameters.keys() == optimizer.full_weights().keys() == trained
    assert {key.rpartition(".")[0] for key in optimizer.state_dict()} == trained
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    policy_gradient(model)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert optimizer.grad_norm().item() == pytest.approx(gradients.norm().item(), rel=1e-6)
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trained


def test_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        model, _ = with_adapters()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        policy_gradient(model.train())
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert_equal(*found)


# ------------------------------------------------------------------------------------------------------------
# runs


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["--bf16", "--no-bf16"])
@pytest.mark.parametrize(
    "name, options",
    [("llama", ()), ("tied qwen3", ("--gradient_checkpointing", "--num_iterations", "2"))],
    ids=["plain", "checkpointing"],
)
def test_a_run(as_model, lively, tmp_path, capsys, name, options, switch):
    """It learns, resumes exactly, and its checkpoints hold adapters alone. The first KL is exactly 0."""
    flags = as_model(name) | {"beta": "0.1", "lora_r": "8", "learning_rate": "0.01"}
    whole, part = tmp_path / "whole", tmp_path / "part"
    switches = switch, *options
    assert run_main(flags | {"output_dir": str(whole)}, *switches) == 0
    printed = capsys.readouterr().out
    rows = timeless(whole / "metrics.jsonl")
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 1e-4
    assert all(row["sampler_logp_diff/max"] < 0.05 and row["grad_norm"] > 0 for row in rows)

    part_flags = flags | {"output_dir": str(part)}
    assert run_main(part_flags | {"max_steps": "3"}, *switches) == 0
    shutil.rmtree(part / "checkpoint-3")  # as if killed in step 4
    assert run_main({"output_dir": str(part), "max_steps": "4"}, switch, "--resume") == 0
    assert timeless(part / "metrics.jsonl") == rows
    for file in ("adapter_model", "optimizer"):
        assert_equal(tensors(whole / "checkpoint-4", file), tensors(part / "checkpoint-4", file))
    assert_equal(tensors(whole), tensors(part))
    assert_equal(
        tensors(whole / "adapter", "adapter_model"), tensors(whole / "checkpoint-4", "adapter_model")
    )

    files = "adapter_config.json adapter_model.safetensors optimizer.safetensors trainer_state.json"
    assert {p.name for p in (whole / "checkpoint-4").iterdir()} == set(files.split())
    stored = tensors(whole / "checkpoint-4", "adapter_model") | tensors(whole / "checkpoint-4", "optimizer")
    assert all(".lora_A." in key or ".lora_B." in key for key in stored)

    # the final directory is the start model with the adapters added, rounded once
    dtype = torch.bfloat16 if switch == "--bf16" else torch.float32
    start, merged, adapter = (
        tensors(flags["model"]),
        tensors(whole),
        tensors(whole / "adapter", "adapter_model"),
    )
    assert merged.keys() == start.keys() and AutoModelForCausalLM.from_pretrained(whole).dtype == dtype
    for key, weight in start.items():
        a, b = (adapter.get(f"base_model.model.{key[:-7]}.lora_{half}.weight") for half in "AB")
        frozen = weight.to(dtype).float()
        assert torch.equal(
            merged[key], (frozen if a is None else torch.addmm(frozen, b, a, alpha=4)).to(dtype)
        )
    [figures] = re.findall(r"moves the logits by (\S+), the adapters moved them by ([^\s;]+)", printed)
    lost, moved = map(float, figures)
    assert 0 < lost < 0.05 * moved if dtype == torch.bfloat16 else lost < 1e-5 * moved


@pytest.mark.parametrize("method", METHODS)
def test_every_method(world, method):
    assert run_main(world | {"method": method, "lora_r": "2", "max_steps": "1"}) == 0
    assert (Path(world["output_dir"]) / "adapter" / "adapter_model.safetensors").exists()


@PRECISIONS
def test_the_figure_of_the_merge_is_that_of_the_merged_model(as_model, tmp_path, dtype):
    """It is computed layer by layer; here the merged model is loaded beside the other two."""
    folder = as_model("tied qwen3")["model"]
    model, tokenizer = load_model(folder, "cpu", dtype)
    start = add_adapters(model, 4, 6, 0)
    for i, layer in enumerate(block_layers(model, LoRALinear).values()):
        layer.lora_B.data = 0.05 * normal(*layer.lora_B.shape, seed=i)
    prompts = [[3, 4, 5, 6], [7, 8]]
    module.write_model(model, tokenizer, tmp_path / "merged", merged_weights(model, dtype))
    merged, _ = load_model(str(tmp_path / "merged"), "cpu", dtype)

    def distance(other):
        with torch.no_grad():
            ids = [torch.tensor([prompt]) for prompt in prompts]
            gaps = [(model(x).logits.float() - other(x).logits.float()).flatten() for x in ids]
        return torch.cat(gaps).square().mean().sqrt().item()

    line, before = merge_cost(model, prompts), logits(model)
    lost, moved = (float(x) for x in re.findall(r"by (\S+?),? ?(?=the|$)", line))
    assert moved == pytest.approx(distance(start), rel=0.06)
    assert lost == pytest.approx(distance(merged), rel=0.06, abs=1e-6 if dtype == torch.float32 else 0)
    assert (lost > 1e-4) == (dtype == torch.bfloat16) and "\n" not in line
    assert torch.equal(logits(model), before)  # the layers are as they were


def test_the_merged_weights_in_fp32(world, lively):
    """With --save_fp32 nothing is rounded to bf16, also if the run is resumed for this alone."""
    flags, out = world | {"lora_r": "8", "max_steps": "2"}, Path(world["output_dir"])
    assert run_main(flags, "--bf16") == 0
    rounded = tensors(out)
    assert run_main({"output_dir": str(out)}, "--bf16", "--resume", "--save_fp32") == 0
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert_equal({key: x.bfloat16() for key, x in tensors(out).items()}, rounded)
    assert any((x != rounded[key]).any() for key, x in tensors(out).items())


# ------------------------------------------------------------------------------------------------------------
# settings and sizes


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"lora_r": 4}, (4e-5, 32, True)),
        ({"lora_r": 4, "learning_rate": 1e-6, "lora_alpha": 8}, (1e-6, 8, False)),
        ({}, (1e-6, None, False)),
    ],
)
def test_the_defaults_of_adapters(world, capsys, flags, expected):
    flags = {"model": world["model"], "output_dir": world["output_dir"]} | flags
    config = resolve(Config(**flags), set(flags))
    said = "4e-05, from the Tinker cookbook's search runs with rank 32" in capsys.readouterr().out
    assert (config.learning_rate, config.lora_alpha, said) == expected


def test_the_defaults_of_adapters_in_the_toy_world(monkeypatch, tmp_path):
    monkeypatch.setattr(module.toy, "build", lambda config: tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    config = resolve(Config(lora_r=8), {"lora_r"})
    assert {name: getattr(config, name) for name in TOY_LORA} == TOY_LORA and TOY_LORA.keys() == LORA.keys()
    assert resolve(Config(lora_r=8, learning_rate=0.5), {"lora_r", "learning_rate"}).learning_rate == 0.5


def test_a_resumed_run_keeps_its_adapters(world, lively):
    assert run_main(world | {"lora_r": "4", "max_steps": "1"}) == 0
    again = {"output_dir": world["output_dir"], "max_steps": "2"}
    for flag in ({"lora_r": "8"}, {"lora_r": "0"}, {"lora_alpha": "8"}):
        with pytest.raises(InputError, match=f"--resume: --{next(iter(flag))} is "):
            run_main(again | flag, "--resume")
    assert run_main(again, "--resume") == 0
    stored = json.loads((Path(world["output_dir"]) / "run.json").read_text())
    assert (stored["lora_r"], stored["lora_alpha"], stored["learning_rate"]) == (4, 32, 0.003)


def a_run(model, start) -> Run:
    """A run without data or cache, which can say what is in memory."""
    run = Run.__new__(Run)
    run.config, run.model, run.reference = Config(lora_r=32, lora_alpha=32), model, start
    run.trainee, run.optimizer = model, AdamW(model, 4e-5, 0.01)
    run.runner = SimpleNamespace(cache=SimpleNamespace(keys=[], values=[]))
    return run


def test_memory_of_7b():
    """Qwen2.5-7B at rank 32, without its data. 2 bytes a frozen parameter, and 16 a trained one."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    with torch.device("meta"):
        config = AutoConfig.for_model("qwen2", tie_word_embeddings=False, **sizes, **heads)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    frozen = sum(p.numel() for p in model.parameters())
    start = add_adapters(model, 32, 32, 0)
    trained = sum(p.numel() for p in adapters(model).values())
    line = a_run(model, start).memory()
    given = [float(size) for size in re.findall(r"(\S+) GB", line)]
    assert sum(given) * 1e9 == pytest.approx(2 * frozen + 16 * trained, rel=0.01)
    assert 16 < sum(given) < 17 and "start model 0 GB" in line and 0.01 < trained / frozen < 0.011


@pytest.mark.parametrize("r", [0, 4])
def test_gradients_that_are_reserved_for(world, monkeypatch, r):
    """On a GPU half of the memory is for activations, after what is allocated later: with adapters no
    gradient of a weight or of the head. This GPU has room for 100 tokens, or one byte less."""
    flags = world | ({"lora_r": str(r)} if r else {}) | {"rollout_slots": "4"}
    run = Run(resolve(*parse(Config, "grpo.py", [*arguments(flags), "--no-bf16"])))
    gradients = sum(p.nbytes for p in (adapters(run.model).values() if r else run.model.parameters()))
    gradients += 0 if r else run.model.get_output_embeddings().weight.nbytes
    layers, width, rows = 2, 32, 16
    free = gradients + (2 << 30) + 4 * 4 * rows * VOCABULARY + 2 * 100 * layers * width * 80
    monkeypatch.setattr(module, "ModelRunner", lambda *arguments: None)
    settings = replace(run.config, micro_batch_tokens=0)
    for missing in (0, 1):
        monkeypatch.setattr(module.torch.cuda, "mem_get_info", lambda n=missing: (free - n, free))
        run.config = settings
        run.resolve_sizes("cuda", 8)
        assert run.config.micro_batch_tokens == 100 - missing


def test_the_room_on_the_disk(world, monkeypatch):
    """Three checkpoints of 12 bytes a trained parameter, and the merged weights."""
    flags = [*arguments(world | {"lora_r": "4"}), "--bf16"]
    run = Run(resolve(*parse(Config, "grpo.py", flags)))
    trained = sum(p.numel() for p in adapters(run.model).values())
    free = 36 * trained + 2 * sum(p.numel() for p in run.model.parameters()) - 1
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(InputError, match="GB are free"):
        run.start()
    free += 1
    run.start()


# ------------------------------------------------------------------------------------------------------------
# files


@PRECISIONS
def test_a_saved_adapter_comes_back(tmp_path, dtype):
    model, start = with_adapters("tied qwen3", dtype)
    save_adapter(model, tmp_path, SETTINGS)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": sorted(BLOCK),
        "bias": "none",
        "init_lora_weights": True,
    }
    again = make_model("tied qwen3", dtype)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(model), logits(again)) and not torch.equal(logits(again), logits(start))
    assert all(x.dtype == torch.float32 for x in load_file(tmp_path / "adapter_model.safetensors").values())


@PRECISIONS
@pytest.mark.parametrize("name", LINEAR)
def test_peft_computes_the_same(tmp_path, name, dtype):
    peft = pytest.importorskip("peft")
    model, start = with_adapters(name, dtype)
    save_adapter(model, tmp_path, SETTINGS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*adapter.*")  # of missing or unexpected keys
        theirs = peft.PeftModel.from_pretrained(make_model(name, dtype), tmp_path)
    gap, way = (logits(theirs) - logits(model)).abs().max(), (logits(start) - logits(model)).abs().max()
    assert gap < 1e-6 if dtype == torch.float32 else gap < 0.1 * way
    assert way > 0.03


def test_an_adapter_of_peft(tmp_path):
    """It may have fewer layers, another place for its numbers, and entries that change nothing."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    theirs = peft.get_peft_model(make_model(), config).eval()
    for n, p in theirs.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = make_model()
    before = logits(ours)
    load_adapter(ours, tmp_path)
    assert len(block_layers(ours, LoRALinear)) == 4
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-6 < (logits(ours) - before).abs().max()


def test_evaluate_and_look_with_an_adapter(world, tmp_path, monkeypatch):
    """The method and the budget are those of its run. The episodes are those of the merged model."""
    monkeypatch.setitem(METHODS, "search-r1", replace(METHODS["search-r1"], reward=lively_reward))
    flags = world | {"lora_r": "8", "learning_rate": "0.1", "method": "search-r1", "max_searches": "1"}
    assert run_main(flags | {"max_steps": "2"}) == 0
    out, found = Path(world["output_dir"]), {}
    data = {"data": world["train"], "corpus": world["corpus"], "eval_size": "4"}
    choices = {
        "merged": {"model": str(out)},
        "adapter": {"model": world["model"], "adapter": str(out / "adapter")},
        "checkpoint": {"model": world["model"], "adapter": str(out / "checkpoint-2")},
        "base": {"model": world["model"], "method": "search-r1", "max_searches": "1"},
    }
    for name, choice in choices.items():
        flags = data | choice | {"max_completion_length": "16", "output": str(tmp_path / f"{name}.json")}
        evaluate.main(*parse(evaluate.Config, "evaluate.py", arguments(flags)))
        config = json.loads((tmp_path / f"{name}.json").read_text())["config"]
        assert (config["method"], config["max_searches"]) == ("search-r1", 1)
        found[name] = (tmp_path / f"{name}_transcripts.jsonl").read_text()
    assert found["merged"] == found["adapter"] == found["checkpoint"] != found["base"]

    episodes = []
    monkeypatch.setattr(look, "report", lambda episode, *rest: episodes.append(episode.ids) or 0)
    question = {"question": "who is w3", "corpus": world["corpus"], "max_completion_length": "16"}
    for name in ("merged", "adapter", "base"):
        assert look.main(*parse(look.Config, "look.py", arguments(choices[name] | question))) == 0
    assert episodes[0] == episodes[1] != episodes[2]


# ------------------------------------------------------------------------------------------------------------
# what is refused


def entry(**changed):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def stored(change):
    def rewrite(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


def without(name):
    def change(folder):
        (folder / name).unlink()

    return change


UP = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
A, B = UP.format("A"), UP.format("B")
REFUSED = {
    "DoRA": (entry(use_dora=True), "its use_dora is True"),
    "another scale": (entry(use_rslora=True), "its use_rslora is True"),
    "trained biases": (entry(bias="all"), "its bias is all"),
    "other ranks": (entry(rank_pattern={"up_proj": 2}), "its rank_pattern is"),
    "changed base weights": (entry(init_lora_weights="pissa"), "its init_lora_weights is pissa"),
    "another head": (entry(modules_to_save=["lm_head"]), "its modules_to_save is"),
    "not LoRA": (entry(peft_type="LOHA"), "its peft_type is LOHA"),
    "a rank of 0": (entry(r=0), "division by zero"),
    "another rank": (entry(r=5), "has another shape"),
    "a rank in words": (entry(r="4"), "no adapter of this model"),
    "no layer": (entry(target_modules=["x_proj"]), "no torch.nn.Linear"),
    "all layers but one": (entry(target_modules=BLOCK[1:]), "4 tensors are missing or have no place"),
    "a missing tensor": (stored(lambda t: t.pop(A)), f"1 tensors are missing or have no place, {A}"),
    "the head": (stored(lambda t: t.update(x=t[A].clone())), "1 tensors are missing or have no place, x"),
    "another width": (stored(lambda t: t.update({A: t[A][:, :-1].clone()})), "has another shape"),
    "NaN": (
        stored(lambda t: t[B].fill_(float("nan"))),
        f"{B} has another shape than its layer, or holds NaN",
    ),
    "no weights": (without("adapter_model.safetensors"), "no adapter of this model: No such file"),
    "no settings": (without("adapter_config.json"), "no adapter of this model"),
    "settings without a rank": (lambda f: (f / "adapter_config.json").write_text("{}"), "no key"),
    "broken weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"123"), "no adapter of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_adapter(tmp_path, case):
    damage, message = REFUSED[case]
    save_adapter(with_adapters()[0], tmp_path, SETTINGS)
    load_adapter(make_model(), tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_adapter(make_model(), tmp_path)
    assert str(error.value).startswith(f"--adapter {tmp_path}: ") and "\n" not in str(error.value)


def test_an_adapter_of_another_model(tmp_path):
    save_adapter(with_adapters("llama")[0], tmp_path, SETTINGS)
    with pytest.raises(InputError, match=r"no torch\.nn\.Linear in the blocks of gpt2"):
        load_adapter(make_model("gpt2"), tmp_path)
    with pytest.raises(InputError, match="has another shape"):
        load_adapter(make_model("llama", intermediate_size=80), tmp_path)


def test_the_checkpoint_of_another_run(world, lively):
    out = Path(world["output_dir"])
    assert run_main(world | {"lora_r": "4", "max_steps": "1"}) == 0
    with pytest.raises(InputError, match="another shape"):
        path = out / "checkpoint-1" / "adapter_model.safetensors"
        save_file({k: x[:1].clone() for k, x in load_file(path).items()}, path)
        run_main({"output_dir": str(out), "max_steps": "2"}, "--resume")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_r": -1}, "--lora_r -1: must be a number at least 0"),
        ({"lora_alpha": 8}, "--lora_alpha 8: only with --lora_r"),
        ({"lora_r": 4, "lora_alpha": 0}, "--lora_alpha 0: must be a number at least 1"),
    ],
)
def test_wrong_flags(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check(Config(**options))


def test_a_model_without_linear_layers(as_model):
    with pytest.raises(InputError, match=r"^--lora_r 4: no torch.nn.Linear in the blocks of gpt2$"):
        run_main(as_model("gpt2") | {"lora_r": "4"})


def test_an_adapter_given_as_a_model(world, lively):
    assert run_main(world | {"lora_r": "4", "max_steps": "1"}) == 0
    with pytest.raises(InputError, match="give its base model as --model, and this as --adapter of evaluate"):
        load_model(f"{world['output_dir']}/adapter", "cpu")
