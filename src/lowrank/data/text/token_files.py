"""Tokenised text in memory-mapped files: nanoGPT's format plus a description.

A folder holds ``train.bin``, ``val.bin``, ``test.bin`` (token ids one after the other, little-endian uint16, or uint32
where the vocabulary needs it: nanoGPT reads them as they are), ``<split>.ends.bin`` (uint64: the index after each
document's last token), the tokenizer, and ``meta.json``: tokenizer, dtype, split rule, the source's fingerprint, and
for each split the counts of tokens, documents and UTF-8 bytes and the largest id. A folder made by nanoGPT itself, with
nothing but the ``.bin`` files, is read too.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.data.split_names import SPLITS
from lowrank.data.text.tokenizers import Characters, Tokenizer, load_tokenizer, pretrained_tokenizer, saved_tokenizer

FORMAT, VERSION = "lowrank-tokens", 1
META = "meta.json"
HASH_WHOLE_BYTES, STRETCHES = 1 << 26, 1024
CHUNK = 1 << 24  # tokens looked at in one go when a whole split is scanned


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A prepared corpus. ``meta`` is the content of ``meta.json``; ids stay on disk until they are indexed.

    ``tokenizer_spec`` says which tokenizer made the tokens where ``meta`` cannot (a folder from nanoGPT).
    """

    folder: Path
    meta: Mapping[str, Any]
    tokenizer_spec: str | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, folder: str | Path, *, tokenizer: str | None = None) -> "Tokens":
        """Open a prepared folder, checking its files against ``meta.json``.

        Args:
            folder: written by ``prepare``, or by nanoGPT's ``prepare.py``.
            tokenizer: for nanoGPT's folders, what made the tokens (a name or folder; without it GPT-2's for plain
                folders, and the characters of ``input.txt`` for ``shakespeare_char``, whose ``meta.pkl`` is never
                opened: a pickle can run any code).

        Raises:
            FileNotFoundError: no tokens there.
            ValueError: damaged, of a later version, or made by another tokenizer than told.
        """
        folder = Path(folder).expanduser()
        if (folder / META).is_file():
            tokens = cls(folder=folder, meta=_checked_meta(folder))
            made_by = tokens.meta["tokenizer"]["spec"]
            saved = None if tokenizer in (None, made_by) else saved_tokenizer(str(tokenizer))
            same = saved is not None and saved.fingerprint == tokens.tokenizer.fingerprint
            if tokenizer not in (None, made_by) and not same:
                raise ValueError(
                    f"the tokens in {folder} were made by tokenizer {made_by!r}, not {tokenizer!r}; leave it out"
                )
            return tokens
        return _from_nanogpt(cls, folder, tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the tokens themselves, wherever they lie and by whatever path or version they were made.

        A split of up to 64 MB counts whole, of a larger one 1,024 stretches spread over it; a file's own name and time
        do not count, so that copies on several machines are the same data.
        """
        found = hashlib.blake2b(digest_size=16)
        for split in self.splits:
            ids = self.ids(split)
            found.update(f"{split} {ids.dtype.str} {len(ids)}".encode())
            whole = ids.nbytes <= HASH_WHOLE_BYTES
            length = max(1, len(ids) if whole else HASH_WHOLE_BYTES // (STRETCHES * ids.itemsize))
            starts = [0] if whole else np.linspace(0, len(ids) - length, STRETCHES).astype(np.int64)
            for start in starts:
                found.update(ids[start : start + length].tobytes())
        return found.hexdigest()

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits there are, among train, val and test."""
        return tuple(self.meta["splits"])

    def count(self, split: str = "train") -> int:
        """Tokens in the split."""
        return self._of(split)["tokens"]

    def ids(self, split: str = "train") -> np.ndarray:
        """The split's ids: a read-only memory map, (tokens,) of uint16 or uint32."""
        expected = self.count(split)
        if ("ids", split) not in self._cache:
            path, dtype = self.folder / f"{split}.bin", np.dtype(self.meta["dtype"]).newbyteorder("<")
            self._cache["ids", split] = np.memmap(path, dtype, "r") if expected else np.empty(0, dtype)
        return self._cache["ids", split]

    def document_ends(self, split: str = "train") -> np.ndarray:
        """(documents,) of uint64: the index after each document's last token, its end-of-document id included.

        Raises:
            ValueError: a folder from nanoGPT whose tokenizer has no id that ends a document.
        """
        if ("ends", split) not in self._cache:
            path = self.folder / f"{split}.ends.bin"
            recorded = self._of(split)["documents"] is not None
            self._cache["ends", split] = np.fromfile(path, "<u8") if recorded else self._ends_by_id(split)
        return self._cache["ends", split]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made these tokens, loaded when first asked for.

        Raises:
            ValueError: a folder from nanoGPT that does not say which.
        """
        if self.meta["format"] == FORMAT:
            return load_tokenizer(self.folder)
        if (self.folder / "meta.pkl").is_file() and self.tokenizer_spec is None:
            text = self.folder / "input.txt"
            if not text.is_file():
                raise ValueError(
                    f"the vocabulary of {self.folder} is in meta.pkl, a pickle, which can run any code and is not "
                    "opened; put nanoGPT's input.txt beside it, or say which tokenizer made the tokens (tokenizer=NAME "
                    "or FOLDER)"
                )
            return Characters("".join(set(text.read_text(encoding="utf-8"))), False)
        return pretrained_tokenizer(self.tokenizer_spec or "gpt2")

    @property
    def vocab_size(self) -> int:
        """How many ids a model for these tokens needs: the tokenizer's, or where that is unknown the largest id + 1."""
        told = self.meta["tokenizer"]["vocab_size"]
        return told if told is not None else 1 + max(self.maximum_id(split) for split in self.splits)

    @property
    def end_of_document(self) -> int | None:
        """The id after each document; None if documents are not separated."""
        return self.meta["tokenizer"]["end_of_document"]

    def maximum_id(self, split: str = "train") -> int:
        """The largest id in the split (−1 if it is empty): recorded, or found by reading it once."""
        recorded = self._of(split)["maximum_id"]
        if recorded is not None:
            return recorded
        if ("maximum", split) not in self._cache:
            self._cache["maximum", split] = max((int(chunk.max()) for chunk in self._chunks(split)), default=-1)
        return self._cache["maximum", split]

    def bytes_per_token(self, split: str = "train") -> float | None:
        """UTF-8 bytes of text for one token: bits per byte = loss / ln 2 / this. None where the text is not known."""
        of = self._of(split)
        return of["utf8_bytes"] / of["tokens"] if of["utf8_bytes"] is not None and of["tokens"] else None

    def __str__(self) -> str:
        made_by = self.meta["tokenizer"]["spec"] or "an unknown tokenizer"
        lines = [
            f"{self.meta['source']['name']}: {made_by}, {self.vocab_size:,} ids, {self.meta['dtype']}, in {self.folder}"
        ]
        for split in self.splits:
            of = self._of(split)
            documents = "" if of["documents"] is None else f" in {of['documents']:,} documents"
            lines.append(f"  {split:5} {of['tokens']:>15,} tokens{documents}")
        return "\n".join(lines)

    def _of(self, split: str) -> Mapping[str, Any]:
        if split not in self.meta["splits"]:
            raise ValueError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.meta["splits"][split]

    def _chunks(self, split: str) -> Iterator[np.ndarray]:
        ids = self.ids(split)
        return (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))

    def _ends_by_id(self, split: str) -> np.ndarray:
        if self.end_of_document is None:
            raise ValueError(
                f"{self.folder} does not record where documents end, and its tokenizer has no id for it; use windows"
            )
        found = [
            np.flatnonzero(chunk == self.end_of_document) + CHUNK * i for i, chunk in enumerate(self._chunks(split))
        ]
        ends = np.concatenate([*found, np.empty(0, np.int64)]) + 1
        if self.count(split) and (not len(ends) or ends[-1] != self.count(split)):
            ends = np.append(ends, self.count(split))  # the last document was not ended
        return ends.astype(np.uint64)


