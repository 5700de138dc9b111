"""torchvision's data sets: read where they lie, and a line saying what to place where when they can't be had."""

import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from karat.data.images import statistics
from karat.data.named import FILES
from karat.data.splits import open_splits
from karat.runs.classification import SMALL_DATA
from karat.runs.recipes import RECIPES
from support.data import load

QUICK = RECIPES["quick"]


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", FILES)
def test_without_a_network_the_files_and_the_folder_are_named(name, tmp_path, offline):
    with pytest.raises(ValueError, match=f"torch/{name} is not in {tmp_path}.*--data-dir") as caught:
        open_splits(f"torch/{name}", data_dir=tmp_path)
    assert FILES[name] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_set_is_of_small_images_or_of_large_ones():
    small = {f"torch/{name}" for name in FILES} - {"torch/flowers102", "torch/stl10"}
    assert set(SMALL_DATA) == {"digits", *small}, "say in SMALL_DATA or here how large a set's images are"


def test_imagenet_says_what_to_place_where(tmp_path):
    with pytest.raises(ValueError, match=r"train/WNID"):
        open_splits("torch/imagenet", data_dir=tmp_path)


def test_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"unknown data set torch/cifar11; known are cifar10"):
        open_splits("torch/cifar11", data_dir=tmp_path)


def test_imagenet_is_a_folder(tmp_path):
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            (tmp_path / "imagenet" / split / wnid).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (30, 20)).save(tmp_path / "imagenet" / split / wnid / f"{i}.JPEG")
    data = load("torch/imagenet", RECIPES["vit"], data_dir=tmp_path, batch_size=2)
    assert data.class_names == ("n01440764", "n01443537")
    assert data.img_size == 224
    assert next(iter(data.train))[0].shape == (2, 3, 224, 224)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("name", "folder", "mirror"), [("mnist", "MNIST", False), ("fashion_mnist", "FashionMNIST", True)]
)
def test_idx_files(tmp_path, name, folder, mirror, offline):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 10)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    data = load(f"torch/{name}", QUICK, data_dir=tmp_path, batch_size=8)
    assert (data.in_chans, data.img_size, data.num_classes) == (1, 28, 10)
    assert (data.train.num_samples, data.eval.num_samples) == (40, 10)
    assert data.train.hflip == (0.5 if mirror else 0)
    assert torch.cat([labels for _, labels in data.eval]).tolist() == list(range(10))


def test_cifar_arrays(tmp_path, monkeypatch):
    def cifar(root, train, download):
        n = 30 if train else 10
        data = np.full((n, 32, 32, 3), 7, np.uint8)
        return SimpleNamespace(data=data, targets=[i % 10 for i in range(n)], classes=[f"c{i}" for i in range(10)])

    monkeypatch.setitem(__import__("timm.data.dataset_factory", fromlist=["x"])._TORCH_BASIC_DS, "cifar10", cifar)
    data = load("torch/cifar10", QUICK, data_dir=tmp_path, batch_size=10)
    images, _ = next(iter(data.eval))
    assert images.shape == (10, 3, 32, 32)
    assert data.class_names[3] == "c3"
    mean, std = map(torch.tensor, statistics(3))
    assert torch.allclose(images[0, :, 0, 0], (7 / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize(("name", "side"), [("SVHN", 32), ("STL10", 96)])
def test_channel_first_arrays(tmp_path, monkeypatch, name, side):
    def channel_first(root, split, download):
        n = {"train": 20, "test": 5}[split]
        images = np.zeros((n, 3, side, side), np.uint8)
        images[:, 0] = 255  # red
        return SimpleNamespace(data=images, labels=np.arange(n) % 10, classes=[f"c{i}" for i in range(10)])

    monkeypatch.setattr(torchvision.datasets, name, channel_first)
    data = load(f"torch/{name.lower()}", QUICK, data_dir=tmp_path, batch_size=5)
    images, _ = next(iter(data.eval))
    assert images.shape == (5, 3, side, side)
    assert images[:, 0].min() > images[:, 1].max()


def test_flowers_train_on_train_and_val(tmp_path, monkeypatch):
    def flowers(root, split, download):
        n = {"train": 6, "val": 4, "test": 3}[split]
        paths = [tmp_path / f"{split}{i}.jpg" for i in range(n)]
        for path in paths:
            Image.new("RGB", (40, 50)).save(path)
        return SimpleNamespace(_image_files=paths, _labels=[i % 2 for i in range(n)], classes=["rose", "iris"])

    monkeypatch.setattr(torchvision.datasets, "Flowers102", flowers)
    data = load("torch/flowers102", RECIPES["finetune"], data_dir=tmp_path, img_size=32, batch_size=5)
    assert (data.train.num_samples, data.eval.num_samples) == (10, 3)
    assert data.class_names == ("rose", "iris")
