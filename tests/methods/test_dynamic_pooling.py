"""Dynamic pooling: the plan, what it may see, where its gradient goes, and the model that is built around it."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import fewer
from fewer.core import Place, Signals, Tokens
from fewer.core.plan import Hard, Soft
from fewer.methods.language.dynamic_pooling import (
    SOURCES,
    BoundaryPredictor,
    DynamicPooling,
    PoolingError,
    closed,
    entropy_spikes,
    prior_loss,
    restored,
    segments,
)
from fewer.models.hourglass import UNKNOWN, Hourglass, HourglassError, Settings
from fewer.testing.models import tiny_vit

ALPHABET = UNKNOWN + " " + string.ascii_lowercase
KINDS = [None, *SOURCES]


def drawn(seed: int, batch: int = 4, n: int = 23, share: float = 0.3) -> Tensor:
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) < share


def hourglass(kind: str | None, **changes: object) -> Hourglass:
    """A model in evaluation mode whose predictor, where it has one, is decided but not constant."""
    torch.manual_seed(0)
    method = None if kind is None else f"dynamic_pooling:keep=0.25,layers=1+2,boundaries={kind}"
    model = Hourglass(Settings(ALPHABET, 32, 4, 2, method, **changes)).eval()
    if model.predictor:
        torch.nn.init.normal_(model.predictor["boundaries"].score[-1].weight)
    return model


def text(seed: int, batch: int = 3, n: int = 40) -> Tensor:
    ids = torch.randint(1, len(ALPHABET), (batch, n), generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn(seed, batch, n, 0.2), 1, ids)  # 1 is the blank


# -- the plan ---------------------------------------------------------------------------------------------------------
def slow(x: Tensor, ends: Tensor, null: Tensor) -> Tensor:
    """What each character reads, one after the other: the mean of the last segment that has ended, else null."""
    out = []
    for sample, marks in zip(x, ends, strict=True):
        unfinished, last = [], null
        for value, mark in zip(sample, marks, strict=True):
            unfinished.append(value)
            if mark:
                last, unfinished = torch.stack(unfinished).mean(0), []
            out.append(last)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", [Hard, Soft])
def test_each_character_reads_the_mean_of_the_last_finished_segment(seed: int, form: type) -> None:
    ends, x, null = drawn(seed), torch.randn(4, 23, 5), torch.randn(5)
    plan = segments(ends.float().requires_grad_() if form is Soft else ends)
    assert isinstance(plan, form)
    rows = torch.cat([null.expand(4, 1, 5), plan.reduce(x)], 1)
    assert_close(restored(plan, rows), slow(x, ends, null))


def test_by_hand() -> None:
    plan = segments(torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]))
    third, fifth = 0.0, 1 / 5
    assert_close(
        plan.dense(), torch.tensor([[[0.5, 0.5, 0, 0, 0], [0, 0, 1, third, 0]], [[fifth] * 5, [0, 0, 0, 0, 0]]])
    )
    assert plan.lengths is not None
    assert plan.lengths.tolist() == [2, 1]
    assert closed(plan).tolist() == [[0, 1, 2, 2, 2], [0, 0, 0, 0, 1]]
    assert plan.row.tolist() == [[0, 0, 1, -1, -1], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_averages_and_no_character_counts_twice(seed: int) -> None:
    ends = drawn(seed)
    hard, soft = segments(ends), segments(ends.float().requires_grad_())
    assert_close(hard.dense(), soft.dense())
    matrix = hard.dense()
    real = torch.arange(matrix.shape[1]) < ends.sum(-1, keepdim=True)
    assert_close(matrix.sum(-1), real.float())
    assert int((matrix > 0).sum(1).max()) == 1
    finished = ends.flip(-1).cummax(-1).values.flip(-1)  # some end comes at or behind the character
    assert torch.equal((matrix > 0).any(1), finished)


@pytest.mark.parametrize("carries", [False, True])
def test_without_boundaries_there_is_only_the_null_group(carries: bool) -> None:
    plan = segments(torch.zeros(2, 6).requires_grad_(carries))
    assert plan.lengths is not None
    assert plan.lengths.tolist() == [0, 0]
    assert torch.equal(plan.reduce(torch.randn(2, 6, 3)), torch.zeros(2, 1, 3))
    rows = torch.cat([torch.full((2, 1, 3), 7.0), torch.full((2, 1, 3), torch.nan)], 1)
    assert torch.equal(restored(plan, rows), torch.full((2, 6, 3), 7.0))


def test_every_character_a_segment() -> None:
    x = torch.randn(2, 6, 3)
    plan = segments(torch.ones(2, 6))
    assert torch.equal(plan.reduce(x), x)
    assert torch.equal(restored(plan, torch.cat([torch.zeros(2, 1, 3), x], 1)), x)


# -- the gradient -----------------------------------------------------------------------------------------------------
def test_gradient_by_hand() -> None:
    leaf = torch.tensor([[1.0, 0, 1, 0, 0]]).requires_grad_()
    x = torch.tensor([[[2.0], [5.0], [11.0], [0.0], [9.0]]])
    segments(leaf).reduce(x).sum().backward()
    # Rows: {2}, {5, 11} with mean 8. Raising b_0 raises the weight of 5 and of 11: (5 - 8) / 2 + (11 - 8) / 2 = 0;
    # raising b_1 that of 11 alone: 3 / 2; what comes later is in no finished segment.
    assert_close(leaf.grad, torch.tensor([[0.0, 1.5, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("seed", range(3))
def test_gradient_asks_where_a_segment_is_cut_not_how_it_is_numbered(seed: int) -> None:
    """A boundary hears of its own segment alone, and of the part behind it: the slope is that of the segment's mean
    as the weight of that part grows, by finite differences."""
    ends, x = drawn(seed, 1, 12, 0.25).float(), torch.randn(1, 12, 2, dtype=torch.float64)
    ends[0, -1] = 1
    plan = segments(ends)
    want = torch.randn(1, plan.m, 2, dtype=torch.float64)
    leaf = ends.clone().requires_grad_()
    (segments(leaf).reduce(x) * want).sum().backward()
    assert leaf.grad is not None
    row, h = plan.row[0], 1e-6
    for s in range(12):
        value = []
        for change in (-h, h):
            weight = torch.ones(12, dtype=torch.float64)
            weight[s + 1 :] += change
            mine = (row == row[s]).double() * weight
            value.append((mine / mine.sum() @ x[0] * want[0, row[s]]).sum())
        slope = (value[1] - value[0]) / (2 * h)
        assert_close(leaf.grad[0, s].double(), slope, atol=1e-5, rtol=1e-4)


def test_gradient_of_the_next_character_reaches_the_predictor() -> None:
    torch.manual_seed(0)
    model = Hourglass(Settings(ALPHABET, 16, 3, 2, "dynamic_pooling:keep=0.4,layers=1")).train()
    ids = text(0)
    reading = model(ids[:, :-1])
    assert reading.boundaries is not None
    assert set(reading.boundaries.unique().tolist()) == {0.0, 1.0}
    torch.nn.functional.cross_entropy(reading.logits.transpose(1, 2), ids[:, 1:]).backward()
    for name, parameter in model.predictor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_training_draws_and_evaluation_does_not() -> None:
    model, ids = hourglass("gumbel"), text(1)
    assert model(ids).boundaries.dtype is torch.bool
    assert torch.equal(model(ids).boundaries, model(ids).boundaries)
    model.train()
    assert not torch.equal(model(ids).boundaries, model(ids).boundaries)


@pytest.mark.parametrize("p", [0.05, 0.2, 0.7])
def test_evaluation_keeps_the_share_of_a_predictor_that_is_not_sure(p: float) -> None:
    method, tokens = DynamicPooling(), Tokens.plain(2, 500)
    predictor = torch.nn.ModuleDict({"boundaries": _Says(torch.full((2, 500), p).logit())})
    ends = method.decide(Signals(torch.zeros(2, 500, 1), tokens, Place(), modules=predictor), tokens)
    counts = ends.unfold(1, 100, 50).float().mean(-1)
    assert_close(counts, torch.full_like(counts, p), atol=0.021, rtol=0)


def test_evaluation_takes_a_sure_predictor_at_its_word() -> None:
    method, tokens, sure = DynamicPooling(), Tokens.plain(4, 23), drawn(9)
    predictor = torch.nn.ModuleDict({"boundaries": _Says(torch.where(sure, 9.0, -9.0))})
    assert torch.equal(method.decide(Signals(torch.zeros(4, 23, 1), tokens, Place(), modules=predictor), tokens), sure)


class _Says(torch.nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, _: Tensor) -> Tensor:
        return self.logits


# -- the losses -------------------------------------------------------------------------------------------------------
def test_prior_is_binomial() -> None:
    boundaries = drawn(3, 2, 50).float()
    binomial = torch.distributions.Binomial(50, torch.tensor(0.2))
    assert_close(prior_loss(boundaries, 0.2), -binomial.log_prob(boundaries.sum(-1)).mean() / 50)


def test_prior_pulls_to_its_share() -> None:
    for many, sign in ((30, 1), (2, -1)):
        b = torch.zeros(1, 50)
        b[0, :many] = 1
        b.requires_grad_()
        prior_loss(b, 0.2).backward()
        assert b.grad is not None
        assert (b.grad * sign > 0).all()


def test_spikes_exceed_both_entropies_before() -> None:
    entropy = [1.0, 0.2, 0.5, 0.9, 0.9, 0.1, 1.2]
    scale = [_scale_of(value) for value in entropy]
    logits = torch.tensor(scale)[None, :, None] * torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert entropy_spikes(logits)[0].tolist() == [False, False, False, True, False, False, True]


def _scale_of(entropy: float) -> float:
    """The logit of one of four classes, the others at 0, that gives this entropy, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        p = torch.tensor([middle, 0, 0, 0], dtype=torch.float64).softmax(0)
        low, high = (middle, high) if -(p * p.log()).sum() > entropy else (low, middle)
    return low


