"""A run, described: frozen dataclasses.

Every field is checked when it is built, which is before any compute. What a field means is said under it, once.
"""

from dataclasses import dataclass, field
from typing import Literal

from vggrpo.flow import sde_step
from vggrpo.grpo import Aggregate, Baseline, Silent
from vggrpo.reward_config import EpipolarConfig, ImportedConfig, RemoteConfig
from vggrpo.sampler import Window, time_grid


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class SamplingConfig:
    """How a flow policy samples."""

    num_steps: int = 20
    """Steps from noise to data."""
    shift: float = 1.0
    """Of the time grid; Wan uses 3 (480p) or 5 (720p)."""
    window: Window = field(default_factory=Window)
    """Which steps are stochastic and trained."""
    sde: str = "flow_sde"
    """The stochastic step: flow_sde (the paper's), dance_sde or flow_cps."""
    noise: float = 0.7
    """Its strength: a of flow_sde and dance_sde, the fraction of a quarter turn of flow_cps."""
    guidance_scale: float = 1.0
    """Classifier-free guidance, the same in rollout and replay; 1 is none."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    share_noise: bool = False
    """One initial noise per group: its members part at the window, and the steps before it run once per group."""
    micro_batch: int = 8
    """Videos that the network sees at once, in rollout and replay."""
    storage: Literal["float32", "bfloat16", "float16"] = "float32"
    """In which the trained steps' states are kept."""
    gradient_checkpointing: bool = False
    """Recompute the network in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        time_grid(self.num_steps, self.shift)
        self.window.check(self.num_steps)
        sde_step(self.sde)
        _require(self.noise > 0, f"noise must be > 0 where steps are trained, got {self.noise:g}")
        _require(self.sde != "flow_cps" or self.noise <= 1, f"noise of flow_cps must be in (0, 1], got {self.noise:g}")
        _require(self.micro_batch >= 1, f"micro_batch must be >= 1, got {self.micro_batch}")


@dataclass(frozen=True)
class GrpoConfig:
    """Algorithm 1's constants."""

    num_iterations: int = 100
    """Rollouts in a run."""
    num_prompts: int = 4
    """Prompts in a global batch, over all ranks."""
    group_size: int = 16
    """Samples per prompt (the paper: 64)."""
    clip: float = 1e-3
    """How far a ratio is followed; 1e-3 has its meaning with log-probabilities averaged over dimensions."""
    beta: float = 0.004
    """Weight of the KL to the reference, which holds dt (`flow.kl_divergence`)."""
    ratio: Literal["plain", "norm"] = "plain"
    """"norm" is GRPO-Guard's RatioNorm, for videos; its clip is ~2e-6."""
    weights: dict[str, float] | None = None
    """Of the rewards; equal by default."""
    gates: dict[str, str] = field(default_factory=dict)
    """Reward: the one in [0, 1], such as motion_prior, that shuts out its samples, so that they are below all of their
    group (`grpo.gated`). A gate needs no weight; one that has a weight is a reward as well."""
    aggregate: Aggregate = "normalize_then_sum"
    """Compare each reward in its group and then average (the paper), or the other way round."""
    baseline: Baseline = "z_score"
    """What an advantage is measured against."""
    silent: Silent = "count"
    """Whether a reward that cannot tell a group apart still counts in the average (the paper), or is left out."""
    clamp: float | None = None
    """Limit of |advantage|; Flow-GRPO uses 5."""
    num_updates: int = 1
    """Optimiser steps per rollout. With 1 the ratio is 1 throughout and nothing is ever clipped."""
    accumulate: int = 1
    """Rollouts per optimiser step: a batch of num_prompts x accumulate prompts in that many parts."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to it."""
    max_skipped: int = 5
    """Updates in a row that may be left out because the gradient is not finite."""
    seed: int = 0
    """Of every random stream of the run."""

    def __post_init__(self) -> None:
        for name, gate in self.gates.items():
            _require(name in (self.weights or {}), f"gates: {name!r} is gated and has no weight: add it to weights")
            _require(gate not in self.gates, f"gates: {gate!r} gates {name!r} and is gated itself: leave one out")
        _require(self.max_skipped >= 0, f"max_skipped must be >= 0, got {self.max_skipped}")
        _require(self.num_prompts >= 1, f"num_prompts must be >= 1, got {self.num_prompts}")
        _require(self.group_size >= 2, f"group_size must be >= 2: nothing to compare in a group of {self.group_size}")
        _require(self.clip > 0, f"clip must be > 0, got {self.clip:g}")
        _require(self.beta >= 0, f"beta must be >= 0, got {self.beta:g}")
        _require(self.max_grad_norm > 0, f"max_grad_norm must be > 0, got {self.max_grad_norm:g}")
        _require(min(self.num_updates, self.accumulate) >= 1, "num_updates and accumulate must be >= 1")
        _require(
            min(self.num_updates, self.accumulate) == 1,
            f"num_updates = {self.num_updates} and accumulate = {self.accumulate} cannot both exceed 1: "
            "a second update would be off-policy for half of the batch only",
        )

    @property
    def named(self) -> dict[str, float] | None:
        """The weights of all rewards that are computed: 0 of those that only gate."""
        return self.weights if self.weights is None else dict.fromkeys(self.gates.values(), 0.0) | self.weights


