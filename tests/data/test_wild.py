"""Parquet files and shards as people have them: columns of several kinds, odd members, torn ends."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from karat.data.splits import open_splits

Members = list[tuple[str, bytes]]


def encoded(level: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, form)
    return buffer.getvalue()


PNG = [encoded(level) for level in range(4)]
KINDS: dict[str, Callable[[], Any]] = {  # how a column may hold images
    "bytes": lambda: pa.array(PNG),
    "large bytes": lambda: pa.array(PNG, pa.large_binary()),
    "records without a path": lambda: pa.array([{"bytes": png} for png in PNG]),
    "records of no path": lambda: pa.array([{"bytes": png, "path": None} for png in PNG]),
    "records of both": lambda: pa.array([{"path": "a.png", "bytes": png} for png in PNG]),
    "records of more": lambda: pa.array([{"bytes": png, "path": "a.png", "height": 4} for png in PNG]),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "within a record": lambda: pa.array([{"image": {"bytes": png, "path": None}} for png in PNG]),
    "under other names": lambda: pa.array([{"data": png} for png in PNG]),
    "lists": lambda: pa.array([[{"bytes": png, "path": None}] for png in PNG]),
    "bytes as numbers": lambda: pa.array([list(png) for png in PNG], pa.list_(pa.uint8())),
    "pixels": lambda: pa.array([[[level] * 4] * 4 for level in range(4)], pa.list_(pa.list_(pa.uint8()))),
    "numbers": lambda: pa.array(range(4)),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, images: Any, labels: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = pa.array([i % 2 for i in range(len(images))]) if labels is None else labels
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def records(part: Any) -> list[Any]:
    if hasattr(part, "records"):
        return [record for _, record in part.records(seed=0, rank=0, world_size=1)]
    return [part[i] for i in range(len(part))]


def levels(part: Any) -> list[tuple[int, int]]:
    """(grey level, label) of each image."""
    found = [(Image.open(io.BytesIO(record.image)).getpixel((0, 0)), record.label) for record in records(part)]
    return sorted((int(str(level)), label) for level, label in found)


@pytest.mark.parametrize("prefix", ["", "hfids/"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_one_part_may_hold_images_in_different_ways(tmp_path: Path, kind: str, prefix: str) -> None:
    for number, made in enumerate((kind, "records of both", "bytes", "records without a path")):
        write(tmp_path / "d" / f"train-{number}.parquet", KINDS[made]())
    write(tmp_path / "d" / "test.parquet", KINDS[kind]())
    splits = open_splits(f"{prefix}{tmp_path / 'd'}")
    assert levels(splits.train) == sorted([(0, 0), (1, 1), (2, 0), (3, 1)] * 4)
    assert levels(splits.eval) == [(0, 0), (1, 1), (2, 0), (3, 1)]


@pytest.mark.parametrize("prefix", ["", "hfids/"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_column_that_holds_no_images_is_named(tmp_path: Path, kind: str, prefix: str) -> None:
    for part in ("train", "test"):
        write(tmp_path / "d" / f"{part}.parquet", OTHERS[kind]())
    with pytest.raises(ValueError, match=r"train\.parquet: its column 'image' holds '.*', no images; give .*bytes"):
        open_splits(f"{prefix}{tmp_path / 'd'}")


def test_columns_that_datasets_cannot_read_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pa.array(PNG, pa.binary_view()))
    with pytest.raises(ValueError, match="its column 'image' is a binary_view"):
        open_splits(str(tmp_path))


def test_a_file_without_rows_among_others_holds_nothing(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", pa.array([], pa.binary()), pa.array([], pa.int64()))
    write(tmp_path / "train-1.parquet", pa.array(PNG))
    write(tmp_path / "test.parquet", pa.array(PNG))
    assert levels(open_splits(str(tmp_path)).train) == [(0, 0), (1, 1), (2, 0), (3, 1)]


@pytest.mark.parametrize(
    "names", [("default/train/0000.parquet", "default/test/0000.parquet"), ("A.PARQUET", "test.PARQUET")]
)
def test_parquet_is_found_at_any_depth_and_in_any_case(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        write(tmp_path / "d" / name, pa.array(PNG))
    splits = open_splits(str(tmp_path / "d"))
    assert (levels(splits.train), levels(splits.eval)) == ([(0, 0), (1, 1), (2, 0), (3, 1)],) * 2
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "d" / part / name).mkdir(parents=True)
            Image.new("L", (4, 4)).save(tmp_path / "d" / part / name / "0.png")
    if "/" in names[0]:  # of a folder of images it is a stray
        assert open_splits(str(tmp_path / "d")).class_names == ("cat", "dog")


def pack(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def samples(*beside: str) -> Members:
    """Four samples, their image's grey level their number; files called `beside` hold a white one."""
    white = encoded(255)
    return [
        (f"{number}.{part}", content)
        for number in range(4)
        for part, content in (
            *((part, white) for part in beside),
            ("png", PNG[number]),
            ("cls", b"01"[number % 2 :][:1]),
        )
    ]


