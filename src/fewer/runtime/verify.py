"""What a class is trusted with: a session is put on a twin of it, and its answers are held against the twin's own.

Nothing of the user's is run: the twin is small, random, of the same class and config. Each place to act is tried by
itself; a place that fails is refused with what was seen, and the others stay open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import hosts
from ..compat import cache_of, cached
from ..core import KeepRatio, Reducer, Site
from ..core.budgets import Capacity
from ..hosts import Call, Host, HostError, remembered
from ..hosts.decoder import Calls
from ..hosts.discovery import classes_of, code_of, key_of, shallow, twin_of
from ..hosts.twin import one_thread
from ..hosts.watching import inputs_of
from ..hosts.written_out import entered
from ..methods.language.knorm import KNorm
from ..methods.language.streamingllm import StreamingLLM
from ..methods.vision.random import Random
from . import session
from .kv.state import CacheError

TOLERANCES = {torch.float32: (2e-4, 2e-3), torch.float64: (1e-6, 1e-5)}  # the same sums in another order
PLACES = {
    Site.BEFORE_BLOCK: "before a block", Site.AROUND_BLOCK: "around a block",
    Site.MID_BLOCK: "between attention and MLP", Site.AFTER_BLOCK: "after a block", Site.KV_CACHE: "the KV cache",
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Of each place to act: why it is not trusted; empty where it is. first: the same of the first block's entry."""

    places: dict[Site, str]
    first: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {Site(site): why for site, why in self.places.items()})

    def of(self, site: Site) -> str:
        """Why a place is not trusted; empty where it is. Those that are in no block are not judged here."""
        return self.places.get(site, "there is no such place in it" if site.in_blocks else "")


class _Unlike(AssertionError):
    """What was seen is not what should be."""


class _Off(_Unlike):
    """The same, by more than rounding."""


_verdicts: dict[tuple[Any, ...], Verdict] = {}


def verify(host: Host) -> Verdict:
    """Which places of a host's class are trusted; tried once per class and config."""
    if not hasattr(host.root, "config") or host.kind == "cross":  # timm and BLIP's text: known by name, tested here
        return Verdict({site: "" for site in PLACES if site is not Site.KV_CACHE})
    paths = tuple(layer.path for layer in host.layers)
    key = (key_of(host.root), code_of(host.root), paths)
    if key not in _verdicts:
        classes, fact = classes_of(host.root), " ".join([key[0], *paths])
        found = remembered.read("verdict", fact, classes, (Verdict,))
        if found is None:
            with one_thread():
                found = _tried(host)
            remembered.write("verdict", fact, classes, found)
        _verdicts[key] = found
    return _verdicts[key]


def _tried(host: Host) -> Verdict:
    sites = [site for site in PLACES if site is not Site.KV_CACHE or host.kind == "decoder"]
    try:
        twin, found = shallow(host.root, host.found)
        bound = hosts.bind(hosts.Stack(twin, "", tuple(layer.path for layer in found.layers)), found)
        trial = Trial(twin, bound)
    except Exception as error:  # whatever a stranger's code raises
        return Verdict(dict.fromkeys(sites, f"no small twin of it can be tried: {' '.join(str(error).split())[:200]}"))
    places = {site: trial.why(site) for site in sites}
    first = trial.why_first() if bound.kind != "scan" and not places[Site.BEFORE_BLOCK] else ""
    return Verdict(places, first)


@dataclass(frozen=True)
class Read:
    """What a head wants of the rows behind the blocks, see `Host.reads`; why: it can do with none of these.

    fillers   whether it reads rows that are padding as if they were real, see `Host.reads_fillers`
    """

    rows: Literal["some", "last", "each"] = "some"
    why: str = ""
    fillers: bool = False


_read: dict[tuple[Any, ...], Read] = {}


def reading(model: nn.Module, host: Host) -> Read:
    """What a vision model's head makes of fewer rows: tried on a twin of the whole model, once per class and config.

    A head that pools takes any rows. One that lays them out as a map (a backbone's feature maps, a mask's decoder, a
    reconstruction) must have all of them, behind the last block or behind each.
    """
    if host.kind != "vision" or not hasattr(model, "config") or host.reads == "each":
        return Read(host.reads)
    path = host.path
    key = (key_of(model), code_of(model), path)
    if key not in _read:
        classes, fact = classes_of(model), f"{key[0]} {path}"
        found = remembered.read("read", fact, classes, (Read,))
        if found is None:
            with one_thread():
                found = _head(model)
            remembered.write("read", fact, classes, found)
        _read[key] = found
    return _read[key]


