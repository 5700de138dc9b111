"""From a published row's words to the settings of a run: model, attention, data, recipe, and what is missing."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

from karat.basis.specs import split_list
from karat.operator.config import KArAtConfig
from karat.runs.recipes import RECIPES, recipe_of

MODELS = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "convit_tiny": "convit_tiny",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "vitdet_base": "vit_base_patch16_224",  # the backbone
    "deep_kan": "deep_kan",  # with its settings in parentheses behind it
}
# data set -> (--data, classes)
DATASETS: dict[str, tuple[str, int]] = {
    "cifar10": ("torch/cifar10", 10),
    "cifar100": ("torch/cifar100", 100),
    "imagenet1k": ("torch/imagenet", 1000),
    "svhn": ("torch/svhn", 10),
    "flowers102": ("torch/flowers102", 102),
    "stl10": ("torch/stl10", 10),
    "mnist": ("torch/mnist", 10),
    "fashion_mnist": ("torch/fashion_mnist", 10),
    "coco": ("coco", 80),
}
COUNTED_CLASSES = {"vit_small": 1000}  # Tables 1 and 13 count Small with 1000 classes, the others with 10
DETECTION_ITERATIONS = 184_375  # of batch 32 on COCO's 118,287 training images: 50 epochs (Table 11)
DEEP_KAN = re.compile(r"deep_kan order=(\d+) grid=(\d+) range=\(-(\d+),\3\) layers=\((\d+),(\d+)\)")

# Kinds of rows that are training runs, and the command that makes them.
PROGRAMS = {"train": ("train",), "finetune": ("train",), "transfer": ("transfer",), "detect": ("detect", "train")}


@dataclass(frozen=True)
class Setup:
    """What a row was measured with.

    kind: "train" (from scratch), "finetune" (from an ImageNet run), "transfer" (Table 4), "detect" (Table 12) or
        "cost" (parameters, operations, memory; no training).
    model: a name for `karat.create_model` (the backbone's for detection); attention: a `KArAtConfig` spec.
    data, num_classes, recipe, epochs, batch_size: of the run; recipe "" where none of ours applies. The paper gives
        none for fine-tuning (Table 2) and deep KANs (Table 14): theirs are our `finetune` and `quick`.
    init: the run to start from, or "random"; teacher: the run whose attention is transferred, with teacher_model and
        teacher_attention; "" otherwise.
    """

    kind: str
    model: str
    attention: str
    data: str
    num_classes: int
    recipe: str = ""
    epochs: int = 0
    batch_size: int = 0
    init: str = "random"
    teacher: str = ""
    teacher_model: str = ""
    teacher_attention: str = ""

    @property
    def config(self) -> KArAtConfig:
        """The attention's configuration."""
        return KArAtConfig.parse(self.attention)

    @property
    def output(self) -> str:
        """The folder that this row's run is kept in, and where rows that build on it look for it."""
        return _run_name(self.data, self.model, self.attention, suffix=self._suffix())

    def _suffix(self) -> str:
        """What tells runs apart that share model, attention and data."""
        if self.teacher:
            return f"-from-{self.teacher.rpartition('/')[2].partition('-')[2]}"
        return "-imagenet" if self.kind == "detect" and self.init != "random" else ""

    def options(self) -> dict[str, str]:
        """The options of `program` for this row. Raises ValueError for a row that is not a training run."""
        if self.kind not in PROGRAMS:
            raise ValueError(f"a {self.kind} row is no training run")
        options = {
            "--model": self.model,
            "--attention": self.attention,  # softmax where the model has none (deep KANs)
            "--data": self.data,
            "--recipe": self.recipe,
            "--epochs": str(self.epochs),
            "--batch-size": str(self.batch_size),
            "--output": self.output,
        }
        start = {"--init": self.init} if self.init != "random" else {}
        return options | start | ({"--teacher": self.teacher} if self.teacher else {})

    @property
    def program(self) -> tuple[str, ...]:
        """The words of the command that trains this row."""
        return PROGRAMS[self.kind]


def command_words(program: tuple[str, ...], options: dict[str, str]) -> list[str]:
    """The words behind `karat`; a teacher stands before the options (`karat transfer TEACHER`)."""
    rest = {name: value for name, value in options.items() if name != "--teacher"}
    teacher = [options["--teacher"]] if "--teacher" in options else []
    return [*program, *teacher, *(word for pair in rest.items() for word in pair)]


def command_line(program: tuple[str, ...], options: dict[str, str]) -> str:
    """The command, quoted for a shell."""
    return shlex.join(["karat", *command_words(program, options)])


def attention_spec(variant: str) -> str:
    """The `KArAtConfig` spec of a variant as published.csv writes it: as the paper ran it, with both edge scales.

    "rational(m=5,n=4),blockwise" -> "rational(m=5,n=4)-b", "simplex" -> simplex="rank" (Algorithm 2; the paper's §3
    places it on the rows, which is simplex="row"), softmax_heads=0 and "softmax,softmax_heads=12" -> nothing said.
    Order PhiPhi takes our default init: with coefficients from N(0,1) in both stages the gradients of twelve blocks
    reach 1e25, and their norm overflows in float32. Raises ValueError for a variant that can't be read.

    >>> attention_spec("g11b,order=PhiPhi,softmax_heads=2")
    'g11b,order=PhiPhi,edge_scales=published,softmax_heads=2'
    """
    name, *options = split_list(variant)
    if name == "softmax":
        return "softmax"
    kept = []
    for option in options:
        if option in ("blockwise", "universal"):
            name = f"{name}-{option[0]}"
        elif option == "simplex":
            kept.append("simplex=rank")
        elif option != "softmax_heads=0":
            kept.append(option)
    config = KArAtConfig.parse(",".join([name, *kept, "edge_scales=published"]))
    return str(config if config.order == "PhiPhi" else replace(config, init="paper"))


def read_setup(model: str, variant: str, dataset: str, note: str) -> Setup:
    """The settings of one row of published.csv. Raises ValueError naming what can't be read."""
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; known are {', '.join(MODELS)}")
    if dataset and dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known are {', '.join(DATASETS)}")
    name = MODELS[model]
    if not dataset:
        return Setup("cost", name, attention_spec(variant), "", COUNTED_CLASSES.get(model, 10))
    data, classes = DATASETS[dataset]
    if model == "deep_kan":
        found = DEEP_KAN.fullmatch(variant)
        if found is None:
            raise ValueError(f"can't read the deep KAN {variant!r}")
        quick = RECIPES["quick"]
        # published.csv writes the range as (-I,I), as the paper does; SplineLinear's grids are [-I, I]
        name = "deep_kan(order={},grid={},range={},layers=({},{}))".format(*found.groups())
        return Setup("train", name, "softmax", data, classes, "quick", quick.epochs, quick.batch_size)
    if dataset == "coco":
        start = "random" if "init=random" in note else _run_name("torch/imagenet", name, "softmax")
        epochs = round(DETECTION_ITERATIONS * 32 / 118_287)
        return Setup("detect", name, attention_spec(variant), data, classes, "published", epochs, 32, init=start)
    recipe = recipe_of(model)
    batch_size = RECIPES[recipe].batch_size if dataset == "imagenet1k" else 32  # SPEC §4
    common = (name, attention_spec(variant.split("<-")[0]), data, classes)
    if "<-" in variant:
        teacher, attention = variant.split("<-")[1].split("+")
        theirs = (MODELS[teacher], attention_spec(attention))
        scratch = Setup("transfer", *common, recipe, RECIPES[recipe].epochs, batch_size)
        return replace(scratch, teacher=_run_name(data, *theirs), teacher_model=theirs[0], teacher_attention=theirs[1])
    if "fine-tuned" in note:
        tune = RECIPES["finetune"]
        start = _run_name("torch/imagenet", name, common[1])
        return Setup("finetune", *common, "finetune", tune.epochs, tune.batch_size, init=start)
    return Setup("train", *common, recipe, RECIPES[recipe].epochs, batch_size)


def _run_name(data: str, model: str, attention: str, suffix: str = "") -> str:
    short = attention.replace(",edge_scales=published", "").replace(",init=paper", "")
    return "runs/paper/" + re.sub("[(),]+", "-", f"{data.removeprefix('torch/')}-{model}-{short}{suffix}").strip("-")
