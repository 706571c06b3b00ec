"""Whether the model hub can be asked, found out once and within seconds: libraries ask again and
again for half a minute. Imports nothing heavy.

Left out: downloads (transformers and huggingface_hub make them).
"""

from __future__ import annotations

import functools
import socket
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants

from vise_fast.system.errors import EnvironmentFault

SECONDS = 3.0


def is_cached(source: str) -> bool:
    """Whether the config of a hub id lies in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, "config.json"), str)


def reach(source: str, path: str) -> None:
    """Nothing for a directory, and where the hub of a hub id answers; else libraries take what is
    cached. `path`: how the user called it. Raises EnvironmentFault where nothing is cached.
    """
    if Path(source).is_dir() or answers():
        return
    if not is_cached(source):
        raise EnvironmentFault(
            f"{path} is not on this machine and {constants.ENDPOINT} does not answer, so it cannot "
            f"be downloaded; where there is a network say: hf download {path}; or give "
            "--model.path a directory"
        )
    constants.HF_HUB_OFFLINE = True


@functools.cache
def answers() -> bool:
    """Whether the hub answers within SECONDS; a refusal is an answer too."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        asked = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(asked, timeout=SECONDS).close()
    except urllib.error.URLError as fault:
        return not isinstance(fault.reason, socket.gaierror | TimeoutError | ConnectionError)
    except (TimeoutError, ConnectionError):
        return False
    return True
