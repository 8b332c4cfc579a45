"""The contract: what every method must do on every host it can run on. A check takes a method and a host, and raises
AssertionError. `CHECKS` lists them; `FAULTS` in faults.py holds, for each, something broken that it must catch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fewer.core import Hard, Place, Plan, Reducer, Seen, Signals, Soft, Tokens
from fewer.hosts import MATRICES
from fewer.runtime.trace import Step

from .hosts import TinyHost, keep_all
from .models import answer, run

Check = Callable[[Reducer, TinyHost], None]
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


# -- numbers ----------------------------------------------------------------------------------------------------------
def keep_all_is_identity(method: Reducer, host: TinyHost) -> None:
    """A budget that keeps everything changes nothing: bit for bit, or to rounding where a method is always asked."""
    plain = run(host.model(), host.batch)
    full = keep_all(method)
    reduced = host.run(full, host.batch)
    if full.adaptive:
        assert_close(reduced, plain, **CLOSE, msg=lambda m: f"{method} keeping all moves the output: {m}")
    else:
        assert torch.equal(reduced, plain), f"{method} keeping all is not the identity to the bit"


def batch_changes_nobody(method: Reducer, host: TinyHost) -> None:
    """A sample's result does not depend on its neighbours."""
    together = host.run(method, host.batch)
    for i, sample in enumerate(host.batch.split(1)):
        alone = host.run(method, sample)[0]
        assert_close(alone, together[i], **CLOSE, msg=lambda m, i=i: f"{method}: sample {i} depends on its batch: {m}")  # type: ignore[misc]


def padding_changes_nothing(method: Reducer, host: TinyHost) -> None:
    """Plans made for padded samples are the plans of the samples alone."""
    found = host.found
    n, heads, width = host.patches + found.prefix, 2, 8
    generator = torch.Generator().manual_seed(0)
    hidden, q, k, v = (
        torch.randn(3, *shape, generator=generator) for shape in [(n, found.width), *[(heads, n, width)] * 3]
    )
    kept = torch.stack([torch.randperm(host.patches, generator=generator) for _ in range(3)]) + found.prefix
    tokens = Tokens.plain(3, n, found.prefix, has_cls=found.has_cls, device=hidden.device)
    lengths = [host.patches, host.patches - 3, host.patches - 5]
    padded = _left(kept, lengths, tokens)
    x, after = _planned(method, host, padded, tokens, hidden, (q, k, v))
    for i, length in enumerate(lengths):
        one = replace(tokens, batch=1)
        plan = _left(kept[i : i + 1], [length], one).pruned()
        plan = Plan.keep(plan.anchor[:, : found.prefix + length], n)
        alone, own = _planned(method, host, plan, one, hidden[i : i + 1], tuple(t[i : i + 1] for t in (q, k, v)))
        mine = x[i] if after.valid is None else x[i][after.valid[i]]
        mine_alone = alone[0] if own.valid is None else alone[0][own.valid[0]]
        assert mine.shape == mine_alone.shape, (
            f"{method}: sample {i} with {length} patches gets {len(mine)} rows padded, {len(mine_alone)} alone"
        )  # fmt: skip
        assert_close(mine, mine_alone, **CLOSE, msg=lambda m, i=i: f"{method}: padding changes sample {i}: {m}")  # type: ignore[misc]


def _left(kept: Tensor, lengths: list[int], tokens: Tokens) -> Any:
    """A ragged plan that keeps the prefix and the first `lengths` of each sample's permutation, ascending."""
    keep = torch.zeros(tokens.batch, tokens.n, dtype=torch.bool)
    keep[:, : tokens.prefix] = True
    for i, length in enumerate(lengths):
        keep[i, kept[i, :length]] = True
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)
    return Plan.keep(order, tokens.n, keep.sum(-1))


