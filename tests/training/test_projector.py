"""The recipe of projectors: what learns, what stays, what is measured and saved."""

import json

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.datasets.scenes import Batch
from fewer.recipes.projector import Projecting, train, with_answers
from fewer.testing.vision_language import tiny_vlm


def examples(count=2, size=4, seed=0):
    """Prompts whose answer says how bright the image is: nothing but the image tells."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        light = torch.randint(0, 2, (size,), generator=g)
        pixels = torch.randn(size, 3, 32, 32, generator=g) * 0.2 + (2.0 * light - 1)[:, None, None, None]
        ids = torch.tensor([1] + [60] * 16 + [5, 6]).repeat(size, 1)
        asked = Batch(ids, torch.ones_like(ids), pixels, 10 + light, torch.zeros(size, 16), torch.arange(size))
        made.append(with_answers(asked))
    return made


def quiet(_):
    return None


@pytest.mark.parametrize("method", ["tokenpacker:tokens=4", "brave:tokens=2,depth=1,fine_depth=1,fine_width=8"])
def test_modules_learn_to_tell_and_the_model_stays(method, tmp_path):
    model = tiny_vlm("llava")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Projecting(method, steps=25, lr=3e-3)
    report = train(recipe, model, examples(4, 8), tmp_path, test=examples(2, 8, seed=1), log=quiet)
    count = method.partition("tokens=")[2][0]
    assert report.accuracy[f"trained@{count}"] == 1.0
    assert report.loss[f"trained@{count}"] < 0.5 * report.loss[f"untrained@{count}"]
    assert report.rows[f"trained@{count}"] == float(count)
    assert {"unreduced", f"pooled@{count}"} < set(report.accuracy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    assert len(report.lines) == 25
    card = json.loads((tmp_path / f"{method.split(':')[0]}.json").read_text())
    assert card["recipe"]["steps"] == 25
    assert card["report"]["accuracy"] == report.accuracy
    with fewer.apply(model, method, modules=tmp_path), torch.no_grad():
        given = examples(1, 8, seed=1)[0]
        ids = given["input_ids"][:, :-1]
        logits = model(input_ids=ids, pixel_values=given["pixel_values"]).logits[:, -1]
    assert torch.equal(logits.argmax(-1), given["labels"][:, -1])


def test_m3_trains_the_model_on_all_scales_at_once(tmp_path):
    model = tiny_vlm("llava")
    tower = {n: p.clone() for n, p in model.named_parameters() if "vision_tower" in n}
    recipe = Projecting("m3", steps=6, lr=2e-3, projector=1.0, language=0.5)
    report = train(recipe, model, examples(3, 6), tmp_path, test=examples(1, 6, seed=1), log=quiet)
    assert set(report.lines[0]) == {
        "step",
        "seconds",
        "loss",
        *(f"loss@{s}" for s in ("100%", "25%", "6.25%", "1.5625%", "1")),
    }
    assert [report.rows[f"trained@{s}"] for s in ("100%", "25%", "6.25%")] == [16.0, 4.0, 1.0]
    assert report.loss["trained@25%"] < report.loss["pooled@25%"]
    assert all(torch.equal(p, tower[n]) for n, p in model.named_parameters() if n in tower)
    again = type(model).from_pretrained(tmp_path)
    assert_close(again.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="m3 has no modules of its own, so nothing would learn"):
        train(Projecting("m3"), model, examples(1), tmp_path, log=quiet)


def test_the_loss_of_several_scales_is_their_mean(tmp_path):
    """One update of plain gradients: clipped sums of the scales' own, each with its share."""
    model, batches = tiny_vlm("llava"), examples(1, 4)
    one = Projecting("tokenpacker:tokens=4", steps=1, scales=(4, 1))
    report = train(one, model, batches, tmp_path, log=quiet)
    assert set(report.lines[0]) == {"step", "seconds", "loss", "loss@4", "loss@1"}
    for scale in (4, 1):
        alone = train(Projecting("tokenpacker:tokens=4", steps=1, scales=(scale,)), model, batches, tmp_path, log=quiet)
        assert alone.lines[0][f"loss@{scale}"] == pytest.approx(report.lines[0][f"loss@{scale}"], rel=1e-5)


def test_what_it_refuses(tmp_path):
    model = tiny_vlm("llava")
    with pytest.raises(ValueError, match="this recipe trains methods on visual tokens"):
        train(Projecting("sdtp"), model, examples(1), tmp_path)
    with pytest.raises(ValueError, match="the batches came to an end"):
        train(Projecting("tokenpacker:tokens=4"), model, [], tmp_path)
    with pytest.raises(ValueError, match="load the model in float32"):
        train(Projecting("tokenpacker:tokens=4"), tiny_vlm("llava").bfloat16(), examples(1), tmp_path)
    with pytest.raises(ValueError, match="a share of lr"):
        Projecting(language=2.0)


def test_answers_stand_behind_their_questions():
    given = examples(1, 3)[0]
    assert (given["labels"] != -100).sum(-1).tolist() == [1, 1, 1]
    assert torch.equal(given["labels"][:, -1], given["input_ids"][:, -1])
    assert given["attention_mask"].shape == given["input_ids"].shape


def test_a_method_that_keeps_everything_learns_too(tmp_path):
    model = tiny_vlm("llava")
    recipe = Projecting("mini_gemini:width=8,depth=1,fine=2", steps=8, lr=3e-3)
    report = train(recipe, model, examples(2, 6), tmp_path, test=examples(1, 6, seed=1), log=quiet)
    assert report.loss["untrained@100%"] == pytest.approx(report.loss["unreduced"], rel=1e-4)
    assert report.loss["trained@100%"] < report.loss["unreduced"]
    assert report.rows["trained@100%"] == 16.0
