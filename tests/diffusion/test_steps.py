"""Reuse over denoising steps, on every kind of host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fewer
from denoisers import KINDS, STACKS, denoiser, part, run, sample_of
from fewer.core import BudgetError, Place, Signals, Tokens
from fewer.core.denoising import Moment, best_of_cells, shared
from fewer.hosts import HostError
from fewer.hosts.diffusion import DiffusionHost
from fewer.methods.diffusion.toca import ToCa
from fewer.testing.checks import same_snapshot, snapshot

pytest.importorskip("diffusers")
ALWAYS = ["fora:every=1", "toca:every=1", "duca:every=1", "teacache:threshold=0", "first_block_cache:threshold=0"]
SOMETIMES = ["fora:every=3", "toca:every=3,ratio=0.2", "duca:every=3", "teacache:threshold=0.15",
             "first_block_cache:threshold=0.6"]  # fmt: skip


def fits(kind: str, form: str) -> bool:
    return kind in STACKS or form.partition(":")[0] not in ("teacache", "first_block_cache")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ALWAYS)
def test_computing_always_is_the_model_to_the_bit(kind: str, form: str) -> None:
    model, given = denoiser(kind)
    with torch.no_grad():
        plain = run(model, given, 3)
        if not fits(kind, form):
            with pytest.raises(HostError, match="reuses what a whole stack of blocks adds"):
                fewer.apply(model, form)
            return
        with fewer.apply(model, form) as session:
            assert all(map(torch.equal, run(model, given, 3), plain))
            assert session.ledger.computed == (3, 3)


@pytest.mark.parametrize(("kind", "form"), [(k, f) for k in KINDS for f in SOMETIMES if fits(k, f)])
def test_a_call_uses_nothing_of_the_one_before_and_removal_is_exact(kind: str, form: str) -> None:
    model, given = denoiser(kind)
    before = snapshot(model)
    with torch.no_grad():
        plain = run(model, given, 5)
        with fewer.apply(model, form) as session:
            first = run(model, given, 5)
            assert torch.equal(first[0], plain[0]), "the first evaluation computes everything"
            assert not all(map(torch.equal, first, plain)), "something was reused"
            full, of = session.ledger.computed
            assert of == 5
            assert full < of
            assert session.ledger.ceiling > 1
            assert all(map(torch.equal, run(model, given, 5), first))
            run(model, given, 2)  # broken off
            assert all(map(torch.equal, run(model, given, 5), first))
        assert all(map(torch.equal, run(model, given, 5), plain))
    same_snapshot(before, snapshot(model), "after a session over steps")


@pytest.mark.parametrize("form", SOMETIMES)
def test_what_does_not_change_is_reused_without_loss(form: str) -> None:
    """At one and the same input every step gives what the first did."""
    model, given = denoiser("dit")
    with torch.no_grad():
        plain = model(**given)[0]
        with fewer.apply(model, form) as session:
            for _ in range(5):
                given = given | {"hidden_states": given["hidden_states"].clone()}
                assert_close(model(**given)[0], plain, atol=1e-6, rtol=1e-5)
            assert session.ledger.computed[0] < 5


def ask(model: Any, given: dict[str, Any], x: Tensor, time: int) -> Tensor:
    out: Tensor = model(**given | {sample_of(given): x, "timestep": torch.full_like(given["timestep"], time)})[0]
    return out


@pytest.mark.parametrize("kind", ["flux", "wan", "cogvideox"])
@pytest.mark.parametrize("form", SOMETIMES[:3])
def test_branches_asked_one_after_the_other_keep_apart(kind: str, form: str) -> None:
    model, given = denoiser(kind, batch=2)
    name, times = sample_of(given), (900, 800, 700, 600)
    halves = [part(given, slice(i, i + 1)) for i in range(2)]
    with torch.no_grad():
        alone = []
        for half in halves:
            with fewer.apply(model, form):
                alone.append([ask(model, half, half[name] + 0, t) for t in times])
        with fewer.apply(model, form):
            for i, time in enumerate(times):
                x = halves[0][name] + 0
                for j, half in enumerate(halves):
                    other = half[name] + 0 if j else x
                    with model.cache_context(f"branch{j}"):
                        got = ask(model, half, other, time)
                    assert_close(got, alone[j][i], atol=1e-6, rtol=1e-5)


def test_branches_at_the_same_sample_are_told_apart_without_a_context() -> None:
    model, given = denoiser("dit", batch=1)
    labels = torch.tensor([1]), torch.tensor([7])

    def one(x: Tensor, time: int, label: Tensor) -> Tensor:
        out: Tensor = model(x, timestep=torch.tensor([time]), class_labels=label)[0]
        return out

    samples = [given["hidden_states"] * (1 - 0.1 * i) for i in range(4)]
    with torch.no_grad():
        alone = []
        for label in labels:
            with fewer.apply(model, "fora:every=2"):
                alone.append([one(x, 900 - 100 * i, label) for i, x in enumerate(samples)])
        with fewer.apply(model, "fora:every=2"):
            for i, x in enumerate(samples):
                for j, label in enumerate(labels):
                    assert torch.equal(one(x, 900 - 100 * i, label), alone[j][i])


def test_another_shape_computes_everything() -> None:
    model, given = denoiser("sd15")
    with torch.no_grad():
        other = given | {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.full((2,), 400)}
        single = part(given, slice(0, 1)) | {"timestep": torch.full((1,), 300)}
        plain = model(**other)[0], model(**single)[0]
        with fewer.apply(model, "fora:every=9"):
            run(model, given, 2)
            assert torch.equal(model(**other)[0], plain[0])
            assert torch.equal(model(**single)[0], plain[1])


def test_a_pipelines_scheduler_begins_a_call_and_says_how_long_it_is() -> None:
    model, given = denoiser("dit")

    class Euler:
        order = 1
        timesteps: Any = torch.arange(0)

        def set_timesteps(self, count: int) -> None:
            self.timesteps = torch.arange(count)

    class Pipe:
        components = {"transformer": model, "scheduler": Euler()}  # noqa: RUF012

    scheduler = Pipe.components["scheduler"]
    with torch.no_grad(), fewer.apply(Pipe(), "teacache:threshold=9") as session:
        for steps in (4, 6):
            scheduler.set_timesteps(steps)
            full = []
            for i in range(steps):
                x = given["hidden_states"] * (1 - 0.05 * i)
                model(**given | {"hidden_states": x})
                full.append(session.ledger.computed[0])
            assert full == [1] * (steps - 1) + [2], "the first and the last compute"


# -- what ToCa chooses -------------------------------------------------------------------------------------------------
def test_toca_computes_more_often_early_and_every_other_step_near_the_end() -> None:
    """The rule of the paper's code, step by step."""
    steps, method = 50, ToCa(every=3)
    memory: dict[str, Any] = {}
    got = [method.renews(Moment(i, steps), memory) for i in range(steps)]
    want, period = [], 0
    for i in reversed(range(steps)):
        mine = 2 if 0.2 * steps <= i < 0.4 * steps else period
        full = i == steps - 1 or i % mine == 0
        if full:
            period = round(3 / (1 + 0.4 - 0.8 * i / steps))
        want.append(full)
    assert got == want
    assert 15 <= sum(got) <= 26


