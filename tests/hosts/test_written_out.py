"""Attention that models write out: entered without a bit changed, seen as it is, and what is added to it acts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tvstub
from fewer.core import Group, Seen
from fewer.core.attention import masked_attention, rows
from fewer.core.ragged import Packing
from fewer.hosts.base import Call, HostError
from fewer.hosts.written_out import entered

B, N, VOCAB = 2, 9, 60
CLOSE = dict(atol=2e-5, rtol=1e-4)
BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=VOCAB)
BART = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=40, decoder_ffn_dim=40, vocab_size=VOCAB, pad_token_id=1)  # fmt: skip
SPEECH = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, conv_dim=(16, 16),
              conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
              num_conv_pos_embedding_groups=4)  # fmt: skip
PICTURE = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, image_size=32,
               patch_size=8)  # fmt: skip


# -- models ------------------------------------------------------------------------------------------------------------
def model(name: str, config: str | None = None, /, implementation: str | None = None, **sizes: Any) -> nn.Module:
    """A random model of transformers; weights large enough that attention is far from even."""
    config = name.removesuffix("Model") + "Config" if config is None else config
    made = getattr(transformers, config)(**sizes)
    made.use_cache = False
    if implementation is not None:
        made._attn_implementation = implementation
    return getattr(transformers, name)(made)


def text(seed: int = 0, padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (B, N), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(B, N, dtype=torch.long)
    if padded:
        mask[1, -2:] = 0
    return dict(input_ids=ids, attention_mask=mask)


def picture() -> dict[str, Tensor]:
    return dict(pixel_values=torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def sound() -> dict[str, Tensor]:
    return dict(input_values=torch.randn(B, 400, generator=torch.Generator().manual_seed(0)))


def encoder_decoder() -> dict[str, Tensor]:
    return text() | dict(decoder_input_ids=text(1)["input_ids"])


# name: (the attention's class, the model, what it is given)
TRANSFORMERS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], dict]]] = {
    "mpnet": ("MPNetSelfAttention", lambda: model("MPNetModel", **BERT), text),
    "roformer": ("RoFormerSelfAttention", lambda: model("RoFormerModel", **BERT, embedding_size=32), text),
    "megatron-bert": ("MegatronBertSelfAttention", lambda: model("MegatronBertModel", **BERT), text),
    "rembert": ("RemBertSelfAttention", lambda: model("RemBertModel", **BERT, input_embedding_size=16), text),
    "squeezebert": ("SqueezeBertSelfAttention", lambda: model("SqueezeBertModel", **BERT, embedding_size=32), text),
    "xlm": ("MultiHeadAttention", lambda: model("XLMModel", emb_dim=32, n_layers=1, n_heads=4, vocab_size=VOCAB), text),
    "flaubert": ("MultiHeadAttention", lambda: model(
        "FlaubertModel", emb_dim=32, n_layers=1, n_heads=4, vocab_size=VOCAB), text),
    "funnel": ("FunnelRelMultiheadAttention", lambda: model(
        "FunnelBaseModel", "FunnelConfig", d_model=32, n_head=4, d_head=8, d_inner=40, block_sizes=[1, 1],
        vocab_size=VOCAB), text),
    "funnel-factorized": ("FunnelRelMultiheadAttention", lambda: model(
        "FunnelBaseModel", "FunnelConfig", d_model=32, n_head=4, d_head=8, d_inner=40, block_sizes=[1, 1],
        vocab_size=VOCAB, attention_type="factorized"), text),
    "tapas": ("TapasSelfAttention", lambda: model("TapasModel", **BERT), text),
    "luke": ("LukeSelfAttention", lambda: model(
        "LukeModel", **BERT, entity_vocab_size=5, entity_emb_size=8), text),
    "deberta": ("DisentangledSelfAttention", lambda: model(
        "DebertaModel", **BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=6), text),
    "deberta-v2": ("DisentangledSelfAttention", lambda: model(
        "DebertaV2Model", **BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=6), text),
    "convbert": ("ConvBertSelfAttention", lambda: model("ConvBertModel", **BERT, embedding_size=32), text),
    "ibert": ("IBertSelfAttention", lambda: model("IBertModel", **BERT), text),
    "xlnet": ("XLNetRelativeAttention", lambda: model(
        "XLNetModel", d_model=32, n_layer=1, n_head=4, d_inner=40, vocab_size=VOCAB), text),
    "lxmert": ("LxmertAttention", lambda: model(
        "LxmertModel", **BERT, l_layers=1, r_layers=1, x_layers=1, visual_feat_dim=8),
        lambda: text() | dict(visual_feats=torch.randn(B, N, 8), visual_pos=torch.rand(B, N, 4))),
    "bloom": ("BloomAttention", lambda: model("BloomModel", hidden_size=32, n_layer=1, n_head=4, vocab_size=VOCAB),
              text),
    "falcon": ("FalconAttention", lambda: model(
        "FalconModel", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB,
        implementation="eager"), text),
    "falcon-fused": ("FalconAttention", lambda: model(
        "FalconModel", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB,
        implementation="sdpa"), text),
    "falcon-causal": ("FalconAttention", lambda: model(
        "FalconModel", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB,
        implementation="sdpa"), lambda: text(padded=False)),
    "falcon-alibi": ("FalconAttention", lambda: model(
        "FalconModel", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB, alibi=True,
        implementation="eager"), text),
    "mpt": ("MptAttention", lambda: model("MptModel", d_model=32, n_layers=1, n_heads=4, vocab_size=VOCAB), text),
    "gpt-neo": ("GPTNeoSelfAttention", lambda: model(
        "GPTNeoModel", hidden_size=32, num_layers=2, num_heads=4, vocab_size=VOCAB, window_size=4,
        attention_types=[[["local", "global"], 1]]), text),
    "gpt-neox-japanese": ("GPTNeoXJapaneseAttention", lambda: model(
        "GPTNeoXJapaneseModel", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB), text),
    "openai-gpt": ("Attention", lambda: model(
        "OpenAIGPTModel", n_embd=32, n_layer=1, n_head=4, vocab_size=VOCAB), text),
    "xglm": ("XGLMAttention", lambda: model(
        "XGLMModel", d_model=32, num_layers=1, attention_heads=4, ffn_dim=40, vocab_size=VOCAB), text),
    "data2vec-vision": ("Data2VecVisionSelfAttention", lambda: model(
        "Data2VecVisionModel", **PICTURE, use_relative_position_bias=True, implementation="eager"), picture),
    "data2vec-vision-fused": ("Data2VecVisionSdpaSelfAttention", lambda: model(
        "Data2VecVisionModel", **PICTURE, use_relative_position_bias=True, implementation="sdpa"), picture),
    "blip-vision": ("BlipAttention", lambda: model("BlipVisionModel", **PICTURE), picture),
    "vilt": ("ViltSelfAttention", lambda: model(
        "ViltModel", **PICTURE, vocab_size=VOCAB), lambda: text() | picture()),
    "led-decoder": ("LEDDecoderAttention", lambda: model("LEDModel", **BART, attention_window=4), encoder_decoder),
    "fsmt": ("Attention", lambda: model(
        "FSMTModel", **{k: v for k, v in BART.items() if k != "vocab_size"}, src_vocab_size=VOCAB, tgt_vocab_size=VOCAB,
        langs=["a", "b"]), encoder_decoder),
    "mvp": ("MvpAttention", lambda: model("MvpModel", **BART), encoder_decoder),
    "prophetnet": ("ProphetNetAttention", lambda: model(
        "ProphetNetModel", hidden_size=32, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, vocab_size=VOCAB), encoder_decoder),
    "wavlm": ("WavLMAttention", lambda: model("WavLMModel", **SPEECH), sound),
    "sew-d": ("DisentangledSelfAttention", lambda: model(
        "SEWDModel", **SPEECH, squeeze_factor=1, position_buckets=8, max_position_embeddings=64), sound),
    "speecht5": ("SpeechT5Attention", lambda: model(
        "SpeechT5ForSpeechToText", "SpeechT5Config", **SPEECH, encoder_layers=1, decoder_layers=1, vocab_size=VOCAB,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40),
        lambda: sound() | dict(decoder_input_ids=text()["input_ids"])),
    "levit": ("LevitAttention", lambda: model("LevitModel", image_size=64, hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], down_ops=[["Subsample", 8, 2, 4, 2, 2],
        ["Subsample", 8, 2, 4, 2, 2]]), lambda: dict(pixel_values=torch.randn(B, 3, 64, 64))),
    "hiera": ("HieraMaskUnitAttention", lambda: model("HieraModel", embed_dim=16, image_size=[32, 32],
        patch_kernel=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3], masked_unit_size=[4, 4], depths=[1],
        num_heads=[2], query_stride=[2, 2], num_query_pool=0, masked_unit_attention=[False]), picture),
}  # fmt: skip


def timm_model(name: str, **sizes: Any) -> nn.Module:
    return tvstub.timm.create_model(name, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, **sizes)


TIMM: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "timm-vit": ("Attention", lambda: timm_model("vit_tiny_patch16_224")),
    "timm-beit": ("Attention", lambda: timm_model("beit_base_patch16_224")),
    "timm-eva": ("EvaAttention", lambda: timm_model("eva02_tiny_patch14_224")),
    "timm-cait-class": ("ClassAttn", lambda: timm_model("cait_xxs24_224")),
}
WRITTEN = {f"{n}-written": row for n, row in TIMM.items()}  # the same, with the fused kernel off
ENTERED = [*TRANSFORMERS, *TIMM, *WRITTEN]


class One:
    """An attention module of a model with what it was given. run() gives all tensors it returns."""

    def __init__(self, root: nn.Module, kind: str, inputs: dict | tuple) -> None:
        seen: list[tuple[nn.Module, tuple, dict]] = []
        hooks = [
            m.register_forward_pre_hook(lambda m, a, k: seen.append((m, a, k)), with_kwargs=True)
            for m in root.modules() if type(m).__name__ == kind
        ]  # fmt: skip
        with torch.no_grad():
            root(**inputs) if isinstance(inputs, dict) else root(*inputs)
        for hook in hooks:
            hook.remove()
        self.module, self.args, self.kwargs = seen[0]
        self.kwargs = {k: v for k, v in self.kwargs.items() if k not in ("cache", "layer_past")}  # it is run again
        given = [t for t in (*self.args, *self.kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
        self.x = given[0]
        samples, length, _ = self.x.shape
        if kind == "SqueezeBertSelfAttention":
            length = self.x.shape[2]
        if kind in ("XLNetRelativeAttention", "Attention") and self.x.shape[1] == B:
            samples, length = length, samples
        self.size = dict(batch=samples, keys=length)

    def run(self) -> list[Tensor]:
        return leaves(self.module(*self.args, **self.kwargs))


def leaves(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else ()
    return [t for part in parts for t in leaves(part)]


@cache
def one(name: str) -> One:
    torch.manual_seed(0)
    if name in TRANSFORMERS:
        kind, build, inputs = TRANSFORMERS[name]
        given: dict | tuple = inputs()
    else:
        kind, build = (TIMM | WRITTEN)[name]
        given = (picture()["pixel_values"],)
    root = build().eval()
    with torch.no_grad():
        for p in root.parameters():
            if p.dim() > 1:
                p.normal_(std=0.3)
    if name in WRITTEN:
        for m in root.modules():
            if hasattr(m, "fused_attn"):
                m.fused_attn = False
    return One(root, kind, given)


class Spy(TorchFunctionMode):
    """Keeps what products and softmaxes gave."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Tensor] = []
        self.probs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("matmul", "bmm", "einsum", "scaled_dot_product_attention"):
            self.products.append(out)
        elif name in ("softmax", "true_divide", "div", "to"):
            self.probs.append(out)
        return out


