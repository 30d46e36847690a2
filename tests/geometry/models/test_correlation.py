"""Correspondence from tokens: right on pictures that were shifted by hand, and exactly what `warp` undoes."""

import pytest
import torch
import torch.nn.functional as F

from geometry.models.alignment import align, warp
from geometry.models.correlation import Correlation

DAMPING = torch.tensor([0.1, 0.03, 0.01])


def texture(seed: int, channels: int = 3) -> torch.Tensor:
    """A smooth random picture of 96 x 96 pixels."""
    coarse = torch.randn(1, channels, 14, 14, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(96, 96), mode="bicubic", align_corners=False)


def cut(picture: torch.Tensor, u: float, v: float) -> torch.Tensor:
    """The middle 64 x 64 of a picture whose content has moved by (u, v) pixels."""
    flow = torch.tensor([-u, -v], dtype=torch.float32).view(1, 2, 1, 1).expand(1, 2, 96, 96)
    return warp(picture, flow)[0][..., 16:-16, 16:-16]


@pytest.mark.parametrize("move", [(0.0, 0.0), (0.4, -0.3), (1.7, 0.9), (-3.1, 2.2)])
def test_a_shift_is_found_to_a_fraction_of_a_pixel(move):
    picture = texture(3)
    flow, _, left, _ = align(cut(picture, 0, 0), cut(picture, *move), 4, DAMPING)
    inner = (flow - torch.tensor(move).view(1, 2, 1, 1))[..., 3:-3, 3:-3].norm(dim=1)
    assert inner.median() < 0.1
    assert left[..., 3:-3, 3:-3].median() < 0.05 * cut(picture, 0, 0).var()


def test_another_picture_is_not_found():
    """The control: what is left unexplained tells a match from none."""
    left = align(cut(texture(3), 0, 0), cut(texture(4), 0, 0), 4, DAMPING)[2]
    assert left.median() > 0.3 * cut(texture(3), 0, 0).var()


def test_a_flat_picture_stays_where_it_is_and_says_so():
    flat = torch.full((1, 3, 64, 64), 0.3)
    flow, normal, _, _ = align(flat, flat, 4, DAMPING)
    assert flow.abs().max() == 0
    textured = align(cut(texture(3), 0, 0), cut(texture(3), 1, 0), 4, DAMPING)[1]
    assert normal.abs().max() == 0 < textured[:, 0].median()


def test_warp_looks_where_the_flow_points():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    right, inside = warp(x, torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 4))
    torch.testing.assert_close(right[..., :3], x[..., 1:])
    assert torch.equal(inside, torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(1, 1, 3, 4))


def test_both_directions_are_the_same_function_of_swapped_frames():
    torch.manual_seed(0)
    correlation = Correlation(dim=48, patch=4)
    torch.nn.init.normal_(correlation.correct[-1].weight, std=0.1)
    tokens = torch.randn(1, 2, 6, 5, 48)
    ahead, back = correlation(tokens), correlation(tokens.flip(1))
    assert ahead.flow.shape == (1, 1, 2, 6, 5, 2)
    torch.testing.assert_close(ahead.flow.flip(2), back.flow)
    assert not torch.allclose(ahead.flow[:, :, 0], ahead.flow[:, :, 1])


def test_pairs_do_not_see_other_frames():
    torch.manual_seed(0)
    correlation = Correlation(dim=48, patch=4)
    tokens = torch.randn(1, 4, 4, 4, 48)
    changed = tokens.clone()
    changed[:, 3] += 1
    before, after = correlation(tokens).flow, correlation(changed).flow
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def shifted(frames: int) -> torch.Tensor:
    """Tokens of a picture that moves by (1.0, -0.5) pixels a frame, of which the features are the pixels."""
    pictures = torch.cat([cut(texture(3), 1.0 * t, -0.5 * t) for t in range(frames)])
    return F.pixel_unshuffle(pictures, 4).movedim(1, -1)[None]


def follower() -> Correlation:
    """Features are the pixels, and the network corrects nothing."""
    correlation = Correlation(dim=48, patch=4, channels=3)
    torch.nn.init.eye_(correlation.to_pixels.weight)
    torch.nn.init.zeros_(correlation.to_pixels.bias)
    return correlation


def test_frames_further_apart_are_found_through_those_between():
    with torch.no_grad():
        found = follower()(shifted(6))
    spans = found.spans
    assert list(zip(spans.source.tolist(), spans.target.tolist(), strict=True)) == [
        *((i, i + 2) for i in range(4)),
        *((i, i + 4) for i in range(2)),
    ]
    apart = (spans.target - spans.source).view(1, -1, 1, 1, 1)
    off = (spans.flow - apart * torch.tensor([1.0, -0.5]))[:, :, 4:-4, 4:-4].norm(dim=-1)
    assert off.median() < 0.15
    assert (spans.flow - torch.tensor([1.0, -0.5]))[:, :, 4:-4, 4:-4].norm(dim=-1).median() > 1  # the control
    assert spans.information.diagonal(dim1=-2, dim2=-1).min() >= 0


@pytest.mark.parametrize(("frames", "edges"), [(1, 0), (2, 0), (3, 1), (5, 4)])
def test_short_clips_have_the_spans_that_fit(frames, edges):
    with torch.no_grad():
        spans = follower()(shifted(frames)).spans
    assert spans.flow.shape == (1, edges, 16, 16, 2)
    assert spans.spread.shape == (1, edges, 16, 16)
    assert spans.information.shape == (1, edges, 16, 16, 2, 2)
    assert len(spans.source) == len(spans.target) == edges
