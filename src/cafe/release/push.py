"""Upload a model's directory to the hub, as one commit of a repository.

Only the model's own files go up. A dry run asks the hub who the token belongs to and whether the
repository is there, lists the files, and changes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cafe.errors import CafeError, CheckpointError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_LEFT_OUT = ("*.lock", "*.tmp", "**/.*", ".*", "**/__pycache__/**")


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was uploaded, or would be.

    repository  "OWNER/NAME"
    files       paths in the repository
    size        bytes of these files
    owner       the user that the token belongs to
    exists      whether the repository was there before
    url         of the commit; None after a dry run
    """

    repository: str
    files: tuple[str, ...]
    size: int
    owner: str
    exists: bool
    url: str | None = None


def push_to_hub(
    directory: str | Path,
    repository: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    message: str = "Upload a model by cafe",
) -> PushReport:
    """Upload the model in `directory` to the hub's repository "OWNER/NAME".

    The repository is created if it is not there. Files that it has and the directory lacks stay.
    The token is that of `hf auth login` or HF_TOKEN, the hub that of HF_ENDPOINT.

    Args:
        directory: A checkpoint directory, as `export` writes it.
        repository: "OWNER/NAME".
        private: Visibility of a new repository; one that exists stays as it is.
        dry_run: Check the token and the repository and list the files, but change nothing.
        message: Of the commit.

    Raises:
        CheckpointError: `directory` has no model, `repository` is not "OWNER/NAME".
        CafeError: the hub cannot be reached or refuses, or there is no token.
    """
    directory = Path(directory)
    if not _REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"--push {repository!r}: name the repository as OWNER/NAME")
    if not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CheckpointError(
            f"{directory}: has no config.json, so there is no model to push; write one by --to"
        )
    files = uploaded_files(directory)
    size = sum((directory / name).stat().st_size for name in files)
    try:
        owner, exists = _state(repository)
        report = PushReport(repository, files, size, owner, exists)
        return report if dry_run else _upload(directory, report, private, message)
    except _hub_errors() as error:
        raise CafeError(_explained(repository, error)) from error


def uploaded_files(directory: Path) -> tuple[str, ...]:
    """Paths of the files that are uploaded, sorted: all but hidden and temporary ones."""
    from huggingface_hub.utils import filter_repo_objects

    paths = (x.relative_to(directory).as_posix() for x in directory.rglob("*") if x.is_file())
    return tuple(sorted(filter_repo_objects(paths, ignore_patterns=list(_LEFT_OUT))))


def _state(repository: str) -> tuple[str, bool]:
    """The name of the token's user, and whether the repository is there."""
    from huggingface_hub import HfApi

    api = HfApi()
    return str(api.whoami()["name"]), api.repo_exists(repository)


def _upload(directory: Path, report: PushReport, private: bool, message: str) -> PushReport:
    from dataclasses import replace

    from huggingface_hub import HfApi

    api = HfApi()
    if not report.exists:
        api.create_repo(report.repository, private=private)
    commit = api.upload_folder(
        repo_id=report.repository,
        folder_path=directory,
        commit_message=message,
        ignore_patterns=list(_LEFT_OUT),
    )
    return replace(report, url=str(commit.commit_url))


def _hub_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    return (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, ValueError)


def _explained(repository: str, error: Exception) -> str:
    """The hub's refusal in one line, with what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    said = " ".join(str(error).split())
    if isinstance(error, OfflineModeIsEnabled):
        return f"--push {repository}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return (
            f"--push {repository}: the hub knows no valid token; run `hf auth login`, or set "
            "HF_TOKEN to a token that may write"
        )
    if status == 403:
        return f"--push {repository}: the token may not write there ({said[:300]})"
    return f"--push {repository}: the upload failed ({said[:300]})"
