"""Each section in a process of its own, forked from one that has imported everything and never started CUDA.

So a section that crashes, hangs, or loses the device takes nothing with it, and none pays for the imports.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu.page import Results

LOADED = [
    "torch._dynamo",  # which the first optimizer of a process otherwise waits for
    "transformers.models.llama.modeling_llama",
    "timm.models.vision_transformer",
    "benchmarks.gpu.correctness",
]
GRACE = 10.0  # seconds after its time that a section has to end by itself, before it is killed


def processes(kind: str = "forkserver") -> Any:
    """What makes processes; of ``kind`` "spawn" each imports everything by itself."""
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(LOADED)
    return context


def run_section(context: Any, name: str, given: dict[str, Any], results: Results, grace: float = GRACE) -> None:
    """Run a section in a process of its own, and record what it reports until it ends or its time is up."""
    began, seconds = time.monotonic(), given["seconds"]
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=section_process, args=(name, given, results.items(), theirs))
    process.start()
    theirs.close()
    results.begin(name)
    status, why = "stopped", f"killed {grace:.0f} s after its {seconds:.0f} s were up"
    try:
        while mine.poll(max(0.0, began + seconds + grace - time.monotonic())):
            kind, *content = mine.recv()
            if kind == "item":
                results.add(name, *content)
            else:
                status, why = kind, content[0]
                break
    except EOFError:
        process.join(5)
        status, why = "failed", f"its process died (exit code {process.exitcode})"
    finally:
        end_process(process)
    results.end(name, status, time.monotonic() - began, why)


def end_process(process: Any) -> None:
    """Let it end by itself, or kill it and what it has started (the compiler's workers)."""
    process.join(3)
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
        process.join(10)


def section_process(name: str, given: dict[str, Any], known: Any, report: Connection) -> None:
    """The process of a section."""
    os.setsid()  # a group of its own, to be killed as a whole
    warnings.simplefilter("ignore")
    import torch

    from benchmarks.gpu.bench import Bench, message_of

    try:
        torch.manual_seed(0)
        if given["tiny"]:
            torch.set_num_threads(1)
        device = torch.device("cuda", 0) if given["device"] == "cuda" else torch.device("cpu")
        bench = Bench(
            device,
            given["seconds"],
            lambda key, value: report.send(("item", key, value)),
            tiny=given["tiny"],
            text=given["text"],
            known=known,
        )
        section = importlib.import_module(f"benchmarks.gpu.{name}")
        gc.freeze()  # what is loaded stays: to go through it after every measurement takes a quarter of a second
        section.run(bench)
        report.send(("done", ""))
    except BaseException as error:
        report.send(("failed", message_of(error)))