def given(products: list[Tensor], wanted: Tensor) -> Tensor:
    """The one of some products, as (B, H, Q, d), that is what is wanted, or the nearest."""
    b, h, q, d = wanted.shape
    near = [t for t in products if t.numel() == wanted.numel()]
    near = [t.transpose(1, 2) if t.shape == (b, q, h, d) else t for t in near]
    near = [t.permute(1, 2, 0, 3) if t.shape == (q, b, h, d) else t for t in near]
    return min((t.reshape(wanted.shape) for t in near), key=lambda t: (t - wanted).abs().max().item())


def attended(seen: Seen) -> Tensor:
    """What the seen call gives, in float32. Returns (B, H, Q, d)."""
    p = rows(seen, Group(0, seen.q.shape[2]))
    return p @ seen.v.float().expand(-1, p.shape[1] if seen.v.shape[1] == 1 else -1, -1, -1)


def watched(it: One) -> Seen:
    call = Call(watch=True)
    with entered(call, **it.size):
        it.run()
    assert call.seen is not None
    return call.seen


# -- the law -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("name", ENTERED)
def test_no_bit_changes(name: str, watch: bool) -> None:
    it, call = one(name), Call(watch=watch)
    plain = it.run()
    with entered(call, **it.size):
        inside = it.run()
    assert call.entered, "not entered"
    assert len(plain) == len(inside)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert (call.seen is not None) == watch


