"""The one training loop: what it computes, when it stops, and that a run which was killed goes on to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from fewer.recipes.loop import At, Diverged, Folder, Loop, Row, shuffled

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = X @ torch.randn(6, 2, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Recipe:
    """What a folder is told of a run."""

    seed: int = 0
    lr: float = 0.02


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 2))


def quiet(_line: str) -> None:
    return None


def optimizers(model: nn.Module, lr: float = 0.02) -> list[torch.optim.Optimizer]:
    first, *_, last = model.children()
    return [torch.optim.AdamW(first.parameters(), lr=lr), torch.optim.SGD(last.parameters(), lr=lr, momentum=0.9)]


def learn(
    model: nn.Module, loop: Loop, after: Callable[[At], None] = lambda at: None, wrong: int | None = None, **more: Any
) -> list[Row]:
    def loss(batch: Tensor, at: At) -> dict[str, Any]:
        error = F.mse_loss(model(X[batch]), Y[batch])
        return {"loss": error * (float("nan") if at.step == wrong else 1), "at": at.progress}

    return loop.run(model, optimizers(model), shuffled(40, 8), loss, after=after, **more)


@pytest.mark.parametrize("schedule", ["cosine", "warmup_stable_decay"])
def test_it_is_the_plain_loop_to_the_bit(schedule: str) -> None:
    loop = Loop(12, warmup=0.25, schedule=schedule, decay=0.5 if schedule != "cosine" else None, clip=0.5, every=5)
    model = net()
    rows = learn(model, loop)
    plain = net()
    each = optimizers(plain)
    if schedule == "cosine":
        rates: list[Any] = [get_cosine_schedule_with_warmup(o, 3, 12) for o in each]
    else:
        rates = [get_wsd_schedule(o, 3, 6, 12, decay_type="linear") for o in each]
    own = torch.Generator().manual_seed(0)
    order = iter([part for _ in range(3) for part in torch.randperm(40, generator=own).split(8)])
    losses = []
    for _ in range(12):
        batch = next(order)
        loss = F.mse_loss(plain(X[batch]), Y[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for step in (*each, *rates):
            step.step()
        for o in each:
            o.zero_grad()
        losses.append(loss.item())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert [row["step"] for row in rows] == [5, 10, 12]
    want = [sum(losses[a:b]) / (b - a) for a, b in ((0, 5), (5, 10), (10, 12))]
    assert [row["loss"] for row in rows] == pytest.approx(want, rel=1e-6)
    assert rows[-1]["at"] == pytest.approx((10 + 11) / 24)


def test_parts_add_up() -> None:
    """Two halves of a batch, each a graph of its own, are the batch."""
    models = [net().eval(), net().eval()]

    def whole(batch: Tensor, at: At) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(models[0](X[batch]), Y[batch])}

    def halves(batch: Tensor, at: At) -> Iterator[dict[str, Tensor]]:
        for half in batch.split(4):
            yield {"loss": F.mse_loss(models[1](X[half]), Y[half]) / 2}

    found = [
        Loop(6, every=2).run(model, optimizers(model), shuffled(40, 8), loss)
        for model, loss in zip(models, (whole, halves), strict=True)
    ]
    torch.testing.assert_close(*(list(m.parameters()) for m in models))
    assert [r["loss"] for r in found[0]] == pytest.approx([r["loss"] for r in found[1]], rel=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 5, 8, 13])
def test_a_killed_run_goes_on_to_the_bit(at: int, tmp_path: Path) -> None:
    loop, whole = Loop(14, every=4, save=5), net()
    want = learn(whole, loop, folder=Folder(tmp_path / "whole", Recipe(), quiet))

    def kill(now: At) -> None:
        if now.step == at:
            raise Killed

    with pytest.raises(Killed):
        learn(net(), loop, kill, folder=Folder(tmp_path, Recipe(), quiet))
    again, steps = net(), list[int]()
    rows = learn(again, loop, lambda now: steps.append(now.step), folder=Folder(tmp_path, Recipe(), quiet))
    assert steps == list(range(at // 5 * 5, 14)), "it goes on from the last state"
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in want]
    assert [p.name for p in (tmp_path / "state" / "1").glob("step-*")] == ["step-14"]


def test_a_run_of_another_recipe_begins_anew(tmp_path: Path) -> None:
    def steps(recipe: Recipe) -> list[int]:
        found: list[int] = []
        folder = Folder(tmp_path, recipe, quiet)
        learn(net(), Loop(6, every=2), lambda now: found.append(now.step), folder=folder)
        return found

    assert len(steps(Recipe())) == 6
    assert len(steps(Recipe(lr=0.5))) == 6
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert steps(Recipe(lr=0.5)) == [], "and what was finished stays so"
    assert len(steps(Recipe())) == 6


def test_each_loop_of_a_run_has_its_own_states(tmp_path: Path) -> None:
    def run(kill: bool) -> list[int]:
        found: list[int] = []

        def after(now: At) -> None:
            found.append(now.step)
            if kill and len(found) == 9:
                raise Killed

        folder, model = Folder(tmp_path, Recipe(), quiet), net()
        for _ in range(2):
            learn(model, Loop(6, save=2), after, folder=folder)
        return found

    with pytest.raises(Killed):
        run(True)
    assert run(False) == [2, 3, 4, 5]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_weights(tmp_path: Path) -> None:
    good, model = net(), net()

    def copy_at(now: At) -> None:
        if now.step == 3:
            good.load_state_dict(model.state_dict())

    said = r"step 5 of 9: the loss is not finite \(loss nan, at 0\.4444\)\. .* step 4, kept in .*state.1; take a"
    with pytest.raises(Diverged, match=said):
        learn(model, Loop(9), copy_at, wrong=4, folder=Folder(tmp_path, Recipe(), quiet))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), good.parameters(), strict=True))
    assert (tmp_path / "state" / "1" / "now").read_text() == "step-4"


def test_a_gradient_that_is_no_number_stops_too() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.zero_()

    def loss(batch: Tensor, at: At) -> dict[str, Tensor]:
        return {"loss": model.weight.square().sum().sqrt()}

    before = model.weight.clone()
    with pytest.raises(Diverged, match="step 1 of 3: the gradient is not finite"):
        Loop(3).run(model, [torch.optim.SGD(model.parameters(), lr=1.0)], shuffled(4, 2), loss)
    assert torch.equal(model.weight, before)


def test_held_out_loss_ends_a_run_with_the_best_weights() -> None:
    model, seen, kept = net(), list[float](), dict[float, Any]()
    said = iter([3.0, 1.0, 2.0, 1.5, 0.5])

    def held() -> float:
        seen.append(next(said))
        kept[seen[-1]] = {k: v.clone() for k, v in model.state_dict().items()}
        return seen[-1]

    rows = learn(model, Loop(100, every=2, check=2, patience=2), held=held)
    assert seen == [3.0, 1.0, 2.0, 1.5]
    assert rows[-1]["step"] == 8
    assert all(torch.equal(v, kept[1.0][k]) for k, v in model.state_dict().items())
    learn(net(), Loop(4, check=2), held=held)
    assert len(seen) == 4, "nobody is asked without patience"


def test_batches_that_end_are_said() -> None:
    model = net()
    with pytest.raises(ValueError, match="the batches came to an end before the run did"):
        Loop(3).run(model, optimizers(model), [torch.arange(4)], lambda b, at: {"loss": model(X[b]).sum()})


def test_rows_lines_and_report(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "log.jsonl").write_text("old\n")
    for _ in range(2):
        folder = Folder(tmp_path, Recipe(), said.append, every=2)
        for step in (1.0, 2.0, 3.0):
            folder.add({"step": step, "loss": 0.5})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 1, 2, 3], "a run that goes on adds to it"
    assert said == ["step 1  loss 0.5", "step 3  loss 0.5"] * 2
    folder.finish(Recipe(lr=3), lines=[])
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept == {"recipe": {"seed": 0, "lr": 0.02}, "report": {"seed": 0, "lr": 3, "lines": []}}
    assert not (tmp_path / "state").exists()


def test_what_only_some_batches_tell_is_a_mean_over_these() -> None:
    model = net()

    def loss(batch: Tensor, at: At) -> dict[str, Any]:
        return {"loss": model(X[batch]).sum()} | ({"odd": at.step} if at.step % 2 else {})

    (row,) = Loop(4, every=4).run(model, optimizers(model), shuffled(40, 8), loss)
    assert row["odd"] == 2
