"""`--push-to-hub`: the output of an export as a repository on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from swiftprune.errors import OutputError, SettingsError, and_more, first_line

# What the hub itself puts into a new repository.
_GIVEN = {".gitattributes"}


def check_repository(name: str, *, overwrite: bool) -> None:
    """Raises, before any work, SettingsError or OutputError when the repository `name` could not be written.

    `name` is `owner/name`. Only with `overwrite` may it hold files already; its history keeps them.
    """
    option = f"--push-to-hub {name}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SettingsError(f"{option}: {first_line(error)}") from error
    owner, _, rest = name.partition("/")
    if not rest:
        raise SettingsError(f"{option}: give owner/name, the owner being you or an organization of yours")
    api = HfApi()
    try:
        user = api.whoami()
    except LocalTokenNotFoundError as error:
        raise SettingsError(f"{option}: no token is stored here; run `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:  # of the hub or of the network, many types
        raise SettingsError(f"{option}: the hub does not say who you are: {first_line(error)}") from error
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    if owner not in owners:
        raise SettingsError(f"{option}: your token is of {user['name']}, who writes to {', '.join(owners)} only")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise SettingsError(f"{option}: your token may only read; make one that may write")
    try:
        found = set(api.list_repo_files(name)) - _GIVEN
    except RepositoryNotFoundError:
        return
    except Exception as error:  # of the hub or of the network, many types
        raise SettingsError(f"{option}: the hub cannot be read: {first_line(error)}") from error
    if found and not overwrite:
        raise OutputError(
            f"{name}: the repository holds {min(found)}{and_more(found)}; give another, or --overwrite "
            "to replace all it holds (its history stays)"
        )


def push(folder: Path, name: str, *, private: bool) -> str:
    """Makes `folder` all that the repository `name` holds, and returns its address.

    Raises OutputError when the hub does not take it; the folder stays, and the message says how to go on.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            delete_patterns="*",
            commit_message="Upload what swiftprune-export wrote",
        )
    except Exception as error:  # of the hub or of the network, many types
        raise OutputError(
            f"{folder}: is complete, but could not be pushed to {name}: {first_line(error)}; go on with: "
            f"hf upload {name} {folder} . --delete '*'"
        ) from error
    return str(address)
