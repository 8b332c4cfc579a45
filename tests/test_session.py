"""The session: what it shows is what happened, in every way a model can be run."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fewer
from fewer.core import Budget, Hard, KeepRatio, Plan, Remove, Signals, Site, Tokens, select
from fewer.testing import Honest
from fewer.testing.checks import same_snapshot, snapshot
from fewer.testing.faults import norms
from vit import images, run, tiny_vit

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
STACK = ["evit:keep=0.7,layers=1", "tome:r=2,layers=1+2"]
RAGGED = ["cls_topk:mass=0.8,layers=1+2", "ats:keep=0.6,layers=1+2", "evit:mass=0.8,layers=1+2"]
FIXED = ["tome:r=3", "evit:keep=0.7,layers=1+2", "tofu:r=2", "atc:keep=0.7,layers=1+2", "grid:keep=0.5,layers=1"]


# -- on and off -------------------------------------------------------------------------------------------------------
def test_a_session_is_a_handle_and_a_context_and_comes_off_twice() -> None:
    model, x = tiny_vit(), images()
    plain, before = run(model, x), snapshot(model)
    session = fewer.apply(model, "tome", r=4)
    assert not torch.equal(run(model, x), plain)
    session.remove()
    session.remove()
    assert torch.equal(run(model, x), plain)
    with fewer.apply(model, fewer.ToMe(Remove(4))) as session:
        run(model, x)
    assert session.counts == [13, 9, 5, 3], "what was traced stays readable"
    session.remove()
    same_snapshot(before, snapshot(model), "a session removed twice")
    assert torch.equal(run(model, x), plain)


def test_two_models_may_share_one_config() -> None:
    one, x = tiny_vit(), images()
    other = type(one)(one.config).eval()
    plain, plain_other = run(one, x), run(other, x)
    first = fewer.apply(one, "tome:r=4")
    assert torch.equal(run(other, x), plain_other), "a model without a session is not touched"
    second = fewer.apply(other, "tome:r=4")
    reduced = run(other, x)
    first.remove()
    assert torch.equal(run(other, x), reduced), "the second session outlives the first"
    assert torch.equal(run(one, x), plain)
    second.remove()
    assert torch.equal(run(other, x), plain_other)
    assert one.config._attn_implementation == "sdpa"


def test_a_config_written_during_a_session_is_the_models_own() -> None:
    model = tiny_vit()
    before = model.config.to_json_string()
    with fewer.apply(model, "tome"):
        assert model.config.to_json_string() == before


def test_a_pickle_of_a_model_with_a_session_on_is_refused() -> None:
    model = tiny_vit()
    with fewer.apply(model, "tome:r=3"), pytest.raises(fewer.SessionError, match=r"pickled.* call session\.remove\(\)"):
        pickle.dumps(model)
    assert torch.equal(run(copy.deepcopy(model), images()), run(model, images()))


def test_weights_and_modes_are_the_models_own() -> None:
    model, x = tiny_vit(options={"hidden_dropout_prob": 0.2}), images()
    names = list(model.state_dict())
    with fewer.apply(model, "tome:r=3") as session:
        assert list(model.state_dict()) == names
        reduced = run(model, x)
        model.train()
        assert session.training
        assert not torch.equal(run(model, x), run(model, x)), "dropout is on"
        model.eval()
        assert torch.equal(run(model, x), reduced)


# -- the trace --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [*FIXED, *RAGGED, "dpc_knn:keep=0.6,layers=1+2", "ppt:r=3,layers=1+2"])
def test_origin_kept_counts_and_restore_are_those_of_the_plans(method: str) -> None:
    """Against one map per step, followed sample by sample in Python."""
    model, x = tiny_vit(), images(3)
    with fewer.apply(model, method) as session:
        with torch.no_grad():
            states = model(x, output_hidden_states=True).hidden_states
        steps = session.last.steps
        counts, origin = session.counts, session.origin
        for b in range(3):
            where: dict[int, int] = {i: i for i in range(17)}
            stands, layer = list(range(17)), 0
            for step in [*steps, None]:
                while layer < (4 if step is None else step.layer):
                    assert int(counts[layer] if isinstance(counts, list) else counts[layer, b]) == len(stands)
                    kept = session.kept(layer)[b]
                    assert kept[kept >= 0].tolist() == stands
                    layer += 1
                if step is not None:
                    row, plan = step.plan.row[b].tolist(), step.plan
                    where = {i: row[r] for i, r in where.items() if row[r] >= 0}
                    length = plan.m if plan.lengths is None else int(plan.lengths[b])
                    stands = [stands[i] for i in plan.position[b, :length].tolist()]
            assert origin[b].tolist() == [where.get(i, -1) for i in range(17)]
            features = torch.arange(1.0, session.last.tokens.n + 1)[None, :, None].expand(3, -1, 2)
            dense = session.restore(features, fill=0.0)
            assert dense[b, ..., 0].flatten().tolist() == [where.get(i, -1) + 1 for i in range(1, 17)]
        assert [s.shape[1] for s in states[1:]][-1] == session.last.tokens.n


@dataclass(frozen=True)
class After(Honest):
    """Rows go behind a block."""

    budget: Budget = Remove(5)
    layers: tuple[int, ...] | None = (1,)
    site: ClassVar[Site] = Site.AFTER_BLOCK


@dataclass(frozen=True)
class Ahead(After):
    """Rows go before a block."""

    site: ClassVar[Site] = Site.BEFORE_BLOCK


def test_counts_are_what_leaves_each_block_whatever_the_site() -> None:
    model, x = tiny_vit(), images()
    for method, in_attention, in_mlp in [
        (After(), [17, 17, 12, 12], [17, 17, 12, 12]),
        (Ahead(), [17, 12, 12, 12], [17, 12, 12, 12]),
        (fewer.parse("cls_topk:r=5,layers=1"), [17, 17, 12, 12], [17, 12, 12, 12]),
    ]:
        with fewer.apply(model, method) as session, torch.no_grad():
            states = model(x, output_hidden_states=True).hidden_states
        assert session.counts == [17, 12, 12, 12] == [s.shape[1] for s in states[1:]]
        assert [e.attention for e in session.ledger.entries] == in_attention
        assert [e.mlp for e in session.ledger.entries] == in_mlp


@pytest.mark.parametrize("method", ["tome:r=3", "tome:r=0", "evit:keep=0.6,layers=1+2"])
@pytest.mark.parametrize("kind", ["vit", "timm_mean"])
def test_the_ledger_counts_what_torch_counts(kind: str, method: str) -> None:
    """Every matrix product of a forward pass, the method's own included."""
    model, x = tiny_vit(kind), images(2)
    with fewer.apply(model, method) as session:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
        ledger = session.ledger
    head = 2 * 2 * 32 * 7
    counted = (counter.get_total_flops() - head) / 2 / 2e9  # per sample, a multiply-add as one
    assert_close(ledger.gflops, counted, rtol=1e-9, atol=0.0)
    assert (ledger.gflops_own > 0) == (method != "tome:r=0")


