"""One look for all figures: colours that colour-blind readers tell apart and print keeps, thin axes, no decoration."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

FORMATS = ("png", "svg", "pdf")

# Okabe & Ito's palette (2008), without its yellow, which vanishes on paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#888888")
# Lines differ in dashes too, so that they stay apart in grey.
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)), (0, (8, 2)))
SEQUENTIAL = "cividis"
DIVERGING = "PuOr_r"
INK, GRID = "#333333", "#DDDDDD"
FAMILY = "DejaVu Sans"
OWN_MATH = (r"$\mathdefault", r"$\varphi")  # what begins otherwise is a name, whose dollars are dollars

RC: Any = {
    "font.family": FAMILY,
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "karat",  # the same picture gives the same file
    "pdf.fonttype": 42,
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; draw in it within `looks()`."""
    return Figure(figsize=(width, height), layout="constrained")


_fonts: dict[str, FontEntry | None] = {}  # which installed font draws a character; None: none does


def fonts_of(text: str) -> dict[str, FontEntry | None]:
    """The font of each character: DejaVu Sans where it has it, else another that is installed, else None."""
    missing = set(text) - _fonts.keys()
    for entry in _installed() if missing else ():
        found = _drawn_by(entry, missing)
        _fonts.update(dict.fromkeys(found, entry))
        missing -= found
        if not missing:
            break
    _fonts.update(dict.fromkeys(missing))
    return {character: _fonts[character] for character in text}


def _installed() -> Iterator[FontEntry]:
    """A font of each family, DejaVu Sans first, then upright sans serifs of normal weight; none that draws boxes."""
    yield FontEntry(fname=findfont(FAMILY), name=FAMILY)
    families = {FAMILY}
    for entry in sorted(
        fontManager.ttflist,
        key=lambda one: (one.style != "normal", one.weight != 400, "Sans" not in one.name, one.name),
    ):
        resort = entry.name.replace(" ", "").startswith((".LastResort", "LastResort", "AdobeBlank"))
        if entry.name not in families and not resort:
            families.add(entry.name)
            yield entry


def _drawn_by(entry: FontEntry, characters: Iterable[str]) -> set[str]:
    """Those that leave ink, or are blanks by nature: a font of coloured pictures alone has codes without outlines."""
    try:
        font = FT2Font(entry.fname)
        font.set_size(10, 72)
        coded = [character for character in characters if font.get_char_index(ord(character))]
        return {c for c in coded if unicodedata.category(c)[0] in "CZ" or any(font.load_char(ord(c)).bbox)}
    except (OSError, RuntimeError, ValueError):  # not there any more, or without outlines
        return set()


def spelt(text: str, drawn: Iterable[str] | None = None) -> str:
    r"""The text with every character that no installed font draws written as its code; invisible ones are left out.

    drawn: the characters that can be drawn, where it isn't any installed font that may draw them.

    >>> spelt("cat\x07")
    'cat\\x07'
    """
    known = {character for character, font in fonts_of(text).items() if font} if drawn is None else set(drawn)
    return "".join(c if c in known or c == "\n" else _code(c) for c in text)


def _code(character: str) -> str:
    invisible = unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"
    return "" if invisible else character.encode("unicode_escape").decode()


def one_font(text: str) -> tuple[str, str]:
    """The file of the one font that draws most of the text, and the text as `spelt` for it, where one is all."""
    fonts = fonts_of(text)
    best = {c for c, font in fonts.items() if font and font.name == FAMILY}
    plain, path = {c for c in best if c.isascii()}, str(findfont(FAMILY))
    for font in {font.fname: font for font in fonts.values() if font}.values():
        drawn = _drawn_by(font, fonts)
        if len(drawn) > len(best) and plain <= drawn:
            best, path = drawn, str(font.fname)
    return path, spelt(text, best)


def readable(figure: Figure) -> None:
    """Give every text of a figure fonts that have its characters; what no installed font has is `spelt`."""
    for axis in figure.findobj(Axis):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if any(map(str.strip, labels)):
            if labels != (fitting := [spelt(label) for label in labels]):
                axis.set_ticks(axis.get_ticklocs(), labels=fitting)
            if len(families := _families("".join(fitting))) > 1:
                axis.set_tick_params(labelfontfamily=families)
    for text in figure.findobj(Text):
        content = text.get_text()
        text.set_text(spelt(content))
        if len(families := _families(text.get_text())) > 1:
            text.set_fontfamily(families)
        if "$" in content and not content.startswith(OWN_MATH):
            text.set_parse_math(False)


def _families(text: str) -> list[str]:
    return list(dict.fromkeys([FAMILY, *(font.name for font in fonts_of(text).values() if font)]))


def looks() -> Any:
    """The context in which figures are drawn: artists take their look when they are made."""
    return matplotlib.rc_context(RC)


@contextmanager
def drawing(
    width: float, height: float, *, rows: int | None = None, columns: int | None = None, **grid: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure of so many inches and its axes, to be drawn in within.

    The axes are one, a row of `columns`, or `rows` × `columns`; further arguments as `Figure.subplots` takes them.
    """
    with looks():
        figure = new_figure(width, height)
        axes = figure.subplots(rows or 1, columns or 1, squeeze=False, **grid)
        yield figure, axes if rows else axes[0] if columns else axes[0, 0]
        readable(figure)


def line_style(index: int, width: float = 1.4) -> dict[str, Any]:
    """Colour, dashes and width of the index-th line."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)], "linewidth": width}


def finish(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Title, labels, a light grid, and no frame on top and right."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def whole_epochs(axes: Axes) -> None:
    """Ticks at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_epochs(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], panels: Mapping[str, str]) -> Figure:
    """Numbers of metrics.jsonl over epochs: a panel for each that a run has, a colour for each name, a line a run.

    runs: the lines of each name's runs; panels: titles by number.
    """
    known = {key for some in runs.values() for lines in some for line in lines for key in line}
    shown = [key for key in panels if key in known] or list(panels)
    with drawing(3.1 * len(shown), 2.6, columns=len(shown)) as (figure, axes):
        for panel, key in zip(axes, shown, strict=True):
            for index, (name, some) in enumerate(runs.items()):
                for number, lines in enumerate(some):
                    epochs, values = ([line[what] for line in lines if key in line] for what in ("epoch", key))
                    style = line_style(index) | {"marker": "o" if len(epochs) < 3 else None, "markersize": 3}
                    panel.plot(epochs, values, label=None if number else name, **style)
            finish(panel, panels[key], "epoch")
            whole_epochs(panel)
        axes[-1].legend()
    return figure


def few_ticks(axes: Axes) -> None:
    """No more intervals along x than a narrow panel has room for."""
    axes.xaxis.set_major_locator(MaxNLocator(4))


def bare(axes: Axes, title: str = "") -> None:
    """A picture without ticks."""
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])


def encode(figure: Figure, form: str, *, dpi: int = 150) -> bytes:
    """The figure as a PNG, SVG or PDF file's bytes, the same each time. Raises ValueError for another form."""
    if form not in FORMATS:
        raise ValueError(f"unknown figure format {form!r}; choose one of {', '.join(FORMATS)}")
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[form]
    buffer = io.BytesIO()
    with looks():
        figure.savefig(buffer, format=form, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def save(figure: Figure, path: Path | str, *, dpi: int = 200) -> Path:
    """Write the figure where `path` says, whole or not at all; its ending chooses the format.

    Raises ValueError for an unknown one.
    """
    path = Path(path)
    content = encode(figure, path.suffix.removeprefix("."), dpi=dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    draft.write_bytes(content)
    draft.replace(path)
    return path
