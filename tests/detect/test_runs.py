"""Runs of detection: the loop that classification has, resumed bit-equal; evaluated, drawn, begun from classifiers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from karat import runs
from karat.cli import main
from karat.detect.coco import CocoPart
from karat.detect.compare import compare_runs
from karat.detect.detector import build_detector
from karat.detect.evaluate import measure
from karat.detect.init import load_init, load_trunk
from karat.detect.measure import evaluate_run
from karat.detect.settings import DetectSettings
from karat.detect.task import Detection, total_loss, train
from karat.models.create import create_model
from karat.models.transfer import transfer_attention
from karat.runs.classification import Settings
from karat.runs.files import read_tensors, write_tensors
from karat.runs.weights import Given
from karat.train.engine import Trainer
from karat.train.init import DROPPED, FRESH, LOADED, RESIZED
from support.detection import TINY, tiny, write_coco
from support.processes import python


class CutOff(BaseException):
    """Stands for the process's death."""


def outcome(run: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    weights = {name: t.numpy().tobytes() for name, t in read_tensors(run / "model.safetensors").items()}
    timed = ("seconds", "ms_per_step", "images_per_second", "peak_memory_mib")
    return weights, [{k: v for k, v in line.items() if k not in timed} for line in runs.read_history(run)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data"), 8)


Detections = list[dict[str, Any]]
MEASURED: list[tuple[CocoPart, Detections]] = []  # what the training of `finished` measured, in order


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"

    def watched(model: Any, batches: Any, part: CocoPart, accelerator: Any) -> tuple[dict[str, float], Detections]:
        figures, found = measure(model, batches, part, accelerator)
        MEASURED.append((part, found))
        return figures, found

    MEASURED.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("karat.detect.task.measure", watched)
        train(tiny(data, folder, attention="g1b,rank=2", recovery_interval=3, model_ema_decay=0.9, eval_train=True))
    return folder


def detections(run: Path) -> Detections:
    found: Detections = json.loads((run / "detections.json").read_text())
    return found


def alike(ours: Detections, theirs: Detections) -> bool:
    """The same images, classes, boxes and scores, of which there are some; to the rounding of other batches."""
    return 0 < len(ours) == len(theirs) and all(
        (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        and [*a["bbox"], a["score"]] == pytest.approx([*b["bbox"], b["score"]], abs=0.02, rel=1e-3)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("lives", [7])
def test_cut_off_and_resumed_ends_bit_equal(data: Path, finished: Path, tmp_path: Path, lives: int) -> None:
    values = {"attention": "g1b,rank=2", "recovery_interval": 3, "model_ema_decay": 0.9, "eval_train": True}
    doomed = Trainer(Detection(), tiny(data, tmp_path / "run", **values))

    def strike() -> None:
        if doomed.progress.step == lives:
            raise CutOff

    doomed.after_step = strike  # type: ignore[method-assign]
    with pytest.raises(CutOff):
        doomed.fit()
    train(tiny(data, tmp_path / "run", resume="auto", **values))
    assert outcome(tmp_path / "run") == outcome(finished)


def test_a_run_holds_what_is_needed(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["task"] == "detect"
    assert config["categories"] == [{"id": 3, "name": "fig"}, {"id": 9, "name": "nut"}]
    last = runs.read_history(finished)[-1]
    assert {"box_AP", "mask_AP", "train_box_AP", "ema_box_AP", "train_loss", "images"} <= set(last)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["finished"]
    assert "box_AP" in summary["best"]


def test_evaluation_of_a_run_is_what_training_measured(finished: Path) -> None:
    (_, own), (_, averaged), (_, training) = MEASURED[-3:]
    last = runs.read_history(finished)[-1]
    cases: tuple[tuple[dict[str, Any], Detections, str], ...] = (
        ({}, own, "box_AP"),
        ({"weights": "ema"}, averaged, "ema_box_AP"),
        ({"part": "train", "batch_size": 1}, training, "train_box_AP"),
    )
    for values, expected, name in cases:
        assert evaluate_run(finished, **values)["box_AP"] == pytest.approx(last[name], abs=1e-3)
        assert alike(detections(finished), expected)
    assert not alike(own, averaged)
    assert {result["image_id"] for result in own}.isdisjoint(result["image_id"] for result in training)


def test_averaged_weights_are_not_measured_on_the_training_images(finished: Path) -> None:
    assert [len(part) for part, _ in MEASURED] == [2, 2, 6] * 2


def test_evaluation_of_other_data(data: Path, finished: Path, tmp_path: Path) -> None:
    """A folder's evaluation part, or its training part; its images beside it, though the run had --images."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    config["settings"]["images"] = str(data.parent)
    (run / "config.json").write_text(json.dumps(config))
    for name, count in (("train", 5), ("valid", 4)):
        write_coco(tmp_path / "other" / name, count, size=(30, 50))  # names as in the run's own folder, other sizes
    for part, count in (("eval", 4), ("train", 5)):
        assert evaluate_run(run, data=str(tmp_path / "other"), part=part)["images"] == count
    alone = tmp_path / "other" / "train" / "instances.json"
    assert evaluate_run(run, data=str(alone))["images"] == 5
    (tmp_path / "moved").mkdir()
    alone = alone.rename(tmp_path / "moved" / "alone.json")
    with pytest.raises(ValueError, match=r"'0\.png' is missing"):
        evaluate_run(run, data=str(alone))
    assert evaluate_run(run, data=str(alone), images=str(tmp_path / "other" / "train"))["images"] == 5


def test_command_line_trains_evaluates_and_draws(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["detect", "train", "--data", str(data), "--output", str(tmp_path / "run"), "--attention", "g1u"]
    for name, value in (TINY | {"epochs": 1}).items():
        words = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
        line += [f"--{name.replace('_', '-')}", *words]
    assert main(line) == 0, capsys.readouterr().err
    assert "finished: box AP" in capsys.readouterr().out
    assert main(["detect", "eval", str(tmp_path / "run"), "--part", "train"]) == 0
    assert "6 images" in capsys.readouterr().out
    other = tmp_path / "stranger.png"
    other.write_bytes((data.parent / "0.png").read_bytes())
    pictures = [str(data.parent / "1.png"), str(other)]
    assert main(["detect", "predict", str(tmp_path / "run"), *pictures, "--score", "0.0"]) == 0
    from PIL import Image

    for name, width in (("1", 120), ("stranger", 60)):  # beside the truth, and alone
        with Image.open(tmp_path / "run" / "predictions" / f"{name}.jpg") as drawing:
            assert drawing.width == width
    found = json.loads((tmp_path / "run" / "predictions" / "predictions.json").read_text())
    assert all({"file_name", "bbox", "score", "category_id", "segmentation"} <= set(entry) for entry in found)


def test_runs_side_by_side(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", "compare", str(finished), "--output", str(tmp_path / "out")]) == 0
    assert "AP50" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())
    last = runs.read_history(finished)[-1]
    assert (row["epochs"], row["box_AP"], row["train_box_AP50"]) == (2, last["box_AP"], last["train_box_AP50"])
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000


def test_runs_of_the_same_name_have_a_curve_each(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("karat.detect.compare.save", lambda figure, _: figures.append(figure))
    folders = [tmp_path / name / "run" for name in "ab"]
    for folder in folders:
        shutil.copytree(finished, folder)
    rows = compare_runs(folders, tmp_path / "out")
    _, drawn = figures[0].axes[-1].get_legend_handles_labels()
    assert drawn == [row["run"] for row in rows] == [str(folder) for folder in folders]


BAD = {
    "detect fly": "unknown action 'fly'",
    "detect train --data nowhere": "no such file or folder",
    "detect train --data DATA --model convit_tiny": "no plain ViT",
    "detect train --data DATA --recipe soup": "the presets for detection are published, jitter, small",
    "detect train --data DATA --img-size 100": "multiple of the patch size",
    "detect train --data DATA --jitter 0 2": "jitter=(0.0, 2.0)",
    "detect train --data DATA --eval-images 99": "--eval-images 99",
    "detect train --data DATA --img-size 16 --recipe small": "img_size=16 is a single patch of 16 pixels",
    "detect train --data DATA --img-size 224 --patch-size 14 --recipe small": "patch size 14: a detector takes 4, 8",
    "detect train --data DATA --images nowhere": "--images nowhere: no such folder",
    "detect eval nowhere": "is no run's folder",
    "detect eval RUN --batch-size 0": "--batch-size=0: give 1 or more",
    "detect predict RUN nowhere.jpg": "nowhere.jpg is not there",
    "detect predict RUN DATA": "is not an image of a known format",
    "detect predict RUN DATA --score 2": "score=2.0",
    "detect compare nowhere": "is no run's folder",
    "eval RUN": "a run of `karat train` is needed here",
    "train --resume RUN": "a run of `karat train` is needed here",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(
    line: str,
    data: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.replace("DATA", str(data)).replace("RUN", str(finished)).split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(BAD[line]) in error


def test_images_without_objects_train(data: Path) -> None:
    detector = build_detector(tiny(data), 2)
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 40, 64, dtype=torch.uint8),
    }
    loss = total_loss(detector, ([torch.rand(3, 40, 64)], [nothing]))
    loss.backward()
    assert torch.isfinite(loss)
    missing = [name for name, p in detector.named_parameters() if p.grad is None]
    assert missing == []  # several processes wait for every gradient
    with pytest.raises(ValueError, match="exceeds img_size=64"):
        detector([torch.rand(3, 80, 64)], [nothing])


@pytest.mark.parametrize("patch", [4, 8, 16])
@torch.no_grad()
def test_regions_are_pooled_at_the_levels_own_scales(data: Path, patch: int) -> None:
    """Whatever the padding of the batches seen: a region of a map of x-coordinates pools to its own coordinates."""
    detector = build_detector(tiny(data, patch_size=patch, img_size=8 * patch), 2).eval()
    detector([torch.rand(3, 4 * patch, 3 * patch)])  # half of it is padding
    for pool in (detector.roi_heads.box_roi_pool, detector.roi_heads.mask_roi_pool):
        strides = [patch / 4, patch / 2, patch, 2 * patch]
        assert pool.scales == [1 / stride for stride in strides]
        sides = [int(8 * patch / stride) for stride in strides]
        maps = {
            f"p{level}": ((torch.arange(side) + 0.5) * stride).expand(1, 1, side, side).contiguous()
            for level, side, stride in zip(range(2, 6), sides, strides, strict=True)
        }
        box = torch.tensor([[2.0 * patch, 2.0 * patch, 5.0 * patch, 6.0 * patch]])
        pooled = pool(maps, [box], [(8 * patch, 8 * patch)])
        # torchvision's unaligned pooling reads half a cell too far
        assert float(pooled.mean()) == pytest.approx(3.5 * patch, abs=patch / 8 + 1e-3)


@pytest.mark.parametrize("patch", [2, 12, 14])
def test_patches_without_whole_strides_are_refused(data: Path, patch: int) -> None:
    with pytest.raises(ValueError, match=f"patch size {patch}: a detector takes 4, 8"):
        build_detector(tiny(data, patch_size=patch, img_size=4 * patch), 2)


def test_a_patch_need_not_divide_the_images_that_timm_takes(data: Path) -> None:
    assert build_detector(tiny(data, patch_size=64, img_size=128), 2).trunk.stride == 64


def test_published_settings_reach_torchvision() -> None:
    settings = DetectSettings.make(attention="softmax", embed_dim=16, num_heads=2, depth=4)
    detector = build_detector(settings, 80)
    assert detector.rpn._pre_nms_top_n == {"training": 12000, "testing": 6000}
    assert detector.rpn._post_nms_top_n == {"training": 2000, "testing": 1000}
    assert detector.rpn.nms_thresh == 0.7
    heads = detector.roi_heads
    assert (heads.score_thresh, heads.nms_thresh, heads.proposal_matcher.high_threshold) == (0.05, 0.5, 0.5)
    assert detector.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert detector.backbone.out_channels == 256
    recipe = settings.recipe
    assert (recipe.lr, recipe.opt_eps, recipe.weight_decay, recipe.batch_size) == (1e-4, 1e-6, 0.1, 32)
    assert recipe.epochs * 118_287 // 32 == pytest.approx(184_375, rel=0.01)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("classifier") / "run"
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
    from karat.train.classify import train as train_classifier

    values = {"data": "digits", "recipe": "quick", "data_fraction": 0.1, "epochs": 1, "track": (), "device": "cpu"}
    train_classifier(
        Settings.make(attention="g1b,rank=2", output=folder, model="vit_tiny_patch16_224", **sizes, **values)
    )
    return folder


def test_a_classifier_gives_the_trunk_its_weights(data: Path, classifier: Path) -> None:
    """Of 2x2 tokens and a class token, to windows of 2x2 and a global grid of 4x4."""
    settings = tiny(data, attention="g1b,rank=2", init=str(classifier))
    detector = build_detector(settings, 2)
    fates = load_trunk(detector, settings)
    by_fate = {fate: {f.part for f in fates if f.fate == fate} for fate in (LOADED, RESIZED, FRESH, DROPPED)}
    assert by_fate[RESIZED] == {"operators", "pos_embed", "patch_embed"}  # the classifier's images were grey
    assert {"blocks: attn", "blocks: mlp"} <= by_fate[LOADED]
    assert {"pyramid", "rpn", "heads"} <= by_fate[FRESH]
    theirs = read_tensors(classifier / "model.safetensors")
    mine = detector.trunk.vit.state_dict()
    assert torch.equal(mine["blocks.0.attn.qkv.weight"], theirs["blocks.0.attn.qkv.weight"])
    windowed, whole = (mine[f"blocks.{i}.attn.operator.layers.0.coefficients"] for i in (0, 1))
    assert torch.equal(windowed, theirs["blocks.0.attn.operator.layers.0.coefficients"][:, :, 1:])
    assert whole.shape[2] == 16
    # amplitudes are scaled so that sums over keys keep their size (SPEC §9)
    wanted = theirs["blocks.1.attn.operator.layers.0.coefficients"][:, :, 1:].sum(2)
    factors = (weights["blocks.1.attn.operator.layers.0.factor"] for weights in (mine, theirs))
    ratio = float(next(factors)[0] / next(factors)[0])
    assert torch.allclose(whole.sum(2) * ratio, wanted, atol=0.2 * float(wanted.abs().max()))


def test_a_softmax_classifier_leaves_operators_fresh(data: Path, classifier: Path) -> None:
    settings = tiny(data, attention="dog-b,rank=2", init=str(classifier))
    detector = build_detector(settings, 2)
    fates = {(f.part, f.fate) for f in load_trunk(detector, settings)}
    assert ("operators", FRESH) in fates
    with pytest.raises(ValueError, match="no such run or file"):
        load_trunk(detector, tiny(data, init="nowhere"))


@pytest.mark.parametrize("side", [64, 96])
def test_a_detector_gives_all_it_has_at_another_size_too(data: Path, finished: Path, side: int) -> None:
    settings = tiny(data, attention="g1b,rank=2", init=str(finished), img_size=side)
    detector = build_detector(settings, 2)
    fates = load_init(detector, settings)
    assert {f.fate for f in fates} == ({LOADED} if side == 64 else {LOADED, RESIZED})
    assert {f.part for f in fates if f.fate == RESIZED} == (set() if side == 64 else {"operators", "backbone"})
    theirs = read_tensors(finished / "model.safetensors")
    mine = detector.state_dict()
    changed = {name for name in mine if mine[name].shape != theirs[name].shape}
    assert all("operator" in name or "pos_embed" in name for name in changed)
    assert (changed == set()) == (side == 64)
    assert torch.equal(mine["rpn.head.bbox_pred.weight"], theirs["rpn.head.bbox_pred.weight"])
    more = build_detector(settings, 5)
    assert {("roi_heads", FRESH), ("roi_heads", LOADED)} <= {(f.part, f.fate) for f in load_init(more, settings)}


@pytest.mark.parametrize("alone", [False, True])
def test_weights_from_a_file_are_what_its_run_gives(data: Path, classifier: Path, tmp_path: Path, alone: bool) -> None:
    """Of another image size than the model's own: position embeddings and operators are resampled alike."""
    given, file = [], classifier / "model.safetensors"
    for init in (Path(shutil.copy(file, tmp_path)) if alone else file, classifier):
        settings = tiny(data, attention="g1b,rank=2", init=str(init))
        detector = build_detector(settings, 2)
        fates = {replace(f, why="") for f in load_trunk(detector, settings) if f.fate in (LOADED, RESIZED)}
        given.append((fates, detector.trunk.vit.state_dict()))
    (fates, mine), (their_fates, theirs) = given
    assert fates == their_fates
    assert {f.part for f in fates if f.fate == RESIZED} == {"operators", "pos_embed", "patch_embed"}
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit3_small_patch16_224", 0),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_base_patch16_reg4_gap_256", 0),
    ],
)
def test_a_files_tokens_reach_the_trunk_whatever_stands_before_them(
    data: Path, tmp_path: Path, name: str, own: int
) -> None:
    source = timm.create_model(name, img_size=48, patch_size=16, embed_dim=16, depth=2, num_heads=2)
    weights = source.state_dict()
    weights["pos_embed"] = torch.randn_like(weights["pos_embed"])
    write_tensors(tmp_path / "x.safetensors", weights)
    settings = tiny(data, init=str(tmp_path / "x.safetensors"))
    detector = build_detector(settings, 2)
    fates = {f.part: f.fate for f in load_trunk(detector, settings) if f.fate in (LOADED, RESIZED)}
    assert fates["pos_embed"] == RESIZED
    window, side = settings.window, settings.recipe.img_size // 16
    expected = weights["pos_embed"][:, own:]
    for old, new in ((3, window), (window, side)):
        expected = resample_abs_pos_embed(expected, [new, new], [old, old], num_prefix_tokens=0)
    assert torch.allclose(detector.trunk.vit.pos_embed, expected, atol=1e-6)


def _student() -> torch.nn.Module:
    student, teacher = (
        create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2) for _ in range(2)
    )
    return transfer_attention(student, teacher, torch.rand(1, 3, 32, 32))


SOURCES: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "a student of transferred attention": (_student, "its blocks have TransferredAttention"),
    "a KAN": (lambda: create_model("deep_kan", img_size=8, num_classes=2), "a KANClassifier is no plain ViT"),
    "Swin": (
        lambda: create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 1)),
        "a SwinTransformer is no plain ViT",
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_can_be_no_trunk_is_refused(data: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create, words = SOURCES[source]
    source = create()
    monkeypatch.setattr("karat.train.init.open_weights", lambda name: Given(name, source.state_dict(), source, "g1b"))
    settings = tiny(data, init="RUN")
    with pytest.raises(ValueError, match=f"--init RUN: it can't be a detector's trunk .{words}"):
        load_trunk(build_detector(settings, 2), settings)


def test_layer_wise_decay_and_no_weight_decay_know_the_trunk(data: Path) -> None:
    from karat.train.optim import parameter_groups

    settings = tiny(data, attention="g1b,rank=2", rel_pos=True, layer_decay=0.5)
    detector = build_detector(settings, 2)
    groups = parameter_groups(detector, settings.recipe)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    vit = detector.trunk.vit
    order = [
        vit.pos_embed,
        vit.blocks[0].mlp.fc1.weight,
        vit.blocks[1].mlp.fc1.weight,
        detector.rpn.head.bbox_pred.weight,
    ]
    found = [scale[id(p)] for p in order]
    assert found == sorted(found)
    assert len(set(found)) == 4
    assert found[-1] == 1.0
    for p in (vit.pos_embed, vit.blocks[0].attn.rel_pos_h, vit.blocks[0].attn.operator.W):
        assert decay[id(p)] == 0


@pytest.mark.parametrize("values", [{"amp_dtype": "bfloat16"}, {"grad_checkpointing": True, "grad_accum_steps": 2}])
def test_other_ways_to_train(data: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    settings = tiny(data, tmp_path / "run", attention="g1u,rank=2", view="pad", jitter=(0.5, 1.5), epochs=1, **values)
    assert train(settings)["finished"]


DISTRIBUTED = """
import sys
from pathlib import Path
from support.detection import tiny
from support.processes import twice
from karat.detect.task import train
from karat.detect.measure import evaluate_run
data, run = map(Path, sys.argv[1:])
def work():
    odd = {"eval_images": 3, "eval_train": True, "on_bad_image": "skip"}
    train(tiny(data, run, attention="g1u,rank=2", batch_size=1, epochs=1, hflip=0.0, **odd))
    evaluate_run(run)
twice(work)
"""


@pytest.mark.slow
def test_two_processes_evaluate_every_image(data: Path, tmp_path: Path) -> None:
    """Of three images, one a batch, one process has two; what the other one has can't be decoded."""
    data = shutil.copytree(data.parent, tmp_path / "data") / data.name
    (data.parent / "6.png").write_bytes(b"no image")
    done = python(DISTRIBUTED, str(data), str(tmp_path / "run"), timeout=240)
    assert done.returncode == 0, done.stderr
    (line,) = runs.read_history(tmp_path / "run")
    assert (line["images"], line["bad_images"]) == (2, 1)
    theirs = detections(tmp_path / "run")
    assert {result["image_id"] for result in theirs} == {5, 7}
    assert evaluate_run(tmp_path / "run")["box_AP"] == pytest.approx(line["box_AP"], abs=1e-3)
    assert alike(detections(tmp_path / "run"), theirs)
