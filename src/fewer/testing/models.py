"""Small models with seeded weights, one per kind of host: what the contract and the tests run on.

model = tiny_vit("deit", depth=3)                 # weights large enough that attention is not flat
answers = run(model, images(batch=2))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VIDEO, FRAMES = 16, 8  # pixels of a frame's side, and frames, of a model of videos: 4 x 2 x 2 patches
VIDEOS = ("videomae", "vivit", "vjepa2")
WORDS = 7  # of the tokens of a model of words and patches


@dataclass(frozen=True)
class Shape:
    """Of a test model: pixels, pixels, layers, channels, heads, classes."""

    image: int = 32
    patch: int = 8
    depth: int = 4
    width: int = 32
    heads: int = 4
    classes: int = 7

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    def config(self, **more: Any) -> dict[str, Any]:
        """In the words of transformers."""
        return dict(
            image_size=self.image, patch_size=self.patch, num_hidden_layers=self.depth, hidden_size=self.width,
            num_attention_heads=self.heads, intermediate_size=4 * self.width, num_labels=self.classes,
            layer_norm_eps=1e-6, hidden_act="gelu",
        ) | more  # fmt: skip

    def text(self) -> dict[str, Any]:
        """A text tower beside it."""
        return dict(
            vocab_size=50, num_hidden_layers=2, hidden_size=self.width, num_attention_heads=self.heads,
            intermediate_size=2 * self.width, max_position_embeddings=16, projection_size=self.width,
        )  # fmt: skip

    def arguments(self, **more: Any) -> dict[str, Any]:
        """In the words of timm."""
        return dict(
            img_size=self.image, patch_size=self.patch, depth=self.depth, embed_dim=self.width, num_heads=self.heads,
            num_classes=self.classes,
        ) | more  # fmt: skip


def _vit(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**shape.config(**more)))


def _deit(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    return DeiTForImageClassificationWithTeacher(DeiTConfig(**shape.config(**more)))


def _deit_student(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(**shape.config(**more)))


def _dinov2(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return Dinov2ForImageClassification(Dinov2Config(**shape.config(layerscale_value=0.5, **more)))


def _dinov2_swiglu(shape: Shape, more: dict[str, Any]) -> nn.Module:
    return _dinov2(shape, {"use_swiglu_ffn": True} | more)


def _dinov2_registers(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

    config = Dinov2WithRegistersConfig(**shape.config(layerscale_value=0.5, num_register_tokens=4, **more))
    return Dinov2WithRegistersForImageClassification(config)


def _clip(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**shape.config(**more)))


def _clip_text(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(vision_config=shape.config(**more), text_config=shape.text(), projection_dim=shape.width)
    return CLIPModel(config)


def _clip_mean(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import CLIPConfig, CLIPForImageClassification

    config = CLIPConfig(vision_config=shape.config(**more), text_config=shape.text(), num_labels=shape.classes)  # type: ignore[call-arg]
    return CLIPForImageClassification(config)


def _blip(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import BlipVisionConfig, BlipVisionModel

    return BlipVisionModel(BlipVisionConfig(**shape.config(**more)))


def _siglip(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**shape.config(**more)))


def _siglip_text(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig(vision_config=shape.config(**more), text_config=shape.text()))


def _siglip_mean(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import SiglipConfig, SiglipForImageClassification

    config = SiglipConfig(vision_config=shape.config(vision_use_head=False, **more), text_config=shape.text())
    config.num_labels = shape.classes
    return SiglipForImageClassification(config)


def _beit(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import BeitConfig, BeitForImageClassification

    bias = {} if "use_shared_relative_position_bias" in more else {"use_relative_position_bias": True}
    config = shape.config(layer_scale_init_value=0.5, drop_path_rate=0.0, **bias, **more)
    return BeitForImageClassification(BeitConfig(**config))


def _beit_shared(shape: Shape, more: dict[str, Any]) -> nn.Module:
    return _beit(shape, {"use_shared_relative_position_bias": True, "use_mean_pooling": False} | more)


def _timm(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**shape.arguments(**more))


def _timm_mean(shape: Shape, more: dict[str, Any]) -> nn.Module:
    return _timm(shape, {"class_token": False, "global_pool": "avg"} | more)


def _timm_map(shape: Shape, more: dict[str, Any]) -> nn.Module:
    return _timm(shape, {"class_token": False, "global_pool": "map"} | more)


def _timm_registers(shape: Shape, more: dict[str, Any]) -> nn.Module:
    return _timm(shape, {"reg_tokens": 4, "qk_norm": True, "init_values": 0.5} | more)


def _timm_distilled(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**shape.arguments(**more))


def _videomae(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = shape.config(image_size=VIDEO, num_frames=FRAMES, tubelet_size=2, **more)
    return VideoMAEForVideoClassification(VideoMAEConfig(**config))


def _vivit(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import VivitConfig, VivitForVideoClassification

    cut = [2, shape.patch, shape.patch]
    return VivitForVideoClassification(
        VivitConfig(**shape.config(image_size=VIDEO, num_frames=FRAMES, tubelet_size=cut, **more))
    )


def _vjepa2(shape: Shape, more: dict[str, Any]) -> nn.Module:
    from transformers import VJEPA2Config, VJEPA2ForVideoClassification

    config = VJEPA2Config(  # type: ignore[call-arg]
        crop_size=VIDEO, frames_per_clip=FRAMES, patch_size=shape.patch, hidden_size=shape.width,
        num_hidden_layers=shape.depth, num_attention_heads=shape.heads, mlp_ratio=2, num_pooler_layers=1,
        pred_hidden_size=shape.width, pred_num_attention_heads=shape.heads, pred_num_hidden_layers=1,
        num_labels=shape.classes, **more,
    )  # fmt: skip
    return VJEPA2ForVideoClassification(config)


KINDS: dict[str, Callable[[Shape, dict[str, Any]], nn.Module]] = {
    "vit": _vit, "deit": _deit, "deit_student": _deit_student, "dinov2": _dinov2, "dinov2_swiglu": _dinov2_swiglu,
    "dinov2_registers": _dinov2_registers, "clip": _clip, "clip_text": _clip_text, "clip_mean": _clip_mean,
    "blip": _blip, "siglip": _siglip, "siglip_text": _siglip_text, "siglip_mean": _siglip_mean, "beit": _beit,
    "beit_shared": _beit_shared, "timm": _timm, "timm_mean": _timm_mean, "timm_map": _timm_map,
    "timm_registers": _timm_registers, "timm_distilled": _timm_distilled, "videomae": _videomae, "vivit": _vivit,
    "vjepa2": _vjepa2,
}  # fmt: skip


def _text(kind: str) -> Callable[[Shape, dict[str, Any]], nn.Module]:
    """A model of text by its name in transformers."""

    def build(shape: Shape, more: dict[str, Any]) -> nn.Module:
        from transformers import AutoConfig, AutoModel

        size: dict[str, Any] = dict(
            vocab_size=50, hidden_size=shape.width, num_hidden_layers=shape.depth, num_attention_heads=shape.heads,
            intermediate_size=2 * shape.width, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        if kind in ("llama", "qwen3", "gemma3_text"):
            size |= dict(num_key_value_heads=shape.heads // 2, head_dim=shape.width // shape.heads)
        return AutoModel.from_config(AutoConfig.for_model(kind, **size | OWN.get(kind, {}) | more))

    return build


OWN: dict[str, dict[str, Any]] = {  # sizes that go by other names there, windows shorter than the tests' texts
    "distilbert": dict(dim=32, n_layers=3, n_heads=4, hidden_dim=64),
    "modernbert": dict(local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2,
                       reference_compile=False),
    "gemma3_text": dict(sliding_window=12, query_pre_attn_scalar=8,
                        layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "gpt2": dict(n_inner=64),
    "vilt": dict(image_size=32, patch_size=8),
    "mamba": dict(state_size=8),
    "mamba2": dict(state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
}  # fmt: skip
TEXTS: dict[str, Callable[[Shape, dict[str, Any]], nn.Module]] = {
    kind: _text(kind) for kind in ("bert", "roberta", "distilbert", "modernbert", "llama", "qwen3", "gemma3_text",
                                   "gpt2", "mamba", "mamba2", "vilt")
}  # fmt: skip


def tiny_vit(kind: str = "vit", *, seed: int = 0, options: dict[str, Any] | None = None, **shape: int) -> nn.Module:
    """A small model in eval mode, of KINDS or TEXTS. shape: fields of Shape; options: further constructor arguments.

    Matrices are normal draws of standard deviation 0.2, so that attention and similarities are far from flat.
    """
    model = (KINDS | TEXTS)[kind](Shape(**shape), options or {})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):  # how fast a state forgets
                continue
            if p.dim() > 1 or "position_bias" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            elif name.endswith("bias"):
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def images(batch: int = 2, image: int = 32, seed: int = 0) -> Tensor:
    """(batch, 3, image, image), standard normal."""
    return torch.randn(batch, 3, image, image, generator=torch.Generator().manual_seed(seed))


def clips(batch: int = 2, seed: int = 0) -> Tensor:
    """(batch, FRAMES, 3, VIDEO, VIDEO), standard normal."""
    return torch.randn(batch, FRAMES, 3, VIDEO, VIDEO, generator=torch.Generator().manual_seed(seed))


def texts(batch: int = 2, tokens: int = 17, width: int = 32, seed: int = 0) -> Tensor:
    """(batch, tokens, width): embeddings of that many tokens, standard normal. Gradients can reach them."""
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def answer(model: nn.Module, x: Tensor, real: Tensor | None = None) -> Tensor:
    """What a model answers for images, (B, classes or channels): logits, or the pooled features of a backbone. For
    embeddings of text, (B, N, C): the features of the class token, in a causal model those of the last token. In a
    model of words and patches the first WORDS are words. real: (B, N) bool, which tokens of a text are no padding."""
    if x.dim() == 3 and "Vilt" in type(model).__name__:
        words, patches = x[:, :WORDS], x[:, WORDS:]
        real = torch.ones(patches.shape[:2], device=x.device)
        return model(inputs_embeds=words, image_embeds=patches, pixel_mask=real).last_hidden_state[:, 0]
    if x.dim() == 3:
        causal = not hasattr(model, "embeddings") or "Mamba" in type(model).__name__
        given: dict[str, Any] = {"use_cache": False} if causal else {}
        if real is not None:
            given["attention_mask"] = real.long()
        out = model(inputs_embeds=x, **given)
        return out.last_hidden_state[:, -1 if causal else 0]
    out = model.get_image_features(x) if hasattr(model, "get_image_features") else model(x)  # type: ignore[operator]
    if isinstance(out, Tensor):
        return out
    return out.logits if "logits" in out else out.pooler_output


def run(model: nn.Module, x: Tensor) -> Tensor:
    """answer, without gradient."""
    with torch.no_grad():
        return answer(model, x)
