"""One image file to eight bits: grey of 16 bits is windowed, never clipped to white; a damaged file is an error.

    y = 255 · clip((x − low) / (high − low), 0, 1)

``window`` gives low and high: ``auto`` takes the 0.5th and 99.5th percentile of each image, ``full`` the range of the
file's type, and ``"100,4000"`` these two. Eight-bit images are left as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

Fit = Literal["pad", "crop", "stretch"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
WIDE = ("I;16", "I;16B", "I;16L", "I", "F")  # PIL's modes of more than eight bits
GREY = ("1", "L", "LA", *WIDE)


class Damaged(ValueError):
    """A file that is no image, or a broken one."""


def check_window(window: str) -> tuple[float, float] | None:
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
    if not low < high:
        raise ValueError(f"data.window={window!r}: the first number must be below the second")
    return low, high


def check_fit(fit: str) -> None:
    if fit not in get_args(Fit):
        raise ValueError(f"data.fit={fit!r} is unknown; it is one of {', '.join(get_args(Fit))}")


def is_grey(path: Path) -> bool:
    """Whether a file is grey, by its header.

    Raises:
        Damaged: it has no readable header.
    """
    with _opened(path) as image:
        return image.mode in GREY


def read_image(path: Path, size: int, *, grey: bool, window: str = "auto", fit: Fit = "pad") -> np.ndarray:
    """A file as (size, size) or (size, size, 3) uint8.

    Args:
        path: the file.
        size: pixels of each side.
        grey: one channel, or three.
        window: for more than eight bits, see above.
        fit: an image that is not square is padded with black, cropped in its middle, or stretched.

    Raises:
        Damaged: it cannot be decoded.
    """
    from PIL import Image, ImageOps

    with _opened(path) as image:
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode in WIDE:
                image = Image.fromarray(windowed(np.asarray(image), window))
            image = image.convert("L" if grey else "RGB")
            return np.asarray(_fitted(image, size, fit))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise Damaged(str(error)) from error


def windowed(x: np.ndarray, window: str) -> np.ndarray:
    """Numbers of any width as uint8."""
    given, values = check_window(window), x.astype(np.float64)
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


def _fitted(image: Any, size: int, fit: Fit) -> Any:
    from PIL import Image, ImageOps

    if fit == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if fit == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC)
