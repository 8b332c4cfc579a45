"""PPT against its authors' numbers, and its choice between the branches."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import Remove
from vit import Golden, images, run, signals, tiny_vit


def settings():
    golden = Golden.load("ppt_vit_a")
    for library in golden.libraries():
        for setting in golden.settings:
            yield pytest.param(golden, library, setting, id=f"{library}-{setting['tag']}")


@pytest.mark.parametrize(("golden", "library", "setting"), list(settings()))
def test_golden(golden, library, setting):
    tag, model = setting["tag"], golden.model(library)
    method = fewer.PPT(
        Remove(golden.config["r"]), tuple(golden.config["pp_blocks"]), tau=setting["threshold"],
        proportional=setting["prop_attn"], fidelity="code",
    )  # fmt: skip
    with fewer.apply(model, method) as session:
        assert_close(run(model, golden.image), golden[f"{tag}.logits"], atol=1e-4, rtol=0)
        assert session.counts == golden[f"{tag}.counts"].tolist()
        pruned = [(step.plan.row < 0).any(-1).int().tolist() for step in session.last.steps]
        assert pruned == setting["pruned_by_block"]
        if setting["prop_attn"]:
            assert_close(session.last.tokens.size, golden[f"{tag}.size"])


@pytest.mark.parametrize("tag", ["t0_prop1", "t2_prop1"])
def test_the_variance_is_the_authors(tag):
    """tau just above and just below each image's variance flips that image's branch and no other's."""
    golden = Golden.load("ppt_vit_a")
    model, variance = golden.model("timm"), golden[f"{tag}.score_var"][0]
    for factor, flat in ((1 + 1e-4, True), (1 - 1e-4, False)):
        for image in range(3):
            with fewer.apply(model, "ppt:layers=1", r=9, tau=variance[image].item() * factor) as session:
                run(model, golden.image)
            pooled = (session.last.steps[0].plan.row >= 0).all(-1)
            want = variance < variance[image] * factor
            assert torch.equal(pooled, want)
            assert pooled[image].item() is flat


def test_one_flat_and_one_peaked_image_do_not_meet():
    """A batch of two branches equals two single runs, exactly where it is decided."""
    flat, peaked = torch.randn(1, 13, 4), torch.randn(1, 13, 4)
    flat[..., 0] = 0
    peaked[..., 0] = 0
    peaked[:, 5, 0] = 8
    ones = torch.ones(1, 13, 2)
    both = signals(torch.cat([flat, peaked]), v=ones.expand(2, 13, 2))
    method = fewer.PPT(Remove(4), tau=1e-3)
    plan = method.plan(both, both.tokens)
    x = torch.randn(2, 13, 3)
    assert (plan.row >= 0).all(-1).tolist() == [True, False]
    for i, k in enumerate((flat, peaked)):
        alone = signals(k, v=ones)
        assert_close(method.plan(alone, alone.tokens).reduce(x[i : i + 1]), plan.reduce(x)[i : i + 1])


def test_the_two_ends_are_tome_and_pruning():
    model, x = tiny_vit("vit"), images()
    answers = {}
    for name, spec in {
        "pool": "ppt:r=4,layers=1+2,tau=1e9", "tome": "tome:r=4,layers=1+2", "prune": "ppt:r=4,layers=1+2,tau=0",
    }.items():  # fmt: skip
        with fewer.apply(model, spec) as session:
            answers[name] = run(model, x)
            assert session.counts == [17, 13, 9, 9]
            dropped = (session.origin < 0).sum(1).tolist()
            assert dropped == ([8, 8] if name == "prune" else [0, 0])
    assert torch.equal(answers["pool"], answers["tome"])


def test_pruning_ranks_by_attention_times_value_norm():
    attention = torch.tensor([0.2, 0.3, 0.1, 0.25, 0.15]).log()[None, :, None]
    v = torch.tensor([1.0, 1.0, 4.0, 0.1, 1.0])[None, :, None]  # scores of the patches: .3 .4 .025 .15
    seen = signals(attention, v=v)
    method = fewer.PPT(Remove(2), tau=0)
    assert_close(method.score(seen, seen.tokens), torch.tensor([[0, 0.3, 0.4, 0.025, 0.15]]) / 0.875)
    assert method.plan(seen, seen.tokens).anchor.tolist() == [[0, 1, 2]]


def test_the_scale_free_form_does_not_depend_on_the_number_of_tokens():
    """Fifty copies of the same scores: the variance falls by about 2500, N^2 times the variance hardly."""
    few = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    few, many = few / few.sum(), few.repeat(1, 50) / (50 * few.sum())
    variance = few.var().item()

    def flat(scores, tau, scale_free):
        tokens = signals(torch.zeros(1, scores.shape[1], 1), prefix=0).tokens
        return fewer.PPT(tau=tau, scale_free=scale_free).flat(scores, tokens).item()

    assert [flat(s, variance * 0.99, False) for s in (few, many)] == [False, True]
    assert [flat(s, variance * 25 * 1.01, True) for s in (few, many)] == [True, True]
    assert [flat(s, variance * 25 * 0.79, True) for s in (few, many)] == [False, False]


def test_a_request_for_more_than_half_is_cut_short_in_both_branches():
    model = tiny_vit("vit")
    for tau in (0.0, 1e9):
        with fewer.apply(model, "ppt:layers=1", r=50, tau=tau) as session:
            run(model, images())
            assert session.counts == [17, 9, 9, 9]


def test_tau_is_checked():
    with pytest.raises(ValueError, match="cannot be negative"):
        fewer.PPT(tau=-1.0)