def _planned(
    method: Reducer, host: TinyHost, first: Any, tokens: Tokens, hidden: Tensor, qkv: tuple[Tensor, ...]
) -> tuple[Tensor, Tokens]:
    """What the method makes of the tokens a first plan leaves: its rows, and the tokens they are."""
    x, tokens = first.reduce(hidden), tokens.after(first)
    q, k, v = (t.gather(2, first.anchor[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in qkv)
    bias = None
    if tokens.valid is not None:
        bias = torch.zeros(tokens.valid.shape).masked_fill(~tokens.valid, float("-inf"))[:, None, None]
        x = x.masked_fill(~tokens.valid[..., None], 3.0)  # what blocks leave in padding rows is anything but zero
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = nn.ModuleDict(method.modules(host.found.width, host.found.heads, 1, host.patches))
    side = int(host.patches**0.5)
    place = Place(layers=2, start=host.patches)
    seen = Seen(q, k, v, q.shape[-1] ** -0.5, bias) if method.site.sees_attention else None
    signals = Signals(x, tokens, place, seen, (side, side), modules.eval(), branch=x.flip(-1))
    with torch.no_grad():
        plan = method.plan(signals, tokens)
        return plan.reduce(x), tokens.after(plan)


def masked_equals_gathered(method: Reducer, host: TinyHost) -> None:
    """Masking what goes gives what gathering what stays gives."""
    gathered = host.run(method, host.batch)
    masked = host.run(method, host.batch, execution="masked")
    assert_close(masked, gathered, **CLOSE, msg=lambda m: f"{method}: masked and gathered execution differ: {m}")


def same_input_same_output(method: Reducer, host: TinyHost) -> None:
    """Twice the same, in one session and in a new one."""
    model = host.model()
    with torch.no_grad(), host.session(model, method):
        first, second = answer(model, host.batch), answer(model, host.batch)
    assert torch.equal(first, second), f"{method} answers differently the second time"
    assert torch.equal(first, host.run(method, host.batch)), f"{method} answers differently in a new session"


def gradients_reach(method: Reducer, host: TinyHost) -> None:
    """Gradients are finite, reach every image, and in training every parameter of the method's own modules."""
    model = host.model()
    x = host.batch.requires_grad_()
    with host.session(model, method):
        answer(model, x).square().sum().backward()
    _healthy(x.grad, f"{method}: gradient of the input")
    assert x.grad is not None and bool((x.grad.flatten(1).abs().sum(1) > 0).all()), (
        f"{method}: an image gets no gradient"
    )
    model = host.model().train()
    with host.session(model, method) as session, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        answer(model, host.batch).square().sum().backward()
        for name, parameter in session.modules.named_parameters():
            _healthy(parameter.grad, f"{method}: gradient of its module's {name}")


def _healthy(gradient: Tensor | None, what: str) -> None:
    assert gradient is not None, f"{what} does not exist"
    assert bool(gradient.isfinite().all()), f"{what} is not finite"


def dtypes(method: Reducer, host: TinyHost) -> None:
    """bfloat16 and autocast: the model's dtype, finite numbers, and as many tokens as in float32."""
    with host.passed(method) as session:
        counts = session.counts
    model = host.model().bfloat16()
    with torch.no_grad(), host.session(model, method) as session:
        out = answer(model, host.batch.bfloat16())
        _same_dtype(method, out, run(host.model().bfloat16(), host.batch.bfloat16()).dtype, session.counts, counts)
    model = host.model()
    kind = torch.device(host.device).type
    with torch.no_grad(), host.session(model, method) as session, torch.autocast(kind, dtype=torch.bfloat16):
        out = answer(model, host.batch)
        _same_dtype(method, out, out.dtype, session.counts, counts)


def _same_dtype(method: Reducer, out: Tensor, dtype: torch.dtype, counts: Any, wanted: Any) -> None:
    assert out.dtype == dtype, f"{method}: the answer is {out.dtype} instead of {dtype}"
    assert bool(out.isfinite().all()), f"{method}: the answer in {dtype} is not finite"
    if isinstance(wanted, list):
        assert counts == wanted, f"{method}: keeps {counts} in {dtype}, {wanted} in float32"


# -- tokens -----------------------------------------------------------------------------------------------------------
def protected_survive(method: Reducer, host: TinyHost) -> None:
    """Class, distillation, register and package tokens keep their rows, with nothing folded into them."""
    with host.passed(method) as session:
        assert session.last.steps, f"{method} did nothing"
        for step, prefix in _prefixes(session.last.steps, host.found.prefix):
            plan = step.plan
            if isinstance(plan, Soft):
                own = torch.eye(prefix).expand(plan.matrix.shape[0], -1, -1)
                assert_close(plan.matrix[:, :prefix, :prefix].float(), own)
                assert not bool(plan.matrix[:, :prefix, prefix:].any()), f"{method} mixes patches into protected rows"
                assert not bool(plan.matrix[:, prefix:, :prefix].any()), f"{method} mixes protected rows into patches"
                continue
            row = plan.row
            wanted = torch.arange(prefix, device=row.device).expand(row.shape[0], -1)
            assert torch.equal(row[:, :prefix], wanted), (
                f"{method} moves or drops a protected token in block {step.layer}"
            )
            assert not bool(((row[:, prefix:] >= 0) & (row[:, prefix:] < prefix)).any()), (
                f"{method} folds a patch into a protected token in block {step.layer}"
            )
            if isinstance(plan, Hard):
                assert_close(plan.weight[:, :prefix], torch.ones_like(plan.weight[:, :prefix]))


def _prefixes(steps: list[Step], prefix: int) -> Iterator[tuple[Step, int]]:
    """Every step with the number of protected rows before it."""
    for step in steps:
        yield step, prefix
        prefix += getattr(step.plan, "front", 0)


def budget_is_met(method: Reducer, host: TinyHost) -> None:
    """As many free rows as the budget grants, plus those the method declares to add; adaptive ones at most that."""
    layers = method.acts_at(len(host.found.blocks))
    with host.passed(method) as session:
        steps = list(_prefixes(session.last.steps, host.found.prefix + host.guarded))
        assert len(steps) == len(layers), f"{method} acted {len(steps)} times in blocks {layers}"
        for stage, (step, prefix) in enumerate(steps):
            place = Place(step.layer, len(host.found.blocks), stage, len(layers), host.patches)
            granted = prefix + method.budget.keep(step.plan.n - prefix, place) + method.extra
            lengths, m = step.plan.lengths, step.plan.m
            if lengths is None:
                assert m == granted, f"{method} leaves {m} rows in block {step.layer}, the budget grants {granted}"
                continue
            assert bool((lengths <= granted).all()), (
                f"{method} leaves {lengths.tolist()} rows, at most {granted} granted"
            )
            assert bool((lengths > prefix).all()), (
                f"{method} leaves {lengths.tolist()} rows: a sample lost all its patches"
            )


def trace_is_partition(method: Reducer, host: TinyHost) -> None:
    """Every input token ends in one row or nowhere, every real row holds the token it stands for, mass is conserved."""
    with host.passed(method) as session:
        last = session.last
        if any(isinstance(step.plan, Soft) for step in last.steps):
            for step in last.steps:
                ones = torch.ones(len(host.batch), step.plan.n, device=host.device)
                assert_close(step.plan.sizes(ones).sum(-1), ones.sum(-1), msg=lambda m: f"{method} loses mass: {m}")
            return
        origin, kept = session.origin, session.last.kept(len(host.found.blocks) - 1)
        lengths = last.tokens.valid.sum(-1).tolist() if last.tokens.valid is not None else [last.tokens.n] * len(origin)
        for b, length in enumerate(lengths):
            rows, stand = origin[b], kept[b][kept[b] >= 0]
            assert len(stand) == length, f"{method}: {len(stand)} tokens stand for {length} rows of sample {b}"
            assert len(stand.unique()) == length, f"{method}: a token of sample {b} is counted twice"
            assert bool(((rows >= -1) & (rows < length)).all()), (
                f"{method}: sample {b} has sources in rows that are not there"
            )
            wanted = torch.arange(length, device=rows.device)
            assert torch.equal(rows[stand], wanted), (
                f"{method}: rows of sample {b} do not hold the tokens they stand for"
            )


def restore_has_shape_and_order(method: Reducer, host: TinyHost) -> None:
    """restore gives every patch the row it ended in, at its place on the grid; dropped ones get the fill."""
    with host.passed(method) as session:
        rows, grid = session.last.tokens.n, session.last.grid or (host.patches + host.guarded,)
        features = torch.randn(len(host.batch), rows, 5, generator=torch.Generator().manual_seed(0)).to(host.device)
        dense = session.restore(features, fill=-7.0)
        assert dense.shape == (len(host.batch), *grid, 5), f"{method}: restore gives shape {tuple(dense.shape)}"
        if any(isinstance(step.plan, Soft) for step in session.last.steps):
            flat = session.restore(torch.full_like(features, 3.0))
            assert_close(flat, torch.full_like(flat, 3.0), msg=lambda m: f"{method}: restore changes a constant: {m}")
            return
        origin = session.origin[:, host.found.prefix :]
        picked = features.gather(1, origin.clamp(min=0)[..., None].expand(-1, -1, 5))
        wanted = torch.where(origin[..., None] < 0, -7.0, picked).unflatten(1, grid)
        assert_close(dense, wanted, msg=lambda m: f"{method}: restore puts rows in the wrong place: {m}")


def ledger_counts_what_ran(method: Reducer, host: TinyHost) -> None:
    """The rows that reach each block's first and last matrix, in attention and in the MLP, are those that the ledger
    says ran: padded with texts of different lengths, packed and masked."""
    scan = host.found.kind == "scan"  # reads every row it is given
    ways = ["padded", *(["packed"] if host.found.packs and not scan else []), *([] if scan else ["masked"])]
    real = None if "padding_changes_nothing" in method.card.exempt else host.lengths
    for execution in ways:
        model, x = host.model(), host.batch
        with torch.no_grad(), host.session(model, method, execution=execution) as session:
            blocks: list[list[int]] = [[] for _ in session.host.blocks]
            handles = [
                part.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][..., 0].numel()))
                for rows, block in zip(blocks, session.host.blocks, strict=True)
                for part in block.modules()
                if type(part).__name__ in MATRICES
            ]
            answer(model, x, real)
            ledger = getattr(session.ledger, "reading", None) or session.ledger  # in front of a cache
            for layer, (rows, entry) in enumerate(zip(blocks, ledger.entries, strict=True)):
                assert entry.ran is not None, (
                    f"{method}, {execution}: the ledger does not say what ran in block {layer}"
                )
                said = (entry.ran.attention, entry.ran.mlp)
                for where, ran, counted in zip(
                    ("attention", "MLP"), (rows[0] / len(x), rows[-1] / len(x)), said, strict=True
                ):
                    assert abs(ran - counted) < 1e-6, (
                        f"{method}, {execution}: {ran} rows per sample are computed in the {where} of block {layer}, "
                        f"the ledger says {counted}"
                    )
            for handle in handles:
                handle.remove()


