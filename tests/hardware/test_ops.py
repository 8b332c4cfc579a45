"""What a pass asks for, written down without computing: FLOPs, blocks, and where shapes do not tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fewer
from fewer import hosts
from fewer.hardware.ops import CountedByData, Work, record
from vit import images, tiny_vit


def test_products_by_hand() -> None:
    layer = nn.Linear(8, 16)
    ops = record(lambda: layer(torch.zeros(3, 5, 8)).softmax(-1))
    gemm = next(op for op in ops if op.kind == "gemm")
    assert gemm.shape == (0, 15, 16, 8)
    assert gemm.flops == 2 * 15 * 16 * 8
    assert gemm.bytes == 4 * (16 + 15 * 8 + 16 * 8 + 15 * 16)
    assert [op.shape for op in ops if op.kind == "softmax"] == [(240, 16)]
    pairs = record(lambda: torch.zeros(2, 3, 4) @ torch.zeros(2, 4, 5))
    assert [op.shape for op in pairs if op.kind == "gemm"] == [(2, 3, 5, 4)]


def test_attention_by_hand() -> None:
    q, k = torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 11, 8)
    attend = nn.functional.scaled_dot_product_attention
    plain = next(op for op in record(lambda: attend(q, k, k)) if op.kind == "attention")
    assert plain.shape == (6, 7, 11, 8, 0, 0)
    assert plain.flops == 4 * 6 * 7 * 11 * 8
    causal = next(op for op in record(lambda: attend(q, q, q, is_causal=True)) if op.kind == "attention")
    assert causal.shape == (6, 7, 7, 8, 1, 0)
    masked = next(op for op in record(lambda: attend(q, k, k, attn_mask=torch.zeros(7, 11))) if op.kind == "attention")
    assert masked.shape[-1] == 1


@pytest.mark.parametrize("method", [None, "tome:r=3", "evit:keep=0.5,layers=1", "pool:keep=0.5,layers=1"])
def test_flops_are_those_torch_counts_on_the_real_pass(method: str | None) -> None:
    model, x = tiny_vit("vit", image=48), images(2, 48)
    session = fewer.apply(model, method) if method else None
    imagined = Work(record(lambda: model(x))).flops
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)  # the counter does not know the fused kernel of a CPU
    if session:
        session.remove()
    assert imagined == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_nothing_is_computed_and_the_model_is_left_as_it_was() -> None:
    model = tiny_vit("vit")
    before = {name: p.clone() for name, p in model.named_parameters()}
    hooks = [len(b._forward_hooks) + len(b._forward_pre_hooks) for b in hosts.find(model).blocks]
    with fewer.apply(model, "tome:r=2"):
        ops = record(lambda: model(torch.zeros(64, 3, 32, 32)), hosts.find(model).blocks)
    assert {op.layer for op in ops} == {-1, 0, 1, 2, 3}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert hooks == [len(b._forward_hooks) + len(b._forward_pre_hooks) for b in hosts.find(model).blocks]


def test_a_step_behind_a_prompt_reads_what_the_cache_holds() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    ).eval()
    held = {}

    def fill() -> None:
        held["cache"] = DynamicCache(config=model.config)
        model(torch.zeros(1, 40, dtype=torch.long), past_key_values=held["cache"])

    def keys() -> list[int]:
        ops = record(lambda: model(torch.zeros(1, 1, dtype=torch.long), past_key_values=held["cache"]), prepare=fill)
        return [op.shape[2] for op in ops if op.kind == "attention"]

    assert keys() == [41, 41]
    with fewer.apply(model, "knorm:keep=0.5"):
        assert keys() == [21, 21]


def test_counts_that_depend_on_numbers_are_said_to() -> None:
    def summed() -> list[int]:
        return [0] * int(torch.ones(3).sum())

    with pytest.raises(CountedByData, match="depends on the input"):
        record(summed)
    assert [op.kind for op in record(summed, compute=True)] == ["copy", "reduce"]
