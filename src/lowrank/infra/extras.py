"""Libraries that only some uses need: imported where they are used, and when missing, named with what installs them."""

import importlib
from typing import Any


def import_extra(module: str, extra: str) -> Any:
    """The imported ``module``, which comes with the extra ``extra`` of this distribution.

    Raises:
        ImportError: it is not installed; says how to install it.

    >>> import_extra("json", "text").loads("[1]")
    [1]
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(f"this needs {library}: pip install 'lowrank-training[{extra}]' ({error})") from error
