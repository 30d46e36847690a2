"""Clips of the procedural world: from a seed to a video whose cameras, depth, points and flow are known exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geometry.cameras import inverse, project, transform, unproject
from geometry.types import Geometry
from geometry.world.cast import Hit, cast, rays_through
from geometry.world.render import render
from geometry.world.shot import Shot
from geometry.world.stage import Take, draw_take, stack_takes
from geometry.world.trajectory import MOTIONS, Motion


@dataclass(frozen=True)
class CameraCommand:
    """What the camera was told to do; a batch has one motion a clip."""

    motion: Motion | tuple[Motion, ...]
    speed: Float[Tensor, "*batch"]
    """0.7 slow to 1.4 fast; 0 for a static camera."""
    relative_pose: Float[Tensor, "*batch pairs 6"]
    """Camera i+1 in camera i, without hand-held shake: translation (scene units), then rotation vector (radians)."""


@dataclass(frozen=True)
class Tracks:
    """N points of frame 0 followed through a clip."""

    pixels: Float[Tensor, "*batch T N 2"]
    """(u, v), also while the point is hidden or out of view."""
    depth: Float[Tensor, "*batch T N"]
    points: Float[Tensor, "*batch T N 3"]
    """World."""
    visible: Bool[Tensor, "*batch T N"]
    """In view and hidden by nothing. Never True for a point of the sky, which has no place."""


@dataclass(frozen=True)
class Clip:
    """A clip, or a batch of clips, and everything that is known about it."""

    video: Float[Tensor, "*batch T 3 H W"]
    geometry: Geometry
    """Exact; `flow_grid` is "frame", and the last frame's flow leads to where things will be one frame later."""
    instances: Int[Tensor, "*batch T H W"]
    """-1 sky, 0 room or ground, n + 1 body n."""
    caption: str | tuple[str, ...]
    command: CameraCommand
    shot: Shot
    """What the clip was rendered from, always with a batch axis; `film` renders it again."""
    supersample: int = 2
    """Rays per pixel side that the colours were rendered with."""

    @property
    def batched(self) -> bool:
        return self.video.ndim == 5

    def __len__(self) -> int:
        return len(self.shot.camera)

    def __getitem__(self, index: int) -> "Clip":
        """One clip of a batch, without the batch axis."""
        assert self.batched, "a single clip has no batch axis to index"
        command = CameraCommand(
            self.command.motion[index],  # type: ignore[arg-type]
            self.command.speed[index],
            self.command.relative_pose[index],
        )
        shot = self.shot.map(lambda x: x[index : index + 1] if index >= 0 else x[index:][:1])
        scene = self.geometry.map(lambda x: x[index])
        return Clip(
            self.video[index], scene, self.instances[index], self.caption[index], command, shot, self.supersample
        )

    def track(self, pixels: Float[Tensor, "*batch N 2"]) -> Tracks:
        """Follow what is seen at N pixels (u, v) of frame 0 (centres at +0.5); exact, also where hidden."""
        batch = pixels if self.batched else pixels[None]
        tracks = _track(self.shot, batch, (self.video.shape[-2], self.video.shape[-1]))
        return Tracks(*(x if self.batched else x[0] for x in tracks))

    def boxes(self) -> Float[Tensor, "*batch T N 4"]:
        """Box (left, top, right, bottom) in pixels around what is seen of each body; NaN while none of it is."""
        numbers = torch.arange(1, self.shot.shape.shape[1] + 1, device=self.instances.device)
        mask = self.instances[..., None, :, :] == numbers[:, None, None]
        edges = []
        for axis in (-2, -1):
            line = mask.any(dim=axis)
            where = torch.arange(line.shape[-1], device=line.device, dtype=self.video.dtype)
            low = torch.where(line, where, torch.inf).amin(-1)
            high = torch.where(line, where + 1, -torch.inf).amax(-1)
            edges.append((low, high))
        box = torch.stack([edges[0][0], edges[1][0], edges[0][1], edges[1][1]], dim=-1)
        return torch.where(box.isfinite(), box, torch.nan)


def make_clip(
    seed: int,
    *,
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    dynamic: bool = False,
    motion: Motion | None = None,
    jitter: float = 0.0,
    sway: float = 0.0,
    texture_scale: float = 1.0,
    supersample: int = 2,
    scene: int | None = None,
    device: torch.device | str | None = None,
) -> Clip:
    """One clip of the procedural world; the same seed gives the same bits, alone or in `make_clips`.

    Args:
        seed: scene, camera command and captions all follow from it.
        frames: T. The motion of a whole clip does not depend on it: more frames are smaller steps.
        size: (H, W); the horizontal field of view is drawn, pixels are square.
        dynamic: at least one large body slides, spins or bounces.
        motion: one of `MOTIONS`; None draws it.
        jitter: hand-held shake, the standard deviation per axis and frame: this many degrees of rotation and 0.02 as
            many scene units of translation. Scene and command do not change with it.
        sway: the bobbing of somebody who walks, a wave of some eight frames: its root mean square, degrees of pitch and
            0.02 as many scene units of height. The same holds for it.
        texture_scale: size of noise cells, checks and stripes. At 1 they span 12 to 40 % of the width of the view,
            far above the pixel grid's limit; below 0.2 at 64 pixels they reach it.
        supersample: rays per pixel side for the colour; 1 leaves the edges jagged. Depth is always the pixel centre's.
        scene: number of a scene (`stage.known_scene`; `dynamic` ones are others); then only the camera's path, shake
            and sway are drawn.

    Raises:
        ValueError: an argument out of range, by name.
    """
    return make_clips(
        [seed],
        frames=frames,
        size=size,
        dynamic=dynamic,
        motion=motion,
        jitter=jitter,
        sway=sway,
        texture_scale=texture_scale,
        supersample=supersample,
        scenes=None if scene is None else [scene],
        device=device,
    )[0]


