"""Images cut into different numbers of crops in one batch, with the padding that a layout really gives."""

import pytest
import torch

import fewer
from fewer.core import Place, Seen, Signals, Tokens, Tower, Visual
from fewer.core.visual.layout import Item, Layout, Standing, view

SIDE, WIDTH, CHANNELS = 4, 8, 12
CROPS = ((2, 2), (1, 2))  # of each image
BEGINS = (2, 3)  # where each stands in its prompt
S = 100


def image(number):
    """The whole view and the crops of an image, and the first of its rows in the tower's output."""
    down, across = CROPS[number]
    first = sum(1 + a * b for a, b in CROPS[:number]) * SIDE**2
    full = Item.raster(1, SIDE, SIDE, tiles=1 + down * across, first=first)
    return Item(full.tile, full.time, full.row, full.column, full.source, crops=(down, across))


def signals(numbers):
    """One prompt per image."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=draw)

    tiles = sum(1 + a * b for a, b in CROPS)
    seen = {layer: Seen(*(noise(tiles, 2, 1 + SIDE**2, 6) for _ in range(3)), 6**-0.5) for layer in (0, 1, 5)}
    seen[-1] = seen[5]
    features, cls, matrix = noise(tiles * SIDE**2, CHANNELS), noise(tiles, CHANNELS), noise(CHANNELS, WIDTH)
    hidden = noise(len(CROPS), S, WIDTH)[numbers]
    items = [image(number) for number in numbers]
    begins = [S * row + BEGINS[number] for row, number in enumerate(numbers)]
    places = [begin + torch.arange(len(item)) for begin, item in zip(begins, items, strict=True)]
    layout = Layout.of((len(numbers), S), items, places, None, torch.device("cpu"))
    shown = view(layout, Standing.of(layout), Tokens.plain(len(numbers), S), "image")
    tower = Tower(features, lambda x: x @ matrix, 5, seen, 1, cls)
    tokens = Tokens.plain(shown.lines, shown.n, valid=shown.valid)
    starts = None if shown.valid is None else shown.valid.sum(-1)
    visual = Visual(shown, hidden, layout.text, tower=tower)
    return Signals(shown.of(hidden), tokens, Place(start=shown.n, starts=starts), beside=visual)


@pytest.mark.parametrize(
    "form",
    [
        "globalcom", "globalcom:tokens=20", "hired", "hired:fidelity=code", "hired:tokens=20",
        "fastervlm:per=tile,keep=0.3", "vscan:tokens=20,window=2,shallow=1", "visionzip:tokens=20", "holov:tokens=20",
        "vispruner:tokens=20", "prumerge", "prumerge:tokens=20", "divprune:tokens=20", "m3:tokens=9", "trim:tokens=10",
        "setok:tokens=9", "grid:tokens=9,site=bridge", "pool:tokens=9,site=bridge",
    ],
)  # fmt: skip
def test_an_image_keeps_what_it_keeps_alone(form):
    method = fewer.parse(form)
    both = signals([0, 1])
    assert both.visual.view.tile.min() < 0  # padding belongs to no tile
    plan = method.plan(both, both.tokens)
    for line in range(2):
        single = signals([line])
        own = method.plan(single, single.tokens)
        m = own.m if own.lengths is None else int(own.lengths[0])
        length = plan.m if plan.lengths is None else int(plan.lengths[line])
        assert length == m
        assert torch.equal(plan.position[line, :m], own.position[0, :m])
