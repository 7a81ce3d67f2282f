"""Batches of images, as the model wants them; training batches are a pure function of (seed, n).

    uint8 (batch, h, w[, 3]) → augmented → resized → three channels → (x/255 − mean)/std
        → float32 (batch, 3, size, size)

Volumes (batch, d, h, w) become (batch, 3, depth, size, size); what augments them does the same to every slice.

Training passes over the set in a new order each epoch, without a short last batch: the order of the next epoch follows
on. With ``balance="sampler"`` every class is drawn equally often instead, with replacement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.data.images.augment import augment
from lowrank.data.images.set import ImageSpec, Split
from lowrank.infra.seeds import generator

Batch = dict[str, Tensor]
BALANCES = ("none", "weights", "sampler")


def to_model(
    images: np.ndarray, spec: ImageSpec, names: tuple[str, ...] = (), noise: torch.Generator | None = None
) -> Tensor:
    """uint8 (batch, h, w) or (batch, h, w, 3) → float32 (batch, 3, size, size); volumes as in the module's text."""
    x = torch.from_numpy(np.array(images))  # a copy: memory-mapped arrays cannot be written to, and tensors can
    if spec.depth is None:
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    if names and noise is not None:
        x = augment(x, names, noise)
    y = x.float()
    if y.shape[-2:] != (spec.size, spec.size):
        y = F.interpolate(y, size=(spec.size, spec.size), mode=spec.interpolation, antialias=True).clamp_(0, 255)
    if spec.depth is not None:
        if y.shape[1] != spec.depth:  # along the slices, as another axis of a plane
            y = F.interpolate(y.transpose(1, 2), (spec.depth, spec.size), mode=spec.interpolation, antialias=True)
            y = y.transpose(1, 2).clamp_(0, 255)
        y = y[:, None]
    shape = (1, 3, *[1] * (y.dim() - 2))
    mean, std = (torch.tensor(values).view(shape) for values in (spec.mean, spec.std))
    return torch.addcmul(-mean / std, y, 1 / (255 * std))  # grey becomes three channels in the same pass


