"""The command line with wrong input: one line on stderr, status 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from karat.cli import COMMANDS, main

BAD = {
    "train --attention nope-b": "unknown basis 'nope'",
    "train --attention g3": "can't read the attention",
    "train --attention g3b,rank=0": "rank must be a whole number >= 1",
    "train --attention g3b,blocks=(77,)": "there is no block 77",
    "train --attention g3b,softmax_heads=99": "softmax_heads=99",
    "train --data EMPTY": "no images found",
    "train --data EMPTY/missing": "no such folder",
    "train --num-classes 4": "num_classes is 4",
    "train --model resnet18 --attention g3b": "no attention that karat knows",
    "train --model swin_tiny_patch4_window7_224 --attention g3u --img-size 224": "use sharing='blockwise'",
    "train --bogus 3": "karat: Unrecognized options: --bogus, 3",
    "analyze nothing RUN": "karat: Invalid choice 'nothing'",
    "train --epochs 0": "--epochs=0",
    "train --epochs many": "--epochs",
    "train --resume EMPTY": "no run is there",
    "train --model vit_tinny_patch16_224": "did you mean",
    "train --recipe soup": "soup",
    "train --mixup 0.5 --batch-size 7": "batch_size=7",
    "train --init nowhere": "nowhere",
    "train --opt nonesuch": "nonesuch",
    "train --data-fraction 2": "--data-fraction=2.0: give a value in (0, 1]",
    "train --grad-accum-steps 0": "--grad-accum-steps=0",
    "compare softmax softmax": "twice",
    "compare softmax --seeds 0": "seeds=0",
    "compare --study": "--study",
    "train --data": "--data",
    "eval EMPTY": "is no run's folder",
    "eval": "run",
    "compare softmax nope": "can't read the attention 'nope'",
    "convert EMPTY": "is no run's folder",
    "convert vit_tiny_patch16_224": "--data",
    "convert vit_tiny_patch16_224 --data digits --attention softmax": "learnable one",
    "convert vit_tinny_patch16_224 --data digits": "did you mean",
    "convert vit_tiny_patch16_224 --data digits --checkpoint EMPTY": "no such file",
    "convert vit_tiny_patch16_224 --data digits --images 0": "images=0",
    "convert vit_tiny_patch16_224 --data digits --ridge 2": "ridge",
    "bench op --rounds 0": "rounds=0",
    "bench step --models huge": "unknown model 'huge'",
    "bench nope": "nope",
    "paper table99": "no table 'table99'",
    "nope": "unknown command 'nope'",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_status_2(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(line.replace("EMPTY", str(tmp_path / "empty")).split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("karat: ")
    assert BAD[line] in error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"karat {command}" in out for command in COMMANDS)
