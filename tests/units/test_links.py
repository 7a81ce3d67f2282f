"""Seconds over a link: how links are written, and sums over steps against what is sent at each of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.runs.tiny import tiny

from lowrank.cli import app as cli
from lowrank.evaluate.score import planned_session
from lowrank.plan.communication import forecast
from lowrank.plan.network import LITTLE, Link, Outlook, parse_link, parse_seconds
from lowrank.train.step_time import measured, outlook, rank_of

TINY = ["gpt-mini", "--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--data.context=16", "--device=cpu"]


@pytest.mark.parametrize(
    ("text", "bandwidth"),
    [
        ("100Mbit", 12.5e6),
        ("1Gbit/s", 125e6),
        ("2.5 Gbps", 312.5e6),
        ("10GB/s", 1e10),
        ("800b", 100),
        ("1kbit", 125),
        ("1TB", 1e12),
    ],
)
def test_links_as_they_are_written(text: str, bandwidth: float) -> None:
    assert parse_link(text) == Link(bandwidth=bandwidth)


@pytest.mark.parametrize("text", ["100", "fast", "0Gbit", "-1Gbit", "1.2.3Gbit", "1Xbit", "1Gbyte", ""])
def test_links_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(ValueError, match=r"--link .*expected a speed above 0 with its unit, such as 100Mbit"):
        parse_link(text)


def test_times() -> None:
    times = [parse_seconds(text, "--latency") for text in ("1ms", "50us", "0.2", "2s", "0")]
    assert times == pytest.approx([1e-3, 5e-5, 0.2, 2, 0])
    for text in ("-1ms", "1 minute", "ms", "1.2.3s"):
        with pytest.raises(ValueError, match=r"--latency .*expected a time such as 1ms"):
            parse_seconds(text, "--latency")


def test_seconds_are_bandwidth_and_latency() -> None:
    link = Link(bandwidth=1e6, latency=1e-3)
    assert link.seconds(0, 4) == 0
    assert link.seconds(2_000_000, 4) == pytest.approx(2 + 6 * 3 * 1e-3)  # one bucket and two questions, six messages
    assert link.seconds(400_000_000, 2) == pytest.approx(400 + 2 * (16 + 2) * 1e-3)  # 400 MB summed: sixteen buckets


def seen(method: str, compute: float = 0.01, **changes: object) -> Outlook:
    run = tiny(method, steps=400, max_grad_norm=None, **changes)
    return outlook(planned_session(run), 2, parse_link("10Mbit", "1ms"), compute)


def test_an_outlook_is_the_mean_over_the_steps() -> None:
    found = seen("lte")
    at = [sum(part.sent for part in found.parts if step % part.every == 0) for step in range(1, 17)]
    assert {part.what: part.every for part in found.parts} == {"merge": 4, "average of the rest": 16}
    assert found.bytes_a_step == pytest.approx(sum(at) / 16)
    assert found.step == pytest.approx(found.compute + found.communication)
    assert found.ddp_step > found.step
    for method in ("lte", "galore", "full", "apollo"):
        run = tiny(method, max_grad_norm=None)
        assert seen(method).bytes_a_step == pytest.approx(forecast(planned_session(run).plan, 2).per_step)
    explorers = tiny("lte_galore", max_grad_norm=None, method__kind="explorers")
    ahead = outlook(planned_session(explorers), 2, parse_link("1Gbit"), 0.01)
    assert ahead.bytes_a_step == pytest.approx(forecast(planned_session(explorers).plan, 2).per_step)
    galore = seen("galore")
    assert {part.what: part.every for part in galore.parts} == {"gradients": 1, "gradients, refresh": 4}
    assert galore.bytes_a_step < galore.ddp_bytes


@pytest.mark.parametrize("extra", [{}, {"method__rest_every": 300}])
def test_the_least_interval_is_the_least(extra: dict[str, object]) -> None:
    """Outlooks of that very interval, and of one less."""

    def share(interval: int) -> float:
        found = seen("lte", method__merge_every=interval, **extra)
        return found.communication / found.step

    enough = seen("lte", **extra).enough()
    assert enough is not None
    assert enough > 4
    assert share(enough) <= LITTLE < share(enough - 1)


def test_where_no_interval_helps() -> None:
    assert seen("full").enough() is None
    assert seen("full").interval is None
    assert seen("lte", method__rest_every=4).enough() is None  # averages alone are more
    assert seen("full", method__rest="local").interval == "rest_every"
    assert seen("lte", method__rest="freeze", compute=1e9).enough() == 1


def test_a_rank_has_its_rows_and_heads() -> None:
    run = replace(tiny("lte", method__heads=4), batch_size=7)
    alone = rank_of(run, 2)
    assert (alone.batch_size, alone.method.args["heads"]) == (4, 2)
    assert measured(planned_session(alone), steps=1) > 0
    with pytest.raises(ValueError, match=r"4 heads and a batch of 7 .* give --method.heads 8 and --batch-size 8, or"):
        rank_of(run, 8)
    with pytest.raises(ValueError, match="--ranks 1: at least 2"):
        rank_of(run, 1)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    link = ["--ranks", "2", "--link", "100Mbit", "--latency", "1ms"]
    assert cli.main(["plan", *TINY, "--method=lte", *link]) == 0
    out = capsys.readouterr().out
    assert "2 ranks over 100Mbit/s, 1 ms a message; compute measured here, 8 rows a rank" in out
    assert "a step of DDP, at best" in out
    assert cli.main(["plan", *TINY, "--method=galore", *link, "--step-seconds", "20ms"]) == 0
    assert "it communicates at every step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--link", "1Gbit"], "--link SPEED needs --ranks N"),
        (["--ranks", "2", "--latency", "1ms"], "--latency and --step-seconds need --link"),
        (["--ranks", "0"], "--ranks 0: give at least 1"),
        (["--ranks", "2", "--link", "1Gbit", "--step-seconds", "0"], "a step takes time"),
        (["--ranks", "two", "--link", "1Gbit"], "--ranks two: expected a whole number"),
        (["--ranks", "64", "--link", "1Gbit"], "a batch of 16 cannot be divided between 64 ranks"),
    ],
)
def test_what_the_command_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *TINY, *words]) == 2
    assert message in capsys.readouterr().err
