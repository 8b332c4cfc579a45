"""Decoders that write their attention out, or call the fused kernel themselves: their caches lose rows all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from transformers import DynamicCache

import fewer
from decoders import VOCAB, prompt
from fewer.compat import cached
from fewer.core import KeepRatio, Site
from fewer.methods.vision.random import Random
from fewer.runtime.program import SessionError
from fewer.testing.checks import same_snapshot, snapshot

IDS: dict[str, Any] = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WIDE: dict[str, Any] = dict(**IDS, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
BART: dict[str, Any] = dict(**IDS, d_model=32, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=48,
                            max_position_embeddings=256)  # fmt: skip
BUILD: dict[str, Callable[[], nn.Module]] = {
    "bloom": lambda: _of("Bloom", **IDS, hidden_size=32, n_layer=3, n_head=4),
    "falcon": lambda: _of("Falcon", **WIDE),
    "falcon-grouped": lambda: _of("Falcon", **WIDE, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-eager": lambda: _of("Falcon", **WIDE, attn_implementation="eager"),
    "falcon-alibi": lambda: _of("Falcon", **WIDE, alibi=True, multi_query=False),
    "mpt": lambda: _of("Mpt", **IDS, d_model=32, n_layers=3, n_heads=4, max_seq_len=128, expansion_ratio=2),
    "gpt-neo": lambda: _of("GPTNeo", **IDS, hidden_size=32, num_layers=3, num_heads=4, window_size=8,
                           attention_types=[[["global", "local", "global"], 1]], max_position_embeddings=128),
    "gpt-neox-japanese": lambda: _of("GPTNeoXJapanese", **WIDE, intermediate_multiple_size=2),
    "xglm": lambda: _of("XGLM", **IDS, d_model=32, num_layers=3, attention_heads=4, ffn_dim=48,
                        max_position_embeddings=128, scale_embedding=False),
    "trocr": lambda: _of("TrOCR", **BART, is_decoder=True, add_cross_attention=False),
    "mvp": lambda: _of("Mvp", **BART, encoder_layers=3, encoder_ffn_dim=16),
}  # fmt: skip
FAMILIES = tuple(BUILD)
METHODS = (
    "snapkv:keep=0.5,window=4,kernel=3",
    "knorm:keep=0.5",
    "streamingllm:tokens=9,sinks=2,positions=original",
    "h2o:keep=0.5",
    "adakv:keep=0.5,window=3,kernel=3,alpha=0.1",  # heads keep different numbers
)
CLOSE = dict(atol=2e-4, rtol=2e-4)
GREEDY: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, use_cache=True, return_dict_in_generate=True,
                              output_logits=True)  # fmt: skip


def _of(name: str, **config: Any) -> nn.Module:
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))


@cache
def decoder(family: str) -> nn.Module:
    torch.manual_seed(7)
    model: Any = BUILD[family]().eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.2)
    model.generation_config.eos_token_id = None  # nothing ends early
    return model


class Hiding(TorchFunctionMode):
    """The slow twin: keys in gone[layer], (B, G, L) bool, get no attention. Later keys than these are visible."""

    def __init__(self, model: nn.Module, gone: list[Tensor | None]) -> None:
        super().__init__()
        self.gone, self.layer = gone, 0
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        self.hooks = [b.register_forward_pre_hook(self._enter(i)) for i, b in enumerate(blocks)]

    def _enter(self, layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.layer = layer

        return hook

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _bias(self, shape: tuple[int, ...]) -> Tensor:
        """(B, H, 1, N), for logits of such a shape or of one with heads among the samples."""
        lost = self.gone[self.layer]
        assert lost is not None
        lost = nn.functional.pad(lost, (0, shape[-1] - lost.shape[-1]))
        lost = lost.repeat_interleave(4 // lost.shape[1], 1)[:, :, None]
        bias = torch.zeros(lost.shape).masked_fill(lost, float("-inf"))
        return bias.flatten(0, 1) if len(shape) == 3 else bias

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.gone[self.layer] is not None and name == "softmax":
            args = (args[0] + self._bias(args[0].shape), *args[1:])
        if self.gone[self.layer] is not None and name == "scaled_dot_product_attention":
            q, k, v = args
            bias, mask = self._bias((*q.shape[:-1], k.shape[-2])), kwargs.get("attn_mask")
            if kwargs.get("is_causal"):
                mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
            if mask is not None:
                bias = bias + (torch.zeros(mask.shape).masked_fill(~mask, -1e9) if mask.dtype == torch.bool else mask)
            k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
            return func(q, k, v, **{**kwargs, "is_causal": False, "attn_mask": bias.expand(*q.shape[:-1], -1)})
        return func(*args, **kwargs)


def lost(session: fewer.Session, length: int) -> list[Tensor | None]:
    """What each layer has evicted of the tokens seen so far, (B, G, length) bool."""
    gone: list[Tensor | None] = []
    for layer in range(3):
        kept = session.kept(layer)
        stays = torch.zeros(*kept.shape[:2], length + 1, dtype=torch.bool)
        gone.append(~stays.scatter(-1, torch.where(kept < 0, length, kept), True)[..., :-1])
    return gone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["h2o:keep=1.0", "snapkv:tokens=99,window=4,kernel=3"])
def test_keeping_all_is_the_model_to_the_bit(family: str, method: str) -> None:
    model: Any = decoder(family)
    ids, mask = prompt(15, 9)
    before = snapshot(model)
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    with fewer.apply(model, method) as session:
        mine = model.generate(ids, attention_mask=mask, **GREEDY)
        assert session.ledger.logical == [20] * 3
    assert torch.equal(mine.sequences, plain.sequences)
    assert all(map(torch.equal, mine.logits, plain.logits))
    same_snapshot(before, snapshot(model), family)


@pytest.mark.parametrize("lengths", [(25,), (9, 25)], ids=["one", "padded"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_equals_the_full_cache_with_the_evicted_keys_hidden(
    family: str, method: str, lengths: tuple[int, ...]
) -> None:
    """A prompt, some words, a second turn, more words: logits of each pass against the slow twin."""
    model: Any = decoder(family)
    twin = copy.deepcopy(model)
    ids, mask = prompt(*lengths)
    more, _ = prompt(*[14] * len(lengths), seed=1)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    small, full = DynamicCache(config=model.config), DynamicCache()
    gone: list[Tensor | None] = [None] * 3
    evicted = 0
    with torch.no_grad(), fewer.apply(model, method) as session:
        for a, b in pairwise([0, 25, 26, 27, 28, 35, 36, 37]):
            given = dict(input_ids=ids[:, a:b], attention_mask=mask[:, :b], use_cache=True)
            mine = model(**given, **cached(model, small)).logits
            with Hiding(twin, gone):
                want = twin(**given, **cached(twin, full)).logits
            real = mask[:, a:b, None].bool()
            assert_close(mine * real, want * real, **CLOSE, msg=lambda m, a=a, b=b: f"tokens {a}..{b}: {m}")
            gone = lost(session, b)
            evicted += sum(int(g.sum()) for g in gone if g is not None)
            assert small.get_seq_length() == b
    assert evicted > 0
    assert session.ledger.bytes < session.ledger.full_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_session_comes_off_and_a_reduced_cache_is_not_used_without_it(family: str) -> None:
    model: Any = decoder(family)
    ids, mask = prompt(15, 9)
    before, held = snapshot(model), DynamicCache(config=model.config)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, use_cache=False).logits
        with fewer.apply(model, "knorm:keep=0.5"):
            model(ids, attention_mask=mask, **cached(model, held), use_cache=True)
        same_snapshot(before, snapshot(model), family)
        assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, plain)
        with pytest.raises(fewer.runtime.kv.state.CacheError, match="not on this model any more"):
            model(ids[:, :1], attention_mask=torch.ones(2, 16), **cached(model, held), use_cache=True)


@pytest.mark.parametrize("family", ["falcon", "gpt-neox-japanese"])
def test_keys_that_turn_are_moved_together(family: str) -> None:
    """Rows that stand as if nothing had gone read as a prompt that never had more: in the first layer, where keys do
    not depend on earlier words, to the rounding."""
    model: Any = decoder(family)
    ids, mask = prompt(25)
    short = torch.cat([ids[:, :2], ids[:, 18:]], 1)
    with torch.no_grad():
        want = model(short, use_cache=True)
        with fewer.apply(model, "streamingllm:tokens=9,sinks=2") as session:
            held = DynamicCache(config=model.config)
            model(ids, attention_mask=mask, **cached(model, held), use_cache=True)
            assert session.counts == [9] * 3
    want = next(want[n] for n in ("cache", "past_key_values") if n in want).layers[0].keys
    far = torch.einsum("bgid,bgjd->bgij", held.layers[0].keys, held.layers[0].keys)
    assert_close(far, torch.einsum("bgid,bgjd->bgij", want, want), **CLOSE)


@pytest.mark.parametrize("lengths", [(17,), (20, 9, 14)], ids=str)
@pytest.mark.parametrize("family", ["falcon", "gpt-neox-japanese", "xglm", "trocr", "mvp"])
def test_tokens_that_leave_between_blocks_are_seen_by_nobody_later(family: str, lengths: tuple[int, ...]) -> None:
    """The reference: all tokens in all layers, with those that left out of sight behind the block they left at."""
    model: Any = decoder(family)
    twin = copy.deepcopy(model)
    ids, mask = prompt(*lengths)
    n = ids.shape[1]
    more, seen = torch.cat([ids, prompt(*[3] * len(ids), seed=5)[0]], 1), nn.functional.pad(mask, (0, 3), value=1)
    held = DynamicCache(config=model.config)
    with torch.no_grad(), fewer.apply(model, Random(KeepRatio(0.6), (0, 1), site=Site.AFTER_BLOCK)) as session:
        model(ids, attention_mask=mask, **cached(model, held), use_cache=True)
        gone = lost(session, n)
        steps = [
            model(more[:, i : i + 1], attention_mask=seen[:, : i + 1], **cached(model, held), use_cache=True).logits
            for i in range(n, n + 3)
        ]
    assert [int((~g[:, 0]).sum()) < int(mask.sum()) for g in gone if g is not None] == [False, True, True]
    with torch.no_grad(), Hiding(twin, gone):
        want = twin(more, attention_mask=seen, use_cache=False).logits
    assert_close(torch.cat(steps, 1), want[:, n:], **CLOSE)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(SessionError, match="asks no attention table"):
        fewer.apply(decoder("bloom"), "quest")
    with pytest.raises(SessionError, match="positions=original"):
        fewer.apply(decoder("bloom"), "streamingllm:tokens=9,sinks=2")
    with pytest.raises(fewer.hosts.HostError, match="arranges what it turns"):
        fewer.apply(decoder("falcon-alibi"), "streamingllm:tokens=9,sinks=2")
