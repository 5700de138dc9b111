"""`--data` for detection: a COCO JSON, or a folder that holds one or several, split into training and evaluation.

| what | training | evaluation |
|---|---|---|
| FILE.json, or a folder with one JSON | all but the last images | --eval-data, or the last --eval-images (a tenth) |
| annotations/instances_train*.json, ..._val*.json (COCO's own) | train | val |
| train/*.json, valid/*.json or test/*.json, or like names (exports of labelling tools) | train | valid, else test |

Images are looked for where --images says, then beside their JSON, in images/ there and in the folder that the JSON's
name ends with (train2017). The images of an --eval-data that lies in another folder are looked for beside it first.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from karat.data.folder import EVALUATED, NAMES, part_of
from karat.data.named import data_folder
from karat.data.order import BadImages, ImageOrder
from karat.data.sources import fixed_part
from karat.detect.coco import CocoPart, read_coco
from karat.detect.loader import PictureLoader
from karat.detect.settings import DetectSettings
from karat.detect.views import View
from karat.values import local_path


class DetectData:
    """Training and evaluation parts of one data set and their loaders, this process's share.

    Attributes: train_part, eval_part (CocoPart), categories {id: name}, num_classes.
    """

    def __init__(
        self, train_part: CocoPart, eval_part: CocoPart, settings: DetectSettings, rank: int = 0, world_size: int = 1
    ) -> None:
        self.train_part, self.eval_part, self.settings = train_part, eval_part, settings
        self._rank, self._world_size = rank, world_size
        self._bad = BadImages(settings.on_bad_image)
        self.categories = train_part.categories
        self.num_classes = len(self.categories)
        check_objects(train_part, "the training images have no objects to learn from")

    @property
    def bad_images(self) -> int:
        """How many images could not be decoded so far (under on_bad_image="skip"), each counted once."""
        return len(self._bad.names)

    @property
    def skipped(self) -> list[str]:
        """What was left out of the files or changed, in words."""
        files = {part.source: part for part in (self.train_part, self.eval_part)}
        return [f"{source}: {line}" for source, part in files.items() for line in part.account.lines()]

    @cached_property
    def train(self) -> PictureLoader:
        """Shuffled batches in random views; an epoch sees each image `repeat` times."""
        recipe = self.settings.recipe
        return self._loader(self.train_part, View(recipe, train=True), len(self.train_part) * recipe.repeat, True)

    @cached_property
    def eval(self) -> PictureLoader:
        """Every evaluation image once, over all processes together, in a fixed order."""
        return self.measuring(self.eval_part)

    def measuring(self, part: CocoPart, batch_size: int | None = None) -> PictureLoader:
        """The same of any part; batch_size None is the recipe's. Raises ValueError for one below 1."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        return self._loader(part, View(self.settings.recipe, train=False), len(part), False, batch_size)

    def _loader(
        self, part: CocoPart, view: View, count: int, train: bool, batch_size: int | None = None
    ) -> PictureLoader:
        s = self.settings
        order = ImageOrder(
            count,
            s.recipe.batch_size if batch_size is None else batch_size,
            train=train,
            seed=s.seed,
            rank=self._rank,
            world_size=self._world_size,
        )
        return PictureLoader(part, view, order, self._bad, str(part.source), s.workers)


def check_objects(part: CocoPart, words: str) -> None:
    """Raise ValueError with these words, and what was left out, where no image has an object that is no crowd."""
    if not any(not thing.crowd for picture in part.pictures for thing in picture.things):
        raise ValueError(f"{part.source}: {'; '.join([words, *part.account.lines()])}")


def load_data(settings: DetectSettings, rank: int = 0, world_size: int = 1) -> DetectData:
    """The data that settings name.

    Raises ValueError for data that is missing or malformed, naming the file and what to do.
    """
    train, evaluation = open_parts(settings)
    train, evaluation = (_fraction(part, settings.data_fraction) for part in (train, evaluation))
    return DetectData(train, evaluation, settings, rank, world_size)


def open_parts(settings: DetectSettings) -> tuple[CocoPart, CocoPart]:
    """The training and the evaluation part, see the module's table."""
    train_file, eval_file = find_files(settings)
    train = open_file(train_file, settings.images)
    if eval_file is not None:
        if settings.eval_images is not None:
            raise ValueError(f"--eval-images {settings.eval_images}: the data has an evaluation part, {eval_file}")
        # files of the same name lie in both folders as a rule: --images is about the data then
        elsewhere = settings.eval_data is not None and eval_file.resolve().parent != train_file.resolve().parent
        return train, open_file(eval_file, settings.images, beside_first=elsewhere).under(train.categories)
    held = max(1, len(train) // 10) if settings.eval_images is None else settings.eval_images
    if held >= len(train):
        raise ValueError(f"--eval-images {held}: {train_file} has {len(train)} images, and some must stay to train on")
    cut = len(train) - held
    return train.part(range(cut)), train.part(range(cut, len(train)))


def find_files(settings: DetectSettings) -> tuple[Path, Path | None]:
    """The JSON files of training and evaluation; None where one file serves both."""
    path = local_path(settings.data)
    if settings.data == "coco" and not path.exists():
        path = data_folder(settings.data_dir) / "coco"
    if not path.exists():
        raise ValueError(f"data {str(path)!r}: no such file or folder; give a COCO JSON or a folder that holds one")
    given = None if settings.eval_data is None else local_path(settings.eval_data)
    if path.is_file():
        return path, given
    own = _json_files(path)
    if len(own) == 1:
        return own[0], given
    listed = _json_files(path / "annotations", "instances_*.json")
    pairs = [
        tuple([file for file in listed if file.name.startswith(f"instances_{part}")] for part in ("train", "val")),
        _parts_of(path),
    ]
    for train, evaluation in pairs:
        if len(train) == 1 and (given is not None or len(evaluation) <= 1):
            return train[0], given or (evaluation[0] if evaluation else None)
    found = f"{len(own)} JSON files" if own else "no JSON file"
    raise ValueError(
        f"data {str(path)!r}: {found} there, and no annotations/instances_train*.json or train/*.json that is the only "
        "one; name the file itself with --data, and --eval-data beside it"
    )


def _json_files(folder: Path, pattern: str = "*.json") -> list[Path]:
    """The JSON files of a folder, hidden ones aside."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def _parts_of(path: Path) -> tuple[list[Path], list[Path]]:
    """The JSON files in folders that are called train, and in those called valid or, where there are none, test."""
    parts: dict[str, list[Path]] = {part: [] for part in NAMES}
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and (part := part_of(folder.name)):
            parts[part] += _json_files(folder)
    return parts["train"], next((parts[part] for part in EVALUATED if parts[part]), [])


def open_file(file: Path, images: str | None, beside_first: bool = False) -> CocoPart:
    """One JSON, with its images in the folder `images` or where they usually lie, there first if `beside_first`.

    Raises ValueError when `images` is no folder, and as `read_coco` does.
    """
    ending = file.stem.rpartition("_")[2]  # instances_train2017 -> train2017
    beside = [file.parent, file.parent / "images", file.parent / ending, file.parent.parent / ending]
    beside.append(file.parent.parent / "images")
    given = [] if images is None else [local_path(images)]
    if given and not given[0].is_dir():
        raise ValueError(f"--images {images}: no such folder")
    return read_coco(file, [*beside, *given] if beside_first else [*given, *beside])


def _fraction(part: CocoPart, fraction: float) -> CocoPart:
    chosen = fixed_part(len(part), fraction)
    return part if chosen is None else part.part(chosen.tolist())
