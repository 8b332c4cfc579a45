"""SpAtten's cycles against the authors' behavioural model, its top-k engine, its schedule and its planes of bits."""

from __future__ import annotations

import random
import statistics

import pytest

from fewer.hardware.spatten import Progressive, SpAtten, cascade, nested, quickselect, sorter

SIMULATED = {  # 2,000 runs of the engine each, 16 numbers a cycle: mean, standard deviation
    (64, 32): (37, 12), (256, 32): (74, 22), (1024, 512): (259, 69), (1024, 128): (216, 66), (4096, 32): (576, 185),
    (197, 98): (74, 21), (577, 288): (161, 43),
}  # fmt: skip


@pytest.mark.parametrize(
    ("queries", "keys", "dram", "fill", "drain", "total"),
    [(384, 384, 1152, 221184, 151, 222487), (384, 192, 576, 110592, 127, 111295), (192, 192, 576, 55296, 127, 55999),
     (1, 1024, 3072, 1536, 231, 4839), (1, 256, 768, 384, 135, 1287)],
)  # fmt: skip
def test_the_authors_own_cases(queries, keys, dram, fill, drain, total):
    found = SpAtten().layer(queries, keys)
    assert (found.dram, found.fill, found.drain, found.total) == (dram, fill, drain, total)
    assert found.overlapped == max(dram, fill) + drain


def test_half_the_bits_of_keys_save_a_quarter_of_all_bytes():
    assert SpAtten().layer(1, 1024, key_bits=4).total == 4071
    planes = Progressive(4, 4)
    assert SpAtten().layer(1, 1024, key_bits=planes.key_bits(0)).total == 4071
    assert SpAtten().layer(1, 1024, key_bits=planes.key_bits(1)).total == 4839


@pytest.mark.parametrize(("case", "simulated"), SIMULATED.items())
def test_quick_select_is_the_mean_of_what_was_simulated(case, simulated):
    mean, spread = quickselect(*case)
    assert abs(mean - simulated[0]) <= 0.5 + 4 * spread / 2000**0.5
    assert spread == pytest.approx(simulated[1], rel=0.07, abs=0.5)


def played(n: int, k: int, parallel: int, dice: random.Random) -> int:
    """One run of the engine, number by number."""
    left, cycles = list(range(n)), 0
    while True:
        cycles += -(-len(left) // parallel) + 3
        pivot = dice.choice(left)
        above = [x for x in left if x > pivot]
        if len(above) == k - 1:
            return cycles
        if len(above) >= k:
            left = above
        else:
            left, k = [x for x in left if x < pivot], k - len(above) - 1


def test_quick_select_is_the_mean_of_what_is_played_here():
    dice = random.Random(0)
    runs = [played(90, 20, 8, dice) for _ in range(3000)]
    mean, spread = quickselect(90, 20, 8)
    assert statistics.mean(runs) == pytest.approx(mean, abs=4 * spread / 3000**0.5)
    assert statistics.pstdev(runs) == pytest.approx(spread, rel=0.06)


def test_quick_select_of_few_by_hand():
    assert quickselect(1, 1) == (4, 0)  # one number, one cycle and three
    assert quickselect(2, 1)[0] == 4 + 4 / 2  # a second round when the other number was drawn
    assert quickselect(50, 13) == quickselect(50, 38)  # ranks from either end
    assert sorter(1024) == (55, 512)
    with pytest.raises(ValueError, match="the 5-th of 4"):
        quickselect(4, 5)


def test_a_cascade_shrinks_and_never_grows():
    tokens = cascade(384, 0.25, 12)
    assert tokens[:2] == [384, 384]
    assert tokens[2] < 384
    assert tokens[-1] == 96
    assert tokens == sorted(tokens, reverse=True)
    assert cascade(384, 1.0, 12) == [384] * 12
    assert nested([5, 3, 4]) == [5, 3, 3]
    machine = SpAtten()
    full, less = machine.model([384] * 12), machine.model(tokens, cascade(12, 0.5, 12, dense=0.3), ranked=True)
    assert sum(c.total for c in full) == 12 * 222487
    assert sum(c.total for c in less) < 0.5 * sum(c.total for c in full)
    assert sum(c.topk for c in less) > 0 == sum(c.topk for c in full)


def test_a_pruned_head_is_not_computed_and_value_pruning_costs_its_ranking():
    machine = SpAtten()
    assert machine.layer(384, 384, 6).fill * 2 == machine.layer(384, 384, 12).fill
    local = machine.layer(1, 1024, values=256)
    assert local.dram < machine.layer(1, 1024).dram
    assert local.topk == 12 * (128 + quickselect(1024, 256, 32)[0] + 32)
    assert machine.layer(1, 1024, values=1024) == machine.layer(1, 1024)


def test_low_planes_are_fetched_where_nothing_stands_out():
    planes = Progressive(8, 4, threshold=0.1)
    largest = [0.02, 0.3, 0.09, 0.9]
    assert planes.recompute_rate(largest) == 0.5
    assert Progressive(threshold=0).recompute_rate(largest) == 0
    assert Progressive(threshold=1.1).recompute_rate(largest) == 1
    # 100 and 50 tokens, 2 heads of 8: 8 + 0.5 x 4 bits of a key, all 12 of half the values
    assert planes.traffic([100, 50], 2, 8, 0.5, 0.5) == 150 * 2 * 8 * (10 + 6) / 8


@pytest.mark.parametrize(
    ("wrong", "says"),
    [(lambda: SpAtten(channels=0), "channels=0"), (lambda: SpAtten(32).layer(1, 8), "64 channels"),
     (lambda: cascade(8, 0, 4), "final=0"), (lambda: Progressive().key_bits(2), "recomputed=2"),
     (lambda: SpAtten().model([3, 2], [12]), "2 layers")],
)  # fmt: skip
def test_what_cannot_be(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
