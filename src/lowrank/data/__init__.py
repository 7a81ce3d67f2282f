"""Side room: data. Text becomes token files once (``prepare``), and those batches (``Windows``, ``Documents``).

Nothing here knows a method or a model; what leaves is tensors of ids and labels.
"""

from typing import TYPE_CHECKING

from lowrank.data.catalogue import DATA, Data
from lowrank.infra.lazy import attributes

if TYPE_CHECKING:
    from lowrank.data.images.source import ImageData
    from lowrank.data.text.batches import (
        Documents,
        EvaluationRows,
        ShuffledRows,
        Streamed,
        Windows,
        evaluation_batches,
    )
    from lowrank.data.text.corpora import StreamedText, TextData, UnreadText
    from lowrank.data.text.prepare import prepare
    from lowrank.data.text.run_tokenizer import open_run_tokenizer, save_run_tokenizer
    from lowrank.data.text.source import Piece, Source, SourceInfo, text_source
    from lowrank.data.text.sources import list_sources, open_source
    from lowrank.data.text.token_files import Tokens, check_vocabulary
    from lowrank.data.text.tokenizers import Tokenizer, load_tokenizer, open_tokenizer

__getattr__ = attributes(__name__, __file__)

__all__ = [
    "DATA",
    "Data",
    "Documents",
    "EvaluationRows",
    "ImageData",
    "Piece",
    "ShuffledRows",
    "Source",
    "SourceInfo",
    "Streamed",
    "StreamedText",
    "TextData",
    "Tokenizer",
    "Tokens",
    "UnreadText",
    "Windows",
    "check_vocabulary",
    "evaluation_batches",
    "list_sources",
    "load_tokenizer",
    "open_run_tokenizer",
    "open_source",
    "open_tokenizer",
    "prepare",
    "save_run_tokenizer",
    "text_source",
]
