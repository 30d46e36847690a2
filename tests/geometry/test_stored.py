"""A latent geometry model comes back from disk as it was, and what is wrong with its files is said."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from geometry.distil import DistilConfig, distil, trained
from geometry.latent import Connector, LatentGeometryModel, LatentSpec
from geometry.stitch import Sample, teach
from geometry.stored import load_latent_model, save_latent_model
from tests.geometry.standins import largest_difference, omegalike, vgglike

SPEC = LatentSpec(4, 4, 8, (0.5, -1.0, 2.0, 0.0), (0.5, 2.0, 1.5, 1.0))


def sample():
    generator = torch.Generator().manual_seed(0)
    z, video = torch.randn(2, 4, 2, 3, 4, generator=generator), torch.rand(2, 5, 3, 24, 32, generator=generator)
    return Sample(z, video)


def made(steps=2, **how):
    torch.manual_seed(0)
    model = LatentGeometryModel(vgglike(), "encoder.encoder.layer.1", Connector(SPEC, 48, **how), torch.rand(3, 48))
    if steps:
        list(distil(model, [sample()] * steps, DistilConfig(steps=steps, warmup=0, rank=4, alpha=8, lr=0.01)))
    return model


@pytest.mark.parametrize(
    ("how", "steps"), [({"mode": "phases", "split": 2}, 2), ({"kernel": (3, 5, 1), "stride": 2, "padding": "zeros"}, 0)]
)
def test_what_is_loaded_says_what_was_saved(how, steps, tmp_path):
    model = made(steps, **how)
    save_latent_model(model, tmp_path / "lgm", {"r2": 0.5})
    loaded = load_latent_model(tmp_path / "lgm", vgglike())
    with torch.no_grad():
        before, after = model(sample().z), loaded(sample().z)
    assert largest_difference(before, after) == 0.0
    assert largest_difference(teach(loaded, sample()), teach(model, sample())) == 0.0
    if steps:
        bare = LatentGeometryModel(vgglike(), model.point, model.connector, model.prefix)
        assert largest_difference(bare(sample().z), before) > 1e-4, "the adapters matter"
    assert json.loads((tmp_path / "lgm/lgm.json").read_text())["facts"] == {"r2": 0.5}
    assert not any(p.requires_grad for p in loaded.parameters())
    z = sample().z.requires_grad_()
    loaded(z).depth.sum().backward()
    assert z.grad.abs().max() > 0


def test_a_loaded_model_can_be_trained_on(tmp_path):
    save_latent_model(made(), tmp_path, {})
    loaded = load_latent_model(tmp_path, vgglike())
    before = {name: p.clone() for name, p in loaded.named_parameters()}
    list(distil(loaded, [sample()], DistilConfig(steps=1, warmup=0, rank=4)))
    changed = {name for name, p in loaded.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained(loaded))


def test_files_that_are_missing_damaged_or_for_another_backbone_are_named(tmp_path):
    save_latent_model(made(), tmp_path, {})
    weights, card = tmp_path / "lgm.safetensors", tmp_path / "lgm.json"
    good, text = weights.read_bytes(), card.read_text()

    def load(backbone=None):
        return load_latent_model(tmp_path, backbone or vgglike())

    weights.unlink()
    with pytest.raises(ValueError, match=r"has no lgm\.safetensors"):
        load()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="sha256 differs"):
        load()
    weights.write_bytes(good)
    for broken in (text[:-9], text.replace('"point"', '"pt"'), text.replace('"stride"', '"strides"')):
        card.write_text(broken)
        with pytest.raises(ValueError, match=r"lgm\.json is damaged"):
            load()
    card.unlink()
    with pytest.raises(ValueError, match=r"has no lgm\.json"):
        load()
    card.write_text(text)
    with pytest.raises(ValueError, match="not a stitch point"):
        load(omegalike())
    tensors = load_file(weights)
    save_file({**tensors, "prefix": torch.zeros(2, 48)}, weights)
    card.write_text(json.dumps(json.loads(text) | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))
    with pytest.raises(ValueError, match=r"another backbone: prefix is \[2, 48\] there, \[3, 48\] here"):
        load()
    weights.write_bytes(good)
    card.write_text(text)
    backbone = vgglike()
    load(backbone)
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        load(backbone)