def test_predictor_starts_at_the_share() -> None:
    torch.manual_seed(0)
    p = BoundaryPredictor(64, 0.2)(torch.randn(4, 50, 64)).sigmoid()
    assert (p.mean() - 0.2).abs() < 0.03


# -- the model --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_character_changes_nothing_before_it(kind: str | None) -> None:
    model, ids = hourglass(kind), text(2)
    before = model(ids)
    for t in (0, 7, 20, 38, 39):
        for value in (1, 5):
            changed = ids.clone()
            changed[:, t] = torch.where(ids[:, t] == value, value + 1, value)
            after = model(changed)
            assert_close(after.logits[:, :t], before.logits[:, :t], atol=1e-6, rtol=0)
            assert (after.logits[:, t] != before.logits[:, t]).any(-1).all()
            if before.boundaries is not None:
                assert torch.equal(after.boundaries[:, :t], before.boundaries[:, :t])


def test_random_boundaries_leak_nothing_either() -> None:
    """The gradient of logits at n is zero for every later character, whatever the boundaries are."""
    model = hourglass("whitespace")
    for seed in range(4):
        ids = text(seed, 1, 24)
        x = model.embed(ids).detach().requires_grad_()
        model.embed.forward = lambda _, x=x: x  # type: ignore[method-assign]
        n = 11 + seed
        model(ids).logits[0, n].sum().backward()
        assert x.grad is not None
        assert x.grad[0, n + 1 :].abs().max() == 0
        assert x.grad[0, : n + 1].abs().amax(-1).min() > 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_at_a_time_equals_all_at_once(kind: str | None) -> None:
    model, ids = hourglass(kind), text(4)
    together = model(ids)
    state = model.start(*ids.shape)
    alone = torch.stack([model.step(column, state) for column in ids.T], 1)
    assert_close(alone, together.logits, atol=1e-5, rtol=1e-4)
    if together.boundaries is not None:
        assert (together.boundaries.sum(-1) + 1).tolist() == state.inner.length.tolist()
        assert 0 < together.boundaries.float().mean() < 0.9


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation_takes_what_the_whole_pass_finds_likeliest(kind: str | None) -> None:
    model = hourglass(kind)
    prompt = "a word or "
    written = model.generate(prompt, 12, temperature=0)
    logits = model(model.encode(prompt + written)[None]).logits[0, len(prompt) - 1 : -1]
    logits[:, 0] = -torch.inf
    assert model.decode(logits.argmax(-1)) == written


