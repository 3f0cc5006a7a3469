"""The configurations of a base model, without its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safemax_sd.assets import resolve_model
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.families.folders import NOT_NEEDED, cannot_be_loaded, download_configuration
from safemax_sd.families.single_file import is_single_file
from safemax_sd.planning.network import META
from safemax_sd.presets import architecture


def load_configurations(options: LoadOptions) -> ModelFamily:
    """Build a model from its configurations on the meta device.

    A model on the hub is looked for in the local cache, then among the shipped configurations, then on the hub.

    Args:
        options: Settings that load the model, whatever their device.

    Raises:
        OptionError: The configurations cannot be found or loaded.
    """
    options = replace(options, device=META)
    name = options.name_or_path
    if not is_single_file(name):  # the configuration of a file is looked up as it is in training
        name = str(configuration_folder(name, revision=options.revision, cache_dir=options.cache_dir))
    family = load_family(replace(options, name_or_path=name, without_weights=True))
    family.options = options
    return family


def configuration_folder(name: str, *, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Return a folder of a model's configurations: its own, the hub's cache, the shipped ones, or a download.

    Args:
        name: Folder, name of an embedded model, or hub id.
        revision: Revision on the hub; None for the newest.
        cache_dir: Folder of the hub's cache; None for the default.

    Raises:
        OptionError: The hub cannot be reached, or has no such model.
    """
    folder = Path(resolve_model(name))
    if folder.is_dir():
        return folder
    try:
        cached = download_configuration(name, revision=revision, cache_dir=cache_dir, local_files_only=True)
    except (OSError, ValueError):  # not in the cache
        cached = None
    if cached is not None and _whole(cached):
        return cached
    shipped = architecture(name) if revision is None else None
    if shipped is not None:
        return shipped
    try:
        return download_configuration(name, revision=revision, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise cannot_be_loaded(name, error) from error


def _whole(folder: Path) -> bool:
    """Tell whether a folder has all parts that its index names; a cache may hold some of them only."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[:1] != [None]]
    return bool(parts) and all((folder / name).is_dir() for name in parts if name not in NOT_NEEDED)
