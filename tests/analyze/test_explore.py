"""The explorer without a browser: what an image shows in a block and head; and the page, where gradio is there."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import karat.analyze
from conftest import make_run
from karat.analyze.explore import Explorer
from karat.analyze.figures import encode
from karat.analyze.loading import open_run
from karat.cli import main
from support.processes import python


@pytest.fixture
def image(tmp_path: Path) -> Path:
    array = np.random.default_rng(0).integers(0, 255, (12, 12), np.uint8)
    Image.fromarray(array).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture(scope="module")
def static_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("static") / "run", "static-b,rank=2,residual=softmax", epochs=1)


@pytest.fixture(scope="module")
def explorer(karat_run: Path) -> Explorer:
    return Explorer(open_run(karat_run))


def drawn(figure: Figure | None) -> bytes:
    assert figure is not None
    return encode(figure, "png", dpi=40)


def test_another_head_block_or_image_is_another_picture(explorer: Explorer, image: Path, tmp_path: Path) -> None:
    views = [explorer.view(image, block, head) for block, head in ((0, 0), (0, 1), (1, 0))]
    for name in ("maps", "matrices", "functions"):
        assert len({drawn(getattr(view, name)) for view in views}) == 3
    assert views[0].numbers != views[1].numbers
    Image.new("L", (12, 12), 200).save(tmp_path / "grey.png")
    assert drawn(explorer.view(tmp_path / "grey.png", 0, 0).matrices) != drawn(views[0].matrices)


def test_numbers_stand_beside_those_of_softmax(explorer: Explorer, image: Path) -> None:
    view = explorer.view(image, 1, 1, signed=True)
    assert set(view.numbers) == {"entropy", "sparsity", "effective_rank", "negative_mass"}
    own, fixed = view.numbers["negative_mass"]
    assert own > 0
    assert fixed == 0
    assert view.note == ""


def test_an_image_file_that_changes_is_read_again(explorer: Explorer, image: Path) -> None:
    before = drawn(explorer.view(image, 0, 0).matrices)
    Image.new("L", (12, 12), 30).save(image)
    assert drawn(explorer.view(image, 0, 0).matrices) != before


def test_a_softmax_run_has_no_edge_functions(softmax_run: Path, image: Path) -> None:
    view = Explorer(open_run(softmax_run)).view(image, 0, 0)
    assert view.functions is None
    assert "keeps softmax" in view.note
    own, fixed = view.numbers["entropy"]
    assert own == pytest.approx(fixed, abs=1e-5)


def test_a_run_of_static_mixing_has_none_either(
    static_run: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view = Explorer(open_run(static_run)).view(image, 0, 0)
    assert view.functions is None
    assert "learned matrix, blind to the scores" in view.note
    options = f"--images 2 --output {tmp_path / 'figures'}".split()
    assert main(["analyze", "functions", str(static_run), *options]) == 0
    assert "mixes tokens by a learned matrix and has no edge functions" in capsys.readouterr().out


def test_what_is_not_there_is_said(explorer: Explorer, image: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block 5 isn't there"):
        explorer.view(image, 5, 0)
    with pytest.raises(ValueError, match="head 5 isn't there"):
        explorer.view(image, 0, 5)
    (tmp_path / "torn.png").write_bytes(image.read_bytes()[:80])
    with pytest.raises(ValueError, match="can't be read"):
        explorer.view(tmp_path / "torn.png", 0, 0)


def test_windows_have_no_maps(explorer: Explorer, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swin = karat.create_model(
        "swin_tiny_patch4_window7_224", "softmax", img_size=8, patch_size=2, window_size=2, embed_dim=12, depths=(1, 1),
        num_heads=(2, 4), in_chans=1,
    )  # fmt: skip
    monkeypatch.setattr(explorer, "model", swin.eval())
    view = explorer.view(image, 1, 3)
    assert view.maps is None
    assert "windows" in view.note


@pytest.mark.slow
def test_the_page(karat_run: Path) -> None:
    """In a process of its own: gradio leaves event loops behind, which would fail some later test."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    code = """
import json, sys
from karat.analyze.explore import Explorer, build_app
from karat.analyze.loading import open_run
parts = build_app(Explorer(open_run(sys.argv[1]))).get_config_file()["components"]
print(json.dumps([[part["props"].get(name) for name in ("elem_id", "label")] for part in parts]))
"""
    done = python(code, str(karat_run))
    assert done.returncode == 0, done.stderr
    ids, labels = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    assert {"maps", "matrices", "functions", "numbers"} <= set(ids)
    assert {"image", "block", "head"} <= set(labels)


def test_without_gradio_the_page_names_the_extra(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    from karat.analyze.explore import build_app

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"karat\[explore\]"):
        build_app(explorer)


def test_arrays_need_no_plotting_library() -> None:
    """Everything that gives arrays imports without matplotlib."""
    names = {module.name for module in pkgutil.iter_modules(karat.analyze.__path__) if not module.ispkg}
    names -= {"explore", "report"}
    code = "import sys, importlib\n"
    code += "".join(f"importlib.import_module('karat.analyze.{name}')\n" for name in sorted(names))
    code += "assert 'matplotlib' not in sys.modules"
    done = python(code)
    assert done.returncode == 0, done.stderr
