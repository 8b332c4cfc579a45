"""FasterVLM: counts per image and per tile, by hand."""

import pytest
import torch

from fewer.core import BudgetError, Capacity, KeepRatio, Outliers
from fewer.methods.multimodal.fastervlm import FasterVLM
from towers import call, cut_view, kept, part, shown, whole_view

FIRST = torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.15, 0.1], [0.3, 0.1, 0.1, 0.2, 0.05, 0.25]])


def test_the_attended_stay_in_raster_order():
    signals, tokens = shown({2: call(FIRST)}, whole_view(2, 2, 3))
    assert kept(FasterVLM(Capacity(3)).plan(signals, tokens)) == [[1, 2, 4], [0, 3, 5]]


def test_heads_are_averaged():
    paid = torch.tensor([[[0.5, 0.3, 0.1, 0.1], [0.0 + 1e-9, 0.3, 0.5, 0.2]]])
    signals, tokens = shown({2: call(paid)}, whole_view(1, 2, 2))
    assert kept(FasterVLM(Capacity(2)).plan(signals, tokens)) == [[1, 2]]


def test_a_budget_per_tile_counts_in_each_tile():
    paid = torch.rand(1, 20) + 0.1
    paid[:, :4] += 5  # the whole view would take all
    signals, tokens = shown({2: call(paid)}, cut_view(2, (2, 2)))
    assert kept(FasterVLM(Capacity(4)).plan(signals, tokens)) == [[0, 1, 2, 3]]
    for budget, each in ((Capacity(1), 1), (KeepRatio(0.5), 2), (Capacity(9), 4)):
        rows = kept(FasterVLM(budget, per="tile").plan(signals, tokens))[0]
        assert [sum(4 * t <= i < 4 * t + 4 for i in rows) for t in range(5)] == [each] * 5
        best = [4 * t + int(paid[0, 4 * t : 4 * t + 4].argmax()) for t in range(5)]
        assert set(best) <= set(rows)


def test_frames_are_tiles_too():
    view = whole_view(1, 3, 4)
    view.__dict__["time"] = torch.arange(12)[None] // 4
    signals, tokens = shown({2: call(torch.arange(1.0, 13)[None])}, view)
    assert kept(FasterVLM(Capacity(1), per="tile").plan(signals, tokens)) == [[3, 7, 11]]


@pytest.mark.parametrize("per", ["image", "tile"])
def test_padding_changes_nothing(per):
    paid = torch.rand(2, 20) + 0.1
    signals, tokens = shown({2: call(paid)}, cut_view(2, (2, 2), r=2), lengths=[20, 13])
    method = FasterVLM(KeepRatio(0.5), per=per)
    together = kept(method.plan(signals, tokens))
    for line, length in enumerate((20, 13)):
        assert kept(method.plan(*part(signals, line, length))) == [together[line]]


def test_without_a_class_token_attention_received_ranks():
    signals, tokens = shown({2: call(FIRST)}, whole_view(2, 2, 3), cls=False)
    assert kept(FasterVLM(Capacity(3)).plan(signals, tokens)) == [[1, 2, 4], [0, 3, 5]]


def test_bad_input():
    with pytest.raises(ValueError, match="per='row'"):
        FasterVLM(per="row")
    signals, tokens = shown({2: call(FIRST)}, whole_view(2, 2, 3))
    with pytest.raises(BudgetError, match="names no count"):
        FasterVLM(Outliers(), per="tile").plan(signals, tokens)
