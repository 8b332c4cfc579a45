"""Combinations drawn at random: stacks of methods, padding sides, executions, what is done to a cache in which order.
Whatever is drawn, a sample's answer is what it is alone.

A fixed draw, so that it takes about a minute. Other and more draws, as many as the profile says:

    pytest tests/test_combinations.py --hypothesis-profile=long --hypothesis-seed=7
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import fewer
from combinations import (
    BESIDE,
    DECODERS,
    ENCODERS,
    INSIDE,
    ON_CACHE,
    ON_IMAGES,
    ON_PROMPTS,
    ON_TEXT,
    REFUSALS,
    VISION,
    Batch,
    Switched,
    Texts,
    alone_is_together,
    answer,
    calling_inside,
    checkpoints_change_no_gradient,
    hiding_is_dropping,
    network,
    passed,
    rows_are_the_ledgers,
    same,
    two_threads_at_once,
)
from fewer.core import KeepRatio
from fewer.core.ragged import Packing
from fewer.hosts import attention
from fewer.runtime.kv.layer import ReducedLayer
from fewer.runtime.sites import blocks
from fewer.runtime.sites.blocks import BlockSite, Pass
from fewer.testing.models import KINDS


def share(parts: float) -> settings:
    """So many of the profile's examples. Combinations that are refused are drawn anew."""
    calm = [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large]
    most = max(1, int(settings.default.max_examples * parts))
    return settings(max_examples=most, suppress_health_check=calm, stateful_step_count=6)


def unless_refused(kind: str, methods: list[str], **options: Any) -> None:
    """Draw anew where methods cannot be put on."""
    try:
        fewer.apply(network(kind), methods, **options).remove()
    except REFUSALS:
        assume(False)


Drawn = tuple[str, list[str], Batch]


def law(parts: float, *strategies: Any) -> Callable[[Any], Any]:
    """A test of what is drawn. Its `law` is the same for `draw`."""

    def wrap(check: Any) -> Any:
        test = share(parts)(given(*strategies)(check))
        test.law = parts, strategies, check
        return test

    return wrap


def draw(check: Any) -> None:
    """The examples of a test or a machine, until one fails; no search for a smaller one."""
    once = {"phases": [Phase.explicit, Phase.generate], "report_multiple_bugs": False, "database": None}
    if not hasattr(check, "law"):
        run_state_machine_as_test(check, settings=settings(check.TestCase.settings, **once))
        return
    parts, strategies, function = check.law
    settings(share(parts), **once)(given(*strategies)(function))()


# -- a cache, and what is done to it -----------------------------------------------------------------------------------
@st.composite
def stacks(draw: st.DrawFn, family: str) -> list[str]:
    """Methods on the cache of a decoder, and inside it."""
    if family == "llava":
        return draw(st.lists(st.sampled_from(ON_PROMPTS), min_size=1, max_size=3, unique=True))
    cache = draw(st.lists(st.sampled_from(ON_CACHE), max_size=1))
    beside = draw(st.lists(st.sampled_from(BESIDE), max_size=1))
    inside = draw(st.lists(st.sampled_from(INSIDE), min_size=0 if cache or beside else 1, max_size=2, unique=True))
    return cache + beside + inside


seeds = st.integers(0, 10**6)


def sizes(family: str) -> st.SearchStrategy[list[int]]:
    """Words of each text; of prompts for a vision-language model, pictures."""
    return st.lists(st.integers(0, 2) if family == "llava" else st.integers(3, 24), min_size=1, max_size=3)


class Conversation(RuleBasedStateMachine):
    """Texts are read into one cache and written on, taken back and reordered; each of them alone as well."""

    texts: Texts | None = None

    @initialize(data=st.data(), family=st.sampled_from((*DECODERS, "llava")))
    def begin(self, data: st.DataObject, family: str) -> None:
        positions = data.draw(st.sampled_from(["kept", "compact"]), "positions") if family == "llava" else "kept"
        methods = data.draw(stacks(family), "methods")
        try:
            self.texts = Texts(family, methods, positions)
        except REFUSALS:
            assume(False)
        self._prompt(data)

    def _prompt(self, data: st.DataObject) -> None:
        assert self.texts is not None
        self._unless_refused(
            lambda: self.texts.read(data.draw(sizes(self.texts.family), "sizes"), data.draw(seeds, "seed"))  # type: ignore[union-attr]
        )

    @staticmethod
    def _unless_refused(step: Any) -> None:
        try:
            step()
        except REFUSALS:
            assume(False)

    @rule(tokens=st.sampled_from([1, 1, 1, 2, 5]), seed=seeds)
    def write(self, tokens: int, seed: int) -> None:
        self._unless_refused(lambda: self.texts.write(tokens, seed))  # type: ignore[union-attr]

    @precondition(lambda self: self.texts is not None and self.texts.croppable > 0)
    @rule(tokens=st.integers(1, 3))
    def crop(self, tokens: int) -> None:
        assert self.texts is not None
        self.texts.crop(min(tokens, self.texts.croppable))

    @rule(order=st.lists(st.integers(0, 2), min_size=3, max_size=3))
    def reorder(self, order: list[int]) -> None:
        assert self.texts is not None
        n = len(self.texts.alone)
        self.texts.reorder([i % n for i in order[:n]])

    @rule(place=st.integers(0, 50))
    def interrupt(self, place: int) -> None:
        self.texts.interrupt(place)  # type: ignore[union-attr]

    @rule(data=st.data(), off=st.booleans())
    def another_prompt(self, data: st.DataObject, off: bool) -> None:
        """In a new cache; the methods taken off and put on again before, or not."""
        assert self.texts is not None
        if off:
            self.texts.close()
            self.texts.put_on()
        self._prompt(data)

    def teardown(self) -> None:
        if self.texts is not None:
            self.texts.close()


