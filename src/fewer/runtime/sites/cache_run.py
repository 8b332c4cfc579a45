"""One forward pass over one KV cache: attention over the stored rows, then the methods' turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ...core import Hard, Reducer, Seen, Site
from ...core.attention import full_precision
from ...core.cache import Attending, CacheReducer, CacheSignals, Ranker, Rereader, Rows, attended
from ...core.cache.selectors import ragged
from ...core.masks import added
from ...core.place import Place
from ...core.plan import take
from ...hosts import Call, DecoderHost, HostError, under
from ...hosts.attention import BESIDE, summed, unsaid
from ...hosts.decoder import Calls
from ...hosts.logical import Unbanded, at_rows
from ...hosts.written_out import entered
from ...spec import text
from ..kv.attention import trained_attention, watched
from ..kv.layer import ReducedLayer, exchange
from ..kv.state import Access, CacheError
from ..program import Bound, Program, SessionError, Turn
from .leaving import Leaving

if TYPE_CHECKING:
    from .prefill import DecoderPrefill
    from .visual_context import VisualContext


class Owner(Protocol):
    """The site a pass is of."""

    bound: Bound
    host: DecoderHost
    program: Program
    between_blocks: bool

    @property
    def headwise(self) -> bool: ...
    @property
    def unordered(self) -> bool: ...
    @property
    def weighs(self) -> bool: ...
    def clock(self) -> AbstractContextManager[None]: ...
    def spend(self, flops: int) -> None: ...
    def note(self, line: str) -> None: ...
    def acted(self) -> None: ...
    def inner(self, run: Any, root: nn.Module, **given: Any) -> None: ...


class CacheRun:
    """A pass. Takes part in attention as the hosts' AttentionRun.

    mask: the model's (B, logical) padding mask, or None; positions: (B or 1, Q) position ids of text, or None.
    """

    def __init__(self, site: Owner, cache: Any, mask: Tensor | None, positions: Tensor | None, front: int = 0) -> None:
        self.site, self.bound, self.host, self.program = site, site.bound, site.host, site.program
        self.cache, self.given, self.position_ids, self.calls = cache, mask, positions, Calls(self.host)
        held = enumerate([] if cache is None else cache.layers)  # states of blocks without attention stand between
        self.at: dict[int, ReducedLayer] = {i: layer for i, layer in held if isinstance(layer, ReducedLayer)}
        self.layers = list(self.at.values())
        self.prefill: DecoderPrefill | None = None  # the tokens' way through the blocks, where methods act there
        self.context: VisualContext | None = None  # the visual rows among them
        self.given_none = False  # whether the cache was made here
        self.fresh = cache is not None and cache.get_seq_length() == 0
        self.front = front  # how many of its tokens are learned rows
        self.entry: Tensor | None = None  # (B, Q, C), what entered the first block, where a method wants it
        self.memory: dict[int, dict[str, Any]] = {}  # of each method, where no cache keeps it
        self.attending: Attending | None = None  # the call under way, where a method wants it
        self._padded: bool | None = None
        self._totals: list[int] = []
        access = Access(self.program.steady, site.headwise, site.unordered)
        for layer in self.layers:
            layer.access = access
        self.leaving = Leaving(self)
        self.weighs = site.weighs and not torch.is_grad_enabled()
        # Behind a cache only a training step has the training form: generation takes the other, whatever the mode.
        self.training = self.bound.training and (cache is None or torch.is_grad_enabled())

    # -- called by the host -------------------------------------------------------------------------------------------
    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The model's own attention over the stored rows, then the methods' turn. q (B, H, Q, d), k, v (B, G, S, d)."""
        read, heard = self.calls.next(module), under.call
        if read is None:  # another model's attention, inside this one
            return plain(module, q, k, v, mask, **kwargs)
        index, first, last = read
        if heard is not None:
            heard.entered = True
        layer = self.at[index] if self.at else None
        if layer is not None and layer.headwise(q.shape[2]):
            with full_precision(q):
                out = layer.attention(q, _scale(q, kwargs), mask), None
            self._count(layer, q.shape[0])
            layer.settle()
            return out
        if layer is not None:
            mask = layer.mask(mask, q.shape[1], q.shape[2])
            kwargs = {n: layer.fit(x, q.shape[2]) if isinstance(x, Tensor) else x for n, x in kwargs.items()}
            if first:
                self._count(layer, q.shape[0])
        call = LayerCall(self, index, layer, q, k, v, mask, kwargs)
        if heard is not None and heard.watch:
            said = unsaid(module, q, k, kwargs) if mask is None and call.beside is not None else mask
            heard.seen = watched(q, k, v, call.scale, summed(said, call.beside, q.dtype), heard.whole)
            heard.where = layer.positions() if heard.whole and layer is not None else None
        if heard is not None and heard.policy is not None:
            heard.no_maps(module)
            out = trained_attention(q, k, v, call.scale, mask, heard)
            if layer is not None and last:
                layer.settle()
            return out
        if self.program.gates:
            with full_precision(q):
                self._gate(call)
        if layer is None:
            self.attending = None
            return plain(module, q, k, v, call.mask, **kwargs)
        layer.record.read = None
        shown: tuple[Tensor, Tensor, Tensor | None] = k, v, call.mask
        if self.program.reads:
            with self.site.clock(), torch.no_grad(), full_precision(q):
                shown = self._read(call)
        if self.weighs and self._alone(call):
            with full_precision(q):
                answer, call.weights = attended(Seen(q, k, v, call.scale))
            out = answer, None
        else:
            out = plain(module, q, *shown, **kwargs)
        if self.attending is not None:
            self.attending.weights = out[1]
        if last:
            if not first:  # calls that share keys may share out the values
                call.k, call.v = layer.view()
            self._turns(call, layer)
        return out

    def around(self, index: int, own: Callable, given: dict[str, Any], features: str) -> Any:
        """The same for an attention module that asks no table. own: its code; given: its arguments by name, those over
        logical positions among them, and the features (B, Q, C). They are told of the stored rows while it runs, and
        its attention is looked at where a method may act."""
        layer, host, x = self.at.get(index), self.host, given[features]
        bias = band = None
        if layer is None:
            if self.prefill is None or not self.prefill.steps:
                return own(**given)
            left, logical = self.prefill.tokens.place(), self.prefill.first.n
            band, place = host.band(index), left[:, None]
            given, bias = at_rows(given, x, place, logical, host.heads, holes=False, band=band, asking=left)
        else:
            place = layer.coming(x.shape[1], x.device)
            if layer.reduced or layer.arriving is not None:
                came = x.shape[1] if layer.arriving is None else layer.arriving.total
                asking = None if layer.arriving is None else layer.length + layer.arriving.place
                band, logical = host.band(index), layer.get_mask_sizes(came)[0]
                given, bias = at_rows(given, x, place, logical, host.heads, holes=layer.gappy, band=band, asking=asking)
        heard = Call(bias, watch=layer is not None and (x.shape[1] > 1 or not self.program.steady))
        with ExitStack() as around:
            if heard.asks:
                around.enter_context(entered(heard, batch=len(x), keys=place.shape[-1]))
            if band is not None:
                around.enter_context(Unbanded(band))
            out = own(**given)
        if layer is None:
            return out
        with torch.no_grad():
            self._count(layer, len(x))
        if not heard.watch:
            layer.settle()
            return out
        if heard.seen is None:
            raise HostError(
                f"the attention of block {index} ({type(host.attentions[index]).__name__}) was not reached: it is "
                "written out in a way that was not found; call the model with use_cache=False"
            )
        k, v = layer.view()
        seen, given = heard.seen, {**given, "scaling": heard.seen.scale}
        told = {name: value for name, value in given.items() if name != BESIDE}  # what was seen has it already
        self._turns(LayerCall(self, index, layer, seen.q.to(k.dtype), k, v, seen.bias, told), layer)
        return out

    def _turns(self, call: LayerCall, layer: ReducedLayer) -> None:
        """What the methods do once a layer's attention is known: rows go, what is left is stored."""
        if call.q.shape[2] == 1 and self.program.steady:
            layer.settle()
        else:
            with self.site.clock():
                if not self.leaving.takes(call, layer):
                    with torch.no_grad(), full_precision(call.q):
                        for turn in call.turns:
                            self._act(call, layer, turn)
                        self._store(layer, call.index)
                    layer.settle()
        self.attending = None

    def finish(self) -> None:
        """The pass is over: layers that waited for the last one have their turn."""
        if self.leaving.waiting:
            with self.site.clock(), torch.no_grad(), full_precision(self.layers[0].keys):
                self.leaving.leave()

    def _alone(self, call: LayerCall) -> bool:
        """Whether one query reads all rows of a layer where a method acts, and some are gone: before that the model's
        own attention stays what it is, to the bit."""
        single = call.q.shape[2] == 1 and call.mask is None and call.layer is not None and call.layer.reduced
        return single and bool(call.turns) and call.beside is None

    # -- what is padding ----------------------------------------------------------------------------------------------
    def real(self, n: int) -> Tensor | None:
        """(B, N) bool: which of this pass's tokens are no padding; None = all, as far as can be told."""
        if not isinstance(self.given, Tensor) or self.given.dim() != 2:
            return None
        return self.given[:, -n:] != 0

    def _count(self, layer: ReducedLayer, batch: int) -> None:
        """How many real tokens each sample has seen. One read of the padding mask per pass of several tokens."""
        queries = layer.length - layer.began
        if queries == 1 and layer.totals:
            layer.totals = [t + 1 for t in layer.totals]
        else:
            layer.totals = self._seen(batch, layer.length, queries)

    def _seen(self, batch: int, length: int, queries: int) -> list[int]:
        given = self.given
        if given is None:
            return [length] * batch
        if not isinstance(given, Tensor) or given.dim() != 2:
            raise CacheError(
                "the session must know which tokens are padding: pass attention_mask as (batch, length), not a mask of "
                + (f"{given.dim()} dimensions" if isinstance(given, Tensor) else f"type {type(given).__name__}")
            )
        if given.shape[-1] != length:
            raise CacheError(
                f"attention_mask speaks of {given.shape[-1]} tokens, the cache has seen {length}: it must cover the "
                "evicted ones too, as generate() passes it"
            )
        if self._padded is None:
            real = given != 0
            new = real[:, -queries:][:, self.front :]  # behind learned rows, padding is on the left still
            facts = [real.all(), (new[:, :-1] & ~new[:, 1:]).any()]
            if self.position_ids is not None and self.position_ids.shape[-1] == queries:
                p = self.position_ids[:, self.front :]
                facts.append(((p[:, 1:] <= p[:, :-1]) & new[:, :-1] & new[:, 1:]).any())
            whole, right, backwards = [*torch.stack(facts).tolist(), False][:3]
            if right:
                raise CacheError(
                    "padding on the right, or inside a prompt, leaves holes in the cache; pad on the left, or call the "
                    "model with use_cache=False where nothing is to be generated (config.use_cache = False in training)"
                )
            if backwards:
                raise CacheError("position_ids fall inside a prompt: packed sequences cannot share a cache")
            self._padded = not whole
            self._totals = real.sum(-1).tolist() if self._padded else [length] * batch
        return list(self._totals)

    # -- the methods' turns -------------------------------------------------------------------------------------------
    def method(self, turn: Turn) -> CacheReducer:
        method = self.program.methods[turn.method]
        assert isinstance(method, CacheReducer)
        return method

    def _gate(self, call: LayerCall) -> None:
        """The mask gets what methods add to the logits."""
        if not self.program.gates or self.host.slides(call.index):
            return
        for turn in call.turns:
            if (method := self.method(turn)).gates:
                self.site.acted()
                gate = method.gate(call.signals(turn), call.rows)
                if call.layer is not None and call.layer.learned:
                    gate = gate.masked_fill(_per_head(call.layer.front(), gate.shape[1])[:, :, None], 0)
                call.mask = added(gate, call.mask, call.q.shape[2], call.k.shape[2]).to(call.q.dtype)

    def _read(self, call: LayerCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask of the rows this pass reads: all that are stored, or those a method chose."""
        assert call.layer is not None
        if call.layer.window is not None:
            return call.k, call.v, call.mask
        for turn in call.turns:
            method = self.method(turn)
            plan = method.read(call.signals(turn), call.rows) if method.reads else None
            if plan is None:
                continue
            self.site.acted()
            if call.q.shape[2] > 1:
                raise SessionError(
                    f"{text(method)} chose rows for a pass of {call.q.shape[2]} tokens; only one may choose"
                )
            plan = _with(plan, call.layer.front()) if call.layer.learned else plan
            lengths = plan.lengths
            call.layer.record.read = plan.m if lengths is None else lengths.float().mean()
            return _picked(plan, call.k, call.v, call.mask, call.q.shape[1])
        return call.k, call.v, call.mask

    def _act(self, call: LayerCall, layer: ReducedLayer, turn: Turn) -> None:
        method, several = self.method(turn), call.q.shape[2] > 1
        if not method.evicts or isinstance(method, Rereader) or (method.once and not self.fresh):
            return
        if method.gates and (self.training or self.host.slides(call.index)):
            return
        evicts = method.decodes or several
        if not evicts and not method.accumulates:
            return
        rows = call.rows
        counts = rows.counts(method.allowance, call.place(turn), method.least)
        everything = counts == list(rows.totals) or (rows.real is None and min(counts) >= rows.n)
        everything = everything and not method.budget.adaptive
        if everything and not method.accumulates and not method.watches:
            return
        signals = call.signals(turn)
        if method.watches:
            if counts == list(rows.totals):
                method.watch(signals, rows)
                return
            everything = False
        if method.accumulates:
            signals.received = _receive(layer, signals)
        if not evicts or everything:
            return
        gap: Tensor | None = None
        self.site.acted()
        if isinstance(method, Ranker) and counts[0] == rows.n - 1 and rows.even and layer.replaces(call.k):
            exchange([layer], layer.positions(), method.leaver(signals, rows), layer.received)
        else:
            plan = method.plan(signals, rows)
            assert isinstance(plan, Hard)
            if rows.real is not None and plan.lengths is not None:  # a sample that lost nothing has no gap to close
                gap = (rows.real.sum(-1) > plan.lengths)[..., None]
            held = _held(layer, method, plan, call.k, call.v)
            layer.keep(_with(plan, layer.front()) if layer.learned else plan, *held)
        if method.travelling:
            rotary = self.host.rotary(call.index)
            assert rotary is not None
            layer.rerotate(rotary, method.travelling, gap)

    def _store(self, layer: ReducedLayer, index: int) -> None:
        """What is left by all methods is stored as one of them says."""
        if self.fresh and layer.access is not None and self.program.rereads:
            return  # the prompt is read again before
        for turn in self.program.at(Site.KV_CACHE, index):
            codec = self.method(turn).codec
            if codec is not None and layer.window is None:
                self.site.acted()
                layer.encode(codec, self.rows(layer, layer.keys, learned=True).real)

    def rows(self, layer: ReducedLayer, k: Tensor, learned: bool = False) -> Rows:
        """What a method must know of a layer's rows. k: (B, G, S, d), their keys. learned: whether rows that nobody
        wrote are among them: for methods they are not there, so that none can choose or count them."""
        b, s = k.shape[0], k.shape[2]
        place = layer.positions()
        real: Tensor | None = None
        if layer.packing is not None or layer.holes:
            real = place >= 0
        if self.given is not None and any(t != layer.length for t in layer.totals):  # some row may be padding
            mask = (self.given != 0)[:, None].expand(b, place.shape[1], -1)
            shown = mask.gather(-1, place.clamp(min=0).expand(b, -1, -1))
            real = shown if real is None else real & shown
        totals = layer.totals
        if layer.window is not None:
            totals = [min(t, layer.window - 1) for t in totals]
            if s > layer.window - 1 or layer.reduced:  # by where they stood: rows that arrive are not the latest ones
                alive = (place > layer.length - layer.window).expand(b, -1, -1)
                real = alive if real is None else real & alive
        if layer.learned and not learned:
            behind = [max(layer.learned - (t - kept), 0) for t, kept in zip(layer.totals, totals, strict=True)]
            totals = [kept - few for kept, few in zip(totals, behind, strict=True)]
            words = ~layer.front().expand(b, -1, -1)
            real = words if real is None else real & words
        age = layer.length - place
        return Rows(b, s, device=k.device, totals=tuple(totals), real=real, age=age, shuffled=layer.shuffled)

    def place(self, index: int, turn: Turn, tokens: int) -> Place:
        """Of a turn in a layer whose longest sample has seen so many tokens."""
        depth = self.host.depth(Site.KV_CACHE)
        return Place(index, depth, turn.stage, turn.stages, tokens, self.site.spend, self.site.note)


class LayerCall:
    """One layer's attention call: what all methods there are shown.

    layer: its cache; None where nothing is kept. q: (B, H, Q, d); k, v: (B, G, S, d); mask: over the S rows, or None;
    given: the other arguments of the attention function.
    """

    def __init__(
        self, run: CacheRun, index: int, layer: ReducedLayer | None, q: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None, given: dict[str, Any], rows: Rows | None = None,
    ) -> None:  # fmt: skip
        self.run, self.index, self.layer = run, index, layer
        self.q, self.k, self.v, self.mask, self.given = q, k, v, mask, given
        self.scale = _scale(q, given)
        self.turns = run.program.at(Site.KV_CACHE, index)
        self.weights: Tensor | None = None  # probabilities, where they are computed here
        self._rows = rows
        self._places: dict[Turn, Place] = {}

    @property
    def rows(self) -> Rows:
        """The rows before anything goes, found once."""
        if self._rows is None:
            b, s = len(self.k), self.k.shape[2]
            if self.layer is not None:
                self._rows = self.run.rows(self.layer, self.k)
            else:
                age = torch.arange(s, 0, -1, device=self.k.device)[None, None]
                self._rows = Rows(b, s, device=self.k.device, totals=(s,) * b, age=age)
        return self._rows

    @property
    def beside(self) -> Tensor | None:
        """What attention is given to add to its logits, besides the mask."""
        return self.given.get(BESIDE)

    def place(self, turn: Turn) -> Place:
        if turn not in self._places:
            self._places[turn] = self.run.place(self.index, turn, max(self.rows.totals))
        return self._places[turn]

    def signals(self, turn: Turn) -> CacheSignals:
        """What the method of a turn may look at."""
        run, layer, rows, several = self.run, self.layer, self.rows, self.q.shape[2] > 1
        method, asking, bias = run.method(turn), None, summed(self.mask, self.beside, self.q.dtype)
        if rows.real is not None and run.given is not None and several:
            left = run.prefill if run.prefill is not None and run.prefill.steps else None
            asking = run.real(self.q.shape[2]) if left is None else left.tokens.valid
        return CacheSignals(
            self.k, rows, self.place(turn),
            Seen(self.q, self.k, self.v, self.scale, bias, causal=self.mask is None and several),
            modules=run.bound.modules_of(turn.method, 0), asking=asking, entry=run.entry,
            attending=run.attending, weights=self.weights,
            at_rope=self.given.get("position_ids", run.position_ids),
            rotary=run.host.rotary(self.index) if method.rotates else None,
            training=run.training,
            memory=(run.memory if layer is None else run.layers[0].memory).setdefault(turn.method, {}),
            local={} if layer is None else layer.local.setdefault(turn.method, {}),
        )  # fmt: skip


def _held(layer: ReducedLayer, method: Reducer, plan: Hard, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a plan is executed on: keys and values as attention had them, or what the cache holds instead of them.

    Raises   SessionError where heads that share what is held keep different rows.
    """
    keys, values = layer.view()
    if all(a.shape[1] == b.shape[1] and a.shape[-1] == b.shape[-1] for a, b in ((k, keys), (v, values))):
        return k, v
    if plan.lead[1] > keys.shape[1]:
        raise SessionError(
            f"{text(method)} keeps other rows in each head, and this model's cache holds latents that its heads "
            "share (MLA); choose a method that keeps the same rows in all heads, such as streamingllm:"
            "positions=original"
        )
    return keys, values


def _receive(layer: ReducedLayer, signals: CacheSignals) -> Tensor:
    """The attention each row has received so far, this pass included: (B, G, S)."""
    new = signals.per_group(signals.attention_mass_of_all())
    old = layer.received
    if old is not None:
        new[..., : old.shape[-1]] += old
    layer.received = new
    return new


def _picked(plan: Hard, k: Tensor, v: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of a plan, gathered, and the mask over them. k, v: (B, G, S, d), mask: (B or 1, 1 or H, Q, S)."""
    b, g = k.shape[:2]
    index, valid = plan.position, plan.valid
    if mask is not None:
        lead = 1 if mask.shape[1] == index.shape[1] == 1 else heads
        at = index.repeat_interleave(lead // index.shape[1], dim=1)[:, :, None].expand(-1, -1, mask.shape[2], -1)
        mask = mask.expand(b, lead, -1, -1).gather(-1, at)
    if valid is not None:
        valid = valid.expand(b, index.shape[1], -1)
        shown = (valid if valid.shape[1] == 1 else valid.repeat_interleave(heads // valid.shape[1], dim=1))[:, :, None]
        if mask is None:
            mask = shown
        else:
            mask = mask.masked_fill(~shown, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
    index = index.expand(b, g, -1)
    return take(k, index), take(v, index), mask


def _per_head(shown: Tensor, heads: int) -> Tensor:
    """(B, G, S) -> (B, 1 or H, S)."""
    return shown if shown.shape[1] in (1, heads) else shown.repeat_interleave(heads // shown.shape[1], 1)


def _with(plan: Hard, front: Tensor) -> Hard:
    """A plan that keeps some rows besides. front: (B or 1, 1 or G, S) bool."""
    index, n = plan.position, front.shape[-1]
    if plan.lengths is not None:
        index = torch.where(torch.arange(plan.m, device=index.device) < plan.lengths[..., None], index, n)
    b, g = (max(pair) for pair in zip(index.shape[:2], front.shape[:2], strict=True))
    keep = torch.zeros(b, g, n + 1, dtype=torch.bool, device=index.device)
    keep = keep.scatter(-1, index.expand(b, g, -1), True)[..., :n] | front
    return ragged(keep, n, min(plan.m + int(front.sum(-1).max()), n))


def text_positions(ids: Tensor | None) -> Tensor | None:
    """Position ids as (B, N); None where rows stand in space and time instead (M-RoPE), unless the text's are given
    beside."""
    if ids is None or ids.dim() == 2:
        return ids
    return ids[0] if ids.shape[0] == 4 else None


def _scale(q: Tensor, given: dict[str, Any]) -> float:
    """The factor on q k^T that an attention module gave its function."""
    scale = given.get("scaling")
    return q.shape[-1] ** -0.5 if scale is None else scale
