"""Both ways to a reward that the benchmark compares are whole, and one of them sees no picture."""

import pytest
import torch

from benchmarks.reward_path import LATENT, RGB, load_way, main, walk


def test_both_ways_lead_to_a_reward(monkeypatch):
    z0 = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    ways = {way: load_way(way) for way in (LATENT, RGB)}
    assert list(walk(ways[LATENT], z0)) == ["geometry", "rewards"]
    assert list(walk(ways[RGB], z0)) == ["VAE decode", "geometry", "rewards"]
    for phases in ways.values():
        value = z0
        with torch.no_grad():
            for phase in phases.values():
                value = phase(value)
        assert value.shape == (1,)
        assert value.isfinite()


def test_a_batch_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--batch", "0"])
    assert "--batch and --repeats must be at least 1" in capsys.readouterr().err
