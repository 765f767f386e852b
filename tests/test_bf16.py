"""python -m pytest tests/test_bf16.py

Whole runs in bf16, on a CPU: the model is in bf16, and the lower halves of its weights are in the optimizer.
(test_optim.py has the arithmetic.)
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from worlds import VOCABULARY, arguments, run_main, timeless

import evaluate
import grpo
import run as module
from config import Config, parse
from data import Episode, InputError, Question
from model import load_model
from optim import join, split
from prompts import SEM
from run import Run, resolve

ROPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE |= {"head_dim": 8, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS = {
    "llama": {"model_type": "llama", **ROPE},
    "tied qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True, **ROPE},
    "gpt2": {"model_type": "gpt2", **GPT2},
}


@pytest.fixture
def as_model(world):
    """A function that gives the world another start model, stored in a dtype."""

    def write(name: str, dtype=torch.float32):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**MODELS[name], vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(world["model"])
        return world

    return write


@pytest.fixture
def a_run(world):
    """A function that makes the run of the world, without any step."""

    def make(*switches):
        return Run(resolve(*parse(Config, "grpo.py", [*arguments(world), "--bf16", *switches])))

    return make


def tensors(folder: str | Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / f"{name}.safetensors")


def joined(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint with their lower halves."""
    lower = tensors(checkpoint, "optimizer")
    return {name: join(upper, lower[f"{name}.lower"]) for name, upper in tensors(checkpoint).items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------
# runs


@pytest.mark.slow
@pytest.mark.parametrize("switches", [(), ("--gradient_checkpointing",)], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_in_bf16(as_model, lively, tmp_path, name, switches):
    """It learns, resumes exactly, and leaves a directory that evaluate.py takes. The first ratios and the
    first KL are exact, because the three passes over a batch are the same computation."""
    flags = as_model(name) | {"beta": "0.1"}
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run_main(flags | {"output_dir": str(whole)}, "--bf16", *switches) == 0
    rows = timeless(whole / "metrics.jsonl")
    assert all(row["sampler_logp_diff/max"] < 0.02 and 0 < row["grad_norm"] < 100 for row in rows)
    assert rows[0]["kl"] == 0 and rows[0]["loss"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl"] > 1e-4

    part_flags = flags | {"output_dir": str(part)}
    assert run_main(part_flags | {"max_steps": "3"}, "--bf16", *switches) == 0
    shutil.rmtree(part / "checkpoint-3")  # as if killed in step 4
    assert run_main({"output_dir": str(part), "max_steps": "4"}, "--bf16", "--resume") == 0
    assert timeless(part / "metrics.jsonl") == rows
    for file in ("model", "optimizer"):
        assert_equal(tensors(whole / "checkpoint-4", file), tensors(part / "checkpoint-4", file))
    assert_equal(tensors(whole), tensors(part))

    data = {"model": str(whole), "data": flags["train"], "corpus": flags["corpus"], "eval_size": "4"}
    data |= {"output": str(tmp_path / "eval.json"), "max_completion_length": "16"}
    evaluate.main(*parse(evaluate.Config, "evaluate.py", arguments(data)))
    assert json.loads((tmp_path / "eval.json").read_text())["measures"].keys() == {"known", "unknown", "all"}


def test_steps_of_one_millionth_move_every_weight(as_model, lively):
    """The weights of the final directory hardly move, since they are rounded to bf16. With --save_fp32, here
    after the last step, they are the joined ones, and transformers loads them in fp32."""
    flags = as_model("llama") | {"learning_rate": "1e-6", "warmup_steps": "0"}
    out, up = Path(flags["output_dir"]), "model.layers.0.mlp.up_proj.weight"
    start = tensors(flags["model"])
    assert run_main(flags, "--bf16") == 0
    end, full = tensors(out), joined(out / "checkpoint-4")
    assert_equal(end, {name: split(x)[0] for name, x in full.items()})
    assert (end[up] != split(start[up])[0]).double().mean() < 0.1
    assert (full[up] != start[up]).double().mean() > 0.99
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert run_main({"output_dir": str(out)}, "--bf16", "--resume", "--save_fp32") == 0
    assert_equal(tensors(out), full)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32
    assert_equal(loaded.state_dict(), full)


# ------------------------------------------------------------------------------------------------------------
# what is in memory, and what is on the disk


@pytest.mark.parametrize("name", MODELS)
def test_there_is_one_set_of_weights(as_model, a_run, name):
    """The policy samples. Parameters are in bf16, and the frequencies of the rotary embedding are still those
    of the model in fp32."""
    as_model(name)
    run = a_run()
    assert run.runner.model is run.model and run.reference is not run.model
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    full = dict(load_model(run.config.model, "cpu")[0].named_buffers())
    assert_equal(dict(run.model.named_buffers()), full)
    assert all(
        torch.equal(p, q) for p, q in zip(run.model.parameters(), run.reference.parameters(), strict=True)
    )
    places = {p.data_ptr() for p in run.model.parameters()}
    assert not places & {p.data_ptr() for p in run.reference.parameters()}
    tied = run.model.get_output_embeddings().weight is run.model.get_input_embeddings().weight
    assert tied == (name != "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_lower_halves_of_the_start_model(as_model, a_run, monkeypatch, dtype):
    """They come from its file. A bf16 file has none, so it is read once only."""
    loads, real = [], module.load_model

    def spied(*arguments):
        loads.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(module, "load_model", spied)
    stored = tensors(as_model("llama", dtype)["model"])
    run = a_run()
    assert_equal(run.optimizer.full_weights(), {name: x.float() for name, x in stored.items()})
    lower = [state["lower"].abs().max().item() for state in run.optimizer.state.values()]
    assert (max(lower) > 0) == (len(loads) == 2) == (dtype != torch.bfloat16)


def test_a_checkpoint_is_a_bf16_model_with_the_rest_beside_it(as_model, lively):
    flags = as_model("tied qwen3")
    assert run_main(flags | {"max_steps": "2"}, "--bf16") == 0
    folder = Path(flags["output_dir"]) / "checkpoint-2"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert_equal({n: p.detach() for n, p in model.named_parameters()}, tensors(folder))
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(x.nbytes for x in tensors(folder).values()) == 2 * parameters
    scalars = sum(x.nbytes for x in tensors(folder, "optimizer").values() if not x.ndim)
    assert sum(x.nbytes for x in tensors(folder, "optimizer").values()) == 10 * parameters + scalars


@pytest.mark.parametrize(
    "switch, beta, total", [("--bf16", 0.1, 16), ("--bf16", 0, 14), ("--no-bf16", 0.1, 20)]
)
def test_the_first_lines_say_where_the_memory_goes(as_model, lively, capsys, switch, beta, total):
    """In bytes a parameter: halves of the weights 2 + 2, gradients 2, moments 8, start model 2."""
    flags = as_model("llama") | {"max_steps": "1", "beta": str(beta)}
    assert run_main(flags, switch) == 0
    [line] = re.findall(r"^memory: .*", capsys.readouterr().out, re.MULTILINE)
    sizes = {
        name: float(size) * 1e9
        for name, size in re.findall(r"([a-z ]+) ([\d.e-]+) GB", re.sub(r"[:,] ", ",", line))
    }
    assert [*sizes] == ["weights", "gradients", "moments", "start model", "cache"], line
    numel = sum(x.numel() for x in tensors(flags["model"]).values())
    assert sum(sizes.values()) - sizes["cache"] == pytest.approx(total * numel, rel=0.01)
    assert sizes["weights"] == pytest.approx(4 * numel, rel=0.01)
    rows, layers, heads, positions, head = 16, 2, 2, 32, 8
    assert sizes["cache"] > 2 * rows * layers * heads * positions * head


@pytest.mark.parametrize(
    "switches, size", [(("--bf16",), 38), (("--bf16", "--save_fp32"), 40), (("--no-bf16",), 40)]
)
def test_the_room_for_a_run(as_model, a_run, monkeypatch, switches, size):
    """Three checkpoints of 12 bytes a parameter, one of which is being written, and the final weights."""
    numel = sum(x.numel() for x in tensors(as_model("llama")["model"]).values())
    run, free = a_run(*switches), numel * size - 1
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("usage", (), {"free": free})())
    with pytest.raises(InputError, match="GB are free"):
        run.start()
    free += 1
    run.start()


def test_notes_of_rounding_are_printed(as_model, lively, capsys):
    flags = as_model("llama") | {"max_steps": "1", "learning_rate": "1e-9"}
    assert run_main(flags, "--bf16") == 0
    text = capsys.readouterr().out
    assert (
        "--learning_rate 1e-09 cannot move the largest weights" in text and "--weight_decay 0.01 does" in text
    )


# ------------------------------------------------------------------------------------------------------------
# gradients


def test_sums_of_gradients_in_bf16(as_model):
    """The gradients of 64 micro-batches are added in bf16, with a rounding at each. The sum points the same
    way as that in fp32: 1 minus their cosine is 3e-5."""
    model, _ = load_model(as_model("llama")["model"], "cpu", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    episodes = [
        Episode(Question("0", "", ["x"], "known"), [2, 3], ids, [True] * 12, [-4.0] * 12, [], template=SEM)
        for ids in torch.randint(2, VOCABULARY, (64, 12), generator=generator).tolist()
    ]
    config = Config(micro_batch_tokens=1, beta=0.0)
    advantage = torch.randn(64, generator=generator).tolist()
    batches = grpo.make_batches(episodes, advantage, config, "cpu")

    def add_gradient(batch):
        grpo.policy_loss(model, batch, config, VOCABULARY)[0].backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters()])

    for batch in batches:
        in_bf16 = add_gradient(batch)
    in_fp32 = torch.zeros_like(in_bf16)
    for batch in batches:
        model.zero_grad()
        in_fp32 += add_gradient(batch)
    assert len(batches) == 64 and in_fp32.norm() > 0.01
    assert 1 - torch.cosine_similarity(in_bf16.double(), in_fp32.double(), dim=0).item() < 1e-3
