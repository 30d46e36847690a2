"""What training costs at full size: real shapes and random weights, which take the time that trained ones do.

    python -m benchmarks.full_size [--models wan21 wan22 wan22-480] [--parts reward dit step memory]    one GPU of 80 GB
    python -m benchmarks.full_size --tiny             on a CPU, a fraction of the widths: that it runs, and no more

reward   latents -> VAE -> RGB geometry model -> rewards, against latents -> latent geometry model -> rewards with a map
         for every frame, and with one for every latent frame (arXiv 2603.26599, batch 4: 54.73 and 41.33 s, 76.8 and
         68.6 GB)
dit      the transformer's forward pass: operations by `vggrpo.cost` a second, over those of a large product
step     an iteration of GRPO in its phases; what window, guidance and shared prefix each save, on its own
memory   the peak of an update, against `vggrpo plan`'s estimate

Hours on one machine say nothing of another: hardware and versions stand above the tables.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.full_models import CASES, Case, lgm_of, tiny, transformer_of, vae_of
from benchmarks.measure import MIB, Machine, watched
from geometry.types import Geometry
from rewards import DEFAULT, ESTIMATED
from vggrpo.bootstrap.vae import decode, denormalise
from vggrpo.config import GrpoConfig, LoraSize, SamplingConfig
from vggrpo.cost import Shape, evaluations, forward_flops, peak_bytes
from vggrpo.policy.flow_policy import FlowPolicy, lora_off
from vggrpo.policy.lora import add_lora
from vggrpo.policy.wan import WanVelocity
from vggrpo.runtime import Run
from vggrpo.sampler import Window
from vggrpo.scenes import Scenes
from vggrpo.trainer import replay_backward, train
from vggrpo.types import Condition, Streams

RANK = 32
"""Of the LoRA, the paper's."""
STEPS = 10
"""From noise to data in training, the paper's."""
GROUP = 2
"""Videos of an iteration, of one prompt."""


@torch.no_grad()
def reward_path(case: Case, on: Machine, batch: int) -> list[str]:
    """The way to a reward through the video, and the short one in two time modes."""
    z0 = torch.randn(batch, *case.latent, device=on.device, dtype=on.dtype)
    vae, lgm = vae_of(case, on.device, on.dtype), lgm_of(case, on.device, on.dtype, "frames")
    size = [side * lgm.backbone.spec.patch for side in lgm.connector.grid(*case.latent[2:])]

    def decoded() -> Tensor:
        """On the pixels of the same token grid."""
        video = torch.cat([decode(vae, denormalise(vae, z)) for z in z0.split(1)]).float().clamp(0, 1)
        small = F.interpolate(video.flatten(0, 1), size, mode="bilinear", antialias=True)
        return small.unflatten(0, video.shape[:2]).to(on.dtype)

    rows = [f"| batch {batch} | s | x | MiB at most | x | where the time goes |", "|---|---|---|---|---|---|"]
    long = _way(lambda: rewarded(lgm.backbone(decoded())), lgm.backbone.module, on)
    long = long._replace(parts={"VAE": on.seconds(decoded), **long.parts})
    rows.append(_row("through the video", long, long))
    del vae
    on.free()
    rows.append(_row("LGM, a map a frame", _way(lambda: rewarded(lgm(z0)), lgm.backbone.module, on), long))
    del lgm
    on.free()
    short = lgm_of(case, on.device, on.dtype, "latent")
    rows.append(_row("LGM, a map a latent frame", _way(lambda: rewarded(short(z0)), short.backbone.module, on), long))
    return rows