def beams_stay(patch: pytest.MonkeyPatch) -> None:
    """A cache that beams reorder keeps the keys where they were."""
    select = ReducedLayer._select

    def forgetful(self: ReducedLayer, rows: Tensor) -> None:
        keys = self.keys
        select(self, rows)
        if len(keys) == len(self.keys):
            self.keys = keys

    patch.setattr(ReducedLayer, "_select", forgetful)


def crops_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReducedLayer, "crop", lambda self, tokens: None)


TestConversation = Conversation.TestCase
TestConversation.settings = share(3)


# -- one pass, in every execution --------------------------------------------------------------------------------------
FORMS = {kind: ON_TEXT for kind in ENCODERS} | {kind: ON_IMAGES for kind in VISION} | {"llava": ON_PROMPTS}


@st.composite
def passes(draw: st.DrawFn, kinds: Sequence[str] = (*ENCODERS, *VISION, "llava")) -> Drawn:
    """A kind of model, methods for it, and a batch."""
    kind = draw(st.sampled_from(kinds))
    methods = draw(st.lists(st.sampled_from(FORMS[kind]), min_size=1, max_size=3, unique=True))
    side, seed = draw(st.sampled_from(["left", "right"])), draw(seeds)
    if kind == "llava":
        pictures = draw(st.lists(st.integers(0, 2), min_size=2, max_size=3).filter(any))
        return kind, methods, Batch(kind, pictures, side, seed)
    shortest = 1 if kind in KINDS else 2
    return kind, methods, Batch(kind, draw(st.lists(st.integers(shortest, 20), min_size=2, max_size=3)), side, seed)


AROUND = "random:site=around_block,keep=0.6,layers=1"
WAYS = st.sampled_from(["padded", "padded", "packed", "masked"])


@law(4, passes(), WAYS)
def test_a_sample_alone_is_a_sample_in_a_batch(drawn: Drawn, execution: Any) -> None:
    unless_refused(*drawn[:2], execution=execution)
    alone_is_together(*drawn, execution)


@law(1, passes((*ENCODERS, *VISION)))
def test_packed_is_padded(drawn: Drawn) -> None:
    kind, methods, batch = drawn
    unless_refused(kind, methods, execution="packed")
    wanted, got = (passed(kind, methods, batch.together, execution=way) for way in ("padded", "packed"))
    same(batch, got, wanted)


@law(2, passes((*ENCODERS, *VISION)))
def test_masked_is_dropped(drawn: Drawn) -> None:
    """Hiding what goes gives what dropping it gives, of texts also in the rows of words that went."""
    unless_refused(*drawn[:2], execution="masked")
    hiding_is_dropping(*drawn)


@law(1.5, passes(), st.integers(0, 3), st.integers(0, 3), WAYS)
def test_a_method_that_keeps_all_changes_no_stack(drawn: Drawn, place: int, layer: int, execution: Any) -> None:
    """Wherever it stands among the others."""
    kind, methods, batch = drawn
    layer = min(layer, len(fewer.hosts.find(network(kind)).blocks) - 1)
    more = [*methods[:place], f"random:keep=1.0,layers={layer}", *methods[place:]]
    unless_refused(kind, more, execution=execution)
    wanted, got = (passed(kind, forms, batch.together, execution=execution) for forms in (methods, more))
    same(batch, got, wanted)


@law(1.5, passes(), WAYS)
def test_the_rows_that_run_are_the_ledgers(drawn: Drawn, execution: Any) -> None:
    unless_refused(*drawn[:2], execution=execution)
    rows_are_the_ledgers(*drawn, execution)


