"""The files of a saved model: written atomically, fetched, uploaded; `karat.runs.saved` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor

from karat.errors import first_line
from karat.runs import files
from karat.runs.saved import CARD, CONFIG, DIGEST, WEIGHTS, ModelConfig
from karat.runs.weights import ATTENTION, CLASSES, MLP, mlp_of, quiet_hub
from karat.values import local_path


def write(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """config.json and model.safetensors. The weights come first: a config that is there vouches for them."""
    notes = {ATTENTION: config.attention, MLP: mlp_of(config.model, config.mlp)}
    files.write_tensors(folder / WEIGHTS, weights, notes | {CLASSES: json.dumps(config.class_names)})
    files.write_json(folder / CONFIG, {**config.as_dict(), DIGEST: files.digest(folder / WEIGHTS)})


def fetch(name_or_folder: str | Path, **options: Any) -> Path:
    """The folder itself, or that of the Hub's files in the local cache. Raises ValueError where there is none."""
    folder = local_path(name_or_folder)
    if folder.is_dir():
        return folder
    if folder.is_file():
        files.refuse_pickle(folder)
        raise ValueError(f"{folder} is a file; give the folder of the saved model or run that it lies in")
    name = str(name_or_folder)
    if folder.exists() or name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ValueError(f"{name} is no folder; give a saved model's folder or its name on the Hub, user/name")
    try:
        with quiet_hub():
            downloaded = [Path(hf_hub_download(name, file, **options)) for file in (CONFIG, WEIGHTS)]
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{name} is no folder here and could not be had from the Hub: {first_line(error)}") from None
    return downloaded[0].parent


def push(folder: Path, name: str, *, private: bool = False) -> None:
    """Upload a saved model's three files to the Hub. Raises ValueError for what the Hub refuses or isn't there for."""
    api = HfApi()
    try:
        with quiet_hub():
            repo = api.create_repo(name, private=private or None, exist_ok=True).repo_id
            api.upload_folder(
                repo_id=repo,
                repo_type="model",
                folder_path=folder,
                allow_patterns=[CONFIG, WEIGHTS, CARD],
                commit_message="A model by karat",
            )
    except Exception as error:  # beside its own kinds, those of the client beneath it, whose package changes
        raise ValueError(f"{folder} could not be uploaded to {name}: {first_line(error)}") from None
