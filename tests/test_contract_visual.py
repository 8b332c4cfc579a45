"""One contract for every method on visual tokens, on every kind of vision-language model it can run on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer.core import Budget, Capacity, Plan, Signals, Tokens, VisualReducer, select
from fewer.core.visual import acts_on_visual_rows
from fewer.testing.vision_language import alone, prompts, tiny_vlm

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
BATCH = (1, 0, 2)  # images of each prompt

# A moderate reduction of the 16 tokens of an image of the tiny LLaVA, and how many stay: of each image, or of a prompt
# with one image; None = what scores or modules say.
FORMS: dict[str, int | None] = {
    "random:site=bridge,tokens=6": 6, "grid:site=bridge,tokens=6": 6, "pool:site=bridge,tokens=6": 6,
    "divprune:tokens=6": 6, "cdpruner:tokens=6": 6, "trim:tokens=6": 6, "trim": None, "fastervlm:tokens=6": 6,
    "visionzip:tokens=6": 6, "prumerge:tokens=6": 6, "prumerge": None, "prumerge:plus=true": None,
    "vispruner:tokens=6": 6, "hired:keep=0.4": 6, "holov:tokens=6": 6, "globalcom:keep=0.4": 6,
    "vscan:tokens=6,window=2,shallow=0": 6, "m3:tokens=4": 4, "setok:tokens=6": 6, "setok": None,
    "fastv:keep=0.4,k=1": 6, "dart:tokens=6,layers=1": 6, "topv:tokens=6,layer=1": 6,
    "pyramiddrop:layers=0+1+2": 2, "sparsevlm:layers=0+1+2": None, "vtw:k=2": 0,
    "tokenpacker:tokens=4": 4, "honeybee_c:tokens=4": 4, "honeybee_d:tokens=4,depth=1": 4, "mini_gemini": 16,
    "brave:tokens=4,depth=1,heads=2": 4, "llama_vid": 2, "hicom:group=1+2+2,queries=2": 6, "dynamic_llava:k=1": 3,
    "dyvte": None, "fitprune": None, "framefusion": None,
    "evs": None, "dycoke": None, "prunevid": None, "llava_scissor:threshold=0.3": None, "fastvid:keep=0.4": None,
}  # fmt: skip
# Those that look at projected tokens alone run on every family.
ANYWHERE = (
    "random:site=bridge,tokens=3", "divprune:tokens=3", "cdpruner:tokens=3", "m3:tokens=1", "fastv:keep=0.5,k=1",
    "dart:tokens=3,layers=1", "pyramiddrop:layers=0+1+2", "vtw:k=2",
)  # fmt: skip
OTHERS = ("llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")


@cache
def _built(name: str) -> nn.Module:
    return tiny_vlm(name)


@dataclass(frozen=True)
class Case:
    """A method on a model."""

    form: str | VisualReducer
    host: str = "llava"

    def model(self) -> Any:
        return copy.deepcopy(_built(self.host))

    def session(self, model: nn.Module, **options: Any) -> Any:
        method = fewer.parse(self.form)
        if isinstance(method, VisualReducer) and type(method).parts is not VisualReducer.parts:
            options["modules"] = "untrained"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return fewer.apply(model, method, **options)

    def run(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        model = self.model()
        with torch.no_grad(), self.session(model, **options):
            return model(**inputs, use_cache=False).logits


# -- checks -----------------------------------------------------------------------------------------------------------
def text_stays(case: Case) -> None:
    """Text and separators stay, rows ascend, no row is there twice."""
    model = case.model()
    with torch.no_grad(), case.session(model) as session:
        model(**prompts(model, BATCH), use_cache=False)
        run = session.last
        kept = run.kept(len(session.host.blocks) - 1)
        real = prompts(model, BATCH)["attention_mask"].bool()
        for b, row in enumerate(kept):
            row = row[row >= 0]
            assert bool((row.diff() > 0).all()), f"rows of prompt {b} do not ascend: {row.tolist()}"
            text = (real[b] & ~session.layout.visual[b]).nonzero()[:, 0]
            missing = set(text.tolist()) - set(row.tolist())
            assert not missing, f"text rows {sorted(missing)} of prompt {b} are gone"


def budget_is_met(case: Case) -> None:
    """As many visual rows reach the last block as were asked for."""
    wanted = FORMS.get(str(case.form), 6)
    model = case.model()
    with torch.no_grad(), case.session(model) as session:
        model(**prompts(model, [1]), use_cache=False)
        left = int(session.seen().sum())
        if wanted is not None:
            assert left == wanted, f"{left} visual rows reach the end, {wanted} were asked for"
        assert 0 <= left <= 16


def batch_changes_nobody(case: Case) -> None:
    """A prompt's answer depends neither on its neighbours nor on padding."""
    model = _built(case.host)
    inputs = prompts(model, BATCH)
    if not case.host.startswith("qwen"):  # as generate() gives them; a prompt's first word stands at 0 in a batch too
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together = case.run(inputs)
    for i in range(len(BATCH)):
        own = case.run(alone(model, BATCH, i))
        assert_close(own[0], together[i, -own.shape[1] :], **CLOSE, msg=lambda m, i=i: f"prompt {i}: {m}")  # type: ignore[misc]


def masked_equals_dropped(case: Case) -> None:
    """The masked form gives the rows that stay the same values."""
    inputs = prompts(_built(case.host), [1, 2])
    model = case.model()
    with torch.no_grad(), case.session(model) as session:
        dropped = model(**inputs, use_cache=False).logits
        stays = inputs["attention_mask"].bool() & (~session.layout.visual | session.seen())
    assert_close(dropped[stays], case.run(inputs, execution="masked")[stays], **CLOSE)


