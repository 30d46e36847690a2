"""Rewards from elsewhere: imported only if that was allowed, asked over HTTP in bytes, decoded for only if needed."""

import json
import math
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load, save_file

from rewards import Matches, camera_motion, epipolar
from tests.rewards.helpers import line, walk
from vggrpo import cli, further_rewards
from vggrpo.base_motion import prior_of
from vggrpo.build import batches, chosen_rewards
from vggrpo.camera_paths import follow, read_paths
from vggrpo.config import VideoConfig
from vggrpo.decoded import Decoder
from vggrpo.evaluation import taught_judges
from vggrpo.further_rewards import import_reward
from vggrpo.remote import KIND, packed, post, remote_reward, serve
from vggrpo.reward_config import ImportedConfig, RemoteConfig
from vggrpo.runtime import Run
from vggrpo.trainer import score
from vggrpo.types import Condition, Rollout

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "launch/recipes/tiny.yaml")
HERE = "tests.vggrpo.test_further_rewards"
COND = Condition(["a slow pan", "a fast truck"])


def brightness(video, prompts):
    """A reward of pixels, [B K T 3 H W] and B prompts."""
    assert len(prompts) == len(video)
    return video.mean(dim=(2, 3, 4, 5))


def first_depth(scene):
    """A reward of a geometry."""
    return scene.depth[..., 0, 0, 0]


def follows_the_epipolar_lines(scene, video, prompts):
    """`rewards.epipolar` with matches of one's own: here, that nothing moves in the picture."""
    assert list(video.shape[:3]) == [*scene.depth.shape[:2], 5]
    assert len(prompts) == len(video)
    batch, (H, W) = scene.batch, scene.depth.shape[-2:]
    rng = torch.Generator().manual_seed(0)
    at = torch.rand(*batch, 1, 16, 2, generator=rng) * torch.tensor([W, H])
    pairs = torch.tensor([0]), torch.tensor([4])
    return epipolar(scene, Matches(*pairs, at, at, torch.ones(*batch, 1, 16, dtype=torch.bool)), baseline=1e-4)


def no_pixels(z0):
    pytest.fail("nobody asked for pixels")


NOT_A_REWARD = 3


def rollout_of(z0):
    return Rollout(COND, z0, torch.zeros(*z0.shape[:2], 1), None)


def latents(K=3):
    return torch.rand(2, K, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def served():
    """Serves a reward on a free port; yields the function that does so, which gives the URL."""
    servers = []

    def start(server):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/score"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def answering(served):
    """A server that answers whatever it is told to: status, body, seconds until then, headers."""

    def start(status=200, body=b"", wait=0.0, headers=()):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(wait)
                self.send_response(status)
                for header in headers:
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        return served(HTTPServer(("127.0.0.1", 0), Handler))

    return start


def test_a_server_scores_what_the_policy_sampled(served):
    seen = {}

    def reward(content, prompts):
        seen.update(content=content, prompts=prompts)
        numbers = content.double().flatten(1).mean(1)
        numbers[4] = math.nan
        return numbers

    url = served(serve(reward, port=0))
    z0, video = latents(), torch.rand(2, 3, 1, 3, 4, 4)

    asked = {
        "latents": remote_reward("a", RemoteConfig(url, takes="latents"), no_pixels),
        "video": remote_reward("b", RemoteConfig(url, takes="video"), lambda z0: video),
    }
    expected = {"latents": z0, "video": (255 * video).round()}
    for name, fn in asked.items():
        found = score({name: fn}, None, rollout_of(z0))[name]
        right = expected[name].flatten(2).mean(2)
        assert found.isnan().tolist() == [[False, False, False], [False, True, False]]
        torch.testing.assert_close(found.nan_to_num(0), right * ~found.isnan(), rtol=1e-5, atol=1e-5)
        assert seen["prompts"] == ["a slow pan"] * 3 + ["a fast truck"] * 3
    assert seen["content"].dtype == torch.uint8
    assert list(seen["content"].shape) == [6, 1, 3, 4, 4]


def test_a_request_is_safetensors_and_json_and_nothing_else():
    body = packed("latents", latents().flatten(0, 1), ["a", 'b "quoted"'])
    assert torch.equal(load(body)["latents"], latents().flatten(0, 1))
    size = int.from_bytes(body[:8], "little")
    assert json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["prompts"]) == ["a", 'b "quoted"']


