"""Walk over the model classes of transformers and timm: of which can a twin be built and run?

Each class is taken with its own default config, made small and random; nothing is downloaded. Every class has a time
limit and runs in a process that may die without ending the walk.
"""

from __future__ import annotations

import importlib
import inspect
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer

LIMIT = 60.0  # seconds for one class

KINDS = {  # kind -> the mappings whose classes it has
    "causal-lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "masked-lm": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "encoder": ("MODEL_MAPPING_NAMES",),
    "vision": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES"),
    "backbone": ("MODEL_FOR_BACKBONE_MAPPING_NAMES",),
    "speech": ("MODEL_FOR_CTC_MAPPING_NAMES", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    "encoder-decoder": (
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    ),
    "image-text": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",),
}
TIMM = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224",
        "cait_xxs24_224", "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224", "levit_128",
        "vit_base_patch16_clip_224", "volo_d1_224", "crossvit_tiny_240", "pit_ti_224", "hiera_tiny_224")  # fmt: skip
NO_TRANSFORMER = re.compile(
    r"^(bit|convnext|convnextv2|efficientnet|mobilenet_v1|mobilenet_v2|regnet|resnet|focalnet|hgnet_v2|textnet|uvdoc\w*"
    r"|rt_detr_resnet|pp_lcnet\w*|timm_backbone|timm_wrapper|poolformer|mobilevit\w*|swiftformer|vocos|univnet)$"
)


NOT_ALONE = {
    "Gemma4AssistantForCausalLM": "reads the cache of another model",
    "Gemma4UnifiedAssistantForCausalLM": "reads the cache of another model",
    "DinatForImageClassification": "needs natten",
    "DinatBackbone": "needs natten",
    "LayoutLMv2Model": "needs detectron2",
    "HiggsAudioV2TokenizerModel": "needs torchaudio",
    "ShieldGemma2ForImageClassification": "an image-text model",
    "VoxtralRealtimeTextModel": "not exported",
    "FastSpeech2ConformerWithHifiGan": "makes sound",
}


