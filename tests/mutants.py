"""How many faults the suite notices: a fixed random sample of mutants (cosmic-ray), each against its room's tests.

    python tests/mutants.py [--each 14] [--seed 0] [--room optim] [--out mutants.json]

A mutant is one changed operator, number, comparison, condition … in one file. It is killed if a test fails or hangs.
The sample is drawn with a fixed seed from all mutants of a room, so that a rerun on the same code tells the same. Files
are mutated in place and put back, so run it in a clone in which nobody works.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from cosmic_ray.commands.execute import execute
from cosmic_ray.commands.init import init
from cosmic_ray.config import ConfigDict
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome

# room: its modules, and the tests that should notice
ROOMS = {
    "optim": (
        "src/lowrank/optim/*.py",
        """tests/contract/test_rules.py tests/units/test_*ada*.py tests/units/test_rules.py tests/units/test_storage.py
        tests/units/test_projected.py tests/units/test_joint_basis.py tests/units/test_optimizer.py
        tests/units/test_galore_torch.py tests/reference/test_projected.py tests/reference/test_overlap.py
        tests/laws/test_law6_per_layer.py tests/laws/test_law9_bytes.py tests/laws/test_law7_resume.py""",
    ),
    "adapters": (
        "src/lowrank/adapters/*.py",
        """tests/contract/test_adapters.py tests/units/test_product.py tests/units/test_lora.py tests/units/test_dora.py
        tests/units/test_dense.py tests/units/test_adapters.py tests/units/test_merge.py tests/units/test_targets.py
        tests/laws/test_law[1235]*.py tests/reference/test_lte.py tests/units/test_plan.py""",
    ),
    "evaluate": (
        "src/lowrank/evaluate/*.py",
        """tests/units/test_metrics.py tests/units/test_image*.py tests/units/test_evaluate*.py
        tests/units/test_generate*.py tests/runs""",
    ),
    "checkpoint": (
        "src/lowrank/infra/checkpoint*.py",
        "tests/units/test_checkpoint.py tests/laws/test_law7_resume.py tests/runs/test_train.py",
    ),
    "data": (
        "src/lowrank/data/**/*.py",
        "tests/units/test_data_*.py tests/units/test_images_*.py tests/units/test_models_vision.py",
    ),
}
ANNOTATIONS = "core/ReplaceBinaryOperator_BitOr_"  # mutates `int | None`, which nothing can notice


def found(patterns: str) -> list[Path]:
    return [path for pattern in patterns.split() for path in sorted(Path().glob(pattern)) if path.name != "__init__.py"]


def score(room: str, each: int, seed: int, timeout: float) -> list[dict[str, str]]:
    """Run a sample of a room's mutants: what became of each."""
    modules, tests = (found(patterns) for patterns in ROOMS[room])
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {' '.join(map(str, tests))}"
    if subprocess.run(command.split(), stdout=subprocess.DEVNULL).returncode != 0:
        raise SystemExit(f"{room}: its tests fail without a mutant: {command}")
    settings = {"test-command": command, "timeout": timeout, "distributor": {"name": "local"}, "excluded-modules": []}
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/all.sqlite", WorkDB.Mode.create) as every:
        init(modules, every, {})
        usable = [item for item in every.work_items if not item.mutations[0].operator_name.startswith(ANNOTATIONS)]
        usable.sort(key=lambda item: str(item.mutations))
        with use_db(f"{folder}/sample.sqlite", WorkDB.Mode.create) as sample:
            sample.add_work_items(random.Random(seed).sample(usable, min(each, len(usable))))
            execute(sample, ConfigDict(settings))
            lines = {item.job_id: item.mutations[0] for item in sample.work_items}
            return [
                {
                    "file": str(lines[job].module_path),
                    "line": str(lines[job].start_pos[0]),
                    "operator": lines[job].operator_name,
                    "outcome": (result.test_outcome or TestOutcome.INCOMPETENT).value,
                }
                for job, result in sample.results
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=14, help="mutants of a room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", choices=list(ROOMS), action="append", help="this room alone; may be repeated")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a mutant counts as killed")
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    given = parser.parse_args()
    results: dict[str, list[dict[str, str]]] = {}
    for room in given.room or ROOMS:
        results[room] = score(room, given.each, given.seed, given.timeout)
        killed = sum(each["outcome"] != "survived" for each in results[room])
        print(f"{room}: {killed} of {len(results[room])} killed", flush=True)
        for each in results[room]:
            if each["outcome"] == "survived":
                print(f"  alive: {each['file']}:{each['line']} {each['operator']}", flush=True)
        given.out.write_text(json.dumps({"seed": given.seed, "rooms": results}, indent=1) + "\n")
    every = [each for rows in results.values() for each in rows]
    print(f"{sum(each['outcome'] != 'survived' for each in every)} of {len(every)} killed")


if __name__ == "__main__":
    main()
