"""DART against a published port, and cases computed by hand."""

from dataclasses import replace

import pytest
import torch

import fewer
from cases import golden
from fewer.core import Capacity, KeepRatio, Place, Seen, SignalError, Signals, Tokens, View, Visual
from fewer.methods.multimodal.dart import DART, largest, unlike
from fewer.testing.vision_language import prompts, tiny_vlm
from insides import alone, inside, kept, with_visual


def port(case):
    """What the port was given: image rows between others, text behind them."""
    z, config = golden("dart_thirdparty")
    facts = config["cases"][case]
    first, n = facts["image_start"], facts["image_length"]
    key, hidden = z[f"c{case}.key"], z[f"c{case}.hidden"]
    index = torch.arange(first, first + n)[None]
    zero = torch.zeros_like(index)
    text = torch.ones(1, hidden.shape[1], dtype=torch.bool)
    text[:, first : first + n] = False
    view = View(torch.arange(1), index, zero, zero, zero, zero, zero)
    visual = Visual(view, hidden, text, seen=Seen(key, key, key, 1.0, causal=True))
    signals = Signals(view.of(hidden), Tokens.plain(1, n), Place(start=n), beside=visual)
    return signals, facts, z[f"c{case}.pivot_order"], z[f"c{case}.kept_index"]


@pytest.mark.parametrize("case", [0, 1])
def test_the_port_in_its_own_order(case):
    """Its pivots stand in an order without a rule; in that order the choice is the same."""
    signals, facts, order, want = port(case)
    first, n = facts["image_start"], facts["image_length"]
    shown = signals.visual.keys.transpose(1, 2).flatten(2)
    real = torch.ones(1, n, dtype=torch.bool)
    mine, _ = largest(shown, real, facts["pivot_image"])
    where, worded = signals.visual.words()
    said = signals.visual.seen.k.transpose(1, 2)[:, where[0]].flatten(2)
    words, _ = largest(said, worded, facts["pivot_text"])
    assert {*(mine[0] + first).tolist(), *where[0, words[0]].tolist()} == set(order.tolist())

    quota = torch.full((1, len(order)), int(n * facts["keep_ratio"] / len(order)))
    pivots = torch.zeros(1, n, dtype=torch.bool).scatter(1, mine, True)
    taken = unlike(signals.hidden, signals.visual.hidden[:, order], quota, ~pivots) | pivots
    assert taken[0].nonzero()[:, 0].tolist() == want.tolist()


@pytest.mark.parametrize("case", [0, 1])
def test_counts(case):
    signals, facts, _, want = port(case)
    image, text, budget = facts["pivot_image"], facts["pivot_text"], KeepRatio(facts["keep_ratio"])
    asked = int(facts["image_length"] * facts["keep_ratio"])
    plan = DART(budget, image, text, fidelity="code").plan(signals, signals.tokens)
    assert len(kept(plan)) == image + asked // (image + text) * (image + text) == len(want)
    plan = DART(budget, image, text).plan(signals, signals.tokens)
    assert plan.m == len(kept(plan)) == asked
    assert plan.lengths is None


def by_hand(signals, line, count, image, text):
    """The paper's sentences, one after the other."""
    visual, index = signals.visual, signals.visual.view.index[line]
    n = len(index) if signals.tokens.valid is None else int(signals.tokens.valid[line].sum())
    words = [i for i in visual.text[line].nonzero()[:, 0].tolist() if i > index[:n].max()]
    norm = visual.seen.k[line].abs().sum((0, 2))
    pivots = sorted(range(n), key=lambda i: -norm[index[i]])[: min(image, count)]
    asked = [int(index[i]) for i in pivots] + sorted(words, key=lambda i: -norm[i])[:text]
    pool, stay, left = [i for i in range(n) if i not in pivots], list(pivots), count - len(pivots)
    for turn, asker in enumerate(asked):
        h = visual.hidden[line, asker]
        pool.sort(key=lambda i: torch.cosine_similarity(h, signals.hidden[line, i], dim=0).item())
        own = left // len(asked) + (turn < left % len(asked))
        stay, pool = stay + pool[:own], pool[own:]
    return sorted(stay)


@pytest.mark.parametrize(
    ("count", "image", "text"), [(7, 2, 3), (5, 4, 4), (3, 4, 4), (1, 4, 4), (9, 1, 0), (11, 2, 9)]
)
def test_by_hand(count, image, text):
    signals, tokens = inside()
    plan = DART(Capacity(count), image, text).plan(signals, tokens)
    for line in range(2):
        assert kept(plan, line) == by_hand(signals, line, count, image, text)


@pytest.mark.parametrize("fidelity", ["paper", "code"])
@pytest.mark.parametrize("budget", [Capacity(6), KeepRatio(0.5), Capacity(12)])
def test_padding_and_other_prompts_change_nothing(budget, fidelity):
    lengths = (12, 7, 1)
    method = DART(budget, 2, 2, fidelity=fidelity)
    together = method.plan(*inside(lengths))
    for line in range(3):
        assert kept(together, line) == kept(method.plan(*alone(lengths, line)))


def test_prompts_without_images_have_no_line():
    signals, tokens = inside((8, 8, 8))
    view = signals.visual.view
    fields = {f: getattr(view, f)[1:] for f in ("sample", "index", "item", "tile", "time", "row", "column")}
    fewer_lines = with_visual(
        replace(signals, hidden=signals.hidden[1:], tokens=Tokens.plain(2, 8)), view=View(**fields)
    )
    mine = DART(Capacity(5)).plan(fewer_lines, fewer_lines.tokens)
    theirs = DART(Capacity(5)).plan(signals, tokens)
    assert torch.equal(mine.anchor, theirs.anchor[1:])


def test_a_flood_of_duplicates_leaves_the_distinct_ones():
    signals, tokens = inside((40,))
    distinct = [2, 9, 10, 31]
    own = signals.hidden[:, distinct].clone()
    signals.hidden[:] = signals.hidden[:, :1].clone()
    signals.hidden[:, distinct] = own
    signals.visual.hidden[:, 3:43] = signals.hidden
    signals.visual.seen.k[:, :, 3] = 9.0  # the pivot is one of the flood
    stays = DART(Capacity(5), image=1, text=0).plan(signals, tokens)
    assert kept(stays) == [0, *distinct]


def test_equal_rows_give_as_many_as_asked():
    signals, tokens = inside()
    signals.hidden[:] = 0
    assert DART(Capacity(7)).plan(signals, tokens).anchor.unique(dim=1).shape == (2, 7)


def test_what_is_refused():
    with pytest.raises(ValueError, match="image=0"):
        DART(image=0)
    with pytest.raises(ValueError, match="choose paper or code"):
        DART(fidelity="port")
    with pytest.raises(ValueError, match="names no count"):
        fewer.parse("dart:fidelity=code,mass=0.5")
    signals, tokens = inside()
    with pytest.raises(SignalError, match="act behind one of its blocks"):
        DART(Capacity(3)).plan(with_visual(signals, seen=None), tokens)


def test_in_a_model():
    model = tiny_vlm("llava")
    with fewer.apply(model, "dart:tokens=6,image=2,text=2") as session, torch.no_grad():
        model(**prompts(model, [1, 2]))
        assert [session.seen(layer).sum(-1).tolist() for layer in (0, 1)] == [[16, 32], [6, 6]]
