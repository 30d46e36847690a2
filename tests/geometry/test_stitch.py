"""The closed-form connector is exact where it can be, held-out R^2 is what it says, and zero-shot beats chance."""

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from geometry.distance import OUTPUTS, OutputWeights
from geometry.latent import Connector, LatentGeometryModel, LatentSpec
from geometry.ridge import ConnectorFit, Moments, set_connector
from geometry.stitch import Sample, adapters_disabled, rank_layers, stitch, student, teach
from geometry.world import make_clips
from tests.geometry.standins import LinearVAE, largest_difference, omegalike, vgglike

SPEC = LatentSpec(3, 4, 8, (0.5, -1.0, 2.0), (0.5, 2.0, 1.5))
SHAPES = {
    "frames": {"mode": "frames"},
    "frames, stride 2": {"mode": "frames", "stride": 2},
    "phases": {"mode": "phases"},
    "phases, split 2": {"mode": "phases", "split": 2},
    "latent": {"mode": "latent", "kernel": (5, 5, 3)},
    "zeros": {"mode": "latent", "padding": "zeros"},
}


def clips(*, L=4, grid=(5, 6), count=3, seed=0):
    return torch.randn(count, 3, L, *grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(seed=0, **shape):
    """A connector that works on *raw* latents, and the one that does the same on normalised ones."""
    torch.manual_seed(seed)
    raw = Connector(SPEC, 6, **shape).double()
    folded = copy.deepcopy(raw)
    with torch.no_grad():
        for p, value in zip(folded.conv.parameters(), SPEC.fold(raw.conv.weight, raw.conv.bias), strict=True):
            p.copy_(value)
    return raw, folded


@torch.no_grad()
def fitted(net, raw, seeds=range(6), **how):
    """The fit of `net`'s shape to what the planted connector makes of raw latents, seen through normalised ones."""
    fit = ConnectorFit(net, 6)
    for seed in seeds:  # clips of different lengths, single frames and sizes that the stride does not divide
        z = clips(seed=seed, L=(4, 1, 5)[seed % 3], grid=((5, 6), (6, 7))[seed % 2])
        fit.add(SPEC.normalised(z), raw(z))
    weight, bias = fit.solve(**how)
    return fit, weight, bias


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "zeros"])
def test_a_planted_convolution_of_raw_latents_is_recovered_exactly(shape):
    raw, folded = planted(**SHAPES[shape])
    fit, weight, bias = fitted(raw, raw, ridge=0.0)
    torch.testing.assert_close(weight, folded.conv.weight.flatten(1).mT, atol=1e-8, rtol=0)
    torch.testing.assert_close(bias, folded.conv.bias, atol=1e-8, rtol=0)
    error, variance = fit.errors(weight, bias)
    assert (error / variance).max() < 1e-10
    found = copy.deepcopy(raw)
    set_connector(found.conv, weight, bias)
    z = clips(seed=77)
    torch.testing.assert_close(found(SPEC.normalised(z)), raw(z), atol=1e-8, rtol=0)


def test_a_fit_with_the_wrong_padding_or_time_mode_or_without_intercept_does_not_recover_it():
    raw, folded = planted(mode="frames")
    truth = folded.conv.weight.flatten(1).mT
    right = fitted(raw, raw, ridge=0.0)[1]
    wrong = fitted(planted(mode="frames", padding="zeros")[0], raw, ridge=0.0)
    assert (right - truth).abs().max() < 1e-8
    assert (wrong[1] - truth).abs().max() > 0.01
    error, variance = wrong[0].errors(*wrong[1:])
    assert (error / variance).min() > 0.01
    # No intercept, as VIST3A solves: sums about zero instead of about the mean.
    fit = fitted(raw, raw)[0]
    both = fit._rest + fit._first
    bare = torch.linalg.solve(both.xx, both.xy)
    assert (bare - truth).abs().max() > 0.01
    # Phases cannot be told apart after interpolation: the same kernel, the other time mode.
    phases = planted(mode="phases", kernel=(5, 3, 3))[0]
    error, variance = (fit := fitted(raw, phases, ridge=0.0))[0].errors(*fit[1:])
    assert (error / variance).min() > 0.1
    right = fitted(phases, phases, ridge=0.0)
    error, variance = right[0].errors(*right[1:])
    assert (error / variance).max() < 1e-10


def test_a_planted_convolution_padded_with_zeros_is_recovered_on_the_latents_it_works_on():
    raw, _ = planted(**SHAPES["zeros"])
    fit = ConnectorFit(raw, 6)
    for seed in range(4):
        z = clips(seed=seed)
        with torch.no_grad():
            fit.add(z, raw(z))
    torch.testing.assert_close(fit.solve(0.0)[0], raw.conv.weight.flatten(1).mT, atol=1e-8, rtol=0)