def dit(case: Case, on: Machine) -> list[str]:
    """How much of what the machine can do, the transformer's forward pass does."""
    network = WanVelocity(transformer_of(case, on.device, on.dtype), case.published.per_token)
    z, t, text = _asked(case, on, 1)
    shape = _shape(case, network, on, 0)
    with torch.no_grad():
        seconds = on.seconds(lambda: network(z, t, text))
    side = 256 if case.tiny else 8192
    a, b = (torch.randn(side, side, device=on.device, dtype=on.dtype) for _ in range(2))
    rate, ceiling = forward_flops(shape) / seconds, 2 * side**3 / on.seconds(lambda: a @ b)
    return [
        "| forward pass of one video | operations | s | T operations/s | of a product's |",
        "|---|---|---|---|---|",
        f"| {shape.N} tokens | {forward_flops(shape) / 1e12:.4g} T | {seconds:.4g} | {rate / 1e12:.4g} "
        f"| {rate / ceiling:.2f} of {ceiling / 1e12:.4g} |",
    ]


def step(case: Case, on: Machine) -> list[str]:
    """An iteration in its phases, for each of the ways to save."""
    whole = SamplingConfig(
        num_steps=STEPS, shift=case.published.shift, guidance_scale=4.5, window=Window(STEPS - 1), micro_batch=1,
        gradient_checkpointing=True,
    )  # fmt: skip
    short = replace(whole, window=Window(2, start=4))
    ways: dict[str, tuple[SamplingConfig, str | None]] = {
        "all steps, guidance": (whole, None),
        "no guidance": (replace(whole, guidance_scale=1.0), "all steps, guidance"),
        "window of 2": (short, "all steps, guidance"),
        "window, shared prefix": (replace(short, share_noise=True), "window of 2"),
        "all three": (replace(short, share_noise=True, guidance_scale=1.0), "all steps, guidance"),
    }
    lgm = lgm_of(case, on.device, on.dtype, "latent")
    rows = ["| iteration | rollout | geometry | reward | update | s | x | against | evaluations x |", "|" + "---|" * 9]
    seconds: dict[str, float] = {}
    work: dict[str, int] = {}
    for name, (sampling, against) in ways.items():
        policy, network, run, optimizer = _policy(case, on, sampling)
        network(*_asked(case, on, 1)).square().mean().backward()  # warms up
        optimizer.zero_grad()
        grpo = GrpoConfig(num_prompts=1, group_size=GROUP, weights=DEFAULT)
        scenes = Scenes(lambda z: lgm(z.to(on.dtype)), 1)
        (numbers,) = train(
            policy, scenes, {one: ESTIMATED[one] for one in DEFAULT}, [Condition(["a video"])], optimizer, run, grpo
        )
        phases = [numbers[f"seconds/{phase}"] for phase in ("rollout", "geometry", "reward", "update")]
        counts = evaluations(sampling, grpo, 1, GROUP, sampling.window.start)
        seconds[name] = sum(phases)
        work[name] = counts.rollout + counts.reference + 4 * counts.replay  # a replay goes forth twice, and back
        gain, counted = (x[against or name] / x[name] for x in (seconds, work))
        told = " | ".join(f"{x:.3g}" for x in phases)
        rows.append(f"| {name} | {told} | {seconds[name]:.3g} | {gain:.2f} | {against or ''} | {counted:.2f} |")
        del policy, network, optimizer
        on.free()
    return rows


def memory(case: Case, on: Machine) -> list[str]:
    """The peak of an update, without the geometry model, and what the plan says of it."""
    sampling = SamplingConfig(
        num_steps=STEPS, window=Window(2, start=4), micro_batch=1, gradient_checkpointing=True, share_noise=True
    )
    policy, network, run, optimizer = _policy(case, on, sampling)
    rollout = policy.rollout(Condition(["a video"]), GROUP, Streams(0, 0))
    advantage = torch.linspace(-1, 1, GROUP, device=on.device)[None]
    grpo = GrpoConfig(num_prompts=1, group_size=GROUP)

    def update() -> None:
        replay_backward(policy, rollout, advantage, run, grpo)
        run.clip_and_step(optimizer, 1.0)

    held = sum(x.numel() * x.element_size() for x in network.parameters())
    held += sum(x.numel() * x.element_size() for x in (rollout.z0, rollout.trajectory.states))
    found = on.peak(update, held)
    shape = _shape(case, network, on, RANK)
    expected = peak_bytes(shape, sampling, case.latent, GROUP, averaged=False) / MIB
    return [
        "| update's peak | measured | planned | measured / planned |",
        "|---|---|---|---|",
        f"| LoRA of rank {RANK}, a video at a time | {found:,.1f} MiB | {expected:,.1f} MiB | {found / expected:.2f} |",
    ]


