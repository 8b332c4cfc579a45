"""The vision tower of a vision-language model: methods inside it, or a look at its blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...hosts import Call, Host, PlainRun, VisionLanguageHost
from ...hosts.vision_language import Encoding
from ..program import Bound, SessionError
from .blocks import BlockSite


class TowerRecorder(PlainRun):
    """Looks at one block of the vision tower and changes nothing. Implements the hosts' BlockRun."""

    def __init__(self, encoding: Encoding, attends: bool) -> None:
        self.encoding, self.attends = encoding, attends

    def call(self, layer: int) -> Call:
        return Call(watch=self.attends)

    def after(self, layer: int, x: Tensor, call: Call) -> Tensor:
        if call.seen is not None:
            self.encoding.seen.setdefault(layer, call.seen)
        self.encoding.outputs.setdefault(layer, x)
        return x


class TowerSite:
    """Methods inside the vision tower.

    What leaves it shorter gets its rows back behind the projector, empty ones between, as the model counts them; in the
    prompt they go for good.
    """

    def __init__(self, bound: Bound, whole: VisionLanguageHost) -> None:
        self.bound, self.whole = bound, whole
        self.blocks = BlockSite(bound)

    def attach(self, undo: ExitStack) -> None:
        self.bound.host.enter(undo)
        self.blocks.attach(undo)

    def spread(self, encoding: Encoding, output: Tensor) -> Tensor:
        """What the projector gave, (T, P, d), with rows for the patches that were dropped; written down where."""
        ran, used = self.blocks.trace, self.whole.used
        assert ran is not None
        kept = ran.kept(used)[:, self.whole.cut_off :] - ran.first.prefix
        if kept.shape[1] != output.shape[1]:
            raise SessionError(
                f"the projector got {output.shape[1]} rows, the tower's block {used} left {kept.shape[1]}: methods "
                "inside the tower are known for models that project the output of one block"
            )
        full = ran.first.n - ran.first.prefix
        slot = torch.where(kept < 0, full, kept)

        def spread(x: Tensor) -> Tensor:
            rows = x.new_zeros(x.shape[0], full + 1, x.shape[2])
            return rows.scatter(1, slot[..., None].expand_as(x), x)[:, :-1]

        present = torch.zeros(output.shape[0], full + 1, dtype=torch.bool, device=output.device)
        encoding.present = present.scatter(1, slot, True)[:, :-1].reshape(-1)
        encoding.share = (kept.shape[1], full) if ran.tokens.valid is None else None
        encoding.entered = spread(encoding.features)
        return spread(output)


def watch(
    tower: Host, looks_at: Collection[int], taps: Collection[int], encoding: Callable[[], Encoding | None],
    undo: ExitStack,
) -> None:  # fmt: skip
    """Until `undo` closes, the tower's blocks show what somebody looks at: the attention of some, the output of others.
    encoding: the one under way."""
    depth = len(tower.blocks)
    attended = {layer % depth for layer in looks_at}

    def look(layer: int, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...]]:
        kwargs |= dict(zip(tower.arguments, args, strict=False))
        mask = None if tower.found.mask is None else kwargs.pop(tower.found.mask, None)
        run = TowerRecorder(encoding() or Encoding("image", {}), layer in attended)
        return tower.run(layer, x, mask, kwargs, run)

    tower.attach(lambda layer: partial(look, layer), undo, attended | {t % depth for t in taps})