# -- conduct ----------------------------------------------------------------------------------------------------------
class Interrupted(RuntimeError):
    """Raised by a check inside a forward pass."""


def exception_leaves_clean(method: Reducer, host: TinyHost) -> None:
    """After an exception inside a forward pass the next one is as if nothing had happened, and so is the model."""
    wanted, plain = host.run(method, host.batch), run(host.model(), host.batch)
    model = host.model()
    before = snapshot(model)

    def stop(*_: Any) -> None:
        raise Interrupted

    with torch.no_grad(), host.session(model, method) as session:
        block = session.host.blocks[1]
        part = next(m for m in reversed(list(block.modules())) if not list(m.children()) and list(m.parameters()))
        handle = part.register_forward_pre_hook(stop)
        try:
            answer(model, host.batch)
        except Interrupted:
            handle.remove()
        assert torch.equal(answer(model, host.batch), wanted), f"{method} answers differently after an exception"
    same_snapshot(before, snapshot(model), f"{method} after an exception")
    assert torch.equal(run(model, host.batch), plain), f"{method} is still felt after an exception and removal"


def removal_is_exact(method: Reducer, host: TinyHost) -> None:
    """After remove(), called twice, outputs, every module's __dict__, configs and global tables are as they were."""
    model = host.model()
    plain, before = run(model, host.batch), snapshot(model)
    session = host.session(model, method)
    with torch.no_grad():
        answer(model, host.batch)
    session.remove()
    session.remove()
    same_snapshot(before, snapshot(model), f"{method} after remove()")
    assert torch.equal(run(model, host.batch), plain), f"{method} is still felt after remove()"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a session could leave behind, by name: attributes by identity, hooks, configs, global tables."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                found[f"{path}.{key}"] = [(k, id(v)) for k, v in value.items()]
            else:
                found[f"{path}.{key}"] = id(value) if not isinstance(value, (int, float, str, bool)) else value
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__"):
            found[f"{path}.config"] = repr(sorted(vars(config).items(), key=lambda item: item[0]))
    for name, tensor in model.state_dict().items():
        found[f"state {name}"] = (tensor.data_ptr(), tensor._version)
    found |= {f"table {k}": v for k, v in _tables().items()}
    return found


