"""Dense heads: a full-rank local change for each head."""

import pytest
import torch
import torch.nn.functional as F

from lowrank.adapters import Dense, Site
from lowrank.adapters.adapter import shard_sizes


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [2, 7])
def test_local_models(split: bool, heads: int, batch: int) -> None:
    torch.manual_seed(0)
    W = torch.randn(4, 5, dtype=torch.float64)
    adapter = Dense(heads=heads, split=split)(Site("x", W))
    with torch.no_grad():
        adapter.D.normal_()
    x, ids = torch.randn(batch, 3, 5, dtype=torch.float64), torch.randint(0, 4, (batch, 6))
    own = torch.arange(heads).repeat_interleave(torch.tensor(shard_sizes(batch, heads)))
    mean = W + adapter.D.mean(dim=0)
    dense = [W + adapter.D[own[i]] if split else mean for i in range(batch)]
    torch.testing.assert_close(adapter(x, W), torch.stack([F.linear(x[i], dense[i]) for i in range(batch)]))
    torch.testing.assert_close(adapter.rows(ids, W), torch.stack([F.embedding(ids[i], dense[i]) for i in range(batch)]))
    adapter.eval()
    torch.testing.assert_close(adapter(x, W), F.linear(x, mean))
    torch.testing.assert_close(adapter.rows(ids, W), F.embedding(ids, mean))
