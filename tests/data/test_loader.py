"""Order, sharding, resumption and randomness: what comes out depends on seed and epoch and on nothing else."""

import math
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karat.data.augmentation import pad_crop_flip
from karat.data.order import ImageOrder
from karat.data.randomness import keyed_randomness, mix, uniforms
from karat.runs.recipes import RECIPES
from support.data import load

RECIPE = {"resident": RECIPES["quick"], "one by one": RECIPES["vit"].override(reprob=0.5)}
kinds = pytest.mark.parametrize("kind", RECIPE)


def digits(kind, **options):
    return load("digits", RECIPE[kind], img_size=16, fraction=0.2, **{"batch_size": 16, **options})


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    return all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True))


@kinds
def test_resumed_epoch_is_bit_equal(kind):
    whole = digits(kind, seed=3).train
    whole.set_epoch(2)
    batches = list(whole)
    for start in (0, 1, 7, len(whole) - 1, len(whole)):
        fresh = digits(kind, seed=3).train
        fresh.set_epoch(2)
        assert same(fresh.iter_from(start), batches[start:])


@kinds
def test_seed_and_epoch_change_order_and_augmentation(kind):
    loader = digits(kind).train
    first = list(loader)
    assert same(first, loader)
    loader.set_epoch(1)
    assert not same(first, loader)
    assert not same(first, digits(kind, seed=1).train)


def test_workers_change_nothing():
    alone, helped = (digits("one by one", workers=workers).train for workers in (0, 2))
    for epoch in range(2):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        assert same(alone, helped)
    next(helped.iter_from(3))  # an iteration given up half-way leaves nothing behind
    assert same(alone, helped)
    groups = {os.getpgid(worker.pid) for worker in helped._torch_loader._iterator._workers}
    assert len(groups | {os.getpgrp()}) == 3  # a signal to a group of processes is obeyed by its main process alone


@kinds
def test_two_processes_see_what_one_sees(kind):
    one = digits(kind, batch_size=16).train
    two = [digits(kind, batch_size=8, rank=rank, world_size=2).train for rank in range(2)]
    for (images, labels), (a, la), (b, lb) in zip(one, *two, strict=True):
        assert torch.equal(images[0::2], a)
        assert torch.equal(images[1::2], b)
        assert torch.equal(labels, torch.stack([la, lb], 1).flatten())


@kinds
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_evaluation_sees_each_image_once(kind, world_size):
    whole = torch.cat([images for images, _ in digits(kind).eval])
    parts, most = [], math.ceil(len(whole) / (9 * world_size))
    for rank in range(world_size):
        loader = digits(kind, rank=rank, world_size=world_size, batch_size=9).eval
        batches = list(loader)
        assert len(batches) == len(loader) == most  # a forward pass may take all processes
        parts += [images[labels >= 0] for images, labels in batches]
    together = torch.cat(parts)
    assert together.shape == whole.shape

    def rows(images):
        return sorted(map(tuple, images.flatten(1).tolist()))

    assert rows(together) == rows(whole)


@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 5),
    train=st.booleans(),
    repeats=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_order_shares_positions_without_repeats(n, batch_size, world_size, train, repeats):
    if n < world_size:
        with pytest.raises(ValueError, match="use at most"):
            ImageOrder(n, batch_size, train=train, seed=0, rank=0, world_size=world_size)
        return
    ranks = [
        ImageOrder(n, batch_size, train=train, seed=0, rank=rank, world_size=world_size, repeats=repeats)
        for rank in range(world_size)
    ]
    seen = [p for order in ranks for batch in range(order.batches) for p in order.positions(batch)]
    assert len(seen) == len(set(seen))
    assert all(order.batches >= 1 for order in ranks)
    if train:
        assert len({order.batches for order in ranks}) == 1
        assert all(len(o.positions(b)) == o.batch_size for o in ranks for b in range(o.batches))
    else:
        assert sorted(seen) == list(range(n))
        assert max(order.batches for order in ranks) == ranks[0].most_batches
    order = ranks[0].permutation(4)
    assert len(order) == n
    counts = torch.bincount(order, minlength=n)
    assert counts.max() <= max(1, repeats if train else 1)


def test_repeated_augmentation_differs_between_the_copies():
    recipe = RECIPES["vit"].override(aug_repeats=2)
    data = load("digits", recipe, img_size=16, batch_size=32, fraction=0.1)
    images, labels = next(iter(data.train))
    assert torch.equal(labels[0::2], labels[1::2])
    assert not torch.equal(images[0::2], images[1::2])


def test_loading_leaves_the_models_randomness_alone():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    loaders = [digits(kind).train for kind in RECIPE]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for loader in loaders:
        for _ in loader:
            pass
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_keyed_randomness_repeats():
    def draw(key):
        with keyed_randomness(key):
            return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    assert draw(mix(1, 2, 3)) == draw(mix(1, 2, 3))
    assert draw(mix(1, 2, 3)) != draw(mix(1, 3, 2))


def test_mix_spreads_its_keys():
    assert (
        len({mix(seed, epoch, position) for seed in range(8) for epoch in range(8) for position in range(64)}) == 4096
    )


def test_uniforms_are_uniform_and_independent_of_the_batch():
    draws = uniforms(mix(7), range(20000), 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.allclose(draws.mean(0), 0.5, atol=0.02)
    assert np.allclose(np.cov(draws.T), np.eye(3) / 12, atol=0.005)
    assert np.array_equal(draws[500:600], uniforms(mix(7), range(500, 600), 3))


def test_pad_crop_flip_shifts_and_mirrors_each_image_by_itself():
    images = torch.randint(1, 256, (64, 3, 16, 16), dtype=torch.uint8)
    out = pad_crop_flip(images, 5, range(64), 0.5)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    shifts, mirrored = set(), 0
    for image, wide in zip(out, padded, strict=True):
        found = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(image.flip(2) if flip else image, wide[:, top : top + 16, left : left + 16])
        ]
        assert len(found) == 1
        shifts.add(found[0][:2])
        mirrored += found[0][2]
    assert len(shifts) > 15
    assert 20 < mirrored < 44
    assert torch.equal(out[10:20], pad_crop_flip(images[10:20], 5, range(10, 20), 0.5))


def test_a_batch_larger_than_the_data_shrinks_to_it():
    data = load("digits", RECIPES["quick"], fraction=0.02, batch_size=512)
    assert data.train.batch_size == data.train.num_samples == len(next(iter(data.train))[0]) == 28


def test_a_dead_worker_is_a_clear_error():
    import os

    class Fatal(dict):
        def __getitem__(self, index):
            os._exit(1)

    loader = digits("one by one", workers=1).train
    loader.views.source = Fatal()
    with pytest.raises(RuntimeError, match="data worker died"):
        list(loader)
