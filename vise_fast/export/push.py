"""A finished directory onto the hub: what would be sent and, when asked for, the sending."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vise_fast.model.base import first_line
from vise_fast.system.console import Console
from vise_fast.system.errors import ConfigError, EnvironmentFault


def check_name(repository: str) -> None:
    """OWNER/NAME as the hub takes it. Raises ConfigError."""
    try:
        validate_repo_id(repository)
        fits = repository.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise ConfigError(
            f"--push {repository[:80]} is no name of a repository; the hub knows OWNER/NAME; write "
            "--push OWNER/NAME"
        )


def push(directory: Path, repository: str, *, send: bool, console: Console) -> None:
    """Says what goes where; sends it with `send`, to a private repository if it is a new one.

    Raises EnvironmentFault where the hub refuses or cannot be reached.
    """
    paths = sorted(path for path in directory.iterdir() if path.is_file())
    size = sum(path.stat().st_size for path in paths)
    console.say(f"push     {len(paths)} files, {size / 1e6:.1f} MB, to {repository}:")
    for path in paths:
        console.say(f"         {path.name}  {path.stat().st_size} bytes")
    if not send:
        console.say("         nothing was sent; add --yes to send it")
        return
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        place = api.upload_folder(repo_id=repository, folder_path=directory)
    except OSError as fault:
        raise EnvironmentFault(
            f"the hub did not take {repository}: {first_line(fault)}; log in with: hf auth login; "
            f"{directory} is complete and can be sent again"
        ) from fault
    console.say(f"pushed   {place}")
