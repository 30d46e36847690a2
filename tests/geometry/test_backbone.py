"""Entering a backbone at a block with the block's own tokens changes nothing, to the bit; what would is noticed."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from geometry import hooks
from geometry.backbone import BackboneSpec, HookedBackbone, Tokens
from geometry.cameras import pinhole, project, rescaled
from tests.geometry.standins import (
    call,
    largest_difference,
    omegalike,
    parse,
    random_projection,
    vgglike,
)

BACKBONES = {"vgglike": vgglike, "omegalike": omegalike}
EVERY_POINT = [(name, point) for name, make in BACKBONES.items() for point in make().spec.stitch_points]


def video(backbone, batch=(2,), T=3, grid=(3, 5), seed=0):
    p = backbone.spec.patch
    return torch.rand(*batch, T, 3, grid[0] * p, grid[1] * p, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("name", "point"), EVERY_POINT)
def test_a_block_s_own_tokens_put_in_its_place_change_nothing_at_all(name, point, skip, recompute):
    backbone = BACKBONES[name]()
    clip = video(backbone)
    tokens = backbone.tokens_at([point], clip)[point]
    entered = backbone.forward_from(point, tokens, skip=skip, recompute=recompute)
    assert largest_difference(entered, backbone.forward_rgb(clip)) == 0.0
    other = Tokens(tokens.prefix, tokens.patch.flip(1))
    assert largest_difference(backbone.forward_from(point, other, skip=skip, recompute=recompute), entered) > 1e-3
    other = Tokens(tokens.prefix.flip(1), tokens.patch)
    assert largest_difference(backbone.forward_from(point, other, skip=skip, recompute=recompute), entered) > 1e-3


def test_position_embeddings_added_twice_are_noticed():
    """VIST3A's defect 1: position embeddings on top of features that have them, and prefix tokens of layer 0."""
    backbone = vgglike()
    point, clip = backbone.spec.stitch_points[1], video(backbone)
    tokens, truth = backbone.tokens_at([point], clip)[point], backbone.forward_rgb(clip)
    embeddings = backbone.module.encoder.embeddings
    twice = embeddings.interpolate_pos_encoding(torch.zeros(1, 16, 48), *clip.shape[-2:])[0, 1:].unflatten(0, (3, 5))
    assert largest_difference(backbone.forward_from(point, tokens._replace(patch=tokens.patch + twice)), truth) > 1e-2
    raw = torch.cat([embeddings.cls_token[0], embeddings.register_tokens[0]]).expand_as(tokens.prefix)
    assert largest_difference(backbone.forward_from(point, tokens._replace(prefix=raw)), truth) > 1e-2


@pytest.mark.parametrize("make", BACKBONES.values())
def test_identity_instead_of_the_permissive_pass_through_fails(make, monkeypatch):
    backbone = make()
    point, clip = backbone.spec.stitch_points[-1], video(backbone)
    tokens = backbone.tokens_at([point], clip)[point]
    monkeypatch.setattr(hooks, "pass_through", nn.Identity().forward)
    with pytest.raises(TypeError):
        backbone.forward_from(point, tokens)
    backbone.forward_from(point, tokens, skip=False)


def test_skipped_blocks_do_no_work_and_recomputed_ones_do_it_twice():
    backbone = omegalike()
    first, middle, last = backbone.module.blocks
    point, clip = "blocks.0", video(backbone)
    tokens = backbone.tokens_at([point], clip)[point]
    assert (first.runs, middle.runs, last.runs) == (1, 0, 0), "reading ends where the last point is"
    tokens.patch.requires_grad_()
    for recompute, runs in ((False, 1), (True, 2)):
        first.runs = middle.runs = last.runs = 0
        sum(random_projection(backbone.forward_from(point, tokens, recompute=recompute)).values()).backward()
        assert (first.runs, middle.runs, last.runs) == (0, runs, runs)


def gradients(backbone, point, tokens, **how):
    scene = random_projection(backbone.forward_from(point, tokens, **how))
    return {name: torch.autograd.grad(x, tokens, retain_graph=True, allow_unused=True) for name, x in scene.items()}