def test_the_ledger_of_ragged_samples_is_the_mean_of_their_own() -> None:
    model, x = tiny_vit(), images(4)
    with fewer.apply(model, RAGGED[0]) as session:
        run(model, x)
        together, counts = session.ledger, session.counts
        alone = []
        for one in x.split(1):
            run(model, one)
            alone.append(session.ledger.gflops_model)
    assert isinstance(counts, Tensor)
    assert len(counts[-1].unique()) > 1
    assert together.gflops_model == pytest.approx(sum(alone) / 4, rel=1e-9)
    assert together.gflops_full > together.gflops
    assert together.ceiling == pytest.approx(together.gflops_full / together.gflops_model)
    assert together.bytes == int(sum((e.attention + e.mlp) * 32 * 4 for e in together.entries))


def test_the_report_says_what_happened() -> None:
    model = tiny_vit()
    with fewer.apply(model, STACK) as session:
        with pytest.raises(fewer.SessionError, match="no forward pass yet: call the model first"):
            _ = session.counts
        run(model, images())
        text = session.report()
    assert "evit:layers=1 tome:r=2,layers=1+2" in text
    assert f"tokens 17 -> {' '.join(map(str, session.counts))}" in text
    assert f"{session.ledger.ceiling:.2f}x" in text


def test_a_request_too_large_is_cut_short_and_noted() -> None:
    model = tiny_vit()
    with fewer.apply(model, "tome:r=9") as session:
        run(model, images())
    assert session.counts == [9, 5, 3, 2]
    assert session.ledger.notes[0] == "layer 0: asked to remove 9 of 16 tokens, this matching takes at most 8"