@pytest.mark.parametrize("name", ENTERED)
def test_what_is_seen_is_what_the_module_computes(name: str) -> None:
    it, call = one(name), Call(watch=True)
    with Spy() as spy, entered(call, **it.size):
        it.run()
    assert call.seen is not None
    seen = call.seen
    assert seen.q.dim() == seen.k.dim() == seen.v.dim() == 4
    assert (seen.k.shape[0], seen.k.shape[2]) == (it.size["batch"], it.size["keys"])
    wanted = attended(seen)
    assert_close(given(spy.products, wanted), wanted, **CLOSE)
    even = seen.v.float().mean(2, keepdim=True).expand_as(wanted)
    assert (wanted - even).abs().max() > 0.01, "attention is even: this shows nothing"


@pytest.mark.parametrize("name", ENTERED)
def test_a_hidden_key_is_a_key_that_is_not_there(name: str) -> None:
    it, hidden = one(name), 2
    seen = watched(it)
    bias = torch.zeros(it.size["batch"], 1, 1, it.size["keys"])
    bias[..., hidden] = float("-inf")
    call = Call(bias, watch=True)
    with Spy() as spy, entered(call, **it.size):
        it.run()
    others = torch.tensor([j for j in range(it.size["keys"]) if j != hidden])
    p = rows(seen, Group(0, seen.q.shape[2]))[..., others]
    see = p.sum(-1, keepdim=True) > 1e-3  # a causal row may have nothing else to look at
    wanted = p / p.sum(-1, keepdim=True) @ seen.v.float()[..., others, :]
    assert_close(torch.where(see, given(spy.products, torch.where(see, wanted, 0)), 0), torch.where(see, wanted, 0),
                 atol=2e-4, rtol=1e-3)  # fmt: skip
    assert call.seen is not None
    assert_close(torch.where(see, attended(call.seen), 0), torch.where(see, wanted, 0), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("name", ENTERED)
def test_a_policy_gates_as_masked_attention_does(name: str, eps: float) -> None:
    it = one(name)
    seen = watched(it)
    policy = torch.rand(it.size["batch"], it.size["keys"], generator=torch.Generator().manual_seed(1))
    policy[:, 3] = 0
    policy.requires_grad_()
    call = Call(policy=policy, eps=eps)
    if seen.q.shape[2] != seen.k.shape[2]:
        if "written" in name:
            with pytest.raises(HostError, match="queries that are the keys"), entered(call, **it.size):
                it.run()
        return
    if name == "sew-d":
        with pytest.raises(HostError, match="autograd function"), entered(call, **it.size):
            it.run()
        call.policy = policy = policy.detach()
    with Spy() as spy, entered(call, **it.size):
        out = it.run()
    bias = torch.ones(seen.q.shape[2], seen.q.shape[2], dtype=torch.bool).tril() if seen.causal else seen.bias
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape).masked_fill(~bias, float("-inf"))
    wanted = masked_attention(seen.q, seen.k, seen.v, seen.scale, bias, policy, eps)
    assert_close(given(spy.products, wanted), wanted, **CLOSE)
    if policy.requires_grad:
        (grad,) = torch.autograd.grad(out[0].pow(2).sum(), policy)
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0


