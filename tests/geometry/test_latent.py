"""The connector puts latents where tokens belong, in every time mode and on every grid; gradients come back."""

import pytest
import torch
import torch.nn.functional as F

from geometry.cameras import pinhole
from geometry.latent import Connector, LatentGeometryModel, LatentSpec
from tests.geometry.standins import largest_difference, omegalike, outputs, random_projection, vgglike

SPEC = LatentSpec(4, 4, 8, (0.5, -1.0, 2.0, 0.0), (0.5, 2.0, 1.5, 1.0))
MODES = ("frames", "phases", "latent")


def latents(*batch, L=3, grid=(4, 6), channels=4, seed=0):
    return torch.randn(*batch, channels, L, *grid, generator=torch.Generator().manual_seed(seed))


def connector(dim=8, seed=0, **how):
    torch.manual_seed(seed)
    return Connector(how.pop("latent", SPEC), dim, **how)


@pytest.mark.parametrize("L", [1, 2, 5])
@pytest.mark.parametrize("mode", MODES)
def test_there_is_one_token_map_per_frame_of_the_mode(mode, L):
    frames = SPEC.frames(L, mode)
    assert list(frames) == (list(range(0, 4 * L - 3, 4)) if mode == "latent" else list(range(4 * L - 3)))
    assert connector(mode=mode)(latents(2, L=L)).shape == (2, len(frames), 4, 6, 8)


def test_a_kernel_that_only_looks_at_its_own_place_interpolates_in_time():
    """Frame 4 i is latent i itself, frames between are in between: linear, ends on ends."""
    net, z = connector(mode="frames", kernel=(1, 1, 1)), latents(2)
    maps = net(z)
    torch.testing.assert_close(maps[:, ::4], connector(mode="latent", kernel=(1, 1, 1))(z))
    torch.testing.assert_close(maps[:, 1], 0.75 * maps[:, 0] + 0.25 * maps[:, 4])


def test_phases_have_weights_of_their_own_and_the_first_latent_is_one_frame():
    net, z = connector(mode="phases", kernel=(1, 1, 1), dim=2), latents(1)
    maps = net(z)
    assert maps.shape == (1, 9, 4, 6, 2)
    every = torch.einsum("oc,bclhw->blhwo", net.conv.weight.flatten(1), z) + net.conv.bias
    every = every.unflatten(-1, (4, 2))
    torch.testing.assert_close(maps[:, 0], every[:, 0, ..., 3, :])
    for latent, phase in ((1, 0), (1, 3), (2, 2)):
        torch.testing.assert_close(maps[:, 4 * latent - 3 + phase], every[:, latent, ..., phase, :])


def test_split_gives_each_token_of_a_latent_weights_of_its_own():
    net, z = connector(mode="latent", kernel=(1, 1, 1), split=2, dim=3), latents(1)
    maps = net(z)
    assert maps.shape == (1, 3, 8, 12, 3)
    every = torch.einsum("oc,bclhw->blhwo", net.conv.weight.flatten(1), z) + net.conv.bias
    every = every.unflatten(-1, (2, 2, 3))
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        torch.testing.assert_close(maps[:, :, row::2, column::2], every[..., row, column, :])


def test_sides_that_the_stride_does_not_divide_are_interpolated_and_not_left_to_padding():
    net, z = connector(mode="latent", stride=2), latents(1, grid=(5, 9))
    assert net.grid(5, 9) == (3, 5)
    assert net.grid(4, 8) == (2, 4)
    assert net.grid(1, 1) == (1, 1)
    maps = net(z)
    assert maps.shape == (1, 3, 3, 5, 8)
    resized = F.interpolate(z.flatten(0, 1), (6, 10), mode="bilinear").unflatten(0, (1, 4))
    torch.testing.assert_close(maps, net.conv(resized).movedim(1, -1))
    padded = net.conv(z).movedim(1, -1)  # the control: the same shape, other places
    assert padded.shape == maps.shape
    assert (padded - maps).abs().max() > 0.1


def test_a_wanted_grid_is_obeyed():
    assert connector(stride=2)(latents(1, grid=(8, 8)), (7, 3)).shape[2:4] == (7, 3)
    assert connector(split=2)(latents(1, grid=(8, 8)), (14, 6)).shape[2:4] == (14, 6)
    with pytest.raises(ValueError, match="not a multiple of split 2"):
        connector(split=2)(latents(1), (7, 6))


@pytest.mark.parametrize("padding", ["replicate", "zeros"])
def test_folding_the_mean_and_deviation_in_gives_the_same_function_of_either_latents(padding):
    raw = connector(mode="latent", padding=padding)
    z = latents(2)
    folded = connector(mode="latent", padding=padding, seed=1)
    with torch.no_grad():
        for p, value in zip(folded.conv.parameters(), SPEC.fold(raw.conv.weight, raw.conv.bias), strict=True):
            p.copy_(value)
    difference = (folded(SPEC.normalised(z)) - raw(z)).abs()
    assert difference[:, 1:-1, 1:-1, 1:-1].max() < 1e-5
    assert (difference.max() < 1e-5) == (padding == "replicate")  # zeros are not the same latent in both


