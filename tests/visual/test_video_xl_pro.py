"""Video-XL-Pro: four frames to one, a quarter of the cells, the highest scores; and hidden cells that are guessed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fewer
from clips import CHANNELS, clip, made, with_features, with_words
from fewer.core import SignalError
from fewer.methods.multimodal.video_xl_pro import Synthesiser, Timed, VideoXLPro, anchors
from fewer.recipes.masking import Guesser, guessing_loss, pretrain, salient


def synthesiser(seed: int = 0) -> Synthesiser:
    torch.manual_seed(seed)
    return Synthesiser(CHANNELS)


@pytest.mark.parametrize(("frames", "groups"), [(1, 1), (4, 1), (5, 2), (8, 2)])
def test_four_frames_become_one_and_the_count_is_a_multiple(frames: int, groups: int):
    method = VideoXLPro(share=0.8, step=8)
    signals = clip(frames, 8, 6, method=method)
    plan = method.plan(signals, signals.tokens)
    assert plan.m == int(groups * 12 * 0.8) // 8 * 8
    assert (plan.position.diff(dim=-1) > 0).all()
    assert method.rows(signals, plan).shape == (2, plan.m, 8)


def test_the_count_of_the_paper():
    """32 frames of 24 x 24: 8 groups of 144 rows; any share leaves a multiple of 16."""
    places = anchors((32, 24, 24))
    assert len(places) == 8 * 144
    signals = clip(1)
    for share in (0.7, 0.83, 0.99):
        kept = VideoXLPro(share=share).count(8 * 144, signals, 32 * 576)
        assert kept % 16 == 0
        assert 0 <= 8 * 144 * share - kept < 16
    assert VideoXLPro().count(9, signals, 36) == 6  # too few for a multiple of 16


@pytest.mark.parametrize(("form", "count"), [("tokens=7", 7), ("keep=0.05", 6), ("tokens=99", 8)])
def test_budgets_count_what_came_in(form: str, count: int):
    """Of 128 visual tokens 8 rows are made: two groups, four rows of cells, one column."""
    method = fewer.parse(f"video_xl_pro:{form}")
    signals = clip(8, 8, 2, method=method)
    assert method.plan(signals, signals.tokens).m == count


def test_an_image_is_a_clip_of_four_equal_frames():
    net = synthesiser()
    image = torch.randn(2, 1, 4, 4, CHANNELS)
    assert_close(net(image), net(image.expand(-1, 4, -1, -1, -1)))
    seven = torch.randn(1, 7, 4, 4, CHANNELS)
    assert_close(net(seven), net(torch.cat([seven, seven[:, -1:]], 1)))


def test_groups_know_nothing_of_each_other_and_equal_groups_are_equal():
    net = synthesiser()
    x = torch.randn(1, 8, 4, 4, CHANNELS)
    changed = x.clone()
    changed[:, 5] += 1
    assert_close(net(changed)[:, 0], net(x)[:, 0])
    still = x[:, :1].expand(-1, 8, -1, -1, -1)
    assert_close(net(still)[:, 0], net(still)[:, 1])
    assert (net(x[:, [1, 0, 2, 3]]) - net(x[:, :4])).abs().max() > 1e-3  # time is told apart where frames differ


def test_attention_over_time_first_changes_nothing_and_knows_distances():
    net = Timed(CHANNELS, 4)
    x = torch.randn(3, 4, CHANNELS)
    assert torch.equal(net(x), x)
    torch.nn.init.eye_(net.out.weight)
    net.bias.data[:, 3 + 1] = 50.0  # every frame looks at the next one only
    values = net.qkv(net.norm(x)).chunk(3, -1)[2]
    assert_close((net(x) - x)[:, :-1], values[:, 1:])


def test_scores_pick_the_rows_and_are_added_to_them():
    method = VideoXLPro(budget=fewer.Capacity(3))
    signals = clip(4, 4, 4, method=method)
    net, asks = signals.modules["synthesiser"], signals.modules["asks"]
    frame = net(signals.visual.features.unflatten(1, (4, 4, 4)))[:, 0]
    rows = signals.visual.project(frame).unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean((2, 4)).flatten(1, 2)
    words, _ = signals.visual.wording()
    score = (rows[:, :, None] * asks(words)[:, None]).sum(-1).mean(-1)
    score = (score - score.amin(-1, keepdim=True)) / (score.amax(-1, keepdim=True) - score.amin(-1, keepdim=True))
    keep = score.argsort(dim=-1, descending=True)[:, :3].sort(-1).values
    expected = (rows + score[..., None]).gather(1, keep[..., None].expand(-1, -1, 8))
    assert_close(made(method, signals), expected, atol=1e-5, rtol=1e-5)
    places = torch.tensor(anchors((4, 4, 4)))
    assert torch.equal(method.plan(signals, signals.tokens).position, places[keep])
    assert (made(method, with_words(signals, 4)) - expected).abs().max() > 1e-3


def test_constant_scores_and_no_words_are_defined():
    method = VideoXLPro(budget=fewer.Capacity(3))
    signals = clip(4, method=method)
    flat = with_features(signals, torch.zeros(2, 64, CHANNELS))
    for layer in flat.modules["asks"]:
        for parameter in layer.parameters():
            parameter.data.zero_()
    assert made(method, flat).isfinite().all()
    assert method.plan(flat, flat.tokens).position[0].tolist() == anchors((4, 4, 4))[:3]
    flat.beside.text[:] = False
    assert made(method, with_features(flat, torch.ones(2, 64, CHANNELS))).isfinite().all()


def test_everything_learns_the_scorer_too():
    method = VideoXLPro(budget=fewer.Capacity(3))
    signals = clip(4, method=method)
    for stage in signals.modules["synthesiser"].stages:
        torch.nn.init.eye_(stage.time.out.weight)  # behind a zero the other weights of this attention wait a step
    made(method, signals).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in signals.modules.parameters())


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="share=0"):
        VideoXLPro(share=0.0)
    with pytest.raises(ValueError, match="step=0"):
        VideoXLPro(step=0)
    ragged = clip((1, 2))
    with pytest.raises(SignalError, match="different length"):
        VideoXLPro().plan(ragged, ragged.tokens)


# -- pretraining ------------------------------------------------------------------------------------------------------
def test_the_most_salient_cells_are_hidden():
    away = salient(torch.tensor([[1.0, 5.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), 0.5)
    assert away.tolist() == [[False, True, True, False], [True, True, False, False]]
    with pytest.raises(ValueError, match="share=1"):
        salient(torch.zeros(1, 4), 1.0)


def test_hidden_features_do_not_reach_the_synthesiser():
    net, decoder = synthesiser(), Guesser(CHANNELS, 4)
    x, saliency = torch.randn(1, 4, 2, 2, CHANNELS), torch.rand(1, 4, 2, 2)
    seen: list[Tensor] = []
    handle = net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    guessing_loss(net, decoder, x, saliency, 0.25)
    handle.remove()
    away = salient(saliency, 0.25)
    assert away.sum() == 4
    assert (seen[0][away] == 0).all()
    assert torch.equal(seen[0][~away], x[~away])
    with pytest.raises(ValueError, match="3 frames"):
        guessing_loss(net, decoder, x[:, :3], saliency[:, :3])


def moving(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips of a bright spot that moves one cell a frame over a constant ground; the spot and its row are salient."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(2, CHANNELS, generator=torch.Generator().manual_seed(5))
    row = torch.randint(3, (batch,), generator=draw)
    start = torch.randint(3, (batch,), generator=draw)
    x = base[0].expand(batch, 4, 3, 3, -1).clone()
    saliency = torch.zeros(batch, 4, 3, 3)
    for b in range(batch):
        for t in range(4):
            x[b, t, row[b], (start[b] + t) % 3] = base[1]
            saliency[b, t, row[b]] = 1 + torch.rand(3, generator=draw)
    return x, saliency


def test_the_loss_falls_on_clips_never_seen():
    torch.manual_seed(0)
    net, decoder = synthesiser(), Guesser(CHANNELS, 4)
    held_out = moving(32, seed=99)
    with torch.no_grad():
        before = guessing_loss(net, decoder, *held_out)
    lines: list[str] = []
    curve = pretrain(net, decoder, [moving(16, seed=s) for s in range(12)], steps=40, lr=3e-3, log=lines.append)
    with torch.no_grad():
        after = guessing_loss(net, decoder, *held_out)
    assert len(curve) == 40
    assert len(lines) == 1
    assert after < 0.5 * before
