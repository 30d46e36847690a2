"""A refiner changes nothing until it is trained, learns what a convolution cannot, and is kept with its connector."""

import pytest
import torch

from geometry.latent import Connector, LatentGeometryModel, LatentSpec
from geometry.refine import RefineConfig, refine, refine_step, start_refine
from geometry.stitch import Sample, tokens
from geometry.stored import load_latent_model, save_latent_model
from tests.geometry.standins import vgglike

SPEC = LatentSpec(4, 4, 8, (0.0,) * 4, (1.0,) * 4)
MODES = ("frames", "phases", "latent")


def latents(B=2, L=3, seed=0):
    return torch.randn(B, 4, L, 4, 6, generator=torch.Generator().manual_seed(seed))


def stitched(seed=0, **how):
    torch.manual_seed(seed)
    backbone = vgglike()
    return LatentGeometryModel(backbone, backbone.spec.stitch_points[0], Connector(SPEC, backbone.spec.dim, **how))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [{"stride": 2}, {"split": 2}, {}])
def test_a_new_refiner_changes_nothing_and_a_trained_one_every_frame(mode, how):
    net, z = Connector(SPEC, 8, mode=mode, **how), latents()
    before = net(z)
    net.add_refiner(width=6, blocks=1, finish=2, finish_width=5)
    torch.testing.assert_close(net(z), before, rtol=0, atol=0)
    for part in (net.refiner, net.refiner.finish[1]):
        torch.nn.init.normal_(part.leave.weight)
        after = net(z)
        assert after.shape == before.shape
        assert ((after - before).abs().amax((0, 2, 3, 4)) > 0.1).all()
        before = after


def test_a_refiner_sees_its_own_neighbourhood_and_gradients_reach_the_latents():
    """One block: five convolutions of three latents can look no further than three places away."""
    net = Connector(SPEC, 8, mode="latent", kernel=(1, 1, 1), width=6, blocks=1)
    torch.nn.init.normal_(net.refiner.leave.weight)
    z = torch.randn(1, 4, 9, 9, 9, requires_grad=True)
    net(z)[0, 4, 4, 4].sum().backward()
    reached = z.grad[0].abs().sum(0) > 0
    assert reached[1:8, 1:8, 1:8].float().mean() > 0.9
    assert reached.sum() == reached[1:8, 1:8, 1:8].sum()


@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_see_the_tokens_see_the_next_tokens_and_the_next_frames(mode):
    """One block, two convolutions of 3 x 3 tokens and one of three frames: two places away, and one frame."""
    net = Connector(SPEC, 8, mode=mode, kernel=(1, 1, 1), split=2, width=6, blocks=0, finish=1)
    torch.nn.init.normal_(net.refiner.finish[0].leave.weight)
    tokens = torch.randn(1, 7, 9, 9, 8, requires_grad=True)
    net.refiner.finished(tokens)[0, 3, 4, 4].sum().backward()
    reached = tokens.grad[0].abs().sum(-1) > 0
    assert reached[2:5, 2:7, 2:7].all()
    assert reached.sum() == reached[2:5, 2:7, 2:7].sum()


def planted(model, count=24):
    """Samples whose teacher's tokens are what the connector says and something that no convolution can: products."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(count):
        z = torch.randn(4, 4, 3, 4, 6, generator=rng)
        yield z, 0.3 * torch.cat([z[:, :2] * z[:, 2:], z[:, :1].abs()], dim=1)


def test_it_learns_the_part_of_the_tokens_that_is_not_linear(monkeypatch):
    model = stitched(mode="latent", kernel=(1, 1, 1), stride=1)
    dim = model.connector.dim
    mix = torch.randn(3, dim, generator=torch.Generator().manual_seed(2))
    wanted = {}

    def teacher(backbone, connector, points, sample):
        return wanted["tokens"], None

    monkeypatch.setattr("geometry.refine.tokens", teacher)
    config = RefineConfig(steps=300, width=32, blocks=1, lr=1e-2, warmup=5)
    optimizer, losses = start_refine(model, config), []
    pairs = list(planted(model))
    for step in range(config.steps):
        z, extra = pairs[step % len(pairs)]
        with torch.no_grad():
            plain = model.connector.conv(z).movedim(1, -1)
            wanted["tokens"] = plain + extra.movedim(1, -1) @ mix
        losses.append(refine_step(model, Sample(z, z), optimizer, step, config)["tokens"])
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


def test_only_the_refiner_is_trained_and_the_closed_form_stays():
    model = stitched(mode="frames", stride=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sample = Sample(latents(1), torch.rand(1, 9, 3, 32, 48))
    config = RefineConfig(steps=2, width=6, blocks=1, warmup=0)
    records = list(refine(model, [sample, sample], config))
    assert records[1]["loss"] < records[0]["loss"]
    changed = {name for name, p in model.named_parameters() if name not in before or not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith("connector.refiner.") for name in changed)


def test_what_it_is_asked_for_is_the_teachers_tokens_and_their_change():
    model = stitched(mode="frames", stride=1)
    sample = Sample(latents(1), torch.rand(1, 9, 3, 32, 48))
    config = RefineConfig(steps=1, width=6, blocks=1, warmup=0, change=3.0)
    record = next(refine(model, [sample], config))
    wanted, _ = tokens(model.backbone, model.connector, (model.point,), sample)
    with torch.no_grad():
        x = model.connector.conv(model.connector.resampled(sample.z)).movedim(1, -1)
    error = (x - wanted).double()
    assert record["tokens"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert record["change"] == pytest.approx((error[:, 1:] - error[:, :-1]).square().mean().item(), rel=1e-5)
    assert record["loss"] == pytest.approx(record["tokens"] + 3 * record["change"], rel=1e-6)


def test_it_is_kept_on_disk_with_its_connector(tmp_path):
    model = stitched(mode="phases", stride=1)
    model.connector.add_refiner(width=6, blocks=2, finish=1, finish_width=7)
    for part in (model.connector.refiner, model.connector.refiner.finish[0]):
        torch.nn.init.normal_(part.leave.weight)
    save_latent_model(model, tmp_path, {})
    again = load_latent_model(tmp_path, stitched().backbone)
    torch.testing.assert_close(again.connector(latents()), model.connector(latents()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": -1},
        {"width": 0},
        {"warmup": 31, "steps": 30},
        {"lr": 0.0},
        {"change": -1.0},
        {"blocks": -1},
        {"finish": -1},
        {"finish_width": 0},
    ],
)
def test_sizes_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        RefineConfig(**bad)


def test_samples_that_run_out_are_told():
    model = stitched(mode="frames", stride=1)
    sample = Sample(latents(1), torch.rand(1, 9, 3, 32, 48))
    with pytest.raises(ValueError, match="ran out after 1 of 2"):
        list(refine(model, [sample], RefineConfig(steps=2, width=6, blocks=1, warmup=0)))