def test_servers_work_while_the_other_rewards_are_computed(served):
    """Each waits until both have been asked, and the third reward until then: one after the other would never end."""
    both = threading.Barrier(3, timeout=20)

    def meets(content, prompts):
        both.wait()
        return torch.zeros(len(prompts))

    def own(scene):
        both.wait()
        return torch.ones(2, 3)

    urls = [served(serve(meets, port=0)) for _ in range(2)]
    rewards = {
        f"remote{n}": remote_reward("r", RemoteConfig(url, takes="latents"), no_pixels) for n, url in enumerate(urls)
    }
    found = score({**rewards, "own": own}, None, rollout_of(latents()))
    assert list(found) == ["remote0", "remote1", "own"]
    assert found["own"].eq(1).all()
    assert found["remote1"].eq(0).all()


@pytest.mark.parametrize(
    ("told", "kind", "message"),
    [
        ({"body": b"not json"}, ValueError, r'expected \{"rewards": \[2 numbers or nulls\]\}, got not json'),
        ({"body": b'{"rewards": [1.0]}'}, ValueError, r"\[2 numbers or nulls"),
        ({"body": b'{"rewards": [1.0, NaN]}'}, ValueError, r"\[2 numbers or nulls"),
        ({"body": b'{"rewards": [1.0, true]}'}, ValueError, r"\[2 numbers or nulls"),
        ({"body": b"[1.0, 2.0]"}, ValueError, r"\[2 numbers or nulls"),
        ({"body": b'{"rewards": [1.0, "2"]}' + b" " * 10_000}, ValueError, "an answer of more than 4224 bytes"),
        ({"status": 503, "body": b"loading\nthe model"}, ConnectionError, "status 503: loading the model$"),
        ({"status": 302, "headers": [("Location", "http://127.0.0.1:1/")]}, ConnectionError, "status 302"),
        ({"wait": 1.5}, TimeoutError, "no answer within 0.4 seconds"),
    ],
)
def test_a_wrong_answer_is_one_line_with_the_reward_and_the_server(answering, told, kind, message):
    cfg = RemoteConfig(answering(**told), timeout=0.4 if "wait" in told else 30.0)
    with pytest.raises(kind, match=message) as error:
        post("vlm", cfg, b"", 2)
    assert str(error.value).startswith(f"reward 'vlm' at {cfg.url}")
    assert "\n" not in str(error.value)


def test_nobody_there_and_too_much_to_send_are_one_line():
    cfg = RemoteConfig("http://127.0.0.1:9/score", takes="latents", timeout=5.0)
    with pytest.raises(ConnectionError, match=r"reward 'vlm' at .*: is the server running\?"):
        score({"vlm": remote_reward("vlm", cfg, no_pixels)}, None, rollout_of(latents()))
    with pytest.raises(ValueError, match=r"a request of 2\.0 MB is above max_megabytes 1"):
        post("vlm", RemoteConfig("http://127.0.0.1:9/score", max_megabytes=1.0), bytes(2**21), 2)


def test_the_server_refuses_what_is_no_request(served):
    def reward(content, prompts):
        raise RuntimeError("no\nmemory")

    url = served(serve(reward, port=0, max_megabytes=1.0))

    def status(body, headers):
        connection = HTTPConnection("127.0.0.1", int(url.split(":")[2].split("/")[0]), timeout=20)
        connection.putrequest("POST", "/")
        for header in headers.items():
            connection.putheader(*header)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())["error"]

    good = packed("latents", latents().flatten(0, 1), ["a"] * 6)
    assert status(b"", {"Content-Type": "text/plain", "Content-Length": "0"})[0] == 415
    assert status(b"", {"Content-Type": KIND})[0] == 411
    assert status(b"", {"Content-Type": KIND, "Content-Length": str(2**21)})[0] == 413
    short = packed("latents", latents().flatten(0, 1), ["a"])
    assert status(short, {"Content-Type": KIND, "Content-Length": str(len(short))}) == (
        400,
        "not one tensor with prompts: 1 prompts for 6 samples",
    )
    assert status(b"pickle", {"Content-Type": KIND, "Content-Length": "6"})[0] == 400
    assert status(good, {"Content-Type": KIND, "Content-Length": str(len(good))}) == (
        500,
        "the reward failed: RuntimeError: no memory",
    )


def test_samples_leave_the_machine_only_if_that_was_said():
    for url in ("http://localhost:1/", "http://127.0.0.1:1", "https://[::1]:1/x"):
        RemoteConfig(url)
    for url in ("http://10.0.0.1:1/", "http://example.org/", "http://0.0.0.0:1/"):
        with pytest.raises(ValueError, match="say other_machines: true if they may"):
            RemoteConfig(url)
        RemoteConfig(url, other_machines=True)
    for url in ("ftp://localhost/", "localhost:8000"):
        with pytest.raises(ValueError, match="url must be http:// or https://"):
            RemoteConfig(url)
    for url in ("http://", "http://localhost:port/", "http://me:secret@localhost/"):
        with pytest.raises(ValueError, match="url must be http://host:port/path"):
            RemoteConfig(url)
    with pytest.raises(ValueError, match="timeout and max_megabytes must be > 0"):
        RemoteConfig("http://localhost/", timeout=0.0)