@dataclass(frozen=True)
class NftConfig:
    """DiffusionNFT's constants."""

    beta: float = 1.0
    """How far v+ and v- lie from v_old: 1 is v itself and its mirror image."""
    num_times: int = 4
    """Noised copies of each sample per update."""
    slowing: float = 1e-3
    """The average that samples keeps min(slowing x update, slowest) of itself: fast at first, then slow."""
    slowest: float = 0.5
    """See `slowing`."""
    anchor: float = 1e-4
    """Weight of mean |v - v_ref|^2."""

    def __post_init__(self) -> None:
        _require(self.beta > 0, f"beta must be > 0, got {self.beta:g}")
        _require(self.num_times >= 1, f"num_times must be >= 1, got {self.num_times}")
        _require(0 <= self.slowest < 1 and self.slowing >= 0, "slowing must be >= 0 and slowest in [0, 1)")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-4
    """The paper's."""
    weight_decay: float = 1e-4
    """The paper's."""
    ema: float | None = None
    """Decay, at every iteration with an update, of an average of the trained weights that is kept and exported beside
    them; None is no average."""

    def __post_init__(self) -> None:
        _require(self.ema is None or 0 < self.ema < 1, f"ema must be in (0, 1), got {self.ema}")


@dataclass(frozen=True)
class MixtureConfig:
    """The embedded stack of two dimensions: what the prompts name and the reward asks for."""

    prompts: list[str] = field(default_factory=lambda: [""])
    """Names of modes, several of them to mix; "" is all of them."""
    wanted: str = "east"
    """The mode that the reward is highest at."""
    width: int = 64
    """Hidden units of the learned correction."""


RewardForm = Literal["robust", "paper"]


