"""Text to ids and back.

Four kinds behind one small interface, each saved without pickle beside the tokens that it made:

========================  ==============================================================================================
``bytes``                 UTF-8 bytes, 256 ids, every text encodes; byte 0xFF, which UTF-8 never uses, ends a document
``chars``                 the characters of the corpus in code point order, as in nanoGPT's ``shakespeare_char``; an
                          unknown character is an error naming it. A corpus of several documents has one id more, to end
                          them
``bpe:N``                 byte-level BPE (Sennrich et al., arXiv 1508.07909, on bytes as in GPT-2) of at most N ids,
                          trained on the training split; id 0, ``<|endoftext|>``, ends a document
a name or a folder        any tokenizer of transformers, or a folder (or file) with nothing but a ``tokenizer.json``
========================  ==============================================================================================

Special tokens are never added to a text and never recognised inside it (as in tiktoken's ``encode_ordinary``): a corpus
that spells ``<|endoftext|>`` does not end a document. Documents are ended by the caller with ``end_of_document``.
"""

import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.infra.convert import nearest
from lowrank.infra.extras import import_extra
from lowrank.infra.files import write_text_atomically
from lowrank.infra.hub import located

END_OF_DOCUMENT = "<|endoftext|>"
SAVED = "lowrank_tokenizer.json"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
# Tokens that end a document in known vocabularies, for a tokenizer.json without a configuration beside it.
USUAL_ENDS = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[SEP]")


class Tokenizer(ABC):
    """Text to ids and back.

    ``spec`` is how it was asked for; ``end_of_document`` is the id put after each document, or None.
    """

    kind: str

    def __init__(self, spec: str, vocab_size: int, end_of_document: int | None):
        self.spec, self.vocab_size, self.end_of_document = spec, vocab_size, end_of_document

    def encode(self, text: str) -> list[int]:
        """The ids of one text, no special tokens added."""
        return self.encode_batch([text])[0].tolist()

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to go on from."""
        return self.encode(text)

    @property
    def special_ids(self) -> frozenset[int] | None:
        """Ids that stand for no text; None where that is not known."""
        return None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text: one-dimensional arrays of unsigned integers."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; the end of a document shows as in the vocabulary (``<|endoftext|>``, ``</s>``, …)."""

    def save(self, folder: Path) -> None:
        """Write what ``load_tokenizer`` needs into an existing folder."""
        text = json.dumps(self.described(), ensure_ascii=False)
        write_text_atomically(Path(folder) / SAVED, f"{text}\n")

    @property
    def fingerprint(self) -> str:
        """A short digest of all that turns text into ids; how the tokenizer was asked for is no part of it."""
        found = hashlib.blake2b(digest_size=8)
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            for file in sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != SAVED):
                found.update(file.name.encode() + file.read_bytes())
        own = {name: value for name, value in self.described().items() if name != "spec"}
        found.update(json.dumps(own, sort_keys=True).encode())
        return found.hexdigest()

    def described(self) -> dict[str, Any]:
        """What the saved file says."""
        return {
            "kind": self.kind,
            "spec": self.spec,
            "vocab_size": self.vocab_size,
            "end_of_document": self.end_of_document,
        }


class Bytes(Tokenizer):
    """UTF-8 bytes: 256 ids and nothing to learn."""

    kind = "bytes"

    def __init__(self) -> None:
        super().__init__("bytes", 256, 0xFF)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        # Between two ends lies a whole document, so that each part decodes on its own; a cut character shows as U+FFFD.
        return END_OF_DOCUMENT.join(part.decode("utf-8", "replace") for part in bytes(map(int, ids)).split(b"\xff"))


