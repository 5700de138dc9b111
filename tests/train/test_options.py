"""Options that change how a run is computed: each does what it says, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from karat import cli, create_model, runs
from karat.runs import checkpoint, files
from karat.runs.recipes import RECIPES
from karat.train import step
from karat.train.classify import Classification, train
from karat.train.engine import Trainer
from karat.train.measure import evaluate_run
from karat.train.optim import base_rate, create_optimizer, create_schedule, parameter_groups
from karat.train.snapshot import give
from support.pictures import images
from support.processes import python
from support.training import TINY, outcome, tiny

SIZES = {name: TINY[name] for name in ("img_size", "patch_size", "embed_dim", "num_heads")}


def rates(model: nn.Module, **values: object) -> dict[str, float]:
    """The factor of each parameter's learning rate."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, RECIPES["quick"].override(**values))
    return {names[id(p)]: group.get("lr_scale", 1.0) for group in groups for p in group["params"]}


def test_layer_decay_lowers_the_rate_block_by_block() -> None:
    model = create_model("vit_tiny_patch16_224", "g3b", depth=3, num_classes=4, **SIZES)
    found = rates(model, layer_decay=0.5)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["head.weight"] == 1
    for name in ("attn.qkv.weight", "attn.operator.W"):  # an operator goes with its block
        assert [found[f"blocks.{i}.{name}"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert found["patch_embed.proj.weight"] == 0.0625
    twice = rates(model, layer_decay=0.5, operator_lr_scale=2.0)
    assert twice["blocks.0.attn.operator.W"] == 0.25
    assert set(rates(model).values()) == {1.0}


def test_layer_decay_leaves_a_shared_operator_at_the_top_rate() -> None:
    model = create_model("vit_tiny_patch16_224", "g3u", depth=3, num_classes=4, **SIZES)
    assert rates(model, layer_decay=0.5)["karat_operator.W"] == 1


def test_rates_and_decay_of_the_optimiser() -> None:
    recipe = RECIPES["finetune"]
    model = create_model("vit_tiny_patch16_224", "g3b", depth=1, num_classes=4, **SIZES)
    optimizer = create_optimizer(model, recipe, total_batch=256)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] * group.get("lr_scale", 1.0) == pytest.approx(2.5e-4 if "operator" in name else 5e-5)
            decayed = parameter.ndim > 1 and "operator" not in name and name not in ("pos_embed", "cls_token")
            assert group["weight_decay"] == (recipe.weight_decay if decayed else 0), name


def test_the_rate_that_is_reported_is_that_of_the_rest(tmp_path: Path) -> None:
    found = []
    for name, values in (("plain", {}), ("by layer", {"layer_decay": 0.5}), ("both", {"operator_lr_scale": 3.0})):
        settings = tiny(tmp_path / name, attention="g3b", **values)
        model = create_model("vit_tiny_patch16_224", "g3b", depth=1, num_classes=4, **SIZES)
        optimizer = create_optimizer(model, settings.recipe, 16)
        create_schedule(optimizer, settings.recipe, 3).step_update(4)
        found.append(base_rate(optimizer))
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)


