"""Hospitals' files as arrays: NIfTI (nibabel), single DICOM images and DICOM series, a folder of slices (pydicom).

    value = slope · stored + intercept; the header's window is what ``auto`` takes; MONOCHROME1, whose white is low, is
    turned over; slices are sorted by their position along the normal of their plane

Volumes are brought to one orientation, that of an axial picture: slices from the feet up, rows from front to back,
columns from the patient's right to left. Of a header only what makes the numbers is read: no name, date or identifier
leaves this file.

Shapes: an image (h, w), or (h, w, 3) uint8 colour; a volume (d, h, w) with its spacing (3,) in millimetres.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.infra.extras import import_extra

NIFTI, DICOM = (".nii", ".nii.gz"), (".dcm", ".dicom")
ENVELOPED = bytes.fromhex("06092a864886f70d010703")  # a CMS envelope, as DICOM encrypts files (PS3.15)
TOLERANCE = 0.01  # of a spacing, by which places of slices may differ from even ones
AXIAL = ("L", "P", "S")


class Damaged(ValueError):
    """A file that is no image, or a broken one."""


@dataclass(frozen=True, kw_only=True)
class Raw:
    """``values``, the header's ``window`` if it has one, whether white is low, the ``spacing`` if it is known, and a
    volume's ``affine``, of its (column, row, slice) into nibabel's millimetres."""

    values: np.ndarray
    window: str | None = None
    inverted: bool = False
    spacing: tuple[float, float, float] | None = None
    affine: np.ndarray | None = None


def is_medical(path: Path) -> bool:
    return path.name.lower().endswith((*NIFTI, *DICOM))


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI)


def is_volume(path: Path) -> bool:
    """Whether it is read as one: a NIfTI file (of one slice too), or the folder of a series."""
    return is_nifti(path) or path.is_dir()


def count_slices(path: Path) -> int:
    """How many slices a volume has, by its header."""
    if path.is_dir():
        return len(series_files(path))
    nibabel, orientations = (import_extra(f"nibabel{each}", "medical") for each in ("", ".orientations"))
    try:
        image = nibabel.load(path)
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise Damaged(f"{path} is no NIfTI file that can be read ({error})") from error
    axis = int(np.flatnonzero(orientations.io_orientation(image.affine)[:, 0] == 2)[0])
    return int(image.shape[axis]) if axis < len(image.shape) else 1


def volumes_of(files: Iterable[Path]) -> list[Path]:
    """What of ``files`` is a volume: each, but of DICOM files the folder, which is a series."""
    return sorted({path.parent if path.name.lower().endswith(DICOM) else path for path in files})


def read_plane(path: Path) -> Raw:
    """One image.

    Raises:
        Damaged: it cannot be read, or is a volume.
    """
    raw = read_nifti(path) if is_nifti(path) else _raw(_header(path))
    if raw.values.ndim == 3 and raw.values.shape[2] == 3 and raw.values.dtype == np.uint8:
        return raw
    if raw.values.ndim == 3 and len(raw.values) == 1:
        return replace(raw, values=raw.values[0])
    if raw.values.ndim != 2:
        raise Damaged(f"it is a volume of {len(raw.values)} slices: --data.volumes true reads volumes")
    return raw


def read_volume(path: Path) -> Raw:
    """A NIfTI file, or a folder that holds one DICOM series.

    Raises:
        Damaged: it cannot be read, is one slice, or its slices are no volume.
    """
    if path.is_file() and not is_nifti(path):
        raise Damaged("it is no volume: NIfTI files, and folders of a DICOM series each, are")
    raw = read_nifti(path) if path.is_file() else read_series(path)
    if len(raw.values) < 2:
        raise Damaged("it is a volume of one slice, which is an image: leave --data.volumes out")
    return raw


def read_nifti(path: Path) -> Raw:
    """The volume in it, (1, h, w) for a single slice."""
    nibabel = import_extra("nibabel", "medical")
    try:
        image = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
        values = values if values.dtype == np.uint8 else values.astype(np.float32)
    except (OSError, EOFError, ValueError, TypeError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise Damaged(f"it is no NIfTI file that can be read ({error})") from error
    if values.ndim < 2 or values.size != math.prod(values.shape[:3]) or not values.size:
        raise Damaged(f"it holds an array {image.shape}, and one volume is wanted")
    turned, spacing, affine = _axial(values.reshape(*values.shape[:3], *[1] * (3 - values.ndim)), image.affine)
    return Raw(values=turned, spacing=spacing, affine=affine)


def write_labels(path: Path, labels: np.ndarray, like: Path, affine: np.ndarray | None) -> None:
    """Labels (d, h, w) uint8 of a volume as a NIfTI file, in the array and the affine of the file ``like``; of a
    series' folder in the ``affine`` that it was read with. Nothing else of its header goes along.
    """
    nibabel = import_extra("nibabel", "medical")
    if like.is_dir():
        nibabel.save(nibabel.Nifti1Image(labels.transpose(2, 1, 0), affine), path)
        return
    orientations, image = import_extra("nibabel.orientations", "medical"), nibabel.load(like)
    back = orientations.ornt_transform(orientations.axcodes2ornt(AXIAL), orientations.io_orientation(image.affine))
    turned = orientations.apply_orientation(labels.transpose(2, 1, 0), back).reshape(image.shape)
    made = nibabel.Nifti1Image(np.ascontiguousarray(turned), image.affine)
    made.header.set_xyzt_units(*image.header.get_xyzt_units())
    nibabel.save(made, path)


def read_series(folder: Path) -> Raw:
    """The DICOM files of a folder as one volume."""
    files = series_files(folder)
    headers = [_header(path) for path in files]
    if not files:
        raise Damaged("it holds no DICOM files")
    if len({str(header.get("SeriesInstanceUID", "")) for header in headers}) > 1:
        raise Damaged(f"its {len(files)} files are of several series: give each a folder")
    if any("ImagePositionPatient" not in h or "ImageOrientationPatient" not in h for h in headers):
        raise Damaged("files of it lack their position or orientation, so that they cannot be put in order")
    planes = [np.array(header.ImageOrientationPatient, dtype=float) for header in headers]
    pixels = [np.array(header.get("PixelSpacing", (1, 1)), dtype=float) for header in headers]
    if not all(np.allclose(plane, planes[0], atol=1e-3) for plane in planes):
        raise Damaged("its slices lie in different planes")
    if not all(np.allclose(each, pixels[0], rtol=1e-3) for each in pixels):
        raise Damaged("its slices have different pixel spacings")
    across, down = planes[0][:3], planes[0][3:]
    normal = np.cross(across, down)
    points = np.array([np.array(header.ImagePositionPatient, dtype=float) for header in headers])
    places = points @ normal
    order = np.argsort(places, kind="stable")
    step = _step(places[order])
    raws = [_raw(headers[i]) for i in order]
    slices = [raw.values for raw in raws]
    if len({(each.shape, raw.inverted) for each, raw in zip(slices, raws, strict=True)}) > 1 or slices[0].ndim != 2:
        raise Damaged("its slices are of different sizes, or in colour")
    affine = np.eye(4)  # of (column, row, slice), in DICOM's LPS, then turned to nibabel's RAS
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = across * pixels[0][1], down * pixels[0][0], normal * step
    affine[:3, 3] = points[order[0]]
    values, spacing, affine = _axial(np.stack(slices).transpose(2, 1, 0), np.diag([-1.0, -1, 1, 1]) @ affine)
    windows = {raw.window for raw in raws}
    return Raw(
        values=values,
        spacing=spacing,
        affine=affine,
        inverted=raws[0].inverted,
        window=windows.pop() if len(windows) == 1 else None,
    )


def series_files(folder: Path) -> list[Path]:
    """The DICOM files directly in a folder."""
    return sorted(p for p in folder.iterdir() if p.name.lower().endswith(DICOM) and not p.name.startswith("."))


def is_series(folder: Path) -> bool:
    """Whether the DICOM files of a folder are the slices of one volume, by their headers."""
    pydicom, files = import_extra("pydicom", "medical"), series_files(folder)
    try:
        headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files] if len(files) > 1 else []
    except (OSError, EOFError, ValueError, pydicom.errors.InvalidDicomError):
        return False
    placed = all("ImagePositionPatient" in header for header in headers)
    return placed and len({str(header.get("SeriesInstanceUID")) for header in headers}) == 1


def _step(places: np.ndarray) -> float:
    """The distance of slices at sorted ``places``, in millimetres."""
    if len(places) < 2:
        return 1.0
    gaps = np.diff(places)
    step = float(np.median(gaps))
    if (twice := int((gaps < TOLERANCE).sum())) or step < TOLERANCE:
        raise Damaged(f"{max(twice, 1)} of its slices lie where another does: remove what is there twice")
    uneven = np.abs(gaps / step - 1) > TOLERANCE * 5
    if uneven.any():
        whole = np.abs(gaps / step - np.rint(gaps / step)) < TOLERANCE * 5
        if whole.all():
            missing = int((np.rint(gaps / step) - 1).sum())
            raise Damaged(f"{missing} of its slices are missing: they lie {step:g} mm apart, and once {gaps.max():g}")
        raise Damaged(f"its slices lie between {gaps.min():g} and {gaps.max():g} mm apart: spacings are mixed")
    return step


def _header(path: Path) -> Any:
    pydicom = import_extra("pydicom", "medical")
    try:
        with path.open("rb") as file:
            if ENVELOPED in file.read(64):
                raise Damaged(f"{path.name} is encrypted: decrypt it first (openssl cms -decrypt)")
        return pydicom.dcmread(path)
    except (OSError, EOFError, ValueError, pydicom.errors.InvalidDicomError) as error:
        raise Damaged(f"{path.name} is no DICOM file that can be read ({error})") from error


def _raw(header: Any) -> Raw:
    """The numbers that a DICOM image means; colour as uint8 (h, w, 3)."""
    from pydicom.pixels import apply_modality_lut, convert_color_space

    if (frames := int(header.get("NumberOfFrames") or 1)) > 1:
        raise Damaged(f"it holds {frames} frames, and one is read: dcm2niix writes them as a NIfTI volume")
    syntax = getattr(header.file_meta, "TransferSyntaxUID", None)
    try:
        stored = header.pixel_array
    except (AttributeError, KeyError) as error:
        raise Damaged(f"it is a DICOM file without an image ({error})") from error
    except (RuntimeError, NotImplementedError, ImportError) as error:
        name = getattr(syntax, "name", "an unknown transfer syntax")
        if "JPEG" not in name:  # a video's, or a vendor's own
            raise Damaged(f"its pixels are in {name}, which nothing here reads: save it uncompressed") from error
        package = "pylibjpeg-openjpeg" if "2000" in name else "pylibjpeg-libjpeg"
        raise Damaged(f"its pixels are in {name}: pip install pylibjpeg {package} reads them") from error
    except (ValueError, TypeError) as error:
        raise Damaged(f"its pixels do not fit its header ({error})") from error
    how = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
    if not how.startswith("MONOCHROME"):
        return Raw(values=np.asarray(stored if how == "RGB" else convert_color_space(stored, how, "RGB"), np.uint8))
    values = np.asarray(apply_modality_lut(stored, header))
    values = values if values.dtype == np.uint8 else values.astype(np.float32)
    down, across = map(float, header.get("PixelSpacing") or (0, 0))
    spacing = (1.0, down, across) if min(down, across) > 0 else None
    return Raw(values=values, window=_window(header), inverted=how == "MONOCHROME1", spacing=spacing)


def _window(header: Any) -> str | None:
    """The first window of a header, as ``--data.window`` says it."""
    center, width = (header.get(name) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    middle, wide = (float(each if isinstance(each, (int, float)) else each[0]) for each in (center, width))
    return f"{middle - wide / 2},{middle + wide / 2}" if wide > 0 else None


def _axial(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float], np.ndarray]:
    """(x, y, z) with its affine → ((d, h, w), spacing, affine of w, h, d) as in the module's text."""
    orientations = import_extra("nibabel.orientations", "medical")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise Damaged("its header gives no orientation")
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(AXIAL))
    turned = orientations.apply_orientation(values, turn)
    spacing = np.empty(3)
    spacing[turn[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    x, y, z = map(float, spacing)
    after = affine @ orientations.inv_ornt_aff(turn, values.shape)
    return np.ascontiguousarray(turned.transpose(2, 1, 0)), (z, y, x), after
