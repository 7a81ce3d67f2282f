"""Adapters as small files of their own, and many of them on one base model (MeLo, arXiv 2311.08236).

An adapter is a folder of two files:

    folder/adapter.safetensors   the factors, the head, and whatever else was trained
    folder/adapter.json          method, model, classes, how images are read, and a digest of every weight of the base
                                 that the adapter was trained on: on another base it is refused

A bank holds one base and any number of adapters:

    bank = AdapterBank(model)                 # a plain model; its weights are never changed
    bank.load("adapters/pneumonia")
    bank.load("adapters/skin")
    bank.use("skin")(images)                  # nothing is loaded or copied: layers and the head are put in
    bank.use(None)                            # the base itself
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank.adapters.layers import AdaptedLayer, adapted_layers, replace
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint_files import written_by
from lowrank.infra.convert import nearest
from lowrank.infra.files import read_json, refuse_filled, user_mode_, write_json
from lowrank.infra.fingerprints import digest_of as digest
from lowrank.infra.text import some
from lowrank.methods import METHODS
from lowrank.plan.plan import Plan, apply_
from lowrank.run.overrides import TASKS
from lowrank.run.run import Call
from lowrank.run.session import Session, checkpoint_of, restore

FORMAT = 1
ADAPTER = ".adapters."


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What must be known to put an adapter to use.

    ``base``: parameter name → digest, of every weight that the adapter leaves as it is; empty: not known, not checked.
    ``reading``: how image files become arrays (size, window, fit, grey); ``spec``: how arrays become the model's input.
    """

    method: Call
    model: Call
    seed: int = 0
    task: str = "images"
    kind: str = "multi-class"
    classes: tuple[str, ...] = ()
    reading: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        calls = {"method": self.method.to_json(), "model": self.model.to_json()}
        return {**written_by(), "format": FORMAT, **plain, **calls, "classes": list(self.classes)}

    def data(self) -> Any:
        """Classes and the way of reading images, for a model or a prediction.

        Raises:
            ValueError: the adapter does not say how images are read.
        """
        facts = {"kind": self.kind, "classes": self.classes, "reading": self.reading, "spec": self.spec}
        known = self.task in TASKS and self.reading and self.spec
        if not known or (found := TASKS[self.task]().learnt(facts, ())) is None:
            raise ValueError(
                "the adapter does not say what its images are like: it is for another task, or of LoRA-ViT"
            )
        return found

    @staticmethod
    def from_json(content: Mapping[str, Any], where: object) -> AdapterInfo:
        known = AdapterInfo.__dataclass_fields__
        if not isinstance(content, Mapping):
            raise ValueError(f"an adapter is written as an object, got {content!r}")
        found = content.get("format")
        if isinstance(found, int) and found > FORMAT:
            raise ValueError(
                f"{where} is of format {found}, written by lowrank {content.get('version', 'of a later version')}; "
                f"this is lowrank {written_by()['version']}, which reads up to format {FORMAT}: use the version that "
                "wrote it, or a newer one"
            )
        if found != FORMAT or not {"method", "model"} <= content.keys():
            raise ValueError(f"{where} holds no adapter of format {FORMAT}: it says format {found!r}")
        given: dict[str, Any] = {name: value for name, value in content.items() if name in known}
        calls: dict[str, Any] = {name: Call.from_json(given.pop(name)) for name in ("method", "model")}
        for name, default in (("reading", {}), ("spec", {}), ("base", {}), ("metrics", {}), ("classes", [])):
            if not isinstance(given.get(name, default), type(default)):
                raise ValueError(f"{name} is written as {type(default).__name__}, got {given[name]!r}")
        classes = tuple(content.get("classes", ()))
        if len(set(classes)) != len(classes):
            raise ValueError(f"classes are told apart by their names, got {', '.join(classes)}")
        if type(given.get("seed", 0)) is not int or not 0 <= given.get("seed", 0) < 2**63:
            raise ValueError(f"seed {given['seed']!r} must be a whole number of at least 0 and below 2^63")
        return AdapterInfo(**calls, **given | {"classes": classes})


def export_adapter(source: Path, out: Path, *, which: str = "best") -> AdapterInfo:
    """Write the adapter of a run: what it trained, and nothing of its base.

    Args:
        source: a run's folder or one of its checkpoints.
        out: the adapter's folder; must be empty or missing.
        which: best or latest.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the run has no adapter apart from its weights.
    """
    session, step = restored_for(out, source, which)
    run, plan = session.run, session.plan
    _refuse_inseparable(plan, source)
    tensors = trained_tensors(plan)
    saved = checkpoint.load(checkpoint_of(source, which))  # type: ignore[arg-type]
    info = AdapterInfo(
        method=run.method,
        model=run.model,
        seed=run.seed,
        task=run.task,
        base={row.name: digest(dict(plan.model.named_parameters())[row.name]) for row in plan.rows if row.rule is None},
        origin=f"{source} at step {step}",
        metrics=saved.meta["metrics"],
        **{n: value for n, value in session.data.to_json().items() if n in ("kind", "classes", "reading", "spec")},
    )
    write_adapter(out, info, tensors)
    return info


