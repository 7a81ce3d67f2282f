"""Every row of the table of scenarios, in each of its worlds, claim by claim."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from tests.ranks.claims import Case, is_one_model_on_all_ranks, is_two_workers_of_one_rank
from tests.ranks.start import found
from tests.ranks.table import RANKS, TABLE, Row
from tests.ranks.training import trained

FIXTURES = {"two": "two", "late": "two", "killed": "two", "start": "sharded", "sharded": "sharded", "mesh": "mesh"}
found_in = cache(found)
alone_in = cache(lambda row, world: row.run(None, world))


def ends_well(case: Case) -> None:
    """What an act asserts by itself."""
    for results in case.ranks:
        assert "failed" not in results, results["failed"]


def claims_of(row: Row, world: str) -> list[Any]:
    found: list[Any] = [claim for claim in row.must if world in getattr(claim, "worlds", (world,))]
    if row.method is None:
        return [ends_well, *found]
    if getattr(row.does, "func", None) is trained:
        found.append(is_one_model_on_all_ranks)
    if world == "mesh":
        found.append(is_two_workers_of_one_rank)
    return found


CASES = [(row, world, claim) for row in TABLE for world in row.worlds for claim in claims_of(row, world)]


def identity(value: Any) -> str:
    function = value.func if isinstance(value, partial) else value
    return str(getattr(value, "name", getattr(function, "__name__", value)))


@pytest.mark.parametrize(("row", "world", "claim"), CASES, ids=identity)
def test_ranks(row: Row, world: str, claim: Any, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(FIXTURES[world])
    other: Path = request.getfixturevalue("two") if world == "mesh" and row.method is not None else folder
    results = [each[row.name] for each in found_in(folder, world)]
    assert len(results) == RANKS[world][1].count(0)
    two = found_in(other, "two")
    claim(Case(row.name, world, row.method, results, partial(alone_in, row, world), two))


def test_a_scenario_is_named_once_in_a_world() -> None:
    names = [(row.name, world) for row in TABLE for world in row.worlds]
    assert len(names) == len({*names})