def check_vocabulary(tokens: Tokens, vocab_size: int) -> None:
    """Raise ValueError if an id is beyond a model's vocabulary, instead of an index error in some later step."""
    for split in tokens.splits:
        largest = tokens.maximum_id(split)
        if largest >= vocab_size:
            raise ValueError(
                f"{split} of {tokens.folder} has token id {largest}, but the model's vocabulary ends at "
                f"{vocab_size - 1}; give the model vocab_size={tokens.vocab_size} or more, or prepare the text with "
                "the model's own tokenizer"
            )


def holds_tokens(folder: Path) -> bool:
    """Whether a folder has token files: ours or nanoGPT's."""
    return (folder / META).is_file() or (folder / "train.bin").is_file()


def _checked_meta(folder: Path) -> Mapping[str, Any]:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"{folder / META} is not a description of tokens (format {meta['format']!r})")
        if meta["version"] > VERSION:
            raise ValueError(
                f"{folder} was written by a later lowrank (format {meta['version']}; this one reads {VERSION}): "
                f"update it"
            )
        expected = [
            (f"{split}.bin", of["tokens"] * np.dtype(meta["dtype"]).itemsize) for split, of in meta["splits"].items()
        ]
        expected += [(f"{split}.ends.bin", of["documents"] * 8) for split, of in meta["splits"].items()]
        _ = meta["tokenizer"]["spec"], meta["source"]["name"], meta["source"]["description"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / META} is damaged ({error}); delete the folder and prepare the text again"
        ) from error
    for name, size in expected:
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise ValueError(
                f"{folder / name} {state}, meta.json says {size:,}: damaged; delete the folder and prepare the text "
                f"again"
            )
    return meta