# -- what cannot be entered --------------------------------------------------------------------------------------------
LONG = dict(BERT, max_position_embeddings=600)
CLOSED: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], dict]]] = {
    "fnet (Fourier mixing)": ("FNetBasicFourierTransform", lambda: model("FNetModel", **BERT),
                              lambda: dict(input_ids=text()["input_ids"])),
    "longformer (windows)": ("LongformerSelfAttention", lambda: model("LongformerModel", **LONG, attention_window=4),
                             text),
    "led encoder (windows)": ("LEDEncoderSelfAttention", lambda: model("LEDModel", **BART, attention_window=4),
                              encoder_decoder),
    "big bird (blocks)": ("BigBirdBlockSparseAttention", lambda: model(
        "BigBirdModel", **LONG, block_size=4, num_random_blocks=1, attention_type="block_sparse"),
        lambda: dict(input_ids=torch.randint(3, VOCAB, (B, 64)))),
    "nystromformer (landmarks)": ("NystromformerSelfAttention", lambda: model(
        "NystromformerModel", **BERT, segment_means_seq_len=12, num_landmarks=4, conv_kernel_size=3),
        lambda: dict(input_ids=torch.randint(3, VOCAB, (B, 12)))),
    "reformer (hashing)": ("LSHSelfAttention", lambda: model(
        "ReformerModel", hidden_size=32, num_attention_heads=4, attention_head_size=8, attn_layers=["lsh"],
        feed_forward_size=40, vocab_size=VOCAB, axial_pos_embds=False, lsh_attn_chunk_length=4, num_buckets=2,
        num_hashes=1, is_decoder=False), lambda: dict(input_ids=torch.randint(3, VOCAB, (B, 16)))),
    "canine (local chunks)": ("CanineAttention", lambda: model(
        "CanineModel", **{k: v for k, v in BERT.items() if k != "vocab_size"}, downsampling_rate=4,
        upsampling_kernel_size=4, local_transformer_stride=8),
        lambda: dict(input_ids=torch.randint(3, VOCAB, (B, 32)))),
    "ibert, quantised (integer softmax)": ("IBertSelfAttention", lambda: model("IBertModel", **BERT, quant_mode=True),
                                           text),
    "luke with entities (queries per pair of kinds)": ("LukeSelfAttention", lambda: model(
        "LukeModel", **BERT, entity_vocab_size=5, entity_emb_size=8),
        lambda: text() | dict(entity_ids=torch.ones(B, 2, dtype=torch.long),
                              entity_position_ids=torch.zeros(B, 2, 3, dtype=torch.long),
                              entity_attention_mask=torch.ones(B, 2))),
    "prophetnet decoder (n-gram streams)": ("ProphetNetNgramSelfAttention", TRANSFORMERS["prophetnet"][1],
                                            encoder_decoder),
    "hiera (mask units)": ("HieraMaskUnitAttention", lambda: model(
        "HieraModel", embed_dim=16, image_size=[32, 32], patch_kernel=[7, 7], patch_stride=[4, 4],
        patch_padding=[3, 3], masked_unit_size=[4, 4], depths=[1], num_heads=[2], query_stride=[2, 2],
        num_query_pool=0, masked_unit_attention=[True]), picture),
}  # fmt: skip
TIMM_CLOSED: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "timm cait (heads mixed)": ("TalkingHeadAttn", TIMM["timm-cait-class"][1]),
    "timm xcit (channels attend)": ("XCA", lambda: timm_model("xcit_nano_12_p16_224")),
    "timm vit, differential (two softmaxes)": ("DiffAttention", lambda: timm_model(
        "vit_tiny_patch16_224", attn_layer="diff")),
}  # fmt: skip