def restored_for(out: Path, source: Path, which: str) -> tuple[Session, int]:
    """(session, step) of a run or checkpoint that is to be exported into the folder ``out``.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: no such kind of checkpoint.
    """
    if which not in ("best", "latest"):
        raise ValueError(f"--checkpoint {which}: it is best or latest")
    refuse_filled(out)
    return restore(source, which, device="cpu")  # type: ignore[arg-type]


def write_adapter(out: Path, info: AdapterInfo, tensors: Mapping[str, Tensor]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.detach().contiguous() for name, t in tensors.items()}, out / "adapter.safetensors", {"format": "pt"}
    )
    user_mode_(out)
    write_json(out / "adapter.json", info.to_json())


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / "adapter_config.json").is_file()


def read_adapter(folder: Path) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """An adapter's description and tensors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the files cannot be read.
    """
    for name in ("adapter.json", "adapter.safetensors"):
        if not (folder / name).is_file():
            hint = "; lowrank export RUN --adapter OUT makes one of a run" if (folder / "run.json").is_file() else ""
            raise FileNotFoundError(f"{folder} is no adapter's folder: it has no {name}{hint}")
    try:
        info = AdapterInfo.from_json(read_json(folder / "adapter.json"), folder)
        if info.reading and info.spec:
            info.data()  # says what does not fit
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder}/adapter.json cannot be read: {error}") from error
    try:
        tensors = load_file(folder / "adapter.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder}/adapter.safetensors is damaged ({error}): get it again") from error
    return info, tensors


def trained_tensors(plan: Plan) -> dict[str, Tensor]:
    """Everything that ``plan`` trains, and what its adapters keep beside it, by name."""
    trained = {row.name for row in plan.rows if row.rule is not None}
    return {name: t for name, t in plan.model.state_dict().items() if ADAPTER in name or name in trained}


def _refuse_inseparable(plan: Plan, source: Path) -> None:
    instead = f"; lowrank export {source} OUT writes the whole model"
    if plan.method.merge is not None:
        raise ValueError(f"{plan.method.name} merges its factors into the weights: no adapter is left apart{instead}")
    plain = sum(row.numel for row in plan.rows if row.rule is not None and ADAPTER not in row.name)
    if not plan.adapters and 2 * plain > plan.parameters_total:
        raise ValueError(f"{plan.method.name} trains the weights themselves: there is no adapter{instead}")


# --- many adapters on one base ---------------------------------------------------------------------------------------


@dataclass
class _Installed:
    """An adapter ready for use: adapted layers by name, and its own parameters that replace some of the base's."""

    info: AdapterInfo
    layers: dict[str, AdaptedLayer]
    own: dict[str, nn.Parameter]


