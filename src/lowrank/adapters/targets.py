"""Names to layers: which modules ``target_modules`` means.

A target is one of

* a group: ``all-linear`` (every linear layer but output layers), ``attention``, ``q`` ``k`` ``v`` ``o``, ``mlp``,
  ``lm_head``, ``classifier``, ``head`` (either output), ``patch_embed`` (a ViT's convolution on its patches);
* a glob over the full name: ``*.attn.*``, ``blocks.[0-3].mlp.fc?``;
* a name, or the end of one: ``c_attn`` is every layer whose last part is that; ``attn.c_proj`` the same with two parts.

A fused projection (GPT-2's ``c_attn``, a ViT's ``qkv``: three matrices in one, when it is three times as high as wide)
also has parts, ``*.c_attn.q``, which groups ``q`` ``k`` ``v`` choose by themselves.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from lowrank.adapters.layers import WHOLE, AdaptedLayer, is_linear, size_of

Targets = str | Sequence[str]

GROUPS = ("all-linear", "attention", "q", "k", "v", "o", "mlp", "lm_head", "classifier", "head", "patch_embed")
EMBEDDINGS = "embeddings"  # a group of parameters, for rules and freeze=: embedding tables and the output layer
FUSED = {"c_attn", "qkv", "Wqkv"}
ATTENTION = ("attn", "attention")  # in a module's name, as are the next
MLP = ("mlp", "ffn", "feed_forward", "feedforward", "intermediate")
MLP_LAYERS = {"fc1", "fc2", "c_fc", "up_proj", "down_proj", "gate_proj", "dense_h_to_4h", "dense_4h_to_h"}
MLP_LAYERS |= {"w1", "w2", "w3"}
ROLE = {
    "q": {"q_proj", "query", "q_attn", "wq", "q_lin", "to_q", "q"},
    "k": {"k_proj", "key", "wk", "k_lin", "to_k", "k"},
    "v": {"v_proj", "value", "wv", "v_lin", "to_v", "v"},
    "o": {"o_proj", "out_proj", "out_lin", "wo", "c_proj", "proj", "dense", "o"},
}
OUTPUT = {
    "lm_head": {"lm_head", "embed_out"},
    "classifier": {"classifier", "classification_head", "score", "head", "heads", "head_dist", "fc"},
}


@dataclass(frozen=True)
class Layer:
    """A linear layer that a target can mean: its name, module, size, parts, and the groups it belongs to."""

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    parts: tuple[tuple[str, slice], ...]
    groups: frozenset[str]

    def rows(self, part: str) -> slice:
        return slice(0, self.out_features) if part == WHOLE else dict(self.parts)[part]

    def label(self, part: str) -> str:
        return self.name if part == WHOLE else f"{self.name}.{part}"


def linear_layers(model: nn.Module, *, adapted: bool = False) -> list[Layer]:
    """Every linear layer of ``model`` with its groups, in the order of ``named_modules``; those that adapters have
    replaced too where ``adapted``."""
    modules = {
        name: module._original[0] if adapted and isinstance(module, AdaptedLayer) else module
        for name, module in model.named_modules()
    }
    found = [(name, module) for name, module in modules.items() if name and is_linear(module)]
    outputs, beside = output_layers(model), defaultdict[str, dict[str, tuple[int, int]]](dict)
    for name, module in found:
        parent, _, last = name.rpartition(".")
        beside[parent][last] = size_of(module)
    return [_layer(name, module, beside[name.rpartition(".")[0]], outputs) for name, module in found]


def output_layers(model: nn.Module) -> dict[int, str]:
    """The output layers that the model itself tells of: the id of each module → ``lm_head`` or ``classifier``.

    They are transformers' output embeddings and whatever stands outside its base model, timm's classifier, and layers
    that share their weight with an embedding.
    """
    found: dict[int, str] = {}
    for module in model.modules():
        outputs, classifiers = _asked(module, "get_output_embeddings"), _asked(module, "get_classifier")
        base = getattr(module, str(getattr(module, "base_model_prefix", None)), None)
        inside = {id(m) for m in base.modules()} if isinstance(base, nn.Module) else {id(m) for m in module.modules()}
        outside = [m for m in module.modules() if m is not module and id(m) not in inside]
        found |= dict.fromkeys(map(id, outside), "lm_head" if outputs else "classifier")
        found |= {id(m): "classifier" for each in classifiers for m in each.modules()}
        found |= {id(m): "lm_head" for each in outputs for m in each.modules()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return found | {id(m): "lm_head" for m in model.modules() if is_linear(m) and id(m.weight) in tables}


def _asked(module: nn.Module, question: str) -> list[nn.Module]:
    """The modules that a method of ``module`` answers with; none where it has no such method or no answer."""
    answer: object = None
    with suppress(TypeError, AttributeError, NotImplementedError):
        answer = getattr(module, question)()
    return [m for m in (answer if isinstance(answer, (tuple, list)) else [answer]) if isinstance(m, nn.Module)]


def _layer(name: str, module: nn.Module, beside: Mapping[str, tuple[int, int]], outputs: Mapping[int, str]) -> Layer:
    last = name.rpartition(".")[2]
    out_features, in_features = beside[last]
    parts: tuple[tuple[str, slice], ...] = ()
    if last in FUSED and out_features == 3 * in_features:
        parts = tuple((p, slice(i * in_features, (i + 1) * in_features)) for i, p in enumerate("qkv"))
    output = outputs.get(id(module)) or _output_by_name(name)
    if isinstance(module, nn.Conv2d):
        groups = {"patch_embed"}
    elif output:
        groups = {output, "head"}
    else:
        groups = {"all-linear"} | _block_groups(name, beside)
    return Layer(name, module, out_features, in_features, parts, frozenset(groups))


def _output_by_name(name: str) -> str | None:
    """The kind of output layer that a name at the top of the model stands for."""
    *path, last = name.split(".")
    if any(word in piece for piece in path for word in (*ATTENTION, *MLP)):
        return None
    for group, names in OUTPUT.items():
        if (last in names and len(path) <= 1) or (path and path[0] in names):
            return group
    return None


def _block_groups(name: str, beside: Mapping[str, tuple[int, int]]) -> set[str]:
    """Attention, with its role there, or feed-forward: by the nearest module whose name says so; else by what stands
    ``beside`` the layer in its module (names → (out, in)): q, k and v, or a layer back from where another leads."""
    *path, last = name.split(".")
    for piece in reversed([piece.lower() for piece in path]):
        if any(word in piece for word in MLP):
            return {"mlp"}
        if any(word in piece for word in ATTENTION):
            return {"attention"} | {role for role, names in ROLE.items() if last in names}
    if all(ROLE[role] & beside.keys() for role in "qkv") or FUSED & beside.keys():
        roles = {role for role, names in ROLE.items() if last in names}
        return {"attention"} | roles if roles or last in FUSED else set()
    out_features, in_features = beside[last]
    back = out_features != in_features and (in_features, out_features) in beside.values()
    return {"mlp"} if back or last in MLP_LAYERS or (last == "dense" and "output" in path) else set()


def as_list(targets: Targets) -> list[str]:
    """A target or several, as a list; commas separate them in one string."""
    items = targets.split(",") if isinstance(targets, str) else list(targets)
    items = [item.strip() for item in items if item.strip()]
    if not items:
        raise ValueError(f"target_modules={targets!r} names nothing; give a name, a glob or one of {', '.join(GROUPS)}")
    return items


def name_matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` (a glob, a name, or the end of one) means ``name``.

    >>> [name_matches("h.10.attn.c_attn", pattern) for pattern in ("c_attn", "attn.c_attn", "*.attn.*", "h.1", "attn")]
    [True, True, True, False, False]
    """
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def select(layers: Iterable[Layer], targets: Targets) -> list[tuple[Layer, str]]:
    """The (layer, part) pairs that ``targets`` mean, in the layers' order; a whole layer covers its parts."""
    patterns = as_list(targets)
    chosen = []
    for layer in layers:
        parts = [part for part in (WHOLE, *dict(layer.parts)) if any(_means(p, layer, part) for p in patterns)]
        chosen += [(layer, part) for part in parts if part == WHOLE or WHOLE not in parts]
    return chosen


