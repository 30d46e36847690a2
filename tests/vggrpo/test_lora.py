"""A LoRA on disk is the LoRA in memory, for diffusers and by ComfyUI's names, at the right scale."""

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from vggrpo.config import LoraSize
from vggrpo.policy.lora import COMFYUI, WEIGHTS, add_lora, native_names, save_lora
from vggrpo.policy.wan import wan_velocity


def make() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=32, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned():
    """An adapted transformer whose updates are not zero, with rank and alpha that differ."""
    transformer = make()
    add_lora(transformer, LoraSize(rank=4, alpha=12))
    torch.manual_seed(1)
    for name, weight in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return transformer.eval()


@torch.no_grad()
def answer(transformer) -> torch.Tensor:
    rng = torch.Generator().manual_seed(2)
    z, text = torch.randn(2, 4, 3, 4, 4, generator=rng), torch.randn(2, 5, 8, generator=rng)
    return wan_velocity(transformer.eval(), z, torch.tensor([0.3, 0.8]), text)


def loaded(folder, file: str) -> WanTransformer3DModel:
    pipe = WanPipeline(None, None, None, None, make())
    pipe.load_lora_weights(folder, weight_name=file)
    return pipe.transformer


@pytest.mark.parametrize("file", [WEIGHTS, COMFYUI])
def test_what_is_loaded_says_what_was_trained(tuned, tmp_path, file):
    save_lora(tuned, tmp_path)
    again = answer(loaded(tmp_path, file))
    torch.testing.assert_close(again, answer(tuned), atol=1e-5, rtol=1e-5)  # a third of the update would be far off
    assert (again - answer(make())).abs().max() > 0.05  # the control: the base says something else


def test_comfyuis_names_are_all_there_and_carry_alpha(tuned, tmp_path):
    save_lora(tuned, tmp_path)
    found = load_file(tmp_path / COMFYUI)
    assert len(found) == 2 * 8 * 3
    assert found["diffusion_model.blocks.1.cross_attn.o.alpha"] == 12
    assert found["diffusion_model.blocks.0.self_attn.q.lora_down.weight"].shape == (4, 32)


def test_a_map_without_a_name_and_a_model_without_lora_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"blocks\.0\.norm3\.lora_A\.weight has no name in Wan's own code"):
        native_names({"blocks.0.norm3.lora_A.weight": torch.zeros(1)}, 1.0)
    with pytest.raises(ValueError, match="no LoRA to save"):
        save_lora(make(), tmp_path)
