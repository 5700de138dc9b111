"""The command line: what it says, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from karat import cli, runs
from karat.data.augmentation import Augmentation
from karat.models.create import REGISTERED
from karat.runs.classification import Settings, preset_for, resolve
from karat.runs.optimisation import Optimisation
from karat.runs.recipes import RECIPES
from karat.runs.settings import RunSettings
from karat.study.commands import CompareSettings
from support.processes import KARAT, Started
from support.training import options, outcome, tiny


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", ["train", "compare", "eval"])
def test_every_option_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--data" in said
    if command != "eval":
        for name in ("--mixup-switch-prob", "--amp-dtype", "--resume", "--recipe", "--operator-lr-scale"):
            assert name in said


def test_every_setting_and_recipe_value_is_documented() -> None:
    """tyro reads the strings below the fields: an option without one would have no help."""
    import inspect
    import re

    for kind in (RunSettings, Settings, Optimisation, Augmentation, type(RECIPES["vit"]), CompareSettings):
        source = inspect.getsource(kind)
        options = {f.name for f in fields(kind)}
        own = [name for name in kind.__annotations__ if name in options - {"recipe", "attention"}]
        for name in own:
            assert re.search(rf"\n    {name}: [^\n]*\n    \"\"\"", source), f"{kind.__name__}.{name}"


@pytest.mark.parametrize("line", ["convert RUN", "detect predict RUN IMAGE", "compare --study FILE"])
def test_what_every_process_would_write_is_for_one(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("FILE").write_text('[[variants]]\nattention = "softmax"\n[[variants]]\nattention = "g3b"\n')
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(line.split()) == 2
    assert "one process" in capsys.readouterr().err


def test_train_evaluate_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run[lr=0.1]"  # no markup of rich's
    assert cli.main(["train", *options(run, attention="g3b", epochs=2, model_ema_decay=0.9)]) == 0
    said = capsys.readouterr().out
    assert "epoch 2/2" in said
    assert "finished: top-1" in said
    assert f"run: {run}\n" in said
    for name in ("config.json", "metrics.jsonl", "model.safetensors", "ema.safetensors", "summary.json"):
        assert (run / name).is_file()
    last = runs.read_history(run)[-1]
    for weights in ("last", "best", "ema"):
        assert cli.main(["eval", str(run), "--weights", weights]) == 0
        measured = json.loads((run / "eval.json").read_text())
        assert measured["weights"] == weights
        if weights == "last":
            assert measured["top1"] == last["top1"]
            assert measured["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-7)
        if weights == "ema":
            assert measured["top1"] == last["ema_top1"]
    (run / "eval.json").unlink()
    (run / "eval.json").mkdir()  # as good as a folder that may only be read
    capsys.readouterr()
    assert cli.main(["eval", str(run)]) == 0
    assert f"({measured['images']} images)\nnot saved: cannot write {run / 'eval.json'}" in capsys.readouterr().out
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["train", f"--resume=~/{run.name}", f"--output={run}"]) == 0
    assert cli.main(["train", f"--output=~/{run.name}", "--resume=auto"]) == 0
    assert cli.main(["train", "--resume", str(run)]) == 0  # everything comes from config.json; nothing is left to do
    assert cli.main(["train", *options(run, attention="g3b", epochs=2, model_ema_decay=0.9)]) == 2
    assert "--resume auto" in capsys.readouterr().err


def test_config_repeats_the_run(tmp_path: Path) -> None:
    assert cli.main(["train", *options(tmp_path / "first", attention="g3u", epochs=1)]) == 0
    settings, facts = runs.read_config(tmp_path / "first")
    assert facts["num_classes"] == 10
    assert set(facts["versions"]) >= {"karat", "torch", "timm", "python"}
    again = Settings.from_dict({**settings.as_dict(), "output": str(tmp_path / "second")})
    from karat.train.classify import train

    train(again)
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second")


def test_evaluation_at_another_size_resamples(tmp_path: Path) -> None:
    assert cli.main(["train", *options(tmp_path / "run", attention="g3b", epochs=1)]) == 0
    assert cli.main(["eval", str(tmp_path / "run"), "--img-size", "16"]) == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["img_size"] == 16


def test_compare_makes_table_figure_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = options(tmp_path / "out", epochs=1)
    assert cli.main(["compare", "softmax", "g3b", "--seeds", "2", *line]) == 0
    said = capsys.readouterr().out
    assert "±" in said
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    table = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["attention"] for row in table["rows"]] == ["softmax", "g3b"]
    for row in table["rows"]:
        single = [runs.read_history(Path(run))[-1]["top1"] for run in row["runs"]]
        assert row["top1"] == pytest.approx(sum(single) / 2)
        assert row["top1_deviation"] == pytest.approx(abs(single[0] - single[1]) / 2**0.5)
    assert table["rows"][1]["parameters"] > table["rows"][0]["parameters"]
    # a comparison that was cut off goes on: finished runs are not trained again
    before = (tmp_path / "out" / "softmax-s0" / "metrics.jsonl").read_text()
    assert cli.main(["compare", "softmax", "g3b", "--seeds", "2", *line, "--resume", "auto"]) == 0
    assert (tmp_path / "out" / "softmax-s0" / "metrics.jsonl").read_text() == before


def test_output_is_named_after_the_run_and_never_overwritten_unasked(tmp_path: Path) -> None:
    line = [word for word in options(tmp_path, epochs=1) if word not in ("--output", str(tmp_path))]
    first = tmp_path / "runs" / "digits-vit_tiny_patch16_224-softmax-s0"
    assert cli.main(["train", *line]) == 0
    assert cli.main(["train", *line]) == 0
    assert (first / "model.safetensors").is_file()
    assert (first.with_name(first.name + "-2") / "model.safetensors").is_file()
    assert cli.main(["train", *line, "--resume", "auto"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_recipe_presets_are_defaults_that_options_override() -> None:
    from karat.train.commands import defaults

    assert defaults(["--recipe", "vit", "--lr", "1"]).recipe == RECIPES["vit"]
    assert defaults(["--data", "digits"]).recipe == RECIPES["digits"]
    assert defaults(["--data=torch/cifar10"]).recipe == RECIPES["quick"]
    assert defaults(["--data=torch/CIFAR10"]).recipe == RECIPES["quick"]  # which is read as torch/cifar10
    assert defaults(["--data", "hfds/x", "--model", "swin_tiny_patch4_window7_224"]).recipe == RECIPES["swin"]
    assert defaults(["--data", "hfds/x", "--init", "hub:y"]).recipe == RECIPES["finetune"]
    assert Settings.make(data="hfds/x", epochs=7).recipe == RECIPES["vit"].override(epochs=7)


@pytest.mark.parametrize("base", REGISTERED)
def test_registered_names_have_the_recipe_of_the_model_that_they_convert(base: str) -> None:
    assert preset_for("auto", "hfds/x", f"karat_{base}", None) == preset_for("auto", "hfds/x", base, None)


def test_auto_is_resolved_before_it_is_written() -> None:
    small = resolve(Settings(data="torch/cifar10"))
    assert (small.model, small.img_size, small.patch_size) == ("vit_tiny_patch16_224", 32, 4)
    large = resolve(Settings(data="hfds/imagenet"))
    assert (large.model, large.img_size, large.preset) == ("vit_tiny_patch16_224", None, "vit")
    chosen = resolve(Settings(data="digits", embed_dim=48))
    assert chosen.embed_dim == 48


def test_settings_survive_json(tmp_path: Path) -> None:
    settings = tiny(tmp_path, attention="g3b,rank=4", clip_grad=None, scale=(0.5, 1.0))
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_process_with_their_status(tmp_path: Path, number: signal.Signals, status: int) -> None:
    run = tmp_path / "run"
    started = Started(KARAT, "train", *options(run, epochs=10_000))
    began = time.monotonic()
    while not (run / "metrics.jsonl").exists():  # torch takes its time to start where others compute too
        assert started.process.is_alive(), started.said()
        assert time.monotonic() - began < 300
        time.sleep(0.1)
    assert started.process.pid is not None
    os.kill(started.process.pid, number)
    done = started.said()
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert runs.read_history(run)


def test_small_real_images_get_a_small_model(shared_data: Path) -> None:
    chosen = resolve(Settings(data=str(shared_data / "cifar10")))
    assert (chosen.img_size, chosen.patch_size) == (32, 4)


@pytest.mark.parametrize(("command", "run"), [("train", ""), ("compare softmax g3b --seeds 2", "g3b-s1")])
def test_each_directory_of_the_data_is_read_once(
    command: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From --data to the last epoch: options' defaults, settings, model and trainer share one opening."""
    data = tmp_path / "data"
    for part in ("train", "val"):
        for name in ("a", "b"):
            (data / part / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (12, 12)).save(data / part / name / f"{index}.png")
    folders = [str(path) for path in (data, *data.rglob("*")) if path.is_dir()]
    read: Counter[str] = Counter()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(path: Any = ".") -> Any:
            read[os.path.abspath(path)] += os.path.abspath(path).startswith(str(data))
            return call(path)

        return count

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    line = ["--data", str(data), "--embed-dim", "16", "--depth", "1", "--num-heads", "2", "--device", "cpu"]
    assert cli.main([*command.split(), *line, "--epochs", "1", "--output", str(tmp_path / "out"), "--track"]) == 0
    assert {path: count for path, count in read.items() if count} == dict.fromkeys(folders, 1)
    assert runs.read_config(tmp_path / "out" / run)[0].preset == "quick"  # it did look at the images
    read.clear()
    with pytest.raises(SystemExit):
        cli.main([command.split()[0], "--help"])
    assert not sum(read.values())
