"""Examples to fine-tune on: what is recognised, what counts, what is cut, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.chats import CHATML, FAMILIES, THINKING, TURNS, saved, tokenizer

from lowrank.data.text.examples import Chat, Pair, Plain, recognise
from lowrank.data.text.finetuning import Examples, examples, keeps_apart
from lowrank.data.text.packing import Encoded, ExampleRows, packed
from lowrank.data.text.tokenizers import load_tokenizer
from lowrank.models.text import load_pretrained, next_token_loss

Write = Callable[[str, str | bytes], Path]
ASKED, ANSWERED = {"role": "user", "content": "What is light?"}, {"role": "assistant", "content": "A picture"}
MORE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is made"}]
PAIR = {"prompt": "Why?", "completion": " It is."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "llama", "llama", template=CHATML)


def read(write: Write, rows: list[Any], folder: Path, **options: Any) -> Examples:
    path = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    how = {"val_fraction": 0.0, "test_fraction": 0.0} | options
    return examples(str(path), tokenizer=str(folder), **how)


def answers(data: Examples) -> list[str]:
    """The text that counts, of each example."""
    return [data.tokenizer.decode(each.ids[each.count]) for each in data.encoded["train"]]


def texts(data: Examples) -> list[str]:
    return [data.tokenizer.decode(each.ids) for each in data.encoded["train"]]


# What rows are

DOLLY = {"instruction": "Add.", "context": "1 2", "response": "3", "category": "sums"}


@pytest.mark.parametrize(
    ("row", "kind", "columns"),
    [
        ({"messages": [ASKED, ANSWERED], "id": 1}, "chat", ["messages"]),
        ({"id": "x", "conversations": [], "text": "y"}, "chat", ["conversations"]),
        ({"prompt": "a", "completion": "b", "text": "c"}, "pair", ["prompt", "completion"]),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca", ["instruction", "output", "input"]),
        ({"instruction": "a", "output": "b", "context": "c"}, "alpaca", ["instruction", "output"]),
        (DOLLY, "alpaca", ["instruction", "response", "context"]),
        ({"id": 1, "content": "a"}, "text", ["content"]),
        ({"only": "a"}, "text", ["only"]),
    ],
)
def test_columns_are_recognised(row: dict[str, Any], kind: str, columns: list[str]) -> None:
    form = recognise(row, "rows")
    assert (form.kind, list(form.columns)) == (kind, columns)


def test_columns_of_other_names_are_told() -> None:
    row = {"question": "a", "answer": "b", "talk": [ASKED, ANSWERED], "body": "c"}
    pair = recognise(row, "rows", prompt="question", completion="answer")
    assert pair.example(row, "row 1", chats=False) == Pair(prompt="a", completion="b")
    chat = recognise(row, "rows", column="talk")
    assert chat.example(row, "row 1", chats=True) == Chat(messages=[ASKED, ANSWERED])
    assert recognise(row, "rows", column="answer").example(row, "row 1", chats=True) == Plain(text="b")


def test_shares_of_other_tools_become_turns() -> None:
    told = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for value in (told, json.dumps(told)):
        made = recognise({"conversations": value}, "rows").example({"conversations": value}, "row 1", chats=True)
        assert isinstance(made, Chat)
        assert [(turn["role"], turn["content"]) for turn in made.messages] == [
            ("system", "Be brief."),
            ("user", "a"),
            ("assistant", "b"),
        ]


def test_instructions_go_through_the_template_or_alpaca_s_own_words() -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Go.", "input": None, "output": "x"},
    ]
    form = recognise(rows[0], "rows")
    for chats in (True, False):  # under Dolly's names the same
        assert recognise(DOLLY, "rows").example(DOLLY, "row", chats=chats) == form.example(rows[0], "row", chats=chats)
    asked = [form.example(row, "row", chats=True) for row in rows]
    assert [each.messages[0]["content"] for each in asked if isinstance(each, Chat)] == ["Add.\n\n1 2", "Go."]
    first, second = (form.example(row, "row", chats=False) for row in rows)
    assert isinstance(first, Pair) and first.prompt.endswith(  # noqa: PT018
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert isinstance(second, Pair) and "### Input" not in second.prompt  # noqa: PT018
    assert second.completion == "x"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"question": "a", "answer": "b"}], {}, r"'question', 'answer', which are none of .* --data.prompt NAME"),
        ([{"question": "a", "answer": "b"}], {"prompt": "question", "completion": "answr"}, r"did you mean 'answer'"),
        ([{"a": "b"}], {"column": "c"}, r"no column 'c'.*; it has 'a'"),
        ([PAIR], {"column": "prompt", "prompt": "prompt"}, r"--data.column is of plain text or chats"),
        ([PAIR, {"prompt": "x", "completion": 3}], {}, r"line 2: 'completion' is a number, and .* should be text"),
        ([{"text": "x"}, {"text": ["y"]}], {}, r"line 2: 'text' is a list, .* a column holds one kind"),
        (
            [{"messages": [ASKED, ANSWERED]}, {"messages": "hello"}],
            {},
            r"line 2: 'messages' is text, and should be a list",
        ),
        ([{"messages": [ASKED, {"role": "asistant", "content": ""}]}], {}, r"'asistant' \(did you mean 'assistant'"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], {}, r"something else than text"),
        ([{"prompt": "x", "completion": " "}], {}, r"every answer is empty"),
        ([], {}, r"holds nothing to train on"),
        ([PAIR], {"chat_template": "chatlm"}, r"is no file \(did you mean 'chatml'\?\)"),
        ([PAIR], {"tokenizer": "bytes"}, r"a pre-trained model is fine-tuned with its own"),
        ([PAIR], {"tokenizer": ""}, r"--model.path MODEL brings its own"),
        ([PAIR], {"context": 1}, r"at least 2 tokens"),
        ([PAIR], {"val_fraction": 2.0}, r"at least 0 and below 1"),
        ([PAIR], {"val_fraction": 0.5}, r"leave nothing to train on"),
    ],
)
def test_what_is_refused(write: Write, folder: Path, rows: list[Any], options: dict[str, Any], message: str) -> None:
    path = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    how = {"tokenizer": str(folder), "val_fraction": 0.0, "test_fraction": 0.0} | options
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        examples(str(path), **how)


def test_every_kind_of_file_says_the_same(write: Write, folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Why {n}?", "completion": f" It, is {n}."} for n in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = "prompt,completion\n" + "".join(f'{row["prompt"]},"{row["completion"]}"\n' for row in rows)
    write("folder/train.jsonl", lines)
    write("folder/validation.jsonl", lines)
    places = [write("a.jsonl", lines), write("a.json", json.dumps(rows)), write("a.csv", table), tmp_path / "folder"]
    parquet = pytest.importorskip("pyarrow.parquet")
    table_of = pytest.importorskip("pyarrow").Table.from_pylist
    parquet.write_table(table_of(rows), tmp_path / "a.parquet")
    pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    places += [tmp_path / "a.parquet", tmp_path / "saved"]
    found = []
    for place in places:
        own = {} if place.name == "folder" else {"val_fraction": 0.0, "test_fraction": 0.0}
        data = examples(str(place), tokenizer=str(folder), **own)
        found.append(texts(data))
        assert len(data.encoded.get("val", ())) == (4 if place.name == "folder" else 0)
    assert all(each == found[0] for each in found[1:])
    assert found[0] == [f"<s>Why {n}? It, is {n}.</s>" for n in range(4)]


# What counts


def test_special_tokens_are_themselves_and_bos_and_eos_as_the_tokenizer_s(write: Write, folder: Path) -> None:
    data = read(write, [{"prompt": "a<|im_end|>b", "completion": "c</s>"}, {"text": "x", **PAIR}], folder)
    first, second = data.encoded["train"]
    own = data.tokenizer.backend
    assert own.convert_tokens_to_ids("<|im_end|>") in first.ids
    assert [texts(data), answers(data)] == [
        ["<s>a<|im_end|>b" + "c</s>", "<s>Why? It is.</s>"],
        ["c</s>", " It is.</s>"],
    ]
    assert first.ids[0] == second.ids[0] == own.bos_token_id
    assert list(second.ids).count(own.eos_token_id) == 1


def test_only_the_assistant_s_turns_count(write: Write, folder: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "Brief."}, ASKED, ANSWERED, *MORE]}]
    data = read(write, rows, folder)
    assert answers(data) == ["A picture<|im_end|>\nIt is made<|im_end|>\n"]
    assert texts(data)[0].startswith("<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nWhat is light?")
    everything = read(write, rows, folder, loss="all").encoded["train"][0]
    assert everything.count.all()
    assert everything.scored == len(everything) - 1
    assert "through the chat template; only the answers count" in data.notes[0]


def test_a_template_that_writes_the_last_answer_otherwise_makes_an_example_of_each(
    write: Write, tmp_path: Path
) -> None:
    data = read(write, [{"messages": [ASKED, ANSWERED, *MORE]}], saved(tmp_path / "m", "qwen3", template=THINKING))
    think = "<think>\n\n</think>\n\n"
    assert answers(data) == [f"{think}A picture<|im_end|>\n", f"{think}It is made<|im_end|>\n"]
    assert think not in texts(data)[1].partition("It is made")[0].partition("Why?")[0]
    assert any("1 chats are learnt answer by answer" in note for note in data.notes)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, [ASKED, ANSWERED], r"has no chat template: .* --data.chat_template"),
        (TURNS, [{"role": "system", "content": "x"}, ASKED, ANSWERED], r"line 1: .* System role not supported"),
        (
            "{{ messages[-1]['content'] }}",
            [ASKED, ANSWERED],
            r"line 1: .* leaves out turn 1 \(user: …'What is light\?'\)",
        ),
        ("{% for m in messages %}", [ASKED, ANSWERED], r"refuses these turns"),
    ],
)
def test_templates_that_cannot_say_a_chat(
    write: Write, tmp_path: Path, template: str | None, messages: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(write, [{"messages": messages}], saved(tmp_path / "m", "llama", template=template))


def test_a_template_may_be_given(write: Write, tmp_path: Path) -> None:
    model = saved(tmp_path / "m", "llama", template=None)
    rows = [{"messages": [ASKED, ANSWERED]}]
    data = read(write, rows, model, chat_template="plain")
    assert texts(data) == ["<s>### User:\nWhat is light?\n\n### Assistant:\nA picture</s>\n\n"]
    assert answers(data) == ["A picture</s>\n\n"]
    own = write("mine.jinja", "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    assert texts(read(write, rows, model, chat_template=str(own))) == ["What is light?</s>A picture</s>"]
    data.write_facts(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run" / "tokenizer").fingerprint == data.tokenizer.fingerprint
    assert not [note for note in data.notes if "nothing teaches the model to stop" in note]
    endless = write("endless.jinja", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert "nothing teaches the model to stop" in read(write, rows, model, chat_template=str(endless)).notes[-1]


# Rows


@given(st.lists(st.integers(1, 9), max_size=40))
def test_packing_loses_nothing_and_fits(lengths: list[int]) -> None:
    rows = packed(lengths, 9)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[n] for n in row) <= 9 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 9) * 2 + 1


def test_labels_stay_within_an_example() -> None:
    first = Encoded(ids=np.array([5, 6, 7], np.int32), count=np.array([False, True, True]))
    second = Encoded(ids=np.array([8, 9], np.int32), count=np.array([True, True]))
    batch = ExampleRows([first, second], [[0, 1], [1]], positions=True).rows(np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, -100, 9, -100], [9, -100, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_of_a_row_do_not_see_each_other(write: Write, tmp_path: Path, family: str) -> None:
    """The loss of packed rows is that of the examples alone, and so are its gradients."""
    path = saved(tmp_path / "m", family)
    model = load_pretrained(str(path))
    assert keeps_apart(model)
    rows = [{"prompt": "Why? " * n, "completion": " It is. " * (9 - n)} for n in range(1, 9)]
    found = {}
    for packing in ("packed", "padded"):
        data = read(write, rows, path, packing=packing).for_model(model)
        assert len(data.rows("train")) == (8 if packing == "padded" else 2)
        model.zero_grad()
        loss = sum(
            next_token_loss(model, data.rows("train").rows(np.array([n]))) for n in range(len(data.rows("train")))
        )
        loss.backward()
        found[packing] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for ours, alone in zip(found["packed"], found["padded"], strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_the_loss_in_chunks_keeps_them_apart_too(
    write: Write, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "m", family)
    model = load_pretrained(str(path))
    batch = (
        read(write, [{**PAIR, "prompt": "Why? " * n} for n in range(1, 9)], path).for_model(model).train(1, 0).batch(0)
    )
    whole = float(next_token_loss(model, batch))
    monkeypatch.setattr("lowrank.models.text.CHUNK_ABOVE", 400 * 16)
    assert float(next_token_loss(model, batch)) == pytest.approx(whole, rel=1e-5)


class Blind(torch.nn.Module):
    """A model without a notion of positions: everything before is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(400, 8)
        self.config = None

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, use_cache: bool = False) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.embedding(input_ids).cumsum(1))