class Switching(RuleBasedStateMachine):
    """Stacks are put on a model and taken off again, some passes end in an error: what it answers is what it would with
    nothing of that before, to the bit, and what is off has left nothing behind."""

    switched: Switched | None = None

    @initialize(drawn=passes())
    def begin(self, drawn: Drawn) -> None:
        kind, _, batch = drawn
        self.switched = Switched(kind, batch)

    @rule(data=st.data(), execution=WAYS)
    def on(self, data: st.DataObject, execution: Any) -> None:
        assert self.switched is not None
        kind = self.switched.kind
        methods = data.draw(st.lists(st.sampled_from(FORMS[kind]), min_size=1, max_size=3, unique=True), "methods")
        self.switched.off()
        unless_refused(kind, methods, execution=execution)
        self.switched.on(methods, execution)

    @rule()
    def off(self) -> None:
        self.switched.off()  # type: ignore[union-attr]

    @rule(place=st.integers(0, 50))
    def interrupt(self, place: int) -> None:
        self.switched.interrupt(place)  # type: ignore[union-attr]

    @invariant()
    def answers(self) -> None:
        if self.switched is not None:
            self.switched.answers()

    def teardown(self) -> None:
        if self.switched is not None:
            self.switched.off()


TestSwitching = Switching.TestCase
TestSwitching.settings = share(0.6)


# -- ways of running ---------------------------------------------------------------------------------------------------
@law(1, passes(("bert", "llama-encoder", "vit", "siglip", "llava")))
def test_checkpointing_changes_no_gradient(drawn: Drawn) -> None:
    unless_refused(*drawn[:2])
    checkpoints_change_no_gradient(*drawn)


@law(1, passes(), st.sampled_from(["padded", "packed", "masked"]))
def test_autocast_runs(drawn: Drawn, execution: Any) -> None:
    kind, methods, batch = drawn
    unless_refused(kind, methods, execution=execution)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = passed(kind, methods, batch.together, execution=execution)
    assert all(batch.own(out, i).isfinite().all() for i in range(len(batch.sizes)))


@law(0.4, passes(), st.integers(0, 3))
def test_two_threads_give_what_one_gives(drawn: Drawn, block: int) -> None:
    unless_refused(*drawn[:2])
    two_threads_at_once(*drawn, block)


@law(0.3, passes(), st.integers(0, 2))
def test_a_hook_that_calls_the_same_model_changes_nothing(drawn: Drawn, block: int) -> None:
    unless_refused(*drawn[:2])
    calling_inside(*drawn, block)


# -- what a draw found, or might have: always looked at ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "methods", "sizes", "execution"),
    [
        ("bert", ["evit:fuse=false,keep=0.7,layers=1+", AROUND, "atc:keep=0.8,layers=1"], [5, 12, 9], "masked"),
        ("bert", ["random:tokens=8,layers=0", "token_transforming:tokens=6,layers=1", "random:keep=0.5,layers=2"],
         [19, 15], "masked"),
        ("vit", ["token_transforming:tokens=6,layers=1", "evit:keep=0.7,layers=1+", AROUND], [3, 3], "masked"),
        ("llava", ["cls_topk:mass=0.7,layers=1", "fastv:keep=0.5,k=1"], [2, 1], "padded"),
        ("llava", ["evit:mass=0.6,layers=1", "fastv:keep=0.5,k=1"], [1, 1, 2], "padded"),
        ("llava", ["lazyllm:keep=0.6,layers=0", "fastv:keep=0.5,k=2"], [2, 1], "padded"),
        ("llava", ["lazyllm:keep=0.6,layers=0", "vtw:k=2"], [2, 1], "padded"),
    ],
)  # fmt: skip
def test_samples_that_were_found(kind: str, methods: list[str], sizes: list[int], execution: Any) -> None:
    batch = Batch(kind, sizes, "left", 1)
    alone_is_together(kind, methods, batch, execution)
    if execution == "masked":
        hiding_is_dropping(kind, methods, batch)


@pytest.mark.parametrize(
    ("kind", "methods", "more", "sizes", "execution"),
    [
        ("vit", ["tome:r=4,layers=0"], ["tome:r=4,layers=0", "random:keep=1.0,layers=1"], [1, 1], "padded"),
        ("vit", ["tome:r=4,layers=0"], ["random:keep=1.0,layers=1", "tome:r=4,layers=0"], [1, 1], "masked"),
        ("bert", [], ["random:keep=1.0,layers=1"], [9, 5], "packed"),
        ("llava", ["prumerge"], ["prumerge", "visionzip:tokens=16"], [2, 1], "padded"),
    ],
)  # fmt: skip
def test_methods_that_keep_all_there_is(
    kind: str, methods: list[str], more: list[str], sizes: list[int], execution: Any
) -> None:
    batch = Batch(kind, sizes, "left", 3)
    with torch.no_grad():
        plain = answer(kind, network(kind), batch.together) if not methods else None
    wanted = passed(kind, methods, batch.together, execution=execution) if plain is None else plain
    same(batch, passed(kind, more, batch.together, execution=execution), wanted)


