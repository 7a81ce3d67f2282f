"""What the loop adds to a bare forward, backward and step of the same model.

    python -m benchmarks.loop

Both run in one process, in turns: ``train()``'s own step (log, progress, clipping, schedule) against the fewest lines
that train the same model on the same batches with torch's fused AdamW. Goal: at most 3 % more.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.common import in_turns, medians, ratio, save
from lowrank.evaluate.text_task import TextTask
from lowrank.recipes.gpt import gpt_mini
from lowrank.run.overrides import override, resolve
from lowrank.run.session import open_session
from lowrank.train.loop import _Loop

ROUNDS = 40


def main() -> None:
    torch.set_num_threads(2)
    run = resolve(override(gpt_mini(), {"steps": 10_000, "batch-size": 16}))
    session, bare = open_session(run), open_session(run)
    with tempfile.TemporaryDirectory() as folder:
        loop = _Loop(session, Path(folder), quiet=True, writer=True, new=True)
        source, task = bare.data.train(run.batch_size, run.seed), TextTask()
        optimizer = torch.optim.AdamW(bare.model.parameters(), lr=run.lr, weight_decay=run.weight_decay, fused=True)
        session.model.train()
        bare.model.train()
        step = 0

        def ours() -> None:
            record = loop._one_step()
            loop.step += 1
            loop._log(record)

        def fewest() -> None:
            nonlocal step
            batch = source.batch(step)
            loss = task.loss(bare.model, batch) / batch["labels"].numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(bare.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

        with loop.recording(after=None):
            seconds = in_turns({"bare": fewest, "train()": ours}, rounds=ROUNDS, warmup=4)
    result = {
        "model": "gpt-mini",
        "seconds": medians(seconds),
        "ratio": ratio(seconds, "train()", "bare"),
        "rounds": ROUNDS,
    }
    print(result)
    print("written to", save("loop", result).name)


if __name__ == "__main__":
    main()
