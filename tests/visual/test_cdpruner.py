"""CDPruner against its authors' numbers, brute force, and cases computed by hand."""

import pytest
import torch
import torch.nn.functional as F

import fewer
from cases import golden, normal
from fewer.core import Capacity, KeepRatio, Place, PlanError, Tokens, select
from fewer.core.visual.question import spread_out
from fewer.methods.multimodal.cdpruner import CDPruner
from insides import alone, inside, kept, with_visual


def guided(signals, pieces=1):
    """With a joint space: the first channels of the rows, and questions drawn for each."""
    asked = normal(99, 1, pieces, 5).expand(signals.hidden.shape[0], -1, -1)
    return with_visual(signals, guide=(signals.hidden[..., :5], asked))


def pairs(x):
    unit = F.normalize(x.double(), dim=-1)
    return unit @ unit.transpose(-1, -2)


@pytest.mark.parametrize("case", [0, 1])
def test_the_authors(case):
    """Their relevance is scaled over the whole batch; the selection given it is ours."""
    z, config = golden("cdpruner")
    x, image, text = (z[f"c{case}.{name}"] for name in ("features", "image_embeds", "text_embeds"))
    similar = -(F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).mean(-1)
    r = (similar - similar.min() + 1e-6) / (similar.max() - similar.min())
    tokens = Tokens.plain(*x.shape[:2])
    plan = select.dpp(x, r, Capacity(config["cases"][case]["keep"]), tokens, at=Place())
    assert plan.anchor.tolist() == z[f"c{case}.selected"].tolist()


@pytest.mark.parametrize("case", [0, 1])
def test_the_authors_one_image_at_a_time(case):
    z, config = golden("cdpruner")
    x, image, text = (z[f"c{case}.{name}"] for name in ("features", "image_embeds", "text_embeds"))
    r, n = x.shape[:2]
    signals, tokens = inside((n,) * r, d=x.shape[-1])
    signals.hidden = x
    signals = with_visual(signals, guide=(image, text.expand(r, -1, -1)))
    plan = CDPruner(Capacity(config["cases"][case]["keep"])).plan(signals, tokens)
    if case == 0:
        assert plan.anchor.tolist() == z["c0.selected"].tolist()
    assert plan.m == z[f"c{case}.selected"].shape[1]
    for line in range(r):  # in a batch of one, scaled over the batch is scaled over the line
        similar = -(F.normalize(image[line], dim=-1) @ F.normalize(text, dim=-1).T).mean(-1)
        quality = (similar - similar.min() + 1e-6) / (similar.max() - similar.min())
        want = select.dpp(x[line, None], quality[None], Capacity(plan.m), Tokens.plain(1, n), at=Place())
        assert kept(plan, line) == kept(want)


@pytest.mark.parametrize("seed", range(8))
def test_every_choice_is_the_one_that_makes_the_determinant_largest(seed):
    x, quality = normal(seed, 1, 10, 6), normal(seed + 100, 1, 10).sigmoid()
    kernel = quality[0, :, None].double() * pairs(x)[0] * quality[0].double()
    some: list[int] = []
    for _ in range(5):
        left = [i for i in range(10) if i not in some]
        some.append(max(left, key=lambda i: kernel[[*some, i]][:, [*some, i]].det().item()))
    assert kept(select.dpp(x, quality, Capacity(5), Tokens.plain(1, 10), at=Place())) == sorted(some)


def test_beyond_the_rank_quality_decides():
    x = torch.eye(3).repeat(1, 4, 1)
    quality = torch.tensor([[3.0, 3, 3, 2, 1, 1, 0, 0, 2.5, 1, 1.5, 0]])
    plan = select.dpp(x, quality, Capacity(6), Tokens.plain(1, 12), at=Place())
    assert kept(plan) == [0, 1, 2, 3, 8, 10]


@pytest.mark.parametrize("x", [torch.ones(1, 9, 4), torch.zeros(1, 9, 4), torch.full((1, 9, 4), torch.nan)])
def test_equal_and_empty_tokens_give_as_many_as_asked(x):
    plan = select.dpp(x, torch.ones(1, 9), Capacity(4), Tokens.plain(1, 9), at=Place())
    assert kept(plan) == [0, 1, 2, 3]
    assert len(set(kept(select.dpp(x.bfloat16(), torch.zeros(1, 9), Capacity(4), Tokens.plain(1, 9), at=Place())))) == 4


