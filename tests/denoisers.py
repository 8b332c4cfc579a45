"""Tiny seeded denoisers of diffusers, each with what it is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("sd15", "sdxl", "dit", "pixart", "sd3", "flux", "wan", "cogvideox", "latte")
STACKS = ("dit", "pixart", "sd3", "flux", "wan", "cogvideox")
"""Those whose blocks hand on to each other."""


def denoiser(kind: str, seed: int = 0, batch: int = 2) -> tuple[Any, dict[str, Any]]:
    """A model in evaluation mode, and the arguments of one call. What begins as zero (gates, the last layer) is not."""
    import diffusers as d

    torch.manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape)

    time = torch.full((batch,), 500)
    words = {"encoder_hidden_states": normal(5, 16)}
    dit = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "patch_size": 2}
    unet = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
            "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 16}  # fmt: skip
    if kind == "sd15":
        model: Any = d.UNet2DConditionModel(
            **unet, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
        )  # fmt: skip
        given = {"sample": normal(4, 16, 16), "timestep": time, **words}
    elif kind == "sdxl":
        model = d.UNet2DConditionModel(
            **unet, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 3),
            projection_class_embeddings_input_dim=72,
        )  # fmt: skip
        more = {"text_embeds": normal(24), "time_ids": normal(6)}
        given = {"sample": normal(4, 16, 16), "timestep": time, "added_cond_kwargs": more, **words}
    elif kind == "dit":
        model = d.DiTTransformer2DModel(**dit, sample_size=16, num_embeds_ada_norm=10)
        given = {"hidden_states": normal(4, 16, 16), "timestep": time, "class_labels": torch.arange(batch)}
    elif kind == "pixart":
        model = d.PixArtTransformer2DModel(
            **dit, sample_size=16, cross_attention_dim=32, caption_channels=16, use_additional_conditions=False,
            out_channels=8,
        )  # fmt: skip
        more = {"resolution": None, "aspect_ratio": None}
        given = {"hidden_states": normal(4, 16, 16), "timestep": time, "added_cond_kwargs": more, **words}
    elif kind == "sd3":
        model = d.SD3Transformer2DModel(
            **dit, sample_size=16, joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=24,
            out_channels=4, pos_embed_max_size=16, dual_attention_layers=(0,),
        )  # fmt: skip
        given = {"hidden_states": normal(4, 16, 16), "timestep": time, "pooled_projections": normal(24), **words}
    elif kind == "flux":
        model = d.FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=24, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        ids = torch.zeros(8, 8, 3)
        ids[..., 1], ids[..., 2] = torch.arange(8)[:, None], torch.arange(8)
        given = {"hidden_states": normal(64, 4), "timestep": time / 1000, "pooled_projections": normal(24),
                 "img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(5, 3), **words}  # fmt: skip
    elif kind == "wan":
        model = d.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
        given = {"hidden_states": normal(4, 3, 8, 8), "timestep": time, **words}
    elif kind == "cogvideox":
        model = d.CogVideoXTransformer3DModel(
            **dit, out_channels=4, time_embed_dim=8, text_embed_dim=16, sample_width=8, sample_height=8,
            sample_frames=9, max_text_seq_length=5, use_rotary_positional_embeddings=True,
        )  # fmt: skip
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        tables = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3)
        given = {"hidden_states": normal(3, 4, 8, 8), "timestep": time, "image_rotary_emb": tables, **words}
    else:
        model = d.LatteTransformer3DModel(
            **dit, sample_size=8, caption_channels=16, cross_attention_dim=32, out_channels=8, attention_bias=True,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, video_length=3,
        )  # fmt: skip
        given = {"hidden_states": normal(4, 3, 8, 8), "timestep": time, **words}
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model.eval(), given


def sample_of(given: dict[str, Any]) -> str:
    """The name of the argument that is denoised."""
    return "sample" if "sample" in given else "hidden_states"


def run(model: Any, given: dict[str, Any], steps: int = 1, start: int = 0) -> list[Tensor]:
    """What the model gives at so many steps of a plain descent, from the times 900, 800, ... on."""
    name, out = sample_of(given), []
    x = given[name]
    for step in range(steps):
        time = torch.full_like(given["timestep"], (900 - 100 * (step + start)) / (1000 if "img_ids" in given else 1))
        said = model(**given | {name: x, "timestep": time})[0]
        out.append(said)
        moved = said if said.shape == x.shape else said[:, : x.shape[1]]
        x = x - 0.05 * moved
    return out


def part(given: dict[str, Any], which: slice) -> dict[str, Any]:
    """The same call for some of the samples."""
    batch = len(given[sample_of(given)])

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == batch:
            return value[which]
        return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value

    shared = ("img_ids", "txt_ids", "image_rotary_emb")
    return {k: v if k in shared else cut(v) for k, v in given.items()}
