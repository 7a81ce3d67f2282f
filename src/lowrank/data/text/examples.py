"""Examples to fine-tune on, as people have them: which columns hold what, and rows as one of three things.

===============================================  =======================================================================
columns                                          a row is
===============================================  =======================================================================
``messages`` or ``conversations``                a ``Chat``: turns of ``role`` and ``content`` (or ``from``, ``value``)
``prompt``, ``completion``                       a ``Pair`` of strings, verbatim; of lists of turns: a ``Chat``
``instruction``, ``output``, perhaps ``input``   a ``Chat`` of two turns, or a ``Pair`` in Alpaca's own words; so are
                                                 Dolly's ``instruction``, ``response``, perhaps ``context``
``text``, ``content``, …, or the only column     ``Plain`` text
===============================================  =======================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lowrank.data.text.source import encodable
from lowrank.data.text.tables import TEXT_COLUMNS
from lowrank.infra.convert import nearest

INSTRUCTIONS = (("instruction", "output", "input"), ("instruction", "response", "context"))  # Alpaca's names, Dolly's
CHATS = ("messages", "conversations", "conversation")
# Names of roles elsewhere: ShareGPT's, Gemini's.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# Alpaca's prompts (github.com/tatsu-lab/stanford_alpaca, Apache-2.0): the words that models have been trained on.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Turns of ``role`` and ``content``; the answers are what the assistant says, or, where turns were given as prompt
    and completion, all from turn ``first`` on."""

    messages: Sequence[Mapping[str, Any]]
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt and what follows it, both verbatim."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A text, all of it to be learnt."""

    text: str


Example: TypeAlias = Chat | Pair | Plain
Kind = Literal["chat", "pair", "alpaca", "text"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the rows of a table are, and in which columns."""

    kind: Kind
    columns: Sequence[str]

    def example(self, row: Mapping[str, Any], where: str, *, chats: bool) -> Example | None:
        """A row as an example; None where its answer is empty.

        Args:
            row: by column.
            where: it stands, for messages.
            chats: whether there is a chat template for instructions.

        Raises:
            ValueError: a column is missing or holds another kind of value than it should.
        """
        needed = self.columns[:2] if self.kind == "alpaca" else self.columns  # perhaps nobody says more
        missing = [name for name in needed if name not in row]
        if missing:
            raise ValueError(f"{where}: no {missing[0]!r}, only {', '.join(map(repr, row)) or 'an empty object'}")
        if self.kind == "chat":
            turns = _turns(row[self.columns[0]], where, self.columns[0])
            return Chat(messages=turns) if _answers(turns) else None
        if self.kind == "alpaca":
            return self._instruction(row, where, chats)
        if self.kind == "text":
            text = _text(row[self.columns[0]], where, self.columns[0])
            return Plain(text=text) if text.strip() else None
        prompt, completion = self.columns
        if isinstance(row[prompt], list):
            before, after = (_turns(row[name], where, name) for name in self.columns)
            return Chat(messages=[*before, *after], first=len(before)) if _answers(after) else None
        answer = _text(row[completion], where, completion)
        return Pair(prompt=_text(row[prompt], where, prompt), completion=answer) if answer.strip() else None

    def _instruction(self, row: Mapping[str, Any], where: str, chats: bool) -> Example | None:
        names = next(each for each in INSTRUCTIONS if each[1] == self.columns[1])
        instruction, answer, context = (_text(row.get(name), where, name) for name in names)
        if not answer.strip():
            return None
        if chats:
            asked = f"{instruction}\n\n{context}" if context.strip() else instruction
            return Chat(messages=[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
        words = ALPACA_INPUT if context.strip() else ALPACA
        return Pair(prompt=words.format(instruction=instruction, input=context), completion=answer)


def recognise(
    row: Mapping[str, Any],
    source: str,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    column: str | None = None,
) -> Form:
    """What the rows of a table are, by its first one.

    Args:
        row: the first, by column.
        source: the table, for messages.
        prompt, completion: columns of a pair, where they have other names.
        column: the column of a text or of turns.

    Raises:
        ValueError: columns that say nothing, or that are not there; the message says what there is.
    """
    if column is not None and (prompt or completion):
        raise ValueError("--data.column is of plain text or chats, --data.prompt and --data.completion are of pairs")
    if prompt or completion:
        pair = (prompt or "prompt", completion or "completion")
        if pair[0] == pair[1]:
            raise ValueError(f"--data.prompt and --data.completion both name {pair[0]!r}: they are two columns")
        for name in pair:
            _check_there(name, row, source)
        return Form(kind="pair", columns=pair)
    if column is not None:
        _check_there(column, row, source)
        turns = isinstance(row[column], list) or str(row[column]).startswith("[{")
        return Form(kind="chat" if turns else "text", columns=[column])
    if found := [name for name in CHATS if name in row]:
        return Form(kind="chat", columns=found[:1])
    if {"prompt", "completion"} <= row.keys():
        return Form(kind="pair", columns=("prompt", "completion"))
    for columns in INSTRUCTIONS:
        if set(columns[:2]) <= row.keys():
            return Form(kind="alpaca", columns=[name for name in columns if name in row])
    usual = [name for name in TEXT_COLUMNS if name in row and name != "output"]
    if usual or len(row) == 1:
        return Form(kind="text", columns=[(usual or list(row))[0]])
    raise ValueError(
        f"{source} has {', '.join(map(repr, row)) or 'no columns'}, which are none of messages, conversations, "
        "prompt and completion, instruction and output (or response), or text: say which hold what by --data.prompt "
        "NAME --data.completion NAME, or --data.column NAME for texts or chats (of lowrank eval: --prompt, …)"
    )


def _check_there(name: str, row: Mapping[str, Any], source: str) -> None:
    if name not in row:
        raise ValueError(
            f"{source} has no column {name!r}{nearest(name, row)}; it has {', '.join(map(repr, row)) or 'none'}"
        )


def _text(value: Any, where: str, column: str) -> str:
    """A string; None is an empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {column!r} is {_kind(value)}, and in this table it should be text: a column holds one kind"
        )
    return encodable(value)


def _turns(value: Any, where: str, column: str) -> list[dict[str, Any]]:
    """A conversation under the usual names."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{where}: {column!r} is not the JSON of a list of turns ({error})") from error
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        what = "a list of something else" if isinstance(value, list) else _kind(value)
        raise ValueError(
            f"{where}: {column!r} is {what}, and should be a list of turns, each with role and content: a "
            "column holds one kind"
        )
    return [_turn(turn, f"{where}: turn {number} of {column!r}") for number, turn in enumerate(value, 1)]


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    role = ROLES.get(str(role).lower(), role)
    if role not in KNOWN_ROLES:
        raise ValueError(f"{where} has the role {role!r}{nearest(str(role), KNOWN_ROLES)}; it is one of {KNOWN_ROLES}")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise ValueError(f"{where} holds something else than text, which a language model cannot read")
        content = "".join(str(part["text"]) for part in content)
    if content is None and role in ("system", "developer", "user"):
        raise ValueError(f"{where} says nothing: its content is missing or null")
    beside = {name: each for name, each in turn.items() if name in ("name", "tool_calls", "tool_call_id") and each}
    return {"role": role, "content": _text(content, where, "content"), **beside}


def _answers(turns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the assistant says something."""
    said = [turn for turn in turns if turn["role"] == "assistant"]
    return any(turn["content"].strip() or turn.get("tool_calls") for turn in said)


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