def rows() -> Iterator[dict[str, Any]]:
    """One row for each class: its name, kind and model type."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    seen = set()
    for kind, mappings in KINDS.items():
        for mapping in mappings:
            for model_type, names in getattr(auto, mapping).items():
                for name in names if isinstance(names, list | tuple) else (names,):
                    if (name, kind) not in seen:
                        seen.add((name, kind))
                        yield {"name": name, "kind": kind, "type": model_type}
    for name in TIMM if importlib.util.find_spec("timm") else ():
        yield {"name": name, "kind": "timm", "type": "timm"}


def examine(row: dict[str, Any]) -> dict[str, Any]:
    """Fill in one row: whether a twin of the class can be built and run. Later: for which places it is verified."""
    import torch

    if row["kind"] == "timm":
        import timm

        model = timm.create_model(row["name"], pretrained=False).eval()
        with torch.no_grad():
            model(torch.randn(2, *model.pretrained_cfg["input_size"]))
        return {**row, "ok": True}

    import transformers

    from fewer.hosts import twin

    if NO_TRANSFORMER.match(row["type"]):
        return {**row, "ok": None, "why": "no transformer"}
    if row["name"] in NOT_ALONE:
        return {**row, "ok": None, "why": NOT_ALONE[row["name"]]}
    cls = getattr(transformers, row["name"])
    if row["kind"] == "encoder" and (why := not_text(cls)):
        return {**row, "ok": None, "why": why}
    config = default_config(cls, row["type"])
    small = twin.shrink(config, depth=row["depth"] or None)
    start = time.perf_counter()
    model = twin.build(cls, small)
    built = time.perf_counter() - start
    inputs = twin.example(model)
    with torch.no_grad():
        out = model(**inputs)
    flat = [v for value in out.values() for v in (value if isinstance(value, tuple) else (value,))]
    states = next(v for v in flat if torch.is_tensor(v) and v.is_floating_point())
    lively = bool(states.isfinite().all()) and 1e-3 < float(states.std()) < 1e3
    size = sum(p.numel() for p in model.parameters())
    spread = float((states[0] - states[1]).abs().mean()) if len(states) == 2 else None
    return {**row, "ok": True, "lively": lively, "std": float(states.std()), "rows differ": spread, "parameters": size,
            "built": round(built, 3)}  # fmt: skip


QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
# What a default config leaves open, although every published one of its type says it.
SAID: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 5e5}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4},
    "glm4v_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "glm_image_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "hunyuan_vl_text": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": (["conv"] * 3 + ["full_attention"]) * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "glm4v_moe_text": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "qwen4_exp_text": QSA,
    "Qwen4ExpForCausalLM": QSA,
    "qwen4_exp": {"text_config": QSA},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 512}},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
}


def not_text(cls: type) -> str:
    """Why a class is no encoder or decoder of text alone; empty if it is."""
    taken = inspect.signature(cls.forward).parameters
    others = [
        name for name in taken if re.match(r"pixel_|image|input_(features|values)|visual|audio|query_embeds", name)
    ]
    if "input_ids" not in taken:
        return "takes no text"
    return f"takes {others[0]} too" if others else ""


def default_config(cls: type, model_type: str) -> Any:
    """The config a class has when nothing is said."""
    from transformers import AutoConfig

    own = getattr(cls, "config_class", None)
    said = SAID.get(cls.__name__, SAID.get(model_type, {}))
    try:
        config = AutoConfig.for_model(model_type, **said)
    except Exception:
        if own is None:
            raise
        return own(**said)
    if own is not None and not isinstance(config, own):
        return own(**said)
    return config


def serve(pipe: Connection) -> None:
    """Examine the rows that come, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    while (row := pipe.recv()) is not None:
        start = time.perf_counter()
        try:
            done = examine(row)
        except Exception as error:
            said = " ".join(str(error).split())
            done = {**row, "ok": False, "why": f"{type(error).__name__}: {said}"}
        pipe.send({**done, "seconds": round(time.perf_counter() - start, 2)})


def walk(todo: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Examine rows one after the other; a process that dies or takes too long is replaced."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers"])
    process = pipe = None
    for row in todo:
        if process is None:
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
        with suppress(EOFError, ConnectionError):
            pipe.send(row)
            if pipe.poll(LIMIT):
                yield pipe.recv()
                continue
        process.join(1)
        why = f"the process ended with {process.exitcode}" if process.exitcode is not None else f"over {LIMIT:.0f} s"
        process.kill()
        process.join()
        process = None
        yield {**row, "ok": False, "why": why, "seconds": LIMIT}
    if process is not None:
        pipe.send(None)
        process.join(5)


def main(
    only: Annotated[str, typer.Option(help="Classes whose name matches this expression.")] = "",
    kind: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}, timm.")] = "",
    depth: Annotated[int, typer.Option(help="Layers to keep, and one of each kind at least; 0 for all.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this JSON file.")] = None,
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    todo = [row for row in rows() if re.search(only, row["name"]) and (not kind or row["kind"] == kind)]
    done = []
    for row in walk([{**row, "depth": depth} for row in todo]):
        done.append(row)
        mark = {True: "ok", False: "FAILS", None: "-"}[row["ok"]]
        dull = " DULL" if row.get("lively") is False else ""
        print(
            f"{row['name']:45} {row['kind']:16} {mark}{dull:6} {row['seconds']:6.2f}  {row.get('why', '')[:200]}",
            flush=True,
        )
        if out is not None:
            out.write_text(json.dumps(done, indent=1) + "\n")
    for name in dict.fromkeys(row["kind"] for row in done):
        of = [row for row in done if row["kind"] == name and row["ok"] is not None]
        good = sum(row["ok"] for row in of)
        print(f"{name}: {good} of {len(of)} ({100 * good / max(1, len(of)):.1f} %)")


if __name__ == "__main__":
    typer.run(main)
