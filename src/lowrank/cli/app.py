"""The command line: its commands and what becomes of a line that was typed.

`main` parses, calls the command and prints. An error that the user can mend is one clear message and exit status 2; one
that should not have been is a short message, a file with all about it, and status 70. LOWRANK_DEBUG=1 shows the
traceback of either.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lowrank import __version__
from lowrank.cli import doctor, listing, planning, reporting, trained, training
from lowrank.cli.arguments import Command, Parsed, explain, overview, parse, switch
from lowrank.cli.errors import mendable, reported, short
from lowrank.cli.streams import ready_streams
from lowrank.infra.convert import nearest
from lowrank.infra.text import printable
from lowrank.run import own_files

_ABOUT = "Train neural networks with low-rank weights and low-rank gradients, and compare the methods honestly."

_CLOSING = """
Begin with:
  lowrank train gpt-mini                      a small GPT, in a minute
  lowrank train gpt-mini --method lte         the same with LoRA-the-Explorer
  lowrank compare gpt-mini --methods full,lora,multihead_lora,lte,relora

lowrank COMMAND --help explains a command. LOWRANK_DEBUG=1 shows where an error came from.
"""

# In the order in which the overview shows them.
COMMANDS: Sequence[Command] = (
    training.train,
    training.compare,
    reporting.report,
    planning.plan,
    doctor.doctor,
    trained.evaluate,
    trained.generate,
    trained.chat,
    trained.export,
    trained.predict,
    listing.data,
    listing.methods,
    listing.recipes,
)


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit status: 0, 1 (some runs of a comparison failed), 2 (an error that can be mended), 70 (one that should
        not have been), 130 (interrupted).
    """
    words = list(sys.argv[1:] if words is None else words)
    with ready_streams(trains=words[:1] in (["train"], ["compare"])):
        return _status(words)


def _status(words: list[str]) -> int:
    before, warnings.showwarning = warnings.showwarning, _warn
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # it tells of each attempt to connect
    try:
        status = _dispatch(words)
        sys.stdout.flush()  # a reader that has left is noticed here, and not when the interpreter ends
        return status
    except KeyboardInterrupt:
        print("lowrank: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has left
        return 0
    except Exception as error:
        if os.environ.get("LOWRANK_DEBUG", "0") not in ("", "0"):
            raise
        message = mendable(error)
        with suppress(OSError):
            print(f"lowrank: {short(printable(message or reported(words, error)))}", file=sys.stderr)
        return 2 if message else 70
    finally:
        warnings.showwarning = before
        own_files.trust_nothing()


def _warn(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
    """A warning in the look of our messages; whose line of code it was is nobody's business but ours."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"lowrank: warning: {short(printable(str(message)))}", file=sys.stderr)


def _dispatch(words: list[str]) -> int:
    if words[:1] in ([], ["--help"], ["-h"], ["help"]):
        print(overview(_ABOUT, COMMANDS, _CLOSING))
        return 0
    if words == ["--version"]:
        print(f"lowrank {__version__}")
        return 0
    known = {command.name: command for command in COMMANDS}
    name, *rest = words
    if name not in known:
        raise ValueError(f"there is no command {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    before_end = rest[: rest.index("--")] if "--" in rest else rest
    if {"--help", "-h"} & set(before_end):
        print(explain(known[name]))
        return 0
    parsed = parse(rest, known[name])
    if switch(parsed, "trust_files"):
        own_files.trust_every_file()
    return known[name].call(Parsed(positions=parsed.positions, options=parsed.without(("trust_files",))))
