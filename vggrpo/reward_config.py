"""Rewards from elsewhere, described: functions to import, and servers to ask."""

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal
from urllib.parse import urlsplit


@dataclass(frozen=True)
class EpipolarConfig:
    """Matches in the decoded video, for the reward `epipolar` (`matches.py`)."""

    stride: int = 2
    """From one frame of a pair to the other. Near ones are matched best, but pairs whose cameras are closer together
    than a fiftieth of the depth say nothing: more of it for long videos and slow cameras."""
    cells: int = 8
    """Along the shorter side, one match each. More see finer, and displacements of one or two of them at most."""

    def __post_init__(self) -> None:
        if self.stride < 1 or self.cells < 4:
            raise ValueError(f"stride must be >= 1 and cells >= 4, got {self.stride} and {self.cells}")


@dataclass(frozen=True)
class ImportedConfig:
    """A reward that is imported; only with `--allow-import`, for it may do anything."""

    path: str
    """package.module:function, or the name of an installed entry point of the group vggrpo.rewards."""
    takes: Literal["geometry", "video", "both"] = "geometry"
    """What it is called with: the scene; the decoded video [B K T 3 H W] in [0, 1] and the B prompts; or both, the
    scene first, such as for `rewards.epipolar` with matches of a better matcher than ours."""


@dataclass(frozen=True)
class RemoteConfig:
    """A reward that another process gives, over HTTP (`remote.py` says in which form)."""

    url: str
    """Where, such as http://127.0.0.1:8000/score."""
    takes: Literal["video", "latents"] = "video"
    """What it is sent; for the video the VAE is loaded."""
    timeout: float = 120.0
    """Seconds until the answer must be there."""
    max_megabytes: float = 256.0
    """Of one request."""
    other_machines: bool = False
    """Whether the samples and prompts may leave this machine."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must be http:// or https://, got {self.url!r}")
        if min(self.timeout, self.max_megabytes) <= 0:
            raise ValueError("timeout and max_megabytes must be > 0")
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if host is None or "@" in parts.netloc:
            raise ValueError(f"url must be http://host:port/path, without a user, got {self.url!r}")
        if not self.other_machines and not is_loopback(host):
            raise ValueError(
                f"{host} may be another machine, and samples would leave this one: say other_machines: true if they may"
            )


def is_loopback(host: str | None) -> bool:
    """Whether the host of a URL is this machine, by its name or number."""
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False
