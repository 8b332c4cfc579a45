"""PyramidDrop: stages count from the start, and the block ahead says who matters."""

import pytest
import torch

from fewer.core import Group
from fewer.methods.multimodal.pyramiddrop import PyramidDrop
from fewer.spec import parse
from insides import inside, kept, with_visual


def ahead(signals, seed=5):
    """The same signals with a block ahead whose attention is random, and that attention."""
    b, s = signals.visual.hidden.shape[:2]
    full = torch.rand(b, 3, s, s, generator=torch.Generator().manual_seed(seed))
    asked = []

    def peek(queries: Group):
        asked.append(queries)
        return queries.of(full)

    return with_visual(signals, peek=peek), full, asked


def test_the_block_ahead_ranks():
    signals, tokens = inside((12, 12))
    signals, full, _ = ahead(signals)
    plan = PyramidDrop().plan(signals, tokens)
    want = full[:, :, -1, 3:15].mean(1).topk(6).indices.sort().values
    assert torch.equal(plan.anchor, want)


def test_padded_prompts_ask_their_own_last_token_and_count_their_own_rows():
    signals, tokens = inside((12, 9), stages=3)
    signals, full, _ = ahead(signals)
    plan = PyramidDrop().plan(signals, tokens)
    assert plan.lengths.tolist() == [6, 4]
    last = 3 + 9 + 5 - 1
    want = full[1, :, last, 3:12].mean(0).topk(4).indices.sort().values.tolist()
    assert kept(plan, 1) == want


@pytest.mark.parametrize(("stage", "rows"), [(0, 288), (1, 144), (2, 72)])
def test_counts_are_shares_of_the_first_number(stage, rows):
    n = 576 if stage == 0 else 288 // stage
    signals, tokens = inside((n,), stages=3, stage=stage)
    signals, *_ = ahead(signals)
    signals.at.__dict__["start"] = 576
    assert PyramidDrop().plan(signals, tokens).m == rows


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, (7, 15, 23)), (30, (6, 14, 21)), (6, (0, 2, 3)), (4, (0, 1, 2)), (2, (0,)), (1, (0,))]
)
def test_default_layers_scale_with_depth(depth, layers):
    assert PyramidDrop().acts_at(depth) == layers


def test_text_form():
    method = parse("pyramiddrop:layers=1+2,keep=0.5+0.2,of=start")
    assert method.acts_at(32) == (1, 2)
    assert method.budget.ratio == (0.5, 0.2)