def test_toca_counts_as_its_schedule_says() -> None:
    model, given = denoiser("dit")
    method = ToCa(every=4, ratio=0.3)
    with torch.no_grad(), fewer.apply(model, method) as session:
        run(model, given, 2)
        rows = [w.rows for w in session.trace.work]
    n = 64
    mlps = [int(method.share(Moment(1), layer, 2) * n) for layer in range(2)]
    assert rows == [0, mlps[0], 0, mlps[1]]
    assert 0 < mlps[0] < mlps[1] < n


def test_toca_takes_what_received_most_attention_and_grew_oldest() -> None:
    received = torch.tensor([[5.0, 1, 1, 1], [1, 1, 1, 5.0]])
    hidden = torch.randn(2, 4, 3)
    method = ToCa(ratio=0.25, module=1.0, depth=0.0, bonus=0.0, age=0.25)

    def ask(memory: dict[str, Any], branches: int = 1) -> list[list[int]]:
        at_step = Moment(1, operation="mlp", branches=branches)
        signals = Signals(hidden, Tokens.plain(2, 4), Place(), memory=memory, at_step=at_step)
        return method.plan(signals, signals.tokens).position.tolist()

    memory: dict[str, Any] = {"received": received}
    assert ask(memory) == [[0], [3]]
    assert memory["age"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    for _ in range(9):
        last = ask(memory)
    assert float(memory["age"].max()) <= 10
    assert last, "in time all others have their turn"
    alone = ask({"received": received}, branches=2)
    assert alone[0] == alone[1], "both branches of guidance compute the same tokens"


def test_ages_bring_every_token_its_turn() -> None:
    hidden, counts = torch.randn(1, 8, 3), Counter[int]()
    method = ToCa(ratio=0.25, module=1.0, depth=0.0, bonus=0.0, age=5.0)
    memory: dict[str, Any] = {"received": torch.rand(1, 8)}
    for _ in range(8):
        signals = Signals(hidden, Tokens.plain(1, 8), Place(), memory=memory, at_step=Moment(1, operation="mlp"))
        counts.update(method.plan(signals, signals.tokens).position[0].tolist())
    assert set(counts) == set(range(8))


def test_the_best_of_each_cell() -> None:
    score = torch.tensor([[1.0, 2, 9, 3, 4, 1, 8, 2, 5, 7, 1, 1]])
    assert best_of_cells(score, (3, 4), 2).tolist() == [[0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert shared(torch.tensor([[1.0], [3.0]]), 2).tolist() == [[2.0], [2.0]]


def test_tokens_in_between_are_what_the_mlp_makes_of_them_now() -> None:
    model, given = denoiser("dit")
    host, calls = DiffusionHost(model), []
    mlp = host.part(next(op for op in host.operations if op.kind == "mlp"))
    hook = mlp.register_forward_hook(lambda module, args, out: calls.append((args[0], out)))
    with torch.no_grad(), fewer.apply(model, "toca:every=4,ratio=0.3"):
        run(model, given, 2)
    hook.remove()
    (_, old), (rows, out) = calls
    with torch.no_grad():
        now = mlp(rows)
    fresh, kept = torch.isclose(out, now, atol=1e-6).all(-1), torch.isclose(out, old, atol=1e-6).all(-1)
    assert (fresh | kept).all()
    assert fresh.sum(-1).tolist() == [int(ToCa(every=4, ratio=0.3).share(Moment(1), 0, 2) * 64)] * 2


@pytest.mark.parametrize(
    ("form", "why"),
    [("fora:every=0", "at least one in one"), ("toca:ratio=1.5", "outside"), ("toca:every=0", "at least one"),
     ("duca:ratio=-1", "outside"), ("teacache:threshold=-1", "negative"),
     ("first_block_cache:threshold=-1", "negative")],
)  # fmt: skip
def test_settings_out_of_range(form: str, why: str) -> None:
    with pytest.raises(BudgetError, match=why):
        fewer.parse(form)


@pytest.mark.parametrize("forms", [["fora", "toca"], ["tomesd", "tomesd"], ["tomesd", "fora"]])
def test_one_method_in_a_denoiser_at_a_time(forms: list[str]) -> None:
    model, given = denoiser("dit")
    before = snapshot(model)
    with pytest.raises(fewer.SessionError, match="a denoiser takes one method at a time"):
        fewer.apply(model, forms)
    same_snapshot(before, snapshot(model), "after a session that was refused")
    assert model(**given)