def test_a_factor_common_to_all_changes_nothing():
    x, quality = normal(1, 2, 30, 8), normal(2, 2, 30).sigmoid()
    plans = [select.dpp(x, quality * f, Capacity(9), Tokens.plain(2, 30), at=Place()) for f in (1, 1e-12, 1e12)]
    assert plans[0].anchor.tolist() == plans[1].anchor.tolist() == plans[2].anchor.tolist()


def test_disagreeing_lengths_are_refused():
    with pytest.raises(PlanError, match="scores are for 5 tokens, the sequence has 6"):
        select.dpp(normal(0, 1, 6, 3), torch.ones(1, 5), Capacity(2), Tokens.plain(1, 6), at=Place())


def test_the_question_decides_which_way_as_told():
    """One direction per token: diversity is silent, relevance ranks."""
    signals, tokens = inside((4,), d=4)
    signals.hidden = torch.eye(4)[None]
    asked = torch.tensor([[[4.0, 3, 2, 1]]])
    signals = with_visual(signals, guide=(torch.eye(4)[None], asked))
    assert kept(CDPruner(Capacity(2)).plan(signals, tokens)) == [2, 3]
    assert kept(CDPruner(Capacity(2), negate=False).plan(signals, tokens)) == [0, 1]
    signals = with_visual(signals, guide=None)
    signals.visual.hidden[:, -5:] = torch.tensor([1.0, 2, 3, 4])  # the words behind the image
    assert kept(CDPruner(Capacity(2)).plan(signals, tokens)) == [2, 3]
    assert kept(CDPruner(Capacity(2), negate=True).plan(signals, tokens)) == [0, 1]


def test_pieces_of_a_question_are_averaged():
    signals, tokens = inside((12,))
    pieces = normal(3, 1, 3, 5)
    one = F.normalize(pieces, dim=-1).mean(1, keepdim=True)
    rows = signals.hidden[..., :5]
    a, b = (with_visual(signals, guide=(rows, q)) for q in (pieces, one))
    assert kept(CDPruner(Capacity(5)).plan(a, tokens)) == kept(CDPruner(Capacity(5)).plan(b, tokens))


def test_theta_goes_from_diversity_to_relevance():
    signals, tokens = inside((40,), d=16)
    signals = guided(signals)
    plain = select.dpp(signals.hidden, torch.ones(1, 40), Capacity(6), tokens, at=Place())
    assert kept(CDPruner(Capacity(6), theta=0).plan(signals, tokens)) == kept(plain)
    rows, asked = signals.visual.guide
    order = F.cosine_similarity(rows, asked, dim=-1)[0].argsort()
    assert set(kept(CDPruner(Capacity(3), theta=0.98).plan(signals, tokens))) == set(order[:3].tolist())
    with pytest.raises(ValueError, match=r"theta=1.* outside \[0, 1\)"):
        CDPruner(theta=1)


@pytest.mark.parametrize("guide", [True, False])
@pytest.mark.parametrize("budget", [Capacity(4), KeepRatio(0.5), Capacity(50)])
def test_padding_and_other_images_change_nothing(guide, budget):
    lengths = (12, 5, 1)
    prepare = guided if guide else lambda signals: signals
    signals, tokens = inside(lengths)
    together = CDPruner(budget).plan(prepare(signals), tokens)
    for line in range(3):
        signals, tokens = alone(lengths, line)
        assert kept(together, line) == kept(CDPruner(budget).plan(prepare(signals), tokens))


def test_equal_scores_are_all_one():
    assert spread_out(torch.full((1, 3), 0.7), None).tolist() == [[1, 1, 1]]
    assert spread_out(torch.tensor([[2.0, 4, 9]]), torch.tensor([[True, True, False]]))[0, :2].round().tolist() == [
        0,
        1,
    ]


def test_its_name():
    assert fewer.parse("cdpruner:tokens=64") == CDPruner()
    assert fewer.text(CDPruner(negate=True, theta=0.5)) == "cdpruner:theta=0.5,negate=true"