@pytest.mark.parametrize(
    ("family", "methods", "sizes"),
    [
        ("llama", ["streamingllm:tokens=6,sinks=3", "cls_topk:r=1,layers=0+"], [15, 3, 17]),
        ("qwen3", ["streamingllm:tokens=8,sinks=2", "random:keep=0.7,layers=1+"], [10, 5, 16]),
        ("mistral-sliding", ["streamingllm:tokens=8,sinks=2", "random:keep=0.7,layers=1+"], [16, 8, 17]),
    ],
)
def test_conversations_that_were_found(family: str, methods: list[str], sizes: list[int]) -> None:
    texts = Texts(family, methods)
    try:
        texts.read(sizes)
        for tokens in (1, 2, 1, 4):
            texts.write(tokens, seed=tokens)
    finally:
        texts.close()


# -- the draws notice --------------------------------------------------------------------------------------------------
def keeps_one_less(patch: pytest.MonkeyPatch) -> None:
    """A share of everything is not everything."""
    keep = KeepRatio.keep
    patch.setattr(KeepRatio, "keep", lambda self, free, at, **rest: keep(self, free, at, **rest) - (self.ratio == 1.0))


def shows_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(blocks, "hiding", lambda bias, valid: bias)


def packs_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    """Packed rows come out one sample further."""
    pad = Packing.pad
    patch.setattr(Packing, "pad", lambda self, x: pad(self, x).roll(1, 0))


def hides_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "_dropped", lambda policy: torch.ones_like(policy, dtype=torch.bool)[:, None, None])


def counts_one_less(patch: pytest.MonkeyPatch) -> None:
    count = Pass._count

    def flattering(self: Pass, layer: int, which: int) -> None:
        count(self, layer, which)
        self.trace.blocks[layer].computed[which] = [n - 1 for n in self.trace.blocks[layer].computed[which]]

    patch.setattr(Pass, "_count", flattering)


def leaves_a_hook(patch: pytest.MonkeyPatch) -> None:
    attach = BlockSite.attach

    def sticky(self: BlockSite, undo: Any) -> None:
        attach(self, undo)
        self.host.blocks[0].register_forward_hook(lambda *_: None)

    patch.setattr(BlockSite, "attach", sticky)


def goes_on_with_what_waits(patch: pytest.MonkeyPatch) -> None:
    """A pass that did not come to its end goes on in the next."""
    begin = BlockSite._open

    def confused(self: BlockSite, *given: Any) -> Any:
        waiting = self._local.__dict__.get("passes")
        return waiting[-1][1] if waiting else begin(self, *given)

    patch.setattr(BlockSite, "_open", confused)


def forks_nothing(patch: pytest.MonkeyPatch) -> None:
    """A block's second run is in the first one's state."""
    patch.setattr(Pass, "fork", lambda self: self)


def divides_by_zero(patch: pytest.MonkeyPatch) -> None:
    finish = Pass._finish
    patch.setattr(Pass, "_finish", lambda self, x: finish(self, x) / 0)


def shares_threads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(blocks, "threading", SimpleNamespace(local=SimpleNamespace))


PLANTED: list[tuple[Any, Callable[[pytest.MonkeyPatch], None]]] = [
    (test_a_sample_alone_is_a_sample_in_a_batch, shows_padding),
    (test_packed_is_padded, packs_the_neighbour),
    (test_masked_is_dropped, hides_nothing),
    (test_a_method_that_keeps_all_changes_no_stack, keeps_one_less),
    (test_the_rows_that_run_are_the_ledgers, counts_one_less),
    (Switching, leaves_a_hook),
    (Switching, goes_on_with_what_waits),
    (test_checkpointing_changes_no_gradient, forks_nothing),
    (test_autocast_runs, divides_by_zero),
    (test_two_threads_give_what_one_gives, shares_threads),
    (test_a_hook_that_calls_the_same_model_changes_nothing, goes_on_with_what_waits),
    (Conversation, beams_stay),
    (Conversation, crops_nothing),
]


@pytest.mark.parametrize(("check", "fault"), PLANTED, ids=lambda x: x.__name__)
def test_each_draw_notices_its_fault(check: Any, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        draw(check)


def test_each_draw_has_a_fault() -> None:
    names = {name for name in globals() if name.startswith("test_") and hasattr(globals()[name], "law")}
    assert names == {check.__name__ for check, _ in PLANTED} - {"Switching", "Conversation"}
