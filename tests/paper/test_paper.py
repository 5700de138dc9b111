"""Every published figure is here, every row means a configuration, and commands are real ones."""

import ast
import json
import shlex
from pathlib import Path

import pytest
import tyro

from karat import runs
from karat.detect.commands import _defaults as detect_defaults
from karat.detect.recipes import PUBLISHED
from karat.detect.settings import DetectSettings
from karat.operator.config import KArAtConfig
from karat.paper import TABLES, Setup, attention_spec, compare, matching, published, rows, run_row
from karat.paper.command import paper
from karat.paper.entries import table_number
from karat.paper.measured import dataset_of, plain, read_run
from karat.paper.run import run_options
from karat.paper.setup import PROGRAMS, read_setup
from karat.runs.classification import Settings
from karat.train.commands import defaults

# How many figures each table has.
COUNTS = {
    1: 63,
    2: 27,
    3: 20,
    4: 12,
    7: 12,
    8: 24,
    12: 36,
    13: 45,
    14: 72,
    15: 54,
    16: 12,
    17: 8,
    18: 60,
    19: 10,
    20: 13,
}


def test_all_figures_are_here():
    assert {number: len(rows(number)) for number in TABLES} == COUNTS
    assert len(rows()) == sum(COUNTS.values())
    assert all([entry.row for entry in rows(n)] == list(range(1, COUNTS[n] + 1)) for n in TABLES)


def test_the_reader_of_the_figures_imports_nothing_of_karat():
    tree = ast.parse(Path(published.__file__).read_text(encoding="utf-8"))
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert names
    assert not any(name.startswith("karat") for name in names)
    assert published.values_by_model(1, "imagenet1k")["vit_tiny", "g3b"]["top1"] == 59.11


@pytest.mark.parametrize("number", TABLES)
def test_every_row_parses_into_a_configuration(number):
    for entry in rows(number):
        setup = entry.setup
        assert isinstance(setup, Setup)
        assert isinstance(setup.config, KArAtConfig)
        assert setup.num_classes >= 10
        able, reason = entry.runnable
        assert able == (reason == "")
        assert able == bool(entry.command)
        if setup.kind in ("train", "finetune", "transfer"):
            assert (setup.recipe, setup.epochs > 0, setup.batch_size > 0) in [
                (name, True, True) for name in ("vit", "convit", "swin", "finetune", "quick")
            ]


@pytest.mark.parametrize(
    ("variant", "spec"),
    [
        ("softmax", "softmax"),
        ("softmax,softmax_heads=12", "softmax"),
        ("g11u", "g11u,edge_scales=published,init=paper"),
        ("g3b,rank=4", "g3b,rank=4,edge_scales=published,init=paper"),
        ("g3b,rank=12", "g3b,edge_scales=published,init=paper"),
        ("g3u,base=silu", "g3u,base=silu,edge_scales=published,init=paper"),
        ("rational(m=5,n=4),blockwise", "rational(m=5,n=4)-b,edge_scales=published,init=paper"),
        ("dog,blockwise", "dog-b,edge_scales=published,init=paper"),
        ("g3b,simplex", "g3b,simplex=rank,edge_scales=published,init=paper"),
        ("g11b,order=PhiW,softmax_heads=0", "g11b,order=PhiW,edge_scales=published,init=paper"),
        ("g11u,order=PhiPhi", "g11u,order=PhiPhi,edge_scales=published"),
        ("g11b,order=PhiW,softmax_heads=6", "g11b,order=PhiW,softmax_heads=6,edge_scales=published,init=paper"),
    ],
)
def test_variants(variant, spec):
    assert KArAtConfig.parse(attention_spec(variant)) == KArAtConfig.parse(spec)
    assert str(KArAtConfig.parse(attention_spec(variant))) == attention_spec(variant)


