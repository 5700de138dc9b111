"""The presets are the published tables, and a recipe refuses what it can't mean."""

import json
import math
from dataclasses import replace

import pytest
import torch

from karat.runs.classification import Settings
from karat.runs.recipes import QUICK, RECIPES, Recipe, get_recipe
from karat.train.optim import create_schedule, rate_notes


def test_vit_is_table_5():
    r = RECIPES["vit"]
    assert (r.opt, r.opt_eps, r.opt_betas[0], r.weight_decay, r.clip_grad) == ("adamw", 1e-6, 0.9, 0.05, 1.0)
    assert (r.sched, r.epochs, r.warmup_epochs, r.warmup_lr, r.min_lr) == ("cosine", 100, 5, 1e-6, 1e-5)
    assert (r.scale, r.ratio, r.hflip, r.color_jitter, r.crop_pct) == ((0.08, 1.0), (0.67, 1.5), 0.5, 0.4, 0.9)
    assert (r.aa, r.smoothing, r.model_ema_decay) == ("rand-m15-n2-mstd1.0-inc1", 0.1, 0.99992)
    assert (r.mixup, r.cutmix, r.mixup_switch_prob, r.mixup_mode, r.batch_size) == (0.8, 1.0, 0.5, "batch", 128)


def test_convit_and_swin_differ_from_vit_as_tables_9_and_10_say():
    common = {"opt_eps": 1e-8, "aa": "rand-m9-mstd0.5-inc1", "model_ema_decay": None}
    assert RECIPES["convit"] == replace(RECIPES["vit"], **common)
    assert RECIPES["swin"] == replace(RECIPES["vit"], **common, color_jitter=0.3)


@pytest.mark.parametrize("total", [32, 128, 512, 4096])
def test_rate_grows_with_the_total_batch(total):
    recipe = Recipe(lr=5e-4)
    assert recipe.scaled_lr(total) == pytest.approx(5e-4 * total / 512)


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip(name):
    recipe = get_recipe(name)
    assert Recipe(**json.loads(json.dumps(recipe.as_dict()))) == recipe


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0},
        {"epochs": 0},
        {"batch_size": -1},
        {"hflip": 1.5},
        {"smoothing": 1.0},
        {"weight_decay": -0.1},
        {"clip_grad": 0.0},
        {"scale": (0.5, 0.1)},
        {"scale": (0.5, 2.0)},
        {"ratio": (1.0,)},
        {"crop_pct": 1.2},
        {"model_ema_decay": 1.0},
        {"train_crop_mode": "zoom"},
        {"mixup_mode": "all"},
        {"interpolation": "random"},
        {"train_interpolation": "cubic"},
        {"remode": "noise"},
        {"aa": "rand-x3"},
        {"aa": "nonsense"},
        {"aa": "augmix-q2"},
        {"aa": ""},
        {"min_lr": -1.0},
    ],
    ids=str,
)
def test_bad_values_are_named(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"{name}="):
        Recipe(**values)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="unknown recipe 'deit'; the presets are vit"):
        get_recipe("deit")
    with pytest.raises(ValueError, match="no 'learning_rate'"):
        RECIPES["vit"].override(learning_rate=1.0)


def test_one_cycle_rises_to_the_peak_and_falls_by_a_cosine_from_there() -> None:
    recipe = QUICK.override(epochs=4, warmup_epochs=1.5, warmup_lr=1e-4, min_lr=1e-5, warmup_prefix=True)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-2)
    schedule = create_schedule(optimizer, recipe, updates_per_epoch=10)
    found = []
    for update in range(41):
        schedule.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    rise = [1e-4 + (1e-2 - 1e-4) * update / 15 for update in range(15)]
    fall = [1e-5 + (1e-2 - 1e-5) * (1 + math.cos(math.pi * (update - 15) / 25)) / 2 for update in range(15, 41)]
    assert found == pytest.approx(rise + fall)


def test_steps_are_of_ninety_epochs_as_timm_has_them() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = create_schedule(optimizer, QUICK.override(sched="step", epochs=200, warmup_epochs=0), 100)
    for update, rate in ((0, 1e-2), (8999, 1e-2), (9000, 1e-3), (18000, 1e-4)):
        schedule.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize("sched", ["plateau", "none", "cosin"])
def test_what_is_no_schedule_of_updates_is_refused(sched: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    with pytest.raises(ValueError, match=rf"sched.*{sched}.*use cosine, or constant"):
        create_schedule(optimizer, QUICK.override(sched=sched), 10)


class Batches(list):
    """As many as a loader has, of so many images."""

    batch_size = 64


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, ""),
        ({"min_lr": 1e-2}, ""),
        ({"min_lr": 2e-2}, "begins at 1e-06 and ends at 0.02, its peak is 0.01"),
        ({"min_lr": 2e-2, "sched": "constant"}, ""),
        ({"warmup_lr": 2e-2}, "begins at 0.02"),
        ({"warmup_lr": 2e-2, "warmup_epochs": 0}, ""),
        ({"warmup_epochs": 20}, ""),
        ({"warmup_epochs": 21}, "warm-up of 21 epochs is longer than the run of 20"),
        ({"batch_size": 127}, ""),
        ({"batch_size": 128}, "for updates of 256 images a process, and the data gives 128"),
        ({"operator_lr_scale": 11}, "learn at 11 times the rate"),
    ],
    ids=str,
)
def test_a_rate_that_may_not_be_meant_is_told_of(values, said: str) -> None:
    optimizer = torch.optim.SGD([{"params": torch.nn.Parameter(torch.zeros(1)), "lr_scale": 0.1}], lr=1e-2)
    recipe = QUICK.override(**{"batch_size": 64} | values)
    settings = Settings(recipe=recipe, grad_accum_steps=2)
    schedule = create_schedule(optimizer, recipe, 50)
    notes = list(rate_notes(schedule, settings, Batches(range(100)), operators=True))
    assert len(notes) == bool(said)
    assert said in "".join(notes)


@pytest.mark.parametrize("prefix", [False, True])
def test_milestones_are_fractions_of_the_run_beside_a_warm_up_too(prefix: bool) -> None:
    recipe = QUICK.override(sched="multistep", epochs=4, warmup_epochs=1, milestones=(0.5, 0.75), warmup_prefix=prefix)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = create_schedule(optimizer, recipe, updates_per_epoch=10)
    found = []
    for update in range(10, 40):
        schedule.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([1e-2] * 9 + [1e-3] * 10 + [1e-4] * 11)  # timm: milestone 20 is update 19


def test_a_milestone_inside_the_warm_up_is_refused() -> None:
    recipe = QUICK.override(sched="multistep", epochs=4, warmup_epochs=2, milestones=(0.5, 0.75), warmup_prefix=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    with pytest.raises(ValueError, match="fall at update 20, inside the warm-up of 20"):
        create_schedule(optimizer, recipe, updates_per_epoch=10)
    assert create_schedule(optimizer, recipe.override(sched="cosine"), updates_per_epoch=10) is not None