@cache
def closed(name: str) -> One:
    torch.manual_seed(0)
    kind, build = (CLOSED.get(name) or TIMM_CLOSED[name])[:2]
    return One(build().eval(), kind, CLOSED[name][2]() if name in CLOSED else (picture()["pixel_values"],))


@pytest.mark.parametrize("name", [*CLOSED, *TIMM_CLOSED])
def test_what_cannot_be_entered_says_so(name: str) -> None:
    it, call = closed(name), Call(watch=True)
    torch.manual_seed(0)
    plain = it.run()
    torch.manual_seed(0)
    with entered(call, **it.size):
        inside = it.run()
    assert not call.entered
    assert call.seen is None
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    bias = torch.zeros(it.size["batch"], 1, 1, it.size["keys"])
    with pytest.raises(HostError, match="no attention over"), entered(Call(bias), **it.size):
        it.run()


# -- attention by hand, in all its spellings ---------------------------------------------------------------------------
def qkv(heads: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, N, 8, generator=g).to(dtype) for _ in range(3))
    return q, k, v


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "functional": lambda q, k, v: F.softmax(q @ k.mT / 8**0.5, -1) @ v,
    "torch": lambda q, k, v: torch.matmul(torch.softmax(torch.matmul(q, k.mT) * 8**-0.5, dim=3), v),
    "module": lambda q, k, v: nn.Softmax(dim=-1)(q @ k.mT) @ v,
    "float32": lambda q, k, v: (q @ k.mT).float().softmax(-1).type_as(v) @ v,
    "dtype": lambda q, k, v: F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(v.dtype) @ v,
    "head mask": lambda q, k, v: (q @ k.mT).softmax(-1) * torch.ones(4, 1, 1) @ v,
    "clamped": lambda q, k, v: (q @ k.mT).clamp(-2, 2).softmax(-1) @ v,
    "capped": lambda q, k, v: (torch.tanh(q @ k.mT / 3) * 3).softmax(-1) @ v,
    "temperature": lambda q, k, v: ((q @ k.mT + 0.5) * torch.rand(4, 1, 1) - torch.rand(4, N, N)).softmax(-1) @ v,
    "divided": lambda q, k, v: ((q @ k.mT).add_(torch.rand(B, 1, 1, N)) / torch.tensor(3.0)).softmax(-1) @ v,
    "in place": lambda q, k, v: (q @ k.mT).mul_(0.5).masked_fill_(torch.eye(N).bool(), -1e9).softmax(-1) @ v,
    "set": lambda q, k, v: _set(q @ k.mT).softmax(-1) @ v,
    "through a view": lambda q, k, v: _through_view(q @ k.mT).softmax(-1) @ v,
    "bmm": lambda q, k, v: torch.bmm(
        F.softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT), -1), v.flatten(0, 1)).view(B, 4, N, 8),
    "baddbmm": lambda q, k, v: torch.baddbmm(
        torch.rand(B * 4, 1, N), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=0.3
    ).view(B, 4, N, N).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bjhd->bihd", torch.einsum("bihd, bjhd -> bhij", q.transpose(1, 2), k.transpose(1, 2)).softmax(-1),
        v.transpose(1, 2)).transpose(1, 2),
    "one key head": lambda q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1],
    "causal kernel": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "kernel, one dimension less": lambda q, k, v: F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale=0.2).view(B, 4, N, 8),
    "grouped kernel": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], attn_mask=torch.ones(N, N).tril().bool(), enable_gqa=True),
}  # fmt: skip


