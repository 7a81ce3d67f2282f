"""What ranks do in the tests, and what must be true of it: ``TABLE``, and the functions that train in it.

A row is run in each of its worlds:

    two       two ranks, each a worker
    sharded   two ranks in step, which hold the model in parts
    mesh      four ranks: two workers of two ranks, which hold their model in parts; rows named …-whole do not
    start     four ranks in parts, before "sharded" goes on from what they have saved
    late, killed    two ranks, of which the second does not answer, or is gone

Whatever is trained, the ranks make bitwise one whole model of it, and on the mesh every number is that of ``two``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.models import small_method
from tests.ranks import acts, courses, planned
from tests.ranks.claims import (
    Claim,
    arrives_a_merge_later,
    as_forecast,
    as_forecast_of_two,
    averages_the_rest,
    begins_anew,
    fragments_as_forecast,
    is_as_near_as_its_bits,
    is_cut_along,
    is_one_process,
    is_one_process_within,
    is_silent,
    is_silent_between_merges,
    is_the_weighted_mean,
    keeps_the_mean_model,
    knows_its_own_bytes,
    meets_in_the_same_bits,
    moves_the_mean_model,
    same_at_every_step,
    same_where_adapted,
    sends_as_much_as_late,
    sends_factors,
    sends_fewer_bytes,
    sends_in_a_shared_basis,
    sends_no_basis,
    sends_small_gradients_between_refreshes,
    sends_sums,
    sends_whole_gradients,
    weighs_between_the_ranks,
)
from tests.ranks.training import Result, met, stack, tall, tied, trained

import lowrank
from lowrank.distributed.process_group import ProcessGroup
from lowrank.methods import Use

# world -> how many ranks, how they end, and what else stands in their environment
RANKS: dict[str, tuple[int, list[int], dict[str, str]]] = {
    "two": (2, [0, 0], {}),
    "mesh": (4, [0, 0, 0, 0], {}),
    "start": (4, [0, 0, 0, 0], {}),
    "sharded": (2, [0, 0], {}),
    "late": (2, [0, 1], {"LOWRANK_TIMEOUT": "2"}),
    "killed": (2, [0, -9], {"LOWRANK_TIMEOUT": "20"}),
}
OPTIONS = {"two": {}, "sharded": {"workers": 1, "sharded": True}, "mesh": {"workers": 2, "sharded": True}}


@dataclass(frozen=True)
class Row:
    """One scenario: ``does`` is given the ranks (None for one process); what it returns is what ``must`` looks at."""

    name: str
    worlds: tuple[str, ...]
    does: Callable[..., Result | None]
    must: tuple[Claim, ...] = ()
    method: lowrank.Method | None = None  # where it trains; else it is an act, which asserts by itself

    def run(self, ranks: ProcessGroup | None, world: str, folder: Path | None = None) -> Result:
        if self.method is None:
            return self.does(ranks, folder) or {}
        options = {**OPTIONS[world], **({"sharded": False} if self.name.endswith("-whole") else {})}
        return self.does(ranks, method=self.method, **options) or {}


def train(name: str, worlds: str, method: lowrank.Method, *must: Claim, **how: Any) -> Row:
    return Row(name, tuple(worlds.split()), partial(trained, **how), must, method)


def merge(name: str, method: lowrank.Method, *must: Claim, **how: Any) -> Row:
    return Row(name, ("two",), partial(met, **how), must, method)


def parts(name: str, method: lowrank.Method, *must: Claim, slack: float = 0, **how: Any) -> Row:
    """``slack``: how far one process may be, as a share of what seven steps move."""
    near = partial(is_one_process_within, slack=slack) if slack else is_one_process
    return Row(name, ("sharded",), partial(trained, **{"make": stack, **how}), (near, *must), method)


def lte(**options: Any) -> lowrank.Method:
    return small_method("lte", target_modules="fc1,fc2", **options)


def explorers(**options: Any) -> lowrank.Method:
    return small_method("lte_galore", kind="explorers", alpha=None, target_modules="fc1,fc2", **options)


def diloco(rest: str = "local", **options: Any) -> lowrank.Method:
    options |= {"rest_every": 6} if rest == "local" else {}
    return small_method("diloco", target_modules="fc1,fc2", heads=2, merge_every=3, rest=rest, **options)


def averaged(**options: Any) -> lowrank.Method:
    """LTE whose rest trains apart, and is averaged at every second merge."""
    return lte(rest="local", rest_every=6, **options)


def overlapped(**options: Any) -> lowrank.Method:
    return lte(rest="freeze", overlap=True, **options)


def coded(exchange: str, **options: Any) -> lowrank.Method:
    return lte(rest="freeze", exchange=exchange, **options)


def galore(**options: Any) -> lowrank.Method:
    return small_method("galore", target_modules="all-linear", refresh_every=3, **options)


def everywhere(name: str, **options: Any) -> lowrank.Method:
    return small_method(name, target_modules="all-linear", **options)


def adapted(name: str) -> lowrank.Method:
    return small_method(name, target_modules="fc1,fc2")


def of_blocks(name: str) -> lowrank.Method:
    return small_method(name, target_modules="fc1,fc2,fc3")


def near(error: float) -> Claim:
    return partial(is_as_near_as_its_bits, error=error)


def fewer(than: str, by: float) -> Claim:
    return partial(sends_fewer_bytes, than=than, by=by)


def cut(**dims: int) -> Claim:
    return partial(is_cut_along, **dims)


full = lowrank.methods.full
halves = partial(is_the_weighted_mean, weights=[1 / 2, 1 / 2])
thirds = partial(is_the_weighted_mean, weights=[2 / 3, 1 / 3])
EIGHT = lowrank.Method(rules=(Use("0", lowrank.optim.AdamW(storage="int8")), Use("*", lowrank.optim.AdamW())))
DENSE, LARGER = {"rank": 6, "heads": 4}, {"rank": 8, "heads": 4}  # the dense change is less to send than the factors
OUTER = {"outer_lr": 0.7, "outer_momentum": 0.9}
EQUAL = (is_one_process, same_at_every_step)
ROUNDED = (meets_in_the_same_bits, as_forecast)
CODED = (meets_in_the_same_bits, as_forecast_of_two)  # in parts on the mesh, whose words are others
FED_BACK = (same_where_adapted, as_forecast)  # what is left out stays on the rank
LATER = (arrives_a_merge_later, is_silent_between_merges)

ROWS = [
    # LTE. One head a worker on the mesh: with more, each rank's rows are split otherwise than those of two are.
    train("lte", "two mesh", lte(rest="freeze"), *EQUAL, is_silent_between_merges, as_forecast, sends_factors),
    train("lte-train", "two mesh", lte(rest="train"), *EQUAL, as_forecast),
    train("lte-reset", "two mesh", lte(rest="freeze", keep=False), *EQUAL, is_silent_between_merges, as_forecast),
    train("lte-reset-train", "two mesh", lte(rest="train", keep=False), is_one_process),
    train("lte-four-heads", "two", lte(rest="train", heads=4), is_one_process),
    train("lte-per-layer", "two mesh", lte(rest="train"), is_one_process, per_layer=True),
    train("lte-dense", "two", lte(rest="freeze", **DENSE), *EQUAL, is_silent_between_merges, as_forecast, sends_sums),
    train("lte-uneven", "two", lte(rest="freeze", heads=3), same_at_every_step, is_silent_between_merges, as_forecast),
    train(
        "lte-local",
        "two mesh",
        lte(rest="auto", rest_every=6),
        is_silent_between_merges,
        as_forecast,
        averages_the_rest,
    ),
    train("lte-outer", "two mesh", lte(rest="freeze", **OUTER), *EQUAL, as_forecast),
    train("lte-outer-reset-dense", "two", lte(rest="freeze", keep=False, **DENSE, **OUTER), is_one_process),
    train("lte-tokens-even", "two mesh", lte(rest="freeze", weigh="tokens"), is_one_process, as_forecast_of_two),
    # rounded, and with error feedback
    train("lte-bfloat16", "two mesh", averaged(exchange="bfloat16"), *ROUNDED),
    train("lte-bfloat16-dense", "two", averaged(exchange="bfloat16", **LARGER), *ROUNDED),
    train("lte-bfloat16-reset", "two", averaged(exchange="bfloat16", keep=False), *ROUNDED),
    train("lte-int8", "two mesh", averaged(exchange="int8"), *ROUNDED),
    train("lte-int8-dense", "two", averaged(exchange="int8", **LARGER), *ROUNDED),
    train("lte-int8-reset", "two mesh", averaged(exchange="int8", keep=False), *ROUNDED),
    train("lte-2bit", "two", averaged(exchange="2bit"), *FED_BACK),
    train("lte-topk3-dense", "two", averaged(exchange="topk3", **LARGER), *FED_BACK),
    # merges under way, and fragments, which merge at steps of their own
    train("lte-overlap", "two mesh", overlapped(), *EQUAL, *LATER, steps=10),
    train(
        "lte-overlap-dense-outer",
        "two",
        lte(overlap=True, outer_momentum=0.9, **DENSE),
        is_one_process,
        arrives_a_merge_later,
        steps=10,
    ),
    train("lte-overlap-int8", "two mesh", overlapped(exchange="int8"), *CODED, *LATER, steps=10),
    train("lte-overlap-nan", "two mesh", overlapped(), *LATER, begins_anew, steps=10, poison=True),
    train("lte-nan", "two mesh", averaged(), begins_anew, poison=True),
    train("lte-fragments", "two", lte(rest="train", fragments=2, outer_momentum=0.5), *EQUAL),
    train("lte-fragments-local", "two", averaged(fragments=2, exchange="2bit"), fragments_as_forecast),
    train("lte-fragments-overlap", "two", overlapped(fragments=2, exchange="topk3"), fragments_as_forecast, steps=10),
    # full-rank local changes, whose merges travel in a shared basis
    train("explorers", "two mesh", explorers(), *EQUAL, as_forecast_of_two),
    train("explorers-svd", "two mesh", explorers(basis="svd"), *EQUAL, as_forecast_of_two),
    train("explorers-svd-four", "two", explorers(basis="svd", heads=4), *EQUAL, as_forecast),
    train("explorers-gaussian", "two", explorers(basis="gaussian"), *EQUAL, as_forecast, sends_no_basis),
    train("explorers-per-layer", "two mesh", explorers(), *EQUAL, per_layer=True),
    train("explorers-frozen", "two", explorers(freeze="*"), *EQUAL, as_forecast, sends_in_a_shared_basis),
    train("explorers-outer", "two", explorers(**OUTER), *EQUAL, as_forecast),
    train("explorers-int8", "two", explorers(exchange="int8"), *ROUNDED),
    train("explorers-topk3", "two", explorers(exchange="topk3"), *FED_BACK),
    train("explorers-nan", "two mesh", explorers(freeze="*"), begins_anew, is_silent_between_merges, poison=True),
    # whole local copies
    train("diloco", "two mesh", diloco("freeze"), *EQUAL, is_silent_between_merges, as_forecast, sends_sums),
    train("diloco-muon", "two mesh", diloco("train", inner="muon"), is_one_process),
    train("diloco-local", "two mesh", diloco(), is_silent_between_merges, as_forecast, averages_the_rest),
    train("diloco-int8", "two mesh", diloco(exchange="int8"), *ROUNDED),
    train("diloco-fragments-local", "two", diloco(fragments=2, exchange="2bit"), fragments_as_forecast),
    # all ranks in step, and sums under way during the backward pass
    train("full", "two mesh", full(), is_one_process, as_forecast),
    train("full-local", "two mesh", full(rest="local"), is_silent),
    train("lora", "two mesh", adapted("lora"), is_one_process),
    train("dora", "two mesh", adapted("dora"), is_one_process),
    train("multihead_lora", "two", adapted("multihead_lora"), is_one_process),
    train("relora", "two mesh", adapted("relora"), is_one_process),
    train("galore", "two mesh", galore(), is_one_process, as_forecast, sends_small_gradients_between_refreshes),
    train("galore-per-layer", "two mesh", galore(), is_one_process, per_layer=True),
    train("apollo", "two mesh", everywhere("apollo"), is_one_process, sends_whole_gradients),
    train("full-early", "two", full(), is_one_process, sends_as_much_as_late, early=True),
    train("lte-train-early", "two", lte(rest="train"), is_one_process, sends_as_much_as_late, early=True),
    train("apollo-early", "two", everywhere("apollo"), is_one_process, sends_as_much_as_late, early=True),
    train("galore-early", "two", galore(), is_one_process, sends_as_much_as_late, early=True),
    # two merges by hand, with what each is made of
    merge("met", lte(rest="freeze"), halves, keeps_the_mean_model),
    merge("met-tokens", lte(rest="freeze", weigh="tokens"), thirds, moves_the_mean_model, rows=(8, 4)),
    merge("met-tokens-dense", lte(rest="freeze", weigh="tokens", **DENSE), thirds, rows=(8, 4)),
    # one head and two: each rank weighs the same
    merge("met-steps", lte(rest="freeze", heads=3, weigh="steps"), halves),
    merge("met-seconds", lte(rest="freeze", weigh="seconds"), weighs_between_the_ranks),
    merge("met-bfloat16", coded("bfloat16"), near(2**-7), keeps_the_mean_model, fewer("met", 3.5)),
    # and a scale each
    merge("met-int8", coded("int8"), near(2 / 127), keeps_the_mean_model, fewer("met-bfloat16", 1.5)),
    merge("met-int8-dense", coded("int8", **LARGER), near(1 / 127)),
    merge("met-2bit", coded("2bit"), keeps_the_mean_model, fewer("met-int8", 2)),
    merge("met-topk3", coded("topk3", weigh="tokens"), keeps_the_mean_model),
    # a model in parts. Moments in 8 bits are cut into other blocks, and so differ by their codes.
    parts("parts-full", full(), knows_its_own_bytes, as_forecast, cut(fc2=0)),
    parts("parts-full-per-layer", full(), per_layer=True, clip_per_layer=0.1),
    parts("parts-galore", galore(), knows_its_own_bytes, as_forecast, cut(fc1=0, fc2=1, fc3=0, fc4=0)),
    parts("parts-galore-rotate", galore(transport="rotate")),
    parts("parts-galore-reset-long", galore(transport="reset", side="long"), cut(fc1=1)),
    parts("parts-galore-both", galore(side="both", basis="svd"), as_forecast),
    parts("parts-galore-lazy", galore(lazy=True)),
    parts("parts-galore-per-layer", galore(), per_layer=True, accumulate=2, micro=2),
    parts("parts-galore-reloaded", galore(), reload_after=3),
    parts("parts-8bit-aligned", small_method("galore_8bit", target_modules="0", rank=4), make=tall, reload_after=3),
    parts("parts-8bit-full", EIGHT, make=tall),
    parts("parts-galore_8bit", everywhere("galore_8bit"), knows_its_own_bytes, slack=0.05),
    parts("parts-8bit-reloaded", everywhere("galore_8bit"), reload_after=3, slack=0.05),
    parts("parts-apollo", everywhere("apollo"), as_forecast),
    parts("parts-apollo_mini", everywhere("apollo_mini", rank=1)),
    parts("parts-muon", everywhere("muon"), as_forecast, reload_after=3),
    parts("parts-fira", everywhere("fira"), knows_its_own_bytes),
    parts("parts-lora", of_blocks("lora"), knows_its_own_bytes, as_forecast),
    parts("parts-dora", of_blocks("dora")),
    parts("parts-pissa", of_blocks("pissa")),
    parts("parts-relora", of_blocks("relora"), as_forecast, reload_after=4),
    parts("parts-lte", of_blocks("lte"), knows_its_own_bytes, as_forecast, heads=2),
    parts("parts-lte-whole", of_blocks("lte"), heads=2),
    parts("parts-bf16-galore", galore(), dtype=torch.bfloat16, slack=0.5),
    parts("parts-bf16-relora", of_blocks("relora"), dtype=torch.bfloat16, slack=0.5),
    parts("parts-lte_galore", of_blocks("lte_galore"), heads=2),
]
WHOLE_TOO = ("lte-local", "lte-train", "galore")
# rows of theirs, whose ranks hold the whole model on the mesh too
WHOLE = [replace(row, name=f"{row.name}-whole", worlds=("mesh",)) for row in ROWS if row.name in WHOLE_TOO]


def tie(name: str, method: lowrank.Method, *, chunked: bool = False) -> Row:
    return Row(name, ("sharded",), partial(tied, chunked=chunked), (is_one_process,), method)


TIED = [
    tie("tied-full", full()),
    tie("tied-lora", small_method("lora", target_modules="attention,lm_head"), chunked=True),
    tie("tied-galore", everywhere("galore", embeddings="project")),
    tie("tied-lte", small_method("lte", target_modules="mlp,lm_head", heads=1)),
]


def act(world: str, does: Callable[..., Result | None], *must: Claim, **how: Any) -> Row:
    return Row(does.__name__, (world,), partial(does, **how), must)


ACTS = [
    act("two", acts.talking),
    act("two", acts.talking_later),
    act("two", acts.unused),
    act("two", acts.disagreeing),
    act("two", courses.two),
    act("two", courses.nodes),
    act("late", acts.gone, how="late"),
    act("killed", acts.gone, how="killed"),
    act("start", courses.start),
    act("sharded", planned.counted, planned.is_planned_by_one_process, names=("full-ddp", "galore-fsdp")),
    act("sharded", acts.refused_in_parts),
    act("sharded", acts.unsaved),
    act("sharded", courses.in_parts),
    act("mesh", acts.talking_as_workers),
    act("mesh", acts.refused_on_the_mesh),
    act("mesh", planned.counted, planned.is_planned_by_one_process, names=("lte", "lte-mesh")),
    act("mesh", courses.mesh),
]
TABLE = [*ROWS, *WHOLE, *TIED, *ACTS]