class Noting(Trainer):
    """Keeps the weights after each update."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self.seen = [self.weights()]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.parts.bare.named_parameters()}

    def after_step(self) -> None:
        self.seen.append(self.weights())


def test_averaged_weights_are_the_closed_form(tmp_path: Path) -> None:
    trainer = Noting(Classification(), tiny(tmp_path / "run", attention="g3b", epochs=1, model_ema_decay=0.8))
    trainer.fit()
    saved = files.read_tensors(tmp_path / "run" / "ema.safetensors")
    n = len(trainer.seen) - 1
    factors = [0.8**n, *(0.2 * 0.8 ** (n - i) for i in range(1, n + 1))]
    for name in trainer.seen[0]:
        expected = sum(f * w[name].double() for f, w in zip(factors, trainer.seen, strict=True))
        torch.testing.assert_close(saved[name].double(), expected, atol=1e-6, rtol=1e-5)


def test_channels_last_reaches_the_model_and_changes_no_loss(tmp_path: Path) -> None:
    folder = images(tmp_path / "data")
    values = {"data": str(folder), "data_fraction": 1.0, "batch_size": 4, "epochs": 1, "img_size": 12}
    layouts = []
    for on in (False, True):
        trainer = Trainer(Classification(), tiny(tmp_path / str(on), channels_last=on, **values))
        trainer.parts.bare.register_forward_pre_hook(lambda module, args: layouts.append(args[0].stride(1)))
        trainer.fit()
    assert {1} < set(layouts)
    plain, last = (runs.read_history(tmp_path / str(on))[-1] for on in (False, True))
    assert plain["train_loss"] == pytest.approx(last["train_loss"], abs=1e-5)


def test_compiled_the_model_trains_to_the_same_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = nn.Module.compile, []

    def eager(module: nn.Module) -> None:  # the graph is captured as ever, and run without a C++ compiler
        calls.append(module)
        real(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", eager)
    for on in (False, True):
        train(tiny(tmp_path / str(on), attention="g3b", compile=on, epochs=1))
    assert len(calls) == 1
    plain, compiled = (runs.read_history(tmp_path / str(on))[-1] for on in (False, True))
    assert plain["train_loss"] == pytest.approx(compiled["train_loss"], abs=1e-5)
    assert outcome(tmp_path / "True")[0].keys() == outcome(tmp_path / "False")[0].keys()


class Scaler:
    """fp16's loss scale without a GPU."""

    def __init__(self, scale: float) -> None:
        self.now, self.updates = scale, 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.now

    def get_scale(self) -> float:
        return self.now

    def update(self) -> None:
        self.updates += 1


@pytest.mark.parametrize(("scale", "fault"), [(1024.0, False), (1.0, True)])
def test_an_overflow_of_fp16_is_skipped_and_no_fault_until_the_scale_is_spent(
    tmp_path: Path, scale: float, fault: bool
) -> None:
    trainer = Trainer(Classification(), tiny(tmp_path / "run", attention="g3b"))
    scaler = trainer.accelerator.scaler = Scaler(scale)
    handle = trainer.parts.bare.head.weight.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore
    before = [p.detach().clone() for p in trainer.parts.bare.parameters()]
    done = step.update(trainer.parts, 5, [next(iter(trainer.data.train))])
    handle.remove()
    assert (done.applied, done.fault, scaler.updates) == (False, fault, 1)
    assert all(torch.equal(p, old) for p, old in zip(trainer.parts.bare.parameters(), before, strict=True))


def test_the_scale_of_float16_goes_on_where_it_was(tmp_path: Path) -> None:
    trainer = Trainer(Classification(), tiny(tmp_path / "run", attention="g3b"))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    trainer.save()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None
    give(trainer.parts, found[0])
    assert trainer.accelerator.scaler.get_scale() == 128


def test_a_precision_that_the_device_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"float16 needs a GPU.*bfloat16"):
        Trainer(Classification(), tiny(tmp_path / "run", amp_dtype="float16"))
    train(tiny(tmp_path / "run", epochs=1))  # and the next run is none the worse
    config = files.read_json(tmp_path / "run" / runs.CONFIG)
    found = []
    for kind in ("float32", "float16"):  # of a run that was trained elsewhere
        files.write_json(
            tmp_path / "run" / runs.CONFIG, config | {"settings": config["settings"] | {"amp_dtype": kind}}
        )
        found.append(evaluate_run(tmp_path / "run"))
    assert found[0] == found[1]