def test_a_model_that_does_not_keep_them_apart_gets_padding(write: Write, folder: Path) -> None:
    assert not keeps_apart(Blind())
    data = read(write, [PAIR] * 3, folder).for_model(Blind())
    assert "position_ids" not in data.train(2, 0).batch(0)
    assert "this model cannot keep packed ones apart" in data.notes[-1]
    with pytest.raises(ValueError, match="packed: this model would let"):
        read(write, [PAIR], folder, packing="packed").for_model(Blind())


def test_a_split_without_any_answer_is_not_there(tmp_path: Path, folder: Path) -> None:
    for name, answer in (("train", "b"), ("validation", " ")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "a", "completion": answer}))
    data = examples(str(tmp_path), tokenizer=str(folder))
    assert (data.has("train"), data.has("val")) == (True, False)


def test_what_is_too_long_is_cut_and_counted(write: Write, folder: Path) -> None:
    model = load_pretrained(str(folder))
    rows = [
        PAIR,
        {"prompt": "Why?", "completion": " it" * 60},
        {"prompt": "Why?" * 60, "completion": "!"},
        {**PAIR, "completion": ""},
    ]
    data = read(write, rows, folder, context=24).for_model(model)
    assert [len(each) for each in data.encoded["train"]][1] == 24
    assert len(data.encoded["train"]) == 2
    said = "\n".join(data.notes)
    assert "2 examples longer than 24 tokens are cut" in said
    assert "1 of them have no answer left, and are left out" in said
    assert "1 rows without an answer are left out" in said
    with pytest.raises(ValueError, match=r"none of 1 examples has an answer within --data.context 24"):
        read(write, rows[2:3], folder, context=24).for_model(model)
    with pytest.raises(ValueError, match=r"--data.context 999 is beyond the 256 positions"):
        read(write, rows, folder, context=999).for_model(model)