def repeats_itself(case: Case) -> None:
    """The same input gives the same output to the bit."""
    inputs = prompts(_built(case.host), [2])
    assert torch.equal(case.run(inputs), case.run(inputs))


def generates(case: Case) -> None:
    """generate() runs as before; the cache holds what reached each layer, and the new tokens."""
    model = case.model()
    inputs = prompts(model, [1, 2])
    with case.session(model) as session:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[0, 2, *range(55, 64)])
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        assert len(session.counts) == 4
        assert session.ledger.reading.gflops_model <= session.ledger.reading.gflops_full
    assert torch.equal(model(**inputs).logits, _built(case.host)(**inputs).logits), "a trace was left in the model"


def half_precision_runs(case: Case) -> None:
    """bfloat16: no NaN, and the kind is kept."""
    model = case.model().to(torch.bfloat16)
    inputs = prompts(model, [2])
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad(), case.session(model):
        logits = model(**inputs, use_cache=False).logits
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())


def gradients_reach_its_modules(case: Case) -> None:
    """Training form: a loss on the answer moves the modules, and every gradient is finite."""
    model = case.model()
    inputs = prompts(model, [1, 2])
    with case.session(model) as session:
        parameters = list(session.modules.parameters())
        model.train()
        torch.manual_seed(0)
        logits = model(**inputs, use_cache=False).logits
        logits[:, -3:].log_softmax(-1)[..., 5].sum().backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert all(bool(g.isfinite().all()) for g in gradients)
        if parameters:
            assert any(bool(g.abs().sum() > 0) for g in gradients), "no gradient reaches its modules"


CHECKS: tuple[Callable[[Case], None], ...] = (
    text_stays, budget_is_met, batch_changes_nobody, masked_equals_dropped, repeats_itself, generates,
    half_precision_runs, gradients_reach_its_modules,
)  # fmt: skip

# Declared with the reason; each is expected to fail strictly.
EXEMPT: dict[tuple[str, str], str] = {
    ("dyvte", "gradients_reach_its_modules"): "its gates learn from labels, not through the answer",
}


def cases() -> Iterator[Any]:
    pairs = [(form, "llava") for form in FORMS] + [(form, host) for host in OTHERS for form in ANYWHERE]
    for form, host in pairs:
        for check in CHECKS:
            if check is budget_is_met and host != "llava":
                continue
            why = EXEMPT.get((form.partition(":")[0], check.__name__))
            marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
            yield pytest.param(check, Case(form, host), marks=marks, id=f"{check.__name__}-{form}-{host}")


@pytest.mark.parametrize(("check", "case"), list(cases()))
def test_contract(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def test_every_method_is_held_to_the_contract() -> None:
    names = {name for name, cls in fewer.registered().items() if looks_at_rows(cls)}
    assert names - {form.partition(":")[0] for form in FORMS} <= {"video_xl_pro"}  # needs a video of four frames


def looks_at_rows(cls: type) -> bool:
    return issubclass(cls, VisualReducer)


# -- planted faults ---------------------------------------------------------------------------------------------------
@fewer.reducer("honest", paper="none", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class Honest(VisualReducer):
    """Keeps the rows whose first channel is largest."""

    budget: Budget = Capacity(6)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.top(self.scores(signals), self.budget, tokens, at=signals.at)

    def scores(self, signals: Signals) -> Tensor:
        return signals.hidden[..., 0]


class Greedy(Honest):
    """Keeps one more than it was asked for."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.top(self.scores(signals), replace(self.budget, tokens=7), tokens, at=signals.at)


class Sociable(Honest):
    """Ranks by the distance from the batch's mean."""

    def scores(self, signals: Signals) -> Tensor:
        return (signals.hidden - signals.hidden.mean((0, 1))).norm(dim=-1)


class Fickle(Honest):
    """Ranks by chance that nobody seeded."""

    def scores(self, signals: Signals) -> Tensor:
        return torch.rand(signals.hidden.shape[:2])


class Shuffled(Honest):
    """Writes its rows in reverse order over the anchors of others, but not where rows are only masked."""

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        rows = plan.reduce(signals.hidden)
        return rows.flip(1) * torch.rand(1)


class Overflowing(Honest):
    """Rows that no half number can hold."""

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        return plan.reduce(signals.hidden) / 0


class Closed(Honest):
    """Has a module that nothing flows through."""

    def parts(self, shape: Any) -> dict[str, nn.Module]:
        return {"idle": nn.Linear(2, 2)}


FAULTS = [
    (budget_is_met, Greedy()), (batch_changes_nobody, Sociable()), (repeats_itself, Fickle()),
    (text_stays, "lazyllm:keep=0.5"), (masked_equals_dropped, Shuffled()), (half_precision_runs, Overflowing()),
    (gradients_reach_its_modules, Closed()),
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_the_honest_method_passes(check: Callable[[Case], None]) -> None:
    check(Case(Honest()))


@pytest.mark.parametrize(("check", "method"), FAULTS, ids=lambda x: getattr(x, "__name__", type(x).__name__))
def test_check_catches_its_fault(check: Callable[[Case], None], method: str | VisualReducer) -> None:
    with pytest.raises(AssertionError):
        check(Case(method))


@pytest.mark.parametrize(("form", "visual"), [("divprune", True), ("random:site=bridge", True), ("tome", False)])
def test_who_is_shown_visual_rows_only(form: str, visual: bool) -> None:
    assert acts_on_visual_rows(fewer.parse(form)) == visual