def test_a_folder_of_images_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "pets")
    assert cli.main(["train", "--data", "pets", "--attention", "g3b", "--epochs", "1"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    settings, facts = runs.read_config(run)
    assert (settings.preset, settings.img_size, facts["class_names"]) == ("quick", 32, ["class0", "class1"])
    for name in ("config.json", "metrics.jsonl", "summary.json", "model.safetensors", "tensorboard", "checkpoints"):
        assert (run / name).exists()


SHARDED = """
import copy, os, socket, sys
from types import SimpleNamespace
import torch
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from support.training import TINY
from karat import create_model
from karat.train import processes, state, watch
from karat.train.ema import WeightAverage
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
child = os.fork()  # before any kernel has run
rank = int(child == 0)
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
processes.leave_at_exit()
distributed.init_process_group("gloo")
accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
plain = SimpleNamespace(distributed_type=DistributedType.NO, unwrap_model=lambda model, **_: model)
names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")

def built(shard):
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", "g3u", num_classes=4, **{n: TINY[n] for n in names})
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), WeightAverage(model, 0.9)

def advance(model, optimizer, ema, start, stop, share):
    for number in range(start, stop):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x[rank::2] if share else x).square().mean().backward()
        optimizer.step()
        ema.update()

@torch.no_grad()
def evaluated(model, optimizer, ema):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    own = model(x)
    with ema.lent():
        return own, model(x), model(x * 0)

whole, sharded = built(False), built(True)
advance(*whole, 0, 3, False)
advance(*sharded, 0, 3, True)
outputs = [[*evaluated(*one), *evaluated(*one)] for one in (whole, sharded)]
taken = copy.deepcopy(state.model_state(accelerator, sharded[0]))  # on the CPU they are the very tensors
watches = [watch.GradientWatch(model) for model, *_ in (whole, sharded)]
for eye in watches:
    eye.norms.extend([1e-9] * watch.LEAST)
    eye.own = eye.operator_norm()[0].item()
    eye.median = eye.burst(1.2 * eye.own, eye.own, 1e9)  # as if the rest's were small
    eye.clip_apart(1e-3, 1.0)
    eye.clipped = [watch.whole(p.grad) for p in [*eye.operators, *eye.rest] if p.grad is not None]
moments = copy.deepcopy(state.optimizer_state(accelerator, *sharded[:2]))
with sharded[2].lent():
    averaged = copy.deepcopy(state.model_state(accelerator, sharded[0]))
grown = watch.sizes(sharded[0])
box = copy.deepcopy([taken, moments])
distributed.broadcast_object_list(box)  # as read from the one checkpoint that the main process wrote
again = built(True)
state.load_model_state(accelerator, again[0], box[0], "checkpoint")
state.load_optimizer_state(accelerator, *again[:2], box[1])
advance(*sharded, 3, 5, True)
advance(*again, 3, 5, True)
ends = [state.model_state(accelerator, model) for model in (sharded[0], again[0])]
try:
    state.load_model_state(accelerator, again[0], {"head.bias": torch.zeros(3)}, "checkpoint")
except ValueError as error:
    refused = str(error)
if rank == 0:
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    expected = dict(whole[0].named_parameters())
    assert set(expected) <= set(taken), set(expected) ^ set(taken)
    for pair in zip(*outputs, strict=True):
        close(*pair)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 0.01
    for name, tensor in expected.items():
        close(taken[name], tensor.detach())
        close(averaged[name], whole[2].shadow[name])
        assert torch.equal(ends[0][name], ends[1][name]), name
    kept = state.optimizer_state(plain, *whole[:2])
    assert set(kept) == set(moments), set(kept) ^ set(moments)
    for name, tensor in kept.items():
        close(moments[name], tensor)
    for tensors in zip(*(eye.clipped for eye in watches), strict=True):
        close(*tensors)
    assert abs(watches[1].own / watches[0].own - 1) < 1e-4 and watches[1].median == 1e-9
    for name, size in watch.sizes(whole[0]).items():
        assert abs(grown[name] - size) < 1e-5
    assert "does not fit the model: " in refused
    assert os.waitpid(child, 0)[1] == 0
    print("equal")
"""


@pytest.mark.slow
def test_sharded_parameters_train_save_and_resume_as_whole_ones() -> None:
    """FSDP2 over two processes: accelerate shards on accelerators only, so the model is sharded here by torch."""
    done = python(SHARDED, timeout=300)
    assert done.stdout.strip().endswith("equal"), done.stderr


@pytest.mark.parametrize("opt", ["muon", "adafactor", "adafactorbv", "adahessian", "fusedadam", "nonesuch"])
def test_an_optimiser_that_no_run_could_go_on_with_is_refused_before_training(opt: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=opt):
        train(tiny(tmp_path / "run", opt=opt))
    assert not (tmp_path / "run").exists()