@pytest.mark.parametrize(("name", "point"), EVERY_POINT)
def test_gradients_reach_the_tokens_from_every_output_and_recomputing_does_not_change_them(name, point):
    backbone = BACKBONES[name]()
    tokens = Tokens(*(x.requires_grad_() for x in backbone.tokens_at([point], video(backbone))[point]))
    plain, recomputed = gradients(backbone, point, tokens), gradients(backbone, point, tokens, recompute=True)
    for output, both in plain.items():
        for value, again in zip(both, recomputed[output], strict=True):
            assert value is not None, f"{output} has no gradient"
            assert value.isfinite().all(), output
            assert value.abs().max() > 1e-7, output
            assert torch.equal(value, again), output


def test_a_reentrant_checkpoint_fails(monkeypatch):
    """Ours: no `torch.autograd.grad`. The module's own, which the hook is inside of: no gradient at all."""
    backbone = vgglike()
    point = backbone.spec.stitch_points[0]
    tokens = Tokens(*(x.requires_grad_() for x in backbone.tokens_at([point], video(backbone))[point]))
    mutant = partial(checkpoint, use_reentrant=True)
    monkeypatch.setattr(hooks, "checkpoint", lambda *args, use_reentrant: mutant(*args))
    with pytest.raises(RuntimeError, match=r"incompatible with \.grad"):
        gradients(backbone, point, tokens, recompute=True)
    monkeypatch.undo()

    point, clip = "blocks.1", video(omegalike())
    tokens = Tokens(*(x.requires_grad_() for x in omegalike().tokens_at([point], clip)[point]))
    expected, same = gradients(omegalike(), point, tokens), gradients(omegalike(reentrant=False), point, tokens)
    assert all(torch.equal(a, b) for name in expected for a, b in zip(expected[name], same[name], strict=True))
    for skip in (False, True):
        with pytest.raises(ValueError, match="use_reentrant=True"):
            omegalike(reentrant=True).forward_from(point, tokens, skip=skip)
    with torch.no_grad():
        omegalike(reentrant=True).forward_from(point, tokens)


def test_a_model_whose_outputs_ignore_the_tokens_is_refused():
    def detached(raw, size):
        return parse(raw, size).map(torch.Tensor.detach)

    backbone = omegalike()
    deaf = HookedBackbone(backbone.module, backbone.spec, call, detached)
    tokens = Tokens(*(x.requires_grad_() for x in backbone.tokens_at(["blocks.0"], video(backbone))["blocks.0"]))
    with pytest.raises(ValueError, match="no output depends on the tokens"):
        deaf.forward_from("blocks.0", tokens)
    with torch.no_grad():
        deaf.forward_from("blocks.0", tokens)


def test_afterwards_the_module_is_as_it_was_even_after_an_error():
    backbone = vgglike()
    point, clip = backbone.spec.stitch_points[1], video(backbone)
    block = backbone.module.get_submodule(point)
    own = block.forward  # as accelerate leaves it: a forward on the instance
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    mine = block.forward
    truth, tokens = backbone.forward_rgb(clip), backbone.tokens_at([point], clip)[point]
    backbone.forward_from(point, tokens, recompute=True)
    bias = backbone.module.frame_block.norm1.bias.data
    backbone.module.frame_block.norm1.bias.data = torch.ones(7)  # a module that fails in the middle
    with pytest.raises(RuntimeError, match=r"shape \[7\]"):
        backbone.forward_from(point, tokens, recompute=True)
    backbone.module.frame_block.norm1.bias.data = bias
    assert block.forward is mine
    assert all(not m._forward_hooks for m in backbone.module.modules())
    others = [m for m in backbone.module.modules() if m is not block]
    assert all("forward" not in vars(m) for m in others)
    assert largest_difference(backbone.forward_rgb(clip), truth) == 0.0
    assert largest_difference(backbone.forward_from(point, tokens), truth) == 0.0


def test_two_calls_at_a_time_are_refused():
    backbone = omegalike()
    tokens = backbone.tokens_at(["blocks.0"], video(backbone))["blocks.0"]

    def nested(module, images, intrinsics):
        backbone.forward_from("blocks.0", tokens)

    with pytest.raises(RuntimeError, match="one call at a time"):
        HookedBackbone(backbone.module, backbone.spec, nested, parse).forward_from("blocks.1", tokens)


def test_any_number_of_leading_axes_and_a_single_frame():
    backbone = vgglike()
    point = backbone.spec.stitch_points[0]
    clips = video(backbone, batch=(2, 3))
    whole, tokens = backbone(clips), backbone.tokens_at([point], clips)[point]
    assert tokens.patch.shape == (2, 3, 3, 3, 5, 48)
    assert tokens.prefix.shape == (2, 3, 3, 3, 48)
    assert whole.c2w.shape == (2, 3, 3, 4, 4)
    assert largest_difference(backbone.forward_from(point, tokens), whole) == 0.0
    one = backbone(clips[1, 2])
    torch.testing.assert_close(one.depth, whole.depth[1, 2])
    still = video(backbone, batch=(), T=1)
    tokens = backbone.tokens_at([point], still)[point]
    assert largest_difference(backbone.forward_from(point, tokens), backbone(still)) == 0.0