def test_windows_and_targets_are_what_the_convolution_computes():
    for how in ({}, {"mode": "latent", "stride": 2}, {"mode": "phases", "split": 2}, {"padding": "zeros"}):
        net = connector(**how)
        z = latents(2, grid=(5, 6))
        maps = net(z)
        flat = net.conv.weight.flatten(1).mT
        windows, targets = list(net.windows(z)), list(net.targets(maps))
        assert len(windows) == len(targets)
        for index, (x, y) in enumerate(zip(windows, targets, strict=True)):
            torch.testing.assert_close((x @ flat + net.conv.bias)[:, -y.shape[1] :], y)
            assert index == 0 or y.shape[1] == net.conv.out_channels


def model(backbone, **how):
    net = connector(dim=backbone.spec.dim, **how)
    return LatentGeometryModel(backbone, backbone.spec.stitch_points[1], net)


@pytest.mark.parametrize(("mode", "how"), [("frames", {"stride": 2}), ("phases", {"split": 2}), ("latent", {})])
@pytest.mark.parametrize("make", [vgglike, omegalike])
def test_gradients_reach_the_latents_the_connector_and_the_prefix_from_every_output(make, mode, how):
    net = model(make(), mode=mode, **how)
    z = latents(2, grid=(5, 6)).requires_grad_()
    scene = net(z)
    T = len(SPEC.frames(3, mode))
    assert scene.c2w.shape == (2, T, 4, 4)
    wanted = {"latents": z, "weight": net.connector.conv.weight, "prefix": net.prefix}
    for name, value in random_projection(scene).items():
        found = torch.autograd.grad(value, list(wanted.values()), retain_graph=True)
        for source, gradient in zip(wanted, found, strict=True):
            assert gradient.isfinite().all(), (name, source)
            assert gradient.abs().max() > 1e-7, (name, source)
            if source == "latents":  # every one of them has a say
                assert (gradient.abs().amax((1, 3, 4)) > 0).all(), name


def test_one_latent_frame_is_one_frame_and_all_modes_agree_on_what_it_means():
    z = latents(2, 3, L=1)
    for mode in MODES:
        scene = model(vgglike(), mode=mode)(z)
        assert scene.depth.shape == (2, 3, 1, 4 * 8, 6 * 8)
        assert all(x.isfinite().all() for x in outputs(scene).values())
    frames, latent = (model(omegalike(), mode=mode, kernel=(3, 3, 3)) for mode in ("frames", "latent"))
    assert largest_difference(frames(z), latent(z)) == 0.0


def test_recomputing_the_tail_changes_neither_outputs_nor_gradients():
    backbone = vgglike()
    plain = model(backbone)
    saving = LatentGeometryModel(backbone, plain.point, plain.connector, plain.prefix, recompute=True)
    grads = []
    for net in (plain, saving):
        z = latents(1).requires_grad_()
        scene = net(z)
        sum(random_projection(scene).values()).backward()
        grads.append((scene, z.grad))
    assert largest_difference(grads[0][0], grads[1][0]) == 0.0
    assert torch.equal(grads[0][1], grads[1][1])


def test_intrinsics_are_given_in_pixels_of_the_decoded_video():
    net, z = model(omegalike(), stride=2, mode="latent"), latents(1)
    given = pinhole(torch.tensor([[55.0, 55.0, 55.0]]), 4 * 8, 6 * 8)
    scene = net(z, given)  # 2 x 3 tokens of 4 pixels
    torch.testing.assert_close(scene.intrinsics, pinhole(torch.tensor([[55.0, 55.0, 55.0]]), 8, 12))
    assert largest_difference(net(z), scene) > 0.01


def test_what_does_not_fit_is_refused(as_users_run):
    backbone = omegalike()
    point = backbone.spec.stitch_points[0]
    with pytest.raises(ValueError, match="must have 4 numbers"):
        LatentSpec(4, 4, 8, (0.0,) * 4, (1.0,) * 3)
    with pytest.raises(ValueError, match="> 0"):
        LatentSpec(1, 4, 8, (0.0,), (0.0,))
    for how in ({"kernel": (2, 3, 3)}, {"stride": 0}, {"stride": 2, "split": 2}):
        with pytest.raises(ValueError, match="kernel must be odd; stride and split"):
            Connector(SPEC, 8, **how)
    with pytest.raises(ValueError, match="must have 4 channels"):
        connector()(latents(1, channels=5))
    with pytest.raises(ValueError, match="1 prefix tokens of width 32"):
        LatentGeometryModel(backbone, point, connector(dim=16))
    with pytest.raises(ValueError, match="1 prefix tokens of width 32"):
        LatentGeometryModel(backbone, point, connector(dim=32), torch.zeros(2, 32))
    with pytest.raises(ValueError, match="not a stitch point"):
        LatentGeometryModel(backbone, "blocks.2", connector(dim=32))
