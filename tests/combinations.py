"""What tests/test_combinations.py draws from: models, forms of methods, and texts told twice, together and alone."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DynamicCache

import fewer
from decoders import VOCAB, decoder
from fewer.compat import cached
from fewer.core.budgets import BudgetError
from fewer.core.plan import PlanError
from fewer.hosts import MATRICES, HostError
from fewer.runtime.kv.state import CacheError
from fewer.runtime.program import SessionError
from fewer.testing.checks import same_snapshot, snapshot
from fewer.testing.models import KINDS, tiny_vit
from fewer.testing.vision_language import alone, prompts, tiny_vlm

CLOSE: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-3}  # a row more or less moves these models by a tenth and more
REFUSALS = (BudgetError, CacheError, HostError, PlanError, SessionError)

# Left out: dart, which ranks by the L1 norm of rotated keys and so by how far a text stands from the start; topv, which
# refuses other methods in its block; keydiff with two rows, which are equally far from their mean.
ON_CACHE = [
    "snapkv:keep=0.5,window=4,kernel=3", "knorm:keep=0.5", "h2o:tokens=9", "streamingllm:tokens=8,sinks=2",
    "streamingllm:tokens=8,sinks=2,positions=original", "tova:keep=0.5", "adakv:keep=0.5,window=4,kernel=3",
    "d2o:keep=0.6", "keydiff:tokens=6", "expected_attention:keep=0.5", "chunkkv:keep=0.5,chunk=3,window=2",
    "pyramidkv:keep=0.5,window=2,kernel=3", "random_cache:keep=0.5", "kvzip:keep=0.6",
]  # fmt: skip
BESIDE = ["quest:tokens=6,page=2", "ott:window=4,group=4"]  # evict nothing: stand by themselves or beside one that does
INSIDE = [
    "random:keep=0.7,layers=1+", "lazyllm:keep=0.7,layers=1+", "cls_topk:r=1,layers=0+", "ends:keep=0.8,layers=1+",
    "evit:fuse=false,keep=0.7,layers=1+", "power_bert:keep=0.7,layers=1+", "random:tokens=8,layers=0+",
    "dpc_knn:keep=0.7,layers=1", "tome:proportional=false,r=2,layers=1+",
    "random:keep=0.5,of=start,layers=1+", "random:site=around_block,keep=0.6,layers=1",
]  # fmt: skip
ON_TEXT = [
    "random:keep=0.7,layers=1+", "random:tokens=8,layers=0+", "random:keep=0.5,of=start,layers=1+",
    "random:site=after_block,keep=0.8,layers=0", "random:site=before_block,keep=0.8,layers=2",
    "random:site=around_block,keep=0.6,layers=1", "cls_topk:r=1,layers=0+", "cls_topk:mass=0.8,layers=1",
    "evit:keep=0.7,layers=1+", "evit:fuse=false,keep=0.7,layers=1+", "evit:mass=0.8,layers=1+",
    "power_bert:keep=0.7,layers=1+", "dpc_knn:keep=0.7,layers=1", "tome:r=2,layers=1+", "tome:threshold=0.5",
    "ltp:learned=false",
    "length_adaptive:keep=0.8", "pyramid_bert:keep=0.8", "tofu:r=2", "tps:keep=0.7,layers=1,scorer=evit", "turbo:r=2",
    "kmedoids:keep=0.7,layers=2", "atc:keep=0.8,layers=1", "ats:tokens=6,layers=1", "ppt:keep=0.8,layers=1",
    "radial:keep=0.7,layers=1", "token_transforming:tokens=6,layers=1", "token_transforming:keep=0.7,layers=2",
]  # fmt: skip
ON_IMAGES = [*ON_TEXT, "grid:site=mid_block,keep=0.5,layers=1", "diffrate"]
ON_PROMPTS = [
    "divprune:tokens=6", "random:site=bridge,tokens=9", "fastv:keep=0.5,k=1", "fitprune:keep=0.6",
    "framefusion:keep=0.6", "vispruner:keep=0.5", "pyramiddrop:layers=0+1+2", "sparsevlm:layers=0+1+2", "vtw:k=2",
    "visionzip:tokens=8", "prumerge", "cdpruner:tokens=6", "tome:r=2,layers=0", "evit:keep=0.8,layers=1",
    "cls_topk:mass=0.7,layers=1", "lazyllm:keep=0.8,layers=1+", "random:keep=0.8,layers=1+",
    "snapkv:keep=0.5,window=4,kernel=3", "streamingllm:tokens=20", "adakv:keep=0.5,window=4,kernel=3", "h2o:tokens=20",
]  # fmt: skip
DECODERS = ("llama", "gemma3", "gpt2", "mistral-sliding", "qwen3")
ENCODERS = ("bert", "modernbert", "llama-encoder")
VISION = ("vit", "siglip", "dinov2_registers")


@cache
def network(kind: str, copies: int = 0) -> nn.Module:
    """One model of a kind for all tests, and others with the same weights."""
    if copies:
        return copy.deepcopy(network(kind))
    if kind == "llava":
        model = tiny_vlm(kind)
        with torch.no_grad():
            model(**prompts(model, [1]))  # transformers hooks into the tower at its first picture
        return model
    if kind in DECODERS:
        return decoder(kind)
    return tiny_vit(kind.removesuffix("-encoder"), depth=4)


def words(*shape: int, seed: int) -> Tensor:
    """No word twice, at most 47: to a causal model the same word twice at the start is one point twice, and whether
    the first or the second stays is up to rounding."""
    return 3 + torch.randperm(47, generator=torch.Generator().manual_seed(seed))[: math.prod(shape)].view(shape)


def padded(texts: Sequence[Tensor], side: str = "left") -> dict[str, Tensor]:
    """Texts of different lengths, (n,) each, in one batch."""
    n = max(map(len, texts))
    ids, mask = (torch.zeros(len(texts), n, dtype=torch.long) for _ in range(2))
    for i, text in enumerate(texts):
        where = slice(n - len(text), n) if side == "left" else slice(len(text))
        ids[i, where], mask[i, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


# -- one pass ----------------------------------------------------------------------------------------------------------
class Batch:
    """Inputs for a model of some kind: together in one batch, and each alone.

    sizes: words of each text; for "llava" its pictures. Images are all of one size.
    """

    def __init__(self, kind: str, sizes: Sequence[int], side: str = "left", seed: int = 0) -> None:
        self.kind, self.sizes, self.made = kind, sizes, (side, seed)
        if kind == "llava":
            model = network(kind)
            self.together = prompts(model, sizes, seed=seed) | {"use_cache": False}
            self.alone = [alone(model, sizes, i, seed=seed) | {"use_cache": False} for i in range(len(sizes))]
            self.where = [slice(-1, None)] * len(sizes)
            return
        if kind in KINDS:
            x = torch.randn(len(sizes), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            self.together, self.alone = {"pixel_values": x}, [{"pixel_values": one} for one in x.split(1)]
            return
        texts = [words(n, seed=seed + i) for i, n in enumerate(sizes)]
        rest = {"use_cache": False} if kind.startswith("llama") else {}

        def given(batch: dict[str, Tensor]) -> dict[str, Any]:
            mask = batch["attention_mask"]
            return batch | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} | rest

        self.together, self.alone = given(padded(texts, side)), [given(padded([text])) for text in texts]
        n = max(sizes)
        self.where = [slice(n - size, n) if side == "left" else slice(size) for size in sizes]

    def __repr__(self) -> str:
        return f"Batch({', '.join(map(repr, (self.kind, self.sizes, *self.made)))})"

    def own(self, answer: Tensor, which: int) -> Tensor:
        """What of a batch's answer is one sample's, without padding."""
        return answer[which] if self.kind in KINDS else answer[which, self.where[which]]


def answer(kind: str, model: nn.Module, given: dict[str, Any]) -> Tensor:
    """Logits or features: of each word, of the last of a prompt with pictures, of an image."""
    out = model(**given)
    if isinstance(out, Tensor):
        return out
    if kind in VISION:
        return out.logits if "logits" in out else out.pooler_output
    return out.logits if "logits" in out else out.last_hidden_state


def passed(
    kind: str, methods: Sequence[str], given: dict[str, Any], model: nn.Module | None = None, **options: Any
) -> Tensor:
    """The answer of one pass with methods on."""
    model = network(kind) if model is None else model
    with torch.no_grad(), fewer.apply(model, list(methods), **options):
        return answer(kind, model, given)


def alone_is_together(kind: str, methods: Sequence[str], batch: Batch, execution: Any = "padded") -> None:
    """A sample's answer does not depend on the others, in any execution."""
    together = passed(kind, methods, batch.together, execution=execution)
    for i, given in enumerate(batch.alone):
        mine = batch.own(together, i)
        theirs = passed(kind, methods, given, execution=execution)[0]
        theirs = theirs[-1:] if kind == "llava" else theirs
        assert_close(mine, theirs, **CLOSE, msg=lambda m, i=i: f"sample {i} depends on its batch: {m}")  # type: ignore[misc]