def test_restore_takes_a_tensor_to_fill_with() -> None:
    model = tiny_vit()
    with fewer.apply(model, "cls_topk:keep=0.5,layers=1") as session:
        run(model, images())
        dense = session.restore(torch.zeros(2, 9, 3), fill=torch.tensor([1.0, 2.0, 3.0]))
    gone = dense[session.origin[:, 1:].unflatten(1, (4, 4)) < 0]
    assert_close(gone, torch.tensor([[1.0, 2.0, 3.0]]).expand_as(gone))


# -- stacks -----------------------------------------------------------------------------------------------------------
def test_methods_at_one_site_see_what_the_one_before_left() -> None:
    """Two prunings stacked in a block are the second one's choice among the first one's."""
    model, x = tiny_vit(), images(3)
    with fewer.apply(model, ["cls_topk:r=4,layers=1", "cls_topk:r=3,layers=1"]) as session:
        stacked = run(model, x)
        assert session.counts == [17, 10, 10, 10]
        assert [(s.layer, s.method, s.plan.n, s.plan.m) for s in session.last.steps] == [(1, 0, 17, 13), (1, 1, 13, 10)]
    with fewer.apply(model, "cls_topk:r=7,layers=1"):
        assert_close(run(model, x), stacked, **CLOSE)


@pytest.mark.parametrize(
    "stack", [STACK, ["cls_topk:mass=0.8,layers=1", "tome:r=2,layers=1+2"], ["tome:r=2", "ats:keep=0.5,layers=2+3"],
     ["cls_topk:r=3,layers=0", "token_transforming:keep=0.7,layers=1", "tome:r=2,layers=2+3"]],
)  # fmt: skip
def test_stacks_agree_in_every_execution_and_batch(stack: list[str]) -> None:
    model, x = tiny_vit(), images(3)
    with fewer.apply(model, stack) as session:
        padded = run(model, x)
        assert_close(torch.cat([run(model, one) for one in x.split(1)]), padded, **CLOSE)
        assert len(session.last.steps) > 2
    for execution in ("packed", "masked"):
        with fewer.apply(model, stack, execution=execution):
            assert_close(run(model, x), padded, **CLOSE)


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("method", [*RAGGED, "tome:threshold=0.5"])
def test_what_a_session_shows_does_not_depend_on_the_execution(method: str, execution: Any) -> None:
    model, x = tiny_vit(), images(3)
    shown = []
    for way in ("padded", execution):
        with fewer.apply(model, method, execution=way) as session:
            run(model, x)
            kept = session.kept(3)
            shown.append((session.counts, session.ledger.gflops, [sorted(k[k >= 0].tolist()) for k in kept]))
            held = session.origin >= 0
            dense = session.restore(torch.ones(3, 17 if way == "masked" else session.last.tokens.n, 1))
            assert_close(dense[..., 0].flatten(1), held[:, 1:].float())
    (counts, gflops, kept), (other, same, too) = shown
    assert_close(other, counts)
    assert same == pytest.approx(gflops)
    assert too == kept


# -- ways of running --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["tome:r=3", "evit:keep=0.6,layers=1+2", RAGGED[0]])
def test_gradient_checkpointing_changes_no_gradient(method: str, reentrant: bool) -> None:
    gradients, counts = [], []
    for checkpointing in (False, True):
        model, x = tiny_vit().train(), images(2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with fewer.apply(model, method) as session:
            model(x).logits.square().sum().backward()
            counts.append(torch.as_tensor(session.counts))
            assert len(session.last.steps) == (4 if method.startswith("tome") else 2), "recomputation left a trace"
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close(counts[0], counts[1])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, msg=lambda m, name=name: f"{name}: {m}", **CLOSE)


def test_learned_masks_and_checkpointing() -> None:
    model = tiny_vit().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with fewer.apply(model, "dynamicvit:keep=0.7,layers=1+2", modules="untrained") as session:
        model(images()).logits.square().sum().backward()
        for name, p in session.modules.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        fewer.apply(model, "dynamicvit:keep=0.7,layers=1+2", modules="untrained"),
        pytest.raises(fewer.SessionError, match="reentrant checkpointing loses the gradient of learned masks"),
    ):
        model(images())


def test_timm_checkpointing_is_refused() -> None:
    model, x = tiny_vit("timm").train(), images()
    model.set_grad_checkpointing(True)
    with fewer.apply(model, "tome:r=3"), pytest.raises(fewer.hosts.HostError, match=r"set_grad_checkpointing\(False\)"):
        model(x)
    model.eval()
    with fewer.apply(model, "tome:r=3") as session:
        run(model, x)
    assert session.counts == [14, 11, 8, 5], "without gradients there is nothing to checkpoint"


