"""`fewer cost`: machines by name, methods priced on real models, and what it says where it cannot tell."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fewer import hosts
from fewer.cli import app
from fewer.hardware import calibrate, machines, pricing
from fewer.hardware.ops import CountedByData
from fewer.hardware.spatten import SpAtten
from fewer.hardware.systolic import Array
from profiles import made
from vit import tiny_vit

SIMULATED = ("systolic:128x128", "systolic:16x8:ws", "spatten", "heatvit", "primate:64")


@pytest.fixture(scope="module")
def vit():
    return tiny_vit("vit", image=48)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=50)
    ).eval()


@pytest.mark.parametrize("form", SIMULATED)
def test_keeping_all_is_worth_nothing_and_keeping_few_costs_no_more(vit, form: str) -> None:
    machine, way = machines.machine(form), pricing.passes(vit, batch=2)
    same = pricing.price(vit, "random:keep=1,layers=1", machine, way)
    assert same.speed_up == same.flops == same.tokens == 1
    less = pricing.price(vit, "random:keep=0.3,layers=1", machine, way)
    assert less.speed_up > 1
    assert less.low is None
    assert [r.attention for r in less.rows] == [37, 37, 11, 11]  # three tenths of 36, rounded down, and the first
    assert sum(r.before for r in less.rows) <= less.before + 1e-9 or form.startswith("primate")
    assert not vit.training
    assert not hasattr(vit, "session")


def test_attention_on_spatten_is_its_closed_form(vit) -> None:
    host = hosts.find(vit)
    report = pricing.price(vit, "random:keep=0.5,layers=1", machines.machine("spatten"), pricing.passes(vit))
    one = SpAtten().layer(37, 37, host.heads, host.head_dim).total
    assert report.before == 4 * one
    assert report.rows[0].before == one


def test_a_block_on_an_array_is_the_sum_of_its_products(vit) -> None:
    host, array = hosts.find(vit), Array(32, 32)
    report = pricing.price(vit, "tome:r=0", machines.machine("systolic:32x32"), pricing.passes(vit))
    h, d, n = host.heads, host.head_dim, 37
    linear = [m for m in host.blocks[1].modules() if isinstance(m, torch.nn.Linear)]
    products = [(n, m.out_features, m.in_features) for m in linear] + h * [(n, n, d), (n, d, n)]
    assert len(linear) == 6
    assert report.rows[1].before == sum(array.cycles(*p) for p in products)
    assert any("32 at a time" in line for line in report.notes)


def test_on_a_processor_everything_counts_and_the_error_is_told(vit) -> None:
    machine = machines.Processor(made())
    report = pricing.price(vit, "tome:r=8", machine, pricing.passes(vit, batch=64))
    assert report.low < report.speed_up < report.high
    assert report.unit == "seconds"
    assert report.speed_up < report.flops  # the session costs something


def test_a_prompt_and_a_step(llama) -> None:
    machine = machines.machine("systolic:16x16")
    prompt = pricing.price(llama, "lazyllm:keep=0.5,layers=1", machine, pricing.passes(llama, tokens=64))
    assert prompt.phase == "prompt"
    assert [round(r.attention) for r in prompt.rows] == [64, 64, *[prompt.rows[2].attention] * 2]
    assert prompt.rows[2].attention < 40
    step = pricing.price(llama, "knorm:keep=0.25", machine, pricing.passes(llama, "decode", tokens=64))
    assert [r.attention for r in step.rows] == [17] * 4  # a quarter of the prompt, and the token itself
    assert step.speed_up > 1
    with pytest.raises(ValueError, match="--phase decode"):
        pricing.price(llama, "knorm:keep=0.25", machine, pricing.passes(llama, tokens=64))


@pytest.mark.parametrize("method", ["ats:layers=1", "evit:mass=0.7,fuse=false,layers=1"])
def test_counts_that_the_input_decides_need_an_input(vit, method: str) -> None:
    machine = machines.machine("spatten")
    with pytest.raises(CountedByData, match="--input"):
        pricing.price(vit, method, machine, pricing.passes(vit))
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    report = pricing.price(vit, method, machine, pricing.passes(vit, given=pixels))
    assert report.rows[-1].attention < 37


@pytest.mark.parametrize(
    ("form", "says"),
    [("tpu", "there are cpu"), ("systolic:0x8", "0x8"), ("systolic:8x8:xs", "'xs'"), ("systolic:big", "there are"),
     ("primate:x", "there are"), ("cpu:3", "there are"), ("", "there are")],
)  # fmt: skip
def test_no_such_hardware(form: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        machines.machine(form)


def test_questions_without_an_answer(vit, llama) -> None:
    with pytest.raises(ValueError, match="prefill and decode"):
        pricing.passes(vit, "decode")
    with pytest.raises(ValueError, match="prefill and decode"):
        pricing.passes(llama, "later")
    with pytest.raises(ValueError, match="at most"):
        pricing.passes(llama, tokens=10**6)
    with pytest.raises(ValueError, match="banks=2"):
        pricing.price(vit, "tome", machines.machine("primate:2"), pricing.passes(vit))
    with pytest.raises(ValueError, match="training loss"):
        pricing.price(llama, "rho1", machines.machine("spatten"), pricing.passes(llama))


# -- the command -------------------------------------------------------------------------------------------------------
def called(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cost", *args])
    return result.exit_code, result.output


def test_the_command_prints_a_table_and_json() -> None:
    code, printed = called("vit-fashion", "--method", "evit:keep=0.5", "--hardware", "spatten")
    assert code == 0
    assert "whole pass" in printed
    assert "cycles of attention" in printed
    code, printed = called("vit-fashion", "--method", "evit:keep=0.5", "--hardware", "systolic:64x64", "--json")
    told = json.loads(printed)
    assert code == 0
    assert told["speed_up"] == pytest.approx(told["before"] / told["after"])
    assert len(told["rows"]) == 12


def test_the_command_on_this_machine(monkeypatch) -> None:
    monkeypatch.setattr(machines, "profile", lambda *_, **__: made(machine=calibrate.machine()))
    code, printed = called("vit-fashion", "--method", "tome:r=8", "--hardware", "cpu")
    assert code == 0
    assert "as far as is known" in printed
    assert "milliseconds" in printed


def test_the_command_with_an_input(tmp_path) -> None:
    code, printed = called("vit-fashion", "--method", "ats", "--hardware", "spatten", "--json")
    assert code == 2
    assert "--input" in printed
    code, printed = called("vit-fashion", "--method", "ats", "--hardware", "spatten", "--input", "embedded:3", "--json")
    assert code == 0
    assert json.loads(printed)["speed_up"] > 1


@pytest.mark.parametrize(
    ("args", "says"),
    [(["--hardware", "abacus"], "no hardware 'abacus'"), (["--method", "nothing"], "nothing"),
     (["--dtype", "int3", "--hardware", "spatten"], "int3"), (["--phase", "decode", "--hardware", "spatten"], "decode"),
     (["--input", "nowhere.png", "--hardware", "spatten"], "no image")],
)  # fmt: skip
def test_the_command_says_what_is_wrong(args: list[str], says: str) -> None:
    code, printed = called("vit-fashion", *args)
    assert code == 2
    assert says in printed
    assert "Traceback" not in printed