class AdapterBank:
    """One base model with many adapters, at most one of them in use.

    ``model`` is plain when it comes, and plain again after ``use(None)``; its parameters are never written to.
    """

    def __init__(self, model: nn.Module):
        if next(adapted_layers(model), None) is not None:
            raise ValueError("the base of an AdapterBank is a plain model; lowrank.merge_and_unload(model) makes one")
        self.model = model
        self.current: str | None = None
        self._base = dict(model.named_parameters())
        every = list(model.named_parameters(remove_duplicate=False))
        self._names = {n: [each for each, p in every if p is own] for n, own in self._base.items()}  # tied: several
        self._digests: dict[str, str] = {}
        self._known: dict[str, _Installed] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters loaded."""
        return tuple(self._known)

    def info(self, name: str) -> AdapterInfo:
        """What an adapter says of itself."""
        return self._find(name).info

    def parts(self, name: str) -> tuple[Mapping[str, AdaptedLayer], Mapping[str, Tensor]]:
        """An adapter's layers, and the parameters that it has in the place of the base's."""
        found = self._find(name)
        return found.layers, found.own

    def load(self, folder: Path | str, name: str | None = None) -> str:
        """Load an adapter from its folder, ours or PEFT's, and return its name (the folder's by default); it is not
        put in use.

        Raises:
            FileNotFoundError, ValueError: there is none, or it is for another base, shape or task.
        """
        path = Path(folder)
        name = name or path.resolve().name
        if is_peft(path):
            from lowrank.interop.peft import read_peft  # which is made of this file

            before = self.current
            try:
                found = read_peft(path, self.use(None))
            finally:
                self.use(before)
        else:
            found = read_adapter(path)
        self.add(name, *found)
        return name

    def add(self, name: str, info: AdapterInfo, tensors: Mapping[str, Tensor]) -> None:
        """Add an adapter from memory; it is not put in use.

        Raises:
            ValueError: the name is taken, or the adapter does not fit the base; nothing has changed.
        """
        if name in self._known:
            raise ValueError(f"an adapter {name!r} is loaded already; give another name")
        own = {n: self._own(name, n, t) for n, t in tensors.items() if ADAPTER not in n}
        self._check(name, info, own)
        before, flags = self.current, {n: p.requires_grad for n, p in self._base.items()}
        self.use(None)
        try:
            self._known[name] = _Installed(info, self._layers(name, info, tensors, own), own)
        finally:  # also where it is refused: what was in use is in use again
            self._restore_parameters()
            for n, p in self._base.items():
                p.requires_grad_(flags[n])
            self.use(before)

    def use(self, name: str | None) -> nn.Module:
        """Put an adapter in, or with None take it out; returns the model.

        Raises:
            ValueError: no adapter of that name is loaded.
        """
        chosen = None if name is None else self._find(name)
        if self.current is not None:
            for layer_name, layer in self._known[self.current].layers.items():
                replace(self.model, layer_name, layer.original())
            self._restore_parameters()
            self.current = None
        if chosen is not None:
            self._put_parameters(chosen.own)
            device = next(iter(self._base.values())).device
            for layer_name, layer in chosen.layers.items():
                layer.adapters.to(device)
                replace(self.model, layer_name, layer.train(self.model.training))
            self.current = name
        return self.model

    def _find(self, name: str) -> _Installed:
        if name not in self._known:
            loaded = ", ".join(self._known) or "none"
            raise ValueError(f"no adapter {name!r} is loaded{nearest(name, self._known)}; loaded are {loaded}")
        return self._known[name]

    def _layers(
        self, name: str, info: AdapterInfo, tensors: Mapping[str, Tensor], own: dict[str, nn.Parameter]
    ) -> dict[str, AdaptedLayer]:
        """The adapted layers, made by the method itself and filled; the model is plain again afterwards."""
        if info.method.name not in METHODS:
            raise ValueError(f"the adapter {name!r} is made by {info.method.name!r}, a method that is not known here")
        self._put_parameters(own)
        wanted = {n: t for n, t in tensors.items() if ADAPTER in n}
        if not wanted:
            return {}
        try:
            method = METHODS[info.method.name](**info.method.args)
        except TypeError as error:
            raise ValueError(f"the adapter {name!r}: its method does not take what it says: {error}") from error
        apply_(self.model, method, seed=info.seed)
        layers = dict(adapted_layers(self.model))
        try:
            ours = {n: t for n, t in self.model.state_dict().items() if ADAPTER in n}
            wrong = [n for n in ours if n not in wanted or wanted[n].shape != ours[n].shape] + [
                n for n in wanted if n not in ours
            ]
            wrong += [n for n in ours if not wrong and ours[n].is_floating_point() != wanted[n].is_floating_point()]
            if wrong:
                raise ValueError(f"the adapter {name!r} does not fit the base at {some(wrong)}")
            self.model.load_state_dict(wanted, strict=False)
        finally:
            for layer_name, layer in layers.items():
                replace(self.model, layer_name, layer.original())
        for layer in layers.values():
            layer.adapters.requires_grad_(False)
        return layers

    def _own(self, name: str, key: str, t: Tensor) -> nn.Parameter:
        """A parameter of the adapter's own, of the base's dtype."""
        if not t.is_floating_point():
            raise ValueError(f"the adapter {name!r} is damaged: {key} is {t.dtype}, and no weight is")
        wanted = self._base[key].dtype if key in self._base else t.dtype
        return nn.Parameter(t.to(wanted, copy=True), requires_grad=False)

    def _check(self, name: str, info: AdapterInfo, own: Mapping[str, Tensor]) -> None:
        missing = [n for n in (*info.base, *own) if n not in self._base]
        if missing:
            raise ValueError(f"the adapter {name!r} is for another model: the base has no {some(missing)}")
        for n, t in own.items():
            if t.dim() != self._base[n].dim() or (t.shape != self._base[n].shape and not _is_head(n, t, self._base[n])):
                raise ValueError(
                    f"the adapter {name!r} is for another shape: {n} is {tuple(t.shape)}, the base's "
                    f"{tuple(self._base[n].shape)}"
                )
        for n in info.base:
            if n not in self._digests:
                self._digests[n] = digest(self._base[n])
        other = [n for n, wanted in info.base.items() if self._digests[n] != wanted]
        if other:
            raise ValueError(
                f"the adapter {name!r} was trained on another base: {len(other)} of {len(info.base)} weights differ, "
                f"{some(other)}; its own is {info.model.name} with {dict(info.model.args)}, seed {info.seed}"
            )

    def _put_parameters(self, own: Mapping[str, nn.Parameter]) -> None:
        device = next(iter(self._base.values())).device
        for n, p in own.items():
            p.data = p.data.to(device)
            self._set_parameter(n, p)

    def _restore_parameters(self) -> None:
        for n, p in self._base.items():
            self._set_parameter(n, p)

    def _set_parameter(self, name: str, p: nn.Parameter) -> None:
        for each in self._names[name]:
            owner, _, leaf = each.rpartition(".")
            self.model.get_submodule(owner)._parameters[leaf] = p


def _is_head(name: str, own: Tensor, base: Tensor) -> bool:
    """Whether two tensors may differ in their first dimension: outputs, of which every task has its own number."""
    return name.split(".")[0] in ("head", "head_dist", "classifier", "score", "fc") and own.shape[1:] == base.shape[1:]
