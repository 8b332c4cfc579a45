"""A sample of the walk over all classes: each is found, and verified for the places that its design has.

The whole walk is scripts/coverage.py. Configs are the default ones, with two layers of each kind.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from packaging.version import Version

from fewer import hosts
from fewer.core import Site
from fewer.hosts import twin
from fewer.runtime import verify

BLOCK = {Site.BEFORE_BLOCK, Site.AROUND_BLOCK, Site.AFTER_BLOCK}
MIDDLE, CACHE = {Site.MID_BLOCK}, {Site.KV_CACHE}
ENCODER = BLOCK | MIDDLE
DECODER = ENCODER | CACHE
SAMPLE = [  # class, model type, kind, places
    ("LlamaForCausalLM", "llama", "decoder", DECODER),
    ("MistralForCausalLM", "mistral", "decoder", DECODER),
    ("Gemma3ForCausalLM", "gemma3_text", "decoder", DECODER),  # sliding windows
    ("GptOssForCausalLM", "gpt_oss", "decoder", DECODER),  # sinks
    ("DeepseekV3ForCausalLM", "deepseek_v3", "decoder", DECODER),  # latents
    ("MixtralForCausalLM", "mixtral", "decoder", DECODER),  # experts
    ("OPTForCausalLM", "opt", "decoder", DECODER),  # learned positions
    ("GPTNeoXForCausalLM", "gpt_neox", "decoder", BLOCK | CACHE),  # attention and MLP side by side
    ("CohereForCausalLM", "cohere", "decoder", BLOCK | CACHE),
    ("Qwen3NextForCausalLM", "qwen3_next", "decoder", CACHE),  # some layers keep a state
    ("FalconH1ForCausalLM", "falcon_h1", "decoder", CACHE),  # all layers keep a state and keys
    ("DiffLlamaForCausalLM", "diffllama", "decoder", DECODER),  # two attention calls over the same keys
    ("LongcatFlashForCausalLM", "longcat_flash", "decoder", BLOCK | CACHE),  # two attentions in a block
    ("HrmTextForCausalLM", "hrm_text", "decoder", CACHE),  # two stacks in a loop, a cache layer for each turn
    ("DoryForCausalLM", "dory", "decoder", CACHE),  # a loop in the middle, which makes much of rounding
    ("Inkling2ForCausalLM", "inkling2_text", "decoder", CACHE),  # a position bias beside the mask, convolutions
    ("MllamaForCausalLM", "mllama", "decoder", CACHE),  # blocks that no text passes
    ("BeamForCausalLM", "beam", "decoder", DECODER),  # rotary positions in some layers only
    ("BloomForCausalLM", "bloom", "decoder", DECODER),  # ALiBi, samples and heads folded
    ("MptForCausalLM", "mpt", "decoder", DECODER),  # ALiBi as a table, a mask that is True where a key is hidden
    ("GPTNeoForCausalLM", "gpt_neo", "decoder", DECODER),  # bands
    ("MambaForCausalLM", "mamba", "scan", ENCODER),
    ("BertForMaskedLM", "bert", "text", ENCODER),
    ("ModernBertForMaskedLM", "modernbert", "text", ENCODER),
    ("MPNetForMaskedLM", "mpnet", "text", ENCODER),  # attention written out
    ("DistilBertForMaskedLM", "distilbert", "text", ENCODER),
    ("XLMRobertaForMaskedLM", "xlm-roberta", "text", ENCODER),
    ("SqueezeBertForMaskedLM", "squeezebert", "text", BLOCK),  # channels before tokens
    ("BrosModel", "bros", "text", ENCODER),  # embeddings of pairs, samples behind them
    ("OpenAIGPTModel", "openai-gpt", "text", ENCODER),  # blocks that give lists
    ("T5ForConditionalGeneration", "t5", "text", ENCODER),
    ("UMT5Model", "umt5", "text", ENCODER),  # each block makes a position bias of its own
    ("LiltModel", "lilt", "text", BLOCK),  # two sequences side by side, each looks where both say
    ("FSMTModel", "fsmt", "text", BLOCK),  # tokens before samples, a mask that is True where a key is hidden
    ("InklingForCausalLM", "inkling_text", "decoder", CACHE),  # a config that says nothing of a cache
    ("BartForConditionalGeneration", "bart", "text", ENCODER),
    ("WhisperForConditionalGeneration", "whisper", "sound", ENCODER),
    ("Wav2Vec2ForCTC", "wav2vec2", "sound", ENCODER),
    ("WavLMForCTC", "wavlm", "sound", ENCODER),  # blocks that are told their number
    ("ASTForAudioClassification", "audio-spectrogram-transformer", "vision", ENCODER),
    ("DINOv3ViTModel", "dinov3_vit", "vision", ENCODER),
    ("Siglip2VisionModel", "siglip2_vision_model", "vision", ENCODER),
    ("Aimv2VisionModel", "aimv2_vision_model", "vision", ENCODER),
    ("IJepaForImageClassification", "ijepa", "vision", ENCODER),
    ("ViTMAEModel", "vit_mae", "vision", ENCODER),
]


@pytest.fixture(scope="module")
def walk() -> ModuleType:
    """scripts/coverage.py, which knows what default configs leave open."""
    path = Path(__file__).parents[2] / "scripts" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_of_hosts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(name: str, model_type: str, walk: ModuleType) -> torch.nn.Module:
    cls = getattr(transformers, name)
    return twin.build(cls, twin.shrink(walk.default_config(cls, model_type), depth=2))


@pytest.mark.parametrize(("name", "model_type", "kind", "places"), SAMPLE, ids=[row[0] for row in SAMPLE])
def test_a_class_is_verified_where_its_design_allows(name, model_type, kind, places, walk):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if name.startswith("Inkling") and Version(transformers.__version__) < Version("5.24"):
        places = set()  # its masks are for the rows of its window alone there
    host = hosts.find(small(name, model_type, walk))
    verdict = verify.verify(host)
    assert host.kind == kind
    assert {site for site, why in verdict.places.items() if not why} == places, verdict.places


@pytest.mark.parametrize(
    ("name", "model_type", "why"),
    [
        ("SwinModel", "swin", "do not hand on one sequence"),
        ("VideoPrismForVideoClassification", "videoprism_vision_model", "folded into one another"),
        ("XLMModel", "xlm", "in lists of their own"),
        ("xLSTMForCausalLM", "xlstm", "no run of blocks with attention"),
        ("PerceiverForMaskedLM", "perceiver", "does not run"),
    ],
)
def test_a_class_is_refused_with_the_reason(name, model_type, why, walk):
    with pytest.raises(hosts.HostError, match=why) as error:
        hosts.find(small(name, model_type, walk))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "model_type", "site", "why"),
    [
        ("GPTNeoXForCausalLM", "gpt_neox", Site.MID_BLOCK, "side by side"),
        ("Qwen3NextForCausalLM", "qwen3_next", Site.AFTER_BLOCK, "keep a state"),
        ("DeepseekV32ForCausalLM", "deepseek_v32", Site.KV_CACHE, "index of its keys"),
        ("Gemma3nForCausalLM", "gemma3n_text", Site.KV_CACHE, "of another layer"),
        ("DeepseekV4ForCausalLM", "deepseek_v4", Site.KV_CACHE, "several tokens as one"),
        ("HrmTextForCausalLM", "hrm_text", Site.AFTER_BLOCK, "run in a loop"),
        ("ConvBertModel", "convbert", Site.AFTER_BLOCK, "convolutions in its blocks"),
        ("NystromformerModel", "nystromformer", Site.AFTER_BLOCK, "convolutions in its blocks"),
    ],
)
def test_a_place_is_refused_with_the_reason(name, model_type, site, why, walk):
    assert why in verify.verify(hosts.find(small(name, model_type, walk))).of(site)