def test_videos_are_resized_to_whole_patches_and_normalised_and_intrinsics_follow():
    seen = []

    def look(module, images, intrinsics):
        seen.append((images, intrinsics))
        return call(module, images, intrinsics)

    backbone = vgglike()
    backbone = HookedBackbone(backbone.module, backbone.spec, look, parse)
    clip = torch.full((1, 2, 3, 30, 43), 0.5)
    intrinsics = pinhole(torch.tensor([[60.0, 60.0]]), 30, 43)
    scene = backbone.forward_rgb(clip, intrinsics)
    images, given = seen[-1]
    assert images.shape == (1, 2, 3, 32, 40)  # 43 is nearer to five patches than to six
    torch.testing.assert_close(
        images[0, 0, :, 7, 7], (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )
    torch.testing.assert_close(
        given[0, 0].diagonal()[:2], intrinsics[0, 0].diagonal()[:2] * torch.tensor([40 / 43, 32 / 30])
    )
    assert scene.depth.shape == (1, 2, 32, 40)
    point = backbone.spec.stitch_points[0]
    tokens = backbone.tokens_at([point], clip, intrinsics, (2, 3))[point]
    assert tokens.patch.shape == (1, 2, 2, 3, 48)
    entered = backbone.forward_from(point, tokens, rescaled(intrinsics, (30, 43), (16, 24)))
    assert largest_difference(entered, backbone.forward_rgb(clip, intrinsics, (2, 3))) == 0.0


def test_rescaled_intrinsics_see_the_same_point_at_the_same_place_of_the_picture():
    intrinsics = pinhole(torch.tensor(50.0), 6, 9)
    points, eye = torch.tensor([[0.3, -0.2, 2.0]]), torch.eye(4)
    before, _ = project(points, intrinsics, eye)
    after, _ = project(points, rescaled(intrinsics, (6, 9), (12, 27)), eye)
    torch.testing.assert_close(after / torch.tensor([27.0, 12]), before / torch.tensor([9.0, 6]))


def test_a_spec_that_does_not_fit_is_refused_by_name(as_users_run):
    backbone = omegalike()
    module, spec = backbone.module, backbone.spec
    clip, point = video(backbone), "blocks.1"
    tokens = backbone.tokens_at([point], clip)[point]
    for points in ((), ("blocks.1", "blocks.0"), ("blocks.7",)):
        with pytest.raises(ValueError, match="stitch_points must be some of blocks"):
            replace(spec, stitch_points=points)
    with pytest.raises(ValueError, match=r"no module 'blocks\.9'"):
        HookedBackbone(module, replace(spec, blocks=(*spec.blocks, "blocks.9")), call, parse)
    with pytest.raises(ValueError, match=r"'blocks\.2' is not a stitch point; choose from blocks\.0, blocks\.1"):
        backbone.tokens_at(["blocks.2"], clip)
    for wrong in (replace(spec, num_prefix=2), replace(spec, dim=16)):
        with pytest.raises(ValueError, match=r"block blocks\.1 returns"):
            HookedBackbone(module, wrong, call, parse).tokens_at([point], clip)
    with pytest.raises(ValueError, match="must have prefix"):
        backbone.forward_from(point, Tokens(tokens.prefix[:, :2], tokens.patch))
    with pytest.raises(ValueError, match="must have prefix"):
        backbone.forward_from(point, Tokens(tokens.prefix, tokens.patch[..., :16]))

    def twice(module, images, intrinsics):
        module(images, intrinsics)
        return module(images, intrinsics)

    with pytest.raises(ValueError, match="ran 2 times"):
        HookedBackbone(module, spec, twice, parse).forward_from(point, tokens)
    unused = copy.deepcopy(module)
    unused.spare = nn.Linear(2, 2)
    lazy = BackboneSpec(4, 32, 1, ("spare", *spec.blocks), ("spare",), "unit")
    with pytest.raises(ValueError, match="ran 0 times"):
        HookedBackbone(unused, lazy, call, parse).tokens_at(["spare"], clip)
