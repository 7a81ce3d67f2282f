"""What works on this GPU, how fast, and how near to the limit: one command, about ten minutes.

    PYTHONPATH=src python -m benchmarks.gpu [--minutes 10] [--out DIR] [--text FILE] [--sections …]
    PYTHONPATH=src python -m benchmarks.gpu --device cpu --tiny     the dry run, without a GPU

Needs torch, transformers, timm and this checkout; where peft, galore-torch or bitsandbytes are there, they are measured
too. Nothing is downloaded. Sections come in order of worth, each in a process of its own: one that fails, hangs or
breaks the device takes nothing with it. gpu.json and gpu.md are written after every measurement, so that a run that is
cut off still counts.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.gpu.page import Results
from benchmarks.gpu.processes import GRACE, processes, run_section

# Section (a module of this package with ``run(bench)``): its share of the time.
SECTIONS = {
    "environment": 0.2,
    "correctness": 3.0,
    "fsdp": 0.6,
    "ceilings": 0.5,
    "optimizer_step": 2.5,
    "kernels": 1.0,
    "captured": 0.5,
    "adapter_layer": 0.6,
    "memory": 3.0,
    "training": 2.5,
    "compiled": 2.0,
    "profile": 0.6,
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # ask whether there is a GPU without starting CUDA here
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products that are the same twice
    if options.device == "cuda" and not cuda_is_there():
        print("no CUDA device here; the dry run is: python -m benchmarks.gpu --device cpu --tiny", file=sys.stderr)
        return 2
    results = Results(options.out, {"device": options.device, "tiny": options.tiny, "minutes": options.minutes})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the section's process is ended too
    context = processes()
    end, wanted = time.monotonic() + 60 * options.minutes, list(options.sections)
    for place, name in enumerate(wanted):
        left = end - time.monotonic() - GRACE
        seconds = left * SECTIONS[name] / sum(SECTIONS[later] for later in wanted[place:])
        if seconds < 1:
            results.end(name, "skipped", 0.0, "no time was left")
            continue
        given = {"device": options.device, "tiny": options.tiny, "text": options.text, "seconds": seconds}
        run_section(context, name, given, results)
        if name == "environment" and "forked subprocess" in str(results.items()):
            context = processes("spawn")  # something that was imported had started CUDA
            run_section(context, name, given, results)
    print(results.summary())
    print(f"written to {results.page} and {results.data}")
    return 1 if results.failures() else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the whole may take (10)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results (gpu-results)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest of everything: says nothing but that it runs")
    parser.add_argument("--text", type=Path, help="text to train on; default: this checkout's own files")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME", help=", ".join(SECTIONS)
    )
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error("--minutes must be above 0")
    if options.text is not None and not options.text.is_file():
        parser.error(f"--text {options.text} is no file")
    options.sections = [name for name in SECTIONS if name in ("environment", *options.sections)]
    return options


def cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
