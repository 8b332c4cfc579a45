"""Combinations drawn at random: stacks of methods, padding sides, executions, what is done to a cache in which order.
Whatever is drawn, a sample's answer is what it is alone.

A fixed draw, so that it takes about a minute. Other and more draws, as many as the profile says:

    pytest tests/test_combinations.py --hypothesis-profile=long --hypothesis-seed=7
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor
from torch.testing import assert_close

import fewer
from combinations import (
    BESIDE,
    CLOSE,
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
    Texts,
    alone_is_together,
    answer,
    hiding_is_dropping,
    network,
    passed,
)
from fewer.testing.models import KINDS


def share(parts: float) -> settings:
    """So many of the profile's examples. Combinations that are refused are drawn anew."""
    calm = [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large]
    most = max(1, int(settings.default.max_examples * parts))
    return settings(max_examples=most, suppress_health_check=calm, stateful_step_count=6)


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


TestConversation = Conversation.TestCase
TestConversation.settings = share(4)


# -- one pass, in every execution --------------------------------------------------------------------------------------
FORMS = {kind: ON_TEXT for kind in ENCODERS} | {kind: ON_IMAGES for kind in VISION} | {"llava": ON_PROMPTS}


@st.composite
def passes(draw: st.DrawFn, kinds: Sequence[str] = (*ENCODERS, *VISION, "llava")) -> tuple[str, list[str], Batch]:
    """A kind of model, methods for it, and a batch."""
    kind = draw(st.sampled_from(kinds))
    methods = draw(st.lists(st.sampled_from(FORMS[kind]), min_size=1, max_size=3, unique=True))
    side, seed = draw(st.sampled_from(["left", "right"])), draw(seeds)
    if kind == "llava":
        pictures = draw(st.lists(st.integers(0, 2), min_size=2, max_size=3).filter(any))
        return kind, methods, Batch(kind, pictures, side, seed)
    shortest = 1 if kind in KINDS else 2
    return kind, methods, Batch(kind, draw(st.lists(st.integers(shortest, 20), min_size=2, max_size=3)), side, seed)


def unless_refused(kind: str, methods: list[str], **options: Any) -> None:
    """Draw anew where methods cannot be put on."""
    try:
        fewer.apply(network(kind), methods, **options).remove()
    except REFUSALS:
        assume(False)


@share(4)
@given(passes(), st.sampled_from(["padded", "padded", "packed", "masked"]))
def test_a_sample_alone_is_a_sample_in_a_batch(drawn: tuple[str, list[str], Batch], execution: Any) -> None:
    kind, methods, batch = drawn
    unless_refused(kind, methods, execution=execution)
    alone_is_together(kind, methods, batch, execution)


@share(1)
@given(passes((*ENCODERS, *VISION)))
def test_packed_is_padded(drawn: tuple[str, list[str], Batch]) -> None:
    kind, methods, batch = drawn
    unless_refused(kind, methods, execution="packed")
    wanted, got = (passed(kind, methods, batch.together, execution=way) for way in ("padded", "packed"))
    for i in range(len(batch.sizes)):
        assert_close(batch.own(got, i), batch.own(wanted, i), **CLOSE)


@share(2)
@given(passes((*ENCODERS, *VISION)))
def test_masked_is_dropped(drawn: tuple[str, list[str], Batch]) -> None:
    """Hiding what goes gives what dropping it gives, of texts also in the rows of words that went."""
    kind, methods, batch = drawn
    unless_refused(kind, methods, execution="masked")
    hiding_is_dropping(kind, methods, batch)


@share(1.5)
@given(passes(), st.integers(0, 3), st.integers(0, 3), st.sampled_from(["padded", "masked"]))
def test_a_method_that_keeps_all_changes_no_stack(
    drawn: tuple[str, list[str], Batch], place: int, layer: int, execution: Any
) -> None:
    """Wherever it stands among the others."""
    kind, methods, batch = drawn
    layer = min(layer, len(fewer.hosts.find(network(kind)).blocks) - 1)
    more = [*methods[:place], f"random:keep=1.0,layers={layer}", *methods[place:]]
    unless_refused(kind, more, execution=execution)
    wanted, got = (passed(kind, forms, batch.together, execution=execution) for forms in (methods, more))
    for i in range(len(batch.sizes)):
        assert_close(batch.own(got, i), batch.own(wanted, i), **CLOSE)


# -- ways of running ---------------------------------------------------------------------------------------------------
def trained(kind: str, methods: list[str], batch: Batch, checkpoints: bool) -> dict[str, Tensor]:
    """Gradients of a model that trains with methods on, by parameter."""
    model = network(kind, 1)
    model.train().zero_grad(set_to_none=True)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        with fewer.apply(model, methods), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of dropout
            out = answer(kind, model, batch.together)
            torch.stack([batch.own(out, i).square().sum() for i in range(len(batch.sizes))]).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finally:
        if checkpoints:
            model.gradient_checkpointing_disable()
        model.eval()


@share(1)
@given(passes(("bert", "llama-encoder", "vit", "siglip", "llava")))
def test_checkpointing_changes_no_gradient(drawn: tuple[str, list[str], Batch]) -> None:
    kind, methods, batch = drawn
    unless_refused(kind, methods)
    wanted, got = trained(kind, methods, batch, False), trained(kind, methods, batch, True)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        error = (got[name] - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-5, f"gradient of {name} is off by {error} of {gradient.norm()}"


@share(1)
@given(passes(), st.sampled_from(["padded", "packed", "masked"]))
def test_autocast_runs(drawn: tuple[str, list[str], Batch], execution: Any) -> None:
    kind, methods, batch = drawn
    unless_refused(kind, methods, execution=execution)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = passed(kind, methods, batch.together, execution=execution)
    assert all(batch.own(out, i).isfinite().all() for i in range(len(batch.sizes)))


@share(0.3)
@given(passes(), seeds)
def test_two_threads_give_what_one_gives(drawn: tuple[str, list[str], Batch], seed: int) -> None:
    kind, methods, batch = drawn
    unless_refused(kind, methods)
    inputs = [batch.together, batch.alone[0]]
    got: list[Any] = [None, None]
    gate = threading.Barrier(2)
    with fewer.apply(network(kind), methods):

        def work(i: int) -> None:
            gate.wait()
            with torch.no_grad():
                got[i] = answer(kind, network(kind), inputs[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, mine in enumerate(got):
        assert mine is not None
        assert_close(mine, passed(kind, methods, inputs[i]), **CLOSE)


@share(0.3)
@given(passes(), st.integers(0, 2))
def test_a_hook_that_calls_the_same_model_changes_nothing(drawn: tuple[str, list[str], Batch], block: int) -> None:
    kind, methods, batch = drawn
    unless_refused(kind, methods)
    wanted, model = passed(kind, methods, batch.together), network(kind)
    inner: list[Tensor] = []

    def calls(*_: Any) -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner.append(answer(kind, model, batch.alone[0]))

    with torch.no_grad(), fewer.apply(model, methods) as session:
        handle = session.host.blocks[block].register_forward_hook(calls)
        try:
            got = answer(kind, model, batch.together)
        finally:
            handle.remove()
    for i in range(len(batch.sizes)):
        assert_close(batch.own(got, i), batch.own(wanted, i), **CLOSE)
    assert_close(inner[1], passed(kind, methods, batch.alone[0]), **CLOSE)