def test_settings_of_each_kind():
    base = rows("table1", 8)[0].setup
    assert (base.model, base.data, base.num_classes) == ("vit_base_patch16_224", "torch/cifar10", 10)
    assert (base.recipe, base.epochs, base.batch_size) == ("vit", 100, 32)
    imagenet = next(e.setup for e in rows(1) if e.dataset == "imagenet1k")
    assert (imagenet.data, imagenet.num_classes, imagenet.batch_size) == ("torch/imagenet", 1000, 128)
    cost = next(e.setup for e in rows(13) if e.model == "vit_small")
    assert (cost.kind, cost.num_classes) == ("cost", 1000)
    assert next(e.setup for e in rows(13) if e.model == "vit_tiny").num_classes == 10
    tuned = rows("table2", 4)[0].setup
    assert (tuned.kind, tuned.recipe, tuned.data) == ("finetune", "finetune", "torch/svhn")
    assert tuned.init in {e.setup.output for e in rows(1)}
    transfer = rows("table4", 1)[0].setup
    assert (transfer.kind, transfer.attention) == ("transfer", "softmax")
    assert transfer.teacher in {e.setup.output for e in rows(1)}
    assert {e.setup.recipe for e in rows(3)} == {"convit", "swin"}
    kan = rows("table14", 61)[0]
    assert kan.variant == "deep_kan order=5 grid=10 range=(-4,4) layers=(20,40)"
    assert kan.setup.model == "deep_kan(order=5,grid=10,range=4,layers=(20,40))"
    assert (kan.setup.data, kan.setup.recipe) == ("torch/mnist", "quick")
    starts = {e.setup.init for e in rows(12)}
    assert starts == {"random", "runs/paper/imagenet-vit_base_patch16_224-softmax"}


def test_rows_that_share_a_run_share_its_settings():
    first, second = rows("table1", 8)[0], rows("table15", 3)[0]
    assert first.setup == second.setup
    outputs = {}
    for entry in rows():
        if entry.setup.kind in ("train", "finetune", "transfer"):
            assert outputs.setdefault(entry.setup.output, entry.setup) == entry.setup


def test_commands_are_understood_by_the_command_line():
    seen = set()
    for entry in rows():
        if entry.setup.kind not in PROGRAMS or (entry.table, entry.model, entry.setup.kind) in seen:
            continue
        seen.add((entry.table, entry.model, entry.setup.kind))
        words = shlex.split(entry.command)
        if entry.setup.kind == "detect":
            assert words[:3] == ["karat", "detect", "train"]
            settings = tyro.cli(DetectSettings, args=words[3:], default=detect_defaults(words[3:]))
            assert settings.recipe == PUBLISHED
        elif entry.setup.kind == "transfer":
            assert words[:3] == ["karat", "transfer", entry.setup.teacher]
            settings = tyro.cli(Settings, args=words[3:], default=defaults(words[3:]))
        else:
            assert words[:2] == ["karat", "train"]
            settings = tyro.cli(Settings, args=words[2:], default=defaults(words[2:]))
        assert (settings.model, settings.attention) == (entry.setup.model, entry.setup.attention)
        assert settings.recipe.epochs == entry.setup.epochs
        assert settings.recipe.batch_size == entry.setup.batch_size


def test_scale_takes_that_fraction_of_epochs_and_data(tmp_path):
    entry = rows("table1", 8)[0]
    options = run_options(entry, 0.05, {"--data": str(tmp_path)})
    assert (options["--epochs"], options["--data-fraction"], options["--data"]) == ("5", "0.05", str(tmp_path))
    assert options["--output"].endswith("-g1b-scale0.05")
    assert run_options(entry, 0.001)["--epochs"] == "1"
    assert "--data-fraction" not in run_options(entry)
    for scale in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"scale={scale}"):
            run_options(entry, scale)


