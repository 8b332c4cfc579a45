"""BRAVE: as many rows whatever is read, and what the queries see."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import PlanError
from fewer.methods.multimodal.brave import MEQFormer
from projecting import influence, made, picture, ragged

SMALL = "brave:tokens=6,depth=2,heads=2,fine_width=8,fine_depth=1,pixels=4"


@pytest.mark.parametrize("encoders", [0, 1, 3])
def test_the_count_does_not_depend_on_the_encoders(encoders):
    signals, shape = picture(grid=(4, 4), tiles=2)
    plan, rows = made(fewer.parse(f"{SMALL},encoders={encoders}"), signals, shape)
    assert rows.shape == (2, 6, shape.width)
    assert plan.anchor[0].tolist() == [2, 8, 13, 18, 24, 29]


def former(drop=0.0, words=0):
    return MEQFormer([4, 6, 8], 12, 10, 5, 2, 3, words, drop)


def features(lines=2):
    return [torch.randn(lines, n, c) for n, c in ((7, 4), (3, 6), (5, 8))]


def test_one_missing_encoder_is_as_one_that_nobody_sees():
    model, given = former(), features()
    short = model([given[0], None, given[2]], 5)
    assert short.shape == (2, 5, 10)
    hidden = [None, torch.zeros(2, 3, dtype=torch.bool), None]
    assert_close(model(given, 5, seen=hidden), short)
    assert not torch.allclose(model(given, 5), short)


def test_dropping_encoders_happens_in_training_only_line_by_line_and_never_all():
    model, given = former(drop=0.5), features(lines=64)
    assert torch.equal(model(given, 5), model(given, 5))
    for x in given:
        x.requires_grad_(True)
    made = model(given, 5, dropping=True)
    made.sum().backward()
    assert made.isfinite().all()
    used = torch.stack([x.grad.abs().sum((1, 2)) > 0 for x in given], 1)
    assert used.any(1).all()
    assert 0.3 < used[:, 1:].float().mean() < 0.7
    assert len({tuple(line) for line in used.tolist()}) > 3


def test_every_query_sees_everything():
    signals, shape = picture(lines=1, grid=(4, 4))
    features = signals.visual.tower.features.requires_grad_(True)
    _, rows = made(fewer.parse(SMALL), signals, shape)
    for row in rows[0]:
        assert influence(row, features).gt(0).all()


def test_the_question_changes_the_rows_unless_it_is_not_read():
    for text in ("true", "false"):
        signals, shape = picture(grid=(4, 4))
        method = fewer.parse(f"{SMALL},text={text}")
        plan, rows = made(method, signals, shape)
        signals.visual.hidden[0, -1] += 1
        other = method.rows(signals, plan)
        assert torch.equal(rows[1], other[1])
        assert torch.equal(rows[0], other[0]) == (text == "false")


def test_padding_and_neighbours_change_nothing():
    signals, shape = picture(lines=2, grid=(4, 4))
    method = fewer.parse(SMALL.replace("tokens=6", "keep=0.5"))
    made(method, signals, shape)
    lines, other = (ragged(signals, [16, length]) for length in (10, 6))
    (plan, rows), (_, changed) = made(method, lines, shape), made(method, other, shape)
    assert plan.lengths.tolist() == [8, 5]
    assert_close(rows[0], changed[0])
    signals.visual.tower.features[16 + 10 :] = 1e3
    assert_close(made(method, lines, shape)[1][1, :5], rows[1, :5])
    former = signals.module("former")
    view, tower = lines.visual.view, lines.visual.tower
    words = lines.visual.wording()
    alone = former(
        [tower.features[view.source[1:, :10]], signals.module("encoders")[0](tower)[:, 0][view.source[1:, :10]]],
        5, words=(words[0][1:], words[1][1:]),
    )  # fmt: skip
    assert_close(rows[1, :5], alone[0])


def test_learning_and_limits():
    signals, shape = picture(grid=(4, 4))
    method = fewer.parse(SMALL)
    _, rows = made(method, signals, shape)
    rows.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in signals.modules.parameters())
    with pytest.raises(PlanError, match="has 6 learned queries, 7 are wanted"):
        made(fewer.parse(SMALL, tokens=7), signals, shape)
    for wrong in ("depth=0", "drop=1.0", "encoders=-1"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            fewer.parse(f"brave:{wrong}")
