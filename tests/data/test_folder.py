"""Which files of a folder are the data, and which part each is of; what is left out is said."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from karat.data.folder import NAMES, image_endings, part_of
from karat.data.splits import Splits, open_splits

COLOURS = {"cat": (255, 0, 0), "dog": (0, 255, 0)}


def add(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".webp", ".tif", ".TIFF", ".bmp", ".jpg"):
            Image.new("RGB", (4, 4), COLOURS.get(path.parent.name, (9, 9, 9))).save(path)
        else:
            path.write_bytes(b"\0\5\x16\7")
    return root


def classes(root: Path, *parts: str, n: int = 2) -> Path:
    for part in parts:
        add(root / part, *(f"{name}/{i}.png" for name in COLOURS for i in range(n)))
    return root


def used(splits: Splits, root: Path) -> dict[str, list[str]]:
    parts: dict[str, Any] = {"train": splits.train, "eval": splits.eval}
    return {name: sorted(os.path.relpath(part[i].name, root) for i in range(len(part))) for name, part in parts.items()}


JUNK = (
    "train/cat/._0.png",
    "train/cat/.DS_Store",
    "train/cat/Thumbs.db",
    "train/.ipynb_checkpoints/0-checkpoint.png",
    "train/.ipynb_checkpoints/1-checkpoint.png",
    "__MACOSX/train/cat/._0.png",
    ".git/objects/x",
)


def test_what_systems_leave_behind_is_left_out_and_counted(tmp_path: Path) -> None:
    add(classes(tmp_path, "train", "val"), *JUNK, "train/cat/notes.txt", "train/dog/a.TXT", "val/list", "README.md")
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ("cat", "dog")
    assert (len(splits.train), len(splits.eval)) == (4, 4)
    assert splits.found.startswith("8 images in 2 classes; 11 files left out: 7 hidden, 2 .txt, 1 ")
    assert "1 .md" in splits.found
    assert "1 no ending" in splits.found
    assert splits.found.endswith("; trained on 4 in train/, evaluated on 4 in val/")


def test_a_folder_that_holds_nothing_else_says_so(tmp_path: Path) -> None:
    found = open_splits(str(classes(tmp_path, "", n=10))).found
    assert found == "20 images in 2 classes; trained on 18, evaluated on 2 of them"


def test_every_ending_that_pillow_decodes_is_an_image(tmp_path: Path) -> None:
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".jp2", ".avif", ".mpo"} <= (
        image_endings()
    )
    assert not {".h5", ".pdf", ".eps", ".mpg", ".txt", ".heic", ""} & image_endings()
    add(classes(tmp_path, "train", "val"), "train/owl/0.webp", "train/owl/1.TIFF", "val/owl/0.bmp")
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ("cat", "dog", "owl")
    assert len(splits.train) == 6


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in NAMES.items() for name in names])
@pytest.mark.parametrize("change", [str, str.upper, str.title, "{}_set".format, "{}2017".format, "{} Images".format])
def test_parts_are_known_by_many_names(part: str, name: str, change: Any) -> None:
    assert part_of(change(name)) == part
    assert part_of(f"x{name}") == part_of(f"{name}er") == ""


@pytest.mark.parametrize(
    ("train", "evaluation", "other"),
    [("Train", "Test", ""), ("training", "testing", ""), ("TRAIN", "valid", "test"), ("train_set", "dev", "Test Set")],
)
def test_test_images_are_never_trained_on(tmp_path: Path, train: str, evaluation: str, other: str) -> None:
    root = classes(tmp_path, train, evaluation, *([other] if other else []))
    splits = open_splits(str(root))
    where = {part: {path.split("/")[0] for path in paths} for part, paths in used(splits, root).items()}
    assert where == {"train": {train}, "eval": {evaluation}}
    assert (f"not used: {other}/" in splits.found) == bool(other)


AMBIGUOUS = {  # what is there -> what is said
    ("train", "Training"): "mean the same",
    ("train", "val", "validation"): "mean the same",
    ("", "test"): r"class folders \(cat/\) beside test/: put them into train/",
    (
        "seg_train/seg_train",
        "seg_test/seg_test",
        "seg_pred",
    ): "seg_train/ and seg_test/, which may be",
    ("img.train", "img.val"): "call them train/ and test/",
    ("train_v2", "test_v2"): "train_v2/ and test_v2/, which may be",
    ("my_train_data", "my_val_data"): "call them train/ and test/",
    ("CatsTrain", "CatsTest"): "CatsTrain/ and CatsTest/",
    ("Test",): "Test/ and no train/",
    ("bottle/train", "bottle/test", "nut/train", "nut/test"): "within the class folder bottle/",
    ("data/train", "data/val"): "give .*data, or put",
}


@pytest.mark.parametrize("layout", AMBIGUOUS, ids="+".join)
def test_ambiguous_layouts_are_refused(tmp_path: Path, layout: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=AMBIGUOUS[layout]) as caught:
        open_splits(str(classes(tmp_path, *layout)))
    assert "\n" not in str(caught.value)


def test_a_class_may_be_called_like_a_part(tmp_path: Path) -> None:
    add(tmp_path, *(f"{name}/{i}.png" for name in ("bus", "train", "ski_test", "bullet_train") for i in range(3)))
    assert open_splits(str(tmp_path)).class_names == ("bullet_train", "bus", "ski_test", "train")


@pytest.mark.parametrize("name", ["test", "Val", "dev"])
def test_images_of_a_test_folder_are_no_class(tmp_path: Path, name: str) -> None:
    add(tmp_path, *(f"{folder}/{i}.png" for folder in ("cat", "dog", name) for i in range(3)))
    with pytest.raises(ValueError, match=rf"beside {name}/: put them into train/, {name}/ too if it is a class"):
        open_splits(str(tmp_path))


def test_a_link_to_another_class_is_left_out(tmp_path: Path) -> None:
    add(tmp_path, *(f"{folder}/old/{i}.png" for folder in ("cat", "dog") for i in range(3)))
    (tmp_path / "dog" / "more").symlink_to(tmp_path / "cat" / "old")
    (tmp_path / "cat" / "more").symlink_to(tmp_path / "dog" / "old")
    splits = open_splits(str(tmp_path))
    assert len(splits.train) + len(splits.eval) == 6
    assert "cat/more/ (a link to another class), dog/more/ (a link to another class)" in splits.found


def test_images_within_a_class_folder_belong_to_it(tmp_path: Path) -> None:
    add(tmp_path, "train/cat/2020/0.png", "train/cat/2021/a/1.png", "train/dog/2020/0.png", "train/dog/2.png")
    add(tmp_path, "val/cat/images/0.png")
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ("cat", "dog")
    assert splits.train.labels.tolist() == [0, 0, 1, 1]


def test_which_level_the_classes_are_on_is_not_guessed(tmp_path: Path) -> None:
    add(tmp_path, "train/pets/cat/0.png", "train/pets/dog/0.png", "train/wild/owl/0.png", "train/wild/fox/0.png")
    with pytest.raises(ValueError, match="pets holds cat/, dog/ and no images"):
        open_splits(str(tmp_path))


def test_links_that_point_back_are_not_followed(tmp_path: Path) -> None:
    classes(tmp_path, "train", "val")
    (tmp_path / "train/cat/up").symlink_to(tmp_path / "train", target_is_directory=True)
    (tmp_path / "train/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "train/self").symlink_to(tmp_path / "train/self")
    (tmp_path / "train/dog/other").symlink_to(tmp_path / "train/cat", target_is_directory=True)
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ("cat", "dog")


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    add(classes(tmp_path, "train", "val"), "train/owl/0.heic")
    (tmp_path / "train/fox").mkdir()
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ("cat", "dog")
    assert "1 file left out: 1 .heic; not used: fox/ (no images), owl/ (no images)" in splits.found


def test_a_folder_that_is_evaluated_on_alone_is_taken_whole(tmp_path: Path) -> None:
    flat = classes(tmp_path / "flat", "", n=10)
    assert len(open_splits(str(flat), whole=True).eval) == 20
    parts = classes(tmp_path / "parts", "train", "test", n=3)
    assert used(open_splits(str(parts), whole=True), parts)["eval"] == [
        f"test/{name}/{i}.png" for name in COLOURS for i in range(3)
    ]
    assert len(open_splits(str(classes(tmp_path / "only", "Test")), whole=True).eval) == 4
    one = add(tmp_path / "one", "cat/0.png")
    assert open_splits(str(one), whole=True).class_names == ("cat",)


def table(path: Path, colour: str, rows: int, labels: int = 2) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), COLOURS[colour]).save(buffer, "PNG")
    images = pa.array([{"bytes": buffer.getvalue(), "path": None}] * rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": pa.array([i % labels for i in range(rows)])}), path)


ODD = ("set[1]", "a{b,c}", "sp ace", "~x", "h#sh", "q?m", "st*r", "per%20cent", "é", "a[!b]c", ".hid")


@pytest.mark.parametrize("name", ODD)
def test_a_path_is_no_pattern(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, colour, rows in ((name, "cat", 6), ("set1", "dog", 4), ("ab", "dog", 4), ("stXr", "dog", 4)):
        for part in ("train", "test"):
            table(tmp_path / folder / f"{part}.parquet", colour, rows)
    monkeypatch.chdir(tmp_path)
    for spec in (str(tmp_path / name), name, f"hfids/{tmp_path / name}"):
        splits = open_splits(spec)
        assert "6" in splits.found or "12" in splits.found
        records: Any = splits.train if hasattr(splits.train, "__getitem__") else None
        if records is not None:
            assert len(records) == 6
            assert Image.open(io.BytesIO(records[0].image)).getpixel((0, 0)) == COLOURS["cat"]
    add(tmp_path / "images" / name, *(f"{part}/{c}/0.png" for part in ("train", "val") for c in COLOURS))
    assert len(open_splits(str(tmp_path / "images" / name)).train) == 2


def test_a_path_that_datasets_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    for name in ("a::b", "$HOME"):
        table(tmp_path / name / "train.parquet", "cat", 4)
        with pytest.raises(ValueError, match="rename the folder"):
            open_splits(str(tmp_path / name))


def test_hidden_parquet_files_are_left_out_and_names_are_read_word_by_word(tmp_path: Path) -> None:
    table(tmp_path / "my-Train-0.parquet", "cat", 6)
    table(tmp_path / "my_test.parquet", "dog", 4)
    add(tmp_path, ".ipynb_checkpoints/my-train-0.parquet", "._my_test.parquet")
    splits = open_splits(str(tmp_path))
    assert (len(splits.train), len(splits.eval)) == (6, 4)
    assert splits.found == ("10 images in 2 classes; 2 files left out: 2 hidden; trained on 6, evaluated on 4")
    (tmp_path / "my_test.parquet").rename(tmp_path / "train-test.parquet")
    with pytest.raises(ValueError, match="may mean test or train"):
        open_splits(str(tmp_path))


def test_parquet_without_parts_is_evaluated_whole(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", "cat", 20)
    assert len(open_splits(str(tmp_path)).eval) == 2
    assert len(open_splits(str(tmp_path), whole=True).eval) == 20
    (tmp_path / "a.parquet").rename(tmp_path / "test.parquet")
    assert len(open_splits(str(tmp_path), whole=True).eval) == 20
    with pytest.raises(ValueError, match="no training files"):
        open_splits(str(tmp_path))
