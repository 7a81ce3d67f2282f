"""One set of names for the splits, of text and of images: what folders, files and tables may call them."""

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}


def split_of(name: str) -> str | None:
    """The split that a name stands for in any case of letters, or None.

    >>> split_of("Validation"), split_of("cats")
    ('val', None)
    """
    return SPLIT_NAMES.get(name.lower())
