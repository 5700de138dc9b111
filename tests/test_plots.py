"""Names in figures: in any script, with any character, they are drawn or spelt, never boxes or warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

from karat import plots
from karat.analyze.ablation import AblationOutcome
from karat.analyze.figures import (
    draw_ablation,
    draw_cost,
    draw_curves,
    draw_maps,
    draw_matrices,
    draw_parameters_accuracy,
    draw_regions,
    draw_spectra,
    draw_sweep,
)
from karat.analyze.peers import Point
from karat.analyze.spectrum import Spectrum
from karat.analyze.sweep import Line, Sweep
from karat.study.figures import draw_figures
from karat.study.rows import VariantRow
from karat.study.statistics import Difference, Mean

NAMES = [
    "猫",
    "قطة",
    "बिल्ली",
    "😺",
    "👩‍👧 ❤️",
    "tab\there",
    "bad\udcff",
    "5$ or 6$",
    r"$\frac",
    "\x07",
    "café ±²",
    "한글",
]
HISTORY = [{"epoch": epoch, "train_loss": 1.0, "eval_loss": 1.0, "top1": 50.0 + epoch} for epoch in range(1, 4)]
IMAGES, MAPS = torch.rand(1, 8, 8, 3), torch.rand(1, 4, 4)


def study(name: str) -> Figure:
    known = {"curve": (1.0, 2.0), "curves": ((1.0, 2.0),), "top1": Mean(2.0, 0.1, 2), "parameters": 1000}
    settings = {"attention": "g3b", "epochs": 2, "seeds": (0,), "planned": 1, "amp_dtype": "none"}
    rows = [
        VariantRow(name, **settings, **known),  # type: ignore[arg-type]
        VariantRow("other", **settings, **known, difference=Difference(1.0, 0.1, 1.0)),  # type: ignore[arg-type]
    ]
    figures = draw_figures(rows, name)
    for figure in figures.values():
        figure.draw_without_rendering()
    return figures["differences"]


# name of a figure -> its drawing with a name in each place that takes one
FIGURES: dict[str, Callable[[str], Figure]] = {
    "curves": lambda name: draw_curves({name: HISTORY}),
    "cost": lambda name: draw_cost({name: {name: 1.0}, "other": {name: 2.0}}),
    "maps": lambda name: draw_maps(IMAGES, {name: MAPS}, titles=[name]),
    "regions": lambda name: draw_regions(
        IMAGES, {name: MAPS}, {name: MAPS > 0.5}, titles=[name], captions={name: [name]}
    ),
    "matrices": lambda name: draw_matrices(MAPS[0], {name: MAPS[0]}, name),
    "peers": lambda name: draw_parameters_accuracy([Point(name, "x", 5.0, 70.0, name, "")], []),
    "spectra": lambda name: draw_spectra({name: {name: Spectrum(MAPS[0, 0], MAPS[0, 0], MAPS[0, 0], 1.0, 1)}}),
    "sweep": lambda name: draw_sweep(Sweep(name, (name, "b"), {name: Line((1.0, 2.0), (None, None))}, {name: 1.0})),
    "ablation": lambda name: draw_ablation(
        {name: {name: AblationOutcome(50.0, 1.0)}, "b": {name: AblationOutcome(1, 1.0)}}
    ),
    "study": study,
}


@pytest.fixture(autouse=True)
def own_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests looked up isn't known here, nor what is looked up here to them."""
    monkeypatch.setattr(plots, "_fonts", {})
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))


@pytest.fixture
def cat_font(tmp_path: Path) -> Iterator[Path]:
    """A font that draws 猫 and 0…9, and has a code without outlines for 犬."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "square", "empty"])
    font.setupCharacterMap({ord(c): "square" for c in "猫0123456789. "} | {ord("犬"): "empty"})
    font.setupGlyf({".notdef": empty, "square": square, "empty": empty})
    font.setupHorizontalMetrics(dict.fromkeys((".notdef", "square", "empty"), (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Cats Sans", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "cats.ttf")
    fontManager.addfont(tmp_path / "cats.ttf")
    yield tmp_path / "cats.ttf"
    fontManager.ttflist = [entry for entry in fontManager.ttflist if entry.name != "Cats Sans"]


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_every_figure_draws_any_name_without_a_warning(draw: Callable[[str], Figure]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw("猫 قط 5$ 6$ \udcff")
        plots.encode(drawn, "svg")
    assert r"\udcff" in "".join(text.get_text() for text in drawn.findobj(Text))


@pytest.mark.parametrize("form", plots.FORMATS)
def test_each_form_takes_each_name(form: str) -> None:
    with plots.drawing(4, 4) as (figure, axes):
        axes.set_yscale("log")
        axes.set_yticks(range(1, len(NAMES) + 1), NAMES)
        plots.finish(axes, "\n".join(NAMES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plots.encode(figure, form, dpi=50)


def test_a_font_that_has_the_name_draws_it(cat_font: Path) -> None:
    with plots.drawing(2, 2) as (figure, axes):
        axes.set_xticks([0, 1], ["猫", "犬"])
        plots.finish(axes, "猫 犬")
    plots.encode(figure, "pdf")
    assert axes.get_title() == r"猫 \u72ac"  # a code without outlines draws nothing
    assert axes.title.get_fontfamily() == ["DejaVu Sans", "Cats Sans"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["猫", r"\u72ac"]
    assert axes.get_xticklabels()[0].get_fontfamily() == ["DejaVu Sans", "Cats Sans"]


def test_where_one_font_is_all_it_has_the_name_and_the_number(cat_font: Path) -> None:
    assert plots.one_font("猫 0.90") == (str(cat_font), "猫 0.90")
    path, words = plots.one_font("猫 cat 0.90")  # it has no letters
    assert (Path(path).name, words) == ("DejaVuSans.ttf", r"\u732b cat 0.90")


def test_formulas_of_figures_stay_formulas_and_dollars_of_names_dollars() -> None:
    with plots.drawing(2, 2) as (figure, axes):
        axes.set_xscale("log")
        axes.set_xlim(1, 1e4)
        axes.plot([1, 10], [1, 2], label=r"$\varphi_{1}$")
        axes.legend()
        plots.finish(axes, "a $5$")
    figure.draw_without_rendering()
    assert not axes.title.get_parse_math()
    assert all(label.get_parse_math() for label in axes.get_xticklabels())
    assert axes.get_legend().get_texts()[0].get_parse_math()
