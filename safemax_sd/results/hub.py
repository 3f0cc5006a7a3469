"""Upload a finished run to the Hugging Face hub: `--push_to_hub`, `--hub_model_id`, `--hub_token`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import option
from safemax_sd.core.provenance import json_text, utf8
from safemax_sd.objectives.options import ObjectiveOptions
from safemax_sd.results.erasure import RECORD, ErasureRecord

FILES = ("*.safetensors", RECORD, "README.md", "samples/*.png", "unet/*", "transformer/*")
"""Patterns of the files to upload, relative to the output folder."""

TOKEN_SAFE_TRACKERS = (None, "tensorboard")
GIVEN = "(given)"
"""Text that errors show in place of a token."""


@dataclass
class HubOptions(ObjectiveOptions):
    """Flags of the upload."""

    group: ClassVar[str] = "Hub"

    push_to_hub: bool = option(False, "Upload the finished adapter to the Hugging Face hub.")
    hub_model_id: str | None = option(None, "Repository on the hub; named like --output_dir if not given.")
    hub_private: bool = option(False, "Make the repository private if it is not there yet.")
    hub_token: str | None = option(
        None, "Token of the hub; that of `hf auth login` or HF_TOKEN if not given.", secret=True
    )


def check(config: HubOptions, tracker: str | None) -> None:
    """Check before training that the result can be uploaded after it.

    Args:
        config: Flags.
        tracker: Name of the tracker in use; None for none.

    Raises:
        OptionError: A flag of the hub is given without `--push_to_hub`, the repository's name is invalid,
            HF_HUB_OFFLINE is set, there is no token, or the tracker might publish it.
    """
    if not config.push_to_hub:
        given = {
            "hub_model_id": config.hub_model_id,
            "hub_private": config.hub_private,
            "hub_token": GIVEN if config.hub_token else None,
        }
        for name, value in given.items():
            if value:
                raise OptionError(f"--{name}", value, "needs --push_to_hub")
        return
    if config.hub_token is not None and tracker not in TOKEN_SAFE_TRACKERS:
        # wandb and others store the command line of a run.
        text = f"may be published by --report_to {tracker}: leave it out and run `hf auth login`"
        raise OptionError("--hub_token", GIVEN, text)
    try:
        validate_repo_id(repo_id(config))
    except HFValidationError as error:
        text = "must be a name or owner/name of letters, digits, '-', '_' and '.' on the hub (default: --output_dir's)"
        raise OptionError("--hub_model_id", repo_id(config), text) from error
    if is_offline_mode():
        raise OptionError("--push_to_hub", True, "cannot work with HF_HUB_OFFLINE set")
    if not (config.hub_token or get_token()):
        raise OptionError("--push_to_hub", True, "needs a token of the hub: run `hf auth login` or set HF_TOKEN")


def repo_id(config: HubOptions) -> str:
    """Return the repository to upload to: `owner/name`, or `name` for one of the token's owner."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def output_files(directory: Path) -> list[str]:
    """List the files of a finished run to upload, relative to its folder; checkpoints and logs are left out."""
    paths = (path for pattern in FILES for path in directory.glob(pattern))
    return sorted(path.relative_to(directory).as_posix() for path in paths if not path.name.startswith("."))


def published(path: Path) -> bytes | Path:
    """Return the content to upload for a file: its path, or the bytes of `ErasureRecord.public` for a record."""
    if path.name != RECORD:
        return path
    return utf8(json_text(ErasureRecord.read(path.parent, "--output_dir").public().to_json()))


def push(config: HubOptions) -> str:
    """Upload a finished run in one commit, and return the repository's address.

    Raises:
        SafemaxError: The upload failed; the output folder is complete.
    """
    directory, api = Path(config.output_dir), HfApi(token=config.hub_token)
    try:
        repository = api.create_repo(repo_id(config), exist_ok=True, private=config.hub_private or None)
        operations = [CommitOperationAdd(name, published(directory / name)) for name in output_files(directory)]
        api.create_commit(repository.repo_id, operations, commit_message=f"Erased by safemax_sd, {config.objective}")
    except Exception as error:  # the hub's client passes on errors of its HTTP library, which differs by release
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SafemaxError(
            f"{directory} is complete but could not be uploaded to {repo_id(config)} ({reason[0]}); "
            f"hf upload {repo_id(config)} {directory} --exclude 'checkpoint-*' uploads it later"
        ) from error
    return str(repository)
