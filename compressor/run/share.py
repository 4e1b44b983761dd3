"""The files of a finished run that are shared: its network, how it is used, and a model card.

Everything else stays here, such as recipe, manifest, report, answers and engines: it names folders, devices and
pictures of this machine, or fits no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compressor.core.errors import CompressorError
from compressor.core.files import read_json, read_text
from compressor.core.manifest import MANIFEST, Manifest
from compressor.core.records import RECIPE
from compressor.models.onnx_file import NETWORK
from compressor.pruning.artefact import CHANNELS, WEIGHTS
from compressor.report.card import model_card, without_folders
from compressor.run.deployable import DEPLOYED, PREPROCESS
from compressor.run.folder import RunFolder, refuse_changed, refuse_front

CARD = "README.md"
_SHARED = (CHANNELS, WEIGHTS, NETWORK, *DEPLOYED)
_NETWORKS = re.compile(r"model[\w.-]*\.(onnx|pt2)")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LARGEST_CARD = 1 << 20


def card_of(folder: Path) -> str:
    """Return the model card of a finished run.

    Raises:
        CompressorError: It is not finished, or a file has changed since.
    """
    return str(shared_files(folder)[CARD])


def shared_files(folder: Path, card: Path | None = None) -> dict[str, Path | str]:
    """Return what is shared of a finished run by name: paths of files, or texts in the place of a file.

    Args:
        folder: Folder of the run.
        card: File with a card of the user's own; None for that of the numbers.

    Raises:
        CompressorError: The run is not finished, or a file has changed since.
    """
    manifest = _finished(folder)
    paths = {name: folder / name for name in manifest.files if name in _SHARED or _NETWORKS.fullmatch(name)}
    for name, path in paths.items():
        if not path.is_file() or path.is_symlink():
            raise CompressorError(f"{folder} has no {name}, which the run has written.", "Restore it.")
        refuse_changed(path, manifest)
    found: dict[str, Path | str] = dict(paths)
    if PREPROCESS in found:  # it names the data by its path
        content = _hidden(read_json(folder / PREPROCESS), without_folders(manifest))
        found[PREPROCESS] = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if card is None:
        found[CARD] = model_card(manifest, sizes(found))
    else:
        found[CARD] = read_text(card, "model card", _LARGEST_CARD)
    return found


def sizes(files: Mapping[str, Path | str]) -> dict[str, int]:
    """Return the bytes of each file."""
    return {
        name: len(each.encode()) if isinstance(each, str) else each.stat().st_size for name, each in files.items()
    }


def push(files: Mapping[str, Path | str], repository: str, *, public: bool = False) -> str:
    """Upload files to a repository of the Hugging Face hub as one commit, and return its address.

    A new repository is private; an existing one keeps its visibility.

    Args:
        files: What `shared_files` returns.
        repository: "user/name".
        public: Whether a new repository is public, and whether an existing public one is accepted.

    Raises:
        CompressorError: The hub does not answer or does not accept it, or no account is known.
    """
    check_hub(repository)
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise CompressorError(
            "No account of the Hugging Face hub is known here.", "Log in with: hf auth login; or set HF_TOKEN."
        )
    contents = {name: each.encode() if isinstance(each, str) else str(each) for name, each in files.items()}
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and api.model_info(repository).private is False:
            raise CompressorError(
                f"{repository} is public, and what is pushed would be too.",
                "Give --public if it may be, or another name.",
            )
        done = api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message="Add the network of a run of compress",
        )
    except CompressorError:
        raise
    except Exception as error:  # of the client, of the HTTP library beneath it, or of that which uploads
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CompressorError(
            f"{repository} cannot be pushed: {reason.rstrip('.')}.",
            "Check the network, the name and what the token may do: hf auth whoami",
        ) from error
    return str(done.commit_url)


def check_hub(repository: str) -> None:
    """Refuse what cannot be a repository, and a hub without its client.

    Raises:
        CompressorError: Says which.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise CompressorError(f"{repository!r} is not the name of a repository.", "Expected user/name.")
    if find_spec("huggingface_hub") is None:
        raise CompressorError(
            "compress push needs huggingface_hub, which is not installed.",
            "Install it: pip install 'compressor[hub]'",
        )


def _finished(folder: Path) -> Manifest:
    """Return the manifest of a finished run."""
    refuse_front(folder)
    if not (folder / RECIPE).is_file():
        raise CompressorError(f"{folder} is not a run's folder: it has no {RECIPE}.", "Runs are under runs/.")
    RunFolder.tidy(folder)
    manifest = Manifest.read(folder / MANIFEST) if (folder / MANIFEST).is_file() else Manifest()
    if manifest.status != "finished" or not manifest.files:
        raise CompressorError(f"The run in {folder} is not finished.", f"Continue it: compress --resume {folder}")
    return manifest


def _hidden(value: Any, hidden: Any) -> Any:
    """Return a value of JSON whose texts are fit to be published."""
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, dict):
        return {name: _hidden(each, hidden) for name, each in value.items()}
    return [_hidden(each, hidden) for each in value] if isinstance(value, list) else value
