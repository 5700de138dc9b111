"""What all tests share: one thread, fixed seeds, the folder of real data when it is there."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in subprocesses
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")  # what torch compiles has no vectors: half the compiler's time

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # kernels run interpreted; read when Triton is imported, as timm does
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.fsync = lambda file: None  # no test cuts the power, and the disk takes longer than the training
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_finish() -> None:
    """What was imported is looked through once, not by the collection of garbage at the start of every run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  timm's mixup draws from numpy's global state
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data is not there: ../shared/data")
    return SHARED_DATA


# Small runs to look at, trained once for all tests that read runs.
SIZE = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


def make_run(folder: Path, attention: str, **values: object) -> Path:
    """A run of two epochs on some of the digits, with trajectory checkpoints."""
    torch.set_num_threads(1)
    from karat.runs.classification import Settings
    from karat.train.classify import train

    settings = {
        "model": "vit_tiny_patch16_224",
        "data": "digits",
        "data_fraction": 0.1,
        "epochs": 2,
        "batch_size": 32,
        "checkpoints": "trajectory",
        "device": "cpu",
        "track": (),
        **SIZE,
        **values,
    }
    train(Settings.make(attention=attention, output=folder, **settings))
    return folder


@pytest.fixture(scope="session")
def karat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "g2b", "g2b,rank=3", model_ema_decay=0.9)


@pytest.fixture(scope="session")
def softmax_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "softmax", "softmax", checkpoints="last")
