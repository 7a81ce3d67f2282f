"""Training a byte-level BPE (Sennrich et al., arXiv 1508.07909, on bytes as in GPT-2) with the `tokenizers` library."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lowrank.infra.extras import import_extra


def trained_backend(vocab_size: int, texts: Iterable[str], end_of_document: str) -> Any:
    """A ``tokenizers.Tokenizer`` of at most ``vocab_size`` ids: ``end_of_document`` (id 0), the 256 bytes, merges.

    The same texts in the same order give the same tokenizer.
    """
    library = import_extra("tokenizers", "text")
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _interruptible(lambda texts: backend.train_from_iterator(texts, trainer), texts)
    return backend


def _interruptible(train: Callable[[Iterable[str]], None], texts: Iterable[str]) -> None:
    """Call ``train(texts)`` in a thread, so that Ctrl-C is heard at once and not when the library is done."""
    stopped = threading.Event()
    failures: list[BaseException] = []

    def until_stopped() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                raise InterruptedError
            yield text

    def work() -> None:
        try:
            train(until_stopped())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.2)
    except BaseException:
        stopped.set()
        if thread.is_alive():
            thread.join(timeout=1)
        raise
    if failures:
        raise failures[0]