def make_clips(
    seeds: Sequence[int],
    *,
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    dynamic: bool = False,
    motion: Motion | None = None,
    jitter: float = 0.0,
    sway: float = 0.0,
    texture_scale: float = 1.0,
    supersample: int = 2,
    scenes: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Clip:
    """A batch of clips with a leading axis; arguments as in `make_clip`, with a scene for each seed or for none."""
    if len(seeds) == 0 or min(seeds) < 0:
        raise ValueError(f"seeds must be one or more numbers >= 0, got {list(seeds)}")
    if frames < 1 or min(size) < 1 or supersample < 1:
        raise ValueError(f"frames, size and supersample must be at least 1, got {frames}, {size}, {supersample}")
    if motion is not None and motion not in MOTIONS:
        raise ValueError(f"motion must be None or one of {', '.join(MOTIONS)}, got {motion!r}")
    if min(jitter, sway) < 0 or texture_scale <= 0:
        raise ValueError(
            f"jitter and sway must be >= 0 and texture_scale > 0, got {jitter}, {sway} and {texture_scale}"
        )
    if scenes is not None and (len(scenes) != len(seeds) or min(scenes) < 0):
        raise ValueError(f"scenes must be {len(seeds)} numbers >= 0, one for each seed, got {list(scenes)}")
    numbers: Sequence[int | None] = [None] * len(seeds) if scenes is None else scenes
    takes = [
        draw_take(seed, frames, size, dynamic, motion, jitter, texture_scale, scene, sway)
        for seed, scene in zip(seeds, numbers, strict=True)
    ]
    return _clip(takes, size, supersample, torch.device("cpu") if device is None else torch.device(device))


def _clip(takes: list[Take], size: tuple[int, int], supersample: int, device: torch.device) -> Clip:
    shot = stack_takes(takes).map(lambda x: x.to(device))
    video, geometry, instances = film(shot, size, supersample)
    command = CameraCommand(
        tuple(take.move.motion for take in takes),
        torch.tensor([take.move.speed for take in takes], device=device),
        torch.stack([take.relative_pose for take in takes]).to(device),
    )
    return Clip(video, geometry, instances, tuple(take.caption for take in takes), command, shot, supersample)


def film(
    shot: Shot, size: tuple[int, int], supersample: int = 2, shift: Float[Tensor, "B T H W 2"] | None = None
) -> tuple[Float[Tensor, "B T 3 H W"], Geometry, Int[Tensor, "B T H W"]]:
    """Render a shot: video, exact geometry, instance ids. `shift`: see `render.render`."""
    video, hit = render(shot, size, supersample, shift)
    intrinsics = shot.intrinsics[:, None].expand(-1, shot.camera.shape[1], -1, -1).contiguous()
    points = unproject(hit.depth, intrinsics, shot.c2w)
    flow = _scene_flow(shot, hit, points)
    valid = hit.instance >= 0
    scene = Geometry(shot.c2w, intrinsics, hit.depth, points, valid=valid, scene_flow=flow, flow_grid="frame")
    return video, scene, hit.instance


def _scene_flow(shot: Shot, hit: Hit, points: Tensor) -> Tensor:
    """(M - I) x for the body's own motion M, both in world axes; zero for what stands still."""
    B, T, N = shot.motion.shape[:3]
    if not shot.motion.any():
        return torch.zeros_like(points)
    still = torch.zeros_like(shot.motion[:, :, :1])
    table = torch.cat([still, shot.motion], dim=2)[..., :3, :].reshape(B * T * (N + 1), 12)
    frame = torch.arange(B * T, device=points.device).view(B, T, 1, 1)
    row = (frame * (N + 1) + hit.instance.clamp(min=0)).flatten()
    m = table.index_select(0, row).view(*hit.instance.shape, 3, 4)
    return m[..., 0] * points[..., :1] + m[..., 1] * points[..., 1:2] + m[..., 2] * points[..., 2:] + m[..., 3]


def _track(shot: Shot, pixels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T = shot.camera.shape[1]
    first = shot.at([0])
    x, y = rays_through(shot, pixels[:, None, None])
    hit = cast(first, x, y)
    depth0, instance = hit.depth[:, 0, 0], hit.instance[:, 0, 0]
    stage = transform(
        shot.camera[:, 0], torch.stack([x[:, 0, 0], y[:, 0, 0], torch.ones_like(x[:, 0, 0])], -1) * depth0[..., None]
    )
    # Each point rides on its body: from the stage into the body's axes in frame 0, and out again in frame i.
    eye = torch.eye(4, dtype=stage.dtype, device=stage.device).expand(*shot.pose.shape[:2], 1, 4, 4)
    pose = torch.cat([eye, shot.pose], dim=2)
    mine = instance.clamp(min=0)[:, None, :, None, None].expand(-1, T, -1, 4, 4)
    ride = pose.gather(2, mine)
    local = transform(inverse(ride[:, 0]), stage)
    points = transform(ride, local[:, None].expand(-1, T, -1, -1))
    intrinsics = shot.intrinsics[:, None].expand(-1, T, -1, -1)
    at, depth = project(points, intrinsics, shot.camera)
    seen = cast(shot, *rays_through(shot, at[:, :, None]))
    nothing_before = (seen.depth[:, :, 0] - depth).abs() < 1e-3 * depth
    height, width = size
    inside = (at[..., 0] >= 0) & (at[..., 0] < width) & (at[..., 1] >= 0) & (at[..., 1] < height)
    visible = inside & nothing_before & (seen.instance[:, :, 0] == instance[:, None]) & (instance[:, None] >= 0)
    return at, depth, transform(shot.world[:, None], points), visible
