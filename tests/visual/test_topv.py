"""TopV and its transport on cases computed by hand: no code is public."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import fewer
from cases import normal
from fewer.core import Capacity, KeepRatio, Place, PlanError, SignalError
from fewer.core.transport import sinkhorn
from fewer.methods.multimodal.topv import TopV, evenly
from fewer.testing.vision_language import prompts, tiny_vlm
from insides import alone, inside, kept, with_visual


# -- transport --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("blur", [0.05, 0.1, 1.0])
def test_rows_and_columns_carry_their_masses(blur):
    cost = normal(0, 2, 20, 30).sigmoid()
    source, target = normal(1, 2, 20).softmax(-1), normal(2, 2, 30).softmax(-1)
    plan = sinkhorn(cost, source, target, blur=blur, iterations=100)
    assert_close(plan.sum(-1), source, atol=1e-6, rtol=1e-4)
    assert_close(plan.sum(-2), target, atol=1e-6, rtol=1e-2 if blur < 0.1 else 1e-4)


def test_with_little_blur_it_is_the_cheapest_assignment():
    cost = torch.tensor([[[0.1, 0.9, 0.8], [0.2, 0.3, 0.9], [0.4, 0.9, 0.35]]])
    third = torch.full((1, 3), 1 / 3)
    assert_close(sinkhorn(cost, third, third, blur=0.01, iterations=200)[0], torch.eye(3) / 3, atol=1e-3, rtol=0)


def test_with_much_blur_everything_goes_everywhere():
    even = torch.full((1, 4), 0.25)
    assert_close(sinkhorn(normal(3, 1, 4, 4), even, even, blur=1e6), torch.full((1, 4, 4), 1 / 16))


def test_places_without_mass_take_no_part():
    cost = normal(4, 2, 5, 5).sigmoid()
    mass = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 0, 0, 0]])
    plan = sinkhorn(cost, mass, mass)
    assert_close(plan[0, :3, :3], sinkhorn(cost[:1, :3, :3], mass[:1, :3], mass[:1, :3])[0])
    assert plan[0, 3:].sum() == plan[0, :, 3:].sum() == plan[1].sum() == 0


def test_what_transport_refuses():
    with pytest.raises(ValueError, match="blur=0"):
        sinkhorn(torch.zeros(1, 2, 2), torch.ones(1, 2), torch.ones(1, 2), blur=0)


# -- who comes back ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("total", "number"), [(12, 3), (12, 5), (7, 7), (40, 1), (9, 0), (100, 33)])
def test_those_that_come_back_are_evenly_spaced(total, number):
    among = torch.ones(1, 2 * total, dtype=torch.bool)
    among[:, 1::2] = False
    hit = evenly(among, torch.tensor([number]))[0]
    assert hit.sum() == number
    assert not hit[1::2].any()
    places = hit[::2].nonzero()[:, 0]
    if number > 1:
        assert places.diff().max() - places.diff().min() <= 1
        ends = places[0] + (total - 1 - places[-1])
        assert ends <= places.diff().max()


# -- the method -------------------------------------------------------------------------------------------------------
def grid(signals, wide=4):
    cell = signals.visual.view.index - 3
    return with_visual(signals, view=replace(signals.visual.view, row=cell // wide, column=cell % wide))


def twice(method, signals, tokens, entered=None):
    """Both acts of one pass: in front of the block all stay, behind it the choice."""
    rows = normal(7, 1, 64, signals.hidden.shape[-1])[:, : tokens.n] if entered is None else entered
    places = [replace(signals.at, layer=method.layer - 1 + i, stage=i, stages=2) for i in range(2)]
    first = replace(signals, hidden=signals.hidden + rows, at=places[0])
    assert method.plan(first, tokens).m == tokens.n
    return method.plan(replace(signals, at=places[1], memory=first.memory), tokens)


def importance(method, x, y, row, column):
    """Of one image, in doubles: the definition, transport included."""
    n, high, wide = len(x), row.max().item(), column.max().item()
    diagonal = (high**2 + wide**2) ** 0.5
    feature = (1 - torch.nn.functional.cosine_similarity(x[:, None].double(), y[None].double(), dim=-1)) / 2
    place = torch.stack([row, column], -1).double()
    apart = torch.cdist(place, place) / diagonal
    centre = torch.tensor([high / 2, wide / 2]).double()
    off = (place - centre).norm(dim=-1) / (diagonal / 2)
    cost = method.feature * feature + method.distance * apart + method.centre * off[:, None]
    cost = cost / (method.feature + method.distance + method.centre)
    u = torch.ones(n).double()
    kernel = (-cost / method.blur).exp()
    for _ in range(method.iterations):
        v = (1 / n) / (kernel.T @ u)
        u = (1 / n) / (kernel @ v)
    plan = u[:, None] * kernel * v
    return (plan * (cost.max() - cost)).sum(-1)


def test_the_importance_is_the_cost_saved():
    signals, tokens = inside()
    signals = grid(signals)
    entered = signals.hidden + normal(7, 1, 12, 8)
    method = TopV(Capacity(5), recover=0)
    plan = twice(method, signals, tokens)
    row, column = signals.visual.view.row[0], signals.visual.view.column[0]
    for line in range(2):
        weigh = importance(method, entered[line], signals.hidden[line], row, column)
        assert weigh.max() > 1.02 * weigh.min()
        assert kept(plan, line) == sorted(weigh.topk(5).indices.tolist())


def test_a_part_comes_back_evenly():
    signals, tokens = inside()
    signals = grid(signals)
    best = kept(twice(TopV(Capacity(3), recover=0), signals, tokens))
    plan = twice(TopV(Capacity(5), recover=0.4), signals, tokens)
    assert plan.m == 5
    assert set(best) < set(kept(plan))
    lost = [i for i in range(12) if i not in best]
    assert [lost.index(i) for i in kept(plan) if i not in best] == [2, 6]


def test_equal_tokens_in_equal_cells_tie():
    signals, tokens = inside()
    signals.hidden[:] = 1.0
    view = signals.visual.view
    signals = with_visual(signals, view=replace(view, row=view.row * 0 + 2, column=view.column * 0 + 1))
    plan = twice(TopV(Capacity(4), recover=0), signals, tokens, torch.ones(1, 12, 8))
    assert kept(plan) == [0, 1, 2, 3]


def test_the_centre_stays_where_only_it_counts():
    signals, tokens = inside((15,))
    plan = twice(TopV(Capacity(1), recover=0, feature=0, distance=0, centre=1), grid(signals, 5), tokens)
    assert kept(plan) == [7]


def test_tiles_have_centres_of_their_own():
    signals, tokens = inside((18,))
    cell = signals.visual.view.index - 3
    view = replace(signals.visual.view, tile=cell // 9, row=cell % 9 // 3, column=cell % 3)
    signals = with_visual(signals, view=view)
    plan = twice(TopV(Capacity(2), recover=0, feature=0, distance=0, centre=1), signals, tokens)
    assert kept(plan) == [4, 13]


@pytest.mark.parametrize("method", [TopV(Capacity(5)), TopV(KeepRatio(0.5), recover=0.5), TopV(Capacity(12))])
def test_padding_and_other_images_change_nothing(method):
    lengths = (12, 5, 1)
    signals, tokens = inside(lengths)
    plan = twice(method, grid(signals), tokens)
    for line in range(3):
        own, mine = alone(lengths, line)
        assert kept(plan, line) == kept(twice(method, grid(own), mine))


def test_what_is_refused():
    for form, message in (
        ("layer=0", "a block in front"), ("recover=1.5", r"outside \[0, 1\]"), ("blur=0", "blur=0"),
        ("feature=0,distance=0,centre=0", "one of them above"), ("iterations=0", "iterations=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fewer.parse(f"topv:{form}")
    signals, tokens = inside()
    first = replace(signals, at=Place(1, stage=0, stages=2))
    TopV(Capacity(3)).plan(first, tokens)
    late, less = inside((9,))
    with pytest.raises(PlanError, match="12 visual tokens entered block 2 and 9 left it"):
        TopV(Capacity(3)).plan(replace(late, at=Place(2, stage=1, stages=2), memory=first.memory), less)
    with pytest.raises(SignalError, match="vision-language models only"):
        twice(TopV(Capacity(3)), replace(signals, beside=None), tokens)


def test_in_a_model():
    model = tiny_vlm("llava")
    inputs = prompts(model, [1, 2])
    plain = model(**inputs).logits
    with fewer.apply(model, "topv:tokens=6,layer=1") as session, torch.no_grad():
        model(**inputs)
        assert [session.seen(layer).sum(-1).tolist() for layer in (0, 1, 2)] == [[16, 32], [6, 12], [6, 12]]
    with fewer.apply(model, "topv:tokens=16,layer=1"):
        assert torch.equal(model(**inputs).logits, plain)