def _tables() -> dict[str, list[str]]:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    return {t.__name__: sorted(t._global_mapping) for t in (AttentionInterface, AttentionMaskInterface)}


def same_snapshot(before: dict[str, Any], after: dict[str, Any], who: str) -> None:
    """Raises AssertionError naming what differs."""
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, f"{who}: left behind in {', '.join(changed[:5])}"


def _theirs() -> bool:
    """Whether transformers itself is reading: it looks into position ids for packed sequences."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals["__name__"].startswith(("torch.", __name__)):
        frame = frame.f_back
    return frame is not None and frame.f_globals["__name__"] == "transformers.masking_utils"


class _NoSyncFunctions(TorchFunctionMode):
    """Refuses the calls that read a value on the host without passing the dispatcher."""

    REFUSED = frozenset(["tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"])

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in self.REFUSED or _theirs(), f"Tensor.{name} waits for the device"
        return func(*args, **(kwargs or {}))


class _NoSyncDispatch(TorchDispatchMode):
    """Refuses the operators whose result has to come back to the host before anything can go on."""

    REFUSED = (
        "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "repeat_interleave",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.split("::")[1]
        assert name not in self.REFUSED or _theirs(), f"aten::{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            boolean = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not boolean, f"aten::{name} with a boolean mask waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """An error for whatever makes the host wait: CUDA's own check on a GPU, the operators known to do so elsewhere."""
    if torch.device(device).type != "cuda":
        with _NoSyncFunctions(), _NoSyncDispatch():
            yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        raise AssertionError(str(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def no_sync(method: Reducer, host: TinyHost) -> None:
    """A forward pass never waits for the device."""
    model, x = host.model(), host.batch
    with torch.no_grad(), host.session(model, method):
        answer(model, x)
        with no_synchronisation(host.device):
            answer(model, x)


CHECKS: tuple[Check, ...] = (
    keep_all_is_identity, batch_changes_nobody, padding_changes_nothing, masked_equals_gathered, same_input_same_output,
    gradients_reach, dtypes, protected_survive, budget_is_met, trace_is_partition, restore_has_shape_and_order,
    ledger_counts_what_ran, exception_leaves_clean, removal_is_exact, no_sync,
)  # fmt: skip
