"""One document a sequence, cut or padded to the context: the convention of GaLore's C4 runs, beside packed windows.

As published (GaLore's ``torchrun_main.py``, T5's tokenizer): a sequence is a document's first tokens, at most
``context``, the last one the end-of-document id also where the document was cut; the rest is padding. Position t
predicts position t + 1, so that a full sequence scores context − 1 tokens, and padding is not scored.

``Documents`` reads prepared tokens in a seeded order. ``Streamed`` tokenises as it goes, for corpora too large to
prepare (C4); its documents pass through a shuffle buffer as in `datasets`. It is as much a function of (seed, n) as the
others, but to come to batch n it must read all that lies before: resuming skips, without tokenising what is one
document a sequence, and costs the download again.

Shapes: input_ids, labels (batch, context) int64; labels are already shifted; −100 is not scored.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank.data.text.source import Source
from lowrank.data.text.tokenizers import Tokenizer
from lowrank.data.text.tokens import Tokens
from lowrank.data.text.windows import IGNORED, Share, check_context, permuted, shifted, spread

SHUFFLE_DOCUMENTS = 10_000


class Documents:
    """Batches of a split's documents, each epoch in another seeded order; ``batch_size`` counts the rows of all ranks.

    Raises:
        ValueError: no documents, document ends that are not known, or sizes that are not positive.
    """

    def __init__(
        self, tokens: Tokens, split: str, context: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ):
        self.share, self.seed = Share(batch_size=batch_size, rank=rank, ranks=ranks), seed
        self._documents = _Documents(tokens, split, context)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every document appears about once; epochs follow without a gap, also inside a batch."""
        return max(1, len(self._documents) // self.share.batch_size)

    def batch(self, n: int) -> dict[str, Tensor]:
        """Batch n ≥ 0: {"input_ids", "labels"}, this rank's rows."""
        size = len(self._documents)
        rows = np.arange(self.share.batch_size, dtype=np.uint64)[self.share.rows()]
        epochs, places = np.divmod(rows + np.uint64(n * self.share.batch_size), np.uint64(size))
        chosen = np.empty(len(rows), np.int64)
        for epoch in np.unique(epochs):
            chosen[epochs == epoch] = permuted(places[epochs == epoch], size, key=(self.seed, int(epoch)))
        return self._documents.rows(chosen)


class EvaluationDocuments:
    """Batches of each document once, in order, or of a fixed part: ``len``, iteration, ``batch(n)``.

    Raises:
        ValueError: as ``Documents``, or a limit below one batch.
    """

    def __init__(
        self,
        tokens: Tokens,
        split: str,
        context: int,
        batch_size: int,
        limit: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.share = Share(batch_size=batch_size, rank=rank, ranks=ranks)
        self._documents = _Documents(tokens, split, context)
        self._chosen = spread(len(self._documents), batch_size, limit)

    def __len__(self) -> int:
        return -(-len(self._chosen) // self.share.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.batch(n) for n in range(len(self)))

    def batch(self, n: int) -> dict[str, Tensor]:
        """Batch n: {"input_ids", "labels"}, this rank's rows (the last batch may have fewer, and a rank none)."""
        if not 0 <= n < len(self):
            raise IndexError(f"batch {n} of {len(self)}")
        chosen = self._chosen[n * self.share.batch_size : (n + 1) * self.share.batch_size]
        return self._documents.rows(chosen[self.share.rows(len(chosen))])


class _Documents:
    """The documents of a split by number, as padded rows."""

    def __init__(self, tokens: Tokens, split: str, context: int):
        check_document_context(context)
        self.tokens, self.split, self.context = tokens, split, context
        self.ends = tokens.document_ends(split)
        if not len(self.ends):
            raise ValueError(f"{split} of {tokens.folder} holds no documents")

    def __len__(self) -> int:
        return len(self.ends)

    def rows(self, numbers: np.ndarray) -> dict[str, Tensor]:
        return padded([self.document(int(n)) for n in numbers], self.context, self.tokens.end_of_document)

    def document(self, number: int) -> np.ndarray:
        start = int(self.ends[number - 1]) if number else 0
        # One token more than fits, so that a document that is cut can be told from one that ends there.
        return self.tokens.ids(self.split)[start : min(int(self.ends[number]), start + self.context + 1)]


class Streamed:
    """Batches from a source that is read and tokenised as it goes, endlessly; ``batch_size`` counts all ranks' rows.

    Args:
        packed: False: one document a sequence. True: documents one after the other, each ended, cut into windows.
        vocab_size: the model's; an id beyond it is an error when it comes.
        shuffle_documents: documents held to draw the next one from (1: the source's own order).

    Raises:
        ValueError: no text, a tokenizer without an end of document where documents are packed, sizes not positive.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        split: str,
        context: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        packed: bool = False,
        vocab_size: int | None = None,
        shuffle_documents: int = SHUFFLE_DOCUMENTS,
    ):
        (check_context if packed else check_document_context)(context)
        if shuffle_documents < 1:
            raise ValueError(f"shuffle_documents must be at least 1 (1: no shuffling), not {shuffle_documents}")
        if packed and tokenizer.end_of_document is None:
            raise ValueError(
                f"tokenizer {tokenizer.spec!r} has no id that ends a document: packed=True would join them"
            )
        self.source, self.tokenizer, self.split, self.context, self.seed = source, tokenizer, split, context, seed
        self.packed, self.vocab_size, self.shuffle_documents = packed, vocab_size, shuffle_documents
        self.share = Share(batch_size=batch_size, rank=rank, ranks=ranks)
        self._next = 0
        self._rows: Iterator[Any] = iter(())

    @property
    def batches_per_epoch(self) -> int:
        """A stream does not know its length.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.source.name} is streamed, so that its length is not known: say steps instead of epochs"
        )

    def batch(self, n: int) -> dict[str, Tensor]:
        """Batch n ≥ 0: {"input_ids", "labels"}, this rank's rows; quick for the next n, others are read up to."""
        if n < self._next or not self._next:
            self._next, self._rows = 0, self._sequences()
        for _ in islice(self._rows, (n - self._next) * self.share.batch_size):
            pass
        rows = list(islice(self._rows, self.share.batch_size))[self.share.rows()]
        self._next = n + 1
        if self.packed:
            windows = torch.from_numpy(np.stack([self._checked(row) for row in rows]).astype(np.int64))
            inputs, labels = shifted(windows)
            return {"input_ids": inputs, "labels": labels}
        return padded([self._checked(row) for row in self._encoded(rows)], self.context, self.tokenizer.end_of_document)

    def _sequences(self) -> Iterator[Any]:
        """Endless rows of the global batches: texts, or windows of context + 1 tokens if packed."""
        texts = self._texts()
        if not self.packed:
            yield from texts
            return
        rest = np.empty(0, np.int64)
        while True:
            for ids in self._encoded(list(islice(texts, 64))):
                rest = np.concatenate([rest, ids.astype(np.int64)])
            while len(rest) > self.context:
                yield rest[: self.context + 1]
                rest = rest[self.context :]

    def _texts(self) -> Iterator[str]:
        """Documents without end: epoch after epoch, each drawn from a buffer that the next document refills."""
        epoch = 0
        while True:
            generator = np.random.default_rng([self.seed, epoch])
            buffer: list[str] = []
            for document in self.source.documents(self.split):
                if len(buffer) < self.shuffle_documents:
                    buffer.append(document)
                    continue
                place = int(generator.integers(len(buffer)))
                yield buffer[place]
                buffer[place] = document
            if not epoch and not buffer:
                raise ValueError(f"{self.split} of {self.source.description} holds no text")
            order = generator.permutation(len(buffer)) if self.shuffle_documents > 1 else range(len(buffer))
            yield from (buffer[place] for place in order)
            epoch += 1

    def _encoded(self, texts: list[str]) -> list[np.ndarray]:
        end = [] if self.tokenizer.end_of_document is None else [self.tokenizer.end_of_document]
        return [np.append(ids, np.array(end, ids.dtype)) for ids in self.tokenizer.encode_batch(texts)]

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        if self.vocab_size is not None and len(ids) and int(ids.max()) >= self.vocab_size:
            raise ValueError(
                f"{self.source.name} with tokenizer {self.tokenizer.spec!r} has token id {int(ids.max())}, but the "
                f"model's vocabulary ends at {self.vocab_size - 1}; give the model "
                f"vocab_size={self.tokenizer.vocab_size}"
            )
        return ids


def padded(documents: list[np.ndarray], context: int, end: int | None) -> dict[str, Tensor]:
    """Documents as rows of at most ``context`` tokens; a longer one is cut, and ends in ``end`` (if there is one)."""
    inputs = torch.zeros(len(documents), context, dtype=torch.int64)
    labels = torch.full((len(documents), context), IGNORED, dtype=torch.int64)
    for row, document in enumerate(documents):
        ids = torch.from_numpy(document[:context].astype(np.int64))
        if len(document) > context and end is not None:
            ids[-1] = end
        inputs[row, : len(ids)] = ids
        labels[row, : len(ids) - 1] = ids[1:]
    return {"input_ids": inputs, "labels": labels}


def check_document_context(context: int) -> None:
    """Raise ValueError unless a sequence has a token and one that follows it."""
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens for one document a sequence, not {context}")
