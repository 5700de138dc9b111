"""How long `import karat` and `karat --help` take, beside `import timm, torchvision`: processor seconds, medians.

python benchmarks/import_time.py

The first is to take at most 1.1 times the last, the second under 0.3 s.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

ROUNDS = 5
COMMANDS = {
    "import timm, torchvision": ["-c", "import timm, torchvision"],
    "import karat": ["-c", "import karat"],
    "karat --help": ["-m", "karat", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Processor time of one process, its own and the system's for it."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def main() -> None:
    """Time each command in turn, ROUNDS times after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(ROUNDS + 1):
        for name, arguments in COMMANDS.items():
            spent = seconds(arguments)
            if turn:
                times[name].append(spent)
    for name, spent_times in times.items():
        print(f"{name:<26} {statistics.median(spent_times):.2f} s")


if __name__ == "__main__":
    main()
