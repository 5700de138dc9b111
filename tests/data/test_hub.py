"""Parquet folders, streams and shards: splits, columns, exact sharing, errors that name the file."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from karat.data.rows import RowStream, find_columns
from karat.data.splits import DataOptions, Opener
from karat.runs.recipes import RECIPES
from support import data as support

VIT = RECIPES["vit"]
CLASSES = ["cat", "dog", "owl"]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(path: Path, count: int, *, first: int = 0, label=lambda i: i % 3, feature=None, key="label") -> None:
    feature = feature or datasets.ClassLabel(names=CLASSES)
    rows = {
        "image": [{"bytes": png(first + i), "path": f"{first + i}.png"} for i in range(count)],
        key: [label(i) for i in range(count)],
    }
    features = datasets.Features({"image": datasets.Image(), key: feature})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(spec, recipe=VIT, **options):
    return support.load(spec, recipe, **{"img_size": 12, "batch_size": 4, **options})


def all_labels(loader):
    return torch.cat([labels for _, labels in loader])


@pytest.mark.parametrize(
    "names", [("train.parquet", "test.parquet"), ("data/train-00000-of-00001.parquet", "data/validation-0.parquet")]
)
@pytest.mark.parametrize("prefix", ["", "hfds/", "hfids/"])
def test_splits_by_file_name(tmp_path, names, prefix):
    write_parquet(tmp_path / "d" / names[0], 12)
    write_parquet(tmp_path / "d" / names[1], 7, first=100)
    data = load(prefix + str(tmp_path / "d"))
    assert data.class_names == tuple(CLASSES)
    assert data.train.num_samples == 12
    assert all_labels(data.eval).tolist() == [i % 3 for i in range(7)]
    images, _ = next(iter(data.train))
    assert images.shape == (4, 3, 12, 12)


def test_validation_goes_before_test(tmp_path):
    for name, count in (("train", 9), ("validation", 5), ("test", 6)):
        write_parquet(tmp_path / "d" / f"{name}.parquet", count)
    assert load(tmp_path / "d").eval.num_samples == 5


def test_without_evaluation_file_a_tenth_is_held_out(tmp_path):
    write_parquet(tmp_path / "d" / "train.parquet", 60)
    data = load(tmp_path / "d")
    assert data.eval.num_samples == 6
    assert sorted(all_labels(data.eval).tolist()) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="no split to evaluate on"):
        load(f"hfids/{tmp_path / 'd'}")


def test_class_names_as_text_and_bare_numbers(tmp_path):
    value = datasets.Value
    write_parquet(tmp_path / "t" / "train.parquet", 30, label=lambda i: CLASSES[i % 3], feature=value("string"))
    assert load(tmp_path / "t").class_names == tuple(CLASSES)
    write_parquet(tmp_path / "n" / "train.parquet", 40, label=lambda i: i % 4, feature=value("int64"), key="target")
    assert load(tmp_path / "n").class_names == tuple("0123")


def test_unlabelled_and_too_many_labels(tmp_path):
    write_parquet(tmp_path / "u" / "train.parquet", 9, label=lambda i: -1, feature=datasets.Value("int64"))
    with pytest.raises(ValueError, match="not labelled"):
        load(tmp_path / "u", num_classes=3)
    write_parquet(tmp_path / "m" / "train.parquet", 30)
    with pytest.raises(ValueError, match="label 2, but num_classes is 2"):
        load(tmp_path / "m", num_classes=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_of_a_stream_are_checked_as_they_come(tmp_path, workers):
    write_parquet(tmp_path / "d" / "train.parquet", 12)
    write_parquet(tmp_path / "d" / "test.parquet", 4)
    data = load(f"hfids/{tmp_path / 'd'}", num_classes=2, workers=workers)
    with pytest.raises(ValueError, match="label 2, but num_classes is 2"):
        list(data.train)


def test_torn_and_wrong_files_are_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", 12)
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{tmp_path}/train\.parquet: not a readable parquet file"):
        load(tmp_path)
    middle = bytearray(whole)
    middle[4:-2000] = bytes(len(whole) - 2004)  # the footer is whole, the pages are not
    (tmp_path / "train.parquet").write_bytes(bytes(middle))
    with pytest.raises(ValueError, match=r"train\.parquet"):
        list(load(tmp_path).train)


def test_missing_columns_are_listed(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match="no image column; its columns are text, label"):
        load(tmp_path)


def test_find_columns_prefers_the_usual_names():
    features = datasets.Features(
        {
            "coarse_label": datasets.ClassLabel(names=["x"]),
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["y", "z"]),
        }
    )
    assert find_columns(features, "cifar100") == ("img", "fine_label")
    masked = datasets.Features({"mask": datasets.Image(), "depth": datasets.Image()} | features)
    assert find_columns(masked, "scenes") == ("img", "fine_label")


def test_a_broken_image_in_a_row_is_named(tmp_path):
    write_parquet(tmp_path / "test.parquet", 6)
    rows = {"image": [{"bytes": png(i) if i else b"torn", "path": f"{i}.png"} for i in range(6)], "label": [0, 1] * 3}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    for prefix in ("", "hfids/"):
        with pytest.raises(ValueError, match=r"\(0\.png\): cannot be decoded"):
            list(load(f"{prefix}{tmp_path}", batch_size=6).train)
        data = load(f"{prefix}{tmp_path}", batch_size=6, on_bad_image="skip")
        (batch,) = list(data.train)
        assert len(batch[0]) == 6
        assert data.bad_images == 1


@pytest.fixture
def sharded(tmp_path):
    """24 + 10 images, the training part in four files."""
    for shard in range(4):
        write_parquet(tmp_path / "s" / f"train-{shard}.parquet", 6, first=6 * shard)
    write_parquet(tmp_path / "s" / "test.parquet", 10, first=100)
    return f"hfids/{tmp_path / 's'}"


def test_stream_is_shuffled_complete_and_repeatable(sharded):
    loader = load(sharded, batch_size=6).train
    stream = loader.stream
    assert isinstance(stream, RowStream)

    def names(epoch):
        return [r.image for _, r in stream.records(seed=epoch, rank=0, world_size=1)]

    assert sorted(names(0)) == sorted(png(i) for i in range(24))
    assert names(0) == names(0)
    assert names(0) != names(1)


def test_what_is_opened_once_stays_whole(sharded):
    opened, half = Opener(), DataOptions(sharded, VIT.augmentation, img_size=12, fraction=0.5)
    assert [opened.data(half).eval.num_samples for _ in range(2)] == [5, 5]
    assert opened.data(replace(half, seed=1)).eval.num_samples == 5
    assert opened.data(replace(half, fraction=1.0)).eval.num_samples == 10


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_stream_shares_are_disjoint_and_complete(sharded, world_size):
    data = load(sharded)
    for stream in (data.train.stream, data.eval.stream):
        shares = [list(stream.records(seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
        images = [record.image for share in shares for _, record in share]
        numbers = [number for share in shares for number, _ in share]
        assert len(images) == len(set(images)) == stream.length
        assert len(set(numbers)) == len(numbers)


def test_stream_resumes_and_ignores_workers(sharded):
    whole = load(sharded, seed=2).train
    whole.set_epoch(1)
    batches = list(whole)
    for workers, start in ((0, 3), (2, 3), (2, 0)):
        fresh = load(sharded, seed=2, workers=workers).train
        fresh.set_epoch(1)
        rest = list(fresh.iter_from(start))
        assert len(rest) == len(batches) - start
        assert all(
            torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(rest, batches[start:], strict=True)
        )


def test_uneven_stream_shares_fill_their_batches(sharded):
    loaders = [load(sharded, rank=rank, world_size=3, batch_size=4).train for rank in range(3)]
    assert [len(list(loader)) for loader in loaders] == [2, 2, 2]


def test_a_stream_shorter_than_announced(sharded):
    data = load(sharded)
    data.eval.order.n = 11
    data.eval.order.batches = 3
    data.eval.stream.length = 11
    with pytest.raises(RuntimeError, match="ended after 10 images"):
        list(data.eval)


def write_shard(path: Path, labels: list[int], first: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            for suffix, content in (("png", png(first + i)), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{first + i:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    for shard in range(3):
        write_shard(root / f"pets-train-{shard:04d}.tar", [0, 1, 2, 3], first=4 * shard)
    write_shard(root / "pets-validation-0000.tar", [3, 2, 1], first=50)
    return root


def test_webdataset_shards(shards):
    data = load(f"wds/{shards}")
    assert data.class_names == tuple("0123")
    assert data.train.num_samples == 12
    assert sorted(all_labels(data.train).tolist()) == sorted([0, 1, 2, 3] * 3)
    assert all_labels(data.eval).tolist() == [3, 2, 1]
    assert load(f"wds/{shards}/*train*.tar::{shards}/*val*.tar").train.num_samples == 12


def test_webdataset_info_spares_the_counting(shards):
    info = {
        "splits": {
            "train": {"filenames": [f"pets-train-{i:04d}.tar" for i in range(3)], "shard_lengths": [4, 4, 4]},
            "validation": {"filenames": ["pets-validation-0000.tar"], "shard_lengths": [3]},
        }
    }
    (shards / "_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="does not name its classes; give --num-classes"):
        load(f"wds/{shards}")
    data = load(f"wds/{shards}", num_classes=4)
    assert (data.train.num_samples, data.eval.num_samples) == (12, 3)
    assert len(data.class_names) == 4


def test_missing_and_torn_shards_are_named(shards, tmp_path):
    with pytest.raises(ValueError, match="no shards for training"):
        load(f"wds/{tmp_path / 'nowhere'}")
    (shards / "pets-train-0001.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"pets-train-0001\.tar: not a readable shard"):
        load(f"wds/{shards}")


def test_unreachable_hub_says_what_to_do():
    for prefix in ("hfds", "hfids"):
        with pytest.raises(ValueError, match=rf"{prefix}/nobody/nothing could not be loaded .* give that folder") as e:
            load(f"{prefix}/nobody/nothing")
        assert "\n" not in str(e.value)
