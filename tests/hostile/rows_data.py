"""Texts: cut, damaged, empty, no files at all, and settings that mean nothing for them."""

import gzip
import os
from pathlib import Path

from tests.hostile.world import TEXT, Row

GZ = gzip.compress(TEXT.encode())
CSV = "text,n\n" + "".join(f"The {n}th row of a table,{n}\n" for n in range(99))


def text(name: str, content: object, *says: str, file: str = "a.txt", more: str = "", **rest: object) -> Row:
    """Training on one file of the working folder."""
    given = content if callable(content) or content is None else {file: content}
    return Row(name=name, words=f"train gpt-mini --data {file} {{tiny}} {more} --out o", given=given, says=says, **rest)  # type: ignore[arg-type]


ROWS = [
    text("gzip cut short", GZ[:100], "a.txt.gz", "cut short", "get it again", file="a.txt.gz"),
    text("gzip that is none", TEXT, "a.txt.gz", "Not a gzipped file", file="a.txt.gz"),
    text("gzip of another checksum", GZ[:-8] + b"12345678", "a.txt.gz", "CRC check failed", file="a.txt.gz"),
    text("gzip of nothing", gzip.compress(b""), "a.txt.gz", "no text", file="a.txt.gz"),
    text("nothing", b"", "a.txt is empty"),
    text("one character", "x", "val split of a.txt would be empty", "set val_fraction"),
    text("Latin-1", TEXT.encode() + b"\xe9\xff", "a.txt is not UTF-8", "byte 0xe9", "iconv"),
    text("UTF-16", TEXT.encode("utf-16"), "a.txt is not UTF-8", "utf-16"),
    text("a folder of nothing", lambda w: Path("d").mkdir(), "d has no text files", file="d"),
    text("a folder called like a file", lambda w: Path("a.txt").mkdir(), "a.txt has no text files"),
    text("a pipe", lambda w: os.mkfifo("p.txt"), "p.txt is a pipe", "write it into a file", file="p.txt"),
    text("a device", None, "/dev/zero is a pipe, socket or device", file="/dev/zero"),
    text("a file of the kernel", None, "none of the files that can be read", file="/proc/self/mem"),
    text("a link to itself", lambda w: os.symlink("l.txt", "l.txt"), "no file or folder 'l.txt'", file="l.txt"),
    text("a link to nowhere", lambda w: os.symlink("x", "l.txt"), "no file or folder 'l.txt'", file="l.txt"),
    text("an unknown suffix", TEXT, "a.xyz is none of the files", ".parquet", file="a.xyz"),
    text("an address", None, "no file or folder 'http://127.0.0.1:9/x.txt'", file="http://127.0.0.1:9/x.txt"),
    Row(name="NUL in a name", words=["train", "gpt-mini", "--data", "a\0.txt", "--out", "o"], says=("'a\\x00.txt'",)),
    Row(
        name="a name without end",
        words=["train", "gpt-mini", "--data", "a" * 5000 + ".txt", "--out", "o"],
        says=("aaaa…", "File name too long", "shorter"),
    ),
    text("JSON cut short", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON", file="a.jsonl"),
    text("JSON without objects", "[1]\n[2]\n", "a.jsonl, line 1: list", file="a.jsonl"),
    text("JSON of numbers", '{"text": 5}\n', "a.jsonl", "holds int, not text", file="a.jsonl"),
    text("JSON of NaN", '{"text": NaN}\n', "a.jsonl", "holds float, not text", file="a.jsonl"),
    text("JSON of nulls", '{"text": null}\n' * 9, "a.jsonl holds no text", file="a.jsonl"),
    text("JSON without the column", '{"text": "a"}\n{"txt": "b"}\n', "a.jsonl, line 2: no 'text'", file="a.jsonl"),
    text("JSON without bottom", "[" * 200_000 + "\n", "a.jsonl, line 1: not JSON", "recursion", file="a.jsonl"),
    text("JSON of huge numbers", '{"text": ' + "9" * 5000 + "}\n", "a.jsonl, line 1: not JSON", file="a.jsonl"),
    text("JSON with a key twice", '{"text": "a", "text": "b"}\n', "line 1", "'text' twice", file="a.jsonl"),
    text("CSV with a comma", "text,n\nhello, you,3\n", "a.csv, line 2: 3 cells", "quotes", file="a.csv"),
    text("CSV with a short row", "text,n\nhello\n", "a.csv, line 2: 1 cells", file="a.csv"),
    text("CSV with a stray quote", 'text,n\n"hello,3\nmore,4\n', "a.csv, line 2", "quote", file="a.csv"),
    text("CSV of a header", "text,n\n", "a.csv holds no text", file="a.csv"),
    text("CSV with two texts", "text,text\na,b\n", "a.csv has 2 columns 'text'", "rename one", file="a.csv"),
    text("CSV in Latin-1", b"text,n\nab\xe9c,2\n", "a.csv is not UTF-8", file="a.csv"),
    text("CSV by another mark", CSV, "'text,n' has no '|'", file="a.csv", more="--data.delimiter '|'"),
    text("CSV by a long mark", CSV, "one character", file="a.csv", more="--data.delimiter ';;'"),
    text("a column that is not", CSV, "has no column 'nope'", "'text', 'n'", file="a.csv", more="--data.column nope"),
    text("a column of a text", TEXT, "plain text and has no columns", more="--data.column x"),
    text("a separator of a table", CSV, "a.csv is a table", file="a.csv", more="--data.separator x"),
    text("Parquet of junk", b"PAR1 junk PAR1", "a.parquet is not a Parquet file", file="a.parquet"),
    text("a separator cut short", TEXT, "separator='\\\\x'", "written twice", more="--data.separator '\\x'"),
    text("a separator of one backslash", TEXT, "separator='\\\\'", more="--data.separator '\\'"),
    text("a tokenizer of no size", TEXT, "tokenizer 'bpe:0'", "at least 257", more="--data.tokenizer bpe:0"),
    text("a tokenizer of words", TEXT, "tokenizer 'bpe:x'", "bpe:4096", more="--data.tokenizer bpe:x"),
    text("a tokenizer of astronomers", TEXT, "'bpe:99999999999'", more="--data.tokenizer bpe:99999999999"),
    text("a tokenizer that is not", TEXT, "'t.json'", "folder or file that is here", more="--data.tokenizer t.json"),
    text("a tokenizer mistyped", TEXT, "'bpee:300'", "nor can it be a name", more="--data.tokenizer bpee:300"),
    text("shares that leave nothing", TEXT, "val_fraction must be at least 0", more="--data.val_fraction 1"),
    text("a negative share", TEXT, "val_fraction", "-0.5", more="--data.val_fraction -0.5"),
    text("a share of NaN", TEXT, "--data.val_fraction nan", more="--data.val_fraction nan"),
    text("no text at all", TEXT, "limit must be at least 1", more="--data.limit 0"),
    Row(
        name="a module without the function",
        words="train gpt-mini --data a.py:f --out o",
        given={"a.py": "import sys\nsys.exit(0)\n"},
        says=("a.py has no function 'f'",),
    ),
    Row(
        name="a module that is no Python",
        words="train gpt-mini --data a.py:f --out o",
        given={"a.py": "def f(:\n"},
        says=("a.py cannot be read as Python",),
    ),
    Row(
        name="a tokenizer of junk",
        words="train gpt-mini --data a.txt {tiny} --data.tokenizer ./d --out o",
        given={"a.txt": TEXT, "d/tokenizer.json": "junk"},
        says=("d/tokenizer.json is not a tokenizer.json",),
    ),
    Row(
        name="texts beside a pipe",
        words="train gpt-mini --data d {tiny} --out o",
        given=lambda w: (Path("d").mkdir(), os.mkfifo("d/p.txt"), Path("d/a.txt").write_text(TEXT)),
        status=0,
        shows=("o: step 4: validation loss",),
        writes=("o", "o/*"),
    ),
]
