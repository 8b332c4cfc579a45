"""HeatViT's arithmetic and engine, PRIMATE's banks, sparse blocks on lanes, few bits: each by hand or at its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fewer.core.cache.quantised import Codec, Codes
from fewer.hardware import fpga, heatvit, primate, quantised


# -- HeatViT ----------------------------------------------------------------------------------------------------------
def test_polynomials_stand_for_the_functions_they_replace():
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    assert heatvit.gelu(torch.zeros(1)) == 0
    assert heatvit.erf(torch.zeros(1)) == 0
    assert (heatvit.gelu(x, delta=1) - torch.nn.functional.gelu(x)).abs().max() < 0.02
    assert (heatvit.gelu(x) - (x / 2 + torch.nn.functional.gelu(x)) / 2).abs().max() < 0.01  # what delta = 0.5 means
    assert (heatvit.exponential(-x.abs()) / (-x.abs()).exp() - 1).abs().max() < 0.005
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(heatvit.softmax(logits).sum(-1), torch.full((5,), 0.5, dtype=torch.float64))
    assert_close(heatvit.softmax(logits, 1), logits.softmax(-1), atol=1e-3, rtol=0.01)


def test_the_sigmoid_of_four_lines():
    at = torch.tensor([0.0, 1.0, 2.375, 5.0, -1.0, -9.0])
    assert heatvit.sigmoid(at).tolist() == [0.5, 0.75, 2.375 / 32 + 0.84375, 1, 0.25, 0]
    below = heatvit.sigmoid(torch.tensor([2.375 - 1e-6], dtype=torch.float64))
    assert below.item() == pytest.approx(0.921875, abs=1e-6)  # from the left; 0.91796875 at it: a jump of 1 / 256
    x = torch.linspace(-8, 8, 999, dtype=torch.float64)
    assert_close(heatvit.sigmoid(x), x.sigmoid(), atol=0.02, rtol=0)
    assert_close(heatvit.sigmoid(-x), 1 - heatvit.sigmoid(x))


def test_a_selector_is_a_sixtieth_of_a_block_of_deit_s():
    assert heatvit.selector_macs(384, 6) == 27912
    engine = heatvit.Engine(16, 16, 1)
    share = engine.selector(197, 384, 6) / engine.block(197, 384, 6)
    assert 0.014 < share < 0.03  # tiles that do not fill make it dearer than its multiply-adds


def test_the_engine_counts_whole_tiles():
    engine = heatvit.Engine(16, 16, 2)
    assert engine.matrix(3, 16, 32) == 3
    assert engine.matrix(3, 17, 33) == 3 * 2 * 2
    assert engine.per_head(5, 16, 16, 3) == 5 * 2
    assert engine.milliseconds(150_000) == 1.0


def test_the_table_gives_budgets_that_meet_the_limit():
    engine = heatvit.Engine()
    shares = [i / 20 for i in range(2, 20)]
    table = heatvit.latency_table(engine, 384, 6, 197, shares)
    ordered = [table[s] for s in sorted(table)]
    assert ordered == sorted(ordered)
    full = 12 * table[1.0]
    selector = engine.milliseconds(engine.selector(197, 384, 6))
    found = heatvit.budgets(table, (3, 6, 9), 12, 0.6 * full, own=selector)
    spent = 3 * table[1.0] + sum(3 * table[min(r for r in table if r >= s - 1e-9)] for s in found) + 3 * selector
    assert spent <= 0.6 * full
    assert found[0] > found[1] > found[2]
    free = heatvit.budgets(table, (3, 6, 9), 12, 0.6 * full)
    assert free[0] >= found[0]  # selectors take room that tokens could have
    with pytest.raises(ValueError, match=r"even keep=0\.1"):
        heatvit.budgets(table, (3, 6, 9), 12, 0.01 * full)


# -- PRIMATE ----------------------------------------------------------------------------------------------------------
def test_banks_are_full_at_multiples_of_them():
    assert primate.utilisation(128, 32) == primate.utilisation(32, 32) == 1
    assert primate.utilisation(129, 32) == 129 / 160
    assert primate.prefill_bytes(50, 12) * 4 == primate.prefill_bytes(100, 12)
    assert primate.decode_bytes(50, 768) * 2 == primate.decode_bytes(100, 768)
    assert primate.topk_cycles(197, 32, 16, 8) == 16 * (7 + 8)


def test_banks_go_to_the_slowest_layer_and_pruned_layers_need_fewer():
    dense = primate.assign([197] * 4, 384, 64)
    assert len(set(dense.banks)) == 1
    assert dense.idle == 0
    pruned = primate.assign([197, 197, 98, 49], 384, 64)
    assert pruned.banks[0] > pruned.banks[2] > pruned.banks[3]
    assert pruned.interval < dense.interval
    assert sum(pruned.banks) <= 64
    best = min(  # all ways to share out 64 banks, tokens of two layers at a time
        max(primate.layer_cycles(n, 384, b) for n, b in zip([197, 197, 98, 49], (x, x, y, 64 - 2 * x - y), strict=True))
        for x in range(1, 31) for y in range(1, 63 - 2 * x)
    )  # fmt: skip
    assert pruned.interval == best
    with pytest.raises(ValueError, match="banks=3"):
        primate.assign([197] * 4, 384, 3)


# -- static and dynamic pruning ---------------------------------------------------------------------------------------
def test_blocks_with_anything_in_them_are_computed():
    weight = np.zeros((20, 33))
    weight[17, 32] = 1
    found = fpga.blocks(weight)
    assert found.shape == (2, 3)
    assert found.sum() == 1
    assert found[1, 2]


def test_all_blocks_and_all_tokens_are_the_dense_cost():
    machine = fpga.Accelerator(lanes=8)
    full = fpga.pattern(24, 72, 1.0)
    assert machine.matrix(full, 197) == 24 * 72 // 8 * 16 * math.ceil(197 / 16)
    assert fpga.imbalance(fpga.balanced(full.sum(0).tolist(), 8)) == 1


def test_lanes_wait_for_the_fullest_less_when_each_has_more_blocks():
    few, many = (
        np.mean(
            [fpga.imbalance(fpga.dealt(fpga.pattern(24, columns, 0.5, seed).sum(0).tolist(), 8)) for seed in range(20)]
        )
        for columns in (8, 256)
    )
    assert few > many > 1
    work = fpga.pattern(24, 24, 0.5).sum(0).tolist()
    assert 1 <= fpga.imbalance(fpga.balanced(work, 8)) <= fpga.imbalance(fpga.dealt(work, 8))
    assert sum(fpga.balanced(work, 8)) == sum(work)
    assert fpga.imbalance([0, 0]) == 1


def test_time_falls_by_less_than_the_flops_do():
    machine = fpga.Accelerator(lanes=8)
    dense = machine.matrix(fpga.pattern(24, 24, 1.0), 197)
    both = machine.matrix(fpga.pattern(24, 24, 0.5), 100)
    assert dense / both < (24 * 24 / fpga.pattern(24, 24, 0.5).sum()) * (197 / 100)


# -- few bits ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 4])
def test_bytes_of_a_coded_cache_are_those_of_the_cache_we_run(bits):
    g, d, rows = 3, 64, 256
    k, v = torch.randn(2, 1, g, rows, d, generator=torch.Generator().manual_seed(0))
    codes = Codes.empty(Codec(bits, 128, 0, 3, 0), k.half())
    codes.append(k.half(), v.half())
    held = sum(x.nbytes for x in codes.tensors())
    assert held == rows * quantised.row_bytes(bits, 128, g, d)
    pooled = Codes.empty(Codec(bits, 128, 0, 3, 6), k.half())
    pooled.append(k.half(), v.half())
    more = sum(x.nbytes for x in pooled.tensors()) - g * 6 * 8  # where each exact row stands, and how large it is
    assert more == pytest.approx(rows * quantised.row_bytes(bits, 128, g, d, rows=rows, pool=6))


def test_two_bits_are_six_times_less_than_sixteen():
    exact = 2 * 8 * 128 * 2
    coded = quantised.row_bytes(2, 128, 8, 128)
    assert 6 < exact / coded < 8
    assert quantised.row_bytes(2, 128, 8, 128, rows=64, window=128) == exact  # all of it is in the window
    assert quantised.decode_seconds(1e9, 1e9, 2e9) == 1


def test_half_the_bits_twice_the_rate_until_memory_is_what_is_waited_for():
    fast = quantised.Multipliers(1e12, 1e15)
    assert fast.rate(16, 16) == 1e12
    assert fast.rate(8, 8) == 2e12
    assert fast.rate(4, 8) == 2e12
    assert fast.rate(4, 4) == 4e12
    args = ([512] * 4, 12 * 768**2, 768)
    assert fast.prefill(*args) == pytest.approx(2 * fast.prefill(*args, bits=(8, 8)))
    slow = quantised.Multipliers(1e18, 1e9)
    assert slow.layer(1, 1, 10**6, 100) == pytest.approx((2e6 + 800) / 1e9)
    assert fast.prefill([512, 512, 256, 256], *args[1:]) < fast.prefill(*args)
    assert (1 - quantised.spread(0.9, 3)) ** 3 == pytest.approx(0.1)
    with pytest.raises(ValueError, match="final=1"):
        quantised.spread(1, 3)
