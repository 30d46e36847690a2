"""Matches of a decoded video: exact shifts, the world's truth, pictures that stand still, and what the reward makes of
them, through the embedded VAE and latent geometry model, too."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import interpolate

from geometry.cameras import project, rigid, so3_exp
from geometry.world import PERTURBATIONS, make_clips
from geometry.world.perturb import frozen
from rewards import DEFAULT, ESTIMATED, epipolar, sampson_errors
from vggrpo import matches as module
from vggrpo.bootstrap.vae import decode, denormalise, encode, load_vae, normalise
from vggrpo.grpo import group_advantage
from vggrpo.matches import displacements, epipolar_of, match_video
from vggrpo.reward_config import EpipolarConfig
from vggrpo.stitch.load import load_lgm
from vggrpo.types import Condition, Rollout

ASSETS = Path(__file__).parents[2] / "assets"
CFG = EpipolarConfig()
SEEDS = range(61_000, 61_008)


@pytest.fixture(scope="module")
def clips():
    return make_clips(SEEDS, size=(64, 64), motion="truck", supersample=1)


def score(clip, scene=None, cfg=CFG):
    """The reward of rendered pixels, under the truth or another scene."""
    scene = clip.geometry if scene is None else scene
    return epipolar(scene, match_video(clip.video, scene, cfg))


def shaken(scene, degrees):
    """Every pose turned at random by so much (root mean square)."""
    turn = torch.randn(*scene.c2w.shape[:-2], 3, generator=torch.Generator().manual_seed(0)) * degrees / 180 * torch.pi
    return replace(scene, c2w=scene.c2w @ rigid(so3_exp(turn / 3**0.5), torch.zeros_like(turn)))


def test_a_picture_that_is_shifted_goes_as_far_everywhere():
    wide = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    wide = interpolate(wide, (96, 96), mode="bicubic").clamp(0, 1)[0]
    for u, v in ((3, 0), (-2, 5), (6, -4)):
        video = torch.stack([wide[:, 16:80, 16:80], wide[:, 16 - v : 80 - v, 16 - u : 80 - u]])
        flow, found = displacements(video, torch.tensor([0]), torch.tensor([1]), 8)
        inner = flow[0, 2:-2, 2:-2]
        torch.testing.assert_close(inner, torch.tensor([float(u), float(v)]).expand_as(inner), atol=0.4, rtol=0)
        assert found[0, 2:-2, 2:-2].all()
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    _, found = displacements(noise, torch.tensor([0]), torch.tensor([1]), 8)
    assert found.float().mean() < 0.5  # the control: nothing is there to be found


def test_matches_are_the_worlds_own_and_shuffled_ones_are_not(clips):
    scene, found = clips.geometry, match_video(clips.video, clips.geometry, CFG)
    column, row = found.at[:, 0].long().unbind(-1)
    some, centre, off = torch.arange(len(clips))[:, None], torch.stack([column, row], dim=-1) + 0.5, []
    for k, (i, j) in enumerate(zip(found.first, found.second, strict=True)):
        points = scene.points[some, i, row, column][:, None]
        there, _ = project(points, scene.intrinsics[:, j], scene.c2w[:, j])
        off.append((there[:, 0] - found.there[:, k] + found.at[:, k] - centre).norm(dim=-1))
    off = torch.stack(off, dim=1)[found.usable]
    usable, far = found.usable.float().mean(), (found.there - found.at)[found.usable].norm(dim=-1).median()
    pixels = sampson_errors(scene, found)[found.usable].mean() * 64 * 2**0.5
    print(f"seeds {SEEDS}: {usable:.2f} usable, {far:.1f} px far, off by {off.median():.2f}, Sampson {pixels:.2f} px")
    assert usable > 0.6
    assert off.median() < 0.25 * far
    assert pixels < 0.25
    shuffled = replace(found, there=found.there.roll(1, -2))
    assert sampson_errors(scene, shuffled)[found.usable].mean() * 64 * 2**0.5 > 5 * pixels


def test_the_score_falls_with_the_error_of_the_poses(clips):
    scores = torch.stack([score(clips, shaken(clips.geometry, degrees)) for degrees in (0.0, 0.25, 0.5, 1.0, 2.0)])
    assert (scores.diff(dim=0) < 0).all()
    assert (scores[0] > -0.1).all()


@pytest.mark.parametrize("fault", ["local_warp", "slow_drift"])
def test_pixels_that_the_cameras_do_not_explain_cost(clips, fault):
    """Faults of the picture, under the cameras that it should have: what no reward of the geometry alone can see."""
    wrong = PERTURBATIONS[fault]
    scores = torch.stack([score(wrong.apply(clips, much, 1), clips.geometry) for much in wrong.magnitudes[:4]])
    rank = [spearmanr(range(4), -one[one.isfinite()]).statistic for one in scores.T if one.isfinite().all()]
    print(fault, "seeds", SEEDS, "mean Spearman", sum(rank) / len(rank))
    assert len(rank) >= 6
    assert sum(rank) / len(rank) > 0.8
    shuffled = [spearmanr(range(4), -one[[2, 0, 3, 1]]).statistic for one in scores.T if one.isfinite().all()]
    assert sum(shuffled) / len(shuffled) < 0.5  # the control


def test_a_picture_that_stands_still_has_no_score_whatever_the_cameras_say(clips, monkeypatch):
    still = frozen(clips, 1.0)
    assert score(still, clips.geometry).isnan().all()
    straight = clips.geometry.c2w.clone()
    straight[..., :3, :3] = torch.eye(3)
    moving = replace(clips.geometry, c2w=straight)
    assert score(still, moving).isnan().all()
    monkeypatch.setattr(module, "STILL", -1.0)
    assert (score(still, moving) > -1e-3).all()  # the control: without the rule stillness is perfect


def test_points_that_move_by_themselves_are_not_asked():
    clip = make_clips([7, 8], size=(64, 64), motion="truck", dynamic=True, supersample=1)
    found = match_video(clip.video, clip.geometry, CFG)
    everything = match_video(clip.video, replace(clip.geometry, scene_flow=None, flow_grid=None), CFG)
    assert (found.usable <= everything.usable).all()
    gone = everything.usable & ~found.usable
    assert gone.any()
    error = sampson_errors(clip.geometry, everything)
    assert error[gone].mean() > 2 * error[found.usable].mean()


def test_other_sizes_other_grids_and_fewer_frames_say_about_the_same(clips):
    scene, expected = clips.geometry, score(clips)
    large = interpolate(clips.video.flatten(0, 1), (128, 128), mode="bilinear").unflatten(0, (len(clips), 17))
    torch.testing.assert_close(epipolar(scene, match_video(large, scene, CFG)), expected, atol=0.01, rtol=0.1)
    halved = torch.diag(torch.tensor([0.5, 0.5, 1.0]))
    maps = {name: getattr(scene, name)[..., ::2, ::2] for name in ("depth", "valid")}
    maps |= {name: getattr(scene, name)[..., ::2, ::2, :] for name in ("points", "scene_flow")}
    coarse = replace(scene, intrinsics=halved @ scene.intrinsics, **maps)
    torch.testing.assert_close(epipolar(coarse, match_video(clips.video, coarse, CFG)), expected, atol=0.02, rtol=0.2)
    sparse = replace(scene.map(lambda x: x[:, ::4]), scene_flow=None, flow_grid=None)  # a scene of latent frames
    found = match_video(clips.video, sparse, replace(CFG, stride=1))
    apart = match_video(clips.video, replace(scene, scene_flow=None, flow_grid=None), replace(CFG, stride=4))
    assert found.first.tolist() == [0, 1, 2, 3]
    assert torch.equal(found.there, apart.there)
    assert torch.equal(found.usable, apart.usable)


def test_groups_are_scored_as_their_clips_and_gradients_reach_the_poses(clips):
    video, scene = (x.unflatten(0, (2, 4)) if hasattr(x, "unflatten") else x for x in (clips.video, clips.geometry))
    scene = scene.map(lambda x: x.unflatten(0, (2, 4)))
    scene = replace(scene, c2w=scene.c2w.clone().requires_grad_())
    rollout = Rollout(Condition(["a", "b"]), torch.zeros(2, 4, 1), torch.zeros(2, 4, 1), None)
    found = epipolar_of(CFG, lambda z0: video).reward(scene, rollout)
    torch.testing.assert_close(found.detach().flatten(), score(clips))
    (slope,) = torch.autograd.grad(found.sum(), scene.c2w)
    assert slope.isfinite().all()
    assert slope.abs().amax((-3, -2, -1)).min() > 0


def test_a_scene_too_short_for_the_stride_is_named(clips):
    with pytest.raises(ValueError, match="epipolar: stride must be less than the scene's 17 frames, got 17"):
        score(clips, cfg=EpipolarConfig(stride=17))
    with pytest.raises(ValueError, match="stride must be >= 1 and cells >= 4, got 0 and 8"):
        EpipolarConfig(stride=0)


@pytest.fixture(scope="module")
def estimated():
    """A clip through the embedded VAE: the latent geometry model's scene, and the decoded video."""
    vae = load_vae(ASSETS / "tiny-wan/vae")
    lgm = load_lgm(ASSETS / "tiny-lgm", ASSETS / "tiny-geometry", ASSETS / "tiny-wan/vae")

    @torch.no_grad()
    def through(clip):
        z = normalise(vae, encode(vae, clip.video))
        return lgm(z), decode(vae, denormalise(vae, z)).clamp(0, 1)

    return through


