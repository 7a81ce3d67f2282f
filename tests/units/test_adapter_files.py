"""Adapters as files: exported, loaded, switched on one base that stays as it is; LoRA-ViT's files; what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import gpt2, images, nudge_, output, tokens, vit
from torch import Tensor, nn

import lowrank
from lowrank.data.images.decode import Reading
from lowrank.data.images.set import ImageSpec
from lowrank.interop import AdapterBank, AdapterInfo, read_adapter, read_lora_vit, write_adapter
from lowrank.interop.adapter_bank import digest, trained_tensors
from lowrank.models.segmenter import Segmenter
from lowrank.run.run import Call

KINDS = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "pissa": {"rank": 2},
    "multihead_lora": {"rank": 2, "heads": 2},
    "linear_probe": {},
    "apla": {},
}


def trained(name: str, seed: int, classes: int = 3) -> tuple[AdapterInfo, dict[str, Tensor], Tensor]:
    """An adapter and head trained on the common base, and what the trained model says."""
    model = vit()
    torch.manual_seed(seed)
    model.head = nn.Linear(8, classes)
    lowrank.mark_loaded_(model, [n for n, _ in model.named_parameters() if not n.startswith("head.")])
    plan = lowrank.apply_(model, lowrank.METHODS[name](**KINDS[name]), seed=seed)
    nudge_(model, seed=seed)
    info = AdapterInfo(
        method=Call(name=name, args=KINDS[name]),
        model=Call(name="vit"),
        seed=seed,
        classes=tuple(map(str, range(classes))),
        reading=asdict(Reading(size=16)),
        spec=asdict(ImageSpec(size=16)),
        base={row.name: digest(dict(model.named_parameters())[row.name]) for row in plan.rows if row.rule is None},
    )
    tensors = {name: t.clone() for name, t in trained_tensors(plan).items()}
    with torch.no_grad():
        return info, tensors, output(model.eval(), images())


def say(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model.eval(), images())


@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_is_what_is_read_and_used(tmp_path: Path, name: str) -> None:
    info, tensors, expected = trained(name, seed=1)
    write_adapter(tmp_path, info, tensors)
    again, stored = read_adapter(tmp_path)
    assert json.loads(json.dumps(info.to_json())) == json.loads(json.dumps(again.to_json()))
    assert stored.keys() == tensors.keys()
    bank = AdapterBank(vit())
    assert bank.load(tmp_path, "mine") == "mine"
    torch.testing.assert_close(say(bank.use("mine")), expected, rtol=0, atol=1e-6)


def test_many_tasks_on_one_base_which_stays_as_it_was() -> None:
    base = vit()
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in base.named_parameters()}
    keys, plain = list(base.state_dict()), say(base)
    bank = AdapterBank(base)
    expected = {}
    for number, (name, classes) in enumerate({"lora": 5, "dora": 2, "pissa": 3, "linear_probe": 4}.items()):
        info, tensors, expected[name] = trained(name, seed=number, classes=classes)
        bank.add(name, info, tensors)
        assert bank.current is None
    for name in ("lora", "pissa", "linear_probe", "dora", "lora", None, "dora"):
        wanted = plain if name is None else expected[name]
        torch.testing.assert_close(say(bank.use(name)), wanted, rtol=0, atol=1e-6)
    bank.use(None)
    assert list(base.state_dict()) == keys
    for n, p in base.named_parameters():
        assert (p.data_ptr(), p.requires_grad) == (before[n][0], True)
        assert torch.equal(p, before[n][1])
    assert bank.names == ("lora", "dora", "pissa", "linear_probe")


def test_an_adapter_added_while_another_is_in_use_does_not_disturb_it() -> None:
    bank = AdapterBank(vit())
    info, tensors, expected = trained("lora", 1)
    bank.add("a", info, tensors)
    model = bank.use("a")
    bank.add("b", *trained("dora", 2)[:2])
    assert bank.current == "a"
    torch.testing.assert_close(say(model), expected, rtol=0, atol=1e-6)


def test_rest_trained_from_scratch_travels_too() -> None:
    """Tied parameters under all their names."""
    model = gpt2()
    plan = lowrank.apply_(model, lowrank.methods.lora(rank=2, rest="train"))
    with torch.no_grad():
        model.transformer.wte.weight += 0.1
        expected = output(model.eval(), tokens())
        bank = AdapterBank(gpt2())
        info = AdapterInfo(method=Call(name="lora", args={"rank": 2, "rest": "train"}), model=Call(name="gpt2"))
        bank.add("x", info, trained_tensors(plan))
        torch.testing.assert_close(output(bank.use("x").eval(), tokens()), expected)
        assert bank.model.lm_head.weight is bank.model.transformer.wte.weight
    model = vit()
    plan = lowrank.apply_(model, lowrank.methods.lora("all-linear", rank=2, rest="train"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1
    tensors = {n: t.clone() for n, t in trained_tensors(plan).items()}
    assert "blocks.0.attn.qkv.bias" in tensors
    assert "blocks.0.attn.qkv.weight" not in tensors
    args = {"target_modules": "all-linear", "rank": 2, "rest": "train"}
    info = AdapterInfo(method=Call(name="lora", args=args), model=Call(name="vit"))
    bank, expected = AdapterBank(vit()), say(model)
    plain = say(bank.model)
    bank.add("x", info, tensors)
    torch.testing.assert_close(say(bank.use("x")), expected, rtol=0, atol=1e-6)
    assert torch.equal(say(bank.use(None)), plain)


def refused() -> dict[str, tuple[AdapterInfo, dict[str, Tensor], str]]:
    """What does not fit the common base, with the words in which it is refused."""
    info, tensors, _ = trained("lora", 1)
    bare, factors = replace(info, base={}), [n for n in tensors if ".adapters." in n]
    unfit = replace(bare, method=Call(name="lora", args={"rank": 2, "target_modules": "nothing"}))
    return {
        "a taken name": (info, tensors, "loaded already"),
        "another base": (replace(info, base=dict.fromkeys(info.base, "0")), tensors, r"\d+ of \d+ weights differ"),
        "another model": (bare, tensors | {"fc.weight": torch.zeros(1)}, r"another model: .* has no fc\.weight"),
        "another shape": (bare, tensors | {"head.weight": torch.zeros(3, 9)}, r"head\.weight is \(3, 9\)"),
        "a missing factor": (bare, {n: t for n, t in tensors.items() if n != factors[0]}, "does not fit the base at"),
        "a factor too many": (bare, tensors | {"x.adapters.v.A": torch.zeros(1)}, r"does not fit the base at x\."),
        "other layers": (unfit, tensors, "matched no linear layer"),
        "another rank": (replace(bare, method=Call(name="lora", args={"rank": 3})), tensors, "does not fit the base"),
        "an unknown method": (replace(bare, method=Call(name="none")), tensors, "a method that is not known here"),
    }


@pytest.mark.parametrize("in_use", [None, "x"])
@pytest.mark.parametrize("case", refused())
def test_what_does_not_fit_is_refused_and_changes_nothing(case: str, in_use: str | None) -> None:
    bank = AdapterBank(vit())
    bank.add("x", *trained("lora", 7)[:2])
    before, flags = say(bank.use(in_use)), {n: p.requires_grad for n, p in bank.model.named_parameters()}
    info, tensors, says = refused()[case]
    with pytest.raises(ValueError, match=says):
        bank.add("x" if case == "a taken name" else "new", info, tensors)
    assert (bank.names, bank.current) == (("x",), in_use)
    assert torch.equal(say(bank.model), before)
    assert {n: p.requires_grad for n, p in bank.model.named_parameters()} == flags


def test_folders_that_hold_no_adapter_and_models_that_are_no_base(tmp_path: Path) -> None:
    bank = AdapterBank(vit())
    with pytest.raises(ValueError, match=r"no adapter 'y' is loaded.*loaded are none"):
        bank.use("y")
    with pytest.raises(FileNotFoundError, match=r"has no adapter\.json"):
        bank.load(tmp_path)
    (tmp_path / "adapter.json").write_text(json.dumps({"format": "7"}))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="says format '7'"):
        read_adapter(tmp_path)
    adapted = vit()
    lowrank.apply_(adapted, lowrank.methods.lora(rank=2))
    with pytest.raises(ValueError, match="is a plain model"):
        AdapterBank(adapted)


# --- LoRA-ViT --------------------------------------------------------------------------------------------------------


def lora_vit_file(path: Path, rank: int = 2, classes: int = 4) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(0)
    content = {}
    for i in range(4):  # two blocks: q, v, q, v
        content[f"w_a_{i:03d}"] = torch.randn(rank, 8, generator=noise)
        content[f"w_b_{i:03d}"] = torch.randn(8, rank, generator=noise)
    content[f"fc_8in_{classes}out"] = torch.randn(classes, 8, generator=noise)
    save_file(content, path)
    return content


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.0])
def test_files_of_lora_vit_compute_what_lora_vit_computes(tmp_path: Path, scale: float) -> None:
    content = lora_vit_file(tmp_path / "x.safetensors")
    base, by_hand = vit(), vit()
    with torch.no_grad():
        for block in range(2):
            weight = by_hand.blocks[block].attn.qkv.weight
            for rows, i in ((slice(0, 8), 2 * block), (slice(16, 24), 2 * block + 1)):
                weight[rows] += scale * content[f"w_b_{i:03d}"] @ content[f"w_a_{i:03d}"]
        by_hand.head = nn.Linear(8, 4)
        by_hand.head.weight.copy_(content["fc_8in_4out"])
        by_hand.head.bias.zero_()
    bank = AdapterBank(base)
    bank.add("melo", *read_lora_vit(tmp_path / "x.safetensors", base, scale=scale))
    torch.testing.assert_close(say(bank.use("melo")), say(by_hand), rtol=0, atol=1e-5)
    assert bank.info("melo").classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("kind", ["own", "timm", "numbered"])
def test_adapters_of_lora_vit_adapt_the_encoder_of_a_segmenter(tmp_path: Path, kind: str) -> None:
    content = lora_vit_file(tmp_path / "x.safetensors")

    def segmenter() -> Segmenter:
        torch.manual_seed(0)
        encoder: Any = vit()
        encoder.image_spec = None
        return Segmenter(encoder, 3, 1, 4)

    base, by_hand, state = segmenter(), segmenter(), {"vit.deep_lab_head.weight": torch.zeros(2)}
    for i in range(4):
        a, b, which = content[f"w_a_{i:03d}"], content[f"w_b_{i:03d}"], "qv"[i % 2]
        with torch.no_grad():
            rows = slice(0, 8) if which == "q" else slice(16, 24)
            by_hand.encoder.blocks[i // 2].attn.qkv.weight[rows] += b @ a
        own = {f"attn.proj_{which}.w_{f}.weight": t for f, t in (("a", a), ("b", b))}
        timms = {f"attn.qkv.linear_{f}_{which}.weight": t for f, t in (("a", a), ("b", b))}
        names = own if kind == "own" else timms
        state |= {f"vit.lora_vit.blocks.{i // 2}.{name}": t for name, t in names.items()}
    file = tmp_path / ("x.safetensors" if kind == "numbered" else "x.pth")
    if kind != "numbered":
        torch.save(state, file)
    bank = AdapterBank(base)
    bank.add("melo", *read_lora_vit(file, base))
    torch.testing.assert_close(say(bank.use("melo")), say(by_hand), rtol=0, atol=1e-5)


def test_other_files_are_no_adapters_of_lora_vit(tmp_path: Path) -> None:
    file, base = tmp_path / "x.safetensors", vit()
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="no file of LoRA-ViT"):
        read_lora_vit(file, base)
    content = lora_vit_file(file)
    save_file({n: t for n, t in content.items() if not n.endswith(("002", "003"))}, file)
    with pytest.raises(ValueError, match="factors for 2 matrices, and the model 4"):
        read_lora_vit(file, base)
    save_file(content | {"w_a_001": torch.zeros(2, 9)}, file)
    with pytest.raises(ValueError, match=r"do not fit blocks\.0\.attn\.qkv"):
        read_lora_vit(file, base)
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        read_lora_vit(file, base)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_lora_vit(tmp_path / "none", base)


def test_an_exported_file_holds_nothing_of_the_base(tmp_path: Path) -> None:
    info, tensors, _ = trained("lora", 1)
    write_adapter(tmp_path, info, tensors)
    names = load_file(tmp_path / "adapter.safetensors")
    assert all(".adapters." in name or name.startswith("head.") for name in names)
    assert not set(names) & set(info.base)