def test_code_runs_only_if_that_was_allowed(tmp_path, monkeypatch):
    code = "from pathlib import Path\nPath('ran').touch()\ndef reward(scene): return 0\n"
    (tmp_path / "stranger.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    video = VideoConfig(imported={"mine": ImportedConfig("stranger:reward")})
    decode = Decoder(Path("nowhere"), 1)
    with pytest.raises(
        ValueError, match=r"reward 'mine' would run code .* stranger:reward: give --allow-import"
    ) as error:
        further_rewards.further_rewards(video, {"mine": 1.0}, {}, decode, allow_import=False)
    assert "\n" not in str(error.value)
    assert not Path("ran").exists()
    found = further_rewards.further_rewards(video, {"mine": 1.0}, {}, decode, allow_import=True)
    assert Path("ran").exists(), "the control"
    assert "mine" in found


def test_rewards_are_found_by_path_and_by_entry_point(monkeypatch):
    assert import_reward(f"{HERE}:brightness").__name__ == "brightness"
    point = EntryPoint("bright", f"{HERE}:brightness", further_rewards.GROUP)
    monkeypatch.setattr(further_rewards, "entry_points", lambda group: [point] if group == "vggrpo.rewards" else [])
    assert import_reward("bright").__name__ == "brightness"
    for path, message in {
        "dark": r"no reward 'dark': give package.module:function, or an entry point .* \(there: bright\)",
        "no_such_package:reward": "cannot import the reward no_such_package:reward: No module named",
        f"{HERE}:no_such_reward": "cannot import the reward .*has no attribute 'no_such_reward'",
        f"{HERE}:NOT_A_REWARD": "is not a function but a int",
    }.items():
        with pytest.raises(ValueError, match=message):
            import_reward(path)


def test_the_vae_is_loaded_when_the_first_reward_asks_for_pixels_and_once(monkeypatch):
    from diffusers import AutoencoderKLWan

    loads, real = [], AutoencoderKLWan.from_pretrained
    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", lambda *a, **k: loads.append(a) or real(*a, **k))
    path = f"{HERE}:brightness"
    video = VideoConfig(
        imported={
            "bright": ImportedConfig(path, "video"),
            "again": ImportedConfig(path, "video"),
            "near": ImportedConfig(f"{HERE}:first_depth"),
        }
    )
    decode = Decoder(ROOT / "assets/tiny-wan", at_once=2)
    weights = {"bright": 1.0, "again": 1.0, "near": 1.0}
    rewards = further_rewards.further_rewards(video, weights, {}, decode, allow_import=True)
    z0 = torch.randn(2, 2, 16, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    scene = walk(line(3, (0.1, 0, 0))).map(lambda x: x.expand(2, 2, *x.shape))
    assert score({"near": rewards["near"]}, scene, rollout_of(z0))["near"].eq(2).all()
    assert loads == []
    found = score({name: rewards[name] for name in weights}, scene, rollout_of(z0))
    assert len(loads) == 1
    assert torch.equal(found["bright"], found["again"])
    assert decode(z0) is decode(z0)
    assert list(decode(z0).shape) == [2, 2, 5, 3, 16, 16]
    assert found["bright"].std() > 0
    one = decode(z0[:1, 1:].clone())
    torch.testing.assert_close(one[0, 0], Decoder(ROOT / "assets/tiny-wan", 4)(z0)[0, 1], atol=1e-4, rtol=1e-4)


def test_a_reward_of_the_wrong_shape_is_named():
    def wrong(video, prompts):
        return video.mean()

    rewards = {"wrong": further_rewards.of_video("wrong", wrong, lambda z0: z0)}
    with pytest.raises(ValueError, match=r"reward 'wrong' must be \[B K\] = \[2, 3\], got \[\]"):
        score(rewards, None, rollout_of(latents()))
    no_tensor = further_rewards.of_geometry("mine", lambda scene: 0.5)
    with pytest.raises(ValueError, match=r"reward 'mine' must give a tensor \[B K\], got a float"):
        no_tensor(walk(line(3, (0.1, 0, 0))))


def test_camera_paths_belong_to_their_prompts(tmp_path):
    prompts = ["a truck to the right", "a truck to the left"]
    scenes = [walk(line(5, (side, 0, 0))) for side in (0.3, -0.3)]
    save_file({"c2w": torch.stack([scene.c2w for scene in scenes])}, tmp_path / "paths.safetensors")
    paths = read_paths(str(tmp_path / "paths.safetensors"), prompts, 5)
    cond = next(batches(prompts, Run(Accelerator(cpu=True), 2, 2), paths))
    both = {
        name: torch.stack([getattr(scene, name) for scene in scenes])
        for name in ("c2w", "intrinsics", "depth", "points")
    }
    stacked = type(scenes[0])(**{name: x[None].expand(2, *x.shape) for name, x in both.items()})  # each prompt has both
    rollout = Rollout(cond, torch.zeros(2, 2), torch.zeros(2, 2, 1), None)
    found = score({"follow": follow()}, stacked, rollout)["follow"]
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5], [0.5, 1.0]]), atol=2e-3, rtol=0)
    sparse = stacked.map(lambda x: x[:, :, ::4])  # a scene of latent frames
    torch.testing.assert_close(score({"f": follow()}, sparse, rollout)["f"], found, atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match=r"camera_following needs a camera path for each prompt: set video\.cameras"):
        follow().reward(stacked, Condition(prompts))


