"""The command line: finds the command, hands it the rest of the line, and turns errors into one line and a status.

Statuses: 0 done; 1 training diverged; 2 input that can't be used, or a disk or worker that failed; 130 Ctrl-C;
143 SIGTERM, after a checkpoint.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

from karat.errors import TrainingDiverged, first_line

# command -> (function that takes the rest of the line, what it does). Modules are imported when their command is run.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("karat.train.commands:train", "train one model, or go on with a run"),
    "compare": ("karat.study.commands:compare", "train attentions side by side, or a study: one table, its figures"),
    "transfer": ("karat.train.commands:transfer", "train a model on a trained teacher's attention"),
    "eval": ("karat.train.commands:evaluate", "measure top-1 and top-5 of a run"),
    "detect": ("karat.detect.commands:detect", "detection with COCO-format data: train, eval, predict, compare"),
    "convert": ("karat.train.convert:convert", "fit learnable attention to a softmax model's, block by block"),
    "analyze": ("karat.analyze.commands:analyze", "look at one thing in runs: attention, spectrum, landscape, ..."),
    "report": ("karat.analyze.commands:report", "write one HTML page about one run or several"),
    "explore": ("karat.analyze.commands:explore", "look into a run in the browser"),
    "predict": ("karat.share.hub.commands:predict", "say what is in images: class names and probabilities"),
    "hub": ("karat.share.hub.commands:hub", "make a folder of a run that others can load, or upload it"),
    "export": ("karat.share.export.commands:export", "write a model as ONNX or torch.export, checked against PyTorch"),
    "bench": ("karat.study.bench.commands:bench", "time, memory and cost against softmax"),
    "paper": ("karat.paper.command:paper", "the published figures: their settings, commands, and results beside them"),
}


def usage() -> str:
    """What `karat --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  karat {name:<{width}}  {help_line}" for name, (_, help_line) in COMMANDS.items()]
    return "\n".join(
        [
            f"karat {metadata.version('karat')}: Kolmogorov-Arnold attention for vision transformers",
            "",
            *lines,
            "",
            "karat COMMAND --help lists the options of a command with their defaults. To begin:",
            "  karat compare softmax g3b g3u",
        ]
    )


def find(name: str) -> Callable[[Sequence[str]], None]:
    """The function of a command. Raises ValueError for an unknown one."""
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    module, function = COMMANDS[name][0].split(":")
    found: Callable[[Sequence[str]], None] = getattr(importlib.import_module(module), function)
    return found


def refuse_empty(words: Sequence[str]) -> None:
    """ValueError for an option without a value, as a shell's unset variable leaves it: it would name this folder."""
    for before, word in zip(["", *words], words, strict=False):
        if not word or re.fullmatch(r"--[\w-]+=", word):
            raise ValueError(f"{word or before or 'an argument'} is empty: give a value, or leave it out")


def complain(error: BaseException) -> None:
    """One line on stderr."""
    print("karat: " + " ".join(str(error).split()), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `karat ARGUMENTS` and return the exit status; SIGTERM's SystemExit(143) passes through."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    if not line or line[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if line[0] == "--version":
        print(metadata.version("karat"))
        return 0
    try:
        refuse_empty(line[1:])
        find(line[0])(line[1:])
    except (ValueError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("karat: interrupted", file=sys.stderr)
        return 130
    except TrainingDiverged as error:
        complain(error)
        return 1
    except (MemoryError, RuntimeError, OverflowError) as error:
        if not isinstance(error, MemoryError) and not re.search("memory|overflow|too large", str(error), re.I):
            raise
        complain(ValueError(f"this needs more memory than there is: {first_line(error)}"))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
