"""The text form of a method: what it means, what it refuses, and that it is written as it is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fewer
from fewer.core import Budget, Capacity, KeepRatio, Mass, Remove, Threshold


@pytest.mark.parametrize(
    ("form", "budget"),
    [
        ("tome:r=8", Remove(8)),
        ("tome:r=8+8+4+0", Remove((8, 8, 4, 0))),
        ("tome:r=8,inflect=-1", Remove(8, inflect=-1)),
        ("tome:inflect=1", Remove(8, inflect=1)),
        ("tome:keep=0.9", KeepRatio(0.9)),
        ("evit:keep=0.7", KeepRatio(0.7, rounding="ceil")),
        ("evit:keep=0.7+0.5", KeepRatio((0.7, 0.5), rounding="ceil")),
        ("evit:of=start", KeepRatio(0.7, of="start", rounding="ceil")),
        ("evit:keep=0.5,of=start,rounding=round", KeepRatio(0.5, of="start", rounding="round")),
        ("atc:keep=0.7", KeepRatio(0.7, of="start")),
        ("evit:tokens=64", Capacity(64)),
        ("evit:tokens=128+64", Capacity((128, 64))),
        ("evit:threshold=-0.25", Threshold(-0.25)),
        ("evit:mass=0.9", Mass(0.9)),
        ("evit:keep=1", KeepRatio(1, rounding="ceil")),
    ],
)
def test_a_budget_is_read_in_the_methods_own_convention(form: str, budget: Budget) -> None:
    assert fewer.parse(form).budget == budget


def test_the_other_fields() -> None:
    method = fewer.parse("evit:keep=0.7,fuse=false,layers=3+6+9")
    assert method == fewer.EViT(fuse=False)
    assert fewer.parse("evit: keep = 0.7 , layers = 4 ").layers == (4,)
    assert fewer.parse("evit:layers=none").layers is None
    assert fewer.parse("atc:linkage=complete") == fewer.ATC(linkage="complete")
    assert fewer.parse("ToMe:r=3") == fewer.parse("tome:r=3")
    assert fewer.parse("cls-topk:keep=0.5").card.name == "cls_topk"


def test_text_keywords_and_objects_are_one() -> None:
    assert fewer.parse("evit:keep=0.5,layers=1+2") == fewer.parse("evit", keep=0.5, layers=(1, 2))
    assert fewer.parse("evit", layers=[1, 2]).layers == (1, 2)
    assert fewer.parse(fewer.EViT(layers=(1, 2)), keep=0.5) == fewer.parse("evit:keep=0.5,layers=1+2")
    assert fewer.parse("tome:r=8", r=4).budget == Remove(4), "keywords win over the text"


@pytest.mark.parametrize("name", sorted(fewer.names()))
def test_every_method_reads_what_it_writes(name: str) -> None:
    default = fewer.lookup(name)()
    assert fewer.text(default) == name
    assert fewer.parse(name) == default
    forms = {
        "ott": ("bits=4",),
        "dynamic_pooling": ("keep=0.5",),
        "mini_gemini": ("fine=2",),
        "vtw": ("k=2",),
        "dyvte": ("hidden=32",),
        "rho1": ("keep=0.5",),
        **dict.fromkeys(("tomesd", "sito", "toma", "toca", "duca"), ("ratio=0.25",)),
        "fora": ("every=5",),
        **dict.fromkeys(("teacache", "first_block_cache"), ("threshold=0.5",)),
    }  # all, or a share only
    for form in forms.get(name, ("keep=0.5", "tokens=9", "r=3")):
        method = fewer.parse(f"{name}:{form}")
        assert fewer.parse(fewer.text(method)) == method


@given(
    r=st.one_of(st.integers(0, 10**6), st.lists(st.integers(0, 99), min_size=1, max_size=5).map(tuple)),
    inflect=st.floats(-1, 1),
    layers=st.one_of(st.none(), st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple)),
)
def test_tome_reads_what_it_writes(r: int | tuple[int, ...], inflect: float, layers: tuple[int, ...] | None) -> None:
    method = fewer.ToMe(Remove(r, inflect), layers=layers)
    assert fewer.parse(fewer.text(method)) == method


@given(ratio=st.floats(0, 1, exclude_min=True), of=st.sampled_from(["current", "start"]), fuse=st.booleans())
def test_evit_reads_what_it_writes(ratio: float, of: str, fuse: bool) -> None:
    method = fewer.EViT(KeepRatio(ratio, of=of, rounding="floor"), fuse=fuse)  # type: ignore[arg-type]
    assert fewer.parse(fewer.text(method)) == method


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("tome:r", r"'r' in 'tome:r' is not key=value; write for example tome:keep=0.7"),
        ("tome:radius=3", r"tome has no parameter 'radius'.* It takes layers, proportional"),
        ("evit:fuze=true", r"evit has no parameter 'fuze'; did you mean fuse\?"),
        ("tome:r=abc", r"r=abc: r takes a number, or numbers joined by \+"),
        ("tome:r=", r"r=: r takes a number"),
        ("evit:keep=true", r"keep=true: keep takes a number"),
        ("tome:r=3,keep=0.5", r"r and keep both say how many stay; give one"),
        ("tome:r=3,r=4", r"r is given twice in 'tome:r=3,r=4'"),
        ("evit:mass=0.5+0.6", r"mass=0.5\+0.6: mass takes one number"),
        ("evit:inflect=1", r"inflect shapes the schedule of r; give r too"),
        ("tome:of=start", r"of would say how `keep` counts; give keep too"),
        ("evit:fuse=maybe", r"evit: fuse=maybe does not fit; fuse takes true or false"),
        ("evit:layers=1.5", r"evit: layers=1.5 does not fit; layers takes whole numbers joined by \+ or none"),
        ("evit:layers=a", r"evit: layers=a does not fit"),
        ("ppt:tau=x", r"ppt: tau=x does not fit; tau takes a number"),
        ("kmedoids:iterations=0.5", r"iterations=0.5 does not fit; iterations takes a whole number"),
        ("tome:budget=3", r"tome: budget=3 does not fit; budget takes a budget"),
    ],
)
def test_what_a_text_form_refuses(form: str, message: str) -> None:
    with pytest.raises(fewer.SpecError, match=message):
        fewer.parse(form)


@pytest.mark.parametrize("method", [3, None, fewer.ToMe, b"tome"])
def test_what_is_no_method(method: object) -> None:
    with pytest.raises(fewer.SpecError, match=r"is no method; give a name such as 'tome', a text form, or a reducer"):
        fewer.parse(method)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "near"), [("tomme", "tome"), ("evot", "evit"), ("dynamic-vit", "dynamicvit"), ("dpcknn", "dpc_knn")]
)
def test_an_unknown_method_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(
        fewer.UnknownMethod, match=rf"no method named '{name}'; did you mean .*{near}.*\(fewer list shows all"
    ):
        fewer.parse(name)


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(fewer.UnknownMethod, match=r"^no method named 'xyzzy' \(fewer list shows all \d+\)$"):
        fewer.parse("xyzzy:r=3")
