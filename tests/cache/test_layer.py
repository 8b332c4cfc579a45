"""A reduced cache layer by itself: what happens to everything it keeps beside keys and values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from fewer.core.cache.selectors import pooled_votes
from fewer.core.plan import Hard
from fewer.runtime.kv.layer import ReducedLayer
from fewer.runtime.kv.state import Parked


class Owner:
    """Stands for a session."""


OWNER = Owner()


def layer(b: int = 2, g: int = 2, n: int = 6) -> ReducedLayer:
    """Keys hold the number of their row, values that of their sample."""
    plain = DynamicLayer()
    rows = torch.arange(n, dtype=torch.float)[None, None, :, None].expand(b, g, n, 4)
    samples = torch.arange(b, dtype=torch.float)[:, None, None, None].expand(b, g, n, 4)
    plain.update(rows.clone(), samples.clone())
    return ReducedLayer.adopt(plain, OWNER)


def test_cropping_takes_everything_along() -> None:
    one = layer()
    one.local = {0: {"heat": torch.zeros(2, 2, 6)}}
    one.memory = {0: {"features": torch.zeros(2, 6, 3)}}
    one.received = torch.arange(24.0).view(2, 2, 6)
    one.waiting = Parked(torch.zeros(2, 2, 3), torch.tensor([[1, 5], [3, 4]]), torch.tensor([[1, 5], [3, 4]]))
    one.crop(-2)
    assert one.local == {}, "by stored rows: of no use once rows are gone"
    assert one.memory[0]["features"].shape == (2, 4, 3)
    assert one.totals == [4, 4]
    assert (one.length, one.keys.shape[-2], one.received.shape[-1]) == (4, 4, 4)
    assert one.waiting.place.tolist() == [[1, -1], [3, -1]]


def test_beams_take_everything_along() -> None:
    one = layer()
    one.received = torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 2, 6).clone()
    one.waiting = Parked(torch.zeros(2, 1, 3), torch.tensor([[1], [4]]), torch.tensor([[1], [4]]))
    one.local = {0: {"heat": torch.tensor([[5.0], [6.0]])}}
    one.totals = [6, 5]
    one.reorder_cache(torch.tensor([1, 1]))
    assert one.values[:, 0, 0, 0].tolist() == [1, 1]
    assert one.received[:, 0, 0].tolist() == [2, 2]
    assert one.waiting.place.tolist() == [[4], [4]]
    assert one.local[0]["heat"].tolist() == [[6], [6]]
    assert one.totals == [5, 5]


def test_rows_that_moved_are_coded_anew() -> None:
    one = layer()
    coded: Any = object()
    one.codes = [coded]
    one.keep(Hard(6, torch.tensor([0, 2, 5]).expand(2, 2, 3)), one.keys, one.values)
    assert one.codes == []
    assert one.positions().tolist() == [[[0, 2, 5]]] * 2 or one.positions()[0, 0].tolist() == [0, 2, 5]


def test_rows_are_put_back_in_the_order_they_came() -> None:
    one = layer()
    order = torch.tensor([0, 5, 2, 4]).expand(2, 2, 4)
    one.keep(Hard(6, order), one.keys, one.values)
    one.shuffled = True
    one._arrange()
    assert not one.shuffled
    assert one.positions()[0, 0].tolist() == [0, 2, 4, 5]
    assert one.keys[0, 0, :, 0].tolist() == [0, 2, 4, 5]


def test_a_hole_is_no_neighbour() -> None:
    """Rows 1 and 3 are neighbours where row 2 is a hole: pooled over three, each has the other's vote."""
    votes = torch.tensor([[[3.0, 0.0, 9.0, 6.0, 0.0]]])

    class Votes:
        def window_mass(self, _: int) -> Tensor:
            return votes

        def before(self, rows: Any, _: int) -> Tensor:
            return rows.real

        def per_group(self, x: Tensor) -> Tensor:
            return x

    rows: Any = SimpleNamespace(real=torch.tensor([[[True, True, False, True, True]]]))
    signals: Any = Votes()
    got = pooled_votes(signals, rows, window=1, kernel=3, pool="mean")
    assert torch.equal(got[0, 0, [0, 1, 3, 4]], torch.tensor([1.0, 3.0, 2.0, 2.0]))
