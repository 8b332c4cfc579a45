"""Whether rows that leave a prompt at the bridge leave what the language model alone makes of the others: tried on a
twin, once per class and config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import without_cache
from ..core import KeepRatio, Reducer, Site
from ..core.budgets import Capacity
from ..hosts import HostError, VisionLanguageHost, remembered
from ..hosts.bridge import readers
from ..hosts.discovery import classes_of, code_of, key_of
from ..hosts.twin import one_thread
from ..hosts.twin_visual import NoExample, example, twins
from ..methods.vision.random import Random
from .program import Execution
from .session import Session, start

ATOL, RTOL = 5e-4, 5e-3  # the same sums in another order, in float32
LEFT = 2  # rows of each picture
_known: dict[tuple[str, tuple[int, ...]], str] = {}


class _Unlike(AssertionError):
    """What was seen is not what should be."""


def why(host: VisionLanguageHost) -> str:
    """Why the bridge of a class is not trusted; empty where it is."""
    if host.bridge.why:
        return host.bridge.why
    key, classes = (key_of(host.whole), code_of(host.whole)), classes_of(host.whole)
    if key not in _known:
        found = remembered.read("visual", key[0], classes, ())
        if not isinstance(found, str):
            with one_thread():
                found = _tried(host)
            remembered.write("visual", key[0], classes, found)
        _known[key] = found
    return _known[key]


def check(host: VisionLanguageHost, method: Reducer, spoken: str) -> None:
    """Raises HostError where a method acts at a bridge that is not trusted."""
    if method.site is Site.BRIDGE and (bad := why(host)):
        raise HostError(
            f"{spoken} acts between vision tower and language model, which is not trusted in {host.title}: {bad}; "
            "choose a method on the language model or its cache (fastv, snapkv)"
        )


def _tried(host: VisionLanguageHost) -> str:
    state = any(layer.attention is None for layer in host.layers)
    try:
        for twin in twins(host.whole):
            try:
                given = example(twin, even=state)
            except NoExample:
                continue
            _Trial(twin, host, given).run()
            return ""
    except _Unlike as error:
        return str(error)
    except Exception as error:  # whatever a stranger's code raises
        said = " ".join(str(error).split())[:200]
        return f"on a small twin of it a trial ended in {type(error).__name__}: {said}"
    return "no prompt with pictures is known that a small twin of it takes"


class _Trial:
    """A twin, bound, and two prompts with a picture each."""

    def __init__(self, twin: nn.Module, host: VisionLanguageHost, given: dict[str, Any]) -> None:
        stack = next(s for s in readers(twin) if s.path == host.bridge.language)
        taken = inspect.signature(type(twin).forward).parameters
        self.twin, self.given = twin, given
        if taken.keys() & {"use_cache", "kwargs"}:  # one pass, and no cache that a hidden row could stay in
            self.given = {**given, "use_cache": False}
        self.host = VisionLanguageHost(host.bridge, twin, "", stack)
        self.rows: list[tuple[dict[str, Any], Tensor]] = []  # what the decoder was given, and what it gave

    def run(self) -> None:
        plain = self._read()
        for keep in (True, False):
            budget = KeepRatio(1.0) if keep else Capacity(LEFT)
            session = self._session(budget)
            with session:
                got = self._read()
                kept, held = session.last.kept(0), sum(session.layout.counts)
                left = int(session.seen(0).sum())
            if keep and not torch.equal(got, plain):
                raise _Unlike("keeping all rows changes what its language model says")
            if not keep and not left < held:
                raise _Unlike("a method that drops visual rows did not act")
        hidden = None
        if all(layer.attention is not None for layer in self.host.layers):
            with self._session(budget, "masked"):
                hidden = self._read()
        for sample, row in enumerate(kept):
            row = row[row >= 0]
            want = self._alone(self.rows[0][0], sample, row) if hidden is None else hidden[sample, row]
            if not torch.allclose(got[sample, row], want, atol=ATOL, rtol=RTOL):
                off = (got[sample, row] - want).abs().max()
                raise _Unlike(f"rows that stay are not what its language model makes of them alone (off by {off:.2g})")
        if not torch.equal(self._read(), plain):
            raise _Unlike("after a session its language model does not say what it said before")

    def _session(self, budget: Any, execution: Execution = "padded") -> Session:
        return start(self.twin, [Random(budget, site=Site.BRIDGE)], execution, None, self.host)

    def _read(self) -> Tensor:
        """(B, S, d): what the decoder makes of the prompts."""
        root, held = self.host.root, {}

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            held.update({**dict(zip(names, args, strict=False)), **kwargs})

        def behind(module: nn.Module, args: tuple, output: Any) -> None:
            self.rows.append((held, output[0]))

        hooks = [
            root.register_forward_pre_hook(before, with_kwargs=True, prepend=True), root.register_forward_hook(behind)
        ]  # fmt: skip
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.twin(**self.given)
        finally:
            for hook in hooks:
                hook.remove()
        return self.rows[-1][1]

    def _alone(self, given: dict[str, Any], sample: int, rows: Tensor) -> Tensor:
        """(M, d): what the decoder makes of some rows of a prompt, given nothing else. Of decoders with a state, which
        reads what is masked too; where attention slides, it counts hidden rows, and masking is what is meant."""
        b, s = given["inputs_embeds"].shape[:2]
        marked = given.get("visual_pos_masks")
        given = {k: v for k, v in without_cache(given).items() if k not in ("use_cache", "cache_position")}
        short = {k: _cut(v, b, s, sample, rows) for k, v in given.items() if k != "deepstack_visual_embeds"}
        if marked is not None and (deep := given.get("deepstack_visual_embeds")) is not None:
            which = (marked.reshape(-1).cumsum(0) - 1).view(b, s)[sample, rows][marked[sample, rows]]
            short["deepstack_visual_embeds"] = [x[which] for x in deep]
        taken = inspect.signature(type(self.host.root).forward).parameters
        if short.get("position_ids") is None and "position_ids" in taken:
            short["position_ids"] = rows[None]
        with torch.no_grad():
            return self.host.root(**short, use_cache=False)[0][0]


def _cut(value: Any, batch: int, length: int, sample: int, rows: Tensor) -> Any:
    """An argument for some rows of one sample."""
    if isinstance(value, dict):
        return {k: _cut(v, batch, length, sample, rows) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(v, batch, length, sample, rows) for v in value)
    if not isinstance(value, Tensor) or length not in value.shape:
        return value
    first = value.shape.index(length)
    for axis in (a for a, n in enumerate(value.shape) if n == length):
        value = value.index_select(axis, rows)
    sides = [a for a in {0, first - 1} if 0 <= a < first and value.shape[a] == batch]
    return value.narrow(max(sides), sample, 1) if sides else value


__all__ = ["check", "why"]
