"""Which tokens teach: what is counted, and a short run of the suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewer.evaluation import suites
from fewer.evaluation.selection import CLEAN, PLAIN, Run, Selection, noisy, runs, summaries, table


def made(method: str, curve: list[tuple[int, int, float]], norms: list[float] | None = None) -> Run:
    return Run(0, method, curve, norms or [1.0] * 80, [5.0, 4.0] * 40, 0.1, 2.0)


def test_noise_comes_in_runs_and_nowhere_else() -> None:
    windows = torch.arange(400 * 16).view(400, 16) % 7
    found, where = noisy(windows, 0.3, 50, seed=1)
    assert torch.equal(found[~where], windows[~where])
    assert where.view(400, 2, 8).float().mean(-1).unique().tolist() == [0, 1]
    assert float(where.float().mean()) == pytest.approx(0.3, abs=0.04)
    assert int(found[where].max()) > 6


def test_runs_are_held_against_plain_at_equal_steps_and_at_equal_tokens() -> None:
    plain = made(PLAIN, [(10, 100, 6.0), (20, 200, 5.0), (30, 300, 4.0)])
    other = made("rho1", [(10, 60, 5.5), (20, 120, 4.5), (30, 180, 3.5)])
    worse = made("random", [(10, 60, 6.5), (20, 120, 5.5), (30, 180, 4.5)])
    base, one, two = summaries([plain, other, worse])
    assert (base.against, base.at_equal_tokens, base.reached) == (0, 0, (1.0, 1.0))
    assert one.against == -0.5
    assert one.at_equal_tokens == pytest.approx(3.5 - 5.2)  # plain at 180 tokens
    assert one.reached == pytest.approx((25 / 30, 150 / 300))
    assert two.reached is None
    assert two.at_equal_tokens == pytest.approx(4.5 - 5.2)
    lines = {row[0]: row for row in table([base, one, two])}
    assert lines["rho1"][4] == "83 / 50"
    assert lines["random"][4] == "never"


def test_spikes_stand_out_of_the_gradients_before() -> None:
    norms = [1.0] * 60 + [2.5] + [1.0] * 10 + [1.9] + [1.0] * 8
    plain = made(PLAIN, [(80, 1, 4.0)], norms)
    assert [row.spikes for row in summaries([plain])] == [1]
    assert [row.spikes for row in summaries([plain], spike=1.5)] == [2]


def test_a_run_teaches_what_it_says() -> None:
    recipe = Selection(
        data="embedded", steps=60, seeds=1, batch=2, length=16, pieces=300, width=32, layers=1, held=4, every=30
    )
    plain, rho, random, clean = runs(recipe, log=lambda line: None)
    assert plain.curve[-1][1] == 60 * 2 * 15
    assert rho.curve[-1][1] == random.curve[-1][1] == 60 * 18
    assert clean.noise_taught == 0
    assert random.noise_taught == pytest.approx(plain.noise_taught, abs=0.05)
    assert rho.reference is not None
    assert plain.reference is None
    again = runs(recipe, seeds=[0], log=lambda line: None)
    assert [one.norms for one in again] == [one.norms for one in (plain, rho, random, clean)]
    assert [one.method for one in again] == [PLAIN, "rho1:keep=0.6", "random:site=loss,keep=0.6", CLEAN]


@pytest.mark.slow
def test_the_suite_writes_a_table(tmp_path: Path) -> None:
    found, file = suites.run("training", {"steps": 60}, tmp_path, lambda line: None)
    assert [row[0] for row in found.rows] == list(Selection.methods)
    assert file.name == "training.json"
    assert "60 steps" in found.notes[2]
    with pytest.raises(ValueError, match="--limit does not apply"):
        suites.run("training", {"limit": 3}, tmp_path)


def test_what_cannot_be_is_refused() -> None:
    for given, why in (
        ({"noise": 1.0}, "less than 1"), ({"methods": ("rho1",)}, "'plain'"), ({"length": 90}, "multiples"),
        ({"steps": 10}, "at least 60"), ({"data": "mails"}, "choose eras or embedded"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            Selection(**given)
