"""Augmentations on request: flips, random crops, RandAugment.

    hflip, vflip     mirror each image with probability 1/2
    crop             a window of 50–100 % of the area with sides 3:4 to 4:3, resized back (Inception's crop, milder)
    randaugment      two operations of magnitude 9 of 30, drawn for each image (Cubuk et al., arXiv 1909.13719); no
                     colour operation, since stain and grey level carry the diagnosis

Every draw comes from the batch's own generator, so that a batch is a pure function of (seed, n).

Shapes: x (batch, channels, h, w) uint8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.infra.checks import check_choice

AUGMENTATIONS = ("hflip", "vflip", "crop", "randaugment")
MAGNITUDE = 9 / 30
OPERATIONS_PER_IMAGE = 2


def check_augment(names: Sequence[str]) -> tuple[str, ...]:
    """The names, known ones only.

    Raises:
        ValueError: an unknown one.
    """
    for name in names:
        check_choice("data.augment", name, AUGMENTATIONS)
    return tuple(names)


def augment(x: Tensor, names: Sequence[str], noise: torch.Generator) -> Tensor:
    """``x`` with the augmentations applied, in the order of the module's list."""
    if "hflip" in names:
        x = _where(x, x.flip(-1), noise)
    if "vflip" in names:
        x = _where(x, x.flip(-2), noise)
    if "crop" in names:
        x = torch.stack([_cropped(image, noise) for image in x])
    if "randaugment" in names:
        x = torch.stack([_rand_augmented(image, noise) for image in x])
    return x


def _uniform(noise: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=noise))


def _where(x: Tensor, other: Tensor, noise: torch.Generator) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=noise) < 0.5, other, x)


def _cropped(image: Tensor, noise: torch.Generator) -> Tensor:
    height, width = image.shape[-2:]
    area, ratio = _uniform(noise, 0.5, 1.0), math.exp(_uniform(noise, math.log(3 / 4), math.log(4 / 3)))
    h = max(1, min(height, round(height * math.sqrt(area / ratio))))
    w = max(1, min(width, round(width * math.sqrt(area * ratio))))
    top = int(_uniform(noise, 0, height - h + 1 - 1e-6))
    left = int(_uniform(noise, 0, width - w + 1 - 1e-6))
    window = image[None, :, top : top + h, left : left + w]
    return F.interpolate(window, size=(height, width), mode="bilinear", antialias=True)[0]


def _rand_augmented(image: Tensor, noise: torch.Generator) -> Tensor:
    operations = _operations(image.shape[-1])
    for _ in range(OPERATIONS_PER_IMAGE):
        chosen = int(torch.randint(len(operations), (), generator=noise))
        sign = 1.0 if float(torch.rand((), generator=noise)) < 0.5 else -1.0
        image = operations[chosen](image, sign)
    return image


def _operations(width: int) -> list[Callable[[Tensor, float], Tensor]]:
    """RandAugment's operations at its fixed magnitude; the second argument is a random sign."""
    from torchvision.transforms.v2 import functional as V

    def moved(
        angle: float = 0.0, x: int = 0, y: int = 0, shear: tuple[float, float] = (0.0, 0.0)
    ) -> Callable[[Tensor, float], Tensor]:
        def operation(image: Tensor, sign: float) -> Tensor:
            bent = [sign * part for part in shear]
            return V.affine(image, angle=sign * angle, translate=[int(sign * x), int(sign * y)], scale=1.0, shear=bent)

        return operation

    shear, shift, factor = (
        math.degrees(math.atan(0.3 * MAGNITUDE)),
        round(150 / 331 * width * MAGNITUDE),
        0.9 * MAGNITUDE,
    )
    return [
        lambda image, sign: image,
        moved(shear=(shear, 0.0)),
        moved(shear=(0.0, shear)),
        moved(x=shift),
        moved(y=shift),
        moved(angle=30 * MAGNITUDE),
        lambda image, sign: V.adjust_brightness(image, 1 + sign * factor),
        lambda image, sign: V.adjust_contrast(image, 1 + sign * factor),
        lambda image, sign: V.adjust_sharpness(image, 1 + sign * factor),
        lambda image, sign: V.posterize(image, 8 - round(4 * MAGNITUDE)),
        lambda image, sign: V.solarize(image, 255 * (1 - MAGNITUDE)),
        lambda image, sign: V.autocontrast(image),
        lambda image, sign: V.equalize(image),
    ]
