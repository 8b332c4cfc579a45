"""Projectors on hand-made pictures: signals with tower levels and pixels, for any grid and number of tiles."""

import torch
from torch import nn

from fewer.core import Place, Shape, Signals, Tokens, Tower, View, Visual


def picture(lines=2, grid=(4, 4), tiles=1, channels=12, width=8, depth=6, patch=6, seed=0):
    """Signals of `lines` pictures of whole tiles in raster order, one sequence each, and their shape."""
    g = torch.Generator().manual_seed(seed)
    h, w = grid
    n, total = tiles * h * w, lines * tiles
    cell = torch.arange(n).expand(lines, n)
    inside, none = cell % (h * w), torch.zeros_like(cell)
    source = torch.arange(lines * n).view(lines, n)
    view = View(torch.arange(lines), cell + 2, none, cell // (h * w), none, inside // w, inside % w, source=source)
    hidden = torch.randn(lines, n + 7, width, generator=g)
    text = torch.ones(lines, n + 7, dtype=torch.bool)
    text[:, 2 : 2 + n] = False
    project = nn.Linear(channels, width)
    tower = Tower(
        torch.randn(lines * n, channels, generator=g),
        project,
        levels={block: torch.randn(lines * n, channels, generator=g) for block in range(depth)},
        pixels=torch.randn(total, 3, h * patch, w * patch, generator=g),
    )
    tokens = Tokens.plain(lines, n)
    beside = Visual(view, hidden, text, tower=tower)
    signals = Signals(view.of(hidden), tokens, Place(start=n), beside=beside, grid=grid)
    return signals, Shape(width, 2, channels, depth, grid)


def ragged(signals, lengths, fill=0):
    """The same pictures, each cut off behind its own number of tokens; padding stands behind them."""
    view, n = signals.visual.view, signals.tokens.n
    length = torch.tensor(lengths)[:, None]
    where = torch.arange(n)
    valid = where < length
    index = torch.minimum(where, length - 1)
    streams = {
        k: getattr(view, k).gather(1, index) for k in ("index", "item", "tile", "time", "row", "column", "source")
    }
    view = View(view.sample, **streams, valid=valid)
    tokens = Tokens.plain(len(lengths), n, valid=valid)
    hidden = signals.hidden.masked_fill(~valid[..., None], fill)
    visual = signals.visual
    beside = Visual(view, visual.hidden, visual.text, tower=visual.tower)
    return Signals(hidden, tokens, Place(start=n), beside=beside, modules=signals.modules)


def made(method, signals, shape, seed=0):
    """The plan and the rows of a method with fresh modules."""
    if not len(signals.modules):
        torch.manual_seed(seed)
        signals.modules = nn.ModuleDict(method.parts(shape)).eval()
    plan = method.plan(signals, signals.tokens)
    return plan, method.rows(signals, plan)


def influence(out, source):
    """(N,) how much each row of `source`, (..., N, C), moves a tensor: the sum of absolute gradients."""
    (grad,) = torch.autograd.grad(out.sum(), source, retain_graph=True)
    return grad.abs().sum(-1)