@pytest.mark.parametrize("kind", ["vit", "timm_registers", "siglip"])
def test_half_precision_and_autocast_choose_the_same_number_and_stay_close(kind: str) -> None:
    model, x = tiny_vit(kind), images(2)
    with fewer.apply(model, "tome:r=3") as session:
        exact, counts = run(model, x), session.counts
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = run(model, x)
        assert session.counts == counts
    with fewer.apply(model.bfloat16(), "tome:r=3") as session:
        half = run(model, x.bfloat16())
        assert session.counts == counts
    assert half.dtype == torch.bfloat16
    assert (mixed.float() - exact).norm() < 0.3 * exact.norm()
    assert (half.float() - exact).norm() < 0.5 * exact.norm()


def test_plans_are_made_in_full_precision_under_autocast() -> None:
    seen = []

    @dataclass(frozen=True)
    class Looks(Honest):
        def plan(self, signals: Signals, tokens: Tokens) -> Plan:
            seen.append((signals.hidden @ signals.hidden.transpose(1, 2)).dtype)
            return super().plan(signals, tokens)

    model = tiny_vit()
    with fewer.apply(model, Looks()), torch.autocast("cpu", dtype=torch.bfloat16):
        run(model, images())
    assert set(seen) == {torch.float32}


def test_threads_share_a_model_and_see_their_own_pass() -> None:
    model = tiny_vit()
    inputs = [images(1 + i % 3, seed=i) for i in range(6)]
    with fewer.apply(model, "evit:keep=0.6,layers=1+2") as session:
        wanted = []
        for x in inputs:
            answer = run(model, x)
            wanted.append((answer, session.origin))
        got: list[Any] = [None] * len(inputs)
        gate = threading.Barrier(len(inputs))

        def work(i: int) -> None:
            gate.wait()
            for _ in range(5):
                answer = run(model, inputs[i])
                got[i] = (answer, session.origin)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert any(torch.equal(session.origin, origin) for _, origin in got)
    for (answer, origin), (wanted_answer, wanted_origin) in zip(got, wanted, strict=True):
        assert_close(answer, wanted_answer, **CLOSE)
        assert torch.equal(origin, wanted_origin)


def test_hidden_states_come_out_as_long_as_they_are() -> None:
    model, x = tiny_vit(), images()
    with torch.no_grad():
        model(x, output_hidden_states=True)  # transformers installs its hooks for this once, and leaves them
        before = snapshot(model)
        with fewer.apply(model, "tome:r=3"):
            out = model(x, output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states] == [17, 14, 11, 8, 5]
    same_snapshot(before, snapshot(model), "hidden states")


