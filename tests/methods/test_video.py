"""Methods on videos against numbers of the authors' code, and against cases worked out by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer.core import (
    Budget,
    Capacity,
    Place,
    Plan,
    PlanError,
    Reducer,
    Remove,
    SignalError,
    Signals,
    Site,
    Tokens,
    match,
    reducer,
)  # fmt: skip
from fewer.core.attention import Seen
from fewer.core.learned import perturbed_top
from fewer.core.spacetime import Rectangle, across_frames, join_into, merge_cells, merge_frames
from fewer.methods.video import rlt, stts, vtm
from fewer.testing import TinyHost
from fewer.testing.models import clips, tiny_vit

GOLDENS = Path(__file__).parent.parent / "goldens"


def golden(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    held = np.load(GOLDENS / f"{name}.npz")
    return {k: torch.from_numpy(held[k]) for k in held.files if k != "config"}, json.loads(str(held["config"]))["cases"]


def video(
    frames: int = 4, height: int = 2, width: int = 2, *, prefix: int = 0, batch: int = 2, channels: int = 6,
    training: bool = False, modules: dict[str, nn.Module] | None = None, seed: int = 0, layer: int = 0,
    layers: int = 12, hidden: Tensor | None = None, pixels: Tensor | None = None,
) -> tuple[Signals, Tokens]:  # fmt: skip
    """Signals of a whole clip, as a block sees them."""
    draw = torch.Generator().manual_seed(seed)
    n = prefix + frames * height * width
    x = torch.randn(batch, n, channels, generator=draw) if hidden is None else hidden
    q, k, v = (torch.randn(x.shape[0], 2, n, 5, generator=draw) for _ in range(3))
    tokens = Tokens.plain(x.shape[0], n, prefix)
    at = Place(layer, layers, start=n - prefix)
    return Signals(
        x, tokens, at, Seen(q, k, v, 5**-0.5), (height, width), nn.ModuleDict(modules or {}), training, prefix=prefix,
        frames=frames, pixels=pixels,
    ), tokens  # fmt: skip


# -- goldens ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", range(3))
def test_testa_golden(case: int) -> None:
    """Patches inside each slice, frames by vote: features, sizes and who went where, to 1e-6."""
    held, cases = golden("testa_merge")
    config, part = cases[case], {k[3:]: v for k, v in held.items() if k.startswith(f"c{case}.")}
    metric, x = part["metric"], part["x"]
    b, other, along, _ = metric.shape
    if config["kind"] == "patch":
        tokens = Tokens.plain(b * other, along, int(config["class_token"]))
        plan = match.bipartite(metric.flatten(0, 1), Remove(config["r"]), tokens, at=Place(), order="halves")
        made, sizes, rows = plan.reduce(x.flatten(0, 1)), plan.sizes(None), plan.row
        made, sizes, rows = (t.unflatten(0, (b, other)) for t in (made, sizes, rows))
    else:  # the line is frame by frame; theirs is patch by patch
        shape = Rectangle(along, other)
        line = metric.transpose(1, 2).flatten(1, 2)
        plan = merge_frames(line, shape, Remove(config["r"]), Tokens.plain(b, along * other), at=Place(),
                            vote="least", order="halves")  # fmt: skip
        left = plan.m // other
        made = plan.reduce(x.transpose(1, 2).flatten(1, 2)).unflatten(1, (left, other)).transpose(1, 2)
        sizes = plan.sizes(None).unflatten(1, (left, other)).transpose(1, 2)
        rows = (plan.row // other).unflatten(1, (along, other)).transpose(1, 2)
    assert_close(made, part["wavg_x"], atol=1e-6, rtol=1e-5)
    assert_close(sizes, part["size"][..., 0], atol=0, rtol=0)
    assert torch.equal(rows, part["origin"].long())


@pytest.mark.parametrize("case", range(3))
def test_tempme_golden(case: int) -> None:
    """Merging with several class tokens in front, weighted by sizes that differ, to 1e-5."""
    held, cases = golden("tempme_merge")
    config, part = cases[case], {k[3:]: v for k, v in held.items() if k.startswith(f"c{case}.")}
    size = part["size"][..., 0]
    tokens = Tokens.plain(config["B"], config["N"], config["cls_num"], size=size)
    plan = match.bipartite(part["metric"], Remove(config["r"]), tokens, at=Place(), order="halves")
    assert torch.equal(plan.row, part["origin"].long())
    assert_close(plan.reduce(part["x"]), part["wavg_x"], atol=1e-5, rtol=1e-5)
    assert_close(plan.sizes(size), part["wavg_size"][..., 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", range(2))
def test_rlt_golden(case: int) -> None:
    """Which patches stay, and how long their runs are: exactly."""
    held, cases = golden("rlt")
    config, part = cases[case], {k[3:]: v for k, v in held.items() if k.startswith(f"c{case}.")}
    clip, (b, side) = part["video"], (config["B"], config["side"] // config["patch"])
    space = (config["frames"] // config["tubelet"], side, side)
    n = space[0] * side * side
    signals, tokens = video(*space, batch=b, pixels=clip)
    plan = fewer.parse(f"rlt:threshold={config['threshold']}").plan(signals, tokens)
    keep = torch.zeros(b, n, dtype=torch.bool)
    for i in range(b):
        keep[i, plan.anchor[i, : int(plan.lengths[i])]] = True  # type: ignore[index]
    assert torch.equal(keep, part["keep"].bool())
    run = rlt.lengths(keep.view(b, *space))
    in_order = run.permute(0, 2, 3, 1)  # theirs: image, row, column, then time
    assert torch.equal(in_order[in_order > 0], part["lengths"].long())
    assert int(keep.sum()) == config["kept"]
    # the same runs are the sizes of the rows, and rows hold what they held
    for i in range(b):
        k = int(plan.lengths[i])  # type: ignore[index]
        assert torch.equal(plan.sizes(None)[i, :k].long(), run[i].flatten()[keep[i]])
        assert torch.equal(plan.reduce(signals.hidden)[i, :k], signals.hidden[i][keep[i]])


@pytest.mark.parametrize("case", range(3))
def test_vidtome_golden(case: int) -> None:
    """What joins whom across frames, replaced or averaged, and what comes back: to 1e-6."""
    held, cases = golden("vidtome_local")
    config, part = cases[case], {k[3:]: v for k, v in held.items() if k.startswith(f"c{case}.")}
    x, frames, stride, carried = part["x"], config["frames"], config["target_stride"], config["unm_pre"]
    receivers = carried + len(range(config["target_frame"], frames, stride)) * config["tokens_per_frame"]
    sources = x.shape[1] - receivers
    stays = sources - int(sources * config["ratio"])
    made = {
        mean: across_frames(
            part["metric"], frames, config["target_frame"], stays, stride=stride, carried=carried,
            aligned=config["align_batch"], mean=mean, at=Place(),
        )
        for mean in (False, True)
    }  # fmt: skip
    assert made[False].m == config["n_out"]
    assert stays == int(part["unm_num"])
    for mean, name in ((False, "merge_replace"), (True, "merge_mean")):
        mine, theirs = made[mean].reduce(x), part[name]
        for i in range(len(x)):  # theirs: by similarity, then receivers; ours by position
            pair = torch.cdist(mine[i].double(), theirs[i].double())
            assert pair.min(1).values.max() < 1e-6
            assert len(set(pair.argmin(1).tolist())) == len(mine[i])
    back = made[False].restore(made[False].reduce(x))
    assert_close(back, part["unmerge_replace"], atol=1e-6, rtol=1e-5)


# -- laws -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [Rectangle(4, 6), Rectangle(6, 4, 2), Rectangle(2, 1, 1)])
def test_lifted_plans_are_their_dense_matrices(shape: Rectangle) -> None:
    x = torch.randn(2, shape.n, 3)
    tokens = Tokens.plain(2, shape.n, shape.prefix)
    for plan in (
        merge_cells(x, shape, Remove(shape.cells // 2), tokens, at=Place()),
        merge_cells(x, shape, Remove(2), tokens, at=Place(), frames=2),
        merge_frames(x, shape, Remove(1), tokens, at=Place()),
        join_into(x, torch.tensor([[shape.prefix], [shape.n - 1]]), tokens, at=Place()),
    ):
        assert_close(plan.reduce(x), plan.dense() @ x)
        assert_close(plan.sizes(None).sum(-1), torch.full((2,), float(shape.n)))
        assert torch.equal(plan.row[:, : shape.prefix], torch.arange(shape.prefix).expand(2, -1))


def test_patches_merge_inside_their_frame_only() -> None:
    shape = Rectangle(5, 8, 1)
    x = torch.randn(3, shape.n, 4)
    plan = merge_cells(x, shape, Remove(3), Tokens.plain(3, shape.n, 1), at=Place())
    frame = (torch.arange(shape.n) - 1) // 8
    for b in range(3):
        for row in range(1, plan.m):
            assert len(frame[plan.row[b] == row].unique()) == 1
    counts = torch.stack([(frame[plan.anchor[b, 1:]] == f).sum() for b in range(3) for f in range(5)])
    assert bool((counts == 5).all())


def test_all_patches_of_a_frame_go_to_one_frame_and_equal_neighbours_go_first() -> None:
    shape, x = Rectangle(6, 4), torch.randn(1, 6, 4, 8)
    x[:, 3] = x[:, 2]  # frame 2 goes into frame 3
    x = x.flatten(1, 2)
    plan = merge_frames(x, shape, Remove(1), Tokens.plain(1, 24), at=Place())
    frame = plan.anchor[0, plan.row[0]].view(6, 4) // 4
    assert frame.tolist() == [[f] * 4 for f in (0, 1, 3, 3, 4, 5)]


def test_testa_follows_its_schedule_and_leaves_the_class_token() -> None:
    signals, tokens = video(8, 4, 4, prefix=1)
    method, x = fewer.parse("testa:r=3,frames=2"), signals.hidden
    for frames, cells in ((6, 13), (4, 10), (2, 7), (1, 4), (1, 2), (1, 1)):
        plan = method.plan(signals, tokens)
        x, tokens = plan.reduce(x), tokens.after(plan)
        assert tokens.n == 1 + frames * cells
        assert torch.equal(x[:, 0], signals.hidden[:, 0])
        assert_close(tokens.size.sum(-1), torch.full((2,), 129.0))  # type: ignore[union-attr]
        keys = torch.randn(2, 2, tokens.n, 5)
        signals = Signals(x, tokens, signals.at, Seen(keys, keys, keys, 1.0), signals.grid, shared=signals.shared,
                          prefix=1, frames=8)  # fmt: skip


def test_tempme_trace() -> None:
    """49 patches, 12 frames, 12 blocks: 2 of each frame in 8 blocks; then clips of 2, 4 and 12 frames: 30 % go where
    they meet and 10 % of the rest, and 10 % in the last block."""
    counts = []
    signals, tokens = video(12, 7, 7, channels=4)
    method, memory, shared = fewer.parse("tempme:joins=2+2+3"), signals.memory, signals.shared
    for layer in range(12):
        keys = torch.randn(2, 2, tokens.n, 5)
        x = torch.randn(2, tokens.n, 4)
        signals = Signals(x, tokens, Place(layer, 12), Seen(keys, keys, keys, 1.0), (7, 7), memory=memory, frames=12,
                          shared=shared)  # fmt: skip
        plan = method.plan(signals, tokens)
        tokens = tokens.after(plan)
        counts.append(tokens.n)
    assert counts[:8] == [12 * (49 - 2 * k) for k in range(1, 9)]
    clip = 66 - 66 * 3 // 10 - 1  # floor(46.2) of 66 stay
    clip = 46 - 4
    four = (84 * 7 // 10) - 5
    twelve = (3 * four * 7 // 10) - int(0.1 * (3 * four * 7 // 10))
    assert counts[8:] == [6 * clip, 3 * four, twelve, twelve - int(0.1 * twelve)]


def test_frames_that_do_not_divide_are_refused_with_a_way_out() -> None:
    signals, tokens = video(5, 2, 2, layer=11)
    with pytest.raises(PlanError, match="cannot join 5 clips by 2"):
        fewer.parse("tempme:first=0.9").plan(signals, tokens)


def test_a_still_clip_leaves_one_moment() -> None:
    clip = torch.randn(2, 3, 1, 16, 16).expand(-1, -1, 8, -1, -1)
    signals, tokens = video(4, 2, 2, pixels=clip)
    plan = fewer.parse("rlt").plan(signals, tokens)
    assert plan.lengths is not None
    assert plan.lengths.tolist() == [4, 4]
    assert_close(plan.sizes(None)[:, :4], torch.full((2, 4), 4.0))


def test_a_motion_of_one_patch_is_kept_where_it_happens() -> None:
    clip = torch.zeros(1, 3, 8, 16, 16)
    clip[:, :, 4:, :8, 8:] = 1  # the upper right patch changes in the third slot of two frames
    signals, tokens = video(4, 2, 2, batch=1, pixels=clip)
    plan = fewer.parse("rlt").plan(signals, tokens)
    assert plan.anchor[0, : int(plan.lengths[0])].tolist() == [0, 1, 2, 3, 9]  # type: ignore[index]
    assert plan.sizes(None)[0, :5].tolist() == [4, 2, 4, 4, 2]


@pytest.mark.parametrize("targets", ["naive", "centre", "boundary", "motion", "learned"])
def test_vtm_targets_are_distinct_and_as_many_as_asked(targets: str) -> None:
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {"saliency": vtm.Saliency(10)} if targets == "learned" else {}
    signals, tokens = video(6, 4, 4, prefix=1, modules=modules, pixels=torch.randn(2, 3, 6, 8, 8))
    plan = fewer.parse(f"vtm:targets={targets},tokens=24").plan(signals, tokens)
    assert plan.m == 25
    for anchor in plan.anchor:
        assert len(anchor.unique()) == 25
        inside = [(int(a) - 1) % 16 in (5, 6, 9, 10) for a in anchor[1:]]
        if targets in ("centre", "boundary"):
            assert sum(inside) == (12 if targets == "centre" else 2)
        if targets == "naive":
            assert anchor[1:].tolist() == [1 + 4 * i for i in range(24)]


def test_vtm_learns_its_direction_through_attention_only() -> None:
    torch.manual_seed(0)
    saliency = vtm.Saliency(10)
    signals, tokens = video(training=True, modules={"saliency": saliency})
    plan = fewer.parse("vtm:targets=learned,tokens=4").plan(signals, tokens)
    policy = plan.policy  # type: ignore[attr-defined]
    assert plan.m == tokens.n
    assert bool((policy > 0.13).all())
    assert bool((policy < 1).all())
    policy.square().sum().backward()
    assert float(saliency.direction.grad.abs().sum()) > 0  # type: ignore[union-attr]
    with torch.no_grad():  # scores that are all equal leave the draw uniform
        saliency.direction.zero_()
    counts = torch.zeros(16)
    for seed in range(400):
        signals, tokens = video(batch=1, modules={"saliency": saliency})
        drawn = fewer.parse(f"vtm:targets=learned,tokens=4,seed={seed}").plan(signals, tokens)
        counts[drawn.anchor[0]] += 1
    assert float((counts - 100).abs().max()) < 45  # 5 standard deviations of a binomial draw


def test_stts_keeps_whole_frames_and_squares() -> None:
    torch.manual_seed(0)
    scorer = stts.Scorer(12, 6)
    signals, tokens = video(8, 4, 4, prefix=1, modules={"scorer": scorer})
    plan = fewer.parse("stts:keep=0.625").plan(signals, tokens)
    place = plan.anchor[:, 1:] - 1
    assert plan.m == 1 + 5 * 16
    frames = place.unflatten(1, (5, 16)) // 16
    assert bool((frames == frames[..., :1]).all())
    assert bool((frames[:, 1:, 0] > frames[:, :-1, 0]).all())
    signals, tokens = video(3, 7, 7, modules={"scorer": stts.Scorer(6, 6)})
    plan = fewer.parse("stts:by=windows,keep=0.6").plan(signals, tokens)
    assert plan.m == 3 * 25  # floor(sqrt(29)) = 5
    for row in plan.anchor.unflatten(1, (3, 25)).flatten(0, 1):
        cell = row % 49
        top, left = int(cell.min()) // 7, int(cell.min()) % 7
        assert cell.tolist() == [(top + i) * 7 + left + j for i in range(5) for j in range(5)]
    assert stts.windows(14, 14, 13).shape == (4, 169)  # the paper's S4-0.9: stride 1, four candidates


def test_stts_finds_a_planted_frame() -> None:
    """The mean pixel as the score: the two bright frames stay."""

    class Bright(stts.Scorer):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., 0]

    x = torch.zeros(1, 6, 4, 3)
    x[:, [1, 4]] = 1
    signals, tokens = video(6, 2, 2, hidden=x.flatten(1, 2), modules={"scorer": Bright(6, 3)})
    plan = fewer.parse("stts:tokens=8").plan(signals, tokens)
    assert (plan.anchor[0] // 4).tolist() == [1] * 4 + [4] * 4


@pytest.mark.parametrize("form", ["stts:keep=0.5", "stts:by=windows,keep=0.6", "ts2_net:keep=0.5"])
def test_training_with_next_to_no_noise_is_the_hard_choice(form: str) -> None:
    method: Any = fewer.parse(form)
    torch.manual_seed(0)
    modules = method.modules(6, 2, 1, 36)
    (scorer,) = modules.values()
    scorer.sigma = 1e-9
    signals, tokens = video(4, 3, 3, modules=modules, prefix=1)
    hard = method.plan(signals, tokens)
    signals, tokens = video(4, 3, 3, modules=modules, prefix=1, training=True)
    soft = method.plan(signals, tokens)
    assert_close(soft.dense(), hard.dense())


def test_gradient_of_the_smoothed_choice() -> None:
    """Against finite differences of the smoothed objective, by common noise; the code's diagonal form differs."""
    torch.manual_seed(0)
    scores, worth, sigma, eps = torch.tensor([[0.3, 0.1, 0.25, 0.0]], dtype=torch.float32), torch.randn(2, 4), 0.3, 0.02

    def value(s: Tensor) -> float:
        y = perturbed_top(s, 2, sigma=sigma, samples=400_000, generator=torch.Generator().manual_seed(1))
        return float((y * worth).sum())

    numeric = torch.stack(
        [torch.tensor((value(scores + eps * e) - value(scores - eps * e)) / (2 * eps)) for e in torch.eye(4)]
    )
    grads = []
    for diagonal in (False, True):
        s = scores.clone().requires_grad_()
        y = perturbed_top(
            s, 2, sigma=sigma, samples=400_000, diagonal=diagonal, generator=torch.Generator().manual_seed(1)
        )
        (y * worth).sum().backward()
        grads.append(s.grad[0])  # type: ignore[index]
    assert_close(grads[0], numeric, atol=0.05, rtol=0.05)
    assert float((grads[1] - grads[0]).abs().max()) > 0.1
    assert_close(y.sum(-1), torch.ones(1, 2))


