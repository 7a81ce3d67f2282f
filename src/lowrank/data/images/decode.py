"""One image file to eight bits: grey of 16 bits is windowed, never clipped to white; a damaged file is an error.

    y = 255 · clip((x − low) / (high − low), 0, 1)

``window`` gives low and high: ``auto`` takes the 0.5th and 99.5th percentile of each image, ``full`` the range of the
file's type, and ``"100,4000"`` these two. Eight-bit images are left as they are.

Threads that decode together share a budget of pixels, so that eight huge images are decoded one after the other, and
Pillow's memory goes back to the system in between.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowrank.data.images.medical import (
    DICOM,
    NIFTI,
    Damaged,
    Raw,
    is_medical,
    is_nifti,
    is_volume,
    read_nifti,
    read_plane,
    read_series,
    read_volume,
)
from lowrank.infra.checks import check_choice

Fit = Literal["pad", "crop", "stretch"]
MaskFit = Literal["pad", "crop", "stretch", "windows"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", *DICOM, *NIFTI)
WIDE = ("I;16", "I;16B", "I;16L", "I", "F")  # PIL's modes of more than eight bits
GREY = ("1", "L", "LA", *WIDE)
LARGEST = 1 << 14  # pixels of a side as stored
BLOCK_BYTES = 1 << 26  # in which Pillow allocates
PIXELS_IN_FLIGHT = 1 << 25  # of all threads together; an image that is larger than this is decoded alone


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How image files become arrays.

    ``size``: pixels of each side. ``grey``: one channel, or three. ``window``: for more than eight bits, see above.
    ``fit``: an image that is not square is padded with black, cropped in its middle, or stretched; with a mask it may
    also be cut into windows of ``size`` of its own pixels. ``depth``: of volumes, the slices; None: they are images.
    """

    size: int = 224
    grey: bool = False
    window: str = "auto"
    fit: MaskFit = "pad"
    depth: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.size <= LARGEST:
            raise ValueError(f"data.size={self.size} must be at least 1, and at most {LARGEST}")
        check_choice("data.fit", self.fit, MaskFit)
        window_limits(self.window)


def window_limits(window: str) -> tuple[float, float] | None:
    """(low, high) of an explicit window, or None for ``auto`` and ``full``.

    Raises:
        ValueError: it is none of these.
    """
    if window in ("auto", "full"):
        return None
    try:
        low, high = map(float, window.split(","))
    except ValueError:
        raise ValueError(f"data.window={window!r} is neither auto, full, nor two numbers low,high") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"data.window={window!r}: the first number must be below the second, and both finite")
    return low, high


