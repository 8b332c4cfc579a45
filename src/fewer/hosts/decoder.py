"""Decoders of Hugging Face transformers and their KV caches: the table, and how a session gets to see their attention.

The session rides through the model's own keyword arguments down to the attention function: no module is wrapped and
nothing is shared between threads. The model's own attention implementation does the work, on the rows that are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fewer.core.cached import Rotary

from .base import HostError
from .transformers_vision import TransformersDriver

NAME = "fewer_cache"  # our key in the attention tables while a session is on
SUPPORTED = ("sdpa", "eager")


@dataclass(frozen=True)
class Decoder:
    """One architecture.

    root       class names of the module that owns the blocks and takes past_key_values
    blocks     path from the root to the list of blocks; attention: path from a block to its attention
    rotary     (root, layer) -> (frequencies, scale), or None where positions are learned
    """

    name: str
    root: tuple[str, ...]
    blocks: str = "layers"
    attention: str = "self_attn"
    rotary: Callable[[nn.Module, int], Rotary] | None = None


def _rotary(root: nn.Module, layer: int) -> Rotary:
    """One embedding for all layers."""
    embedding: Any = root.rotary_emb
    _check_rope(embedding.rope_type)
    return Rotary(embedding.inv_freq.float(), float(embedding.attention_scaling))


def _rotary_by_type(root: nn.Module, layer: int) -> Rotary:
    """Sliding and full layers turn at different speeds (Gemma 3)."""
    embedding: Any = root.rotary_emb
    kind = root.config.layer_types[layer]  # type: ignore[union-attr, index]
    _check_rope(embedding.rope_type[kind])
    frequencies = getattr(embedding, f"{kind}_inv_freq")
    return Rotary(frequencies.float(), float(getattr(embedding, f"{kind}_attention_scaling")))


def _check_rope(kind: str) -> None:
    if kind in ("dynamic", "longrope"):
        raise HostError(
            f"the rotary embedding of type {kind!r} changes with the length of the input, so rows cannot be turned "
            "back; choose a method that leaves rotations alone (snapkv, h2o, tova, knorm, keydiff)"
        )


DECODERS = (
    Decoder("Llama (and SmolLM2)", ("LlamaModel",), rotary=_rotary),
    Decoder("Mistral", ("MistralModel",), rotary=_rotary),
    Decoder("Qwen2", ("Qwen2Model",), rotary=_rotary),
    Decoder("Qwen3", ("Qwen3Model",), rotary=_rotary),
    Decoder("Gemma 3 (text)", ("Gemma3TextModel",), rotary=_rotary_by_type),
    Decoder("GPT-2", ("GPT2Model",), blocks="h", attention="attn"),
)


class Visit(Protocol):
    """What a session does with one attention call of a pass."""

    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      fewer: Visit | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Our entry in the attention table. Without a visit (no cache in this pass) the model's own function runs."""
    plain = DecoderDriver.implementation(module)
    if fewer is None:
        return plain(module, query, key, value, attention_mask, **kwargs)
    return fewer.attend(module, plain, query, key, value, attention_mask, kwargs)


def mask_forward(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """Our entry in the mask table: the mask the model's own implementation would get."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[DecoderDriver.before(config)](*args, config=config, **kwargs)


class DecoderDriver(TransformersDriver):
    """Puts our name into a decoder's configs and the global tables, and takes it out again."""

    name = NAME
    _users = 0
    _configs: ClassVar[dict[int, tuple[str, int]]] = {}

    @classmethod
    def before(cls, config: Any) -> str:
        """The implementation a config named before the session."""
        return cls._configs.get(id(config), ("sdpa", 0))[0]

    @classmethod
    def entries(cls) -> tuple[Callable, Callable]:
        return attention_forward, mask_forward


class DecoderHost:
    """A decoder row bound to one model."""

    def __init__(self, family: Decoder, root: nn.Module, path: str) -> None:
        self.family, self.root, self.path = family, root, path
        self.blocks = list(attrgetter(family.blocks)(root))
        self.attentions = [attrgetter(family.attention)(block) for block in self.blocks]
        self.driver = DecoderDriver()
        config: Any = root.config
        if getattr(config, "add_cross_attention", False):
            raise HostError("a decoder with cross-attention keeps two caches; only the plain one can be reduced")
        if getattr(config, "reorder_and_upcast_attn", False):
            raise HostError("reorder_and_upcast_attn=True bypasses the attention table; set it to False in the config")
        own = config._attn_implementation
        if own == NAME:
            raise HostError("this model already has a session on its cache: call remove() first")
        if own not in SUPPORTED:
            raise HostError(
                f"the attention implementation {own!r} cannot take the rows of a reduced cache; load the model with "
                f"attn_implementation={' or '.join(map(repr, SUPPORTED))}"
            )

    @classmethod
    def find(cls, model: nn.Module) -> DecoderHost:
        """Bind a model to its row.

        Raises   HostError if none fits, naming what is supported.
        """
        for path, module in model.named_modules():
            for family in DECODERS:
                if type(module).__name__ in family.root:
                    return cls(family, module, path)
        supported = ", ".join(f.name for f in DECODERS)
        raise HostError(f"{type(model).__name__} is not a decoder whose cache fewer knows. Supported: {supported}")

    def attach(self, hook: Callable, undo: ExitStack) -> None:
        """Register our entries and the hook that opens each pass; what `undo` holds takes them off again."""
        self.driver.enter_all([self.root.config, *(m.config for m in self.attentions)], undo)
        undo.callback(self.root.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def rotary(self, layer: int) -> Rotary | None:
        return None if self.family.rotary is None else self.family.rotary(self.root, layer)

    def describe(self) -> Iterator[tuple[str, str]]:
        """What was found, as (what, value) rows."""
        yield "family", self.family.name
        yield "root", f"{self.path or '(the model itself)'}: {type(self.root).__name__}"
        yield "blocks", str(len(self.blocks))
        yield "positions", "learned" if self.family.rotary is None else "rotary"
        yield "sites", "the KV cache"
