"""A run's classes are known by their names: what is measured, gone on with, started from and shared follows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from karat import runs
from karat.analyze.loading import open_run
from karat.data.splits import DataOptions, load_data
from karat.runs.files import write_json
from karat.runs.model import class_names
from karat.share.hub.runs import from_run
from karat.train.classify import Classification, train
from karat.train.convert import Convert, convert_run
from karat.train.engine import Trainer
from karat.train.measure import evaluate_run
from support.training import tiny

COLOURS = {"cat": (255, 0, 0), "dog": (0, 255, 0), "owl": (0, 0, 255), "Cat": (255, 0, 0), "emu": (9, 9, 9)}


def folder(root: Path, names: Sequence[str], parts: Sequence[str] = ("train", "val")) -> Path:
    """A folder of plain coloured pictures: what the name of a class says is what its images show."""
    for part in parts:
        for name in names:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(4):
                Image.new("RGB", (8, 8), COLOURS[name]).save(root / part / name / f"{i}.png")
    return root


def settings(output: Path, data: Path, **values: Any) -> Any:
    sizes = {"data": str(data), "data_fraction": 1.0, "batch_size": 4, "epochs": 1, "warmup_epochs": 0, "depth": 1}
    return tiny(output, **{**sizes, **values})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    folder(root / "d", ["cat", "dog", "owl"])
    train(settings(root / "r", root / "d", epochs=25, lr=0.02))
    assert evaluate_run(root / "r")["top1"] == 100
    return root / "r"


@pytest.mark.parametrize("names", [["owl"], ["cat", "owl"], ["owl", "dog"]], ids="-".join)
def test_fewer_classes_are_measured_by_name(finished: Path, tmp_path: Path, names: list[str]) -> None:
    folder(tmp_path, names)
    for data in (tmp_path, tmp_path / "val"):
        assert evaluate_run(finished, data=str(data))["top1"] == 100


def test_classes_in_another_order_are_measured_by_name(finished: Path, tmp_path: Path) -> None:
    names = ["owl", "cat", "dog"]
    pictures = [{"bytes": next((folder(tmp_path / "f", [n]) / "val" / n).iterdir()).read_bytes()} for n in names]
    pq.write_table(pa.table({"image": pictures, "label": names}), tmp_path / "test.parquet")
    meta = json.dumps(
        {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
    )
    table = pa.table({"image": pictures, "label": [0, 1, 2]}).replace_schema_metadata({"huggingface": meta})
    (tmp_path / "declared").mkdir()
    pq.write_table(table, tmp_path / "declared" / "test.parquet")
    for data in (tmp_path / "declared", tmp_path):
        assert evaluate_run(finished, data=str(data))["top1"] == 100


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "emu"], r"has the class 'emu', which the model lacks \(cat, dog, owl\)"),
        (["Cat", "dog"], "has the class 'Cat', which the model lacks .*'cat' is written otherwise than 'Cat'"),
    ],
)
def test_a_class_that_the_model_lacks_is_refused(
    finished: Path, tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_run(finished, data=str(folder(tmp_path, names)))


def test_other_data_is_measured_whole_whatever_the_run_held_out(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", ["cat", "dog", "owl"])
    train(settings(tmp_path / "r", data, held_out=5, data_fraction=0.9))
    measured = [evaluate_run(tmp_path / "r", data=other)["images"] for other in (None, str(data), str(data / "val"))]
    assert measured == [4, 12, 12]


def test_numbers_are_no_names(finished: Path, tmp_path: Path) -> None:
    pictures = [{"bytes": (folder(tmp_path / "f", ["cat"]) / "val/cat/0.png").read_bytes()}] * 2
    pq.write_table(pa.table({"image": pictures, "label": [0, 1]}), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="has the class '0', which the model lacks"):
        evaluate_run(finished, data=str(tmp_path))


def test_what_is_looked_at_has_the_runs_names(finished: Path, tmp_path: Path) -> None:
    data = folder(tmp_path / "d", ["cat", "dog", "owl"])
    train(settings(tmp_path / "r", data))
    for part in ("train", "val"):
        (data / part / "emu").mkdir()
        (data / part / "cat" / "0.png").rename(data / part / "emu" / "0.png")
        (data / part / "cat" / "1.png").unlink()
    run = open_run(tmp_path / "r")
    with pytest.raises(ValueError, match="has the class 'emu', which the model lacks"):
        run.samples(9)
    for part in ("train", "val"):
        for file in ("2.png", "3.png"):
            (data / part / "cat" / file).unlink()
        (data / part / "emu" / "0.png").unlink()
    samples = open_run(tmp_path / "r").samples(8)  # without cat and emu, dog is still the second
    assert samples.class_names == ("cat", "dog", "owl")
    assert sorted(samples.labels.tolist()) == [1] * 4 + [2] * 4


CHANGES = {
    "renamed": (("dog", "emu"), "dog gone, emu new"),
    "case": (("cat", "Cat"), "'cat' is written otherwise than 'Cat'"),
    "removed": (("owl", None), "owl gone"),
    "added": ((None, "emu"), "emu new"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_other_classes(tmp_path: Path, change: str) -> None:
    (old, new), message = CHANGES[change]
    data = folder(tmp_path / "d", ["cat", "dog", "owl"])
    train(settings(tmp_path / "r", data))
    Trainer(Classification(), settings(tmp_path / "r", data, resume="auto"))
    for part in ("train", "val"):
        if old is not None:
            (data / part / old).rename(tmp_path / f"{part}-gone" if new is None else data / part / new)
        elif new is not None:
            folder(data, [new], [part])
    with pytest.raises(ValueError, match=rf"can't go on: the data's classes have changed \(.*{message}"):
        Trainer(Classification(), settings(tmp_path / "r", data, resume="auto"))


def test_a_run_does_not_go_on_with_classes_in_another_order(finished: Path, tmp_path: Path) -> None:
    data = folder(tmp_path / "d", ["cat", "dog", "owl"])
    train(settings(tmp_path / "r", data))
    config = json.loads((tmp_path / "r" / runs.CONFIG).read_text())
    write_json(tmp_path / "r" / runs.CONFIG, config | {"class_names": ["dog", "cat", "owl"]})
    with pytest.raises(ValueError, match="cat, dog in another order"):
        Trainer(Classification(), settings(tmp_path / "r", data, resume="auto"))


def test_a_run_that_goes_on_with_other_images_says_so(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", ["cat", "dog", "owl"])
    train(settings(tmp_path / "r", data))
    before = json.loads((tmp_path / "r" / runs.CONFIG).read_text())["train_images"]
    assert not [
        n for n in Trainer(Classification(), settings(tmp_path / "r", data, resume="auto")).notes if "began" in n
    ]
    (data / "train" / "cat" / "0.png").unlink()
    (said,) = [
        n for n in Trainer(Classification(), settings(tmp_path / "r", data, resume="auto")).notes if "began" in n
    ]
    assert f"began with {before} training images, there are {before - 1} now" in said


@pytest.mark.parametrize(
    ("names", "fates"), [(["cat", "dog", "owl"], {"loaded"}), (["cat", "dog", "emu"], {"fresh", "dropped"})]
)
@pytest.mark.parametrize("source", ["", "model.safetensors"])
def test_a_head_goes_over_where_its_classes_do(
    finished: Path, tmp_path: Path, names: list[str], fates: set[str], source: str
) -> None:
    init = finished / source
    train(settings(tmp_path / "r", folder(tmp_path / "d", names), init=str(init)))
    entries = [
        entry for entry in json.loads((tmp_path / "r" / runs.CONFIG).read_text())["init"] if entry["part"] == "head"
    ]
    assert {entry["fate"] for entry in entries} == fates
    if "fresh" in fates:
        assert f"{init} has the classes cat, dog, owl, the data cat, dog, emu" in {entry["why"] for entry in entries}


def test_a_converted_run_has_its_teachers_classes(finished: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"images": 4, "eval_images": 4, "batch_size": 4, "device": "cpu"}
    few = folder(tmp_path / "few", ["dog", "owl"])
    report = convert_run(Convert(str(finished), data=str(few), output=tmp_path / "c", **values))
    assert report["before"]["top1"] == 100
    assert class_names(runs.read_config(tmp_path / "c")[1]) == ("cat", "dog", "owl")
    with pytest.raises(ValueError, match="has the class 'emu', which the model lacks"):
        convert_run(
            Convert(str(finished), data=str(folder(tmp_path / "o", ["dog", "emu"])), output=tmp_path / "x", **values)
        )


def test_a_saved_model_has_the_names_there_are(tmp_path: Path) -> None:
    train(settings(tmp_path / "r", folder(tmp_path / "d", ["cat", "dog"]), num_classes=4))
    assert from_run(tmp_path / "r").config.class_names == ("cat", "dog", "2", "3")


def test_data_in_the_order_of_given_classes(tmp_path: Path) -> None:
    data = folder(tmp_path, ["cat", "owl"])
    recipe = tiny(tmp_path / "r").recipe
    loaded = load_data(DataOptions(str(data), recipe.augmentation, 4, 8, classes=("owl", "emu", "cat")))
    assert (loaded.num_classes, loaded.class_names) == (3, ("owl", "emu", "cat"))
    for loader in (loaded.train, loaded.eval):
        for images, labels in loader:
            red = images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2))
            assert np.array_equal(labels.numpy(), np.where(red.numpy(), 2, 0))
