"""Conditions keep their fields together; streams of random numbers are told apart by every part of their name."""

import itertools

import torch

from vggrpo.types import Condition, Streams


def test_a_slice_of_a_condition_keeps_its_fields_together():
    camera = torch.arange(3.0)[:, None, None, None].expand(3, 2, 4, 4)
    cond = Condition(["a", "b", "c"], camera=camera)[1:]
    assert len(cond) == 2
    assert cond.prompt == ["b", "c"]
    assert torch.equal(cond.camera, camera[1:])
    assert cond.first_frame is None
    assert cond.action is None


def first_draw(generator: torch.Generator) -> float:
    return float(torch.randn(1, generator=generator, dtype=torch.float64))


def test_streams_with_different_names_are_different():
    draws = []
    for seed, iteration, b, k in itertools.product(range(4), repeat=4):
        streams = Streams(seed, iteration)
        draws += [first_draw(streams.member(b, k)), first_draw(streams.noising(b, k))]
    draws += [first_draw(Streams(s, i).group(b)) for s, i, b in itertools.product(range(4), repeat=3)]
    assert len(set(draws)) == len(draws)


def test_a_stream_has_one_name_wherever_it_is_drawn():
    for there in (Streams(5, 6, first_prompt=2, first_member=3), Streams(5, 6, first_prompt=1, first_member=4)):
        b, k = 7 - there.first_prompt, 9 - there.first_member
        here = Streams(5, 6)
        assert first_draw(there.member(b, k)) == first_draw(here.member(7, 9))
        assert first_draw(there.noising(b, k)) == first_draw(here.noising(7, 9))
        assert first_draw(there.group(b)) == first_draw(here.group(7))


def test_streams_of_neighbours_are_uncorrelated():
    rows = torch.stack([torch.randn(2000, generator=Streams(0, i).member(0, k)) for i in range(4) for k in range(4)])
    correlation = torch.corrcoef(rows) - torch.eye(16)
    assert correlation.abs().max() < 5 / 2000**0.5
