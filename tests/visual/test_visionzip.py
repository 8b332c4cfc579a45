"""VisionZip against its authors' numbers, and cases computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fewer.core import Capacity, KeepRatio
from fewer.methods.multimodal.visionzip import VisionZip
from towers import call, cut_view, kept, part, shown, whole_view

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "visionzip.npz")
CASES = json.loads(str(GOLDEN["config"]))["cases"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    get = {k: torch.from_numpy(GOLDEN[f"c{case['case']}.{k}"]) for k in ("cls_attn", "hidden", "key_mean", "tokens")}
    dominant, contextual = case["dominant"], case["contextual"]
    r, n, h = case["B"], case["N"] - 1, get["cls_attn"].shape[1]
    keys = get["key_mean"][:, None, 1:].expand(r, h, n, -1)
    signals, tokens = shown(
        {2: call(get["cls_attn"][..., 1:], keys)}, whole_view(r, 1, n),
        features=get["hidden"][:, 1:], cls=get["hidden"][:, 0],
    )  # fmt: skip
    total = 1 + dominant + contextual
    method = VisionZip(Capacity(total), contextual=contextual / total)
    plan = method.plan(signals, tokens)
    assert plan.m == total
    assert plan.lengths is None
    rows = plan.reduce(signals.visual.features)
    for line in range(r):
        best = sorted(i - 1 for i in GOLDEN[f"c{case['case']}.all_indices"][line].tolist()[1:])
        where = plan.position[line].tolist()
        assert where == sorted(set(where))
        alone = (plan.matrix[line] != 0).sum(-1) == 1
        assert set(best) <= {i for i, one in zip(where, alone.tolist(), strict=True) if one}
        mine = torch.tensor([where.index(i) for i in best])
        assert_close(rows[line, mine], get["tokens"][line, 1 : 1 + dominant], atol=1e-5, rtol=1e-5)
        empty = (plan.matrix[line] == 0).all(-1)
        assert empty.sum() == 1  # the class token's
        melted = torch.tensor([i for i in range(total) if i not in mine.tolist() and not empty[i]])
        assert_close(rows[line, melted], get["tokens"][line, 1 + dominant :], atol=1e-5, rtol=1e-5)
    made = method.rows(signals, plan)
    empty = (plan.matrix == 0).all(-1)
    assert_close(made[empty], signals.visual.project(get["hidden"][:, 0]), atol=1e-4, rtol=1e-5)
    assert_close(made[~empty], signals.visual.project(rows)[~empty], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("budget", "melted"), [(64, 10), (128, 20), (192, 30), (1, 0), (4, 1)])
def test_published_splits(budget, melted):
    paid = torch.rand(1, 256) + 0.1
    signals, tokens = shown({2: call(paid, torch.randn(1, 1, 256, 4))}, whole_view(1, 16, 16))
    plan = VisionZip(Capacity(budget)).plan(signals, tokens)
    assert plan.m == budget
    dominant = set(paid[0].topk(max(budget - 1 - melted, 0)).indices.tolist())
    others = set(kept(plan)[0]) - dominant
    assert len(others) == melted + 1  # and the class token's place
    assert (plan.matrix[0] == 0).all(-1).sum() == 1


def test_sum_and_mean_by_hand():
    paid = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1]])
    keys = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0.1], [0.9, 0]])[None, None]
    for summed, own, other in ((True, 1.0, 0.5), (False, 1 / 3, 1 / 3)):
        signals, tokens = shown({2: call(paid, keys)}, whole_view(1, 1, 5), cls=False)
        plan = VisionZip(Capacity(3), contextual=1 / 3, summed=summed).plan(signals, tokens)
        assert kept(plan) == [[0, 1, 2]]  # no class token: two dominant ones, the third takes the rest
        assert_close(plan.matrix[0], torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, own, other, other]]))


def test_targets_stand_evenly_among_the_rest():
    """Nine tokens: one dominant, of the other eight the first six are targets (every one), two join them."""
    paid = torch.arange(9, 0, -1.0)[None]
    signals, tokens = shown({2: call(paid, torch.randn(1, 1, 9, 4))}, whole_view(1, 3, 3))
    plan = VisionZip(Capacity(8), contextual=6 / 8).plan(signals, tokens)
    assert kept(plan) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert_close(plan.matrix[0, :7, :7], torch.eye(7))
    assert (plan.matrix[0, 7] == 0).all()
    assert (plan.matrix[0, 1:7, 7:] > 0).sum(0).tolist() == [1, 1]


def test_what_fits_is_left_alone():
    signals, tokens = shown({2: call(torch.rand(2, 6) + 0.1)}, whole_view(2, 2, 3))
    method = VisionZip(Capacity(6))
    plan = method.plan(signals, tokens)
    assert torch.equal(method.rows(signals, plan), signals.hidden)


def test_padding_changes_nothing():
    lengths = [30, 13, 4, 1]
    signals, tokens = shown(
        {2: call(torch.rand(4, 30) + 0.1, torch.randn(4, 2, 30, 4).mean(1, keepdim=True))},
        whole_view(4, 5, 6),
        lengths=lengths,
    )
    for method in (VisionZip(Capacity(8), contextual=0.4), VisionZip(KeepRatio(0.5), summed=False)):
        plan = method.plan(signals, tokens)
        rows, together = method.rows(signals, plan), kept(plan)
        for line, length in enumerate(lengths):
            one, only = part(signals, line, length)
            alone = method.plan(one, only)
            assert kept(alone) == [together[line]]
            if alone.m < length:
                assert_close(method.rows(one, alone)[0], rows[line, : alone.m])


def test_the_class_token_is_the_whole_views():
    view = cut_view(2, (1, 2))
    signals, tokens = shown({2: call(torch.rand(1, 12) + 0.1)}, view, cls=torch.randn(3, 6))
    for moved in (0, 8):  # the whole view may also stand behind its crops
        view.__dict__["tile"] = torch.arange(3).repeat_interleave(4).roll(moved)[None]
        method = VisionZip(Capacity(5))
        plan = method.plan(signals, tokens)
        empty = (plan.matrix[0] == 0).all(-1)
        token = signals.visual.encoder().cls[moved // 4]
        assert_close(method.rows(signals, plan)[0, empty], signals.visual.project(token[None]))


def test_bad_input():
    with pytest.raises(ValueError, match=r"contextual=1\.5"):
        VisionZip(contextual=1.5)