def test_bad_camera_paths_are_named(tmp_path):
    file = str(tmp_path / "paths.safetensors")
    with pytest.raises(ValueError, match=r"cannot read camera paths from .*paths\.safetensors"):
        read_paths(file, ["a"], 5)
    save_file({"c2w": torch.eye(4).repeat(1, 3, 1, 1)}, file)
    with pytest.raises(
        ValueError, match=r"must hold c2w \[1, 5, 4, 4\], one path for each prompt, got .*\[1, 3, 4, 4\]"
    ):
        read_paths(file, ["a"], 5)
    save_file({"c2w": 2 * torch.eye(4).repeat(1, 5, 1, 1)}, file)
    with pytest.raises(ValueError, match="must be rotations"):
        read_paths(file, ["a"], 5)


def test_each_prompt_has_its_own_motion_prior():
    scene = walk(line(9, (0.02, 0, 0)), depth=2.0).map(lambda x: x.expand(2, 1, *x.shape))
    own = float(camera_motion(scene, stride=8)[0, 0])
    reward = prior_of({"a slow pan": own, "a fast truck": 2 * own}).reward(scene, COND)
    torch.testing.assert_close(reward, torch.tensor([[1.0], [0.3826]]), atol=2e-3, rtol=0)


def test_further_rewards_are_chosen_by_name_beside_the_shipped_ones():
    mine = {"mine": first_depth}
    assert chosen_rewards({"mine": 1.0, "motion_smoothness": 1.0}, further=mine)["mine"] is first_depth
    with pytest.raises(ValueError, match="no reward 'mime': did you mean 'mine'"):
        chosen_rewards({"mime": 1.0}, further=mine)


SMALL = ["video.motion_samples=0", "video.frames=5", "video.height=32", "video.width=32", "sampling.num_steps=2",
         "sampling.guidance_scale=1", "sampling.window={size: 1, stop: 1}", "grpo.group_size=3",
         "grpo.num_prompts=1"]  # fmt: skip


def test_a_run_learns_from_all_of_them(served, tmp_path):
    """One iteration of the embedded video model: rewards imported and remote, told a path and the base's motion."""
    (tmp_path / "two.txt").write_text("The camera pans left.\nThe camera trucks right.\n")
    paths = torch.stack([walk(line(5, (0.2, 0, 0))).c2w, walk(line(5, (-0.2, 0, 0))).c2w])
    save_file({"c2w": paths}, tmp_path / "paths.safetensors")
    asked = []

    def far(content, prompts):
        asked.append((list(content.shape), prompts))
        return content.double().flatten(1).std(1)

    url = served(serve(far, port=0))
    words = [
        *(f"video.prompts={tmp_path}/two.txt", f"video.cameras={tmp_path}/paths.safetensors", "video.motion_samples=1"),
        *("video.frames=5", "video.height=32", "video.width=32", "sampling.num_steps=2", "sampling.guidance_scale=1"),
        *("sampling.window={size: 1, stop: 1}", "grpo.group_size=3", "grpo.num_iterations=1", "optimizer.lr=0.01"),
        f"video.imported={{bright: {{path: '{HERE}:brightness', takes: video}}, "
        f"lines: {{path: '{HERE}:follows_the_epipolar_lines', takes: both}}}}",
        f"video.remote={{far: {{url: '{url}', takes: latents}}}}",
        "grpo.weights={bright: 1, far: 1, camera_following: 1, lines: 1, scene_smoothness: 1}",
        "grpo.gates={scene_smoothness: motion_prior}",
    ]
    assert cli.main(["train", RECIPE, *words, f"out={tmp_path}/run", "--allow-import"]) == 0
    assert asked == [([3, 16, 2, 4, 4], ["The camera pans left."] * 3)]
    numbers = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    for name in ("bright", "far", "camera_following", "lines", "motion_prior", "scene_smoothness"):
        assert math.isfinite(numbers[f"reward/{name}/mean"]), name
        assert numbers[f"reward/{name}/std"] > 0, name
    assert numbers["grad_norm"] > 0


