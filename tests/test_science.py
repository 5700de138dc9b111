"""docs/science.md says what the results beside it hold: every mean, deviation and curve of its tables."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "science"
PAGE = (ROOT / "docs" / "science.md").read_text(encoding="utf-8")
STUDIES = [["study.json", "study-float32.json"], ["study-192.json"], ["study-384.json"]]
MEANS_ALONE = ("timm's start", "Xavier's start")  # their tables have no epochs
MEANS_ALONE_AT_DIM_96 = (*MEANS_ALONE, "sine-cosine positions")


@pytest.fixture(scope="module")
def merge_studies() -> ModuleType:
    name = "benchmark_merge_studies"
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "merge_studies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("names", STUDIES, ids=lambda names: names[0])
def test_the_page_has_every_row_of_the_results(names: list[str], merge_studies: ModuleType) -> None:
    rows = merge_studies.merged([RESULTS / name for name in names], "softmax")
    assert len(rows) >= 5
    for row in rows:
        deviation = "" if row.top1.deviation is None else f" ± {row.top1.deviation:.2f}"
        assert f"{row.top1.mean:.2f}{deviation}" in PAGE, row.name
        if not row.name.startswith(MEANS_ALONE_AT_DIM_96 if len(names) > 1 else MEANS_ALONE):
            assert f"| {len(row.seeds)} | " + " | ".join(f"{value:.2f}" for value in row.curve[:3]) in PAGE, row.name


def test_seeds_of_several_files_are_one_row(tmp_path: Path, merge_studies: ModuleType) -> None:
    def study(name: str, seeds: list[int], curves: list[list[float]]) -> Path:
        row = {"name": "softmax", "attention": "softmax", "epochs": 2, "seeds": seeds, "curves": curves}
        empty = row | {"name": "waits", "seeds": [], "curves": []}
        path = tmp_path / name
        path.write_text(json.dumps({"rows": [row | {"amp_dtype": "float32", "parameters": 5}, empty]}))
        return path

    first, second = study("a", [0, 1], [[1.0, 2.0], [2.0, 4.0]]), study("b", [2], [[3.0, 6.0]])
    (row,) = merge_studies.merged([first, second], "softmax")
    assert (row.seeds, row.curve) == ((0, 1, 2), (2.0, 4.0))
    assert (row.top1.mean, row.top1.deviation, row.top1.count) == (4.0, 2.0, 3)
    with pytest.raises(ValueError, match="has a seed twice"):
        merge_studies.merged([first, first], "softmax")
    with pytest.raises(ValueError, match="no run of 'waits'"):
        merge_studies.merged([first], "waits")
