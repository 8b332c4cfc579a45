"""Decoders of Hugging Face transformers and their KV caches: the table, and how a session gets to see their attention.

The session rides through the model's own keyword arguments down to the attention function: no module is wrapped and
nothing is shared between threads. The model's own attention implementation does the work, on the rows that are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fewer.core.cached import Rotary

from .base import Call, Driver, Family, Host, HostError
from .transformers_vision import TransformersDriver

NAME = "fewer_cache"  # our key in the attention tables while a session is on
SUPPORTED = ("sdpa", "eager")


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


def _llama(name: str, stem: str) -> Family:
    """Llama's layout under another name."""
    return Family(
        name, (f"{stem}Model",), f"{stem}DecoderLayer", "input_layernorm", "self_attn", "post_attention_layernorm",
        "mlp", final_norm="norm", rotary=_rotary, library="decoder",
    )  # fmt: skip


def _rotary_in_space(root: nn.Module, layer: int) -> Rotary:
    raise HostError(
        "the rotary embedding of this model turns rows by their place in time and space (M-RoPE), not by one position; "
        "choose a method that leaves rotations alone (snapkv, h2o, tova, knorm, keydiff)"
    )


def _qwen_vl(name: str, stem: str) -> Family:
    """The language model of a Qwen-VL."""
    return Family(
        name, (f"{stem}TextModel",), f"{stem}DecoderLayer", "input_layernorm", "self_attn", "post_attention_layernorm",
        "mlp", final_norm="norm", rotary=_rotary_in_space, library="decoder",
    )  # fmt: skip


FAMILIES = (
    _llama("Llama (and SmolLM2)", "Llama"),
    _llama("Mistral", "Mistral"),
    _llama("Qwen2", "Qwen2"),
    _llama("Qwen3", "Qwen3"),
    Family(
        "Gemma 3 (text)", ("Gemma3TextModel",), "Gemma3DecoderLayer", "input_layernorm", "self_attn",
        "pre_feedforward_layernorm", "mlp", final_norm="norm", after_attention=("post_attention_layernorm",),
        after_mlp=("post_feedforward_layernorm",), rotary=_rotary_by_type, library="decoder",
    ),
    _qwen_vl("Qwen2-VL (language model)", "Qwen2VL"),
    _qwen_vl("Qwen2.5-VL (language model)", "Qwen2_5_VL"),
    replace(_qwen_vl("Qwen3-VL (language model)", "Qwen3VL"), block="Qwen3VLTextDecoderLayer"),
    Family("GPT-2", ("GPT2Model",), "GPT2Block", "ln_1", "attn", "ln_2", "mlp", final_norm="ln_f", library="decoder"),
)  # fmt: skip


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
    _configs: ClassVar[dict[int, tuple[str, int, Any]]] = {}

    @classmethod
    def before(cls, config: Any) -> str:
        """The implementation a config named before the session."""
        before, *_ = cls._configs.get(id(config), ("sdpa",))
        return before

    @classmethod
    def entries(cls) -> tuple[Callable, Callable]:
        return attention_forward, mask_forward

    def attention(self, module: nn.Module, x: Tensor, mask: Tensor | None, call: Call, kwargs: dict) -> Tensor:
        """The call rides with the pass, which looks into it when the attention function is reached."""
        kwargs["fewer"].call = call
        return module(x, attention_mask=mask, **kwargs)[0]


class DecoderHost(Host):
    """A decoder row bound to one model."""

    def __init__(self, family: Family, root: nn.Module, path: str, driver: Driver) -> None:
        super().__init__(family, root, path, driver)
        self.attentions = [attrgetter(family.attention)(block) for block in self.blocks]
        config: Any = root.config
        if getattr(config, "add_cross_attention", False):
            raise HostError("a decoder with cross-attention keeps two caches; only the plain one can be reduced")
        if getattr(config, "reorder_and_upcast_attn", False):
            raise HostError("reorder_and_upcast_attn=True bypasses the attention table; set it to False in the config")
        own = config._attn_implementation
        if own == NAME:
            raise HostError("this model already has a session on: call remove() first")
        if own not in SUPPORTED:
            raise HostError(
                f"the attention implementation {own!r} cannot take the rows of a reduced cache; load the model with "
                f"attn_implementation={' or '.join(map(repr, SUPPORTED))}"
            )

    def open(self, hook: Callable, undo: ExitStack) -> None:
        """Register our entries and the hook that opens each pass; what `undo` holds takes them off again."""
        self.driver.attach(self, undo)
        undo.callback(self.root.register_forward_pre_hook(hook, with_kwargs=True).remove)

    @contextmanager
    def watched(self, visit: Visit) -> Iterator[None]:
        """Until the block ends, every attention call of the model goes through `visit.attend`."""

        def send(root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, {**kwargs, "fewer": visit}

        with ExitStack() as undo:
            self.open(send, undo)
            yield

    @property
    def channels(self) -> int:
        """Of the hidden states; not in every model heads times channels per head."""
        return int(self.root.get_input_embeddings().embedding_dim)  # type: ignore[operator]

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer, each shared by heads / kv_heads query heads."""
        return int(getattr(self.root.config, "num_key_value_heads", self.heads))  # type: ignore[union-attr, arg-type]

    def slides(self, layer: int) -> bool:
        """Whether a layer sees a window of the latest tokens only."""
        config: Any = self.root.config
        kinds = getattr(config, "layer_types", None)
        if kinds is not None:
            return kinds[layer] != "full_attention"
        return getattr(config, "sliding_window", None) is not None

    def rotary(self, layer: int) -> Rotary | None:
        return None if self.family.rotary is None else self.family.rotary(self.root, layer)

    def describe(self) -> Iterator[tuple[str, str]]:
        """What was found, as (what, value) rows."""
        for what, value in super().describe():
            if what != "prefix tokens":
                yield what, value if what != "sites" else f"{value}, the KV cache"
        yield "positions", "learned" if self.family.rotary is None else "rotary"