def test_shake_and_wobble_are_ranked_through_the_latents(estimated):
    """The path of training: latents -> scene; latents -> video -> matches."""
    seeds = range(62_000, 62_003)
    clips = make_clips(seeds, size=(64, 64), motion="truck", supersample=1)
    for fault in ("pose_jitter", "local_warp"):
        told = []
        for much in (PERTURBATIONS[fault].magnitudes[k] for k in (0, 3)):
            scene, video = estimated(PERTURBATIONS[fault].apply(clips, much, 1))
            told.append(epipolar(scene, match_video(video, scene, CFG)).nanmean())
        print(fault, "seeds", seeds, "means", *(f"{x:.3f}" for x in told))
        assert told[1] < 1.2 * told[0]


def test_freeze_gate_stillness_is_last_beside_the_default_set(estimated):
    """Through the latents: steady, shaken and frozen versions of the same clips in one group."""
    seeds = range(63_000, 63_002)
    versions = [make_clips(seeds, size=(64, 64), motion="truck", supersample=1, jitter=j) for j in (0.0, 0.4)]
    found = [estimated(clip) for clip in (*versions, frozen(versions[0], 1.0))]
    matched = [epipolar(scene, match_video(video, scene, CFG)) for scene, video in found]
    assert matched[-1].isnan().all()
    assert not torch.stack(matched[:2]).isnan().any()
    rewards = {name: torch.stack([ESTIMATED[name](scene) for scene, _ in found], -1) for name in DEFAULT}
    told = group_advantage(rewards | {"epipolar": torch.stack(matched, -1)}, DEFAULT | {"epipolar": 1.0})
    assert (told[:, -1] < told[:, 0]).all()
