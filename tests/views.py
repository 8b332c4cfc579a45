"""Visual tokens as a method meets them, built by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.core import Place, Seen, Signals, Tokens, Tower, View, Visual


def example(
    R: int = 2, N: int = 16, d: int = 8, C: int = 12, T: int = 5, H: int = 2, seed: int = 0
) -> tuple[Signals, Tokens]:
    """R sequences: 3 words, N visual tokens, T words. A tower like CLIP's over 4 x 4 patches, class token in front."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    index = torch.arange(3, 3 + N).expand(R, N)
    cell = torch.arange(N).expand(R, N)
    zero = torch.zeros_like(cell)
    source = torch.arange(R * N).view(R, N)
    view = View(torch.arange(R), index, zero, zero, zero, cell // 4, cell % 4, source=source)
    text = torch.ones(R, 3 + N + T, dtype=torch.bool)
    text[:, 3 : 3 + N] = False
    hidden, features = noise(R, 3 + N + T, d), noise(R * N, C)
    seen = Seen(*(noise(R, H, 1 + N, 6) for _ in range(3)), 6**-0.5)
    tower = Tower(features, lambda x: x @ torch.ones(C, d) / C, layer=2, seen={2: seen}, prefix=1, cls=noise(R, C))
    visual = Visual(view, hidden, text, tower=tower)
    tokens = Tokens.plain(R, N, 0, has_cls=False)
    return Signals(view.of(hidden), tokens, Place(start=N), beside=visual, grid=(4, 4)), tokens
