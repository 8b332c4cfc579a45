"""Data sets: what is in them, and what is said when they are not there."""

import gzip
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fewer.datasets import images as data
from fewer.datasets.images import DataError, ImageSet, load

needs_fashion = pytest.mark.skipif(not data.FASHION_DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
needs_tuxpaint = pytest.mark.skipif(not data.TUXPAINT_DEBIAN.is_dir(), reason="tuxpaint-stamps is not installed")


def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion_folder(tmp_path, monkeypatch):
    """Three pictures where FEWER_DATA points, and no other place to look."""
    pictures = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", pictures)
    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([9, 0, 4], np.uint8))
    monkeypatch.setenv("FEWER_DATA", str(tmp_path))
    monkeypatch.setattr(data, "FASHION_DEBIAN", tmp_path / "nowhere")
    return tmp_path, pictures


def test_embedded_is_balanced_and_opens_as_grey_pictures():
    embedded = load("embedded")
    assert len(embedded) == 2000
    assert embedded.labels.bincount().tolist() == [200] * 10
    assert embedded.image(7).size == (28, 28)
    assert embedded.image(7).mode == "L"


@needs_fashion
def test_embedded_is_the_stated_draw_of_the_test_split():
    embedded, drawn = load("embedded"), load("fashion").stratified(2000, seed=0)
    assert torch.equal(embedded.labels, drawn.labels)
    assert np.array_equal(np.stack(embedded.pictures), np.stack(drawn.pictures))


@needs_fashion
def test_fashion_has_its_published_sizes():
    train, test = data.fashion_mnist("train"), data.fashion_mnist("test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert np.asarray(train.pictures).mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert np.asarray(train.pictures).std() / 255 == pytest.approx(0.3530, abs=5e-5)


def test_fashion_is_read_from_the_folder_the_environment_names(fashion_folder):
    _, pictures = fashion_folder
    found = load("fashion")
    assert np.array_equal(found.pictures, pictures)
    assert [found.classes[label] for label in found.labels] == ["Ankle boot", "T-shirt/top", "Coat"]


def test_a_cut_file_is_named(fashion_folder):
    path = fashion_folder[0] / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: not a whole gzip"):
        load("fashion")


def test_a_file_with_fewer_values_than_announced_is_refused(fashion_folder):
    path = fashion_folder[0] / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(DataError, match=r"holds 2351 values where its header says \(3, 28, 28\)"):
        load("fashion")


def test_a_file_of_another_kind_is_refused(fashion_folder):
    (fashion_folder[0] / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"PK\3\4 and so on"))
    with pytest.raises(DataError, match="504b0304"):
        load("fashion")


def test_missing_fashion_names_three_ways_to_get_it(tmp_path, monkeypatch):
    def offline(name, split):
        raise DataError("no connection")

    monkeypatch.setenv("FEWER_DATA", str(tmp_path))
    monkeypatch.setattr(data, "FASHION_DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(data, "_from_hub", offline)
    with pytest.raises(DataError, match=r"FEWER_DATA.*dataset-fashion-mnist.*datasets.*no connection"):
        load("fashion")


def test_a_folder_of_folders_is_a_data_set(tmp_path):
    for kind, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / kind).mkdir()
        for i in range(2):
            Image.new("RGB", (5, 4), colour).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no pictures here")
    found = load(tmp_path)
    assert found.classes == ("blue", "red")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.image(0).getpixel((0, 0)) == (0, 0, 255)


def test_an_unreadable_picture_is_named_when_it_is_opened(tmp_path):
    (tmp_path / "cat").mkdir()
    broken = tmp_path / "cat" / "broken.jpg"
    broken.write_bytes(b"not a picture")
    found = load(tmp_path)
    with pytest.raises(DataError, match=re.escape(str(broken))):
        found.image(0)


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for i in range(2):
            Image.new("RGB", (5, 4)).save(tmp_path / kind / f"{i}.png")
    assert load(tmp_path).readable().skipped == ()
    (tmp_path / "cat" / "._a.jpg").write_bytes(b"\0\5\x16\7Mac OS X")
    (tmp_path / "dog" / "0.png").write_bytes((tmp_path / "dog" / "0.png").read_bytes()[:45])
    (tmp_path / "dog" / "empty.jpg").write_bytes(b"")
    found = load(tmp_path).readable()
    assert found.skipped == ("cat/._a.jpg", "dog/0.png", "dog/empty.jpg")
    assert found.labels.tolist() == [0, 0, 1]
    assert found.take([0]).skipped == found.skipped
    for i in range(2):
        (tmp_path / "cat" / f"{i}.png").unlink()
    (tmp_path / "dog" / "1.png").unlink()
    with pytest.raises(DataError, match="none of 3 pictures can be read"):
        load(tmp_path).readable()