def select_all(
    model: nn.Module, layers: Sequence[Layer], targets: Targets, what: str = "target_modules"
) -> list[tuple[Layer, str]]:
    """``select``, where every pattern must mean some layer.

    Raises:
        ValueError: naming the patterns that mean none, and the nearest names.
    """
    missing = [pattern for pattern in as_list(targets) if not select(layers, pattern)]
    if missing:
        raise no_match(model, layers, missing, what)
    return select(layers, targets)


def _means(pattern: str, layer: Layer, part: str) -> bool:
    if pattern in GROUPS:
        return pattern in layer.groups if part == WHOLE else pattern == part
    if part != WHOLE and any(c in pattern for c in "*?[") and not pattern.endswith("." + part):
        return False  # "*.c_attn*" means the layer and not, once more, each of its parts
    return name_matches(layer.label(part), pattern)


def refuse_hidden(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Refuse layers whose owner reads their weight without calling them, so that no adapter would ever be seen.

    Raises:
        ValueError: naming them, and the ways out.
    """
    hidden = [
        layer.name
        for layer in layers
        if isinstance(model.get_submodule(layer.name.rpartition(".")[0]), nn.MultiheadAttention)
    ]
    if hidden:
        more = f" and {len(hidden) - 1} more" if len(hidden) > 1 else ""
        raise ValueError(
            f"{hidden[0]}{more} cannot be adapted: nn.MultiheadAttention reads its weights without calling a layer. "
            "Leave them out with exclude_modules='out_proj' or target_modules='mlp', train them as they are with "
            "ranks in their gradients (galore), or take a model whose attention is made of linear layers (timm's ViTs, "
            "transformers)"
        )


def no_match(model: nn.Module, layers: Sequence[Layer], patterns: list[str], what: str) -> ValueError:
    """The error for patterns that matched no linear layer: what matched instead, what there is, the nearest name."""
    modules = dict(model.named_modules())
    names = [label for layer in layers for label in (layer.name, *(f"{layer.name}.{part}" for part, _ in layer.parts))]
    other = sorted({type(m).__name__ for n, m in modules.items() for p in patterns if n and name_matches(n, p)})
    shown = ", ".join(layer.name for layer in layers[:4]) + (", …" if len(layers) > 4 else "")
    text = f"{what}={', '.join(patterns)!r} matched no linear layer"
    if other:
        text += f" (it matched {', '.join(other)}, which have no matrix to adapt)"
    text += f"; layers are {shown}" if layers else "; the model has no nn.Linear or Conv1D layer"
    if any(isinstance(m, nn.MultiheadAttention) for m in modules.values()):
        text += (
            "; its nn.MultiheadAttention hides q, k and v from adapters: take a model with linear layers there, or mlp"
        )
    if any(isinstance(m, AdaptedLayer) for m in modules.values()):
        text += "; some layers carry adapters already (lowrank.merge_and_unload takes them off)"
    near = _nearest(patterns, names)
    return ValueError(text + (f" (did you mean {near!r}?)" if near else f"; groups are {', '.join(GROUPS)}"))


def _nearest(patterns: list[str], names: list[str]) -> str | None:
    words = {*GROUPS, *(n.rpartition(".")[2] for n in names)}
    for pattern in patterns:
        core = pattern.strip("*.")
        pieces = {piece for n in names for piece in n.split(".")}
        close = difflib.get_close_matches(core, [*words, *pieces, *names], n=1)
        if close and close[0] != pattern:
            return pattern.replace(core, close[0]) if core else close[0]
    return None