@torch.no_grad()
def test_a_batch_changes_nobody() -> None:
    for kind in SOURCES:
        model, ids = hourglass(kind), text(5)
        together = model(ids).logits
        for i in range(3):
            assert_close(model(ids[i : i + 1]).logits[0], together[i], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_middle_sees_fewer_rows_and_costs_less() -> None:
    model, plain, ids = hourglass("stride"), hourglass(None), text(6)
    seen: list[int] = []
    for i in model.middle:
        model.blocks[i].register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    model(ids)
    assert seen == [11, 11]  # forty characters, a segment each four, the null group
    c, v, n = 32, len(ALPHABET), 40

    def block(m: int) -> float:
        return 24 * c * c * m + 4 * c * m * (m + 1) / 2

    assert plain.flops(n, n) == 4 * block(n) + 2 * n * c * v
    assert model.flops(n, 10) == 2 * block(n) + 2 * block(11) + 2 * n * c * v


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = hourglass("gumbel"), text(7)
    model.save(tmp_path / "full")
    assert torch.equal(Hourglass.from_folder(tmp_path / "full")(ids).logits, model(ids).logits)
    model.save(tmp_path / "half", dtype=torch.float16)
    back = Hourglass.from_folder(tmp_path / "half")
    assert back.embed.weight.dtype is torch.float32
    assert_close(back.embed.weight, model.embed.weight, atol=2e-3, rtol=1e-3)


def test_unknown_characters_are_one_character() -> None:
    model = hourglass(None)
    assert model.decode(model.encode("aЖ b")) == f"a{UNKNOWN} b"
    assert UNKNOWN not in model.generate("abc", 60, generator=torch.Generator().manual_seed(0))


# -- where it fits and where not --------------------------------------------------------------------------------------
SHAPE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 10,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_vit(depth=10),
        lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        lambda: BertModel(BertConfig(**SHAPE)),
    ],
    ids=["vit", "llama", "bert"],
)
def test_other_models_are_refused(build: Callable[[], torch.nn.Module]) -> None:
    with pytest.raises(PoolingError, match=r"a model of its own.*fewer train dynamic_pooling"):
        fewer.apply(build(), "dynamic_pooling")


