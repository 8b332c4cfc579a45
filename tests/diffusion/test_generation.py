"""The small picture generator: its recipe, its sampler, and what is measured of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import fewer
from cases import normal
from fewer.datasets.images import ImageSet, embedded
from fewer.evaluation import generation
from fewer.evaluation.generation import best_at_cost, frechet, kernel
from fewer.evaluation.record import Row
from fewer.models.sampler import Sampler
from fewer.models.zoo import load_model
from fewer.recipes import diffuse

pytest.importorskip("diffusers")
TINY = diffuse.Recipe(steps=3, batch=4, width=32, depth=2, heads=2, patch=8, bfloat16=False)


def tiny() -> Sampler:
    torch.manual_seed(0)
    model = diffuse.build(TINY, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return Sampler(model.eval())


# -- distances ---------------------------------------------------------------------------------------------------------
def test_frechet_distance_of_normals_is_the_closed_form() -> None:
    a, b = normal(0, 20_000, 3), normal(1, 20_000, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([1.0, 0, 0])
    want = 1.0 + 1.0 + 0.25  # the gap of the means, and (1 - 2)^2, (1 - 1/2)^2 of the deviations
    assert frechet(a, b) == pytest.approx(want, rel=0.05)
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6)


def test_kernel_distance_is_the_mean_over_pairs() -> None:
    a, b = normal(0, 5, 2).double(), normal(1, 6, 2).double()

    def k(x: Any, y: Any) -> float:
        return float((x @ y / 2 + 1) ** 3)

    def mean(x: Any, y: Any, same: bool) -> float:
        pairs = [k(u, v) for i, u in enumerate(x) for j, v in enumerate(y) if not (same and i == j)]
        return sum(pairs) / len(pairs)

    want = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert kernel(a, b) == pytest.approx(want, rel=1e-9)


# -- the sampler -------------------------------------------------------------------------------------------------------
def test_a_path_is_eulers() -> None:
    sampler, labels = tiny(), torch.tensor([1, 4])
    noise = normal(3, 2, 1, 32, 32)
    got, x = sampler(labels, 4, noise=noise), noise
    with torch.no_grad():
        for step in range(4):
            sigma, after = float(sampler.scheduler.sigmas[step]), float(sampler.scheduler.sigmas[step + 1])
            said = sampler.model(x, timestep=torch.full((2,), 1000 * sigma), class_labels=labels).sample
            x = x + (after - sigma) * said
    assert_close(got, x, atol=1e-5, rtol=1e-4)


def test_guidance_moves_away_from_what_no_class_would_give() -> None:
    plain, guided = tiny(), tiny()
    guided.guidance = 3.0
    labels, noise = torch.tensor([2]), normal(0, 1, 1, 32, 32)
    with torch.no_grad():
        with_ = plain(labels, 1, noise=noise)
        x = guided.model(noise, timestep=torch.tensor([1000.0]), class_labels=torch.tensor([10])).sample
        without = noise - x
    assert_close(guided(labels, 1, noise=noise), without + 3 * (with_ - without), atol=1e-4, rtol=1e-4)


def test_a_sampler_that_asks_twice_a_step_gives_its_method_two_evaluations_each() -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    sampler = tiny()
    sampler.scheduler = FlowMatchHeunDiscreteScheduler()
    labels = torch.tensor([0, 1])
    plain = sampler(labels, 4)
    with fewer.apply(sampler, "fora:every=1") as session:
        assert torch.equal(sampler(labels, 4), plain)
        assert session.ledger.computed == (7, 7)
    with fewer.apply(sampler, "fora:every=2") as session:
        reused = sampler(labels, 4)
        assert session.ledger.computed == (4, 7)
        assert torch.equal(sampler(labels, 4), reused)
        sampler(labels, 6)
        assert session.ledger.computed == (6, 11), "another number of steps"
    assert torch.equal(sampler(labels, 4), plain)


def test_guided_pictures_do_not_depend_on_who_stands_beside_them() -> None:
    sampler = tiny()
    sampler.guidance = 2.0
    labels, noise = torch.tensor([1, 2, 3]), sampler.noise(3, 0)
    for form in ("tomesd:sx=2,sy=2", "toca:every=3,ratio=0.3"):
        with fewer.apply(sampler, form):
            together = sampler(labels, 4, noise=noise)
            for i in range(3):
                assert_close(sampler(labels[i : i + 1], 4, noise=noise[i : i + 1]), together[i : i + 1],
                             atol=1e-4, rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize(("labels", "steps"), [([11], 3), ([-1], 3), ([1], 0)])
def test_a_sampler_refuses_what_it_does_not_know(labels: list[int], steps: int) -> None:
    with pytest.raises(ValueError, match=r"steps=0|labels lie in"):
        tiny()(torch.tensor(labels), steps)


# -- the recipe --------------------------------------------------------------------------------------------------------
def test_tokens_shown_alone_are_those_of_the_whole() -> None:
    """What the recipe trains is the model that diffusers runs."""
    sampler = tiny()
    x, time, labels = normal(0, 2, 1, 32, 32), torch.tensor([300.0, 700.0]), torch.tensor([0, 10])
    with torch.no_grad():
        whole = sampler.model(x, timestep=time, class_labels=labels).sample
        said = diffuse.velocity(sampler.model, x, time, labels)
        every = torch.arange(16).expand(2, -1)
        assert_close(diffuse.patches(whole, 8), said, atol=1e-5, rtol=1e-4)
        assert_close(diffuse.velocity(sampler.model, x, time, labels, every), said)


def test_the_recipe_leaves_a_model_that_loads(tmp_path: Path) -> None:
    data = ImageSet("toy", torch.arange(20) % 10, tuple("abcdefghij"), np.zeros((20, 28, 28), np.uint8) + 90)
    report = diffuse.train(tmp_path, recipe=TINY, data=data, log=lambda line: None)
    model, sampler = load_model(tmp_path)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert math.isfinite(report.loss)
    assert sampler(torch.tensor([0]), 2).shape == (1, 1, 32, 32)
    with pytest.raises(ValueError, match="shares of the steps must add up to 1"):
        replace(TINY, phases=((0.5, 1.0),))
    with pytest.raises(ValueError, match="takes 28 x 28 grey ones"):
        diffuse.pictures(replace(data, pictures=np.zeros((20, 8, 8), np.uint8)))


def test_the_packaged_generator_draws_what_it_is_asked_for() -> None:
    model, sampler = load_model("dit-fashion")
    assert sum(p.numel() for p in model.parameters()) < 2e6
    labels = torch.arange(20) % 10
    settings = generation.Settings(limit=20, steps=6)
    subject = generation.load(settings, (model, sampler))
    scores, _ = subject.judged(sampler(labels, 6))
    assert int((scores.argmax(-1) == labels).sum()) >= 8, "two by chance"


# -- the benchmark -----------------------------------------------------------------------------------------------------
def test_rows_of_a_benchmark(tmp_path: Path) -> None:
    settings = generation.Settings(
        limit=20, steps=4, batch=10, repeats=1, methods=("tomesd:ratio=0.5", "fora:every=2", "tome")
    )
    subject = generation.load(settings, (tiny().model, tiny()))
    subject.real = subject.real[:40]
    rows = {row.method: row for row in generation.run(settings, tmp_path, subject=subject)}
    assert list(rows) == ["unreduced", "3 steps", "2 steps", "1 steps", "tomesd", "fora:every=2", "tome"]
    full, half, fora = rows["unreduced"], rows["2 steps"], rows["fora:every=2"]
    assert full.drawn is not None
    assert full.drawn.moved == 0
    assert half.cost.gflops == pytest.approx(full.cost.gflops / 2)
    assert half.cost.ceiling == pytest.approx(2)
    assert fora.cost.gflops == pytest.approx(full.cost.gflops / 2)
    assert rows["tomesd"].cost.ceiling > 1
    assert "shortens the sequence" in rows["tome"].error
    assert all(r.error or (r.accuracy and r.drawn and r.speedup) for r in rows.values())
    assert "real pictures each lie" in full.passport.notes[1]
    said = best_at_cost(list(rows.values()))
    assert len(said) == 2
    again = Row.of(json.loads((tmp_path / "results.jsonl").read_text().splitlines()[1]))
    assert again.drawn == rows["3 steps"].drawn


def test_embedded_pictures_are_enlarged_within_their_range() -> None:
    x = diffuse.pictures(embedded().take(range(5)))
    assert x.shape == (5, 1, 32, 32)
    assert -1 <= float(x.min()) < float(x.max()) <= 1
