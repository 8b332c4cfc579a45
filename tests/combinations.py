"""What tests/test_combinations.py draws from: models, forms of methods, and texts told twice, together and alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
from fewer.hosts import HostError
from fewer.runtime.kv.state import CacheError
from fewer.runtime.program import SessionError
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
    "cls_topk:mass=0.7,layers=1", "lazyllm:keep=0.8,layers=1+", "random:keep=0.8,layers=1+", "snapkv:keep=0.5,window=4,kernel=3",
    "streamingllm:tokens=20", "adakv:keep=0.5,window=4,kernel=3", "h2o:tokens=20",
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
        return tiny_vlm(kind)
    if kind in DECODERS:
        return decoder(kind)
    return tiny_vit(kind.removesuffix("-encoder"), depth=4)


def words(*shape: int, seed: int) -> Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


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


def passed(kind: str, methods: Sequence[str], given: dict[str, Any], **options: Any) -> Tensor:
    """The answer of one pass with methods on."""
    model = network(kind)
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


def hiding_is_dropping(kind: str, methods: Sequence[str], batch: Batch) -> None:
    """Masked execution answers what the padded one does."""
    wanted, got = (passed(kind, methods, batch.together, execution=way) for way in ("padded", "masked"))
    for i in range(len(batch.sizes)):
        assert_close(batch.own(got, i), batch.own(wanted, i), **CLOSE)


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

    def close(self) -> None:
        self.undo.close()


assert VOCAB > 50