def same(batch: Batch, got: Tensor, wanted: Tensor) -> None:
    """Two answers of a batch agree, padding left out."""
    for i in range(len(batch.sizes)):
        assert_close(batch.own(got, i), batch.own(wanted, i), **CLOSE, msg=lambda m, i=i: f"sample {i}: {m}")  # type: ignore[misc]


def hiding_is_dropping(kind: str, methods: Sequence[str], batch: Batch) -> None:
    """Masked execution answers what the padded one does."""
    wanted, got = (passed(kind, methods, batch.together, execution=way) for way in ("padded", "masked"))
    same(batch, got, wanted)


def matrices(block: nn.Module) -> list[nn.Module]:
    """Of a block, in the order in which it holds them."""
    return [part for part in block.modules() if type(part).__name__ in MATRICES]


def rows_are_the_ledgers(kind: str, methods: Sequence[str], batch: Batch, execution: Any = "padded") -> None:
    """The rows that reach each block's first and last matrix are those that the ledger says ran."""
    model = network(kind)
    with torch.no_grad(), ExitStack() as undo:
        session = undo.enter_context(fewer.apply(model, list(methods), execution=execution))
        ran: list[list[int]] = [[] for _ in session.host.blocks]
        for rows, block in zip(ran, session.host.blocks, strict=True):
            for part in matrices(block):
                hook = part.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][..., 0].numel()))
                undo.callback(hook.remove)
        answer(kind, model, batch.together)
        try:
            ledger = session.ledger
        except SessionError:  # methods on a cache, and there was none
            return
        entries = (getattr(ledger, "reading", None) or ledger).entries
        for layer, (rows, entry) in enumerate(zip(ran, entries, strict=True)):
            assert entry.ran is not None
            said = entry.ran.attention, entry.ran.mlp
            counted = rows[0] / len(batch.sizes), rows[-1] / len(batch.sizes)
            assert_close(
                said, counted, msg=f"block {layer}: {counted} rows a sample reach attention and MLP, {said} said"
            )


