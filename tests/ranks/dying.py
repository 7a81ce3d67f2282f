"""Rank 1 is gone before the second sum, or only late (``late``); rank 0 says who (exit status 3)."""

import os
import signal
import sys
import time

import torch

from lowrank.distributed.process_group import RankLost, joined

with joined(torch.device("cpu")) as ranks:
    assert ranks is not None
    ranks.sum_([torch.ones(3)])
    if ranks.rank == 1 and sys.argv[1:] == ["late"]:
        time.sleep(5)
        os._exit(0)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        ranks.sum_([torch.ones(3)])
    except RankLost as error:
        print(error, file=sys.stderr)
        os._exit(3)