def test_evad_trace_and_key_frame() -> None:
    """1568 tokens, 196 in each of 8 slots, at 0.7: 1098, 769, 539, the key frame among them every time."""
    n, method = 1568, fewer.parse("evad")
    tokens, at = Tokens.plain(1, n), Place(start=n)
    x = torch.randn(1, n, 4)
    for wanted in (1098, 769, 539):
        k = torch.randn(1, 1, tokens.n, 4)
        signals = Signals(x, tokens, at, Seen(k, k, k, 1.0), (14, 14), frames=8)
        plan = method.plan(signals, tokens)
        x, tokens = plan.reduce(x), tokens.after(plan)
        assert tokens.n == wanted
        assert int((tokens.place() // 196 == 4).sum()) == 196


def test_evad_counts_the_queries_of_the_key_frame() -> None:
    signals, tokens = video(4, 2, 2, prefix=1)
    assert signals.seen is not None
    a = (signals.q @ signals.k.transpose(-1, -2) * signals.seen.scale).softmax(-1).mean(1)  # (B, N, N)
    for weight in (1.0, 4.0):
        rows = torch.ones(17)
        rows[9:13] = weight
        score = (a * rows[:, None]).sum(1)
        score[:, 9:13] = 1e9
        wanted = score[:, 1:].topk(10).indices.sort(-1).values + 1
        plan = fewer.parse(f"evad:tokens=10,weight={weight}").plan(signals, tokens)
        assert torch.equal(plan.anchor[:, 1:], wanted)


@pytest.mark.parametrize("over", ["time", "space", "skip"])
def test_storm_pools_exactly(over: str) -> None:
    signals, tokens = video(8, 4, 4, prefix=1)
    x = signals.hidden[:, 1:].unflatten(1, (8, 4, 4))
    plan = fewer.parse(f"storm:over={over}").plan(signals, tokens)
    squares = x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    wanted = {"time": x.unflatten(1, (2, 4)).mean(2), "space": squares, "skip": x[:, ::4]}[over].flatten(1, 3)
    assert_close(plan.reduce(signals.hidden)[:, 1:], wanted, atol=1e-6, rtol=1e-5)


def test_frames_then_windows_of_what_is_left() -> None:
    """The paper's pair: later methods know which rectangle the earlier ones left."""
    model = tiny_vit("videomae", depth=3)
    forms = ["stts:by=frames,keep=0.5", "stts:by=windows,keep=0.3,layers=1", "testa:r=0,frames=1"]
    with fewer.apply(model, forms, modules="untrained") as session, torch.no_grad():
        model(clips(2))
    assert session.counts == [8, 2, 2]


def test_tokenlearner_summarises_each_frame() -> None:
    method: Any = fewer.parse("tokenlearner:tokens=3")
    torch.manual_seed(0)
    signals, tokens = video(4, 3, 3, prefix=1, modules=method.modules(6, 2, 1, 36))
    plan = method.plan(signals, tokens)
    rows, x = plan.reduce(signals.hidden), signals.hidden
    assert plan.m == 1 + 4 * 3
    assert torch.equal(rows[:, 0], x[:, 0])
    frames = x[:, 1:].unflatten(1, (4, 9))
    made = rows[:, 1:].unflatten(1, (4, 3))
    assert bool((made <= frames.amax(2, keepdim=True) + 1e-6).all())  # in the hull of their own frame
    assert bool((made >= frames.amin(2, keepdim=True) - 1e-6).all())


def test_frames_are_evenly_spread_and_grid_takes_turns() -> None:
    signals, tokens = video(8, 2, 2)
    plan = fewer.parse("frames:keep=0.5").plan(signals, tokens)
    assert (plan.anchor[0] // 4).tolist() == [f for f in (0, 2, 4, 6) for _ in range(4)]
    grid = fewer.parse("grid:keep=0.5,layers=0").plan(signals, tokens)
    counts = torch.bincount(grid.anchor[0] // 4, minlength=8)
    assert counts.tolist() == [2] * 8


# -- bad input --------------------------------------------------------------------------------------------------------
def test_methods_for_videos_say_what_they_miss() -> None:
    vit = tiny_vit("vit", depth=3)
    for form, what in (("rlt", "frames themselves are not known"), ("vtm:targets=motion,layers=1", "not known here")):
        session = fewer.apply(vit, form)
        with pytest.raises(SignalError, match=what):
            vit(torch.randn(1, 3, 32, 32))
        session.remove()


def test_what_reduces_before_must_leave_whole_frames() -> None:
    model = TinyHost("videomae").model()
    with fewer.apply(model, ["random:keep=0.7,layers=0", "testa:r=1"]), pytest.raises(PlanError, match="every frame"):
        model(clips(1))


def test_a_video_of_one_frame_is_defined() -> None:
    for form in ("testa:r=1", "evad:tokens=2", "vtm:tokens=2", "frames:keep=0.5", "storm", "vidtome"):
        signals, tokens = video(1, 2, 2)
        plan = fewer.parse(form).plan(signals, tokens)
        assert 1 <= plan.m <= 4


def test_clips_of_other_sizes_between_calls() -> None:
    """Each pass has the grid of its own clip."""
    model = TinyHost("vjepa2").model()
    with fewer.apply(model, "frames:keep=0.5") as session, torch.no_grad():
        for frames in (8, 4):
            model(torch.randn(1, frames, 3, 16, 16))
            assert session.last.grid == (frames // 2, 2, 2)
            assert session.last.tokens.n == frames // 4 * 4


@pytest.mark.parametrize(
    ("form", "says"),
    [("testa:frames=-1", "frames=-1"), ("tempme:intra=0.9", "intra=0.9"), ("vtm:targets=best", "targets='best'"),
     ("stts:by=pixels", "by='pixels'"), ("evad:weight=-1", "weight=-1"), ("storm:over=all", "over='all'"),
     ("vidtome:stride=0", "stride=0"), ("stts:samples=0", "samples=0")],
)  # fmt: skip
def test_settings_out_of_range(form: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fewer.parse(form)


@reducer("second_half", paper="a test", acts="prune", on="video", training="free")
@dataclass(frozen=True)
class Second(Reducer):
    """The later tokens stay."""

    budget: Budget = Capacity(8)
    layers: tuple[int, ...] | None = (0,)
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return Plan.keep(torch.arange(8, 16).expand(tokens.batch, -1), tokens.n)


def test_v_jepa_2_knows_where_rows_stand() -> None:
    """Its rotary positions follow the rows that are left: keeping the second half of a clip's tokens is what a model
    that was only ever given those, at their places, computes."""
    model: Any = TinyHost("vjepa2").model()
    x = clips(1)
    encoder = model.vjepa2.encoder
    with torch.no_grad():
        embedded = encoder.embeddings(x)
        left = torch.arange(8, 16)
        y = embedded[:, left]
        for layer in encoder.layer:
            y = layer(y, left[None])[0]
        wanted = encoder.layernorm(y)
        with fewer.apply(model, Second()) as session:
            got = model.vjepa2(x, skip_predictor=True).last_hidden_state
    assert session.last.tokens.n == 8
    assert_close(got, wanted, atol=1e-5, rtol=1e-4)
