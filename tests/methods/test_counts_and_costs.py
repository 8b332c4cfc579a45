"""Counts and GFLOPs that papers print, from our sessions and ledger."""

from functools import cache

import pytest
import torch

import fewer
from fewer.runtime.costs import Entry
from fewer.testing.models import KINDS, Shape
from vit import images, run, tiny_vit

NINTH = ("atc", "kmedoids", "dpc_knn", "cls_topk", "random", "grid", "pool", "radial", "token_transforming")


@cache
def narrow():
    """197 tokens and 12 blocks, as DeiT has, but 24 channels."""
    return tiny_vit("vit", image=224, patch=16, depth=12, width=24, heads=2)


def counts(spec):
    model = narrow()
    with fewer.apply(model, spec) as session:
        run(model, images(1, 224))
        return session.counts


def staged(*after):
    return [197] * 3 + [after[0]] * 3 + [after[1]] * 3 + [after[2]] * 3


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("tome:r=13", list(range(184, 40, -13))),
        ("tome:r=20", [177, 157, 137, 117, 97, 77, 57, 37, 19, 10, 6, 4]),
        ("evit:keep=0.7", staged(1 + 138 + 1, 1 + 98 + 1, 1 + 70 + 1)),
        ("evit:keep=0.7,fuse=false", staged(1 + 138, 1 + 97, 1 + 68)),
        ("ppt", staged(147, 97, 49)),
        *[(f"{name}:keep=0.9", staged(1 + 176, 1 + 158, 1 + 142)) for name in NINTH],
        *[(f"{name}:keep=0.7", staged(1 + 137, 1 + 96, 1 + 67)) for name in NINTH],
    ],
)
def test_counts(spec, want):
    assert counts(spec) == want


@cache
def deit_s():
    """DeiT-S without numbers: shapes are enough for the ledger."""
    with torch.device("meta"):
        return KINDS["vit"](Shape(224, 16, 12, 384, 6, 1000), {}).eval()


def ledger(spec):
    with fewer.apply(deit_s(), spec) as session:
        deit_s()(torch.empty(1, 3, 224, 224, device="meta"))
        return session.ledger


@pytest.mark.parametrize(
    ("spec", "gflops"),
    [
        ("tome:r=0", 4.60),
        ("tome:r=13", 2.70),
        ("evit:keep=0.9", 4.02),
        ("evit:keep=0.8", 3.48),
        ("evit:keep=0.7", 3.03),
        ("evit:keep=0.6", 2.64),
        ("evit:keep=0.5", 2.31),
        ("ppt", 2.94),
    ],
)
def test_published_gflops_of_deit_s(spec, gflops):
    found = ledger(spec)
    assert found.gflops_model == pytest.approx(gflops, abs=0.006)
    assert found.gflops_full == pytest.approx(4.60, abs=0.005)
    assert 0 <= found.gflops_own < 0.03 * found.gflops_model


def test_published_gflops_of_dynamicvit_at_07_without_predictors():
    """It prunes before blocks 3, 6 and 9, so that attention and MLP see the same tokens."""
    found = ledger("tome:r=0")
    found.entries = [Entry(n, n) for n in staged(1 + 137, 1 + 96, 1 + 67)]
    assert found.gflops_model == pytest.approx(2.88, abs=0.005)


@pytest.mark.parametrize("name", ["tome", "tofu", "evit", "ppt", "ats", *NINTH])
def test_a_methods_own_flops_are_told(name):
    """Methods that look at nothing cost nothing; the others say what they cost, and more where tokens are more."""
    blind = name in ("random", "grid", "pool", "radial")
    own = []
    for side in (32, 64):
        model = tiny_vit("vit", image=side)
        layers = "" if fewer.lookup(name).layers is None else ":layers=1"
        with fewer.apply(model, name + layers) as session:
            run(model, images(1, side))
            own.append(session.ledger.gflops_own)
    assert own == [0, 0] if blind else 0 < own[0] < own[1]
