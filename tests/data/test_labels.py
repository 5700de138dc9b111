"""Which class is which: labels by the names of their own file, brought together by names, or refused."""

import datetime
import json
import tarfile
from io import BytesIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from karat.data import labels
from karat.data.sources import Record, size_of
from karat.data.splits import open_splits


def encoded(seed: int = 0) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.full((4, 4, 3), seed, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write(path, values, names=None):
    """A parquet file of these labels; `names` declares classes in its schema, as the datasets library does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if names is not None:
        feature = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        rows = {"image": [{"bytes": encoded(), "path": None}] * len(values), "label": values}
        datasets.Dataset.from_dict(rows, features=datasets.Features(feature)).to_parquet(str(path))
        return
    images = pa.array([{"bytes": encoded(), "path": None}] * len(values))
    column = values if isinstance(values, pa.Array) else pa.array(values)
    pq.write_table(pa.table({"image": images, "label": column}), path)


def write_shard(path, parts):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(parts):
            for part, content in {"png": encoded(), **sample}.items():
                member = tarfile.TarInfo(f"{i:04d}.{part}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def named(splits, part="eval"):
    """The class names of a part's labels, row by row."""
    source = getattr(splits, part)
    if hasattr(source, "records"):
        found = [record.label for _, record in source.records(seed=0, rank=0, world_size=1)]
    else:
        found = [source[i].label for i in range(len(source))]
        assert found == source.labels.tolist()
    return [splits.class_names[label] for label in found]


GOOD = {  # what a column holds -> (classes, the first two rows' names)
    "numbers": (pa.array([2, 0, 1]), ("0", "1", "2"), ["2", "0"]),
    "whole floats": (pa.array([1.0, 0.0, -0.0]), ("0", "1"), ["1", "0"]),
    "half floats": (pa.array(np.array([1, 0, 0], np.float16)), ("0", "1"), ["1", "0"]),
    "unsigned": (pa.array([1, 0, 0], pa.uint64()), ("0", "1"), ["1", "0"]),
    "booleans": (pa.array([True, False, True]), ("False", "True"), ["True", "False"]),
    "text": (pa.array(["owl", "cat", "cat"]), ("cat", "owl"), ["owl", "cat"]),
    "bytes": (pa.array([b"owl", b"cat", b"cat"]), ("cat", "owl"), ["owl", "cat"]),
    "categories": (pa.array(["owl", "cat", "cat"]).dictionary_encode(), ("cat", "owl"), ["owl", "cat"]),
    "case": (pa.array(["cat", "Cat", "cat"]), ("Cat", "cat"), ["cat", "Cat"]),
    "Unicode forms": (pa.array(["caf\u00e9", "cafe\u0301"]), ("cafe\u0301", "caf\u00e9"), ["caf\u00e9", "cafe\u0301"]),
}


@pytest.mark.parametrize("kind", GOOD)
def test_columns_that_name_classes(kind):
    column, classes, first = GOOD[kind]
    for values in (column, pa.chunked_array([column[:1], column[1:]])):
        read = labels.read_column(values, None, str)
        assert read.classes == classes
        assert [read.names[code] for code in read.codes][:2] == first


BAD = {
    "null": (pa.array(["cat", None]), "row 1 has no label"),
    "all null": (pa.array([None, None]), "row 0 has no label"),
    "null number": (pa.array([1, None]), "row 1 has no label"),
    "nan": (pa.array([1.0, float("nan")]), "row 1 has no label"),
    "empty": (pa.array(["cat", ""]), "row 1 has no label"),
    "fraction": (pa.array([1.0, 0.5]), "row 1 has the label 0.5"),
    "infinite": (pa.array([1.0, float("inf")]), "row 1 has the label inf"),
    "negative": (pa.array([0, -1]), "row 1 has label -1: it is not labelled"),
    "identifiers": (pa.array([0, 10**12]), "row 1 has label 1000000000000"),
    "lists": (pa.array([[0, 1], [1]]), r"row 0 has the label \[0, 1\]"),
    "records": (pa.array([{"name": "cat"}]), "row 0 has the label {'name': 'cat'}"),
    "dates": (pa.array([datetime.date(2026, 1, 2)]), "row 0 has the label datetime.date"),
    "no text": (pa.array([b"\xff\xfe"]), "row 0 has a label of bytes that are no text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_columns_that_do_not(kind):
    column, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        labels.read_column(column, None, "row {}".format)


def test_numbers_beyond_the_names_of_their_file(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 has label 2, but its file names 2 classes \(cat, owl\)"):
        labels.read_column(pa.array([0, 2]), ("cat", "owl"), "row {}".format)


@pytest.mark.parametrize("prefix", ["", "hfds/", "hfids/"])
def test_parts_that_lack_or_add_a_class(tmp_path, prefix):
    for index, few in enumerate((["owl", "cat"], ["owl", "cat", "emu"])):
        root = tmp_path / str(index)
        write(root / "train.parquet", ["cat", "dog", "owl"] * 2)
        write(root / "test.parquet", few)
    splits = open_splits(f"{prefix}{tmp_path / '0'}")
    assert splits.class_names == ("cat", "dog", "owl")
    assert named(splits) == ["owl", "cat"]
    assert sorted(named(splits, "train")) == sorted(["cat", "dog", "owl"] * 2)
    with pytest.raises(ValueError, match="has the class 'emu', which training lacks"):
        open_splits(f"{prefix}{tmp_path / '1'}")


@pytest.mark.parametrize("prefix", ["", "hfids/"])
def test_files_that_number_their_classes_differently(tmp_path, prefix):
    write(tmp_path / "train.parquet", [0, 1, 2], ["cat", "dog", "owl"])
    write(tmp_path / "test.parquet", [0, 1, 1], ["owl", "cat"])
    splits = open_splits(f"{prefix}{tmp_path}")
    assert splits.class_names == ("cat", "dog", "owl")
    assert named(splits) == ["owl", "cat", "cat"]


def test_files_of_one_part_that_number_their_classes_differently(tmp_path):
    write(tmp_path / "train-0.parquet", [0, 1], ["cat", "dog"])
    write(tmp_path / "train-1.parquet", [0, 1, 2], ["dog", "cat", "owl"])
    write(tmp_path / "train-2.parquet", ["owl", "emu"])
    write(tmp_path / "test.parquet", ["emu", "dog"])
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ("cat", "dog", "owl", "emu")
    assert named(splits, "train") == ["cat", "dog", "dog", "cat", "owl", "owl", "emu"]
    assert named(splits) == ["emu", "dog"]
    with pytest.raises(ValueError, match="number their classes differently"):
        open_splits(f"hfids/{tmp_path}")


@pytest.mark.parametrize("part", ["train-1.parquet", "test.parquet"])
def test_numbers_beside_names_cannot_be_told(tmp_path, part):
    write(tmp_path / "train-0.parquet", [0, 1], ["cat", "dog"])
    write(tmp_path / part, [0, 1])
    with pytest.raises(ValueError, match=r"numbers its classes and|has the class '0', which training lacks"):
        open_splits(str(tmp_path))


@pytest.mark.parametrize("prefix", ["hfds/", "hfids/"])
@pytest.mark.parametrize("feature", [datasets.Value("string"), datasets.ClassLabel(names=["owl", "cat"])])
def test_sets_that_were_saved_to_disk(tmp_path, prefix, feature):
    features = datasets.Features({"image": datasets.Image(), "label": feature})

    def part(*names):
        values = list(names) if isinstance(feature, datasets.Value) else [feature.str2int(name) for name in names]
        rows = {"image": [{"bytes": encoded(), "path": None}] * len(names), "label": values}
        return datasets.Dataset.from_dict(rows, features=features)

    saved = datasets.DatasetDict(train=part("cat", "owl", "cat"), test=part("owl", "owl"), train_2=part("cat"))
    saved.save_to_disk(tmp_path / "d")
    splits = open_splits(f"{prefix}{tmp_path / 'd'}")
    assert named(splits) == ["owl", "owl"]
    assert sorted(named(splits, "train")) == ["cat", "cat", "owl"]
    assert splits.found.endswith("trained on train, evaluated on test; not used: train_2")
    datasets.DatasetDict(train=part(*["cat", "owl"] * 10)).save_to_disk(tmp_path / "alone")
    whole = open_splits(f"{prefix}{tmp_path / 'alone'}", whole=True)
    assert (size_of(whole.train), size_of(whole.eval), named(whole)) == (20, 20, ["cat", "owl"] * 10)


def test_folders_whose_parts_name_classes_in_another_form(tmp_path):
    for part, names in (("train", ("Cat", "caf\u00e9")), ("val", ("Cat", "cafe\u0301"))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(encoded())
    with pytest.raises(ValueError, match=r"'caf\\xe9' is written otherwise than 'cafe\\u0301'"):
        open_splits(str(tmp_path))


TEXTS = {
    "cls": lambda name: {"cls": f"{name}\n".encode()},
    "txt": lambda name: {"txt": name.encode()},
    "json": lambda name: {"json": json.dumps({"id": 1, "label": name}).encode()},
    "cls beside json": lambda name: {"json": b'{"width": 4}', "cls": name.encode()},
}


@pytest.mark.parametrize("kind", TEXTS)
def test_shards_whose_classes_are_text(tmp_path, kind):
    text = TEXTS[kind]
    write_shard(tmp_path / "x-train-0.tar", [text(name) for name in ("cat", "dog", "owl", "dog")])
    write_shard(tmp_path / "x-val-0.tar", [text(name) for name in ("owl", "cat")])
    splits = open_splits(f"wds/{tmp_path}")
    assert splits.class_names == ("cat", "dog", "owl")
    assert named(splits) == ["owl", "cat"]
    write_shard(tmp_path / "x-val-0.tar", [text(name) for name in ("owl", "emu")])
    with pytest.raises(ValueError, match="has the class 'emu', which training lacks"):
        open_splits(f"wds/{tmp_path}")


@pytest.mark.parametrize("names", [("01", "02"), ("3000000", "3000001"), ("٣", "٤")])
def test_digits_that_are_no_classs_number_are_its_name(tmp_path, names):
    for part in ("train", "val"):
        write_shard(tmp_path / f"x-{part}-0.tar", [TEXTS["json"](name) for name in names])
    splits = open_splits(f"wds/{tmp_path}")
    assert splits.class_names == names
    assert named(splits) == list(names)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"cls": b"0"}, {}], r"x-train-0\.tar: sample 0001 has no label \(\.cls\)"),
        ([{"cls": b"0"}, {"cls": b" "}], "sample 0001 has no label"),
        ([{"cls": b"0"}, {"cls": b"-1"}], "sample 0001 has label -1"),
        ([{"cls": b"0"}, {"cls": b"\xff"}], r"sample 0001 has a \.cls that cannot be read"),
        ([{}, {}], r"have no label \(\.cls, \.txt or \.json\), only \.png"),
        ([{"json": b'{"label": 0}'}, {"json": b'{"label": [0, 1]}'}], r"sample 0001 has the label \[0, 1\]"),
        ([{"json": b'{"label": 0}'}, {"json": b'{"name": 0}'}], r"sample 0001 has a \.json without label"),
        ([{"json": b'{"label": 0}'}, {"json": b"{"}], r"sample 0001 has a \.json that cannot be read"),
        ([{"txt": b"a cat"}, {"txt": b"a dog"}, {"txt": b"an owl"}], "captions"),
    ],
)
def test_samples_without_a_class_are_named(tmp_path, samples, message):
    write_shard(tmp_path / "x-train-0.tar", samples)
    write_shard(tmp_path / "x-val-0.tar", [{"cls": b"0", "txt": b"0", "json": b"0"}])
    with pytest.raises(ValueError, match=message):
        open_splits(f"wds/{tmp_path}")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (("cat", "owl", "zebra"), "dog gone, zebra new"),
        (("dog", "cat", "owl"), "dog, cat in another order"),
        (("cat", "dog"), "owl gone"),
        (("cat", "dog", "emu", "owl"), "emu new"),
        (("cat", "Dog", "owl"), "dog gone, Dog new; 'dog' is written otherwise than 'Dog'"),
    ],
)
def test_classes_that_changed_under_a_run_are_named(now, message):
    labels.check_unchanged(("cat", "dog", "owl"), ["cat", "dog", "owl"], "r")
    with pytest.raises(ValueError, match=message):
        labels.check_unchanged(("cat", "dog", "owl"), now, "r")


def test_a_name_that_two_classes_have_cannot_be_told():
    assert labels.positions(("crane", "crane"), ("crane", "crane"), "x").tolist() == [0, 1]
    with pytest.raises(ValueError, match="has two of that name"):
        labels.positions(("crane",), ("crane", "emu", "crane"), "x")


def test_a_source_need_not_know_that_its_classes_are_numbered_anew():
    class Pets:
        """Records whose labels are not read from `labels`."""

        labels = np.array([0, 1, 1])

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Record(None, (0, 1, 1)[index], f"pet {index}")

    found = labels.relabel(Pets(), ["cat", "dog"], ["dog", "owl", "cat"], "pets", "the model")
    assert [record.label for record in found] == found.labels.tolist() == [2, 0, 0]
    same = Pets()
    assert labels.relabel(same, ["cat", "dog"], ["cat", "dog"], "pets", "the model") is same
