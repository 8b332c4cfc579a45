"""Methods that compare the frames of a video in front of the language model, by cases worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fewer
from clips import clip
from fewer.core import Signals
from fewer.core.visual.frames import earlier
from fewer.methods.multimodal.llava_scissor import components


def of(x: Tensor, **more: Any) -> Signals:
    """Signals of clips with these rows. x: (R, T, H, W, C)."""
    lines, frames, height, width, _ = x.shape
    signals = clip(frames, height, width, lines=lines, **more)
    signals.hidden = x.flatten(1, 3)
    return signals


def kept(plan: Any, line: int = 0) -> list[int]:
    count = plan.m if plan.lengths is None else int(plan.lengths[line])
    return sorted(plan.position[line, :count].tolist())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_same_patch_some_frames_before() -> None:
    signals = of(noise(2, 4, 2, 3, 5))
    view = signals.visual.view
    for back in (1, 2):
        partner, found = earlier(view, torch.ones(2, 24, dtype=torch.bool), back)
        assert found.tolist() == [[t >= back for t in range(4) for _ in range(6)]] * 2
        assert (torch.arange(24) - partner)[found[0].expand(2, -1)].unique().tolist() == [6 * back]


def test_padding_is_nobodys_past() -> None:
    signals = clip([3, 2], 2, 2)
    view = signals.visual.view
    _, found = earlier(view, signals.tokens.unpadded, 1)
    assert found.sum(-1).tolist() == [8, 4]


def test_evs_keeps_the_first_frame_and_what_changes() -> None:
    x = noise(1, 1, 2, 2, 8).expand(-1, 4, -1, -1, -1).clone()
    x[0, 2, 1, 0] = noise(8, seed=1)  # one patch changes in frame 2, and changes back in frame 3
    signals = of(x)
    assert kept(fewer.parse("evs:keep=0.375").plan(signals, signals.tokens)) == [0, 1, 2, 3, 10, 14]
    assert kept(fewer.parse("evs:keep=0.01").plan(signals, signals.tokens)) == [0, 1, 2, 3]
    assert kept(fewer.parse("evs:keep=1.0").plan(signals, signals.tokens)) == list(range(16))


def test_dycoke_compares_two_with_one_four_with_three_and_three_with_one() -> None:
    x = noise(1, 8, 1, 10, 16)
    x[0, 1, 0, :7] = x[0, 0, 0, :7]  # what repeats in the second frame goes
    x[0, 3, 0, 3:] = x[0, 2, 0, 3:]
    x[0, 2, 0, :7] = x[0, 0, 0, :7]  # the third is compared with the first, not with the second
    signals = of(x)
    plan = fewer.parse("dycoke").plan(signals, signals.tokens)
    left = [sorted(p % 10 for p in kept(plan) if p // 10 == t) for t in range(8)]
    assert left[0] == left[4] == list(range(10))
    assert left[1] == [7, 8, 9]
    assert left[2] == [7, 8, 9]
    assert [len(frame) for frame in left] == [10, 3, 3, 3, 10, 3, 3, 3]


def test_a_picture_has_no_past() -> None:
    signals = of(noise(2, 1, 4, 4, 8))
    for form in ("evs", "dycoke"):
        assert kept(fewer.parse(form).plan(signals, signals.tokens)) == list(range(16))


def test_prunevid_melts_a_still_video() -> None:
    """Four equal frames with few patches: one segment, every patch once, each the mean over time."""
    x = noise(1, 1, 2, 2, 8).expand(-1, 4, -1, -1, -1)
    signals = of(x)
    plan = fewer.parse("prunevid").plan(signals, signals.tokens)
    assert kept(plan) == [0, 1, 2, 3]
    assert_close(plan.reduce(signals.hidden)[0], x[0, 0].flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert_close(plan.dense()[0].sum(-1), torch.ones(4))


def test_prunevid_halves_what_moves_and_loses_nobody() -> None:
    signals = of(noise(2, 4, 4, 5, 8))
    plan = fewer.parse("prunevid").plan(signals, signals.tokens)
    for line in range(2):
        assert len(kept(plan, line)) == 40  # 20 of each frame become 10
    assert_close((plan.dense() > 0).float().sum(1), torch.ones(2, 80))  # each token in one cluster
    few = of(noise(1, 2, 2, 2, 8))
    assert len(kept(fewer.parse("prunevid:alike=1").plan(few, few.tokens))) == 8  # 14 or fewer stay as they are


def reference_components(x: Tensor, cut: float) -> list[int]:
    """Depth first, one node after the other."""
    u = torch.nn.functional.normalize(x, dim=-1)
    label = [-1] * len(x)
    for start in range(len(x)):
        stack = [start] if label[start] < 0 else []
        while stack:
            i = stack.pop()
            if label[i] >= 0:
                continue
            label[i] = start
            stack += [j for j in range(len(x)) if label[j] < 0 and float(u[i] @ u[j]) > cut]
    return label


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.6, 0.9])
def test_components_are_those_of_a_plain_search(cut: float) -> None:
    for seed in range(5):
        x = noise(40, 4, seed=seed)
        assert components(x, cut).tolist() == reference_components(x, cut)


def test_a_long_chain_is_one_component() -> None:
    angle = torch.arange(60) * 0.1
    x = torch.stack([angle.cos(), angle.sin()], -1)
    assert components(x, 0.99).tolist() == [0] * 60
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert components(x[order], 0.99).tolist() == [0] * 60


def test_scissor_joins_over_frames_and_counts_representatives_once_more() -> None:
    """Two things, each in both frames, one patch each time a little off."""
    a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    a2 = torch.tensor([1.0, 0.1, 0])
    signals = of(torch.stack([torch.stack([a, a2, b]), torch.stack([a, b, b])])[None, :, None])
    plan = fewer.parse("llava_scissor").plan(signals, signals.tokens)
    assert kept(plan) == [0, 2]
    made = plan.reduce(signals.hidden)[0]
    first = ((a + a2) / 2 + a) / 2  # means of the frames, then of the two frames
    assert_close(made[0], (first + a + a2 + a) / 4)
    assert_close(made[1], b)


def test_fastvid_counts_and_weighs() -> None:
    """A clip of 4 equal frames is one segment: salient tokens of each frame, the context on its last frame."""
    from dataclasses import replace

    from fewer.core.attention import Seen

    frames, cells = 4, 20
    x = noise(1, 1, 4, 5, 8).expand(-1, frames, -1, -1, -1) + 0.01 * noise(1, frames, 4, 5, 8, seed=2)
    signals = of(x)
    tower = signals.visual.tower
    assert tower is not None
    q = noise(frames, 1, cells, 4, seed=3)
    signals.visual.tower = replace(tower, seen={0: Seen(q, q, q, 1.0)})
    plan = fewer.parse("fastvid:keep=0.3,cuts=0").plan(signals, signals.tokens)
    place = kept(plan)
    assert len(place) == 4 * 6
    assert [sum(p // cells == t for p in place) for t in range(4)] == [4, 4, 4, 4 + 8]
    matrix = plan.dense()[0]
    assert_close(matrix.sum(-1), torch.ones(24))
    heads = matrix.gather(1, plan.position[0][:, None])[:, 0]
    assert bool((heads >= 0.6 - 1e-6).all())
    paid = signals.visual.importance()[0].view(4, 20)
    salient = paid.topk(4, dim=-1).indices + torch.arange(4)[:, None] * cells
    assert set(salient.flatten().tolist()) <= set(place)


@pytest.mark.parametrize(
    ("form", "says"),
    [("prunevid:segments=0", "segments=0"), ("prunevid:alike=2", "alike=2"), ("fastvid:context=2", "context=2"),
     ("fastvid:every=0", "every=0")],
)  # fmt: skip
def test_settings_out_of_range(form: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fewer.parse(form)


def test_scissor_takes_a_threshold_only() -> None:
    signals = of(noise(1, 2, 2, 2, 8))
    with pytest.raises(ValueError, match="threshold of similarity"):
        fewer.parse("llava_scissor:tokens=5").plan(signals, signals.tokens)