def test_run_row_goes_through_the_train_command(tmp_path, monkeypatch):
    calls = []

    def train(arguments):
        calls.append(list(arguments))
        output = tmp_path / "run"
        output.mkdir()
        runs.write_history(output, [{"epoch": 1, "top1": 12.5, "top5": 50.0}])

    monkeypatch.setattr("karat.train.commands.train", train)
    measured = run_row(rows("table1", 50)[0], 0.01, {"--output": str(tmp_path / "run")})
    assert measured == {"top1": 12.5, "top5": 50.0}
    (words,) = calls
    assert words[words.index("--data-fraction") + 1] == "0.01"


def test_a_missing_start_is_named():
    with pytest.raises(ValueError, match=r"starts from an ImageNet-1K run .*--init"):
        run_row(rows("table2", 1)[0], 0.01)


def test_bad_tables_and_rows():
    assert table_number("table15") == table_number("15") == table_number(15) == 15
    for bad in ("table5", "table", "x", 99):
        with pytest.raises(ValueError, match="no table"):
            rows(bad)
    with pytest.raises(ValueError, match=f"rows 1 to {COUNTS[1]}, not {COUNTS[1] + 1}"):
        rows("table1", COUNTS[1] + 1)
    with pytest.raises(ValueError, match="unknown model"):
        read_setup("resnet", "softmax", "cifar10", "")
    with pytest.raises(ValueError, match="unknown data set"):
        read_setup("vit_tiny", "softmax", "cifar11", "")
    with pytest.raises(ValueError, match="deep KAN"):
        read_setup("deep_kan", "deep_kan order=x", "mnist", "")


def make_run(folder, top1, **values):
    folder.mkdir(parents=True)
    settings = Settings.make(**values)
    runs.begin(folder, settings, {"num_classes": 10, "in_chans": 3})
    runs.write_history(folder, [{"epoch": 1, "top1": 1.0, "top5": 2.0}, {"epoch": 2, "top1": top1, "top5": 90.0}])
    return folder


def test_results_find_their_rows(tmp_path):
    common = {"model": "vit_tiny_patch16_224", "recipe": "vit"}
    ours = make_run(tmp_path / "a", 70.5, data="torch/cifar10", attention="g3b", **common)
    other = make_run(tmp_path / "b", 60.0, data="torch/cifar10", attention="g3b,order=PhiW", **common)
    found = compare(rows(), [ours, other])
    assert {(entry.table, entry.metric) for entry, _ in found} == {
        (1, "top1"), (1, "top5"), (15, "top1"), (17, "top1"), (18, "top1")
    }  # fmt: skip
    assert {run.run for _, run in found} == {str(ours)}
    assert read_run(ours).figures["top1"] == 70.5
    assert "2 of 100 epochs" in read_run(ours).caveat
    with pytest.raises(ValueError, match="no run's folder"):
        compare(rows(), [tmp_path / "nowhere"])


def test_a_shorter_run_and_other_images_are_told_beside_the_published_figure(tmp_path):
    values = {"model": "vit_tiny_patch16_224", "recipe": "vit", "data": "torch/cifar10", "attention": "g3b"}
    ours = make_run(tmp_path / "a", 70.5, **values, epochs=2, held_out=500)
    (_, run), *_ = compare(rows(1), [ours])
    assert run.caveat == "2 of 100 epochs done, measured on 500 training images held out"


def test_a_detector_finds_its_rows(tmp_path):
    for name, init in (("random", None), ("started", "x")):
        settings = DetectSettings.make(model="vit_base_patch16_224", attention="g1u", data="coco", init=init)
        runs.begin(tmp_path / name, settings, {"categories": []})
        runs.write_history(tmp_path / name, [{"epoch": 1, "box_AP": 9.5, "mask_AP50": 17.0}])
    found = {(e.row, e.metric): run for e, run in compare(rows(12), [tmp_path / "random"])}
    assert set(found) == {(31, "box_AP"), (35, "mask_AP50")}
    assert {e.row for e, _ in compare(rows(12), [tmp_path / "started"])} == {13, 17}
    assert "1 of 50 epochs" in found[31, "box_AP"].caveat