@dataclass(frozen=True)
class LoraSize:
    """Low-rank updates of a model's attention projections."""

    rank: int = 32
    """Of each update (the paper: 32)."""
    alpha: int = 64
    """Its scale is alpha / rank (the paper: 64)."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1 and self.alpha > 0, f"rank must be >= 1 and alpha > 0, got {self.rank}, {self.alpha}")


@dataclass(frozen=True)
class VideoConfig:
    """A video model that is trained, and what its samples are judged with."""

    model: str = "assets/tiny-wan"
    """Wan folder in diffusers layout."""
    lora: LoraSize = LoraSize()
    """What is trained of its transformer."""
    lora_on: Literal["high", "low", "both"] = "high"
    """Of two transformers (Wan2.2-A14B): which have LoRA. They must be those that the window's steps ask."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the transformer is held and computes. Sampling, LoRA's weights, times and norms are fp32 in any case."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the text encoder computes; Wan's own takes 23 GB in float32, before training alone."""
    prompt_cache: str | None = "runs/prompts"
    """Folder where embeddings of prompts are kept, so that the next run loads no text encoder; null: nowhere."""
    compile: bool = False
    """torch.compile for the transformer's blocks, one by one: minutes at the start, less time after."""
    attention: str | None = None
    """What computes attention: a backend of diffusers', such as native, flash or sage; null: diffusers' own choice."""
    first_frames: str | None = None
    """The first frame of each prompt's video: a folder of pictures, in the order of their names, or safetensors with
    "frames" [N 3 height width], RGB in [0, 1]."""
    geometry: str = "assets/tiny-geometry"
    """The geometry model whose tail the latent geometry model uses: a folder, or family:weights (`geometry_model`)."""
    lgm: str = "assets/tiny-lgm"
    """The latent geometry model, from `vggrpo stitch`."""
    prompts: str = "assets/prompts/train.txt"
    """One on each line; they are taken in turn, over and over."""
    frames: int = 17
    """4 n + 1."""
    height: int = 64
    """A multiple of the VAE's stride times the transformer's patch of 2: of 16, or of 32 for Wan2.2-TI2V-5B."""
    width: int = 64
    """See `height`."""
    max_len: int = 96
    """Tokens of a prompt, `</s>` included; Wan's own is 512."""
    motion_samples: int = 0
    """Videos of each prompt, made before training, whose mean camera motion is that prompt's floor in
    `camera_motion_floor`; 0: the reward's own floor for all prompts."""
    motion_kept: float = 1.0
    """Share of that motion from which on a video moves enough."""
    reward_form: RewardForm = "robust"
    """ "paper": no floor under the camera's speed, depth errors in absolute units, a view's own points in its cloud. On
    estimated geometry such rewards judge noise and scale (README); tiny_paper.yaml has them."""
    judged_at_once: int = 4
    """Videos that the latent geometry model sees together."""
    sample_every: int = 0
    """Iterations between sample videos, for which the VAE is loaded; 0 is never."""
    sample_prompts: int = 2
    """Of the first prompts, one video each."""
    imported: dict[str, ImportedConfig] = field(default_factory=dict)
    """Rewards of your own, by the names that they have in grpo.weights."""
    remote: dict[str, RemoteConfig] = field(default_factory=dict)
    """Rewards of servers, by the names that they have in grpo.weights."""
    cameras: str | None = None
    """safetensors with "c2w" [N frames 4 4], the camera path of each prompt, for the reward `camera_following`."""
    epipolar: EpipolarConfig = field(default_factory=EpipolarConfig)
    """How the reward `epipolar` finds its matches, for which the VAE decodes every sample. The Sampson judges of
    `vggrpo evaluate` measure much the same, and do not count for a run that has it."""

    def __post_init__(self) -> None:
        _require(
            self.frames >= 1 and self.frames % 4 == 1,
            f"frames must be 4 n + 1 (1, 5, ..., 17, ..., 81), got {self.frames}",
        )
        for name in ("height", "width", "max_len", "judged_at_once"):
            _require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        _require(self.motion_samples >= 0, f"motion_samples must be >= 0, got {self.motion_samples}")
        _require(
            self.motion_samples == 0 or self.first_frames is None,
            "motion_samples measures prompts alone: leave it 0 where there are first_frames",
        )
        _require(self.motion_kept > 0, f"motion_kept must be > 0, got {self.motion_kept:g}")
        _require(self.sample_every >= 0 and self.sample_prompts >= 1, "sample_every must be >= 0, sample_prompts >= 1")


@dataclass(frozen=True)
class LaunchConfig:
    """What the launch must turn out to be; `launch.py` refuses any other. `--accelerate NAME` fills it in."""

    num_processes: int | None = None
    """Of all machines together; None is any number."""
    engine: Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"] | None = None
    """What joins them; None is any."""

    def __post_init__(self) -> None:
        _require(
            self.num_processes is None or self.num_processes >= 1,
            f"num_processes must be >= 1, got {self.num_processes}",
        )


@dataclass(frozen=True)
class Recipe:
    """All of a run: of a video model where `video` is given, of the two-dimensional mixture where it is not."""

    out: str = "runs/train"
    """Folder of the run."""
    video: VideoConfig | None = None
    """The video model."""
    checkpoint_every: int = 20
    """Iterations between checkpoints; there is one at the end, too."""
    keep: int = 2
    """Checkpoints that are kept, the newest."""
    max_minutes: float | None = None
    """A run that trains for longer ends with the iteration it is at, whole, as if it had been the last."""
    trackers: list[Literal["wandb", "trackio"]] = field(default_factory=list)
    """Where numbers go beyond the run's own files and TensorBoard; each must be installed."""
    mixture: MixtureConfig = MixtureConfig()
    sampling: SamplingConfig = SamplingConfig()
    grpo: GrpoConfig = GrpoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        _require(min(self.checkpoint_every, self.keep) >= 1, "checkpoint_every and keep must be >= 1")
        _require(self.max_minutes is None or self.max_minutes > 0, f"max_minutes must be > 0, got {self.max_minutes}")
        _require(
            self.video is None or self.mixture == MixtureConfig(),
            "a run is of a video or of a mixture: give one of them",
        )
