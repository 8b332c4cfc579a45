"""Walk over the model classes of transformers and timm: which places to act is each verified for?

Each class is taken with its own default config, made small and random; nothing is downloaded. Every class has a time
limit and runs in a process that may die without ending the walk. With --out the rows go to a JSON file, from which
scripts/docs.py makes the tables of docs/hosts.md.
"""

from __future__ import annotations

import importlib
import inspect
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
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
    """Fill in one row: whether a twin of the class can be built and run, and what is discovered and verified of it."""
    import torch

    if row["kind"] == "timm":
        sys.path.append(str(Path(__file__).parent.parent / "tests"))
        timm = importlib.import_module("tvstub").timm  # which torchvision need not be there for

        model = timm.create_model(row["name"], pretrained=False).eval()
        with torch.no_grad():
            model(torch.randn(2, *model.pretrained_cfg["input_size"]))
        return {**row, "ok": True, **discovered(model)}

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
    if row["kind"] == "image-text":  # its twin needs pictures whose rows fit its config, which `find` knows how to make
        meet(config)
        with torch.device("meta"):
            whole = cls(config)
        return {**row, "ok": True, **discovered(whole)}
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
            "built": round(built, 3), **discovered(model)}  # fmt: skip


def discovered(model: Any) -> dict[str, Any]:
    """What is found of a model: its host, the places that are verified, and why others are refused.

    `why` stands where no host was found; `fault` where that was another error than one that is meant for the user.
    """
    from fewer import hosts
    from fewer.runtime import verify_visual

    start = time.perf_counter()
    try:
        host = hosts.find(model)
    except hosts.HostError as error:
        return {"why": " ".join(str(error).split()), "discovery": since(start)}
    except Exception as error:
        return {"why": said(error), "fault": True, "discovery": since(start)}
    found = {"host": host.name, "acts as": host.kind, "discovery": since(start)}
    start = time.perf_counter()
    try:
        found |= judged(host)
        if isinstance(host, hosts.VisionLanguageHost):
            found["bridge"] = verify_visual.why(host) or "verified"
            if host.tower is not None:
                found["tower"] = {"host": host.tower.name, **judged(host.tower)}
    except Exception as error:
        found |= {"why": said(error), "fault": True}
    return {**found, "verification": since(start)}


def judged(host: Any) -> dict[str, Any]:
    """The verdict on a host, by the names of places."""
    from fewer.runtime import verify

    verdict = verify.verify(host)
    places = {verify.PLACES[site]: why for site, why in verdict.places.items()}
    if host.kind != "decoder":
        places.pop(verify.PLACES[verify.Site.KV_CACHE], None)
    refused = {place: " ".join(why.split()) for place, why in places.items() if why}
    return {
        "verified": [place for place, why in places.items() if not why],
        "refused": refused | ({"before block 0": verdict.first} if verdict.first else {}),
        "packed": packs(host),
    }


def packs(host: Any) -> bool:
    """Whether packed execution gives what padded execution gives, on the rows that are no padding."""
    import torch

    import fewer
    from fewer.hosts.watching import inputs_of

    bare = host.kind in ("vision", "text", "sound") and all(layer.bare and not layer.anew for layer in host.layers)
    if not bare or next(host.root.parameters()).is_meta or not hasattr(host.root, "config"):
        return False
    given, method = inputs_of(host.root), f"random:keep=0.6,layers=0+{len(host.layers) - 1},site=after"
    hidden = []
    for execution in ("padded", "packed"):
        try:
            with torch.no_grad(), fewer.apply(host.root, method, execution=execution):
                out = host.root(**given)[0]
                hidden.append(out[-1] if isinstance(out, tuple) else out)  # a backbone gives its maps
        except Exception:
            return False
    if hidden[0].shape != hidden[1].shape:
        return False
    mask = given.get("attention_mask")
    if mask is not None and mask.shape == hidden[0].shape[:2]:
        hidden = [x * mask[..., None] for x in hidden]
    return torch.allclose(*hidden, atol=2e-4, rtol=2e-3)


def since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
COMPASS = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
OCR2 = {"mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_hidden_layers": 12, "num_experts_per_tok": 6,
        "n_group": 1, "topk_group": 1}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