def test_pictures_stand_upright(tmp_path):
    (tmp_path / "cat").mkdir()
    lying = Image.new("RGB", (4, 2), (255, 0, 0))
    lying.putpixel((0, 0), (0, 0, 255))
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    lying.save(tmp_path / "cat" / "a.png", exif=exif)
    upright = load(tmp_path).image(0)
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (0, 0, 255)


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    Image.new("1", (60, 60)).save(tmp_path / "cat" / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"huge\.png is too large .*3600 pixels.*scale it down"):
        load(tmp_path).image(0)


def test_a_picture_that_ends_early_is_named_too(tmp_path):
    (tmp_path / "cat").mkdir()
    path = tmp_path / "cat" / "short.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"short\.png"):
        load(tmp_path).image(0)


def test_transparent_becomes_white(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "a" / "x.png")
    assert load(tmp_path).image(0).getpixel((1, 1)) == (255, 255, 255)


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="one subfolder per class"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["fashon", "./not/there", "/not/there", "a/b/c"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(DataError, match="embedded, fashion, tuxpaint"):
        load(name)


def test_a_hub_table_becomes_a_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"picture": [{"path": None, "bytes": png(shade)} for shade in (0, 200)], "kind": [1, 0]},
        features=datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["dark", "light"])}),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    found = load("someone/something")
    assert found.classes == ("dark", "light")
    assert found.labels.tolist() == [1, 0]
    assert found.image(1).getpixel((0, 0)) == 200


def test_a_hub_picture_that_cannot_be_read_is_left_out(monkeypatch):
    class Table(list):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("cannot identify image file")
            return super().__getitem__(index)

    blank = Image.new("RGB", (2, 2))
    found = ImageSet("someone/something", torch.tensor([0, 1, 0]), ("a", "b"), Table([blank, None, blank])).readable()
    assert (len(found), found.skipped) == (2, ("picture 1",))


def test_a_hub_table_without_labels_is_refused(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(DataError, match="one Image and one ClassLabel"):
        load("someone/prose")


def png(shade):
    import io

    file = io.BytesIO()
    Image.new("L", (3, 3), shade).save(file, "png")
    return file.getvalue()


def test_batch_asks_the_processor_once_in_the_given_order():
    pictures = np.stack([np.full((2, 2), shade, np.uint8) for shade in (5, 6, 7)])
    small = ImageSet("small", torch.zeros(3, dtype=torch.long), ("only",), pictures)
    pixels = small.batch([2, 0], lambda images: torch.tensor([image.getpixel((0, 0)) for image in images]))
    assert pixels.tolist() == [7, 5]


def test_labels_must_fit_pictures_and_classes():
    with pytest.raises(DataError, match="2 pictures but 3 labels"):
        ImageSet("x", torch.zeros(3), ("a",), [1, 2])
    with pytest.raises(DataError, match=r"from 0 to 4, but there are 2 class names"):
        ImageSet("x", torch.tensor([0, 4]), ("a", "b"), [1, 2])


def test_stratified_draws_are_even_repeatable_and_seeded():
    labels = torch.arange(300) % 3
    many = ImageSet("many", labels, ("a", "b", "c"), list(range(300)))
    first, again, other = many.stratified(30, seed=1), many.stratified(30, seed=1), many.stratified(30, seed=2)
    assert first.labels.bincount().tolist() == [10, 10, 10]
    assert first.pictures == again.pictures != other.pictures
    assert first.pictures == sorted(set(first.pictures))
    with pytest.raises(DataError, match="31 pictures do not divide over 3 classes"):
        many.stratified(31)
    with pytest.raises(DataError, match="has 100 pictures; 200 were asked for"):
        many.stratified(600)


@needs_tuxpaint
def test_tuxpaint_photos_open_on_white():
    photos = load("tuxpaint")
    assert len(photos.classes) == 12
    assert len(photos) > 150
    assert photos.image(0).mode == "RGB"
    assert photos.image(0).getpixel((0, 0)) == (255, 255, 255)


def test_missing_tuxpaint_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TUXPAINT_DEBIAN", tmp_path / "nowhere")
    with pytest.raises(DataError, match="install the Debian package tuxpaint-stamps-default"):
        load("tuxpaint")
