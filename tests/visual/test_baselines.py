"""Random, grid and pool in front of a language model."""

from dataclasses import replace

import pytest
import torch

import fewer
from fewer.core import Capacity, Site
from fewer.spec import SpecError
from fewer.testing.vision_language import prompts, tiny_vlm
from insides import alone, inside, kept, with_visual

SPECS = ["random", "grid", "pool"]


def bridged(name, count):
    return fewer.parse(f"{name}:site=bridge,tokens={count}")


def tiles(signals, *shapes, field="tile"):
    """With a view of tiles, (height, width) each, one behind the other; padding repeats the last cell."""
    cells = [(t, r, c) for t, (h, w) in enumerate(shapes) for r in range(h) for c in range(w)]
    n = signals.tokens.n
    tile, row, column = torch.tensor((cells + cells[-1:] * n)[:n]).T[:, None].expand(-1, signals.tokens.batch, -1)
    view = replace(signals.visual.view, **{field: tile}, row=row, column=column)
    return with_visual(replace(signals, grid=None), view=view)


def test_the_place_is_read_and_written():
    method = fewer.parse("random:site=bridge,tokens=64")
    assert method.site is Site.BRIDGE
    assert method.budget == Capacity(64)
    assert fewer.text(method) == "random:tokens=64,site=bridge"
    assert fewer.parse(fewer.text(method)) == method
    for name, site in (("before", Site.BEFORE_BLOCK), ("AFTER_BLOCK", Site.AFTER_BLOCK), ("mid", Site.MID_BLOCK)):
        assert fewer.parse(f"grid:site={name}").site is site
    assert fewer.parse("pool", site=Site.BRIDGE) == fewer.parse("pool:site=bridge")
    assert fewer.text(fewer.parse("pool:site=mid_block")) == "pool"
    with pytest.raises(SpecError, match="site=between does not fit; site takes one of before, around, mid, after"):
        fewer.parse("grid:site=between")


def test_grid_is_even_on_one_tile():
    signals, tokens = inside((64,))
    plan = bridged("grid", 16).plan(tiles(signals, (8, 8)), tokens)
    assert kept(plan) == [8 * r + c for r in range(0, 8, 2) for c in range(0, 8, 2)]


@pytest.mark.parametrize("field", ["tile", "time"])
def test_grid_gives_every_tile_and_frame_its_share(field):
    signals, tokens = inside((48,))
    view = tiles(signals, (4, 4), (4, 4), (4, 4), field=field)
    plan = bridged("grid", 12).plan(view, tokens)
    assert kept(plan) == [16 * t + 4 * r + c for t in range(3) for r in (0, 2) for c in (0, 2)]
    for count in (4, 7, 13, 31):
        per = torch.tensor(kept(bridged("grid", count).plan(view, tokens))).div(16, rounding_mode="floor").bincount()
        assert per.max() - per.min() <= 1


def test_fewer_tokens_than_frames_are_frames_far_apart():
    signals, tokens = inside((32,))
    view = tiles(signals, *[(2, 2)] * 8, field="time")
    assert kept(bridged("grid", 2).plan(view, tokens)) == [0, 16]
    assert kept(bridged("grid", 4).plan(view, tokens)) == [0, 8, 16, 24]


def test_tiles_of_another_size_share_by_their_size():
    signals, tokens = inside((80,))
    stay = torch.tensor(kept(bridged("grid", 20).plan(tiles(signals, (4, 4), (8, 8)), tokens)))
    assert int((stay < 16).sum()) == 4


def test_pool_never_joins_cells_of_two_tiles_where_runs_fit():
    signals, tokens = inside((48,))
    row = bridged("pool", 12).plan(tiles(signals, (4, 4), (4, 4), (4, 4)), tokens).row[0]
    for t in range(3):
        for r in (0, 2):
            for c in (0, 2):
                square = [16 * t + 4 * (r + i) + c + j for i in range(2) for j in range(2)]
                assert len(set(row[square].tolist())) == 1
    assert row.bincount().tolist() == [4] * 12


def test_pool_is_exact_far_down_the_line():
    """More cells on the curve than float32 tells apart."""
    signals, tokens = inside((32,))
    view = signals.visual.view
    cell = view.index - 3
    view = replace(view, time=cell // 4 + 900, row=cell % 4 // 2 + 4000, column=cell % 2 + 4000)
    row = bridged("pool", 8).plan(with_visual(replace(signals, grid=None), view=view), tokens).row[0]
    assert row.tolist() == [t for t in range(8) for _ in range(4)]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("count", [5, 30])
def test_padding_and_other_images_change_nothing(name, count):
    lengths, shapes = (32, 20, 1), [(4, 5), (3, 4)]
    signals, tokens = inside(lengths)
    method = bridged(name, count)
    plan = method.plan(tiles(signals, *shapes), tokens)
    for line in range(3):
        own, mine = alone(lengths, line)
        one = method.plan(tiles(own, *shapes), mine)
        assert kept(plan, line) == kept(one)
        assert torch.equal(plan.row[line, : lengths[line]], one.row[0])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen2_5_vl"])
def test_in_a_model(name, kind):
    model = tiny_vlm(kind)
    with fewer.apply(model, bridged(name, 3)) as session, torch.no_grad():
        model(**prompts(model, [1, 2]))
        assert session.seen(0).sum(-1).tolist() == [3, 6]
