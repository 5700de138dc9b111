"""Attached models in two processes: gradients are those of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.training import python

TWO = """
import os, sys
import torch, karat
from torch import distributed, nn
from support.attached import KINDS
torch.set_num_threads(1)
pids = []
for rank in range(2):
    if not (pid := os.fork()):  # torch is imported once; the parent runs no kernel, so a fork is safe
        break
    pids.append(pid)
else:
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    raise SystemExit
distributed.init_process_group("gloo", store=distributed.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
for kind, attention in (("rotary", "g3u"), ("windows, written out", "g3b,residual=softmax"), ("multi-head", "g3b"),
                        ("pooled keys", "g3b,order=PhiW"), ("two calls", "static-b"), ("folded heads", "g2b")):
    model, x = KINDS[kind].model_and_input()
    karat.karatize(model, attention, example=x)
    model(x).square().mean().backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    parallel(x[rank:rank + 1]).square().mean().backward()
    halves = [p.grad for p in model.parameters() if p.grad is not None]
    for found, expected in zip(halves, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
distributed.destroy_process_group()
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_sum_to_one(tmp_path: Path) -> None:
    done = python(TWO, str(tmp_path / "store"), timeout=300)
    assert done.stdout.strip() == "[0, 0]", done.stderr