@pytest.mark.parametrize("method", ["tome:r=3", "evit:keep=0.6,layers=1+2"])
@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_compiles_into_one_graph_once(kind: str, method: str) -> None:
    """Fixed counts: no graph break (fullgraph), and no recompilation from step to step."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = tiny_vit(kind, depth=2 if method.startswith("tome") else 3)
    with fewer.apply(model, method) as session:
        plain = [run(model, images(seed=i)) for i in range(3)]
        counts = session.counts
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for i, wanted in enumerate(plain):
            assert_close(run(compiled, images(seed=i)), wanted, **CLOSE)
        assert counter.frame_count == 1
        assert session.counts == counts
    torch._dynamo.reset()


@pytest.mark.parametrize("method", [*FIXED, *RAGGED])
@pytest.mark.parametrize("execution", ["padded", "packed", "masked"])
def test_a_batch_of_zero(method: str, execution: Any) -> None:
    model, x = tiny_vit("timm"), images(0)
    with fewer.apply(model, method, execution=execution) as session:
        assert run(model, x).shape == (0, 7)
        assert session.origin.shape == (0, 17)
        assert session.kept(3).shape[0] == 0


def test_a_batch_of_zero_that_the_model_itself_refuses() -> None:
    """Attention in transformers reshapes with -1, which has no answer for no samples."""
    model, x = tiny_vit(), images(2)
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        run(model, images(0))
    with fewer.apply(model, "tome:r=3") as session:
        wanted = run(model, x)
        with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
            run(model, images(0))
        assert torch.equal(run(model, x), wanted)
        assert session.counts == [14, 11, 8, 5]


@pytest.mark.parametrize(
    "method", [*FIXED, *RAGGED, "ppt:r=3,layers=1+2", "dpc_knn:keep=0.6,layers=1+2", "kmedoids:keep=0.6,layers=1"]
)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_features_that_are_not_numbers_spoil_their_own_image_only(method: str, poison: float) -> None:
    model, x = tiny_vit(), images(3)
    with fewer.apply(model, method) as session:
        clean = run(model, x)
        x[1, :, 8:16, 8:16] = poison
        spoiled = run(model, x)
        assert not spoiled[1].isfinite().any()
        counts = session.counts
    assert_close(spoiled[[0, 2]], clean[[0, 2]], **CLOSE)
    assert all(int(c) >= 2 for c in (counts if isinstance(counts, list) else counts[:, 1]))


def test_a_score_that_is_not_a_number_ranks_last() -> None:
    scores = torch.tensor([[9.0, 1.0, float("nan"), 2.0, -3.0]])
    plan = select.top(scores, Remove(1), Tokens.plain(1, 5, 1), at=fewer.core.Place())
    assert isinstance(plan, Hard)
    assert plan.anchor.tolist() == [[0, 1, 3, 4]]


# -- after an accident ------------------------------------------------------------------------------------------------
class Accident(Exception):
    pass


@dataclass(frozen=True)
class Trips(Honest):
    """Raises where it is told to."""

    armed: ClassVar[list[bool]] = [False]

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if self.armed[0] and signals.at.layer == 2:
            raise Accident
        return select.top(norms(signals.hidden), self.budget, tokens, at=signals.at)


@pytest.mark.parametrize("execution", ["padded", "packed", "masked"])
def test_an_exception_inside_a_plan_spoils_nothing(execution: Any) -> None:
    model, x = tiny_vit(), images(2)
    plain, before = run(model, x), snapshot(model)
    with fewer.apply(model, Trips(Remove(3)), execution=execution) as session:
        wanted, origin = run(model, x), session.origin
        Trips.armed[0] = True
        with pytest.raises(Accident):
            run(model, images(3, seed=5))
        Trips.armed[0] = False
        assert torch.equal(session.origin, origin), "the last finished pass is what is shown"
        assert torch.equal(run(model, x), wanted)
        Trips.armed[0] = True
        with pytest.raises(Accident):
            run(model, x)
        Trips.armed[0] = False
    same_snapshot(before, snapshot(model), "an exception in a plan")
    assert torch.equal(run(model, x), plain)


def test_a_session_that_cannot_start_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny_vit("siglip"), images()
    plain, before = run(model, x), snapshot(model)

    def fails(*_: Any, **__: Any) -> None:
        raise Accident

    monkeypatch.setattr(type(model.post_layernorm), "register_forward_hook", fails, raising=False)
    with pytest.raises(Accident):
        fewer.apply(model, "tome")
    monkeypatch.undo()
    same_snapshot(before, snapshot(model), "half a start")
    assert torch.equal(run(model, x), plain)
    with fewer.apply(model, KeepRatioEverywhere()) as session:
        run(model, x)
    assert session.counts == [8, 4, 2, 1]


@dataclass(frozen=True)
class KeepRatioEverywhere(Honest):
    """Half of what is there, in every block."""

    budget: Budget = KeepRatio(0.5)


def test_a_fork_of_a_trace_has_a_memory_of_its_own() -> None:
    """A block that runs once more for its gradient must not find what its first run wrote."""
    model = tiny_vit()
    with torch.no_grad(), fewer.apply(model, "tome:r=2") as session:
        model(torch.randn(1, 3, *[model.config.image_size] * 2))
        trace = session.last
    other = trace.fork()
    other.memory[0]["seen"] = 1
    other.blocks[0].rows[0] = -1
    assert "seen" not in trace.memory[0]
    assert trace.blocks[0].rows[0] > 0


def test_tokens_that_a_learned_mask_hides_are_not_kept() -> None:
    torch.manual_seed(0)
    model = tiny_vit().train()
    with fewer.apply(model, "dynamicvit:keep=0.5,layers=1", modules="untrained") as session:
        model(torch.randn(2, 3, *[model.config.image_size] * 2))
        trace = session.last
        policy = trace.tokens.policy
        kept = session.kept(1)
    assert policy is not None
    assert (policy == 0).any(), "some are hidden, or this shows nothing"
    assert torch.equal(kept < 0, policy == 0)