def _set(logits: Tensor) -> Tensor:
    logits[..., 1] = -3.0
    return logits


def _through_view(logits: Tensor) -> Tensor:
    logits.flatten(0, 1).mul_(0.5)[:, :, 2] = 1.0
    return logits


def expanded(seen: Seen) -> Seen:
    """One key and value head per query head."""
    r = seen.q.shape[1] // seen.k.shape[1]
    return replace(seen, k=seen.k.repeat_interleave(r, 1), v=seen.v.repeat_interleave(r, 1))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_spelling_is_entered(spelling: str, dtype: torch.dtype) -> None:
    attention, (q, k, v) = SPELLINGS[spelling], qkv(dtype=dtype)
    close = CLOSE if dtype == torch.float32 else dict(atol=3e-2, rtol=3e-2)
    q, k, v = (t.requires_grad_() for t in (q, k, v))

    def run(call: Call | None = None) -> Tensor:
        torch.manual_seed(0)
        if call is None:
            return attention(q.clone(), k, v)
        with entered(call, B, N):
            return attention(q.clone(), k, v)

    if dtype == torch.bfloat16 and spelling in ("head mask", "temperature", "divided", "baddbmm", "set"):
        pytest.skip("mixes types by itself")
    call = Call(watch=True)
    assert torch.equal(run(), run(call))
    assert call.seen is not None
    seen = expanded(call.seen)
    assert_close(attended(seen), run().float(), **close)
    assert seen.causal == (spelling == "causal kernel")

    bias = torch.randn(B, 1, 1, N)
    bias[1, ..., 4] = float("-inf")
    call = Call(bias, watch=True)
    out = run(call)
    assert call.seen is not None
    whole = seen.bias
    if whole is not None and whole.dtype == torch.bool:
        whole = torch.zeros(whole.shape).masked_fill(~whole, float("-inf"))
    wanted = attended(replace(seen, bias=bias if whole is None else whole + bias))
    assert_close(out.float(), wanted, **close)
    assert_close(attended(expanded(call.seen)), wanted, **close)


def test_a_call_that_asks_for_nothing_needs_no_sizes() -> None:
    q, k, v = qkv()
    for spelling in ("bmm", "functional", "kernel, one dimension less"):
        call = Call()
        with entered(call):
            SPELLINGS[spelling](q, k, v)
        assert call.entered


@pytest.mark.parametrize("spelling", ["bmm", "kernel, one dimension less"])
def test_samples_and_heads_in_one_dimension_need_their_number(spelling: str) -> None:
    with pytest.raises(HostError, match="how many samples"), entered(Call(watch=True)):
        SPELLINGS[spelling](*qkv())
    call = Call(torch.zeros(B, 1, 1, N), watch=True)  # a bias says it
    with entered(call):
        SPELLINGS[spelling](*qkv())
    assert call.entered


