"""Gathering into tiles, and its means."""

import pytest
import torch
from attention_cases import equal_offsets, ragged_offsets

from fastdiff.kernels.tile_gather import tile_gather


@pytest.mark.parametrize("masked", (False, True))
def test_meaning(masked):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 50, 4, 8, generator=g)
    k, v = (torch.randn(2, 50, 2, 8, generator=g) for _ in range(2))
    order = torch.randperm(50, generator=g)
    mask = torch.rand(2, 50, generator=g) < 0.6 if masked else None
    for offsets in (equal_offsets(50, 16), ragged_offsets(50, 16, g)):
        found = tile_gather(q, k, v, order, offsets, block=16, mask=mask)
        for x, y in zip((q, k, v), found[:3], strict=True):
            assert torch.equal(x[:, order], y)
        for x, mean in ((k, found.key_mean), (v, found.value_mean)):
            for b in range(2):
                for i in range(len(offsets) - 1):
                    tokens = order[offsets[i] : offsets[i + 1]]
                    tokens = tokens if mask is None else tokens[mask[b, tokens]]
                    assert found.weight[b, i] == len(tokens)
                    wanted = x[b, tokens].mean(0) if len(tokens) else torch.zeros(2, 8)
                    torch.testing.assert_close(mean[b, :, i], wanted)


@pytest.mark.parametrize(("change", "words"), [
    ({"order": torch.arange(3)}, "order must be int64"),
    ({"offsets": torch.zeros(2)}, "offsets must be int32"),
    ({"mask": torch.zeros(1, 4)}, "mask must be bool"),
    ({"impl": "best"}, "impl must be"),
    ({"key": torch.zeros(1, 5, 1, 8)}, "of one B and S"),
])
def test_refuses(change, words):
    x = torch.zeros(1, 4, 1, 8)
    arguments = {"query": x, "key": x, "value": x, "order": torch.arange(4),
                 "offsets": torch.tensor([0, 4], dtype=torch.int32), "block": 4}
    with pytest.raises(ValueError, match=words):
        tile_gather(**{**arguments, **change})
