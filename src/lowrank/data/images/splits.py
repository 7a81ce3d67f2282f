"""Splits of images that never part a patient, and keep the classes' shares as well as that allows.

Patients are grouped by their rarest class, put into an order that depends on their names alone (a hash), and cut: the
same names give the same splits on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def split_by_patient(labels: np.ndarray, patients: Sequence[str], val: float, test: float) -> list[str]:
    """``train``, ``val`` or ``test`` for each image.

    Args:
        labels: (n,) classes, or (n, classes) of zeros and ones.
        patients: whose each image is; images of one patient stay together.
        val, test: shares of each class's patients; a class with enough patients (three) gets one into each split that
            is asked for.

    Raises:
        ValueError: shares that are out of range or leave nothing to train on.
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise ValueError(
            f"data.val_fraction={val} and data.test_fraction={test} must be at least 0 and together below 1"
        )
    place: dict[str, str] = {}
    for group in _groups(labels, patients):
        count = len(group)
        held = {"test": _share(count, test), "val": _share(count, val)}
        if (
            held["test"] + held["val"] >= count
        ):  # too few patients of this class: they train first, then they are tested
            held = {"test": int(test > 0 and count > 1), "val": 0}
        for i, patient in enumerate(group):
            place[patient] = "test" if i < held["test"] else "val" if i < held["test"] + held["val"] else "train"
    return [place[patient] for patient in patients]


def folds_by_patient(labels: np.ndarray, patients: Sequence[str], folds: int) -> np.ndarray:
    """The fold of each image, from 0: every class's patients are dealt to the folds in turn.

    Args:
        labels, patients: as of ``split_by_patient``.
        folds: how many; each gets a patient at least.

    Raises:
        ValueError: fewer patients than folds.
    """
    groups = _groups(labels, patients)
    if (count := sum(map(len, groups))) < folds:
        raise ValueError(f"data.folds={folds}: there are {count} patients, and each fold needs one")
    dealt = [patient for group in groups for patient in group]
    place = {patient: number % folds for number, patient in enumerate(dealt)}
    return np.array([place[patient] for patient in patients])


def places_of_fold(labels: np.ndarray, patients: Sequence[str], folds: int, fold: int, val: float = 0.15) -> list[str]:
    """``test`` for the images of the ``fold``, from 1; of the others ``val`` for a share of their patients."""
    tested = folds_by_patient(labels, patients, folds) == fold - 1
    rest = np.flatnonzero(~tested)
    places = np.full(len(labels), "test", dtype="<U5")
    places[rest] = split_by_patient(labels[rest], [patients[int(i)] for i in rest], val, 0.0)
    return list(map(str, places))


def check_folds(folds: int | None, fold: int | None) -> None:
    """Raise ValueError for folds that are none."""
    if folds is None and fold is not None:
        raise ValueError(f"data.fold={fold} is one of how many? give data.folds too, such as 5")
    if folds is not None and fold is None:
        raise ValueError(
            f"data.folds={folds}: give data.fold too, from 1 to {folds} (lowrank compare --folds runs all)"
        )
    if folds is not None and fold is not None and not (folds >= 2 and 1 <= fold <= folds):
        raise ValueError(f"data.folds={folds} must be at least 2, and data.fold={fold} one of 1 to {folds}")


def _share(count: int, fraction: float) -> int:
    return max(1, round(count * fraction)) if fraction > 0 else 0


def _groups(labels: np.ndarray, patients: Sequence[str]) -> list[list[str]]:
    """The patients by their rarest class, each group in the order of the hash of its names."""
    members = np.eye(int(labels.max()) + 1, dtype=bool)[labels] if labels.ndim == 1 else labels.astype(bool)
    rarity = np.argsort(np.argsort(members.sum(axis=0), kind="stable"))
    rarest: dict[str, int] = {}
    for patient, row in zip(patients, members, strict=True):
        own = int(rarity[row].min()) if row.any() else len(rarity)
        rarest[patient] = min(own, rarest.get(patient, own))
    groups: dict[int, list[str]] = {}
    for patient in sorted(rarest, key=_order):
        groups.setdefault(rarest[patient], []).append(patient)
    return [groups[key] for key in sorted(groups)]


def _order(patient: str) -> bytes:
    return hashlib.blake2b(patient.encode(), digest_size=8).digest()