def image_files(folder: Path, *, deep: bool = True) -> list[Path]:
    """The image files in a folder, in order; hidden ones, ``__MACOSX`` and what is no regular file are left out."""
    found = folder.rglob("*") if deep else folder.glob("*")
    return sorted(
        path
        for path in found
        if path.name.lower().endswith(SUFFIXES)
        and not any(is_stray(part) for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def is_stray(name: str) -> bool:
    """Whether a file or folder is what systems leave behind: hidden, or a Mac's copy of a file's attributes."""
    return name.startswith(".") or name == "__MACOSX"


def is_grey(path: Path) -> bool:
    """Whether a file is grey, by its header.

    Raises:
        Damaged: it has no readable header.
    """
    if is_medical(path):
        return read_plane(path).values.ndim == 2
    with _opened(path) as image:
        return image.mode in GREY


def read_image(path: Path, reading: Reading) -> np.ndarray:
    """A file as (size, size) or (size, size, 3) uint8; of volumes, a file or a series' folder as (depth, size, size).

    Raises:
        Damaged: it cannot be decoded.
    """
    if reading.depth is not None:
        with _budget.held(PIXELS_IN_FLIGHT):
            return _boxed(read_volume(path), reading, reading.depth)
    if is_medical(path):
        with _budget.held(PIXELS_IN_FLIGHT // 8):
            return fitted(_eight_bits(read_plane(path), reading.window), reading)
    with _opened(path) as header:
        pixels = header.width * header.height
    with _budget.held(pixels):
        return _decoded(path, reading)


@dataclass(frozen=True, kw_only=True)
class Planes:
    """What a file shows, upright and of its own size: ``values`` (planes, h, w), or (planes, h, w, 3) where it has
    colours, uint8. ``spacing``: millimetres between its pixels (down, across), ``affine``: of a volume's voxels
    (column, row, plane); None: not known."""

    values: np.ndarray
    spacing: tuple[float, float] | None = None
    affine: np.ndarray | None = None


def read_planes(path: Path, reading: Reading) -> Planes:
    """An image as one plane; a volume, a file or a series' folder, as its slices from the feet up, windowed as a whole.

    Raises:
        Damaged: it cannot be decoded.
    """
    if not is_medical(path) and path.is_file():
        return Planes(values=_decoded(path, reading, fitted=False)[None])
    raw = read_nifti(path) if is_nifti(path) else read_series(path) if path.is_dir() else read_plane(path)
    values, spacing = _eight_bits(raw, reading.window), None if raw.spacing is None else raw.spacing[1:]
    return Planes(values=values if is_volume(path) else values[None], spacing=spacing, affine=raw.affine)


def fitted(plane: np.ndarray, reading: Reading, *, mask: bool = False) -> np.ndarray:
    """A plane as :func:`read_image` gives it; a mask by nearest neighbour."""
    from PIL import Image

    if mask:
        return np.asarray(_fitted(Image.fromarray(plane), reading.size, reading.fit, Image.Resampling.NEAREST))
    return np.asarray(_fitted(Image.fromarray(coloured(plane, reading)), reading.size, reading.fit))


def coloured(plane: np.ndarray, reading: Reading) -> np.ndarray:
    """A plane of the channels that are wanted."""
    from PIL import Image

    return np.asarray(Image.fromarray(plane).convert("L" if reading.grey else "RGB"))


def window_corners(h: int, w: int, size: int) -> list[tuple[int, int]]:
    """Upper left corners of the windows that cover h × w, evenly apart, the last at the border; one of a smaller side
    begins before it, so that it lies in the middle.

    >>> window_corners(5, 20, 8)
    [(-1, 0), (-1, 6), (-1, 12)]
    """
    tops, lefts = (
        [-((size - n) // 2)] if n <= size else np.linspace(0, n - size, -(-n // size)).round().astype(int).tolist()
        for n in (h, w)
    )
    return [(top, left) for top in tops for left in lefts]


def window(plane: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    """The (size, size) or (size, size, 3) of a plane at a corner, 0 where there is no plane."""
    around = [(max(0, -at), max(0, at + size - n)) for at, n in zip(corner, plane.shape[:2], strict=True)]
    rows, columns = (slice(max(0, at), at + size) for at in corner)
    return np.pad(plane[rows, columns], [*around, *[(0, 0)] * (plane.ndim - 2)])


def fitted_part(h: int, w: int, reading: Reading) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """(the rows and columns of a plane of h × w that :func:`fitted` shows, those of its square that show them)."""
    size, whole = reading.size, (slice(0, h), slice(0, w))
    if reading.fit == "stretch" or h == w:
        return whole, (slice(0, size), slice(0, size))
    if reading.fit == "crop":
        side = min(h, w)
        top, left = (h - side) // 2, (w - side) // 2
        return (slice(top, top + side), slice(left, left + side)), (slice(0, size), slice(0, size))
    high, wide = (round(h / w * size), size) if w > h else (size, round(w / h * size))  # as Pillow's contain and pad
    top, left = round((size - high) * 0.5), round((size - wide) * 0.5)
    return whole, (slice(top, top + high), slice(left, left + wide))


def _decoded(path: Path, reading: Reading, *, fitted: bool = True) -> np.ndarray:
    from PIL import Image, ImageOps

    # By default blocks are of 16 MB, which glibc comes to keep for each thread: eight images of 13000 x 13000 pixels
    # took 4.7 GB, one after the other. Blocks beyond 32 MB are always given back: 0.8 GB.
    if hasattr(Image.core, "set_block_size"):
        Image.core.set_block_size(BLOCK_BYTES)
    with _opened(path) as image:
        try:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode in WIDE:
                image = Image.fromarray(windowed(np.asarray(image), reading.window))
            mode = "L" if reading.grey else "RGB"
            image = image if image.mode == mode else image.convert(mode)
            return np.asarray(_fitted(image, reading.size, reading.fit) if fitted else image)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise Damaged(str(error)) from error


def _eight_bits(raw: Raw, window: str) -> np.ndarray:
    """As uint8, by the window asked for, or the header's own; eight bits without one stay as they are."""
    chosen = raw.window or window if window == "auto" else window
    plain = raw.values.dtype == np.uint8 and chosen in ("auto", "full")
    values = raw.values if plain or raw.values.shape[-1:] == (3,) else windowed(raw.values, chosen)
    return 255 - values if raw.inverted else values


def _boxed(raw: Raw, reading: Reading, depth: int) -> np.ndarray:
    """A volume in (depth, size, size), its voxels cubes but where ``fit`` stretches them."""
    import torch
    import torch.nn.functional as F

    box = np.array([depth, reading.size, reading.size])
    extent = np.array(raw.values.shape) * (raw.spacing or (1.0, 1.0, 1.0))
    scales = box / extent
    scale = {"stretch": scales, "pad": scales.min(), "crop": scales.max()}[reading.fit]
    d, h, w = (int(n) for n in np.maximum(np.rint(extent * scale), 1))
    x = torch.from_numpy(np.array(_eight_bits(raw, reading.window))).float()[None]
    x = F.interpolate(x, (h, w), mode="bilinear", antialias=True).transpose(1, 2)
    x = F.interpolate(x, (d, w), mode="bilinear", antialias=True).transpose(1, 2)[0].clamp(0, 255)
    found, made = np.rint(x.numpy()).astype(np.uint8), np.zeros(box, dtype=np.uint8)
    made[_middles(made.shape, found.shape)] = found[_middles(found.shape, made.shape)]
    return made


def _middles(outer: Sequence[int], inner: Sequence[int]) -> tuple[slice, ...]:
    """Where ``inner`` lies in the middle of ``outer``, side by side; all of a side that is the shorter."""
    starts = [max(0, (n - m) // 2) for n, m in zip(outer, inner, strict=True)]
    return tuple(slice(at, at + min(n, m)) for at, n, m in zip(starts, outer, inner, strict=True))


def windowed(x: np.ndarray, window: str) -> np.ndarray:
    """Numbers of any width as uint8."""
    given, values = window_limits(window), x.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise Damaged("it holds no finite number")
    if given is not None:
        low, high = given
    elif window == "full":
        low, high = (0.0, 65535.0) if finite.min() >= 0 and finite.max() <= 65535 else (finite.min(), finite.max())
    else:
        low, high = np.percentile(finite, (0.5, 99.5))
        if low == high:  # nearly all pixels are equal
            low, high = finite.min(), finite.max()
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return np.asarray(np.rint(scaled.clip(0, 1) * 255), dtype=np.uint8)


def _opened(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise Damaged("it is no image that can be read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Damaged(str(error)) from error


def _fitted(image: Any, size: int, fit: MaskFit, way: Any = None) -> Any:
    from PIL import Image, ImageOps

    way = Image.Resampling.BICUBIC if way is None else way
    if fit == "stretch":
        return image.resize((size, size), way)
    return (ImageOps.fit if fit == "crop" else ImageOps.pad)(image, (size, size), way)


class PixelBudget:
    """At most ``limit`` pixels are held by all threads together; whoever needs more than that waits to be alone."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def held(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self.used == 0 or self.used + pixels <= self.limit)
            self.used += pixels
        try:
            yield
        finally:
            with self._changed:
                self.used -= pixels
                self._changed.notify_all()


_budget = PixelBudget(PIXELS_IN_FLIGHT)
