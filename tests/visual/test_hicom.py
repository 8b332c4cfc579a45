"""HICom: blocks read for a question, and summaries of the whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import fewer
from clips import clip, made, with_features, with_words
from fewer.core import BudgetError, SignalError
from fewer.methods.multimodal.hicom import HICom, anchors

SMALL = dict(group=(2, 2, 2), queries=3)


@pytest.mark.parametrize(
    ("frames", "height", "width", "blocks"),
    [(4, 6, 6, 1 * 2 * 2), (5, 6, 7, 2 * 2 * 3), (9, 3, 4, 3 * 1 * 2), (1, 6, 6, 4)],
)
def test_blocks_are_counted_upwards(frames: int, height: int, width: int, blocks: int):
    method = HICom(queries=4)
    signals = clip(frames, height, width, method=method)
    plan = method.plan(signals, signals.tokens)
    assert plan.m == blocks + 4
    assert (plan.position.diff(dim=-1) > 0).all()
    assert method.rows(signals, plan).shape == (2, blocks + 4, 8)


def test_the_paper_counts():
    assert math.prod(HICom().cut((32, 24, 24))) == 8 * 8 * 8
    assert len(anchors((32, 24, 24), (8, 8, 8), 32)[0]) == 512 + 32


@pytest.mark.parametrize("kind", ["coarse", "fine"])
def test_with_gates_at_zero_the_words_say_nothing_and_behind_them_they_do(kind: str):
    method = HICom(**SMALL, local=kind, globally=kind)
    signals = clip(2, method=method)
    assert torch.equal(made(method, signals), made(method, with_words(signals, 9)))
    plain = HICom(**SMALL, local="none", globally="none")
    shared = {k: v for k, v in signals.modules.state_dict().items() if "guide" not in k}
    other = clip(2, method=plain)
    other.modules.load_state_dict(shared)
    assert_close(made(plain, other), made(method, signals))
    for name, parameter in signals.modules.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.5)
    assert (made(method, signals) - made(method, with_words(signals, 9))).abs().amax(-1).gt(1e-5).all()


def test_gates_learn_from_zero():
    method = HICom(**SMALL, local="fine")
    signals = clip(2, method=method)
    made(method, signals).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in signals.modules.named_parameters() if n.endswith("gate"))


def test_a_block_of_equal_features_gives_them_back_and_reads_no_other():
    method = HICom(group=(2, 2, 2), queries=0)
    signals = clip(2, method=method)
    x = signals.visual.features.clone().unflatten(1, (2, 4, 4))
    x[:, :, :2, :2] = x[:, :1, :1, :1]
    flat = x.flatten(1, 3).requires_grad_()
    rows = made(method, with_features(signals, flat))
    assert_close(rows[:, 0], signals.modules["leave"](x[:, 0, 0, 0]))
    rows[:, 3].sum().backward()
    touched = flat.grad.abs().sum(-1).unflatten(1, (2, 4, 4)) > 0
    assert touched[:, :, 2:, 2:].all()
    assert touched.sum() == 2 * 8


def test_blocks_that_do_not_divide_against_a_loop():
    method = HICom(group=(2, 3, 3), queries=0, local="none")
    signals = clip(3, 4, 5, method=method)
    rows = made(method, signals)
    x = signals.visual.features[0].view(3, 4, 5, 12)
    volume = x.permute(3, 0, 1, 2)[None]
    asked = torch.nn.functional.interpolate(volume, (2, 2, 2), mode="trilinear")[0].permute(1, 2, 3, 0)
    seen = []
    for i, t in enumerate((slice(0, 2), slice(1, 3))):
        for j, h in enumerate((slice(0, 2), slice(2, 4))):
            for k, w in enumerate((slice(0, 3), slice(2, 5))):
                members = x[t, h, w].reshape(-1, 12)
                seen.append(((members @ asked[i, j, k]) / 12**0.5).softmax(0) @ members)
    assert_close(rows[0], signals.modules["leave"](torch.stack(seen)))


def test_direct_asks_in_the_joint_space():
    method = HICom(group=(1, 2, 2), queries=0, local="direct")
    signals = clip(1, method=method)
    with pytest.raises(SignalError, match="local=coarse"):
        made(method, signals)
    joint = torch.zeros(2, 16, 6)
    joint[:, [0, 2, 8, 10], 0] = 500.0  # in each block the first cell is what the question is about
    signals.beside.guide = (joint, torch.eye(6)[None, :1].expand(2, 1, 6))
    expected = signals.modules["leave"](signals.visual.features[:, [0, 2, 8, 10]])
    assert_close(made(method, signals), expected)


def test_rows_stand_where_their_anchors_say():
    """Moving a summary's query moves its row only; the row order follows the anchors."""
    method = HICom(**SMALL)
    signals = clip(2, method=method)
    before = made(method, signals)
    places, order = anchors((2, 4, 4), (1, 2, 2), 3)
    assert places == sorted(places)
    signals.modules["summaries"].queries.data[1] += 1
    changed = (made(method, signals) - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [i == 4 + 1 for i in order]


def test_a_line_does_not_depend_on_its_batch_and_half_precision_stays():
    method = HICom(**SMALL, local="fine")
    signals = clip(2, method=method)
    both = made(method, signals)
    alone = clip(2, lines=1, method=method)
    alone = with_features(alone, signals.visual.features[:1])
    alone.beside.hidden = signals.visual.hidden[:1]
    assert_close(made(method, alone)[0], both[0])
    signals.beside.hidden, signals.modules = signals.visual.hidden.bfloat16(), signals.modules.bfloat16()
    assert made(method, with_features(signals, signals.visual.features.bfloat16())).dtype == torch.bfloat16


def test_what_cannot_be():
    signals = clip(1, 3, 3)
    with pytest.raises(BudgetError, match="more than there are"):
        HICom().plan(signals, signals.tokens)
    with pytest.raises(BudgetError, match="asks for 5"):
        fewer.parse("hicom:queries=2,tokens=5").plan(signals, signals.tokens)
    with pytest.raises(ValueError, match="frames, rows and columns"):
        HICom(group=(4, 3))
    with pytest.raises(ValueError, match="direct only locally"):
        HICom(globally="direct")
    ragged = clip((1, 2))
    with pytest.raises(SignalError, match="different length"):
        HICom(**SMALL).plan(ragged, ragged.tokens)
