"""Imports of before the rooms were put in order go on working."""

import importlib

import pytest

from lowrank.infra.old_names import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_name_of_before_is_the_same_module_with_a_warning(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{MOVED[old]} now"):
        assert importlib.import_module(old) is importlib.import_module(MOVED[old])
