"""One door for weights: what may be named, what is known of it, and what is refused in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import karat
from karat.runs import files
from karat.runs.model import load_run
from karat.runs.weights import Given, mlp_of, open_weights
from support.training import tiny

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = karat.KArAtModel.create("vit_tiny_patch16_224", "g3b", "kan", class_names=("cat", "dog"), **SIZES)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from karat.train.classify import train

    folder = tmp_path_factory.mktemp("run") / "run"
    train(tiny(folder, attention="g1b,rank=2", epochs=1, model_ema_decay=0.9))
    return folder


def facts(given: Given) -> tuple[str | None, str | None, int]:
    return given.attention, given.mlp, len(given.class_names)


def test_a_saved_model_is_known_by_folder_file_or_a_copy(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copy(saved / "model.safetensors", copy)
    state = torch.get_rng_state()
    for name in (saved, saved / "model.safetensors", copy):
        given = open_weights(str(name))
        assert facts(given) == ("g3b", "kan", 2)
        assert (given.model is None) == (name == copy)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_is_known_by_each_of_its_files(run: Path) -> None:
    places = [run, run / "model.safetensors", run / "ema.safetensors"]
    places += sorted(run.glob("checkpoints/*/*.safetensors"))[:1]
    for name in places:
        assert facts(open_weights(str(name))) == ("g1b,rank=2", "mlp", 10)
    assert open_weights(str(run), "ema").model is not None


def test_of_changed_weights_only_the_configuration_is_known(saved: Path, run: Path, tmp_path: Path) -> None:
    for folder in (saved, run):
        target = tmp_path / folder.name
        shutil.copytree(folder, target)
        save_file({"x": torch.zeros(2)}, target / "model.safetensors")
        given = open_weights(str(target / "model.safetensors"))
        assert given.attention == open_weights(str(folder)).attention
        assert given.model is None
        save_file({"x": torch.zeros(2)}, target / "another.safetensors")
        assert open_weights(str(target / "another.safetensors")).attention is None


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        save_file({name: torch.full((2,), float(number))}, tmp_path / f"{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"a": "0.safetensors", "b": "1.safetensors"}
    files.write_json(index, {"metadata": {"attention": "g3b"}, "weight_map": places})
    for name in (index, tmp_path):
        given = open_weights(str(name))
        assert sorted(given.weights) == ["a", "b"]
        assert given.attention == "g3b"
    for wrong, words in (
        ({"c": "0.safetensors"}, "doesn't have"),
        ({"a": "../0.safetensors"}, "beside it"),
        ({"a": "9.safetensors"}, "not there"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=words):
            open_weights(str(index))


def _pickle(path: Path) -> None:
    torch.save({"model": {"x": torch.zeros(2)}}, path)


def _old_pickle(path: Path) -> None:
    torch.save({"x": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


def _short(path: Path) -> None:
    save_file({"x": torch.zeros(200)}, path)
    path.write_bytes(path.read_bytes()[:150])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "x.pth": (_pickle, "pickle.*convert"),
    "x.safetensors": (_pickle, "pickle.*convert"),
    "old.safetensors": (_old_pickle, "pickle.*convert"),
    "pytorch_model.bin": (lambda path: path.write_bytes(b"anything"), "pickle.*convert"),
    "short.safetensors": (_short, "not a whole safetensors file"),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
    "text.safetensors": (lambda path: path.write_text("version https://git-lfs"), "not a whole safetensors file"),
    "folder": (lambda path: path.mkdir(), "no run's and no saved model's folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_weights_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=words) as caught:
        open_weights(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_folder_of_a_pickle_and_nothing_are_refused(tmp_path: Path) -> None:
    _pickle(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        open_weights(str(tmp_path))
    with pytest.raises(ValueError, match="no such run or file"):
        open_weights(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"hub:no_such_model.*network"):
        open_weights("hub:no_such_model")


def test_a_file_where_a_run_or_a_saved_model_is_needed(saved: Path, tmp_path: Path) -> None:
    _pickle(tmp_path / "x.pth")
    for name, words in ((tmp_path / "x.pth", "pickle"), (saved / "model.safetensors", "is a file")):
        for take in (load_run, karat.from_pretrained):
            with pytest.raises(ValueError, match=words):
                take(name)
    with pytest.raises(ValueError, match="is a saved model"):
        load_run(saved)


def test_mlps_by_their_names() -> None:
    assert mlp_of("deep_kan(order=5)", "mlp") == "deep_kan(order=5)"
    assert mlp_of("vit_kan_tiny_patch16_224", "mlp") == "kan"