def rewarded(scene: Geometry) -> Tensor:
    """The shipped rewards' weighted sum."""
    return torch.stack([weight * ESTIMATED[name](scene) for name, weight in DEFAULT.items()]).sum(0)


class Way(NamedTuple):
    """What a way to a reward costs."""

    seconds: float
    mib: float
    parts: dict[str, float]
    """Seconds of parts."""


def _way(call: Callable[[], Tensor], module: nn.Module, on: Machine) -> Way:
    def once() -> None:
        call()

    seconds, peak = on.seconds(once), on.peak(once)
    with watched(module, ("camera_head", "depth_head"), on) as heads:
        call()
    return Way(seconds, peak, dict(heads))


def _row(name: str, way: Way, base: Way) -> str:
    parts = ", ".join(f"{part} {seconds / way.seconds:.0%}" for part, seconds in way.parts.items())
    gains = f"{base.seconds / way.seconds:.2f}", f"{way.mib / base.mib:.2f}"
    return f"| {name} | {way.seconds:.4g} | {gains[0]} | {way.mib:,.0f} | {gains[1]} | {parts} |"


def _policy(case: Case, on: Machine, sampling: SamplingConfig) -> tuple[FlowPolicy, nn.Module, Run, Any]:
    """As `vggrpo.build` puts it together, of random weights and prompts."""
    torch.manual_seed(0)
    transformer = transformer_of(case, on.device, on.dtype)
    add_lora(transformer, LoraSize(RANK, 2 * RANK))
    if sampling.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    run = Run(Accelerator(cpu=on.device == "cpu"), 1, GROUP)
    network: nn.Module = WanVelocity(transformer, case.published.per_token)
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    network, optimizer = run.prepare(network, torch.optim.AdamW(trained, lr=1e-4))
    texts = torch.randn(2, *case.words, device=on.device)

    def encode(cond: Condition) -> Tensor:
        return torch.stack([texts[int(prompt == "")] for prompt in cond.prompt])

    return FlowPolicy(network, encode, case.latent, sampling, lora_off(network)), network, run, optimizer


def _asked(case: Case, on: Machine, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and prompts of n videos."""
    z, text = torch.randn(n, *case.latent, device=on.device), torch.randn(n, *case.words, device=on.device)
    return z, torch.full((n,), 0.5, device=on.device), text


def _shape(case: Case, network: nn.Module, on: Machine, rank: int) -> Shape:
    config: Any = network.transformer.config  # type: ignore[union-attr]
    return Shape.of(
        config, case.latent, case.words[0], rank,
        per_token=case.published.per_token, half=on.dtype == torch.bfloat16,
    )  # fmt: skip


PARTS: dict[str, Callable[[Case, Machine], list[str]]] = {
    "reward": lambda case, on: reward_path(case, on, 1 if case.tiny else 4),
    "dit": dit,
    "step": step,
    "memory": memory,
}


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each part of each model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--tiny", action="store_true", help="narrow models and small videos: what it prints says nothing"
    )
    given = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if not gpu and not given.tiny:
        print("full_size: the full sizes need a GPU: give --tiny to see that it runs", file=sys.stderr)
        return 2
    repeats = 1 if given.tiny else 3
    on = Machine("cuda", torch.bfloat16, repeats) if gpu else Machine("cpu", torch.float32, repeats)
    print(f"{'TINY: these numbers say nothing. ' * given.tiny}{on}")
    for name, part in itertools.product(given.models, given.parts):
        case = tiny(CASES[name]) if given.tiny else CASES[name]
        print(f"\n{case}: {part}\n", *PARTS[part](case, on), sep="\n", flush=True)
        on.free()
    return 0


if __name__ == "__main__":
    sys.exit(main())
