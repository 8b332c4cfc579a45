"""Top-K: EViT without its fused token."""

import torch

import fewer
from fewer.core import Capacity, KeepRatio
from vit import images, run, signals, tiny_vit


def test_by_hand():
    seen = signals(torch.tensor([[9.0], [1.0], [3.0], [2.0], [0.0]]))
    assert fewer.ClsTopK(Capacity(2)).plan(seen, seen.tokens).anchor.tolist() == [[0, 2, 3]]


def test_it_is_evit_without_fusion():
    model, x = tiny_vit("vit"), images()
    answers = []
    for method in (
        fewer.ClsTopK(KeepRatio(0.5), (1, 2)),
        fewer.EViT(KeepRatio(0.5), (1, 2), fuse=False),
    ):
        with fewer.apply(model, method) as session:
            answers.append(run(model, x))
            assert session.counts == [17, 9, 5, 5]
    assert torch.equal(*answers)


def test_a_distillation_token_stays_and_is_not_counted():
    model, x = tiny_vit("deit"), images()
    with fewer.apply(model, "cls_topk:keep=0.5,layers=1+2") as session:
        run(model, x)
        assert session.counts == [18, 10, 6, 6]
        assert session.kept(3)[:, :2].tolist() == [[0, 1], [0, 1]]