class Interrupted(RuntimeError):
    """Raised inside a pass by a test."""


def interrupted(model: nn.Module, blocks: Sequence[nn.Module], place: int, run: Callable[[], Any]) -> None:
    """A pass that ends in an error, in front of one of the matrices of all blocks or before it is refused."""

    def stop(*_: Any) -> None:
        raise Interrupted

    parts = [part for block in blocks for part in matrices(block)]
    handle = parts[place % len(parts)].register_forward_pre_hook(stop)
    try:
        run()
    except (Interrupted, *REFUSALS):
        return
    finally:
        handle.remove()


class Switched:
    """One model on which stacks are put on and taken off, and some of whose passes end in an error."""

    def __init__(self, kind: str, batch: Batch) -> None:
        self.kind, self.model, self.batch = kind, network(kind), batch
        self.plain = self._answer()
        self.before = snapshot(self.model)
        self.session: Any = None
        self.wanted = self.plain

    @torch.no_grad()
    def _answer(self) -> Tensor:
        return answer(self.kind, self.model, self.batch.together)

    def on(self, methods: Sequence[str], execution: Any) -> None:
        """In place of what was on."""
        self.off()
        self.wanted = passed(self.kind, methods, self.batch.together, network(self.kind, 1), execution=execution)
        self.session = fewer.apply(self.model, list(methods), execution=execution)

    def off(self) -> None:
        """Nothing is left behind, and taking off twice is taking off once."""
        if self.session is not None:
            self.session.remove()
            self.session.remove()
        self.session, self.wanted = None, self.plain
        same_snapshot(self.before, snapshot(self.model), self.kind)

    def interrupt(self, place: int) -> None:
        interrupted(self.model, fewer.hosts.find(self.model).blocks, place, self._answer)

    def answers(self) -> None:
        """To the bit, whatever was on before."""
        assert torch.equal(self._answer(), self.wanted), "the answer depends on what happened before"


