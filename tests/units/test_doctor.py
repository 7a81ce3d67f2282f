"""The doctor: every broken example is named for what it is, sound training is not, and nothing of a run is altered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.cli import main
from lowrank.doctor import Fault

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BROKEN = {
    "clipping": "clipping without effect",
    "ddp_first": "DDP before conversion",
    "decay": "decay on factors",
    "frozen_head": "frozen head",
    "micro_batches": "a step a micro-batch",
    "never_called": "never called",
    "no_compression": "no compression",
    "no_gradient": "no gradient",
    "no_group": "in no group",
    "rounding": "rounded away",
    "two_groups": "in two groups",
    "zero_scale": "zero scale",
}
# One process imports everything; each script then runs in a fork of it.
FORKS = """
import os, sys, torch, timm, lowrank, lowrank.adapters, lowrank.optim
from pathlib import Path
from lowrank.doctor.script import _main
torch.set_num_threads(1)
folder = Path(sys.argv[1])
for script in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        _main(folder / (Path(script).stem + ".json"), script, [])
    assert os.waitpid(child, 0)[1] == 0, script
"""


def test_every_broken_example_has_its_fault_and_no_other(tmp_path: Path) -> None:
    scripts = sorted((EXAMPLES / "broken").glob("*.py"))
    assert {script.stem for script in scripts} == set(BROKEN)
    subprocess.run([sys.executable, "-c", FORKS, tmp_path, *scripts], check=True, timeout=120)
    for script in scripts:
        faults = [Fault(**each) for each in json.loads((tmp_path / f"{script.stem}.json").read_text())]
        assert [fault.kind for fault in faults] == [BROKEN[script.stem]], script
        (fault,) = faults
        name, line, text = (fault.where or "").split(":", 2)
        assert Path(name).name == script.name
        assert text.strip()
        assert text.strip() == script.read_text().splitlines()[int(line) - 1].strip()


def test_the_command(capsys: pytest.CaptureFixture[str], write: Callable[[str, str], Path]) -> None:
    assert main(["doctor", str(EXAMPLES / "broken" / "zero_scale.py")]) == 1
    out = capsys.readouterr().out
    assert "fault: zero scale: 0.scale is 0" in out
    assert "alpha // rank" in out
    assert "change: divide truly" in out
    sound = """
        import sys, torch
        assert sys.argv[1:] == ["--lr", "0.1"]
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=float(sys.argv[2]))
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    """
    script = write("sound.py", "\n".join(line[8:] for line in sound.splitlines()))
    assert main(["doctor", str(script), "--", "--lr", "0.1"]) == 0
    assert "nothing wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("import time; time.sleep(60)", ["--seconds", "1"], "not over after 1 seconds"),
        ("print('hello'); 1 / 0", [], "ended before the first step.*hello.*ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", [], "killed from outside, by the system if memory ran out"),
        (None, [], "not a file"),
        ("", ["--seconds", "0"], "must be above 0"),
    ],
)
def test_scripts_that_do_not_get_there(
    source: str | None, options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    if source is not None:
        script.write_text(source)
    assert main(["doctor", str(script), *options]) == 2
    assert re.search(words, capsys.readouterr().err, re.DOTALL)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("name", ["full", "lora", "dora", "lte", "galore", "galore_8bit", "fira", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_methods_are_sound_and_a_check_changes_nothing(name: str, dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    wanted = {"rank": 2} if name not in ("full", "muon") else {}
    if name in ("lora", "dora", "lte"):
        wanted |= {"target_modules": "0,3", "rest": "train"}
    opt = lowrank.apply_(model, getattr(lowrank.methods, name)(**wanted)).optimizer(lr=1e-2, weight_decay=0.1)
    before, chance = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    state = str(opt.state_dict())
    x, y = batch()
    assert lowrank.check(model, opt, (x.to(dtype), y), loss) == []
    assert torch.equal(chance, torch.get_rng_state())
    assert str(opt.state_dict()) == state
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Projector:
    pass


class Foreign(torch.optim.SGD):
    """Keeps an object in its state and never moves the first parameter, as two published optimizers do."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        first = self.param_groups[0]["params"][0]
        before = first.detach().clone()
        super().step()
        with torch.no_grad():
            first.copy_(before)
        self.state[first]["projector"] = Projector()


def found(model: nn.Module, opt: torch.optim.Optimizer) -> set[str]:
    return {fault.kind for fault in lowrank.check(model, opt, batch(), loss)}


def test_faults_of_published_code() -> None:
    model = mlp()
    assert found(model, Foreign(model.parameters(), lr=0.1)) == {"not stepped", "state that does not load"}

    model = mlp()  # the ancestor's: GaLore's group holds the frozen weights of converted layers
    plan = lowrank.apply_(model, lowrank.methods.lora(target_modules="0,3", rank=2, rest="train"))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [{"params": [p for p in model.parameters() if p.requires_grad]}, {"params": frozen, "rank": 4}]
    assert found(plan.model, torch.optim.SGD(trained, lr=0.1)) == {"frozen in a group"}

    model = mlp()  # LTE's: biases frozen for the whole of a training from scratch
    lowrank.apply_(model, lowrank.methods.lora(target_modules="0,3", rank=2, rest="train"))
    model[0].bias.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    assert found(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)) == {"frozen biases"}

    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))  # LTE's: storage shared, but not the parameter
    model.insert(1, nn.Linear(12, 12))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert found(model, torch.optim.SGD(model.parameters(), 0.1)) == {"weights tied no more"}


def test_what_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    opt = lowrank.apply_(model, lowrank.methods.galore(rank=2)).optimizer(per_layer=True)
    with pytest.raises(ValueError, match="lowrank doctor SCRIPT"):
        lowrank.check(model, opt, batch(), loss)
    model = mlp()
    plain = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="give loss=lambda"):
        lowrank.check(model, plain, batch())
    monkeypatch.setattr("lowrank.doctor.check.available_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="no copy of the model fits"):
        lowrank.check(model, plain, batch(), loss)
