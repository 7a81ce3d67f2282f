"""How many faults the suite notices: a fixed random sample of mutants (cosmic-ray), each against its room's tests.

    python tests/mutants.py [--each 14] [--seed 0] [--room optim] [--out mutants.json]

A mutant is one changed operator, number, comparison, condition … in one file. It is killed if a test fails or hangs.
The sample is drawn with a fixed seed from all mutants of a room, so that a rerun on the same code tells the same. Files
are mutated in place and put back, so run it in a clone in which nobody works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test, mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome

# room: its modules, and the tests that should notice, those that tell much in little time first
ROOMS = {
    "optim": (
        "src/lowrank/optim/*.py",
        """tests/units/test_rules.py tests/units/test_projected.py tests/units/test_optimizer.py
        tests/units/test_storage.py tests/units/test_joint_basis.py tests/units/test_pairs.py
        tests/units/test_adafactor.py tests/units/test_tucker.py tests/reference/test_projected.py
        tests/reference/test_overlap.py tests/reference/test_baselines.py tests/units/test_groups.py
        tests/units/test_capture.py tests/units/test_galore_torch.py tests/units/test_kernels.py
        tests/contract/test_rules.py tests/runs/test_golden.py tests/laws/test_law9_bytes.py
        tests/laws/test_law6_per_layer.py tests/laws/test_no_hidden_synchronisation.py
        tests/laws/test_law7_resume.py tests/ranks/test_ranks.py tests/ranks/test_courses.py""",
    ),
    "adapters": (
        "src/lowrank/adapters/*.py",
        """tests/units/test_product.py tests/units/test_lora.py tests/units/test_dora.py
        tests/units/test_dense.py tests/units/test_merge.py tests/units/test_targets.py
        tests/units/test_plan.py tests/units/test_methods.py tests/laws/test_law3_streams.py
        tests/laws/test_law5_equivalence.py tests/reference/test_lte.py tests/reference/test_exchange.py
        tests/reference/test_fragments.py tests/contract/test_adapters.py tests/units/test_adapters.py
        tests/laws/test_law2_unload.py tests/units/test_peft.py tests/units/test_quantised.py
        tests/units/test_adapter_files.py tests/units/test_adapter_start.py tests/runs/test_golden.py
        tests/ranks/test_ranks.py""",
    ),
    "evaluate": (
        "src/lowrank/evaluate/*.py",
        """tests/units/test_metrics.py tests/units/test_generate.py tests/units/test_glue.py
        tests/runs/test_reading.py tests/runs/test_segmentation_runs.py tests/runs/test_text_runs.py
        tests/runs/test_finetune.py tests/units/test_volumes.py tests/units/test_messages.py
        tests/units/test_own_files.py tests/compat/test_version_0_1.py tests/runs/test_exports.py
        tests/runs/test_vision_runs.py tests/units/test_trust.py tests/units/test_cli.py
        tests/hostile/test_table.py""",
    ),
    "checkpoint": (
        "src/lowrank/infra/checkpoint*.py",
        """tests/units/test_checkpoint.py tests/units/test_messages.py tests/compat/test_version_0_1.py
        tests/units/test_quantised.py tests/laws/test_law7_resume.py tests/runs/test_train.py
        tests/hostile/test_table.py tests/ranks/test_courses.py""",
    ),
    "data": (
        "src/lowrank/data/**/*.py",
        """tests/units/test_data_*.py tests/units/test_images_*.py tests/units/test_medical_files.py
        tests/units/test_volumes.py tests/units/test_examples.py tests/units/test_glue.py
        tests/units/test_hub.py tests/units/test_models_vision.py tests/runs/test_segmentation_runs.py
        tests/runs/test_text_runs.py tests/runs/test_finetune.py tests/runs/test_exports.py
        tests/runs/test_vision_runs.py tests/hostile/test_table.py""",
    ),
}
ANNOTATIONS = "core/ReplaceBinaryOperator_BitOr_"  # mutates `int | None`, which nothing can notice


def found(patterns: str) -> list[Path]:
    """The files of glob patterns, in their order; a pattern that nothing matches is an error."""
    matched = {pattern: sorted(Path().glob(pattern)) for pattern in patterns.split()}
    if gone := [pattern for pattern, paths in matched.items() if not paths]:
        raise SystemExit(f"tests/mutants.py: ROOMS names what is not there: {' '.join(gone)}")
    return [path for paths in matched.values() for path in paths if path.name != "__init__.py"]


def is_python(mutant: MutationSpec) -> bool:
    """Whether it compiles: the bare ``*`` of a signature is taken for a product."""
    operator = get_operator(mutant.operator_name)(**mutant.operator_args)
    try:
        compile(mutate_code(mutant.module_path.read_text(), operator, mutant.occurrence), mutant.module_path, "exec")
    except SyntaxError:
        return False
    return True


def sample(room: str, each: int, seed: int) -> list[MutationSpec]:
    """``each`` of all mutants of a room, drawn by the seed."""
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/all.sqlite", WorkDB.Mode.create) as every:
        init(found(ROOMS[room][0]), every, {})
        mutants = [item.mutations[0] for item in every.work_items]
    usable = sorted((m for m in mutants if not m.operator_name.startswith(ANNOTATIONS)), key=str)
    random.Random(seed).shuffle(usable)
    return list(itertools.islice(filter(is_python, usable), each))


def score(room: str, each: int, seed: int) -> list[dict[str, str]]:
    """Run a sample of a room's mutants: what became of each."""
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {' '.join(map(str, found(ROOMS[room][1])))}"
    start = time.monotonic()
    if subprocess.run(command.split(), stdout=subprocess.DEVNULL).returncode != 0:
        raise SystemExit(f"{room}: its tests fail without a mutant: {command}")
    hangs = 60 + 4 * (time.monotonic() - start)
    results = []
    for mutant in sample(room, each, seed):
        result = mutate_and_test([mutant], command, hangs)
        outcome = (result.test_outcome or TestOutcome.INCOMPETENT).value
        where = {"file": str(mutant.module_path), "line": str(mutant.start_pos[0]), "operator": mutant.operator_name}
        results.append(where | {"outcome": outcome})
        if outcome == TestOutcome.SURVIVED.value:
            print(f"alive: {result.diff}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=14, help="mutants of a room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", choices=list(ROOMS), action="append", help="this room alone; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    given = parser.parse_args()
    results: dict[str, list[dict[str, str]]] = {}
    for room in given.room or ROOMS:
        results[room] = score(room, given.each, given.seed)
        killed = sum(each["outcome"] != "survived" for each in results[room])
        print(f"{room}: {killed} of {len(results[room])} killed", flush=True)
        given.out.write_text(json.dumps({"seed": given.seed, "rooms": results}, indent=1) + "\n")
    every = [each for rows in results.values() for each in rows]
    print(f"{sum(each['outcome'] != 'survived' for each in every)} of {len(every)} killed")


if __name__ == "__main__":
    main()