def test_all_attentions_over_the_same_tokens_are_acted_on() -> None:
    """As in LiLT: each of two sequences looks where both say. The wider queries are the ones looked at."""
    q, k, v = qkv()
    narrow, hidden = (x[..., :4] for x in (q, k, v)), torch.zeros(B, 1, 1, N)
    hidden[..., 2:5] = float("-inf")

    def beside(keep: Tensor) -> tuple[Tensor, Tensor]:
        (nq, nk, nv), (wq, wk, wv) = small, (q, k[:, :, keep], v[:, :, keep])
        ours, theirs = wq @ wk.mT / 8**0.5, nq @ nk[:, :, keep].mT / 2
        return (theirs + ours).softmax(-1) @ nv[:, :, keep], (ours + theirs).softmax(-1) @ wv

    small = tuple(narrow)
    call = Call(hidden, watch=True)
    with entered(call):
        got = beside(torch.arange(N))
    assert call.entered
    assert call.seen is not None
    assert call.seen.v.shape[-1] == 8
    rest = hidden[0, 0, 0].isfinite().nonzero()[:, 0]
    for mine, want in zip(got, beside(rest), strict=True):
        torch.testing.assert_close(mine, want, atol=1e-6, rtol=1e-5)
    weights = call.seen.bias + call.seen.scale * call.seen.q @ call.seen.k.mT
    torch.testing.assert_close(weights.softmax(-1) @ v, got[1], atol=1e-6, rtol=1e-5)


def test_attention_of_attention_is_none() -> None:
    q, k, v = qkv()

    def twice() -> Tensor:
        return (q @ k.mT).softmax(-1) @ (k @ q.mT).softmax(-1) @ v

    call = Call(watch=True)
    with entered(call):
        twice()
    assert not call.entered
    assert call.seen is None
    with pytest.raises(HostError, match="besides"), entered(Call(torch.zeros(B, 1, 1, N))):
        twice()


def test_probabilities_that_meet_no_values_are_no_attention() -> None:
    q, k, _ = qkv()
    with pytest.raises(HostError, match="no attention over 9 keys"), entered(Call(torch.zeros(B, 1, 1, N))):
        (q @ k.mT).softmax(-1).sum()


def test_an_error_inside_stays_that_error() -> None:
    with pytest.raises(ZeroDivisionError), entered(Call(torch.zeros(B, 1, 1, N))):
        raise ZeroDivisionError


def test_a_learned_mask_needs_queries_that_are_keys() -> None:
    q, k, v = qkv()
    with pytest.raises(HostError, match="3 queries and 9 keys"), entered(Call(policy=torch.ones(B, N))):
        (q[:, :, :3] @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("spelling", ["functional", "bmm", "einsum", "kernel, one dimension less"])
def test_packed_rows_are_computed_sample_by_sample(spelling: str) -> None:
    lengths = (4, 5)
    packing = Packing(lengths, 5, torch.device("cpu"))
    q, k, v = (t[:1] for t in qkv())

    def attention(*parts: Tensor) -> Tensor:
        if spelling in ("functional", "einsum"):
            return SPELLINGS[spelling](*parts)
        q, k, v = (t.flatten(0, 1) for t in parts)
        if spelling == "bmm":
            return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)[None]
        return F.scaled_dot_product_attention(q, k, v)[None]

    call = Call(split=packing.attention)
    with entered(call, 1, N):
        out = attention(q, k, v)
    alone = [attention(*p) for p in zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)]
    assert_close(out, torch.cat(alone, 2))
    with pytest.raises(HostError, match="padded"), entered(call, 1, N):
        (q @ k.mT + torch.rand(N, N)).softmax(-1) @ v
    with pytest.raises(HostError, match="padded"), entered(call, 1, N):
        F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_dropout_of_packed_rows() -> None:
    q, k, v = (t[:1] for t in qkv())
    got: list[float] = []

    def split(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dropout: float) -> Tensor:
        got.append(dropout)
        return q

    for training in (True, False):
        with entered(Call(split=split), 1, N):
            assert torch.equal(F.dropout((q @ k.mT).softmax(-1), 0.25, training) @ v, q)
    assert got == [0.25, 0.0]


@pytest.mark.parametrize("need_weights", [True, False])
def test_torchs_own_multi_head_attention(need_weights: bool) -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(B, N, 32)
    call, hide = Call(watch=True), torch.zeros(B, 1, 1, N)
    hide[..., 3] = float("-inf")
    plain = attention(x, x, x, need_weights=need_weights)[0]
    with entered(call):
        assert torch.equal(attention(x, x, x, need_weights=need_weights)[0], plain)
    assert call.seen is not None
    assert call.seen.k.shape == (B, 4, N, 8)
    with entered(Call(hide)):
        y = attention(x, x, x, need_weights=need_weights)[0]
    kept = torch.tensor([j for j in range(N) if j != 3])
    assert_close(y[:, kept], attention(x[:, kept], x[:, kept], x[:, kept], need_weights=need_weights)[0])