@dataclass(frozen=True, kw_only=True)
class ImageBatches:
    """Training batches of a split. ``weights`` (n, …): how much each label counts, mean 1; None: all the same."""

    split: Split
    spec: ImageSpec
    batch_size: int
    seed: int
    augment: tuple[str, ...] = ()
    sampler: bool = False
    weights: np.ndarray | None = None
    rank: int = 0
    ranks: int = 1
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def batch(self, n: int) -> Batch:
        """Batch n ≥ 0, this rank's rows: ``images`` (batch, 3, size, size) float32, ``labels``, perhaps ``weights``.

        Labels are (batch,) int64, or (batch, classes) float32 for several labels; weights have the labels' shape.
        """
        rows = (self._sampled(n) if self.sampler else self._in_order(n))[self._own]
        noise = generator("cpu", self.seed, "augment", n, *((self.rank,) if self.ranks > 1 else ()))
        batch = {
            "images": to_model(self.split.images[rows], self.spec, self.augment, noise),
            "labels": label_tensor(self.split, rows),
        }
        if self.weights is not None:
            batch["weights"] = torch.from_numpy(self.weights[rows])
        return batch

    @property
    def _own(self) -> slice:
        """This rank's rows of a batch, which counts those of all ranks: consecutive, disjoint, as even as it goes."""
        return slice(self.rank * self.batch_size // self.ranks, (self.rank + 1) * self.batch_size // self.ranks)

    def _in_order(self, n: int) -> np.ndarray:
        at = np.arange(n * self.batch_size, (n + 1) * self.batch_size)
        epochs, places = at // len(self.split), at % len(self.split)
        return np.array([self._order(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            for old in [other for other in self._orders if other < epoch - 1]:
                del self._orders[old]
            noise = generator("cpu", self.seed, "order", epoch)
            self._orders[epoch] = torch.randperm(len(self.split), generator=noise).numpy()
        return self._orders[epoch]

    @cached_property
    def _chances(self) -> Tensor:
        """The weight with which each image is drawn, (n,): every class alike; of several labels the rarest counts."""
        return torch.from_numpy(1.0 / class_counts(self.split)[_rarest(self.split)])

    def _sampled(self, n: int) -> np.ndarray:
        noise = generator("cpu", self.seed, "sample", n)
        return torch.multinomial(self._chances, self.batch_size, replacement=True, generator=noise).numpy()


@dataclass(frozen=True, kw_only=True)
class EvaluationBatches:
    """Images of a split, each once and in order, in batches that can be asked for one by one."""

    split: Split
    spec: ImageSpec
    batch_size: int
    rows: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, range(len(self)))

    def batch(self, n: int) -> Batch:
        """Batch n, as :meth:`ImageBatches.batch` gives it."""
        rows = self.rows[n * self.batch_size : (n + 1) * self.batch_size]
        return {"images": to_model(self.split.images[rows], self.spec), "labels": label_tensor(self.split, rows)}


def evaluation_batches(split: Split, spec: ImageSpec, batch_size: int, limit: int | None) -> EvaluationBatches:
    """Every image of the split once; or ``limit`` batches of :func:`sample`."""
    rows = np.arange(len(split)) if limit is None else sample(split, limit * batch_size)
    return EvaluationBatches(split=split, spec=spec, batch_size=batch_size, rows=rows)


def sample(split: Split, count: int) -> np.ndarray:
    """The same ``count`` rows of a split every time, in order: each class in proportion, and once where there is room.

    Of several labels an image counts for its rarest.
    """
    own, order = _rarest(split), torch.randperm(len(split), generator=generator("cpu", 0, "sample")).numpy()
    place = np.empty(len(split))
    for number in np.unique(own):
        rows = order[own[order] == number]
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        place[rows[0]] = -1.0
    return np.sort(np.argsort(place, kind="stable")[:count])


def label_tensor(split: Split, rows: np.ndarray) -> Tensor:
    labels = torch.from_numpy(np.asarray(split.labels[rows]))
    return labels.float() if labels.dim() == 2 else labels.long()


def class_counts(split: Split) -> np.ndarray:
    """Images of each class, (classes,), at least 1, so that it can divide.

    For several labels there is one more entry at the end, which counts images with none.
    """
    if split.labels.ndim == 1:
        return np.maximum(np.bincount(split.labels), 1).astype(np.float64)
    none = (np.asarray(split.labels).sum(axis=1) == 0).sum()
    return np.maximum(np.append(np.asarray(split.labels).sum(axis=0), none), 1).astype(np.float64)


def label_weights(split: Split) -> np.ndarray:
    """The weight of each label's loss: inverse to its class's frequency, with mean 1 over the split, float32.

    One label: (n,). Several: (n, classes); positive and negative labels of each class have the same total weight.
    """
    labels = np.asarray(split.labels)
    if labels.ndim == 1:
        counts = np.bincount(labels).astype(np.float64)
        return np.asarray(len(labels) / ((counts > 0).sum() * counts[labels]), dtype=np.float32)
    share = labels.mean(axis=0, dtype=np.float64)
    positive, negative = 0.5 / np.maximum(share, 1e-12), 0.5 / np.maximum(1 - share, 1e-12)
    return np.where((share == 0) | (share == 1), 1.0, np.where(labels > 0, positive, negative)).astype(np.float32)


def _rarest(split: Split) -> np.ndarray:
    """For each image the class by which it is drawn."""
    labels = np.asarray(split.labels)
    if labels.ndim == 1:
        return labels
    counts = class_counts(split)
    own = np.where(labels > 0, counts[:-1], np.inf)
    return np.where(labels.any(axis=1), own.argmin(axis=1), len(counts) - 1)