class Characters(Tokenizer):
    """One id for each character of the corpus, in code point order; one more to end documents if there are several."""

    kind = "chars"

    def __init__(self, characters: str, ends_documents: bool):
        self.characters = "".join(sorted(set(characters)))
        size = len(self.characters)
        super().__init__("chars", size + ends_documents, size if ends_documents else None)
        self._codes = np.array([ord(character) for character in self.characters], np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As in ``Tokenizer``; ValueError for a character that the corpus did not have."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = np.searchsorted(self._codes, points)
        known = self._codes[np.minimum(ids, len(self._codes) - 1)] == points
        if not known.all():
            unknown = sorted(set(map(chr, points[~known].tolist())))
            raise ValueError(
                f"the vocabulary of {len(self.characters)} characters does not have "
                f"{', '.join(map(repr, unknown[:5]))}; leave them out, or train with tokenizer='bytes' or 'bpe:N', "
                "which know every text"
            )
        return ids.astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(END_OF_DOCUMENT if id == self.end_of_document else self.characters[id] for id in map(int, ids))

    def described(self) -> dict[str, Any]:
        return {**super().described(), "characters": self.characters}


class Fast(Tokenizer):
    """A tokenizer of the ``tokenizers`` library: our own BPE, or the fast form of one from transformers."""

    kind = "tokenizer.json"

    def __init__(self, backend: Any, spec: str, end_of_document: int | None):
        ids = backend.get_vocab(with_added_tokens=True).values()
        super().__init__(spec, max(ids, default=-1) + 1, end_of_document)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # a text that spells a special token is text
        self.backend = backend

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        super().save(folder)
        write_text_atomically(Path(folder) / "tokenizer.json", self.backend.to_str(pretty=True))
        end = None if self.end_of_document is None else self.backend.id_to_token(self.end_of_document)
        # With this, transformers' AutoTokenizer reads the folder too.
        configured = {"tokenizer_class": "PreTrainedTokenizerFast", **({"eos_token": end} if end else {})}
        write_text_atomically(Path(folder) / "tokenizer_config.json", f"{json.dumps(configured)}\n")


class Slow(Tokenizer):
    """A tokenizer of transformers written in Python (ByT5's, for example), which has no ``tokenizer.json``."""

    kind = "transformers"
    subfolder = "transformers_tokenizer"

    def __init__(self, backend: Any, spec: str):
        super().__init__(spec, len(backend), end_of(backend))
        self.backend = backend

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [np.asarray(ids, np.uint32) for ids in self.backend(list(texts), **plain)["input_ids"]]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(
            [int(id) for id in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.backend.save_pretrained(str(Path(folder) / self.subfolder))


def check_tokenizer_spec(spec: str) -> None:
    """Raise ValueError if ``spec`` cannot name a tokenizer, before any work."""
    kind, colon, size = spec.partition(":")
    if kind in ("bytes", "chars") and colon:
        raise ValueError(f"tokenizer {spec!r}: {kind!r} takes no size; 'bpe:N' does")
    if kind == "bpe" and not (size.isdecimal() and 257 <= int(size) <= 2**24):
        raise ValueError(
            f"tokenizer {spec!r}: give the size of the vocabulary, at least 257 (256 bytes and the end of a document), "
            f"for example 'bpe:4096'"
        )


def open_tokenizer(
    spec: str, corpus: Callable[[], Iterable[str]], training: Callable[[], Iterable[str]], several: bool
) -> Tokenizer:
    """Make or load the tokenizer that ``spec`` names.

    Args:
        spec: ``bytes``, ``chars``, ``bpe:N``, a folder or file, or a name on the Hugging Face hub.
        corpus: starts reading all text (``chars`` collects its characters).
        training: starts reading the text that a BPE may learn from.
        several: the corpus has several documents, so that ``chars`` needs an id to end them.

    Raises:
        ValueError: not a tokenizer.
        OSError: a name that could not be loaded.
    """
    check_tokenizer_spec(spec)
    if spec == "bytes":
        return Bytes()
    if spec == "chars":
        return Characters("".join(set().union(*map(set, corpus()))), several)
    if spec.startswith("bpe:"):
        return train_bpe(int(spec.removeprefix("bpe:")), training())
    return pretrained_tokenizer(spec)


def train_bpe(vocab_size: int, texts: Iterable[str]) -> Fast:
    """Train a byte-level BPE of at most ``vocab_size`` ids (fewer if the text has no more pairs to merge)."""
    backend = _trained(vocab_size, texts)
    return Fast(backend, f"bpe:{vocab_size}", backend.token_to_id(END_OF_DOCUMENT))


def pretrained_tokenizer(spec: str) -> Tokenizer:
    """A tokenizer that needs no text: ``bytes``, or one from a folder, a ``tokenizer.json``, or by its name on the hub
    (or in transformers' own cache).

    Raises:
        ValueError, OSError: it is none, or is learnt from a text.
    """
    check_tokenizer_spec(spec)
    if spec == "bytes":
        return Bytes()
    if spec == "chars" or spec.startswith("bpe:"):
        raise ValueError(
            f"tokenizer {spec!r} is learnt from a text, and there is none here: give bytes, a folder or a name"
        )
    if (saved := saved_tokenizer(spec)) is not None:
        return saved
    path = Path(spec).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        return _from_file(file, spec)
    if not path.is_dir() and (not _HUB_NAME.fullmatch(spec) or spec.endswith(".json")):
        raise ValueError(
            f"tokenizer {spec!r} is neither bytes, chars or bpe:N, nor a folder or file that is here, nor can it be a "
            f"name on the hub{nearest(spec, ('bytes', 'chars', 'bpe:4096'))}"
        )
    loader = import_extra("transformers", "text").AutoTokenizer
    try:
        backend = loader.from_pretrained(str(located(spec)), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise type(error)(
            f"tokenizer {spec!r} is neither bytes, chars or bpe:N, nor a folder with a tokenizer, nor a name that "
            f"transformers could load: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    fast = getattr(backend, "backend_tokenizer", None)
    return Fast(fast, spec, end_of(backend)) if fast is not None else Slow(backend, spec)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote into ``folder``; needs no network.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(folder)
    if not (folder / SAVED).is_file():
        raise FileNotFoundError(f"{folder} holds no saved tokenizer ({SAVED})")
    try:
        return _loaded(folder, json.loads((folder / SAVED).read_text(encoding="utf-8")))
    except ImportError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"the tokenizer in {folder} cannot be read, it is damaged or incomplete: {error}") from error


def _loaded(folder: Path, saved: Mapping[str, Any]) -> Tokenizer:
    if saved["kind"] == Bytes.kind:
        return Bytes()
    if saved["kind"] == Characters.kind:
        return Characters(saved["characters"], saved["end_of_document"] is not None)
    if saved["kind"] == Fast.kind:
        backend = import_extra("tokenizers", "text").Tokenizer.from_file(str(folder / "tokenizer.json"))
        return Fast(backend, saved["spec"], saved["end_of_document"])
    if saved["kind"] == Slow.kind:
        loader = import_extra("transformers", "text").AutoTokenizer
        return Slow(loader.from_pretrained(str(folder / Slow.subfolder), trust_remote_code=False), saved["spec"])
    from lowrank.data.text.pretrained_tokenizer import PretrainedTokenizer  # which is one of these

    if saved["kind"] == PretrainedTokenizer.kind:
        return PretrainedTokenizer.from_folder(folder, saved)
    raise ValueError(f"{saved['kind']!r} is an unknown kind")


def saved_tokenizer(spec: str) -> Tokenizer | None:
    """The tokenizer of ours that lies in the folder ``spec``; None where ``spec`` names no such folder."""
    folder = Path(spec).expanduser()
    return load_tokenizer(folder) if (folder / SAVED).is_file() else None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in a folder, ours or transformers'; none where it holds no tokenizer."""
    files = sorted(file for file in folder.glob("*token*") if file.is_file())
    return files + [file for name in ("vocab.json", "merges.txt", "spiece.model") if (file := folder / name).is_file()]


def tokenizer_fingerprint(spec: str) -> str:
    """What the tokens depend on: the spec itself, and for a folder or file also what it contains."""
    if (saved := saved_tokenizer(spec)) is not None:
        return f"saved@{saved.fingerprint}"
    path = Path(spec).expanduser()
    if spec in ("bytes", "chars") or spec.startswith("bpe:") or not path.exists():
        return spec
    digest = hashlib.blake2b(digest_size=16)
    for file in [path] if path.is_file() else tokenizer_files(path):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"{path.name}@{digest.hexdigest()}"


def _from_file(file: Path, spec: str) -> Fast:
    loader = import_extra("tokenizers", "text").Tokenizer
    try:
        backend = loader.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file} is not a tokenizer.json: {error}") from error
    configured = file.with_name("tokenizer_config.json")
    token = json.loads(configured.read_text(encoding="utf-8")).get("eos_token") if configured.is_file() else None
    names = (token["content"] if isinstance(token, dict) else token,) if token else USUAL_ENDS
    ids = (backend.token_to_id(name) for name in names)
    return Fast(backend, spec, next((id for id in ids if id is not None), None))


def end_of(backend: Any) -> int | None:
    """The id that ends a document in a transformers tokenizer: its eos, or BERT's sep."""
    return backend.eos_token_id if backend.eos_token_id is not None else backend.sep_token_id


# Runs by itself, without this package: reads texts (8 bytes of length, then UTF-8) and writes a tokenizer as JSON.
_TRAINER = """
import sys
sys.path[:] = sys.argv[3:]
import tokenizers as t
read, size = sys.stdin.buffer.read, int(sys.argv[1])
def texts():
    while (head := read(8)) != b"\\xff" * 8:
        if len(head) < 8:
            raise SystemExit("whoever sent the text is gone")
        yield read(int.from_bytes(head, "big")).decode()
backend = t.Tokenizer(t.models.BPE())
backend.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = t.decoders.ByteLevel()
alphabet = t.pre_tokenizers.ByteLevel.alphabet()
options = {"special_tokens": [sys.argv[2]], "initial_alphabet": alphabet, "show_progress": False}
backend.train_from_iterator(texts(), t.trainers.BpeTrainer(vocab_size=size, **options))
sys.stdout.buffer.write(backend.to_str().encode())
"""


def _trained(vocab_size: int, texts: Iterable[str]) -> Any:
    """A ``tokenizers.Tokenizer`` of at most ``vocab_size`` ids: END_OF_DOCUMENT (id 0), the 256 bytes, merges.

    It is trained in a process of its own: Ctrl-C is heard at once, and where memory runs out, which the library answers
    by ending its process, there is somebody left to say so.
    """
    library = import_extra("tokenizers", "text").Tokenizer
    command = [sys.executable, "-c", _TRAINER, str(vocab_size), END_OF_DOCUMENT, *sys.path]
    with tempfile.TemporaryFile() as problems:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": problems}
        process = subprocess.Popen(command, **pipes, start_new_session=True)
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and says below why
                for data in (text.encode() for text in texts):
                    process.stdin.write(len(data).to_bytes(8, "big") + data)  # type: ignore[union-attr]
                process.stdin.write(b"\xff" * 8)  # type: ignore[union-attr]
            made, _ = process.communicate()
        finally:
            process.kill()
            with process, contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
        if process.returncode == 0:
            return library.from_str(made.decode())
        problems.seek(0)
        said = problems.read().decode("utf-8", "replace").strip().splitlines() or ["killed, as for want of memory"]
        raise MemoryError(
            f"training a BPE of {vocab_size} ids ended with status {process.returncode} ({said[-1]}): give it less "
            "text (limit=BYTES) or more memory, or take a tokenizer that exists, such as 'gpt2'"
        )
