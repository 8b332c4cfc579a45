"""Labelled pictures to measure reduction on: packaged, installed, on disk or from the hub.

Everything is an `ImageSet`: pictures, labels and class names, with no model or transform attached.

    data = load("embedded")                      # 2,000 Fashion-MNIST test pictures inside the package
    data = load("fashion")                       # all 10,000 of them
    data = load("photos/")                       # one folder per class
    pixels = data.batch(range(32), processor)    # whatever the processor makes of 32 PIL pictures
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["DataError", "ImageSet", "embedded", "fashion_mnist", "image_folder", "load", "read_image", "tuxpaint"]

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""Label k of Fashion-MNIST means FASHION_CLASSES[k] (the order of its own README)."""

FASHION_HUB = "zalando-datasets/fashion_mnist"
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TUXPAINT_DEBIAN = Path("/usr/share/tuxpaint/stamps")
TUXPAINT_FOLDERS = {
    "birds": "animals/birds",
    "bovines": "animals/mammals/bovines",
    "clothes": "clothes",
    "fish": "animals/fish",
    "flowers": "plants/flowers",
    "fruit": "food/fruit",
    "insects": "animals/insects",
    "other mammals": "animals/mammals",
    "planets": "space/planets",
    "sports": "sports",
    "tools": "household/tools",
    "vegetables": "food/vegetables",
}
"""The folders of that package with at least nine photographs of one kind of thing; drawings and signs are left out."""
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class DataError(ValueError):
    """A data set is missing, unreadable or does not have the shape it should have."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Pictures with one label each.

    name: what `load` was asked for. labels: (N,) int64. classes: names, so that label k reads classes[k].
    pictures: N of anything `image` can open: a uint8 array (H, W) or (H, W, 3), a file path, or a PIL image.
    skipped: names of those that `readable` left out.
    """

    name: str
    labels: Tensor
    classes: tuple[str, ...]
    pictures: Sequence[Any] | np.ndarray
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.pictures) != len(self.labels):
            raise DataError(f"{self.name}: {len(self.pictures)} pictures but {len(self.labels)} labels")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise DataError(
                f"{self.name}: labels run from {int(self.labels.min())} to {int(self.labels.max())}, "
                f"but there are {len(self.classes)} class names"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Picture `index` as PIL, grey ("L") if it is stored as (H, W), else RGB. Raises DataError if unreadable."""
        try:
            return _open(self.pictures[index])
        except DataError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # decoded when asked for
            raise DataError(f"{self.name}: picture {index} cannot be read ({_sentence(error)})") from error

    def batch(self, indices: Iterable[int], processor: Callable[[list[Image.Image]], Tensor]) -> Tensor:
        """What `processor` makes of the pictures at `indices`: pixel values, usually (B, C, H, W) float32."""
        return processor([self.image(int(i)) for i in indices])

    def take(self, indices: Iterable[int]) -> ImageSet:
        """The pictures at `indices`, in that order, with their labels."""
        chosen = [int(i) for i in indices]
        return replace(self, labels=self.labels[chosen], pictures=[self.pictures[i] for i in chosen])

    def readable(self) -> ImageSet:
        """The set without the pictures that cannot be read, whose names are in `skipped`. Opens every one.

        Raises DataError where none is left.
        """
        if isinstance(self.pictures, np.ndarray) or not len(self):
            return self
        fine, faults = [], []
        for index in range(len(self)):
            try:
                self.image(index)
                fine.append(index)
            except DataError as error:
                faults.append((self._called(index), error))
        if not fine:
            raise DataError(f"{self.name}: none of {len(self)} pictures can be read; {faults[0][1]}")
        return replace(self.take(fine), skipped=tuple(name for name, _ in faults)) if faults else self

    def _called(self, index: int) -> str:
        """A picture's name among the others."""
        try:
            return Path(self.pictures[index]).relative_to(self.name).as_posix()
        except (TypeError, ValueError, DataError, OSError):
            return f"picture {index}"

    def stratified(self, count: int, *, seed: int = 0) -> ImageSet:
        """`count` pictures, the same number of each class, drawn without replacement; order as in the whole set.

        Raises DataError where `count` does not divide by the classes or a class has too few pictures.
        """
        each, rest = divmod(count, len(self.classes))
        if rest:
            raise DataError(f"{self.name}: {count} pictures do not divide over {len(self.classes)} classes")
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for label, name in enumerate(self.classes):
            members = (self.labels == label).nonzero().flatten()
            if len(members) < each:
                raise DataError(f"{self.name}: class {name!r} has {len(members)} pictures; {each} were asked for")
            chosen.append(members[torch.randperm(len(members), generator=generator)[:each]])
        return self.take(torch.cat(chosen).sort().values)


def _open(picture: Any) -> Image.Image:
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
        return picture if picture.mode == "L" else picture.convert("RGB")
    return read_image(picture)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """A picture file as RGB, turned upright as its EXIF data say; what is transparent is paper.

    Raises DataError, naming the file, if it is missing, no picture, cut short, or larger than Pillow decodes.
    """
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode in ("RGBA", "LA", "P"):
                cut = upright.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", cut.size, "white"), cut).convert("RGB")
            return upright.convert("RGB")
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large to be decoded ({_sentence(error)}); scale it down") from error
    except FileNotFoundError as error:
        raise DataError(f"no image {path}") from error
    except Exception as error:  # decoders fail in ways of their own: struct.error, ValueError, zlib.error, ...
        raise DataError(f"{path} is not a readable image ({_sentence(error)}); repair it or take it out") from error


def _sentence(error: Exception) -> str:
    """An error in one line, or its kind where it says nothing."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def load(name: str | os.PathLike[str], *, split: str = "test") -> ImageSet:
    """Find a data set by name.

    name: "embedded" (2,000 Fashion-MNIST test pictures in the package), "fashion" (the whole split),
        "tuxpaint" (about 200 photos, 12 classes, of an installed Debian package), a folder with one subfolder per
        class, or the hub name of an image classification set, read by the `datasets` library.
    split: "train" or "test" for "fashion"; any split name for the hub. The others have one split and ignore it.
    Raises DataError, naming the ways out, if there is no such data.
    """
    if name == "embedded":
        return embedded()
    if name == "fashion":
        return fashion_mnist(split)
    if name == "tuxpaint":
        return tuxpaint()
    if Path(name).is_dir():
        return image_folder(name)
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return _from_hub(str(name), split)
    raise DataError(
        f"no data set {str(name)!r}: give embedded, fashion, tuxpaint, an existing folder with one subfolder "
        "per class, or a hub name like owner/name"
    )


def embedded() -> ImageSet:
    """2,000 pictures of the Fashion-MNIST test split, 200 per class, 28 x 28 grey. Ships in the package (MIT).

    Source: Xiao, Rasul and Vollgraf, arXiv:1708.07747; the drawing is `fashion_mnist("test").stratified(2000)`.
    """
    with resources.files("fewer").joinpath("assets/fashion-test-2000.npz").open("rb") as file:
        arrays = np.load(file)
        return ImageSet("embedded", torch.from_numpy(arrays["labels"]).long(), FASHION_CLASSES, arrays["pictures"])


def fashion_mnist(split: str = "test") -> ImageSet:
    """Fashion-MNIST: 60,000 ("train") or 10,000 ("test") grey 28 x 28 pictures of clothes in 10 classes.

    `pictures` is one uint8 array (N, 28, 28). Looked for in the folder named by the environment variable
    FEWER_DATA (itself or its subfolder fashion-mnist, with the four original .gz files), then where Debian's
    dataset-fashion-mnist puts it, then on the hub. Source: arXiv:1708.07747.
    Raises DataError if no place has it, or if a file is cut short.
    """
    stems = {"train": "train", "test": "t10k"}
    if split not in stems:
        raise DataError(f"fashion has the splits train and test, not {split!r}")
    images, labels = f"{stems[split]}-images-idx3-ubyte.gz", f"{stems[split]}-labels-idx1-ubyte.gz"
    for folder in _fashion_folders():
        if (folder / images).is_file() and (folder / labels).is_file():
            pictures, targets = _read_idx(folder / images), _read_idx(folder / labels)
            return ImageSet("fashion", torch.from_numpy(targets).long(), FASHION_CLASSES, pictures)
    try:
        found = _from_hub(FASHION_HUB, split)
    except DataError as error:
        raise DataError(
            "Fashion-MNIST was not found. Either set FEWER_DATA to a folder with its four .gz files, or install the "
            f"Debian package dataset-fashion-mnist, or install `datasets` and go online ({error})"
        ) from error
    pictures = np.stack([np.asarray(found.image(i).convert("L")) for i in range(len(found))])
    return ImageSet("fashion", found.labels, FASHION_CLASSES, pictures)


def _fashion_folders() -> list[Path]:
    own = os.environ.get("FEWER_DATA")
    return ([Path(own), Path(own) / "fashion-mnist"] if own else []) + [FASHION_DEBIAN]


def _read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file: 0, 0, 8, rank, then `rank` big-endian int32 lengths, then the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    if raw[:3] != b"\0\0\x08":
        raise DataError(f"{path}: starts with {raw[:4].hex()}, which is not the mark of a uint8 IDX file")
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if body.size != shape.prod():
        raise DataError(f"{path}: holds {body.size} values where its header says {tuple(shape.tolist())}")
    return body.reshape(shape).copy()


def image_folder(root: str | os.PathLike[str]) -> ImageSet:
    """Pictures in one subfolder per class; the classes are the subfolders' names in sorted order.

    Subfolders without pictures are left out. Files are opened only when asked for: an unreadable one raises
    DataError, with its name, from `image`; `readable()` leaves such out. Raises DataError if there is nothing to read.
    """
    root = Path(root)
    found = {
        folder.name: sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        for folder in sorted(p for p in root.iterdir() if p.is_dir())
    }
    return _of_files(str(root), {name: files for name, files in found.items() if files}, str(root))


def tuxpaint() -> ImageSet:
    """About 200 photographs cut out on white, 12 classes: the stamps of Tux Paint, read where Debian installs them.

    Classes and folders are in TUXPAINT_FOLDERS; mirrored doubles are left out. The pictures are GPL-2 and not copied.
    Raises DataError if the package is not installed.
    """
    if not TUXPAINT_DEBIAN.is_dir():
        raise DataError(f"{TUXPAINT_DEBIAN} is missing: install the Debian package tuxpaint-stamps-default")
    found = {
        label: sorted(f for f in (TUXPAINT_DEBIAN / folder).glob("*.png") if not f.stem.endswith("_mirror"))
        for label, folder in TUXPAINT_FOLDERS.items()
    }
    return _of_files("tuxpaint", {label: files for label, files in found.items() if files}, str(TUXPAINT_DEBIAN))


def _of_files(name: str, files: dict[str, list[Path]], where: str) -> ImageSet:
    if not files:
        endings = " ".join(sorted(SUFFIXES))
        raise DataError(f"{where}: no subfolder has a picture ({endings}); expected one subfolder per class")
    labels = [label for label, members in enumerate(files.values()) for _ in members]
    return ImageSet(name, torch.tensor(labels), tuple(files), [f for members in files.values() for f in members])


def _from_hub(name: str, split: str) -> ImageSet:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hub data set {name!r} needs the `datasets` library: pip install datasets") from error
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a different type for each way of failing
        raise DataError(f"hub data set {name!r}, split {split!r}, could not be had: {error}") from error
    kinds = {column: type(feature).__name__ for column, feature in table.features.items()}
    image = next((column for column, kind in kinds.items() if kind == "Image"), None)
    label = next((column for column, kind in kinds.items() if kind == "ClassLabel"), None)
    if image is None or label is None:
        raise DataError(f"hub data set {name!r} has the columns {kinds}; one Image and one ClassLabel are needed")
    return ImageSet(name, torch.tensor(table[label][:]), tuple(table.features[label].names), table[image])