PLACEHOLDERS = {"image_token_id": 18, "video_token_id": 19}
# What a default config leaves open, although every published one of its type says it.
SAID: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 5e5}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4},
    "glm4v_text": PARTIAL,
    "glm_image_text": PARTIAL,
    "hunyuan_vl_text": {"head_dim": 128},
    "glm4v": {"text_config": PARTIAL},
    "glm46v": {"text_config": PARTIAL},
    "glm4v_moe": {"text_config": {"head_dim": 128}},
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
    "cohere_compass_text": COMPASS,
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
    "aya_vision": {"vision_config": SO400M | {"model_type": "siglip_vision_model", "vision_use_head": False}},
    "blip-2": {"image_token_index": 50265},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {"text_config": COMPASS},
    "deepseek_ocr2": {"text_config": OCR2},
    "emu3": {"vocabulary_map": {"<image>": 151859, "<|extra_200|>": 151846}},
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "granite4_vision": {"downsample_rate": "4/8", "deepstack_layer_map": [[-19, 9], [-13, 6], [-7, 3], [-1, 0]]},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "instructblip": {"image_token_index": 32000},
    "instructblipvideo": {"video_token_index": 32000},
    "janus": {"vision_config": {"projection_dim": 4096}},
    "llama4": {"vision_config": {"hidden_size": 1408, "intermediate_size": 5632, "vision_output_dim": 4096}},
    "minicpm_ocr": PLACEHOLDERS,
    "minicpmv4_6": PLACEHOLDERS,
    "minicpmv4_7": PLACEHOLDERS,
    "nemotron_h_omni": PLACEHOLDERS,
    "molmo2": {"adapter_config": {"text_hidden_size": 4096}},
    "ovis2": {"hidden_size": 4096},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "text_config": MROPE},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652, "vision_end_token_id": 151653},
    "step3p7": {"text_config": {"sliding_window": 512}},
}


def meet(config: Any) -> None:
    """Let the vision tower give rows as wide as the language model takes them: Qwen's defaults and their kin do not."""
    vision, width = getattr(config, "vision_config", None), getattr(config.get_text_config(), "hidden_size", None)
    if width is None:
        return
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = width
    elif hasattr(vision, "embed_dim") and hasattr(vision, "spatial_merge_size"):
        vision.hidden_size = width


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
            done = {**row, "ok": False, "why": said(error)}
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


COLUMNS = ("name", "kind", "type", "ok", "host", "acts as", "verified", "refused", "packed", "bridge", "tower", "why",
           "fault", "discovery", "verification")  # fmt: skip


def written(done: Sequence[dict[str, Any]]) -> str:
    """The rows as JSON, one line for each, sorted, with what they were made with."""
    from fewer.evaluation import record

    versions = {name: version(name) for name in ("transformers", "torch", "timm") if importlib.util.find_spec(name)}
    head = {**versions, "commit": record.commit(), "when": record.now()[:10]}
    rows = sorted(done, key=lambda row: (row["kind"], row["name"]))
    lines = [json.dumps({k: row[k] for k in COLUMNS if row.get(k) not in (None, {}) or k == "ok"}) for row in rows]
    return json.dumps(head)[:-1] + ', "classes": [\n' + ",\n".join(lines) + "\n]}\n"


def summary(done: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines on each kind: how many classes, how many with a place that is verified, and in which."""
    for kind in dict.fromkeys(row["kind"] for row in done):
        of = [row for row in done if row["kind"] == kind and row["ok"] is not None]
        any_place = [row for row in of if row.get("verified")]
        share, twins = 100 * len(any_place) / max(1, len(of)), sum(row["ok"] for row in of)
        yield f"{kind}: {len(of)} classes, {twins} twins run, {len(any_place)} ({share:.1f} %) verified"
        places = Counter(place for row in of for place in row.get("verified", ()))
        yield from (f"    {place}: {n}" for place, n in places.items())
        if kind == "image-text":
            yield f"    the bridge: {sum(row.get('bridge') == 'verified' for row in of)}"
            yield f"    inside the tower: {sum(bool(row.get('tower', {}).get('verified')) for row in of)}"
        keeps = [row for row in of if row.get("acts as") == "decoder"]
        if keeps:
            good = sum("the KV cache" in row.get("verified", ()) for row in keeps)
            yield f"    keep a KV cache: {len(keeps)}, verified for it: {good}"
            words = Counter(row["refused"]["the KV cache"] for row in keeps if "the KV cache" in row.get("refused", {}))
            yield from (f"        {n} refused: {why}" for why, n in words.most_common())
        for row in of:
            if row.get("fault"):
                yield f"    FAULT {row['name']}: {row['why'][:200]}"


def main(
    only: Annotated[str, typer.Option(help="Classes whose name matches this expression.")] = "",
    kind: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}, timm.")] = "",
    depth: Annotated[int, typer.Option(help="Layers to keep, and one of each kind at least; 0 for all.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this JSON file.")] = None,
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEWER_CACHE"] = folder  # nothing is remembered of an earlier walk
        _walk(only, kind, depth, out)


def _walk(only: str, kind: str, depth: int, out: Path | None) -> None:
    todo = [row for row in rows() if re.search(only, row["name"]) and (not kind or row["kind"] == kind)]
    done = []
    for row in walk([{**row, "depth": depth} for row in todo]):
        done.append(row)
        mark = {True: "ok", False: "FAILS", None: "-"}[row["ok"]]
        dull = " DULL" if row.get("lively") is False else ""
        places = f"{row.get('host', '')} {row.get('acts as', '')} {len(row.get('verified', ()))} places"
        told = row.get("why") or "; ".join([places, *dict.fromkeys(row.get("refused", {}).values())])
        print(
            f"{row['name']:45} {row['kind']:16} {mark}{dull:6} {row['seconds']:6.2f}  {told[:200]}",
            flush=True,
        )
        if out is not None:
            out.write_text(written(done))
    print(*summary(done), sep="\n")


if __name__ == "__main__":
    typer.run(main)
