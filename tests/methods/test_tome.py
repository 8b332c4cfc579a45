"""ToMe against its authors' numbers, and cases computed by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import Remove
from vit import Golden, grouping, images, run, signals, tiny_vit

FILES = ("tome_vit_a", "tome_vit_b", "tome_deit_distilled_a", "tome_vit_nocls_a")


def settings():
    for name in FILES:
        golden = Golden.load(name)
        for library in golden.libraries():
            for setting in golden.settings:
                yield pytest.param(golden, library, setting, id=f"{name}-{library}-{setting['tag']}")


def budget(r):
    if isinstance(r, int):
        return Remove(r)
    if len(r) == 2 and abs(r[1]) <= 1:
        return Remove(r[0], inflect=r[1])
    return Remove(tuple(r))


@pytest.mark.parametrize(("golden", "library", "setting"), list(settings()))
def test_golden(golden, library, setting):
    tag, model = setting["tag"], golden.model(library)
    assert_close(run(model, golden.image), golden["unpatched.logits"], atol=1e-4, rtol=0)
    method = fewer.ToMe(budget(setting["r"]), proportional=setting["prop_attn"], fidelity="code")
    with fewer.apply(model, method) as session:
        assert_close(run(model, golden.image), golden[f"{tag}.logits"], atol=1e-4, rtol=0)
        assert session.counts == golden[f"{tag}.counts"].tolist()
        if f"{tag}.origin" in golden:
            origin = golden[f"{tag}.origin"]
            assert torch.equal(grouping(session.origin), grouping(origin))
            # The same size at every input token, whatever the order of the rows.
            mine = session.last.tokens.size.gather(1, session.origin)
            assert_close(mine, golden[f"{tag}.size"].gather(1, origin.long()))


def test_paper_and_code_differ_only_without_a_class_token():
    x = images()
    for kind, same in (("vit", True), ("deit", True), ("siglip", False)):
        answers = []
        for fidelity in ("paper", "code"):
            model = tiny_vit(kind)
            with fewer.apply(model, "tome:r=3", fidelity=fidelity):
                answers.append(run(model, x))
        assert torch.equal(*answers) is same, kind


def test_seven_tokens_by_hand():
    """Of the even ones 4 is 2 degrees from 1 and 2 is 5 degrees from 3; 6 stays; CLS takes no part."""
    angle = torch.tensor([0, 10, 80, 85, 12, 170, 160]) * math.pi / 180
    seen = signals(torch.stack([angle.cos(), angle.sin()], -1))
    plan = fewer.ToMe(Remove(2)).plan(seen, seen.tokens)
    x = torch.arange(7.0)[None, :, None]
    y = plan.reduce(x)
    assert_close(y[0, :, 0], torch.tensor([0, 6, 2.5, 2.5, 5]))
    assert plan.sizes(None).tolist() == [[1, 1, 2, 2, 1]]
    assert_close(plan.restore(y)[0, :, 0], torch.tensor([0, 2.5, 2.5, 2.5, 2.5, 5, 6]))
    assert (y[..., 0] * plan.sizes(None)).sum() == x.sum()


def test_a_merged_row_counts_as_often_as_its_members():
    """Twins merged under proportional attention change nothing; without it they do."""
    model = tiny_vit("vit")
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()
    x = images()
    x.unflatten(3, (4, 8))[:, :, :, 1::2] = x.unflatten(3, (4, 8))[:, :, :, ::2].clone()  # patches 1 = 2, 3 = 4, ...
    want = run(model, x)
    for proportional, same in ((True, True), (False, False)):
        with fewer.apply(model, "tome", r=(8,), proportional=proportional) as session:
            got = run(model, x)
            assert session.counts == [9, 9, 9, 9]
            assert torch.allclose(got, want, atol=1e-5) is same


def test_mass_is_conserved_and_r_0_is_the_model():
    model, x = tiny_vit("vit"), images()
    want = run(model, x)
    with fewer.apply(model, "tome:r=3") as session:
        run(model, x)
        assert_close(session.last.tokens.size.sum(1), torch.full((2,), 17.0))
    with fewer.apply(model, "tome:r=0"):
        assert torch.equal(run(model, x), want)


def test_the_clamp_is_told():
    model = tiny_vit("vit")
    with fewer.apply(model, "tome:r=12") as session:
        run(model, images())
        assert session.counts == [9, 5, 3, 2]
        assert any("12" in note and "8" in note for note in session.ledger.notes)
