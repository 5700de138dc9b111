"""Converted models on several devices: two processes sum to one, a replica computes with its own weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import karat
from support.attached import KINDS
from support.processes import python
from support.small_models import images, small_model

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


def replicated(model: nn.Module) -> nn.Module:
    """As `torch.nn.parallel.replicate` copies a model to another device, here to the same."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            setattr(copied, name, None if child is None else copies[child])
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            setattr(copied, name, None if value is None else value.clone())
    return copies[model]


@pytest.mark.parametrize("attention", ["g3b", "g3u", "g3u,residual=softmax"])
@pytest.mark.parametrize("kind", ["rotary", "windows, written out", "multi-head", "vit"])
def test_a_replica_computes_with_its_own_weights_alone(kind: str, attention: str) -> None:
    if kind == "vit":
        model, x = small_model("vit", attention).eval(), images("vit")
    else:
        model, x = KINDS[kind].model_and_input()
        karat.karatize(model, attention, example=x)
    for value in model.parameters():  # torchvision's head starts at zero
        value.data += 0.1 * torch.randn_like(value)
    expected = model(x)
    replica = replicated(model)
    for value in model.parameters():
        value.data.zero_()
    torch.testing.assert_close(replica(x), expected)
    assert not torch.equal(model(x), expected)
