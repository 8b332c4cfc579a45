"""ATC against its authors' numbers, and the case where the linkages disagree."""

import math

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import Capacity, KeepRatio
from vit import Golden, grouping, images, run, signals, tiny_vit


def settings():
    golden = Golden.load("atc_vit_a")
    for library in golden.libraries():
        for setting in golden.settings:
            yield pytest.param(golden, library, setting, id=f"{library}-{setting['tag']}")


@pytest.mark.parametrize(("golden", "library", "setting"), list(settings()))
def test_golden(golden, library, setting):
    tag, model, layers = setting["tag"], golden.model(library), tuple(golden.config["reduction_loc"])
    method = fewer.ATC(
        KeepRatio(setting["keep_rate"], of="start"), layers, setting["linkage"], setting["prop_attn"], fidelity="code"
    )
    with fewer.apply(model, method) as session:
        assert_close(run(model, golden.image), golden[f"{tag}.logits"], atol=1e-4, rtol=0)
        first, second = (golden[f"{tag}.labels_block{layer}"].long() for layer in layers)
        assert session.counts == [65, first.max() + 1, second.max() + 1, second.max() + 1]
        assert torch.equal(grouping(session.last.steps[0].plan.row), grouping(first))
        assert torch.equal(grouping(session.origin), grouping(second.gather(1, first)))  # labels of labels


@pytest.mark.parametrize(
    ("linkage", "row"),
    [("single", [0, 0, 0, 0, 1]), ("average", [0, 0, 0, 0, 1]), ("complete", [0, 0, 1, 1, 1])],
)
def test_five_points_on_a_circle(linkage, row):
    angle = torch.tensor([0, 10, 25, 45, 66]) * math.pi / 180
    seen = signals(torch.stack([angle.cos(), angle.sin()], -1), prefix=0)
    plan = fewer.ATC(Capacity(2), linkage=linkage).plan(seen, seen.tokens)
    assert plan.row.tolist() == [row]
    x = torch.randn(1, 5, 3)
    y = plan.reduce(x)
    assert_close((y * plan.sizes(None)[..., None]).sum(1), x.sum(1))


def test_sizes_weigh_the_averages_and_add_up():
    size = torch.tensor([[1.0, 3.0, 1.0, 2.0]])
    seen = signals(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), prefix=0, size=size)
    plan = fewer.ATC(Capacity(2)).plan(seen, seen.tokens)
    y = plan.reduce(torch.tensor([[[0.0], [4.0], [3.0], [6.0]]]))
    assert_close(y[0, :, 0], torch.tensor([3.0, 5.0]))
    assert plan.sizes(size).tolist() == [[4, 3]]


def test_keeping_all_is_the_model_and_mass_is_conserved():
    model, x = tiny_vit("vit"), images()
    want = run(model, x)
    with fewer.apply(model, "atc:keep=1.0,layers=1+2"):
        assert torch.equal(run(model, x), want)
    with fewer.apply(model, "atc:keep=0.5,layers=1+2") as session:
        run(model, x)
        assert session.counts == [17, 9, 5, 5]
        assert_close(session.last.tokens.size.sum(1), torch.full((2,), 17.0))
        dense = session.restore(torch.arange(5.0).expand(2, 5)[..., None])
        assert torch.equal(dense[..., 0].flatten(1).long(), session.origin[:, 1:])


def test_an_unknown_linkage_is_refused():
    with pytest.raises(ValueError, match="choose one of average, single, complete"):
        fewer.ATC(linkage="ward")
