"""Rewards that another process gives: a vision-language model, a preference model, whatever has its own environment.

One POST a rollout. The request is safetensors bytes: "video" (uint8 [N T 3 H W]) or "latents" (float32 [N C L h w]),
with the N prompts as a JSON list in the metadata. The answer is JSON, {"rewards": [N numbers, or null for a video that
cannot be scored]}. Nothing is ever unpickled, no redirect followed, no proxy used. `serve` is the other end.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import urlsplit, urlunsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vggrpo.reward_config import RemoteConfig
from vggrpo.trainer import OfRollout
from vggrpo.types import Rollout

KIND = "application/x-safetensors"
"""Content type of a request; a page in a browser cannot send it unasked."""
ANSWER_BYTES = 4096
"""Of an answer, beside 64 for each video."""
MEGABYTE = 2**20


def remote_reward(name: str, cfg: RemoteConfig, decode: Callable[[Tensor], Tensor]) -> OfRollout:
    """A reward over HTTP: asked before the others are computed, waited for after them.

    Args:
        decode: z0 [B K *latent] -> video [B K T 3 H W] in [0, 1]; called if the reward takes the video.
    """

    def ask(rollout: Rollout) -> Callable[[], Tensor]:
        groups = rollout.z0.shape[:2]
        content = decode(rollout.z0) if cfg.takes == "video" else rollout.z0.float()
        if cfg.takes == "video":
            content = (255 * content).round().clamp(0, 255).byte()
        prompts = [prompt for prompt in rollout.cond.prompt for _ in range(groups[1])]
        body = packed(cfg.takes, content.flatten(0, 1), prompts)
        answer: Future[list[float]] = Future()
        Thread(target=_fill, args=(answer, name, cfg, body, len(prompts)), daemon=True).start()

        def wait() -> Tensor:
            return rollout.z0.new_tensor(answer.result(), dtype=torch.float32).view(groups)

        return wait

    return OfRollout(ask)


def packed(takes: str, content: Tensor, prompts: Sequence[str]) -> bytes:
    """The bytes of a request."""
    return save({takes: content.cpu().contiguous()}, metadata={"prompts": json.dumps(list(prompts))})


def post(name: str, cfg: RemoteConfig, body: bytes, count: int) -> list[float]:
    """Send a request and read `count` rewards; null is NaN.

    Raises:
        ValueError: a request above the limit, or an answer that is not `count` rewards.
        OSError: nobody there, an error from there, or no answer in time; each in one line with the reward's name.
    """
    where = f"reward {name!r} at {cfg.url}"
    if len(body) > cfg.max_megabytes * MEGABYTE:
        raise ValueError(
            f"{where}: a request of {len(body) / MEGABYTE:.1f} MB is above max_megabytes {cfg.max_megabytes:g}:"
            " raise it, or sample fewer or smaller videos at once"
        )
    url, deadline = urlsplit(cfg.url), time.monotonic() + cfg.timeout
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=cfg.timeout)
    limit = ANSWER_BYTES + 64 * count
    try:
        connection.request("POST", urlunsplit(("", "", url.path or "/", url.query, "")), body, {"Content-Type": KIND})
        connection.sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        response, said = connection.getresponse(), b""
        while len(said) <= limit and (some := response.read1(limit + 1 - len(said))):
            said += some
            if time.monotonic() > deadline:
                raise TimeoutError
    except TimeoutError:
        raise TimeoutError(f"{where}: no answer within {cfg.timeout:g} seconds") from None
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{where}: {str(error) or type(error).__name__}: is the server running?") from None
    finally:
        connection.close()
    if response.status != 200:
        raise ConnectionError(f"{where}: status {response.status}: {_line(said)}")
    return _rewards(where, said, limit, count)


def serve(
    reward: Callable[[Tensor, list[str]], Tensor | Sequence[float]],
    *,
    port: int,
    host: str = "127.0.0.1",
    max_megabytes: float = 256.0,
) -> ThreadingHTTPServer:
    """The other end: `serve(reward, port=8000).serve_forever()`.

    Args:
        reward: (video uint8 [N T 3 H W], or latents [N C L h w]; N prompts) -> N numbers, NaN for what cannot be
            scored. It is called by one thread at a time.
        port: 0 takes a free one (`server_port`).
        host: who may ask: by default this machine alone. There is no password.
        max_megabytes: of a request.
    """
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 60.0  # seconds that a client may keep a thread waiting

        def do_POST(self) -> None:
            """Answer a request, or say in one line what is wrong with it."""
            length = self.headers.get("Content-Length", "")
            if self.headers.get("Content-Type") != KIND:
                self.say(415, {"error": f"the content type must be {KIND}"})
            elif not length.isdecimal():
                self.say(411, {"error": "a request must say its length"})
            elif int(length) > max_megabytes * MEGABYTE:
                self.say(413, {"error": f"a request may have {max_megabytes:g} MB"})
            else:
                self.say(*self.answer(self.rfile.read(int(length))))

        def answer(self, body: bytes) -> tuple[int, dict[str, object]]:
            """Status and JSON."""
            try:
                ((_, content),) = load(body).items()
                size = int.from_bytes(body[:8], "little")
                prompts = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["prompts"])
                if len(prompts) != len(content):
                    raise ValueError(f"{len(prompts)} prompts for {len(content)} samples")
            except (SafetensorError, KeyError, ValueError) as error:
                return 400, {"error": f"not one tensor with prompts: {_line(str(error).encode())}"}
            try:
                with lock, torch.no_grad():
                    numbers = torch.as_tensor(reward(content, prompts), dtype=torch.float64).tolist()
            except Exception as error:
                return 500, {"error": f"the reward failed: {type(error).__name__}: {_line(str(error).encode())}"}
            return 200, {"rewards": [x if math.isfinite(x) else None for x in numbers]}

        def say(self, status: int, content: dict[str, object]) -> None:
            """Send it."""
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a line for every rollout is of no use."""

    return ThreadingHTTPServer((host, port), Handler)


def _fill(answer: Future[list[float]], name: str, cfg: RemoteConfig, body: bytes, count: int) -> None:
    try:
        answer.set_result(post(name, cfg, body, count))
    except Exception as error:  # of another thread: it is raised where the answer is waited for
        answer.set_exception(error)


def _rewards(where: str, said: bytes, limit: int, count: int) -> list[float]:
    wanted = f'{{"rewards": [{count} numbers or nulls]}}'
    if len(said) > limit:
        raise ValueError(f"{where}: an answer of more than {limit} bytes; expected {wanted}")
    try:
        numbers = json.loads(said, parse_constant=lambda word: word)["rewards"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{where}: expected {wanted}, got {_line(said)}") from None
    right = isinstance(numbers, list) and len(numbers) == count
    if not right or not all(x is None or type(x) in (int, float) for x in numbers):
        raise ValueError(f"{where}: expected {wanted}, got {_line(said)}")
    return [math.nan if x is None else float(x) for x in numbers]


def _line(said: bytes) -> str:
    text = " ".join(said.decode(errors="replace").split())
    return text if len(text) <= 120 else f"{text[:120]} ..."
