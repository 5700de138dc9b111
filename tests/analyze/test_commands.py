"""`karat analyze` and `karat report` on real runs: every figure in every format, one page that asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from karat.analyze.analyses import ANALYSES, analysis_of
from karat.analyze.analysis import as_json
from karat.analyze.commands import What
from karat.analyze.loading import open_run
from karat.analyze.report import SECTIONS
from karat.analyze.subject import Options, open_subjects
from karat.cli import main
from support.paths import ROOT

QUICK = "--images 2 --points 3 --samples 8 --eigenvalues 1 --probes 2 --hessian-samples 2"
FIGURES = {
    "curves": {"curves"},
    "cost": {"cost"},
    "attention": {f"{kind}-{run}" for kind in ("maps", "matrices", "heads") for run in ("RUN", "softmax")}
    | {"regions"},
    "spectrum": {"spectrum"},
    "functions": {"functions-RUN", "coefficients-RUN"},
    "parts": {"parts-RUN"},
    "ablation": {"ablation"},
    "averaging": {"averaging"},
    "landscape": {"surface", "contours"},
    "hessian": {"curvature"},
}
ELSEWHERE = {"weights", "sweep", "peers"}  # tests of their own: they want other runs
STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image file with a bright square, another size than the model's."""
    path = tmp_path_factory.mktemp("images") / "square.png"
    array = np.zeros((20, 30), np.uint8)
    array[4:12, 6:16] = 255
    Image.fromarray(array).save(path)
    return path


def test_the_pictures_of_every_analysis_are_known() -> None:
    assert set(FIGURES) | ELSEWHERE == set(ANALYSES), "say in FIGURES which pictures an analysis draws"