def two_threads_at_once(kind: str, methods: Sequence[str], batch: Batch, block: int) -> None:
    """Two passes through one model: the second comes as far as a block while the first waits in front of it, and goes
    on when that has ended."""
    model, got = network(kind), list[Tensor]()
    came, ended = threading.Event(), threading.Event()

    def second() -> None:
        try:
            with torch.no_grad():
                got.append(answer(kind, model, batch.alone[0]))
        finally:
            came.set()

    thread = threading.Thread(target=second)

    def waits(*_: Any) -> None:
        if threading.current_thread() is thread:
            came.set()
            ended.wait(30)
        elif thread.ident is None:
            thread.start()
            came.wait(30)

    with torch.no_grad(), fewer.apply(model, list(methods)) as session:
        blocks = session.host.blocks
        handle = matrices(blocks[block % len(blocks)])[0].register_forward_pre_hook(waits)
        try:
            first = answer(kind, model, batch.together)
        finally:
            ended.set()
            thread.join()
            handle.remove()
    same(batch, first, passed(kind, methods, batch.together))
    assert got, "the second thread ended in an error"
    assert_close(got[0], passed(kind, methods, batch.alone[0]), **CLOSE)


def calling_inside(kind: str, methods: Sequence[str], batch: Batch, block: int) -> None:
    """A hook calls the model anew while a pass is under way: both answer what they would alone."""
    model, inner = network(kind), list[Tensor]()

    def calls(*_: Any) -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner.append(answer(kind, model, batch.alone[0]))

    with torch.no_grad(), fewer.apply(model, list(methods)) as session:
        handle = session.host.blocks[block].register_forward_hook(calls)
        try:
            got = answer(kind, model, batch.together)
        finally:
            handle.remove()
    same(batch, got, passed(kind, methods, batch.together))
    assert_close(inner[1], passed(kind, methods, batch.alone[0]), **CLOSE)


