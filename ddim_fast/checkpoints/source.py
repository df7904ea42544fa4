"""Where weights come from: a local folder, the models that ship with the package, the Hugging Face Hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..once import log_once
from .folder import Folder
from .layout import Source
from .lookup import Lookup

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parents[1] / "bundled"
NAMESPACE = "ddim-fast/"
_FILE_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors", ".json")
_LOOKUP_TIMEOUT = 10.0


def local_path(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The file or folder on this machine that `name_or_path` means, a bundled model included; None for the Hub.

    What exists in the working directory wins over a bundled model, and that over the Hub. Raises `FileNotFoundError`
    for something that can only be a path but is not there.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(
            f"name_or_path must be a folder or the name of a model on the Hub, got {type(name_or_path).__name__}"
        )
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.exists() and name:
        return path
    bundled = sorted(entry.name for entry in BUNDLED.iterdir() if (entry / "model_index.json").is_file())
    if name.startswith(NAMESPACE) and name.removeprefix(NAMESPACE) in bundled:
        return BUNDLED / name.removeprefix(NAMESPACE)
    only_a_path = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    if only_a_path or not name or name.endswith(_FILE_SUFFIXES):
        raise FileNotFoundError(f"no file or folder {name!r} (looked in {os.getcwd()})")
    return None


def open_source(name_or_path: str | os.PathLike[str], hub: Lookup) -> Source:
    """The place that `name_or_path` names.

    Raises `FileNotFoundError` if there is neither such a folder nor such a model, `PermissionError` for a gated
    model, `ConnectionError` without a network.
    """
    path = local_path(name_or_path)
    if path is None:
        return _hub_source(os.fspath(name_or_path), hub)
    return Folder(path)


def _hub_source(repo_id: str, hub: Lookup) -> Source:
    if hub.local_files_only:
        if hub.force_download:
            raise ValueError("local_files_only=True and force_download=True exclude each other; pass one of them")
        return _cached_source(repo_id, hub, "local_files_only=True")

    from huggingface_hub import HfApi, errors

    try:
        api = HfApi(token=hub.token, library_name="ddim_fast")
        info = api.model_info(repo_id, revision=hub.revision, timeout=_LOOKUP_TIMEOUT)
    except (errors.HFValidationError, errors.RevisionNotFoundError) as error:
        raise _explain(repo_id, hub, error) from error
    except Exception as error:
        return _cached_source(repo_id, hub, "the Hub could not be asked", error)

    return HubModel(repo_id, hub, [sibling.rfilename for sibling in info.siblings or []])


class HubModel:
    """A model on the Hub, of which the files at `paths` are there."""

    def __init__(self, repo_id: str, hub: Lookup, paths: Collection[str]) -> None:
        self.title = f"{repo_id} (on the Hub)"
        self._repo_id, self._hub, self._paths = repo_id, hub, paths
        self._folder: Folder | None = None

    def names(self, inside: str) -> Collection[str]:
        prefix = f"{inside}/" if inside else ""
        return {path.removeprefix(prefix).split("/")[0] for path in self._paths if path.startswith(prefix)}

    def read(self, path: str) -> dict[str, Any]:
        from huggingface_hub import hf_hub_download

        hub = self._hub
        options: Any = {"revision": hub.revision, "cache_dir": hub.cache_dir, "token": hub.token}
        try:
            file = Path(hf_hub_download(self._repo_id, path, library_name="ddim_fast", **options))
        except Exception as error:
            raise _explain(self._repo_id, hub, error) from error
        folder = Folder(file.parents[path.count("/")])
        try:
            return folder.read(path)
        finally:
            folder.close()

    def fetch(self, paths: Collection[str]) -> Folder:
        self._folder = Folder(Path(_download(self._repo_id, self._hub, paths)))
        return self._folder

    def changed(self) -> bool:
        """Never: a commit of the Hub stays what it is."""
        return False

    def close(self) -> None:
        if self._folder is not None:
            self._folder.close()


def _download(repo_id: str, hub: Lookup, paths: Collection[str]) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            repo_id,
            revision=hub.revision,
            cache_dir=hub.cache_dir,
            token=hub.token,
            force_download=hub.force_download,
            allow_patterns=sorted(paths),
            library_name="ddim_fast",
        )
    except Exception as error:
        raise _explain(repo_id, hub, error) from error


def _cached_source(repo_id: str, hub: Lookup, reason: str, cause: Exception | None = None) -> Source:
    from huggingface_hub import snapshot_download

    try:
        # No patterns: whether the files that are needed are there is seen when they are looked up.
        folder = snapshot_download(
            repo_id, revision=hub.revision, cache_dir=hub.cache_dir, local_files_only=True, allow_patterns=[]
        )
    except Exception as error:
        raise _explain(repo_id, hub, cause or error) from (cause or error)
    if cause is not None:
        log_once(logger, logging.WARNING, f"{reason} for {repo_id!r} ({cause}); using what is in the cache")
    return Folder(Path(folder), title=f"{folder} (what is in the cache of {repo_id!r}; {reason})")


def _explain(repo_id: str, hub: Lookup, error: Exception) -> Exception:
    """What went wrong with a lookup or a download, in the user's terms."""
    from huggingface_hub import errors

    at_revision = f" at revision {hub.revision!r}" if hub.revision else ""
    if isinstance(error, errors.HFValidationError):
        return FileNotFoundError(
            f"{repo_id!r} is not a folder in {os.getcwd()}, and cannot be a model on the Hub, whose names look like "
            f"'google/ddpm-cifar10-32' ({error})"
        )
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{repo_id!r} is gated: accept its conditions at https://huggingface.co/{repo_id}, then log in with "
            "`hf auth login` or pass token="
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        shipped = ", ".join(sorted(f"{NAMESPACE}{p.parent.name}" for p in BUNDLED.glob("*/model_index.json")))
        return FileNotFoundError(
            f"{repo_id!r} is neither a folder in {os.getcwd()} nor a model on the Hub that can be seen: check the "
            f"name, and for a private model log in with `hf auth login` or pass token= (in the package: {shipped})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id!r} on the Hub has nothing{at_revision}; check the revision's name")
    return ConnectionError(
        f"{repo_id!r} is no folder in {os.getcwd()}, and as a model on the Hub it is not in the local cache and could "
        f"not be downloaded ({type(error).__name__}: {error}); check the name, the network and the disk"
    )
