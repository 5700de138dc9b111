"""Files that are either whole or absent: atomic writes, safetensors in and out, manifests of digests.

Everything is first written beside its target, forced to disk and then renamed, so that a process killed at any moment
leaves the old file or the new one, never half of either. Nothing here unpickles anything.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
INDEX = ".index.json"  # behind the name of what is cut into shards
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".th", ".tar")
MOST_LEVELS = 100  # brackets within each other in a JSON file


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A file beside `path`, of the same ending, to be written: it becomes `path` at the end, or goes on an error.

    Raises OSError, naming `path`, where the disk refuses.
    """
    draft = path.with_name(f".karat-{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent.resolve())
        draft.unlink(missing_ok=True)  # of a process of the same number that was killed: it may be a link
        yield draft
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # nor may its folder be one
            draft.unlink()


def sweep(folder: Path, names: Collection[str] = ()) -> None:
    """Remove what processes that were killed left of files that they were writing in a folder.

    names: files of a run, of which what earlier versions left goes too.
    """
    earlier = "|".join(rf"(\d+)\.{re.escape(name)}$|{re.escape(name)}\..*\.tmp$" for name in names)
    for path in folder.glob(".*"):
        found = re.match(r"\.karat-(\d+)\.", path.name) or (names and re.match(rf"\.(?:{earlier})", path.name))
        if found and not path.is_dir() and not any(_runs(number) for number in found.groups() if number):
            with contextlib.suppress(OSError):  # another user's stays
                path.unlink()


@functools.lru_cache
def _sweep_once(folder: Path) -> None:
    sweep(folder)


def _runs(process: str) -> bool:
    """Whether a process of that number is there."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write text to `path`, whole or not at all."""
    with draft_of(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value to `path` atomically. Floats keep every bit (repr round-trips)."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; ValueError names the file that is missing or malformed."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and of numbers with thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        found = None
    else:
        level = [found]  # what lies so many brackets deep
        for _ in range(MOST_LEVELS):
            inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
            level = [one for some in inner for one in some]
            if not level:
                return found
    raise ValueError(f"{path} is no file of karat's: its JSON is nested more than {MOST_LEVELS} brackets deep")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors to `path`, whole or not at all."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if memory in taken else own  # the format has one name for one piece of memory
        taken.add(memory)
    with draft_of(path) as draft:
        try:
            save_file(plain, draft, metadata=dict(metadata or {}) | {"format": "pt"})
        except SafetensorError as error:  # its writer reports a full disk through its own exception
            raise OSError(str(error)) from error


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file, or the shards that an index (NAME.safetensors.index.json) lists.

    Raises ValueError when one is missing, cut short, a pickle or no such file at all.
    """
    if path.name.endswith(INDEX):
        return _read_shards(path, device)
    with _opened(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors; of shards what their index says."""
    if path.name.endswith(INDEX):
        noted = read_json(path).get("metadata")
        return {key: str(value) for key, value in noted.items()} if isinstance(noted, dict) else {}
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except (SafetensorError, OSError) as error:
        if path.is_file():
            refuse_pickle(path)
        raise ValueError(
            f"{path} is not a whole safetensors file: {error}; it was cut short or is of another kind, copy it anew"
        ) from None


def _read_shards(index: Path, device: str) -> dict[str, Tensor]:
    table = read_json(index)
    places = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} is no index of shards: it has no weight_map of names to files")
    found: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names the shard {name!r}, which doesn't lie beside it")
        found |= read_tensors(index.with_name(name), device)
    absent = next((name for name in places if name not in found), None)
    if absent is not None:
        raise ValueError(f"{index} lists {absent!r}, which {places[absent]} doesn't have")
    return found


def refuse_pickle(path: Path) -> None:
    """Raise ValueError where a file is a pickle, as torch.save writes it, by its first bytes or else its name."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04" or re.match(rb"\x80[\x02-\x05]", start) or path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, as torch.save writes it, which runs code when it is loaded and is never unpickled "
            "here; convert it once to safetensors where you trust it: "
            f"d = torch.load({path.name!r}, weights_only=True); d = d.get('model', d.get('state_dict', d)); "
            f"safetensors.torch.save_file({{k: v.contiguous() for k, v in d.items()}}, '{path.stem}.safetensors')"
        )


def copy_file(source: Path, target: Path) -> None:
    """Put `source` at `target`, whole or not at all, as a hard link where the file system has them."""
    with draft_of(target) as draft:
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """List every file of `folder` with its size and SHA-256; written last, so its presence vouches for the rest."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    table = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files}
    write_json(folder / MANIFEST, table)


def first_difference(folder: Path) -> str | None:
    """What differs first between `folder` and its manifest, in words; None when it is whole."""
    try:
        table = read_json(folder / MANIFEST)
    except ValueError as error:
        return str(error)
    entries = list(table.values()) if isinstance(table, dict) else []
    if not entries or not all(isinstance(one, dict) and {"bytes", "sha256"} <= one.keys() for one in entries):
        return f"{folder / MANIFEST} is not a table of files"
    for name, entry in table.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}"
        found = digest(path)
        if found != entry["sha256"]:
            return f"{path} has SHA-256 {found[:12]}…, its manifest says {entry['sha256'][:12]}…"
    return None
