"""Bad geometry is refused by name, by every reward."""

from dataclasses import replace

import pytest
import torch

from geometry.world import make_clip
from rewards import REWARDS

SCENE = make_clip(0, size=(16, 16), frames=5, dynamic=True).geometry


def mirrored(scene):
    c2w = scene.c2w.clone()
    c2w[2, :3, 0] *= -1
    return replace(scene, c2w=c2w)


BAD = {
    "points must be": lambda s: replace(s, points=s.points[..., :-1, :]),
    "c2w must be": lambda s: replace(s, c2w=s.c2w[:, :3]),
    "intrinsics must be": lambda s: replace(s, intrinsics=s.intrinsics[0]),
    "valid must be": lambda s: replace(s, valid=s.valid[:-1]),
    "scene_flow must be": lambda s: replace(s, scene_flow=s.scene_flow[..., :2]),
    "depth must be": lambda s: replace(s, depth=s.depth[0]),
    "flow_grid": lambda s: replace(s, flow_grid=None),
    "must be rotations": lambda s: replace(s, c2w=2 * s.c2w),
    r"det R = \+1": mirrored,
    "0, 0, 0, 1": lambda s: replace(s, c2w=s.c2w + torch.tensor([[0.0] * 4] * 3 + [[0, 0, 0, 1.0]])),
    "fx, fy > 0": lambda s: replace(s, intrinsics=-s.intrinsics),
    "depth must be > 0": lambda s: replace(s, depth=-s.depth),
}


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("named", BAD)
def test_bad_geometry_is_refused_by_name(reward, named, as_users_run):
    with pytest.raises(ValueError, match=named):
        REWARDS[reward](BAD[named](SCENE))
    assert REWARDS[reward](SCENE).isfinite()


def test_wrong_shapes_do_not_even_make_a_geometry_under_test():
    with pytest.raises(Exception, match="points"):
        replace(SCENE, points=SCENE.points[..., :2])