def _head(model: nn.Module) -> Read:
    try:
        twin = twin_of(model)
        given = inputs_of(twin)
        own = hosts.find(twin)
        plain = _shapes(_answer(twin, given))
    except Exception:  # no twin of the whole: its blocks are known, and its head is trusted
        return Read()
    said = ""
    for rows in ("some", "last", "each"):
        own.reads = rows
        method = Random(Capacity(_prime(own.patches // 2)), (0,), site=Site.AFTER_BLOCK)
        try:
            with session.start(twin, [method], "padded", None, own) as on:
                got = _shapes(_answer(twin, given))
                left = on.last.tokens.n
        except Exception as error:  # whatever a stranger's code raises
            said = said or f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            continue
        if len(got) == len(plain) and all(_rows_apart(a, b, left) for a, b in zip(got, plain, strict=True)):
            return Read(rows, fillers=rows == "some" and _reads_fillers(twin, given, own, method))
        said = said or "what it makes of fewer rows is of another shape"
    return Read(why=said)


def _reads_fillers(twin: nn.Module, given: dict[str, Any], own: Host, method: Random) -> bool:
    """Whether a head makes something else of the rows that stay where masked ones lie among them."""
    answers = []
    for execution in ("padded", "masked"):
        try:
            with session.start(twin, [method], execution, None, own):
                answers.append(_answer(twin, given))
        except (RuntimeError, TypeError, ValueError):  # masked execution is refused in words of its own
            return False
    few, masked = (_pooled(answer) for answer in answers)
    return any(not torch.allclose(a, b, 1e-3, 1e-4) for a, b in zip(few, masked, strict=True))


def _pooled(answer: Any) -> list[Tensor]:
    """What an answer says of whole samples, such as logits of classes."""
    parts = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (tuple, list)) else [answer]
    return [part for part in parts if _floats(part) and part.dim() < 3]


def _prime(n: int) -> int:
    """The largest prime up to n, three at least: so many rows form no map."""
    return next((p for p in range(n, 3, -1) if all(p % d for d in range(2, p))), 3)


def _answer(twin: nn.Module, given: dict[str, Any]) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return twin(**given)


def _shapes(answer: Any) -> list[torch.Size]:
    """Of all tensors of an answer, in order."""
    if isinstance(answer, Tensor):
        return [answer.shape]
    parts = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (tuple, list)) else ()
    return [shape for part in parts for shape in _shapes(part)]


def _rows_apart(got: torch.Size, want: torch.Size, left: int) -> bool:
    """Whether a shape is as it was, or one of rows of which some have left."""
    return got == want or (len(got) == len(want) == 3 and got[::2] == want[::2] and got[1] == left)


class Trial:
    """A twin and what it answers without us."""

    def __init__(self, twin: nn.Module, host: Host) -> None:
        self.twin, self.host = twin, host
        self.given = inputs_of(twin)
        if host.kind == "decoder":
            self.given["use_cache"] = False
        self.depth = len(host.blocks)
        self.middle = max(self.depth // 2 - 1, 0)  # the last block that others stand behind, at the least
        self.plain = self.run()

    def why(self, site: Site) -> str:
        """Why a place is not trusted; empty where it is."""
        check = self._cache if site is Site.KV_CACHE else self._block
        try:
            try:
                check(site)
            except _Off as off:  # some networks make much of rounding: then all is right with more digits
                if not self._exactly(check, site):
                    raise off
        except _Off as error:
            return f"{error}{self._because()}"
        except (_Unlike, HostError, CacheError, session.SessionError) as error:
            return str(error)
        except Exception as error:  # whatever a stranger's code raises
            said = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return f"on a small twin of it a trial ended in {said}{self._because()}"
        return ""

    def why_first(self) -> str:
        """Why tokens cannot leave before the first block, where it makes the bias between tokens for all others."""
        try:
            got, kept = self._dropped(Site.BEFORE_BLOCK, 0)
            want = _rows(self._hidden(kept, range(self.depth)), kept, True)
            same = _alike(_rows(got, kept, self.host.dense), want)
        except Exception:  # whatever a stranger's code makes of a bias between other tokens than its own
            same = False
        return "" if same else "its first block makes the position bias of all others, from the tokens it is given"

    def _because(self) -> str:
        """What in its blocks makes that dropping is not hiding, where that is known; empty otherwise."""
        inside = [m for block in self.host.blocks for m in block.modules()]
        if any(isinstance(m, nn.modules.conv._ConvNd) and max(m.kernel_size) > 1 for m in inside):
            return "; convolutions in its blocks read neighbours, which are others once tokens have left"
        return ""

    def _exactly(self, check: Callable[[Site], None], site: Site) -> bool:
        """Whether a place passes with the twin, and what it is given, in float64."""
        given, plain, dtype = self.given, self.plain, torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            self.twin.double()
            self.given = {k: v.double() if _floats(v) else v for k, v in given.items()}
            self.plain = self.run()
            check(site)
        except Exception:  # whatever a stranger's code raises
            return False
        finally:
            torch.set_default_dtype(dtype)
            self.twin.float()
            self.given, self.plain = given, plain
        return True

    # -- places around blocks ------------------------------------------------------------------------------------------
    def _block(self, site: Site) -> None:
        host = self.host
        if getattr(host, "looped", False):
            raise _Unlike("its blocks are run in a loop, so that a token cannot leave in one of them")
        if "block" not in host.acts:
            raise _Unlike("its blocks do not hand on one sequence of features")
        if site is Site.MID_BLOCK and host.kind != "scan" and "middle" not in host.acts:
            raise _Unlike("attention and MLP run side by side in its blocks, or cannot be told apart")
        if host.kind != "scan" and "attention" not in host.acts:
            raise _Unlike("the attention of some of its blocks cannot be entered, so nothing could be hidden from it")
        if host.kind != "scan" and any(layer.attention is None for layer in host.layers):
            raise _Unlike(
                "some of its blocks keep a state instead of attention, which tokens that leave in between would stay in"
            )
        every = tuple(range(self.depth))
        with self._session(Random(KeepRatio(1.0), every, site=site)):
            _same(self.run(), self.plain, "keeping all tokens changes what the model says")
        _same(self.run(), self.plain, "after a session the model does not say what it said before")
        if site is Site.AROUND_BLOCK:
            self._around()
            return
        inside = site in (Site.MID_BLOCK, Site.AFTER_BLOCK)
        layer = self.middle if inside else min(self.middle + 1, self.depth - 1)
        got, kept = self._dropped(site, layer)
        if host.kind != "scan":
            want = _rows(self._hidden(kept, range(layer + inside, self.depth)), kept, True)
            _close(_rows(got, kept, host.dense), want, "dropping tokens is not what hiding them is")
        if host.kind == "decoder":
            self._into_cache(site, layer, got)

    def _around(self) -> None:
        """Tokens that pass a block by keep what they were; the others are as in a block that is given them alone."""
        last = self.depth - 1
        _, kept = self._dropped(Site.BEFORE_BLOCK, last)
        with self._session(Random(KeepRatio(0.6, of="start"), (last,), site=Site.AROUND_BLOCK)):
            *_, came, got = self._features(self.given)[0]
        by = torch.ones(*got.shape[:2], 1).scatter(1, kept.clamp(min=0)[..., None], 0)
        _same(got * by, came * by, "tokens that pass a block by do not come out as they went in")
        if self.host.kind != "scan":
            want = _rows(self._hidden(kept, range(last, self.depth)), kept, True)
            _close(_rows(got, kept, True), want, "passing tokens by is not what hiding them is")

    def _into_cache(self, site: Site, layer: int, want: Tensor) -> None:
        """Tokens leave a prompt that is read into a cache as they leave one that is not."""
        try:
            got, _ = self._dropped(site, layer, use_cache=True)
        except CacheError:  # of a kind that no session takes, and says so when it meets one
            return
        _close(got, want, "a prompt that is read into a cache is not what it is without one")

    def _dropped(self, site: Site, layer: int, **more: Any) -> tuple[Tensor, Tensor]:
        """What the last block gives where tokens leave in one block, and which tokens its rows are."""
        with self._session(Random(KeepRatio(0.6, of="start"), (layer,), site=site)) as on:
            got, kept = self.run(**more), on.last.kept(self.depth - 1)
            acted = any(step.method >= 0 for step in on.last.steps)
        if not acted:
            raise _Unlike("a method that drops tokens did not act")
        return got, kept

    def _hidden(self, kept: Tensor, where: range) -> Tensor:
        """What the last block gives when nothing leaves, but in some blocks nobody sees what was dropped."""
        host, n = self.host, self.plain.shape[1]
        gone = torch.ones(len(kept), n + 1, dtype=torch.bool)
        gone = gone.scatter(1, torch.where(kept < 0, n, kept), False)[:, :n]
        bias = torch.zeros(gone.shape).masked_fill(gone, torch.finfo(torch.float32).min)[:, None, None]

        def block(layer: int) -> Callable[..., Any]:
            def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                call = Call(bias if layer in where else None)
                with host.attending(layer, call, x):
                    out = host.own(layer)(x, *args, **kwargs)
                host.reached(layer, call)
                return (out[0], tuple(out[1:])) if isinstance(out, (tuple, list)) else (out, ())

            return run

        with ExitStack() as undo:
            host.attach(block, undo)
            return self.run()

    def _session(self, method: Reducer, execution: session.Execution = "padded") -> session.Session:
        return session.start(self.twin, [method], execution, None, self.host)

    def run(self, **more: Any) -> Tensor:
        """(B, N or M, C): what the last block gives."""
        out, _ = self._forward({**self.given, **more})
        return out

    def _forward(self, given: dict[str, Any]) -> tuple[Tensor, Any]:
        caught, output = self._features(given)
        return caught[-1], output

    def _features(self, given: dict[str, Any]) -> tuple[list[Tensor], Any]:
        """What each block gives, and the answer."""
        caught: list[Tensor] = []

        with ExitStack() as undo:
            self.host.listen(caught.append, undo)  # to all: the last may not run, as one that looks at pictures
            undo.enter_context(torch.random.fork_rng(devices=[]))
            undo.enter_context(torch.no_grad())
            torch.manual_seed(0)
            output = self.twin(**given)
        return caught, output

    # -- the KV cache --------------------------------------------------------------------------------------------------
    def _cache(self, site: Site) -> None:
        host: Any = self.host
        if not any(m is not None for m in host.attentions):
            raise _Unlike("it has no attention that could be entered, so that what its cache gives cannot be followed")
        first, cache = self._read()
        try:
            plain = first, self._written(cache)
        except Exception as error:
            raise _Unlike("it does not go on from a cache when it is given the next word alone") from error
        with self._session(StreamingLLM(Capacity(10**6), sinks=2, positions="original")):
            first, cache = self._read()
            for got, want in zip((first, self._written(cache)), plain, strict=True):
                _same(got, want, "a cache that keeps all rows changes what the model says")
        self._evicted(StreamingLLM(Capacity(7), sinks=2, positions="original", decodes=False))
        if host.unasking:  # its arguments are told of the rows that are left, which are not the same in all heads
            self._evicted(KNorm(Capacity(7)))

    def _evicted(self, method: Reducer) -> None:
        """A cache without some rows gives what it gives with these rows hidden."""
        host: Any = self.host
        with self._session(method) as on:
            _, cache = self._read()
            kept = {i: on.kept(i) for i, m in enumerate(host.attentions) if m is not None}
            counts = [k.shape[-1] for k in kept.values()]
            got = self._written(cache)
        length = self.given["input_ids"].shape[1]
        if not kept or min(counts) >= length:
            raise _Unlike("a method that evicts rows did not act on its cache")
        _, cache = self._read()
        hides = _Hides(host, kept, length)
        with host.watched(hides), ExitStack() as undo:
            host.surround(hides.around, undo)
            want = self._written(cache)
        _close(got, want, "a cache without some rows is not what hiding these rows is")

    def _read(self) -> tuple[Tensor, Any]:
        """What the last block gives for a prompt, and the cache that holds it."""
        first, output = self._forward({**self.given, "use_cache": True})
        return first, cache_of(output)

    def _written(self, cache: Any) -> Tensor:
        """What the last block gives for one word behind the prompt."""
        more = {"input_ids": self.given["input_ids"][:, -1:], "use_cache": True, **cached(self.twin, cache)}
        if (mask := self.given.get("attention_mask")) is not None:
            more["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return self._forward(more)[0]


class _Hides:
    """Takes part in the attention of a decoder with a whole cache and hides rows of a prompt behind it."""

    def __init__(self, host: Any, kept: dict[int, Tensor], length: int) -> None:
        self.host, self.kept, self.length, self.calls = host, kept, length, Calls(host)

    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        index, *_ = self.calls.next(module) or (None,)
        if index in self.kept and q.shape[2] == 1:
            shown = self._shown(index)[..., -k.shape[2] :]
            shown = shown if shown.shape[1] == 1 else shown.repeat_interleave(q.shape[1] // shown.shape[1], dim=1)
            if mask is None:
                mask = shown
            elif mask.dtype == torch.bool:
                mask = mask & shown
            else:
                mask = mask.masked_fill(~shown, torch.finfo(mask.dtype).min)
        return plain(module, q, k, v, mask, **kwargs)

    def around(self, index: int, own: Callable, given: dict[str, Any], features: str) -> Any:
        """The same for attention that asks no table."""
        x = given[features]
        if index not in self.kept or x.shape[1] > 1:
            return own(**given)
        shown = self._shown(index)
        shown = shown.repeat_interleave(self.host.heads // shown.shape[1], dim=1)
        bias = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
        with entered(Call(bias), batch=len(x), keys=shown.shape[-1]):
            return own(**given)

    def _shown(self, index: int) -> Tensor:
        """(B, 1 or G, 1, N + 1) bool: which rows of a layer are in sight, the new word's among them."""
        kept, total = self.kept[index], self.length + 1
        stays = torch.zeros(*kept.shape[:2], total + 1, dtype=torch.bool)
        stays = stays.scatter(-1, torch.where(kept < 0, total, kept), True)[..., :total]
        stays[..., self.length :] = True
        return stays[:, :, None]


def _rows(x: Tensor, kept: Tensor, whole: bool) -> Tensor:
    """The rows that stay; padding as zeros. whole: whether x has a row for each input token."""
    real = (kept >= 0)[..., None]
    if whole:
        x = x.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    return x[:, : kept.shape[1]].masked_fill(~real, 0)


def _same(got: Tensor, want: Tensor, what: str) -> None:
    if got.shape != want.shape or not torch.equal(got, want):
        off = f"by {(got - want).abs().max():.2g}" if got.shape == want.shape else f"in shape {tuple(got.shape)}"
        raise _Unlike(f"{what} ({off})")


def _close(got: Tensor, want: Tensor, what: str) -> None:
    if got.shape != want.shape:
        raise _Unlike(f"{what} (of shape {tuple(got.shape)})")
    if not _alike(got, want):
        raise _Off(f"{what} (off by {(got - want).abs().max():.2g})")


def _alike(got: Tensor, want: Tensor) -> bool:
    atol, rtol = TOLERANCES[want.dtype]
    return torch.allclose(got, want, atol=atol, rtol=rtol)


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def told(host: Host) -> list[tuple[str, str]]:
    """The verdict in words, as (place, what is known of it) rows."""
    return [(PLACES[site], (why and f"refused: {why}") or "verified") for site, why in verify(host).places.items()]


def check(host: Host, methods: Sequence[Reducer], spoken: Callable[[Reducer], str]) -> None:
    """Raises HostError where a method would act in a place that is not trusted."""
    verdict = verify(host)
    for method in methods:
        entering = method.site in (Site.BEFORE_BLOCK, Site.AROUND_BLOCK)
        if verdict.first and entering and 0 in method.acts_at(len(host.blocks)):
            raise HostError(f"{spoken(method)} acts before block 0 of {host.name}: {verdict.first}; pass layers=1+...")
        if why := verdict.of(method.site):
            others = [PLACES[s] for s, bad in verdict.places.items() if not bad]
            way = f"places that are: {', '.join(others)}" if others else "no place in it is"
            raise HostError(
                f"{spoken(method)} acts {PLACES.get(method.site, method.site.value)}, which is not trusted in "
                f"{host.name}: {why}; {way}"
            )
