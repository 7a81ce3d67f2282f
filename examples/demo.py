"""The README's demonstration: three methods on a small GPT under three seeds, three on a small vision transformer.

    python examples/demo.py [FOLDER]        # what `make demo` runs; offline, under five minutes on two cores

Everything here is the command line's own; each command is printed before it runs, to be tried alone afterwards.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from lowrank.cli.app import main as lowrank


def run(command: str) -> None:
    print(f"\n$ lowrank {command}\n", flush=True)
    code = lowrank(shlex.split(command))
    if code:
        sys.exit(code)


def main(folder: str = "runs/demo") -> None:
    out = Path(folder)
    shutil.rmtree(out, ignore_errors=True)
    text, images = shlex.quote(str(out / "text")), shlex.quote(str(out / "images"))
    compared = "--methods full,lora,lte --seeds 1,2,3 --steps 120 --eval-every 40 --eval-batches 16 --quiet"
    run(f"compare gpt-mini {compared} --out {text}")
    run(f"generate {shlex.quote(str(out / 'text' / 'lte_seed_1'))} --prompt 'The ' --tokens 200")
    compared = "--methods full,lora,lte_galore --seeds 1,2,3 --epochs 3 --model.patch_size 14"
    run(f"compare vit-mini --data digits {compared} --quiet --out {images}")
    print(f"\nOpen {out}/text/report.html and {out}/images/report.html; the loss curves are {out}/*/curves.png.")


if __name__ == "__main__":
    del sys.path[0]  # this folder, in which files are named as libraries are
    main(*sys.argv[1:2])
