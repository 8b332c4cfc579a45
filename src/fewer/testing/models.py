"""Small vision transformers with seeded weights, one per kind of host: what the contract and the tests run on.

model = tiny_vit("deit", depth=3)                 # weights large enough that attention is not flat
answers = run(model, images(batch=2))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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


KINDS: dict[str, Callable[[Shape, dict[str, Any]], nn.Module]] = {
    "vit": _vit, "deit": _deit, "deit_student": _deit_student, "dinov2": _dinov2, "dinov2_swiglu": _dinov2_swiglu,
    "dinov2_registers": _dinov2_registers, "clip": _clip, "clip_text": _clip_text, "clip_mean": _clip_mean,
    "siglip": _siglip, "siglip_text": _siglip_text, "siglip_mean": _siglip_mean, "beit": _beit,
    "beit_shared": _beit_shared, "timm": _timm, "timm_mean": _timm_mean, "timm_map": _timm_map,
    "timm_registers": _timm_registers, "timm_distilled": _timm_distilled,
}  # fmt: skip


def tiny_vit(kind: str = "vit", *, seed: int = 0, options: dict[str, Any] | None = None, **shape: int) -> nn.Module:
    """A small model in eval mode, one of KINDS. shape: fields of Shape; options: further constructor arguments.

    Matrices are normal draws of standard deviation 0.2, so that attention and similarities are far from flat.
    """
    model = KINDS[kind](Shape(**shape), options or {})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 or "position_bias" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            elif name.endswith("bias"):
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def images(batch: int = 2, image: int = 32, seed: int = 0) -> Tensor:
    """(batch, 3, image, image), standard normal."""
    return torch.randn(batch, 3, image, image, generator=torch.Generator().manual_seed(seed))


def answer(model: nn.Module, x: Tensor) -> Tensor:
    """What a model answers for images, (B, classes or channels): logits, or the pooled features of a backbone."""
    out = model.get_image_features(x) if hasattr(model, "get_image_features") else model(x)  # type: ignore[operator]
    if isinstance(out, Tensor):
        return out
    return out.logits if "logits" in out else out.pooler_output


def run(model: nn.Module, x: Tensor) -> Tensor:
    """answer, without gradient."""
    with torch.no_grad():
        return answer(model, x)