def test_streaming_in_chunks_equals_one_batch_and_least_squares():
    raw, _ = planted(mode="latent")
    z = clips(count=6)
    with torch.no_grad():
        tokens = raw(z) + 0.1 * torch.randn(6, 4, 5, 6, 6, dtype=torch.float64)
    whole, chunks = ConnectorFit(raw, 6), ConnectorFit(raw, 6)
    whole.add(z, tokens)
    for part in range(0, 6, 2):
        chunks.add(z[part : part + 2], tokens[part : part + 2])
    for a, b in zip(whole.solve(1e-4), chunks.solve(1e-4), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    x, y = torch.cat(list(raw.windows(z))), torch.cat(list(raw.targets(tokens)))
    slow = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y).solution
    weight, bias = whole.solve(0.0)
    torch.testing.assert_close(torch.cat([weight, bias[None]]), slow, atol=1e-10, rtol=0)
    error, variance = whole.errors(weight, bias)
    torch.testing.assert_close(error, ((y - x @ weight - bias) ** 2).sum(0))
    torch.testing.assert_close(variance, ((y - y.mean(0)) ** 2).sum(0))


def test_the_ridge_shrinks_weights_but_not_the_mean_and_does_not_depend_on_units():
    x, y = torch.randn(50, 4), torch.randn(50, 2) + 100

    def solve(scale, ridge):
        moments = Moments(4, 2)
        moments.add(scale * x, y)
        return moments.solve(ridge)

    weight, bias = solve(1.0, 1e9)
    assert weight.abs().max() < 1e-6
    torch.testing.assert_close(bias, y.double().mean(0))
    torch.testing.assert_close(solve(1.0, 0.1)[0], solve(1e3, 0.1)[0] * 1e3)
    assert solve(1.0, 0.1)[0].norm() < solve(1.0, 0.0)[0].norm()


def test_too_few_clips_are_refused_unless_there_is_a_ridge(as_users_run):
    raw, _ = planted(mode="latent")
    fit = ConnectorFit(raw, 6)
    fit.add(clips(count=1, L=1), raw(clips(count=1, L=1)))
    with pytest.raises(ValueError, match="30 rows do not determine 81 inputs; give more clips or raise ridge"):
        fit.solve(0.0)
    assert fit.solve(1e-4)[0].isfinite().all()
    phases = planted(mode="phases")[0]
    fit = ConnectorFit(phases, 6)
    fit.add(clips(L=1), phases(clips(L=1)))
    with pytest.raises(ValueError, match="cannot be fitted on single frames"):
        fit.solve()
    with pytest.raises(ValueError, match=r"tokens must be \[3, 13, 5, 6, 6\]"):
        fit.add(clips(), torch.zeros(3, 13, 6, 5, 6))


def samples(seeds, vae, size=(32, 48), frames=9):
    clip = make_clips(seeds, frames=frames, size=size, supersample=1, dynamic=True)
    return [Sample(vae.encode(clip.video), clip.video)]


@pytest.fixture(scope="module")
def vae():
    return LinearVAE()


@pytest.fixture(scope="module")
def calibration(vae):
    return [s for k in range(6) for s in samples(range(8 * k, 8 * k + 8), vae)]


@pytest.fixture(scope="module")
def held_out(vae):
    first = random.SystemRandom().randrange(10**3, 10**6)
    print(f"held-out clips {first} to {first + 15}")
    return samples(range(first, first + 16), vae)


CONNECTORS = {
    "vgglike": (vgglike, {"mode": "phases"}),
    "vgglike, latent": (vgglike, {"mode": "latent"}),
    "vgglike, frames": (vgglike, {"mode": "frames"}),
    "omegalike": (omegalike, {"mode": "latent", "split": 2}),
}


@pytest.mark.parametrize("name", CONNECTORS)
def test_zero_shot_beats_a_random_connector_on_every_output(name, vae, calibration, held_out):
    make, how = CONNECTORS[name]
    backbone = make()
    torch.manual_seed(0)
    blank = Connector(vae.spec, backbone.spec.dim, **how)
    before = {name: p.clone() for name, p in blank.named_parameters()}
    models = stitch(backbone, blank, calibration)
    assert tuple(models) == backbone.spec.stitch_points
    assert all(torch.equal(p, before[name]) for name, p in blank.named_parameters())
    layers = rank_layers(models, held_out)
    assert [layer.total for layer in layers] == sorted(layer.total for layer in layers)
    random = {point: LatentGeometryModel(backbone, point, blank) for point in models}
    chance = {layer.point: layer for layer in rank_layers(random, held_out)}
    for layer in layers:
        assert layer.r2 > 0.05 > chance[layer.point].r2
        assert set(layer.distances) == set(OUTPUTS)
        total = sum(getattr(OutputWeights(), key) * value for key, value in layer.distances.items())
        assert layer.total == pytest.approx(total, rel=1e-5)
    best = layers[0]
    for output, value in best.distances.items():
        assert value < 0.8 * chance[best.point].distances[output], (output, value, chance[best.point].distances)
    r2 = {layer.point: layer.r2 for layer in layers}
    assert max(r2, key=r2.__getitem__) == backbone.spec.stitch_points[0], "the first block is the nearest to linear"