def gradients(kind: str, methods: Sequence[str], batch: Batch, checkpoints: bool) -> dict[str, Tensor]:
    """Of a model that trains with methods on, by parameter."""
    model = network(kind, 1)
    model.train().zero_grad(set_to_none=True)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    with fewer.apply(model, list(methods)), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of dropout
        out = answer(kind, model, batch.together)
        torch.stack([batch.own(out, i).square().sum() for i in range(len(batch.sizes))]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def checkpoints_change_no_gradient(kind: str, methods: Sequence[str], batch: Batch) -> None:
    """Blocks that run twice give the gradients of blocks that run once."""
    wanted, got = (gradients(kind, methods, batch, checkpoints) for checkpoints in (False, True))
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        error = (got[name] - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-5, f"gradient of {name} is off by {error} of {gradient.norm()}"


# -- one cache, several passes -----------------------------------------------------------------------------------------
class Reading:
    """Texts in one cache of a model with a session on."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config.get_text_config())
        self.mask: Tensor | None = None
        self.steps: list[tuple[str, Any]] = []

    def feed(self, given: dict[str, Tensor]) -> Tensor:
        """(B, V): logits behind the newest token. given: ids and mask, (B, n), and what pictures there are."""
        self.steps.append(("feed", given))
        ids, mask = given["input_ids"], given["attention_mask"]
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        places = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = given | {"attention_mask": self.mask, "position_ids": places} | cached(self.model, self.cache)
        return self.model(**given).logits[:, -1]

    def crop(self, tokens: int) -> None:
        self.steps.append(("crop", tokens))
        assert self.mask is not None
        self.cache.crop(-tokens)
        self.mask = self.mask[:, :-tokens]

    def reorder(self, order: Tensor) -> None:
        assert self.mask is not None
        self.cache.reorder_cache(order)
        self.mask = self.mask[order]

    def again(self) -> Reading:
        """The same once more, in a cache of its own."""
        other = Reading(self.model)
        for what, given in self.steps:
            getattr(other, what)(given)
        return other


class Texts:
    """Texts read and written together in one cache, left-padded, and each alone in a cache of its own: whatever is done
    to them, their logits agree."""

    def __init__(self, family: str, methods: Sequence[str], positions: str = "kept") -> None:
        self.family, self.methods = family, list(methods)
        self.options = {"positions": positions} if positions != "kept" else {}
        self.models = network(family), network(family, 1)
        self.undo = ExitStack()
        self.together: Reading | None = None
        self.alone: list[Reading] = []
        self.put_on()

    def put_on(self) -> None:
        self.before = snapshot(self.models[0])
        try:
            for model in self.models:
                self.undo.enter_context(fewer.apply(model, self.methods, **self.options))
        except BaseException:
            self.undo.close()
            raise

    @torch.no_grad()
    def read(self, sizes: Sequence[int], seed: int = 0) -> None:
        """A prompt for each text, into new caches. sizes: words, of a vision-language model pictures."""
        if self.family == "llava":
            batch = prompts(self.models[0], sizes, seed=seed)
            each = [alone(self.models[0], sizes, i, seed=seed) for i in range(len(sizes))]
        else:
            texts = [words(n, seed=seed + i) for i, n in enumerate(sizes)]
            batch, each = padded(texts), [padded([text]) for text in texts]
        self.together, self.alone = Reading(self.models[0]), [Reading(self.models[1]) for _ in sizes]
        self._compare(self.together.feed(batch), each)

    @torch.no_grad()
    def write(self, tokens: int, seed: int = 0) -> None:
        """So many tokens more for each text, in one pass."""
        assert self.together is not None
        ids = words(len(self.alone), tokens, seed=seed)
        new = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.split(1)]
        self._compare(self.together.feed({"input_ids": ids, "attention_mask": torch.ones_like(ids)}), new)

    def _compare(self, together: Tensor, given: list[dict[str, Tensor]]) -> None:
        for i, (reading, one) in enumerate(zip(self.alone, given, strict=True)):
            assert_close(together[i], reading.feed(one)[0], **CLOSE, msg=lambda m, i=i: f"text {i}: {m}")  # type: ignore[misc]

    @property
    def croppable(self) -> int:
        """How many tokens may be taken back."""
        assert self.together is not None
        assert self.together.mask is not None
        if any(layer.is_sliding for layer in self.together.cache.layers):
            return 0  # past its window such a layer cannot go back, here as in transformers
        last = min(r.steps[-1][1]["input_ids"].shape[1] if r.steps[-1][0] == "feed" else 0 for r in self.alone)
        return min(int(self.together.mask.sum(-1).min()) - 2, last + 2 if self.family != "llava" else last)

    def crop(self, tokens: int) -> None:
        assert self.together is not None
        for reading in (self.together, *self.alone):
            reading.crop(tokens)

    @torch.no_grad()
    def reorder(self, order: Sequence[int]) -> None:
        """As beam search does: some texts more than once, some not at all."""
        assert self.together is not None
        self.together.reorder(torch.tensor(order))
        self.alone = [self.alone[i].again() for i in order]

    @torch.no_grad()
    def interrupt(self, place: int) -> None:
        """A pass over other words ends in an error: that is nothing to these texts."""
        other = padded([words(7, seed=place), words(4, seed=place + 1)])
        model = self.models[0]
        if self.family != "llava":
            interrupted(model, fewer.hosts.find(model).blocks, place, lambda: Reading(model).feed(other))

    def close(self) -> None:
        """The methods come off, and leave nothing behind."""
        self.undo.close()
        same_snapshot(self.before, snapshot(self.models[0]), self.family)


assert VOCAB > 50
