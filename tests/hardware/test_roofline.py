"""The roofline: tables, sums, limits, and that a profile survives its file. Its accuracy is a benchmark's business."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from fewer.hardware import calibrate
from fewer.hardware.calibrate import Profile, Table
from fewer.hardware.ops import Op, Work
from fewer.hardware.roofline import by_flops, by_tokens, estimate, op_seconds, speed_up
from fewer.hardware.timing import Clock, spread
from profiles import made


def gemm(m: int, layer: int = 0, batch: int = 0) -> Op:
    return Op("gemm", (batch, m, 100, 100), layer, 2 * max(batch, 1) * m * 10_000, 0)


def test_a_table_is_straight_in_logarithms_and_level_beyond_its_ends() -> None:
    table = Table([[1, 100], [10, 1000]], [1, 4, 9, 36])
    assert table.at(1, 10) == pytest.approx(1)
    assert table.at(100, 1000) == pytest.approx(36)
    assert table.at(10, 100) == pytest.approx(math.sqrt(1 * 4 * 9 * 36) ** 0.5)
    assert table.at(1e9, 1e9) == pytest.approx(36)
    assert table.at(0, 1) == pytest.approx(1)
    with pytest.raises(ValueError, match="holds 3"):
        Table([[1, 2], [1, 2]], [1, 2, 3])


def test_seconds_of_single_operations() -> None:
    p = made()
    assert op_seconds(p, gemm(50)) == pytest.approx(1e6 / 1e9)
    assert op_seconds(p, gemm(50, batch=4)) == pytest.approx(4e6 / 5e8)
    attention = Op("attention", (2, 10, 10, 8, 0, 0), 0, 6400, 0)
    causal = Op("attention", (2, 10, 10, 8, 1, 1), 0, 6400, 0)
    assert op_seconds(p, causal) == pytest.approx(op_seconds(p, attention) * 0.5 * 1.2)
    assert op_seconds(p, Op("light", (1, 1), 0, 0, 10**6)) == pytest.approx(1e-3)
    assert op_seconds(p, Op("light", (1, 1), 0, 0, 10**7)) == pytest.approx(1e-2)  # twice the bytes, twice the time
    assert op_seconds(p, Op("view", (), 0, 0, 0)) == 1e-6
    assert op_seconds(p, Op("sort", (16 * 160, 160), 0, 0, 0)) == pytest.approx(16 * 1e-5)


def test_an_estimate_is_a_sum_and_a_session_costs_what_it_adds() -> None:
    p, plain = made(), Work([gemm(50), gemm(50, 1)])
    alone = estimate(p, plain)
    assert alone.seconds == pytest.approx(2 * (1e-3 + 1e-6)) == sum(alone.layers.values())
    again = estimate(p, plain, plain)
    assert again.seconds == pytest.approx(alone.seconds + 2 * 1e-4)
    more = estimate(p, Work([*plain.ops, gemm(50, 1)]), plain)
    assert more.seconds - again.seconds == pytest.approx(1e-3 + 3e-6)
    assert sum(more.layers.values()) == pytest.approx(more.seconds)
    assert more.bound == "gemm"


def test_a_speed_up_with_its_uncertainty() -> None:
    p = made(spread={"gemm": 0.1})
    plain, half = Work([gemm(100, i) for i in range(4)]), Work([gemm(50, i) for i in range(4)])
    found = speed_up(p, plain, half, error=0.05)
    assert 1.7 < found.value < 2
    assert found.low == pytest.approx(found.value / (found.high / found.value))
    assert found.high / found.value >= 1.05
    assert by_flops(plain, half) == 2
    plain.tokens, half.tokens = [(100, 100)], [(100, 50)]
    assert by_tokens(plain, half) == pytest.approx(200 / 150)


def test_time_never_falls_as_tokens_are_added() -> None:
    p = made()
    seconds = [estimate(p, Work([gemm(m)])).seconds for m in range(1, 300, 7)]
    assert seconds == sorted(seconds)


def test_a_profile_survives_its_file_and_another_version_is_refused(tmp_path) -> None:
    p, path = made(), tmp_path / "there" / "p.json"
    p.save(path)
    back = Profile.load(path)
    assert back.around == p.around
    assert op_seconds(back, gemm(37)) == op_seconds(p, gemm(37))
    path.write_text('{"version": 0}')
    with pytest.raises(ValueError, match="delete it"):
        Profile.load(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match="delete it"):
        Profile.load(path)


def test_a_machine_is_measured_once_and_again_where_its_file_is_spoilt(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    measured = []
    monkeypatch.setattr(calibrate, "measure", lambda *_: measured.append(1) or made())
    said: list[str] = []
    calibrate.profile(log=said.append)
    calibrate.profile(log=said.append)
    assert len(measured) == 1
    assert "measuring" in said[0]
    next((tmp_path / "hardware").glob("*.json")).write_text("{")
    calibrate.profile(log=said.append)
    assert len(measured) == 2
    assert any("delete it" in line for line in said)
    calibrate.profile(fresh=True)
    assert len(measured) == 3
    before = calibrate.machine()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert calibrate.machine() != before  # another number of threads is another machine
    finally:
        torch.set_num_threads(threads)


def test_the_clock_takes_longer_for_more() -> None:
    clock, a = Clock("cpu"), torch.randn(200, 200)
    runs = {1: lambda: a @ a, 4: lambda: [a @ a for _ in range(4)]}
    samples: dict[int, list[float]] = {}
    clock.sweep(runs, samples, 5)
    assert [len(s) for s in samples.values()] == [5, 5]
    assert 2 < statistics.median(samples[4]) / statistics.median(samples[1]) < 8
    assert spread([1.0, 1.0, 1.0, 1.0]) == 0 < spread(samples[1])
    assert clock.once(runs[4], lambda: None) > clock.once(runs[1], lambda: None)


@pytest.mark.slow
def test_measuring_this_machine_gives_a_profile_that_foretells_a_product() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        p = calibrate.measure()
        clock, x, w = Clock("cpu"), torch.randn(300, 500), torch.randn(700, 500)
        truth = clock.once(lambda: torch.nn.functional.linear(x, w), lambda: None)
    finally:
        torch.set_num_threads(threads)
    assert set(p.around) == {"encoder", "prompt", "step"}
    assert 0.5 < op_seconds(p, Op("gemm", (0, 300, 700, 500), 0, 2 * 300 * 700 * 500, 0)) / truth < 2