def test_held_out_r2_is_lower_than_in_sample_and_matches_a_plain_computation(vae, calibration, held_out):
    backbone = vgglike()
    few = calibration[:1]
    model = stitch(backbone, Connector(vae.spec, 48, mode="latent"), few, ["encoder.encoder.layer.0"])
    (inside,), (outside,) = rank_layers(model, few), rank_layers(model, held_out)
    assert outside.r2 < inside.r2 - 0.05
    z, video = held_out[0][:2]
    point, net = outside.point, outside.model
    truth = backbone.tokens_at([point], video[:, ::4])[point].patch
    with torch.no_grad():
        error = (net.connector(z) - truth).square().sum()
    r2 = 1 - error / (truth - truth.mean((0, 1, 2, 3))).square().sum()
    assert outside.r2 == pytest.approx(float(r2), abs=1e-4)


def test_prefix_tokens_start_at_their_mean_over_the_clips(vae, calibration):
    backbone = vgglike()
    points = backbone.spec.stitch_points[1:]
    models = stitch(backbone, Connector(vae.spec, 48), calibration[:2], points)
    for point in points:
        tokens = [backbone.tokens_at([point], sample.video)[point].prefix for sample in calibration[:2]]
        torch.testing.assert_close(models[point].prefix.detach(), torch.cat(tokens).mean((0, 1)), atol=1e-5, rtol=1e-4)
        assert models[point].prefix.requires_grad


def test_the_teacher_sees_the_frames_and_the_pixels_that_the_student_has(vae, held_out):
    backbone = omegalike()
    model = LatentGeometryModel(backbone, "blocks.1", Connector(vae.spec, 32, mode="latent"))
    sample = held_out[0]
    with torch.no_grad():
        mine, truth = student(model, sample), teach(model, sample)
    assert mine.depth.shape == truth.depth.shape == (16, 3, 4 * 4, 6 * 4)
    expected = backbone.forward_rgb(sample.video[:, ::4], grid=(4, 6))
    assert largest_difference(truth, expected) == 0.0
    given = make_clips(range(16), frames=9, size=(32, 48), supersample=1).geometry.intrinsics
    with torch.no_grad():
        both = [f(model, sample._replace(intrinsics=given)).intrinsics for f in (student, teach)]
    torch.testing.assert_close(*both)
    with pytest.raises(ValueError, match="3 latent frames belong to 9 video frames, got 8"):
        teach(model, sample._replace(video=sample.video[:, 1:]))


def test_adapters_are_off_inside_and_as_they_were_outside():
    backbone = vgglike()
    with adapters_disabled(backbone):
        pass
    assert not any(p.requires_grad for p in backbone.parameters())


def test_nothing_to_fit_or_to_rank_is_refused(vae):
    backbone = omegalike()
    blank = Connector(vae.spec, 32)
    with pytest.raises(ValueError, match="no clips to fit"):
        stitch(backbone, blank, [])
    with pytest.raises(ValueError, match="no models"):
        rank_layers({}, [])
    with pytest.raises(ValueError, match="no held-out clips"):
        rank_layers({"blocks.0": LatentGeometryModel(backbone, "blocks.0", blank)}, [])


def test_ranks_that_share_the_clips_solve_and_rank_as_one_does(vae):
    """Two threads in place of processes, each with a backbone and clips of its own; sums are added where both wait."""
    samples = [Sample(vae.encode(x), x) for x in make_clips(range(40, 46), frames=9, size=(32, 48)).video.split(1)]
    net = Connector(vae.spec, 48, mode="frames")

    def rank(mine, total):
        models = stitch(vgglike(), net, mine[:2], ridge=1e-2, total=total)
        return rank_layers(models, mine[2:], total=total)

    meet, parts = threading.Barrier(2, timeout=60), {}

    def summed(index, x):
        parts[index] = x.clone()
        meet.wait()
        whole = parts[0] + parts[1]
        meet.wait()
        return whole

    with ThreadPoolExecutor(2) as pool:
        shares = [samples[0::2], samples[1::2]]
        two = list(pool.map(rank, shares, [lambda x, i=i: summed(i, x) for i in range(2)]))
    whole = stitch(vgglike(), net, samples[:4], ridge=1e-2)
    expected = rank_layers(whole, samples[4:])
    alone = stitch(vgglike(), net, samples[0:4:2], ridge=1e-2)
    for found in two:
        assert [layer.point for layer in found] == [layer.point for layer in expected]
        for ours, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.model.connector.conv.weight, wanted.model.connector.conv.weight)
            torch.testing.assert_close(ours.model.prefix, wanted.model.prefix)
            assert ours.r2 == pytest.approx(wanted.r2, abs=1e-5)
            assert ours.distances == pytest.approx(wanted.distances, rel=1e-4)
    point = expected[0].point  # the control: a rank that keeps to its own clips
    gap = alone[point].connector.conv.weight - whole[point].connector.conv.weight
    assert gap.abs().max() > 1e-3