def test_long_texts_are_divided(write: Write, folder: Path) -> None:
    data = read(write, [{"text": "it is " * 100}], folder)
    whole = data.encoded["train"][0]
    parts = data.for_model(load_pretrained(str(folder)))
    assert sum(len(each) for each in parts.encoded["train"]) == len(whole)
    assert max(len(each) for each in parts.encoded["train"]) <= 256
    assert parts.context == 256


def test_a_held_out_part_does_not_depend_on_order(write: Write, folder: Path) -> None:
    for count in (40, 400):
        rows = [{"prompt": f"Why {n}?", "completion": f"{n}"} for n in range(count)]
        one = read(write, rows, folder, val_fraction=None, test_fraction=None)
        other = read(write, rows[::-1], folder, val_fraction=None, test_fraction=None)
        for split in ("train", "val", "test"):
            ids = [{each.ids.tobytes() for each in data.encoded[split]} for data in (one, other)]
            assert ids[0] == ids[1]
        assert sum(map(len, one.encoded.values())) == count
        assert 0.01 * count < len(one.encoded["val"]) < 0.1 * count


# Whose tokenizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"size": 420}, "has ids up to 39[0-9], and .* knows 388"),
        ({"special": True}, "is of another family than the one of"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(
    write: Write, folder: Path, tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    if "special" in other:
        backend = tokenizer().backend_tokenizer.to_str()
        content = json.loads(backend)
        vocabulary = content["model"]["vocab"]
        names = sorted(vocabulary, key=vocabulary.get)
        content["model"]["vocab"] = dict(zip(names[:4] + names[:3:-1], sorted(vocabulary.values()), strict=True))
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        own = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>"
        )
    else:
        own = tokenizer()
        own.add_tokens([f"<extra_{n}>" for n in range(9)])
    own.save_pretrained(tmp_path / "other")
    data = read(write, [PAIR], tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        data.for_model(load_pretrained(str(folder)))


def test_the_tokenizer_of_a_run_is_the_model_s(write: Write, folder: Path, tmp_path: Path) -> None:
    data = read(write, [PAIR], folder)
    data.write_facts(tmp_path / "run")
    again = read(write, [PAIR], tmp_path / "run" / "tokenizer")
    assert again.tokenizer.fingerprint == data.tokenizer.fingerprint
    assert again.for_model(load_pretrained(str(folder))).learnt_by(data).fingerprint == data.fingerprint
