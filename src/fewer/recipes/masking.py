"""Semantic-guided masking: hide what matters most in a clip, compress the rest, and have it guessed.

The pretraining of a synthesiser that makes one frame of several, such as Video-XL-Pro's. The decoder is thrown away
afterwards.

    decoder = Guesser(channels=1152, frames=4)
    curve = pretrain(synthesiser, decoder, clips, steps=1000)      # clips: (features, saliency), again and again

Source   Video-XL-Pro, arXiv:2503.18478, sec. 3.2. The paper's decoder and its measure of saliency are not public; the
decoder here is one block, and the saliency is yours to give: attention of a class or pooling token, say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core.visual.resampler import Block, heads_of
from fewer.recipes.loop import Loop


class Guesser(nn.Module):
    """From one frame back to the several it was made of: time codes, one block over all their cells, a linear layer.

    hidden: (C,), what stands in for the cells that are hidden from the synthesiser.
    """

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.zeros(channels))
        self.time = nn.Parameter(torch.randn(frames, channels) * 0.02)
        self.block = Block(channels, heads_of(channels, 64))
        self.norm, self.leave = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, G, H, W, C) -> (B, G * frames, H, W, C)."""
        b, g, h, w, c = x.shape
        y = x[:, :, None] + self.time[:, None, None]
        y = self.leave(self.norm(self.block(y.reshape(b * g, -1, c))))
        return y.view(b, -1, h, w, c)


def salient(saliency: Tensor, share: float) -> Tensor:
    """The most salient share of each clip's cells, rounded down, at least one. saliency: (B, ...) -> bool, the same.

    Ties: the earlier cell."""
    if not 0 < share < 1:
        raise ValueError(f"share={share} is outside (0, 1); it is the share of a clip's cells that is hidden")
    flat = saliency.flatten(1)
    order = flat.sort(dim=-1, descending=True, stable=True).indices[:, : max(1, int(flat.shape[1] * share))]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, True).view(saliency.shape)


def guessing_loss(
    synthesiser: nn.Module, decoder: Guesser, frames: Tensor, saliency: Tensor, share: float = 0.5
) -> Tensor:
    """How far the guesses of the hidden cells are from their features, each brought to mean 0 and variance 1.

    synthesiser: (B, T, H, W, C) -> (B, T / k, H, W, C), k the decoder's frames; frames: what it takes, T a multiple of
    k; saliency: (B, T, H, W), higher is hidden first. Returns the mean squared difference, a scalar; 1 is what
    guessing the mean of everything comes to.
    """
    k = decoder.time.shape[0]
    if frames.shape[1] % k:
        raise ValueError(f"{frames.shape[1]} frames are no multiple of {k}, the frames that become one")
    away = salient(saliency, share)
    seen = torch.where(away[..., None], decoder.hidden.to(frames.dtype), frames)
    wanted = F.layer_norm(frames.float(), frames.shape[-1:])
    wrong = (decoder(synthesiser(seen)).float() - wanted).square().mean(-1)
    return (wrong * away).sum() / away.sum()


def pretrain(
    synthesiser: nn.Module, decoder: Guesser, clips: Iterable[tuple[Tensor, Tensor]], *, steps: int, lr: float = 1e-3,
    share: float = 0.5, log: Callable[[str], None] = lambda line: None,
) -> list[float]:  # fmt: skip
    """Train both on clips, (features, saliency) as in `guessing_loss`, round and round. Returns every step's loss.

    AdamW, a warm-up, then half a cosine; gradients are cut at norm 1. log: receives a line every 50 steps.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one")
    lines = Loop(steps, every=1).run(
        learned := nn.ModuleList([synthesiser, decoder]), [torch.optim.AdamW(learned.parameters(), lr=lr)],
        cycle(clips), lambda clip, at: {"loss": guessing_loss(synthesiser, decoder, clip[0], clip[1], share)},
        progress=lambda row: log(f"step {row['step']:.0f} loss {row['loss']:.4f}") if row["step"] % 50 == 1 else None,
    )  # fmt: skip
    return [line["loss"] for line in lines]
