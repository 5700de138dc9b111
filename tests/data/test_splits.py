"""What comes out of every kind of data: shapes, splits, classes; and clear errors for what can't be read."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from karat.data.folder import in_order
from karat.data.sources import ArraySource, hold_out
from karat.data.splits import open_splits
from karat.runs.recipes import RECIPES
from support import data as support

QUICK, VIT = RECIPES["quick"], RECIPES["vit"]


def make_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (20, 16), seed: int = 0) -> Path:
    """A folder of random images, one subfolder a class."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


def load(spec, recipe=QUICK, **options):
    return support.load(spec, recipe, **options)


def all_labels(loader):
    return torch.cat([labels for _, labels in loader])


def test_digits_are_complete_and_unmirrored():
    data = load("digits", img_size=16, batch_size=64)
    assert (data.num_classes, data.in_chans, data.class_names) == (10, 1, tuple("0123456789"))
    assert data.eval.num_samples + len(data._parts["train"]) == 1797
    images, labels = next(iter(data.train))
    assert images.shape == (64, 1, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert data.train.hflip == 0
    assert load("digits").img_size == 8
    assert set(all_labels(data.eval).tolist()) == set(range(10))


def test_normalised_by_mean_and_std():
    images = torch.cat([images for images, _ in load("digits").eval])
    assert images.min() == pytest.approx(-1)  # (0 - 0.5) / 0.5
    assert images.max() == pytest.approx(1)


def test_folder_with_train_and_val(tmp_path):
    make_folder(tmp_path / "train", {"b": 5, "a": 7})
    make_folder(tmp_path / "val", {"a": 3}, seed=1)
    data = load(tmp_path, img_size=16, batch_size=4)
    assert data.class_names == ("a", "b")
    assert all_labels(data.eval).tolist() == [0, 0, 0]
    assert data.train.num_samples == 12
    images, _ = next(iter(data.train))
    assert images.shape == (4, 3, 16, 16)


def test_images_have_the_order_of_timms_reader_and_the_classes_of_their_folders(tmp_path):
    names = ("b/10.png", "b/9.PNG", "b/x.txt", "A/deep/x2.jpg", "A/deep/x10.jpeg", "A/x1.jpg", "c10/é.jpg", "c9/1.jpg")
    for part in ("train", "val"):
        for name in names:
            (tmp_path / part / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part / name).touch()
        (tmp_path / part / "linked").symlink_to(tmp_path / part / "b", target_is_directory=True)
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ("A", "b", "c9", "c10", "linked")
    for part, source in (("train", splits.train), ("val", splits.eval)):
        found, _ = find_images_and_targets(str(tmp_path / part))
        records = [source[i] for i in range(len(source))]
        assert [record.name for record in records] == [path for path, _ in found]
        for record in records:  # the class is the folder right below the part; timm's is the one around the image
            class_name = Path(record.name).relative_to(tmp_path / part).parts[0]
            assert splits.class_names[record.label] == class_name


@pytest.mark.parametrize("names", list(permutations(["2", "01", "1", "²", "cat", "Cat"], 6))[::97])
def test_names_that_differ_in_case_or_leading_zeros_have_one_order(names):
    assert sorted(names, key=in_order) == ["01", "1", "2", "Cat", "cat", "²"]


def test_one_folder_is_split_alike_everywhere(tmp_path):
    first = make_folder(tmp_path / "here", {"a": 20, "b": 30, "c": 1})
    second = make_folder(tmp_path / "there", {"c": 1, "b": 30, "a": 20})
    names = []
    for root in (first, second):
        splits = open_splits(str(root))
        held = [Path(splits.eval[i].name).relative_to(root) for i in range(len(splits.eval))]
        kept = [Path(splits.train[i].name).relative_to(root) for i in range(len(splits.train))]
        assert len(held) + len(kept) == 51
        assert not set(held) & set(kept)
        names.append(held)
    assert names[0] == names[1]
    assert np.bincount(splits.eval.labels, minlength=3).tolist() == [2, 3, 0]


def test_adding_an_image_moves_no_other(tmp_path):
    root = make_folder(tmp_path, {"a": 40, "b": 40})
    before = {splits.eval[i].name for splits in [open_splits(str(root))] for i in range(len(splits.eval))}
    make_folder(root, {"a": 41})
    after = {splits.eval[i].name for splits in [open_splits(str(root))] for i in range(len(splits.eval))}
    assert len(before - after) <= 1


def test_hold_out_refuses_single_images():
    source = ArraySource(np.zeros((3, 4, 4), np.uint8), np.arange(3), "x")
    with pytest.raises(ValueError, match="every class has one image"):
        hold_out(source)


@pytest.mark.parametrize("recipe", [QUICK, VIT, RECIPES["finetune"]], ids=["quick", "vit", "finetune"])
@pytest.mark.parametrize("size", [(20, 16), (64, 200)], ids=str)
def test_any_picture_size_and_recipe(tmp_path, recipe, size):
    data = load(make_folder(tmp_path, {"a": 4, "b": 4}, size), recipe, img_size=32, batch_size=4)
    for loader in (data.train, data.eval):
        images, _ = next(iter(loader))
        assert images.shape[1:] == (3, 32, 32)
        assert images.isfinite().all()


def test_grey_images_go_through_colour_recipes():
    data = load("digits", VIT.override(reprob=1.0), img_size=16, batch_size=64)
    assert next(iter(data.train))[0].shape == (64, 1, 16, 16)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere': no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path}: no images found"):
        load(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        load(tmp_path / "x.txt")
    make_folder(tmp_path, {"only": 3})
    with pytest.raises(ValueError, match="one class only"):
        load(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png lies in no class subfolder"):
        load(tmp_path)


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path, {"a": 2, "b": 2})
    import os

    scan = os.scandir

    def denied(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("karat.data.folder.os.scandir", denied)
    with pytest.raises(ValueError, match=r"/b: cannot be read \(Permission denied\)"):
        load(tmp_path)


def test_a_class_only_in_val_is_refused(tmp_path):
    make_folder(tmp_path / "train", {"a": 2, "b": 2})
    make_folder(tmp_path / "val", {"a": 2, "new": 1})
    with pytest.raises(ValueError, match=r"class 'new', which .*train lacks"):
        load(tmp_path)


def test_labels_beyond_num_classes(tmp_path):
    make_folder(tmp_path, {"a": 3, "b": 3, "c": 3})
    with pytest.raises(ValueError, match="label 2, but num_classes is 2"):
        load(tmp_path, num_classes=2)
    assert load(tmp_path, num_classes=7).num_classes == 7


def break_one(root: Path) -> Path:
    victim = sorted((root / "a").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:60])
    return victim


@pytest.mark.parametrize("recipe", [QUICK, VIT], ids=["resident", "one by one"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_the_run_by_name(tmp_path, recipe, workers):
    make_folder(tmp_path / "train", {"a": 4, "b": 4})
    make_folder(tmp_path / "val", {"a": 2, "b": 2})
    victim = break_one(tmp_path / "train")
    data = load(tmp_path, recipe, img_size=16, batch_size=8, workers=workers)
    with pytest.raises(ValueError, match=rf"{victim}: cannot be decoded .*--on-bad-image skip") as caught:
        list(data.train)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("jitter", [0.0, 1e-9], ids=["resident", "one by one"])
def test_pad_resizes_training_images_as_asked(tmp_path, jitter):
    for part in ("train", "val"):
        make_folder(tmp_path / part, {"a": 2, "b": 2}, size=(24, 24))
    still = {"hflip": 0.0, "train_crop_mode": "pad", "color_jitter": jitter}

    def seen(**values):
        data = load(tmp_path, QUICK.override(**still, **values), img_size=6, batch_size=4)  # 6 // 8: nothing is shifted
        (train,), (val,) = list(data.train), list(data.eval)
        return train[0], val[0]

    train, val = seen()
    nearest, same = seen(train_interpolation="nearest")
    assert torch.equal(val, same)
    assert (nearest - train).abs().max() > 0.1
    plain, other = seen(interpolation="nearest")
    assert torch.equal(plain, train)
    assert (other - val).abs().max() > 0.1
    drawn, _ = seen(train_interpolation="random")
    smooth, _ = seen(train_interpolation="bilinear")
    for image, one, two in zip(drawn, train, smooth, strict=True):
        assert min((image - one).abs().max(), (image - two).abs().max()) < 0.05


@pytest.mark.parametrize("recipe", [QUICK, VIT], ids=["resident", "one by one"])
def test_a_broken_image_is_skipped_and_counted_once(tmp_path, recipe):
    make_folder(tmp_path / "train", {"a": 4, "b": 4})
    make_folder(tmp_path / "val", {"a": 2, "b": 2})
    break_one(tmp_path / "train")
    broken = break_one(tmp_path / "val")
    data = load(tmp_path, recipe, img_size=16, batch_size=4, on_bad_image="skip")
    for epoch in range(2):
        data.train.set_epoch(epoch)
        for images, labels in data.train:
            assert len(images) == 4 or recipe is QUICK
            assert labels.min() >= 0
        assert sorted(all_labels(data.eval).tolist()) == [0, 1, 1]
    assert data.bad_images == 2
    assert str(broken) in data._bad.names


def test_nothing_decodable(tmp_path):
    make_folder(tmp_path / "train", {"a": 2, "b": 2})
    make_folder(tmp_path / "val", {"a": 2, "b": 2})
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    for recipe in (QUICK, VIT):
        with pytest.raises(ValueError, match="not one"):
            list(load(tmp_path, recipe, img_size=8, batch_size=4, on_bad_image="skip").train)


def test_options_are_checked():
    with pytest.raises(ValueError, match="on_bad_image='ignore'"):
        load("digits", on_bad_image="ignore")
    with pytest.raises(ValueError, match="data fraction 0"):
        load("digits", fraction=0.0)
    with pytest.raises(ValueError, match="img_size=0"):
        load("digits", img_size=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        _ = load("digits", batch_size=0).train
    with pytest.raises(ValueError, match="workers=-1"):
        load("digits", workers=-1)
    with pytest.raises(ValueError, match="name the data set after the stroke"):
        load("torch/")


def test_fraction_is_a_fixed_part():
    whole, part = load("digits"), load("digits", fraction=0.1)
    assert part.eval.num_samples == round(0.1 * whole.eval.num_samples)
    again = load("digits", fraction=0.1, seed=5)
    assert all_labels(part.eval).tolist() == all_labels(again.eval).tolist()


def test_cifar_parquet(shared_data):
    data = load(shared_data / "cifar10", VIT, img_size=32, batch_size=16, fraction=0.01)
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert len(data._parts["train"]) == 500
    images, labels = next(iter(data.train))
    assert images.shape == (16, 3, 32, 32)
    assert labels.min() >= 0
    assert len(all_labels(data.eval)) == 100