@pytest.mark.parametrize("what", FIGURES)
def test_every_figure_in_every_format(what: str, karat_run: Path, softmax_run: Path, tmp_path: Path) -> None:
    formats = "png svg pdf" if what == "curves" else "svg"
    extra = "--directions random" if what == "landscape" else ""  # the softmax run kept no path
    line = f"analyze {what} {karat_run} {softmax_run} --formats {formats} --output {tmp_path} {QUICK} {extra}"
    assert main(line.split()) == 0
    names = {name.replace("RUN", "g2b-rank=3") for name in FIGURES[what]}
    for form in formats.split():
        assert {path.stem for path in tmp_path.glob(f"*.{form}")} == names
        assert all(path.read_bytes().startswith(STARTS[form]) for path in tmp_path.glob(f"*.{form}"))
    numbers = json.loads((tmp_path / "numbers.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert "g2b,rank=3" in numbers


def test_results_go_to_the_runs_folder_and_arrays_are_those_of_the_model(karat_run: Path) -> None:
    assert main(f"analyze attention {karat_run} {QUICK}".split()) == 0
    arrays = np.load(karat_run / "analysis" / "attention" / "arrays.npz")
    (subject,) = open_subjects([karat_run], Options(images=2))
    np.testing.assert_array_equal(arrays["g2b-rank=3/sigma"], subject.attention[-1].sigma.numpy())
    assert np.allclose(arrays["g2b-rank=3/rollout"].sum(-1), 1, atol=1e-5)


def test_a_landscape_goes_on_where_it_stopped(karat_run: Path, tmp_path: Path) -> None:
    line = f"analyze landscape {karat_run} --output {tmp_path} {QUICK} --samples 9".split()
    before = set((karat_run / "analysis").glob("landscape-*.jsonl"))
    assert main(line) == 0
    (cache,) = set((karat_run / "analysis").glob("landscape-*.jsonl")) - before
    points = cache.read_text().splitlines()
    assert len(points) == 9
    planted = [json.dumps([*json.loads(point)[:2], 0.25, 50.0]) for point in points[:5]]
    cache.write_text("\n".join(planted) + "\n")
    assert main(line) == 0
    assert (np.load(tmp_path / "arrays.npz")["g2b-rank=3/loss"] == 0.25).sum() == 5
    numbers = json.loads((tmp_path / "numbers.json").read_text())["g2b,rank=3"]
    assert len(numbers["distance_from_plane"]) == len(numbers["loss_below_path"]) == 3
    assert numbers["loss_below_path"][-1] == pytest.approx(numbers["loss"], abs=1e-6)


def test_weights_and_a_comparisons_folder(karat_run: Path, softmax_run: Path, tmp_path: Path) -> None:
    """A comparison stands for its runs, in its order."""
    shutil.copytree(karat_run, tmp_path / "b")
    shutil.copytree(karat_run, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["settings"]["attention"] = "g4b,rank=3"  # for the sweep, which reads settings and results alone
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    rows = [{"runs": ["elsewhere/b"]}, {"runs": ["elsewhere/a"]}]
    (tmp_path / "compare.json").write_text(json.dumps({"rows": rows}))
    assert main(f"analyze sweep {tmp_path} {softmax_run}".split()) == 0
    numbers = json.loads((tmp_path / "analysis" / "sweep" / "numbers.json").read_text())
    assert (numbers["setting"], numbers["values"]) == ("grid", [2, 4])
    assert set(numbers["reference"]) == {"softmax"}
    assert main(f"analyze weights {tmp_path / 'b'}".split()) == 0
    moved = json.loads((tmp_path / "b" / "analysis" / "weights" / "numbers.json").read_text())["g2b,rank=3"]
    assert moved["operator coefficients"][0] == 0
    assert all(len(values) == 3 for values in moved.values())


def test_maps_are_measured_against_a_mask_and_a_box(karat_run: Path, picture: Path, tmp_path: Path) -> None:
    """A box and the mask of the same pixels give the same numbers."""
    line = f"analyze attention {karat_run} --image {picture} --output {tmp_path}".split()
    found = []
    for argument in (["--mask", str(picture)], ["--box", "6", "4", "16", "12"]):
        assert main([*line, *argument]) == 0
        found.append(json.loads((tmp_path / "numbers.json").read_text())["g2b,rank=3"]["overlap"])
    assert found[0] == found[1]
    assert set(found[0]) == {"pointing_game", "iou", "mass_inside"}
    assert all(len(heads) == 2 and 0 <= min(heads) <= max(heads) <= 1 for heads in found[0].values())


BAD = {
    "analyze landscape SOFTMAX": "has no trajectory checkpoints",
    "analyze averaging SOFTMAX": "train it with --checkpoints trajectory",
    "analyze averaging RUN --samples 1": "a mean over images wants two or more",
    "analyze weights SOFTMAX": "train it with --checkpoints trajectory",
    "analyze attention RUN --image TORN": "can't be read as an image",
    "analyze attention RUN --image TEXT": "is not an image of a known format",
    "analyze attention RUN --image TEXT.gone": "is not there",
    "analyze attention RUN --head 9": "head 9 isn't there: the block has heads 0 to 1",
    "analyze attention RUN --block -1": "--block=-1: give 0 or more",
    "analyze spectrum RUN --block 7": "block 7 isn't there",
    "analyze functions RUN --block 7": "block 7 isn't there",
    "analyze functions RUN --head 7": "head 7 isn't there",
    "analyze functions SOFTMAX": "no learnable attention",
    "analyze parts SOFTMAX": "no learnable attention",
    "analyze ablation SOFTMAX": "no learned attention of its own",
    "analyze parts RUN --images 1": "two images or more",
    "analyze attention RUN --box 0 0 4 4": "name it with --image",
    "analyze attention RUN --image PICTURE --box 4 4 0 0": "give x0 y0 x1 y1, x0 < x1 and y0 < y1",
    "analyze attention RUN --images 0": "--images=0: give 1 or more",
    "analyze attention SOFTMAX --weights ema": "trained without EMA",
    "analyze landscape RUN --points 2": "--points=2: give 3 to 1001",
    "analyze hessian RUN --eigenvalues 0": "--eigenvalues=0: give 1 or more",
    "analyze sweep RUN SOFTMAX": "needs runs that differ",
    "analyze everything RUN": "everything",
    "analyze attention RUN RUN": "named twice",
    "analyze attention FOLDER": "is no run's folder",
    "report FOLDER": "is no run's folder",
    "report RUN --sections poetry": "unknown section 'poetry'",
    "report RUN --sections landscape --points 2 --output FOLDER": "--points=2: give 3 to 1001",
    "explore FOLDER": "is no run's folder",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(
    line: str, karat_run: Path, softmax_run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torn.png").write_bytes(picture.read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    places = {"RUN": karat_run, "PICTURE": picture, "TORN": tmp_path / "torn.png", "TEXT": tmp_path / "text.png"}
    places |= {"SOFTMAX": softmax_run, "FOLDER": tmp_path}
    words = [re.sub(r"^([A-Z]{3,})", lambda m: str(places.get(m[1], m[1])), word) for word in line.split()]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("karat: ")
    assert error.count("\n") == 1
    assert BAD[line].replace("FOLDER", str(tmp_path)) in error


def test_several_models_with_nothing_to_take_away_are_one_line(
    softmax_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [shutil.copytree(softmax_run, tmp_path / name) for name in ("a", "b")]
    assert main(["analyze", "ablation", *map(str, runs)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.count("no learned attention of its own") == 2


@pytest.mark.parametrize("what", ["attention", "spectrum", "functions"])
def test_a_model_without_attention_is_one_line(
    what: str, softmax_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convolutional = timm.create_model("resnet10t", in_chans=1)
    monkeypatch.setattr("karat.analyze.loading.load_run", lambda *_: convolutional)
    assert main(f"analyze {what} {softmax_run}".split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "attention" in error


class Page(HTMLParser):
    """What a page holds: addresses, headings, and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.slow
def test_the_report_is_one_page_that_asks_for_nothing(karat_run: Path, softmax_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert main(f"report {karat_run} {softmax_run} --output {path} {QUICK}".split()) == 0
    text = path.read_text()
    page = Page(text)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not {"script", "iframe", "object"} & set(page.tags)
    assert page.tags.count("img") == sum(len(FIGURES[name]) for name in SECTIONS if name in FIGURES)
    assert text.count('class="note"') == 2  # no path for the landscape, no checkpoints for the weights
    for words in ("training curves", "edge functions", "random directions are drawn instead", "g2b,rank=3"):
        assert words in text


def test_report_takes_the_sections_that_are_named(karat_run: Path) -> None:
    assert main(f"report {karat_run} --sections curves weights".split()) == 0
    page = Page((karat_run / "report.html").read_text())
    assert page.tags.count("img") == 3


def test_the_page_names_what_the_report_leaves_out() -> None:
    page = " ".join((ROOT / "docs" / "analysis.md").read_text(encoding="utf-8").split())
    left_out = page.split("for each subject below but ")[1].split(". ")[0]
    assert set(re.findall(r"`(\w+)`", left_out)) == set(ANALYSES) - set(SECTIONS)


@pytest.mark.parametrize("what", ANALYSES)
def test_the_command_offers_every_analysis(what: str) -> None:
    assert what in get_args(What)
    assert analysis_of(what).__doc__


def test_numbers_are_valid_json() -> None:
    value = {"a": [float("nan"), 1 / 3, float("inf")], "b": (2, "x")}
    assert as_json(value, 3) == {"a": [None, 0.333, None], "b": [2, "x"]}
    assert as_json(value)["a"][1] == 1 / 3


def test_samples_are_the_same_each_time_and_shown_as_pixels(karat_run: Path) -> None:
    run = open_run(karat_run)
    first, second = run.samples(5), run.samples(5)
    assert torch.equal(first.images, second.images)
    assert first.pixels.shape == (5, 8, 8, 3)
    assert 0 <= first.pixels.min() < first.pixels.max() <= 1
    assert not torch.equal(first.images, run.samples(5, "train").images)
