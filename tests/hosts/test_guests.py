"""Guests of the same house: models that other libraries have changed or wrapped, before a session or during it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewer
import fewer.hosts
from decoders import BUILD, decoder, prompt
from fewer.hosts.base import Stand
from vit import images, run, tiny_vit

VISION = [("vit", "tome:r=2"), ("timm", "tome:r=2"), ("beit", "evit:keep=0.6,layers=0+1")]
CACHE = "snapkv:keep=0.5,window=4,kernel=3"


def fresh(name: str) -> nn.Module:
    """A decoder of one's own, as `decoder` gives it."""
    model = BUILD[name]().eval()
    model.load_state_dict(decoder(name).state_dict())
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    return model


def written(model: Any, *lengths: int) -> Tensor:
    ids, mask = prompt(*lengths or (20, 11))
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)


def ours(model: nn.Module) -> list[str]:
    """Where something of a session still stands in a model."""
    found = []
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            found.append(f"{path}: hooks")
        found += [f"{path}.{name}" for name, held in vars(module).items() if isinstance(held, Stand)]
        if getattr(getattr(module, "config", None), "_attn_implementation_internal", "") == "fewer":
            found.append(f"{path}.config")
    return found


# -- accelerate --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, method", VISION)
@pytest.mark.parametrize("order", ["HSsh", "HShs", "SHsh", "SHhs", "HShHsh", "SHhHsh", "HSHsh"])
def test_accelerate_hooks_come_and_go_in_every_order(kind: str, method: str, order: str):
    """S puts a session on and s takes it off, H and h do that with a hook on every block."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):  # type: ignore[name-defined, misc]
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model, x, hook = tiny_vit(kind), images(), Counting()
    plain = run(model, x)
    with fewer.apply(model, method):
        reduced = run(model, x)
    blocks = fewer.hosts.find(model).blocks
    session, hooked, on = None, False, False
    for step in order:
        if step in "Hh":
            hooked = step == "H"
            for block in blocks:
                hooks.add_hook_to_module(block, hook) if hooked else hooks.remove_hook_from_module(block)
        elif step == "S":
            session, on = fewer.apply(model, method), True
        else:
            session.remove()
            on = False
        before = hook.calls
        assert torch.equal(run(model, x), reduced if on else plain), step
        assert hook.calls - before == (len(blocks) if hooked else 0), step
    assert not ours(model)


def test_a_hook_that_stays_keeps_no_session_alive():
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_vit("vit")
    session = fewer.apply(model, "tome:r=2")
    for block in fewer.hosts.find(model).blocks:
        hooks.add_hook_to_module(block, hooks.ModelHook())
    session.remove()
    ref = weakref.ref(session)
    del session
    gc.collect()
    assert ref() is None


def _dispatched(model: nn.Module) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def _offloaded(model: nn.Module) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("place", [_dispatched, _offloaded])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind, method", [*VISION, ("dinov2", "random:keep=0.5,layers=0+")])
def test_placed_by_accelerate(kind: str, method: str, late: bool, place: Callable[[nn.Module], None]):
    pytest.importorskip("accelerate")
    model, x = tiny_vit(kind), images()
    plain = run(model, x)
    with fewer.apply(model, method) as session:
        reduced, cost = run(model, x), session.ledger.gflops
    if not late:
        place(model)
    session = fewer.apply(model, method)
    if late:
        place(model)
    assert torch.equal(run(model, x), reduced) and session.ledger.gflops == pytest.approx(cost)
    session.remove()
    assert torch.equal(run(model, x), plain) and not ours(model)


@pytest.mark.parametrize("place", [_dispatched, _offloaded])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", [CACHE, "random:keep=0.5,layers=1+"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_decoders_placed_by_accelerate(name: str, method: str, late: bool, place: Callable[[nn.Module], None]):
    pytest.importorskip("accelerate")
    model = fresh(name)
    plain = written(model)
    with fewer.apply(model, method):
        reduced = written(model)
    if not late:
        place(model)
    session = fewer.apply(model, method)
    if late:
        place(model)
    assert torch.equal(written(model), reduced)
    session.remove()
    assert torch.equal(written(model), plain) and not ours(model)