def test_rows_of_a_module_without_places() -> None:
    """A hidden token is one that was never there, through a whole module."""
    it = one("blip-vision")
    kept = torch.tensor([j for j in range(it.size["keys"]) if j != 5])
    bias = torch.zeros(B, 1, 1, it.size["keys"])
    bias[..., 5] = float("-inf")
    with entered(Call(bias)):
        y = it.module(it.x)[0]
    assert_close(y[:, kept], it.module(it.x[:, kept])[0], **CLOSE)


# -- where it runs -----------------------------------------------------------------------------------------------------
def test_recomputed_under_gradient_checkpointing() -> None:
    it = one("mpnet")
    policy = torch.rand(B, N)
    grads = []
    for again in (False, True):
        gate = policy.clone().requires_grad_()

        def run(gate: Tensor) -> Tensor:
            with entered(Call(policy=gate, watch=True)):
                return it.run()[0]

        y = checkpoint(run, gate, use_reentrant=False) if again else run(gate)
        grads.append(torch.autograd.grad(y.sum(), gate)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["mpnet", "bloom", "wavlm", "xlm", "blip-vision"])
def test_autocast(name: str) -> None:
    it, call = one(name), Call(watch=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        plain = it.run()
        with Spy() as spy, entered(call, **it.size):
            inside = it.run()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert call.seen is not None
    wanted = attended(call.seen)
    assert_close(given(spy.products, wanted).float(), wanted, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for asked in (Call(torch.zeros(it.size["batch"], 1, 1, it.size["keys"])),
                      Call(policy=torch.ones(it.size["batch"], it.size["keys"]), eps=0.0)):  # fmt: skip
            with entered(asked, **it.size):
                assert_close(it.run()[0].float(), plain[0].float(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["mpnet", "speecht5", "xlm", "timm-vit"])
def test_inference_mode(name: str) -> None:
    it, call = one(name), Call(watch=True)
    with torch.inference_mode():
        plain = it.run()
        with Spy() as spy, entered(call, **it.size):
            inside = it.run()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert call.seen is not None
    assert_close(given(spy.products, attended(call.seen)), attended(call.seen), **CLOSE)


def test_threads_do_not_meet() -> None:
    q, k, v = qkv()
    calls = [Call(watch=True) for _ in range(4)]
    barrier = threading.Barrier(len(calls))

    def run(i: int) -> None:
        barrier.wait()
        for _ in range(20):
            with entered(calls[i]):
                SPELLINGS["functional"](q + i, k, v)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, call in enumerate(calls):
        assert call.seen is not None
        assert torch.equal(call.seen.q, q + i)


def test_logits_are_freed_as_the_model_frees_them() -> None:
    import weakref

    q, k, v = qkv()
    alive: list[weakref.ref] = []

    def attention() -> Tensor:
        logits = q @ k.mT
        alive.append(weakref.ref(logits))
        logits = logits + torch.rand(N, N)
        assert alive[-1]() is None
        alive.append(weakref.ref(logits))
        probs = logits.softmax(-1)
        del logits
        assert alive[-1]() is None
        return probs @ v

    with torch.no_grad(), entered(Call(watch=True)):
        attention()


def test_nothing_stays_behind() -> None:
    it = one("deberta-v2")
    before = copy.copy(vars(it.module)), dict(vars(F)), dict(vars(torch.Tensor))
    with entered(Call(watch=True), **it.size):
        it.run()
    assert before == (vars(it.module), dict(vars(F)), dict(vars(torch.Tensor)))


def test_a_compiled_module() -> None:
    """Compiled attention runs, and is entered or says that it is not."""
    it = one("blip-vision")
    compiled = torch.compile(it.module, backend="eager")
    plain, call = it.run()[0], Call(watch=True)
    assert_close(compiled(it.x)[0], plain)
    with entered(call, **it.size):
        assert_close(compiled(it.x)[0], plain)
    assert call.entered == (call.seen is not None)
    bias = torch.zeros(B, 1, 1, it.size["keys"])
    bias[..., 5] = float("-inf")
    with entered(Call(bias)):
        wanted = it.module(it.x)[0]
    with entered(Call(bias)):
        assert_close(compiled(it.x)[0], wanted)
