"""`karat hub` and `karat predict`: a run becomes a folder, a folder answers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import karat
from karat import runs
from karat.cli import main
from karat.errors import parse
from karat.runs.classification import Settings, resolve
from karat.runs.settings import NOT_TOLD
from karat.share.hub.predict import probabilities, read
from karat.share.hub.runs import open_model, train_command
from karat.train.commands import defaults


@pytest.fixture(scope="module")
def folder(karat_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hub") / "saved"
    assert main(["hub", str(karat_run), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{name}.png" for name in ("small", "wide", "grey")]
    torch.manual_seed(1)
    for path, size, mode in zip(paths, ((8, 8), (40, 20), (9, 9)), ("RGB", "RGB", "L"), strict=True):
        noise = (torch.rand(size[1], size[0], 3) * 255).byte().numpy()
        Image.fromarray(noise).convert(mode).save(path)
    return paths


def test_the_saved_run_is_the_run(karat_run: Path, folder: Path) -> None:
    saved, run = karat.from_pretrained(folder), open_model(karat_run)
    _, facts = runs.read_config(karat_run)
    assert saved.config.class_names == tuple(facts["class_names"])
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(saved(x), run(x))
    assert saved.config.training["versions"] == facts["versions"]


@pytest.mark.parametrize("weights", ["last", "best", "ema"])
def test_weights_and_their_accuracy(weights: str, karat_run: Path, tmp_path: Path) -> None:
    assert main(["hub", str(karat_run), "--output", str(tmp_path / "s"), "--weights", weights]) == 0
    model = karat.from_pretrained(tmp_path / "s")
    history = runs.read_history(karat_run)
    line = max(history, key=lambda line: line["top1"]) if weights == "best" else history[-1]
    found = model.config.training["results"]["top1"]
    assert found == line["ema_top1" if weights == "ema" else "top1"]


def test_the_card_says_what_the_run_was(karat_run: Path, folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    last = runs.read_history(karat_run)[-1]
    assert card.data.library_name == "karat"
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics["top1"] == pytest.approx(last["top1"], abs=1e-3)
    for words in (
        f"top-1 | {last['top1']:.2f} %",
        "g2b,rank=3",
        "karat train --recipe",
        f"torch {torch.__version__[:4]}",
    ):
        assert words in card.text
    assert "{{" not in card.text
    assert str(karat_run) not in card.text + (folder / "config.json").read_text()  # no folder of this machine


def test_overwriting_writes_the_card_anew(karat_run: Path, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    shutil.copytree(folder, target)
    (target / "README.md").write_text("of another model")
    (target / "more.txt").write_text("mine")
    assert main(["hub", str(karat_run), "--output", str(target), "--overwrite"]) == 0
    assert (target / "README.md").read_text() == (folder / "README.md").read_text()
    assert {path.name for path in target.iterdir()} == {path.name for path in folder.iterdir()} | {"more.txt"}


def test_the_cards_command_repeats_the_settings(karat_run: Path) -> None:
    settings, _ = runs.read_config(karat_run)
    wild = Settings.make(
        attention="bspline(grid=4,order=2)-u,residual=softmax",
        mlp="kan(grid=3)",
        data="torch/cifar10",
        compile=True,
        recipe="vit",
        scale=(0.2, 0.9),
        model_ema_decay=None,
        aa=None,
        layer_decay=0.7,
    )
    for each in (settings, wild):
        words = shlex.split(train_command(each))
        assert words[:2] == ["karat", "train"]
        import tyro

        again = resolve(parse(lambda w=words: tyro.cli(Settings, args=w[2:], default=defaults(w[2:])), "karat train"))
        kept = {name: value for name, value in each.as_dict().items() if name not in NOT_TOLD - {"recipe"}}
        assert {name: again.as_dict()[name] for name in kept} == kept


def test_predict_names_classes(
    karat_run: Path, folder: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = karat.from_pretrained(folder)
    expected = model.predict(pictures)
    assert expected.shape == (3, 10)
    assert torch.allclose(expected.sum(1), torch.ones(3))
    for one in (pictures[0], str(pictures[0]), Image.open(pictures[0])):
        torch.testing.assert_close(model.predict(one), expected[:1])
    for where in (karat_run, folder):
        assert main(["predict", str(where), *map(str, pictures), "--json", "--top", "3"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["image"] for line in lines] == list(map(str, pictures))
        for line, row in zip(lines, expected, strict=True):
            values, indices = row.topk(3)
            assert [each["name"] for each in line["classes"]] == [model.config.class_names[i] for i in indices]
            assert [each["probability"] for each in line["classes"]] == pytest.approx(values.tolist())
    assert main(["predict", str(folder), str(pictures[0]), "--top", "1"]) == 0
    best = int(expected[0].argmax())
    assert capsys.readouterr().out == f"{pictures[0]}: {best} {100 * expected[0, best]:.2f} %\n"


def test_images_are_seen_as_in_evaluation(karat_run: Path) -> None:
    """A digit through the front door is the tensor that evaluation has."""
    from karat.analyze.loading import open_run

    samples = open_run(karat_run).samples(4)
    model = open_model(karat_run)
    pixels = [Image.fromarray((p[..., 0] * 255).round().byte().numpy()) for p in samples.pixels]
    seen = torch.stack([read(picture, model.config) for picture in pixels])
    assert torch.allclose(seen, samples.images, atol=1e-6)
    assert torch.allclose(probabilities(model, list(seen)), model(samples.images).softmax(-1), atol=1e-5)


def test_a_rectangle_is_fitted(pictures: list[Path]) -> None:
    config = karat.KArAtModel.create("vit_tiny_patch16_224", img_size=(16, 32), depth=1, crop_pct=0.5).config
    assert read(pictures[1], config).shape == (3, 16, 32)


def test_bad_images_are_one_line_and_the_others_are_answered(
    folder: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(pictures[0].read_bytes()[:60])
    absent = tmp_path / "absent.png"
    assert main(["predict", str(folder), str(torn), str(pictures[0]), str(absent)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert str(torn) in said.err
    assert f"{absent} is not there" in said.err
    assert said.out.startswith(str(pictures[0]))


REFUSED: dict[str, str] = {
    "hub EMPTY": "is no run's folder",
    "hub SAVED": "is a saved model already",
    "hub RUN --output SAVED": "is there already",
    "hub RUN --output RUN --overwrite": "is there already",
    "hub RUN --weights nope": "--weights",
    "predict SAVED": "image",
    "predict SAVED x.png --top 0": "--top=0",
    "predict SAVED x.png --device tpu": "--device tpu",
    "predict SAVED x.png --weights ema": "has one set of weights only",
    "predict EMPTY x.png": "has no config.json",
}


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_is_one_line_and_status_2(
    line: str, karat_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": karat_run, "SAVED": folder, "EMPTY": tmp_path}
    words = [str(places.get(word, word)) for word in line.split()]
    before = {path: path.stat().st_mtime_ns for path in (*karat_run.iterdir(), *folder.iterdir())}
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert REFUSED[line] in error
    assert before == {path: path.stat().st_mtime_ns for path in (*karat_run.iterdir(), *folder.iterdir())}


def test_push_names_the_repository(karat_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Repo:
        repo_id = "me/digits"

    def create(self: Any, name: str, **kwargs: Any) -> type[Repo]:
        seen.update(kwargs, name=name)
        return Repo

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **kwargs: seen.update(kwargs))
    line = ["hub", str(karat_run), "--output", str(tmp_path / "s"), "--push", "me/digits", "--private"]
    assert main(line) == 0
    assert (seen["name"], seen["repo_id"], seen["private"]) == ("me/digits", "me/digits", True)
    assert re.search(r'from_pretrained\("me/digits"\)', (tmp_path / "s" / "README.md").read_text())


def test_a_refused_upload_is_one_line(karat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # tests run offline: huggingface_hub itself refuses
    assert main(["hub", str(karat_run), "--output", str(tmp_path / "s"), "--push", "me/digits"]) == 2
    assert "could not be uploaded to me/digits" in capsys.readouterr().err
    assert karat.from_pretrained(tmp_path / "s").config.num_classes == 10  # the folder is there all the same