def shards(root: Path, members: Members) -> str:
    for part in ("train", "val"):
        pack(root / f"x-{part}-0.tar", members)
    return f"wds/{root}"


@pytest.mark.parametrize("beside", ["depth.png", "a.b.jpg", "h5", "txt"])
def test_a_samples_image_is_the_one_without_another_word(tmp_path: Path, beside: str) -> None:
    splits = open_splits(shards(tmp_path, samples(beside)))
    assert levels(splits.train) == levels(splits.eval) == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_a_sample_of_several_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x-train-0\.tar: sample 0 has several images \(\.jpg, \.png\)"):
        open_splits(shards(tmp_path, samples("jpg")))


def test_a_hidden_file_within_a_sample_is_left_out(tmp_path: Path) -> None:
    members = [entry for name, content in samples() for entry in ((f"._{name}", b"\0"), (name, content))]
    assert levels(open_splits(shards(tmp_path, members)).train) == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_a_sample_without_an_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    found = records(open_splits(shards(tmp_path, [*samples(), ("9.cls", b"0")])).eval)[-1]
    assert found.name.endswith("(9)")
    assert found.image == b""


@pytest.mark.parametrize("cut", ["between members", "within a header", "within an image", "a header"])
def test_a_shard_without_its_end_is_refused_however_it_was_torn(tmp_path: Path, cut: str) -> None:
    spec = shards(tmp_path, samples())
    path = tmp_path / "x-train-0.tar"
    with tarfile.open(path) as tar:
        image = tar.getmembers()[4]
    whole = path.read_bytes()
    torn = {
        "between members": whole[: image.offset],
        "within a header": whole[: image.offset + 100],
        "within an image": whole[: image.offset_data + 20],
        "a header": whole[: image.offset] + b"\7" * 300 + whole[image.offset + 300 :],
    }[cut]
    path.write_bytes(torn)
    with pytest.raises(ValueError, match=r"x-train-0\.tar: not a readable shard .*fetch it again"):
        open_splits(spec)


def test_compressed_shards_are_read_or_refused(tmp_path: Path) -> None:
    shards(tmp_path, samples())
    for part in ("train", "val"):
        (tmp_path / f"{part}.tgz").write_bytes(gzip.compress((tmp_path / f"x-{part}-0.tar").read_bytes()))
    spec = f"wds/{tmp_path}/train.tgz::{tmp_path}/val.tgz"
    assert levels(open_splits(spec).train) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    (tmp_path / "train.tgz").write_bytes((tmp_path / "train.tgz").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"train\.tgz: not a readable shard"):
        open_splits(spec)


@pytest.mark.parametrize(
    "info",
    ["{}", "{", "[]", '{"splits": []}', '{"splits": {"a": {"filenames": ["x-train-0.tar"], "shard_lengths": []}}}']
    + [
        f'{{"splits": {{"a": {{"filenames": ["x-train-0.tar"], "shard_lengths": [{n}]}}}}}}'
        for n in ("null", '"8"', 0.5)
    ],
)
def test_a_note_of_samples_that_cannot_be_read_is_refused(tmp_path: Path, info: str) -> None:
    spec = shards(tmp_path, samples())
    (tmp_path / "_info.json").write_text(info)
    with pytest.raises(ValueError, match=r"_info\.json doesn't list splits with filenames .*remove it"):
        open_splits(spec)


def test_names_that_are_no_paths_stay_short(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / f"{part}.parquet", pa.array(["x" * 5000] * 4))
    assert len(records(open_splits(str(tmp_path)).train)[0].name) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("names", [("x-test-0",), ("a", "b"), ("x-train-0", "x-val-0"), ("x-train-0",)])
def test_shards_that_are_evaluated_on_alone_are_taken_whole(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        pack(tmp_path / f"{name}.tar", samples())
    whole = 1 if "x-val-0" in names else len(names)
    assert len(levels(open_splits(f"wds/{tmp_path}", whole=True).eval)) == 4 * whole
    assert len(levels(open_splits(f"wds/{tmp_path}/{names[-1]}*.tar", whole=True).eval)) == 4
    if "x-val-0" not in names:
        with pytest.raises(ValueError, match="no shards for"):
            open_splits(f"wds/{tmp_path}")
