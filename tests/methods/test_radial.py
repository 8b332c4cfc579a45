"""Radial: a mask around the centre."""

import pytest
import torch

import fewer
from fewer.core import Capacity
from vit import images, run, signals, tiny_vit


def picture(count, norm, side=6):
    seen = signals(torch.zeros(1, side * side + 1, 1), grid=(side, side))
    out = torch.zeros(side * side, dtype=torch.int)
    out[fewer.Radial(Capacity(count), norm=norm).plan(seen, seen.tokens).anchor[0, 1:] - 1] = 1
    return out.view(side, side)


@pytest.mark.parametrize(("norm", "count"), [("l1", 12), ("l2", 12), ("linf", 16), ("l2", 4)])
def test_whole_rings_are_symmetric(norm, count):
    mask = picture(count, norm)
    assert mask.sum() == count
    for flipped in (mask.flip(0), mask.flip(1), mask.T):
        assert torch.equal(mask, flipped)


def test_the_norms_differ():
    assert picture(16, "linf")[1:5, 1:5].sum() == 16
    diamond = picture(12, "l1")
    assert diamond[1].tolist() == [0, 0, 1, 1, 0, 0]
    assert diamond[2].tolist() == [0, 1, 1, 1, 1, 0]


def test_ties_go_to_the_earlier_patch():
    assert picture(2, "l2")[2].tolist() == [0, 0, 1, 1, 0, 0]


def test_in_a_model():
    model = tiny_vit("vit")
    with fewer.apply(model, "radial:keep=0.25,layers=1") as session:
        run(model, images())
        assert session.kept(3).tolist() == [[0, 6, 7, 10, 11]] * 2
    with pytest.raises(ValueError, match="choose l1, l2 or linf"):
        fewer.Radial(norm="l3")