def test_text_form() -> None:
    method = fewer.parse("dynamic_pooling:keep=0.25,boundaries=stride,layers=1+2+3")
    assert isinstance(method, DynamicPooling)
    assert (method.share, method.stride, method.adaptive, method.learned) == (0.25, 4, False, False)
    assert fewer.text(method) == "dynamic_pooling:keep=0.25,layers=1+2+3,boundaries=stride"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("dynamic_pooling:boundaries=words", "choose gumbel, entropy, unigram, whitespace, stride"),
        ("dynamic_pooling:tokens=5", "share of the characters"),
        ("dynamic_pooling:layers=1+3", "one unbroken run"),
    ],
)
def test_complaints(form: str, message: str) -> None:
    with pytest.raises(PoolingError, match=message):
        fewer.parse(form)


def test_complaints_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(HourglassError, match="acts in block 9, but depth=4"):
        Settings(ALPHABET, depth=4, method="dynamic_pooling")
    with pytest.raises(HourglassError, match="pools with dynamic_pooling, or not at all"):
        Settings(ALPHABET, method="tome")
    with pytest.raises(HourglassError, match="even, whole width"):
        Settings(ALPHABET, width=30, heads=4)
    with pytest.raises(HourglassError, match=r"no folder with an Hourglass; packaged: .*"):
        Hourglass.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"letters": "abc"}')
    with pytest.raises(HourglassError, match="does not describe an Hourglass"):
        Hourglass.from_folder(tmp_path)
    with pytest.raises(HourglassError, match="prompt is empty"):
        hourglass(None).generate("", 3)
    model = hourglass(None)
    state = model.start(1, 1)
    model.step(torch.tensor([2]), state)
    with pytest.raises(HourglassError, match="room for 1 characters"):
        model.step(torch.tensor([2]), state)


def test_stride_counts_from_the_token_position() -> None:
    method = DynamicPooling(boundaries="stride")
    tokens = Tokens.plain(1, 3, position=torch.tensor([[3, 4, 5]]))
    signals = Signals(torch.zeros(1, 3, 2), tokens, Place())
    assert method.decide(signals, tokens).tolist() == [[False, True, False]]
    assert math.isclose(method.share, 0.2)
