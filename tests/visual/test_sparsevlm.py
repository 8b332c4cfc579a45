"""SparseVLM against its authors' numbers, and cases computed by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fewer.core import Capacity, KeepRatio, Place, Seen, Signals, Tokens, View, Visual
from fewer.methods.multimodal.sparsevlm import OF, PUBLISHED, SparseVLM, division, published, raters, recycled
from insides import alone, inside, kept, with_visual

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="module", params=[0, 1])
def golden(request):
    z = np.load(GOLDENS / "sparsevlm.npz")
    case = f"c{request.param}."
    facts = json.loads(str(z["config"]))["cases"][request.param]
    data = {key[len(case) :]: torch.from_numpy(z[key]) for key in z.files if key.startswith(case)}
    n, t, first = facts["n_visual"], facts["n_text"], facts["v_start"]
    x = data["hidden"]
    length, heads = x.shape[1], facts["heads"]
    index = torch.arange(first, first + n)[None]
    zero = torch.zeros_like(index)
    text = torch.ones(1, length, dtype=torch.bool)
    text[:, first : first + n] = False
    # A query's channels are the logarithms of the attention it pays; keys are unit vectors.
    q = torch.full((1, heads, length, length), 0.0)
    q[:, :, facts["text_start"] : facts["text_start"] + t] = data["attn_text_rows"].clamp_min(1e-30).log()
    k = torch.eye(length).expand(1, heads, length, length)
    view = View(torch.arange(1), index, zero, zero, zero, zero, zero)
    visual = Visual(view, x, text, x, seen=Seen(q, k, k, 1.0))
    signals = Signals(view.of(x), Tokens.plain(1, n), Place(start=n), beside=visual)
    return facts, data, signals


def test_the_authors_raters(golden):
    facts, data, signals = golden
    chosen = raters(signals.visual)[0]
    assert not chosen[: facts["v_start"]].any()  # words in front of the image
    behind = chosen[facts["v_start"] :].nonzero().flatten()
    assert behind.tolist() == sorted(data["rater_text_index"].tolist())


def test_the_authors_scores(golden):
    _, data, signals = golden
    method = SparseVLM()
    assert_close(method._scores(signals.visual, raters(signals.visual))[0], data["relevance"], atol=1e-5, rtol=1e-4)


def test_the_authors_choice_and_averages(golden):
    facts, data, signals = golden
    n = facts["n_visual"]
    method = SparseVLM(Capacity(facts["kept"]), fidelity="code")
    plan = method.plan(signals, signals.tokens)
    assert plan.m == facts["kept"] + facts["clusters"]
    stay = data["keep_mask"].bool()
    row, size = plan.row[0], plan.sizes(None)[0]
    again = torch.zeros(n, dtype=torch.bool)
    again[data["recycled_index"].long()] = True
    assert torch.equal(row >= 0, stay | again)
    made = ~stay[plan.anchor[0]]
    assert int(size[made].sum()) == facts["recycled"]
    assert set(size[~made].tolist()) == {1.0}
    averages = plan.reduce(signals.hidden)[0, made]
    far = torch.cdist(averages, data["recycled_tokens"][0])
    assert far.min(1).values.max() < 1e-4
    assert set(far.argmin(1).tolist()) == set(range(facts["clusters"]))
    assert_close(plan.reduce(signals.hidden)[0, ~made], signals.hidden[0, stay])
    assert again[plan.anchor[0][made]].all()


def test_paper_counts_averages_within_the_budget(golden):
    facts, _, signals = golden
    plan = SparseVLM(Capacity(facts["kept"])).plan(signals, signals.tokens)
    assert plan.m == facts["kept"]
    assert (plan.anchor.diff() > 0).all()
    assert_close(plan.dense().sum(-1), torch.ones(1, plan.m))


@pytest.mark.parametrize("fidelity", ["paper", "code"])
def test_division_steps_down_to_the_budget(fidelity):
    n = torch.arange(1, 700)[:, None]
    rows = torch.minimum(torch.arange(1, 400)[None].expand(699, -1), n)
    stay, again, made = division(n, rows, fidelity)
    gone = n - stay
    assert (again <= gone).all()
    assert (made <= again).all()
    assert (stay >= 1).all()
    if fidelity == "code":
        assert torch.equal(stay, rows)
        wanted = torch.where(gone > 0, (gone * 3 // 10 + 1) // 10 + 1, 0)
        assert torch.equal(made, wanted)
    else:
        assert torch.equal(stay + made, rows)
        free = made < rows // 2
        wanted = torch.where(gone > 0, torch.minimum(gone * 3 // 10 + 1, gone) // 10 + 1, 0)
        assert torch.equal(made[free], wanted[free])


def test_averages_lie_between_their_members_and_stand_at_one():
    x = torch.randn(2, 60, 4)
    scores = torch.rand(2, 60)
    plan = recycled(x, scores, Capacity(20), Tokens.plain(2, 60), at=Place(start=60))
    rows = plan.reduce(x)
    for line in range(2):
        for m in range(20):
            members = x[line, plan.row[line] == m]
            assert_close(rows[line, m], members.mean(0))
            assert plan.row[line, plan.anchor[line, m]] == m


def test_equal_tokens_are_recycled_as_they_are():
    x = torch.ones(1, 50, 4) * 3
    plan = recycled(x, torch.rand(1, 50), Capacity(10), Tokens.plain(1, 50), at=Place(start=50))
    assert_close(plan.reduce(x), torch.ones(1, 10, 4) * 3)


@pytest.mark.parametrize("fidelity", ["paper", "code"])
def test_a_prompt_alone_is_reduced_as_in_a_batch(fidelity):
    lengths = (60, 33, 47)
    method = SparseVLM(fidelity=fidelity)
    signals, tokens = inside(lengths)
    plan = method.plan(signals, tokens)
    rows = plan.reduce(signals.hidden)
    for line, length in enumerate(lengths):
        one, free = alone(lengths, line)
        single = method.plan(one, free)
        assert kept(plan, line) == kept(single)
        assert_close(rows[line, : single.m], single.reduce(one.hidden)[0])
        if fidelity == "paper":
            assert single.m == round(300 / OF * length)


def test_raters_are_chosen_once_and_remain_the_same_words():
    signals, tokens = inside((40, 40))
    method = SparseVLM()
    method.plan(signals, tokens)
    first = signals.memory["raters"]
    later = with_visual(signals, embedded=torch.zeros_like(signals.visual.hidden))
    method.plan(later, tokens)
    assert signals.memory["raters"] is first
    assert later.memory is signals.memory


def test_where_no_word_stands_out_all_rate():
    signals, _ = inside((8,))
    flat = with_visual(signals, embedded=torch.zeros_like(signals.visual.hidden))
    assert raters(flat.visual)[0].tolist() == [False] * 3 + [True] * 5


def test_heads_that_look_at_the_image_most():
    signals, _ = inside((10,), heads=4)
    visual = signals.visual
    paid = visual.attended(visual.last())[0, :, 0]
    chosen = torch.zeros(1, 8, dtype=torch.bool)
    chosen[0, -1] = True  # the last word alone
    best = paid.sum(-1).topk(2).indices
    found = SparseVLM(heads=0.5)._scores(visual, chosen)[0]
    assert_close(found, paid[best].mean(0))


def test_without_recycling_the_best_stay():
    signals, tokens = inside((40,))
    method = SparseVLM(published(64), recycle=False)
    scores = method._scores(signals.visual, raters(signals.visual))[0]
    want = scores.topk(round(66 / 576 * 40)).indices.sort().values.tolist()
    assert kept(method.plan(signals, tokens)) == want


def test_published_counts():
    for name, counts in PUBLISHED.items():
        budget = published(name)
        assert [budget.keep(576, Place(start=576, stage=i)) for i in range(3)] == list(counts)
    with pytest.raises(ValueError, match="tokens=100"):
        published(100)


def test_zeros_and_one_row_do_no_harm():
    signals, tokens = inside((30,))
    blank = torch.zeros_like(signals.visual.hidden)
    blanked = with_visual(replace(signals, hidden=signals.hidden * 0), hidden=blank, embedded=blank)
    plan = SparseVLM(KeepRatio(0.3)).plan(blanked, tokens)
    assert plan.m == 9
    assert plan.reduce(blanked.hidden).isfinite().all()
    assert SparseVLM(Capacity(1)).plan(signals, tokens).m == 1


@pytest.mark.parametrize(("depth", "layers"), [(32, (2, 6, 15)), (30, (2, 6, 14)), (6, (0, 1, 3)), (2, (0, 1))])
def test_default_layers_scale_with_depth(depth, layers):
    assert SparseVLM().acts_at(depth) == layers
