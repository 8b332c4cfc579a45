"""Small vision-language models with seeded weights, one per family, and prompts for them.

model = tiny_vlm("llava")
inputs = prompts(model, [1, 2])            # two prompts, with one image and with two, padded on the left
model.generate(**inputs)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, VIDEO, START, STOP = 60, 61, 58, 59
SIDE = 32  # pixels
TEXT: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CLIP: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=8,
)  # fmt: skip


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE)
    )


def _llava_next() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    pins = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE,
            image_grid_pinpoints=pins,
        )
    )  # fmt: skip


def _llava_onevision() -> nn.Module:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    pins = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**CLIP), text_config=Qwen2Config(**TEXT), image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=pins,
        )
    )  # fmt: skip


def _qwen_text() -> dict[str, Any]:
    return TEXT | dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]})


def _qwen_ids() -> dict[str, Any]:
    return dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=STOP)


def _qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, temporal_patch_size=2)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=_qwen_text(), vision_config=vision, **_qwen_ids()))


def _qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(
        depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, temporal_patch_size=2,
        out_hidden_size=32, window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision, **_qwen_ids())
    )


def _qwen3_vl() -> nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = dict(
        depth=3, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, temporal_patch_size=2,
        out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=_qwen_text() | {"head_dim": 8}, vision_config=vision, **_qwen_ids())
    )


def _idefics(stem: str) -> nn.Module:
    import transformers

    config, model = (getattr(transformers, f"{stem}{end}") for end in ("Config", "ForConditionalGeneration"))
    vision = CLIP | dict(model_type="smolvlm_vision" if stem == "SmolVLM" else "idefics3_vision")
    return model(config(vision_config=vision, text_config=TEXT | dict(model_type="llama"), image_token_id=IMAGE))


def _internvl() -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = CLIP | dict(image_size=(SIDE, SIDE), patch_size=(8, 8))
    return InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=TEXT | dict(model_type="qwen2"), image_token_id=IMAGE)
    )


MODELS = {
    "llava": _llava, "llava_next": _llava_next, "llava_onevision": _llava_onevision, "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "smolvlm": lambda: _idefics("SmolVLM"),
    "idefics3": lambda: _idefics("Idefics3"), "internvl": _internvl,
}  # fmt: skip


def tiny_vlm(name: str, seed: int = 0) -> nn.Module:
    """A vision-language model of a few thousand weights, large enough that attention is not flat."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = 1.5 * parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def prompts(model: nn.Module, images: Sequence[int] = (1,), seed: int = 0, video: bool = False) -> dict[str, Tensor]:
    """Prompts of different lengths with so many images each, padded on the left where they differ.

    video: the pictures are videos of two (LLaVA-OneVision) or four frames."""
    generator = torch.Generator().manual_seed(seed)
    kind = type(model).__name__
    made = [_pictures(kind, seed * 100 + 10 * i + j, video) for i, n in enumerate(images) for j in range(n)]
    rows, number = [], 0
    for i, n in enumerate(images):
        words = torch.randint(3, 50, (5 + 2 * i,), generator=generator).tolist()
        row = [1, *words[:2]]
        for j in range(n):
            token, rows_of = VIDEO if video else IMAGE, made[number][0]
            parts = 2 if video and kind.startswith("Qwen3") else 1  # frames stand apart there
            row += [START, *[token] * (rows_of // parts), STOP] * parts
            row += words[2:3] if j + 1 < n else []
            number += 1
        rows.append(row + words[3:])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    if not made:
        return inputs
    for key in made[0][1]:
        inputs[key] = torch.cat([picture[key] for _, picture in made])
    if "Idefics3" in kind or "SmolVLM" in kind:  # (prompts, images, ...), empty ones where a prompt has fewer
        most = max(images)
        stacked = torch.zeros(len(images), most, 3, SIDE, SIDE)
        number = 0
        for i, n in enumerate(images):
            stacked[i, :n] = inputs["pixel_values"][number : number + n]
            number += n
        inputs["pixel_values"] = stacked
    if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs


def alone(model: nn.Module, images: Sequence[int], which: int, seed: int = 0, video: bool = False) -> dict[str, Tensor]:
    """One prompt of the batch that `prompts` makes of the same arguments, without its padding."""
    batch = prompts(model, images, seed, video)
    real = batch["attention_mask"][which].bool()
    words = ("input_ids", "attention_mask", "mm_token_type_ids")
    own = {key: batch[key][which : which + 1, real] for key in words if key in batch}
    if not images[which]:
        own.pop("mm_token_type_ids", None)
        return own
    first, number = sum(images[:which]), images[which]
    for key in batch.keys() - set(words):
        x = batch[key]
        if key == "pixel_values" and type(model).__name__.startswith(("Idefics3", "SmolVLM")):
            own[key] = x[which : which + 1, :number]
        else:
            each = len(x) // sum(images)
            own[key] = x[first * each : (first + number) * each]
    return own


def _pictures(kind: str, seed: int, video: bool) -> tuple[int, dict[str, Tensor]]:
    """Rows of one picture in the prompt, and what the model reads it from."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind.startswith("Qwen"):
        t, h, w = (2, 4, 4) if video else (1, 4, 6)
        key = "video" if video else "image"
        pixels = noise(t * h * w, 3 * 2 * 4 * 4)
        values = "pixel_values_videos" if video else "pixel_values"
        return t * h * w // 4, {values: pixels, f"{key}_grid_thw": torch.tensor([[t, h, w]])}
    if kind.startswith("LlavaOnevision") and video:
        return 2 * 4 + 1, {"pixel_values_videos": noise(1, 2, 3, SIDE, SIDE)}
    if kind.startswith(("LlavaNext", "LlavaOnevision")):  # 16 rows of the whole, 8 x 4 of two crops, 4 or 8 line ends
        size = torch.tensor([[SIDE, 2 * SIDE]]) if seed % 2 else torch.tensor([[2 * SIDE, SIDE]])
        lines = 4 if seed % 2 else 8
        return 16 + 32 + lines, {"pixel_values": noise(1, 3, 3, SIDE, SIDE), "image_sizes": size}
    if kind.startswith("InternVL"):
        return 4 * 2, {"pixel_values": noise(2, 3, SIDE, SIDE)}
    rows = 4 if kind.startswith(("Idefics3", "SmolVLM")) else 16
    return rows, {"pixel_values": noise(1, 3, SIDE, SIDE)}
