"""Cycles of systolic arrays against nine runs of SCALE-Sim 3, and what tiles make of tokens."""

from __future__ import annotations

import pytest

from fewer.hardware.levels import Level, Machine, traffic
from fewer.hardware.systolic import Array, steps

RUNS = {  # (M, N, K) on 16 x 8 units: output, weight, input stationary
    (49, 64, 32): (1727, 1391, 1427),
    (25, 64, 32): (863, 1007, 815),
    (17, 20, 40): (371, 494, 521),
}


@pytest.mark.parametrize(("size", "cycles"), RUNS.items())
def test_the_simulators_own_runs(size, cycles):
    assert tuple(Array(16, 8, flow).cycles(*size) for flow in ("os", "ws", "is")) == cycles


def test_197_and_129_tokens_cost_the_same_on_128_rows():
    array = Array(128, 128)
    assert [array.cycles(n, 1536, 384) for n in (197, 160, 129, 128, 65)] == [15311] * 3 + [7655] * 2
    assert steps(lambda n: array.cycles(n, 1536, 384), 300) == [128, 256, 300]


@pytest.mark.parametrize("flow", ["os", "ws", "is"])
def test_more_of_anything_never_costs_less_and_no_array_is_used_beyond_its_units(flow):
    array = Array(12, 20, flow)
    for size in ((1, 1, 1), (12, 20, 7), (13, 21, 8), (197, 64, 64)):
        here = array.cycles(*size)
        assert all(array.cycles(*(s + (i == j) for j, s in enumerate(size))) >= here for i in range(3))
        assert 0 < array.used(*size) <= 1
    assert array.cycles(0, 5, 5) == array.used(0, 5, 5) == 0


def test_one_tile_by_hand():
    # 2 x 2 units, outputs stand still, K = 3: the last operand enters row 2 in cycle 1, meets column 2 in 2, K - 1 more
    assert Array(2, 2).cycles(2, 2, 3) == 2 + 2 + 3 - 2 - 1


@pytest.mark.parametrize(("wrong", "says"), [((0, 8), "0x8"), ((8, -1), "8x-1"), ((8, 8, "rs"), "'rs'")])
def test_no_such_array(wrong, says):
    with pytest.raises(ValueError, match=says):
        Array(*wrong)
    with pytest.raises(ValueError, match="negative"):
        Array(8, 8).cycles(-1, 2, 2)


MEMORY = Machine(units=256, levels=[Level("dram", 0, 16, 640), Level("sram", 3 * 64 * 64, 64, 5)])


def test_the_slowest_level_is_the_time_and_every_access_costs_energy():
    cost = MEMORY.cost(197, 1536, 384)
    assert cost.cycles == max(cost.parts.values())
    assert cost.bound in cost.parts
    moved = traffic(197, 1536, 384, 3 * 64 * 64), traffic(197, 1536, 384, 3)
    assert cost.parts["dram"] == moved[0] / 16
    assert cost.parts["sram"] == moved[1] / 64
    assert cost.energy == pytest.approx(moved[0] * 640 + moved[1] * 5 + 197 * 1536 * 384 * 4.6)


def test_what_fits_inside_is_read_once():
    assert traffic(8, 8, 8, 1000) == 3 * 64
    assert traffic(8, 8, 8, 3 * 16) == 2 * 64 * 2 + 64  # blocks of 4 x 4: each operand twice


def test_fewer_tokens_are_a_smaller_problem_zeros_only_where_hardware_minds_them():
    full, half = MEMORY.cost(512, 512, 512), MEMORY.cost(256, 512, 512)
    assert half.parts["compute"] == full.parts["compute"] / 2
    assert half.energy < 0.6 * full.energy
    computed, gated, skipped = (MEMORY.cost(512, 512, 512, 0.5, zeros) for zeros in ("computed", "gated", "skipped"))
    assert computed.cycles == full.cycles
    assert computed.energy == full.energy
    assert gated.cycles == full.cycles
    assert gated.energy == pytest.approx(full.energy / 2)
    assert skipped.cycles == full.cycles / 2
    assert skipped.energy == pytest.approx(full.energy / 2)
    with pytest.raises(ValueError, match=r"density=1\.5"):
        MEMORY.cost(1, 1, 1, 1.5)
