"""What may lie on the hub of models and data: a folder here, or a name there, if the hub answers at all."""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request
import warnings
from functools import cache
from pathlib import Path

SECONDS = 10.0


def located(path: str) -> Path | str:
    """The folder or file of that path; where there is none, the name itself, of what lies on the hub (``ask_hub``)."""
    place = Path(path).expanduser()
    if place.exists():
        return place
    ask_hub()
    return path


@cache
def ask_hub() -> None:
    """Ask the hub, once in a process, whether it answers; where it does not, its libraries use what their caches hold.

    Of themselves they look there after a minute or two: they ask for a dozen files, and for each of them five times.
    ``HF_HUB_OFFLINE`` and ``HF_ENDPOINT`` are those libraries' own settings.
    """
    if "HF_HUB_OFFLINE" in os.environ:
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reason = _silent(endpoint)
    if reason is None:
        return
    said = f"{endpoint} does not answer ({reason}): of the hub only what its cache here holds is used"
    warnings.warn(said, stacklevel=2)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported from now on, and for children
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            vars(sys.modules[module])["HF_HUB_OFFLINE"] = True


def _silent(endpoint: str) -> str | None:
    """Why nothing can be had from there; None where somebody answers, whatever they say."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