def test_a_recipe_that_names_code_is_planned_where_that_is_allowed(capsys):
    words = ["plan", RECIPE, f"video.imported={{bright: {{path: '{HERE}:brightness', takes: video}}}}", *SMALL]
    words += ["grpo.weights={bright: 1, scene_smoothness: 1}"]
    assert cli.main([*words, "--no-step"]) == 0, "a plan by formulas runs nothing"
    assert cli.main(words) == 2
    assert "give --allow-import if you trust it" in capsys.readouterr().err
    assert cli.main([*words, "--allow-import"]) == 0
    assert "groups without signal  0% (bright)" in capsys.readouterr().out


def test_a_recipe_alone_trains_on_epipolar_lines_and_says_who_is_no_judge_of_it(tmp_path, capsys):
    words = [
        *("video.prompt_cache=null", "video.motion_samples=0", "video.frames=9", "sampling.num_steps=4"),
        *("sampling.window={size: 1, stop: 1}", "grpo.group_size=6", "grpo.num_iterations=1", "grpo.seed=1"),
    ]
    weights = "grpo.weights={epipolar: 1, camera_motion_floor: 3}"
    assert cli.main(["train", RECIPE, *words, weights, f"out={tmp_path}/run"]) == 0
    assert "epipolar is a reward: the Sampson judges of vggrpo evaluate do not count" in capsys.readouterr().err
    numbers = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert -1 < numbers["reward/epipolar/mean"] < 0
    assert numbers["reward/epipolar/std"] > 0
    assert numbers["reward/epipolar/nan"] < 0.5
    assert numbers["grad_norm"] > 0
    assert taught_judges(f"{tmp_path}/run") == taught_judges(f"{tmp_path}/run/average") == ("sampson/",)
    assert taught_judges(str(tmp_path)) == taught_judges(None) == ()  # a folder without a recipe, and no LoRA


IMPORTED = "video.imported={mine: {path: 'a:b'}}"
REMOTE = "video.remote={vlm: {url: 'http://10.1.2.3/'}}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([IMPORTED, "grpo.weights={mine: 1}"], "give --allow-import if you trust it"),
        ([IMPORTED, "grpo.weights={mine: 1}", "--allow-import"], "cannot import the reward a:b"),
        ([IMPORTED], "reward 'mine' has no weight"),
        (["video.imported={motion_smoothness: {path: 'a:b'}}"], "there are two rewards 'motion_smoothness'"),
        (["video.imported={motion_prior: {path: 'a:b'}}"], "there are two rewards 'motion_prior'"),
        ([REMOTE, "grpo.weights={vlm: 1}"], "say other_machines: true if they may"),
        (["grpo.weights={motion_prior: 1}", "video.motion_samples=0"], "set video.motion_samples"),
        (["grpo.weights={camera_following: 1}"], "video.cameras and the reward camera_following go together"),
        (["grpo.weights={epipolar: 1}", "video.epipolar.stride=17"], "stride must be less than video.frames, got 17"),
        (["video.epipolar.cells=2"], "stride must be >= 1 and cells >= 4, got 2 and 2"),
        (["grpo.gates={motion_smoothness: motion_prior}", "video.motion_samples=0"], "set video.motion_samples"),
        (["grpo.gates={motion_smoothness: motion_pior}"], "no reward 'motion_pior': did you mean 'motion_prior'"),
        (["grpo.gates={smooth: motion_prior}"], "grpo: gates: 'smooth' is gated and has no weight"),
        (["video.cameras=nowhere"], "video.cameras and the reward camera_following go together"),
        (["video.imported={mine: {path: 'a:b', takes: pixels}}"], "takes must be one of geometry, video, both"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path):
    assert cli.main(["train", RECIPE, *words, f"out={tmp_path}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("vggrpo: ")
    assert message in said
