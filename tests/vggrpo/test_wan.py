"""Our samplers on a Wan folder give what diffusers' pipelines give, for every family of Wan, at tiny random widths.

Folders are saved and loaded as those of the hub are.
"""

import functools
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    AutoTokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from vggrpo.config import SamplingConfig
from vggrpo.policy.flow_policy import FlowPolicy
from vggrpo.policy.wan import WanVelocity, latent_shape, load_encoders
from vggrpo.sampler import Window, draw, normal
from vggrpo.sft import load_transformer
from vggrpo.types import Condition, Streams

SIZE = {"num_frames": 5, "height": 32, "width": 64}
STEPS, SCALE, TOKENS = 3, 3.5, 8
PROMPTS = ["a camera pans over a red cube", "blurred"]
TOKENIZER = Path(__file__).parents[2] / "assets/tiny-wan/tokenizer"


def transformer(channels: int = 16, **others: object) -> WanTransformer3DModel:
    settings = {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 12,
        "freq_dim": 16, "in_channels": channels, "out_channels": channels,
    }  # fmt: skip
    return WanTransformer3DModel(**settings | others)


def vae() -> AutoencoderKLWan:
    """Wan 2.1's at a fraction of its width: 16 channels, 8 times smaller."""
    return AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def saved(folder: Path, make: type, **parts: object) -> Path:
    """A folder as the hub has it."""
    words = AutoTokenizer.from_pretrained(TOKENIZER)
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    make(tokenizer=words, text_encoder=text, scheduler=scheduler, **parts).save_pretrained(folder)
    return folder


def texts(folder: Path, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt and the negative prompt, as we encode them."""
    encoders = load_encoders(folder, tokens, "cpu")
    text, negative = (encoders.text([prompt]) for prompt in PROMPTS)
    return text, negative


def euler_grid(folder: Path) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    return scheduler.sigmas


def piped(make: type, folder: Path, z: torch.Tensor, tokens: int = TOKENS, **inputs: object) -> torch.Tensor:
    """diffusers' own latents, one video."""
    pipe = make.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "latents": z, "output_type": "latent"} | SIZE
    if make is WanPipeline:
        settings |= {"prompt": PROMPTS[0], "negative_prompt": PROMPTS[1], "max_sequence_length": TOKENS}
    return pipe(**settings | inputs).frames


def load_vae(folder: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(folder, subfolder="vae").eval()


def noise(folder: Path) -> torch.Tensor:
    return torch.randn(1, *latent_shape(folder, *SIZE.values()), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def wan21(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("wan21"), WanPipeline, transformer=transformer(), vae=vae())


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_wan21_is_sampled_as_diffusers_samples_it_bit_for_bit(wan21, scale):
    z, network = noise(wan21), WanVelocity(load_transformer(wan21))
    expected = piped(WanPipeline, wan21, z, guidance_scale=scale)
    sampled = functools.partial(draw, network, z, *texts(wan21))
    found = sampled(euler_grid(wan21), scale)
    assert found.shape == (1, 16, 2, 4, 8)
    assert torch.equal(found, expected)
    # The controls: neither another scale nor a grid that is off by a thousandth gives this.
    assert not torch.allclose(sampled(euler_grid(wan21), scale + 0.1), expected, atol=1e-5)
    assert not torch.allclose(sampled(0.999 * euler_grid(wan21), scale), expected, atol=1e-5)


def test_both_branches_of_guidance_at_once_differ_by_rounding_alone(wan21):
    text, negative = texts(wan21)
    cfg = SamplingConfig(num_steps=STEPS, window=Window(1), guidance_scale=SCALE, negative_prompt="no")
    encode = {"yes": text, "no": negative}
    policy = FlowPolicy(
        WanVelocity(load_transformer(wan21)), lambda cond: encode[cond.prompt[0]], noise(wan21).shape[1:], cfg
    )
    policy.grid = euler_grid(wan21)
    streams = Streams(0, 0)
    z = normal(noise(wan21).shape, [streams.member(0, 0)])
    torch.testing.assert_close(policy.sample(Condition(["yes"]), streams), piped(WanPipeline, wan21, z))