def test_a_smaller_detector_says_so(tmp_path):
    values = {"model": "vit_base_patch16_224", "attention": "g1u", "data": "coco"}
    said = {}
    for name, more in {"small": {"recipe": "small"}, "jitter": {"recipe": "jitter"}, "own": {"img_size": 128}}.items():
        runs.begin(tmp_path / name, DetectSettings.make(**values, **more), {"categories": []})
        runs.write_history(tmp_path / name, [{"epoch": 1, "box_AP": 9.5}])
        said[name] = read_run(tmp_path / name).caveat.split(", ", 1)[1]
    assert said == {
        "small": "proposals and heads of another size",
        "jitter": "images of 1024 pixels, not 224",
        "own": "images of 128 pixels, not 224",
    }


def test_another_mlp_and_converted_weights_are_no_published_model(tmp_path):
    values = {"data": "torch/cifar10", "attention": "g3b", "model": "vit_tiny_patch16_224", "recipe": "vit"}
    other = make_run(tmp_path / "mlp", 70.0, **values, mlp="grkan")
    assert not compare(rows(), [other])
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"converted_from": "elsewhere"}))
    with pytest.raises(ValueError, match="was converted, not trained"):
        compare(rows(), [other])


def test_a_fine_tuned_run_is_no_run_from_scratch(tmp_path):
    run = make_run(
        tmp_path / "r", 90.0, data="torch/cifar10", attention="softmax", model="vit_tiny_patch16_224", init="x"
    )
    assert not [entry for entry in rows(1) if matching(entry, [read_run(run)])]


def test_dataset_names():
    assert dataset_of("torch/imagenet") == "imagenet1k"
    assert dataset_of("/data/CIFAR-10/") == "cifar10"
    assert dataset_of("wds/elsewhere") == ""
    config = KArAtConfig.parse("g3b,edge_scales=published,init=paper")
    assert plain(config) == KArAtConfig.parse("g3b")


def test_the_command_prints_tables_rows_and_results(tmp_path, capsys):
    paper([])
    out = capsys.readouterr().out
    assert str(sum(COUNTS.values())) in out
    assert "table20" in out
    paper(["table19"])
    out = capsys.readouterr().out
    assert "70.98" in out
    assert "rows 1: karat train --model vit_base_patch16_224 --attention g11b,order=PhiW" in out
    paper(["table15", "17"])
    out = capsys.readouterr().out
    assert "40.74" in out
    assert "Table 19 gives 47.74" in out
    run = make_run(tmp_path / "r", 71.25, data="torch/cifar10", attention="softmax", model="vit_tiny_patch16_224")
    paper(["table1", "--results", str(run)])
    assert "71.25" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of these runs"):
        paper(["table19", "--results", str(run)])
    with pytest.raises(ValueError, match="of which table"):
        paper(["--run", "3"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("table1 --scale 0.5", "--scale 0.5 belongs to --run"),
        ("table1 8 --data here --teacher there", "--data here belongs to --run"),
        ("table4 --teacher there", "--teacher there belongs to --run"),
        ("table1 8 --run 8", "row 8 is named beside --run 8"),
        ("table1 --run 8 --results a", "--results shows runs that are there"),
        ("table1 8 --results a", "--results compares whole tables"),
        ("table1 --run 8 --teacher there", "row 8 learns from no teacher"),
        ("table13 --run 42 --scale 0.5", "row 42 is counted, not trained: leave --scale out"),
    ],
)
def test_options_that_would_do_nothing_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        paper(line.split())


def test_cost_rows_are_counted_here(capsys):
    paper(["table13", "--run", "42"])  # ViT-Tiny G3U: parameters added, in all, and operations
    out = capsys.readouterr().out
    assert "5.59" in out
    assert "0.064" in out