def _from_nanogpt(cls: type[Tokens], folder: Path, tokenizer: str | None) -> Tokens:
    """nanoGPT's folders describe nothing: uint16 ids of GPT-2's tokenizer, unless told or there is a ``meta.pkl``."""
    found = [split for split in SPLITS if (folder / f"{split}.bin").is_file()]
    if "train" not in found:
        raise FileNotFoundError(f"no prepared tokens in {folder} (neither {META} nor train.bin)")
    spec: str | None = None if tokenizer is None and (folder / "meta.pkl").is_file() else tokenizer or "gpt2"
    vocab_size, end = (50257, 50256) if spec == "gpt2" else (None, None)
    if spec is not None and spec != "gpt2":
        made_by = pretrained_tokenizer(spec)
        vocab_size, end = made_by.vocab_size, made_by.end_of_document
    dtype = "uint32" if vocab_size is not None and vocab_size > 2**16 else "uint16"
    sizes = {split: (folder / f"{split}.bin").stat().st_size for split in found}
    for split, size in sizes.items():
        if size % np.dtype(dtype).itemsize or not size:
            raise ValueError(
                f"{folder / f'{split}.bin'} has {size:,} bytes, which is no whole number of {dtype} tokens: damaged"
            )
    unknown = {"documents": None, "utf8_bytes": None, "maximum_id": None}
    meta = {
        "format": "nanogpt",
        "dtype": dtype,
        "source": {"name": folder.name, "description": f"nanoGPT's tokens in {folder}"},
        "tokenizer": {"spec": spec, "vocab_size": vocab_size, "end_of_document": end},
        "splits": {split: {"tokens": sizes[split] // np.dtype(dtype).itemsize, **unknown} for split in found},
    }
    return cls(folder=folder, meta=meta, tokenizer_spec=tokenizer)
