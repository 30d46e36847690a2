"""The embedded video model is trained, sampled, scored and evaluated by the commands that a user types."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from geometry.world import make_clips
from launch.prompts import FILES, prompts
from rewards import ESTIMATED, REWARDS
from vggrpo import base_motion, cli
from vggrpo.build import build, chosen_rewards
from vggrpo.check import check
from vggrpo.checkpoint import load_checkpoint
from vggrpo.curve import SMOOTHED, checkpoints, parting, running
from vggrpo.data import read_prompts, write_video
from vggrpo.evaluate.compare import Comparison, Paired, Verdict
from vggrpo.policy.wan import latent_shape, own_shift
from vggrpo.recipe import load_recipe
from vggrpo.sample import best, load_models, sample_videos
from vggrpo.sample_config import SampleConfig
from vggrpo.score import score
from vggrpo.signals import Interrupted, Signals
from vggrpo.stitch import fidelity

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "launch/recipes/tiny.yaml")
# Groups of three: in a group of two, two rewards that disagree cancel exactly.
SMALL = [
    *("grpo.group_size=3", "grpo.beta=0.1", "sampling.num_steps=3", "sampling.window.size=1", "sampling.window.stop=2"),
    *("video.frames=5", "video.height=32", "video.width=32", "video.motion_samples=0"),
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Two iterations of the shipped recipe, small; the VAE must not be asked to decode."""
    folder = tmp_path_factory.mktemp("tuned")
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.setattr(AutoencoderKLWan, "decode", lambda *args: pytest.fail("the VAE was asked to decode"))
    assert cli.main(["train", RECIPE, *SMALL, "grpo.num_iterations=2", "optimizer.lr=0.05", f"out={folder}"]) == 0
    patch.undo()
    return folder


def test_prompts_can_be_held_to_the_base_models_own_motion(tmp_path, monkeypatch):
    monkeypatch.setattr(base_motion, "STILL", 0.0)  # three steps make five frames that hardly move
    two = tmp_path / "two.txt"
    two.write_text("\n".join(prompts(*FILES["train"])[:2]))
    recipe = load_recipe(RECIPE, [*SMALL, f"video.prompts={two}", "video.motion_samples=2"])
    parts = build(recipe)
    told = parts.rewards["camera_motion_floor"]
    rollout = parts.policy.rollout(next(parts.conditions), 3, parts.run.streams(0, 0))
    scene = parts.geometry(rollout.z0)
    frozen = replace(scene, c2w=scene.c2w[:, :, :1].expand_as(scene.c2w))
    assert told.reward(frozen, rollout.cond).tolist() == [[-1, -1, -1]]
    assert told.reward(scene, rollout.cond).min() > -1


def test_the_base_models_motion_is_not_the_tuned_ones_when_a_run_goes_on(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(base_motion, "STILL", 0.0)
    (tmp_path / "one.txt").write_text(prompts(*FILES["train"])[0])
    recipe = load_recipe(RECIPE, [*SMALL, f"video.prompts={tmp_path / 'one.txt'}", "video.motion_samples=1"])
    weights = load_checkpoint(tuned / "checkpoints").tensors["weights"]
    fresh, resumed = build(recipe), build(recipe, weights=weights)
    rollout = fresh.policy.rollout(next(fresh.conditions), 3, fresh.run.streams(0, 0))
    scene = fresh.geometry(rollout.z0)
    sliding = torch.eye(4).repeat(1, 3, 5, 1, 1)
    sliding[..., 0, 3] = 1e-3 * scene.depth.median() * torch.arange(5)
    slow = replace(scene, c2w=sliding)
    said, again = (parts.rewards["camera_motion_floor"].reward(slow, rollout.cond) for parts in (fresh, resumed))
    assert said.max() < 0
    assert torch.equal(said, again)
    other = resumed.policy.rollout(rollout.cond, 3, fresh.run.streams(0, 0))
    assert not torch.equal(other.z0, rollout.z0), "the control: the tuned model does move otherwise"


def test_a_pre_flight_of_the_shipped_recipe_finds_nothing_wrong():
    recipe = load_recipe(RECIPE, SMALL)
    parts = build(recipe)
    report = check(
        parts.policy, parts.network, parts.geometry, parts.rewards, next(parts.conditions), parts.run, recipe.grpo
    )
    assert report.problems == []
    assert max(report.ratio_error) <= 1e-6
    assert report.kl == 0
    trained = [name for name, weight in parts.network.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_training_leaves_a_lora_a_checkpoint_and_numbers(tuned):
    weights = load_file(tuned / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.") for key in weights)
    assert any(weight.abs().max() > 0 for key, weight in weights.items() if "lora_B" in key)
    assert load_checkpoint(tuned / "checkpoints").state["iteration"] == 2
    numbers = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert {"reward/motion_smoothness/mean", "reward/camera_motion_floor/mean", "kl"} < set(numbers[1])
    assert numbers[1]["kl"] > 0 == numbers[0]["kl"]


def test_a_run_that_was_stopped_has_left_its_lora_too(tmp_path, monkeypatch):
    polled = []

    def poll(self):
        polled.append(1)
        if len(polled) > 12:
            raise Interrupted

    monkeypatch.setattr(Signals, "poll", poll)
    assert cli.main(["train", RECIPE, *SMALL, "grpo.num_iterations=9", f"out={tmp_path}"]) == 143
    assert load_checkpoint(tmp_path / "checkpoints").state["iteration"] < 9
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_a_video_run_that_goes_on_ends_as_an_unbroken_one_to_the_bit(tuned, tmp_path):
    command = ["train", RECIPE, *SMALL, "optimizer.lr=0.05", f"out={tmp_path}"]
    assert cli.main([*command, "grpo.num_iterations=1"]) == 0
    assert cli.main([*command, "grpo.num_iterations=2", "--resume"]) == 0
    whole, resumed = (load_checkpoint(folder / "checkpoints").tensors for folder in (tuned, tmp_path))
    for file, tensors in whole.items():
        assert all(torch.equal(x, resumed[file][name]) for name, x in tensors.items())


def test_sample_videos_and_an_average_come_with_a_run_and_change_nothing_in_it(tuned, tmp_path, monkeypatch):
    decoded, decode = [], AutoencoderKLWan.decode
    monkeypatch.setattr(AutoencoderKLWan, "decode", lambda self, *a, **k: (decoded.append(1), decode(self, *a, **k))[1])
    more = ["optimizer.lr=0.05", "grpo.num_iterations=2", "video.sample_every=2", "video.sample_prompts=1",
            "optimizer.ema=0.5"]  # fmt: skip
    assert cli.main(["train", RECIPE, *SMALL, *more, f"out={tmp_path}"]) == 0
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4")] == ["videos/000002/000.mp4"]
    assert len(decoded) == 1
    plain, with_more = (load_checkpoint(folder / "checkpoints").tensors for folder in (tuned, tmp_path))
    for file, tensors in plain.items():
        assert all(torch.equal(x, with_more[file][name]) for name, x in tensors.items())
    last, average = (load_file(tmp_path / part / "pytorch_lora_weights.safetensors") for part in ("", "average"))
    name = next(key for key in last if "lora_B" in key)
    assert last.keys() == average.keys()
    assert not torch.equal(last[name], average[name])
    inside = name.removeprefix("transformer.").replace(".weight", ".default.weight")
    assert torch.equal(average[name], with_more["average"][f"transformer.{inside}"])
    some = prompts(*FILES["held_out"])[:1]
    (one,), (other,) = (sampled(small(lora=str(tmp_path / part)), some) for part in ("", "average"))
    assert not torch.equal(one.z0, other.z0)


def small(**more) -> SampleConfig:
    settings = {"num_steps": 3, "frames": 5, "height": 32, "width": 32} | more
    return SampleConfig(prompts="assets/prompts/held_out.txt", out="nowhere", **settings)


def sampled(cfg: SampleConfig, some: list[str]):
    return list(sample_videos(load_models(cfg, some), some, cfg))


def test_lora_best_of_n_and_guidance_each_change_the_video(tuned):
    some = prompts(*FILES["held_out"])[:1]
    (base,) = sampled(small(), some)
    assert base.z0.shape == (16, 2, 4, 4)
    assert torch.equal(base.z0, sampled(small(), some)[0].z0)
    (lora,) = sampled(small(lora=str(tuned)), some)
    (guided,) = sampled(small(guidance_geometry=1.0, guide_every=1), some)
    (chosen,) = sampled(small(best_of=3), some)
    assert not torch.equal(base.z0, lora.z0)
    assert not torch.equal(base.z0, guided.z0)
    assert len(chosen.candidates["motion_smoothness"]) == 3
    assert chosen.candidates["motion_smoothness"][chosen.chosen] == chosen.rewards["motion_smoothness"]
    assert chosen.candidates["motion_smoothness"][0] == pytest.approx(base.rewards["motion_smoothness"], abs=2e-4)


def test_the_best_candidate_is_the_best_on_average_and_never_one_without_a_score():
    scores = {"a": torch.tensor([0.0, 1.0, 0.9]), "b": torch.tensor([5.0, 1.0, 4.0])}
    assert best(scores, {"a": 1.0, "b": 1.0}) == 2
    assert best(scores, {"a": 1.0, "b": 0.1}) == 1
    assert best({"a": torch.tensor([float("nan"), -1.0])}, {"a": 1.0}) == 1
    assert best({"a": torch.tensor([2.0])}, {"a": 1.0}) == 0


def test_the_commands_write_what_they_promise(tuned, tmp_path, capsys):
    few = tmp_path / "prompts.txt"
    few.write_text("\n".join(prompts(*FILES["held_out"])[:2]))
    size = ["--frames", "5", "--height", "32", "--width", "32", "--num-steps", "2"]
    out = tmp_path / "samples"
    moving = ["--animate", str(tmp_path / "samples.webp")]
    assert cli.main(["sample", "--prompts", str(few), "--out", str(out), "--lora", str(tuned), *moving, *size]) == 0
    assert (tmp_path / "samples.webp").is_file()
    assert {path.name for path in out.iterdir()} == {
        *(f"{n:03d}.{kind}" for n in range(2) for kind in ("mp4", "npz", "ply", "safetensors")), "samples.json",
    }  # fmt: skip
    assert len(json.loads((out / "samples.json").read_text())) == 2
    capsys.readouterr()
    size = ["--frames", "5", "--height", "32", "--width", "32"]
    for through in ("rgb", "latent"):
        scored = tmp_path / through
        how = ["--through", through, "--out", str(scored), "--plot", "--judges"]
        assert cli.main(["score", str(out), *size, *how]) == 0
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [one["video"] for one in said] == ["000", "001"]
        assert -1 <= said[0]["rewards"]["camera_motion_floor"] <= 0
        assert (scored / "000.png").is_file()
    report, moving = tmp_path / "report", tmp_path / "report.gif"
    what = ["--prompts", str(few), "--out", str(report), "--lora", f"ours={tuned}", "--lora", str(tuned)]
    what += ["--best-of", "2", "--referee", "None", "--animate", str(moving)]
    assert cli.main(["evaluate", *what, *size, "--num-steps", "2"]) == 0
    assert {path.name for path in report.iterdir()} == {"videos.jsonl", "report.json", "report.md", "report.html"}
    lines = [json.loads(line) for line in (report / "videos.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines[::2]] == ["base", "ours", tuned.name, "best of 2"]
    assert lines[2]["told"] == lines[4]["told"] != lines[0]["told"]
    assert set(json.loads((report / "report.json").read_text())["candidates"]) == {"ours", tuned.name, "best of 2"}
    assert moving.is_file()


def test_the_checkpoints_of_a_run_are_judged_and_drawn(tuned, tmp_path, capsys):
    few = tmp_path / "prompts.txt"
    few.write_text("\n".join(prompts(*FILES["held_out"])[:2]))
    assert sorted(checkpoints(tuned)) == [2]
    words = ["evaluate", "--run", str(tuned), "--prompts", str(few), "--out", str(tmp_path / "curve")]
    small_size = ["--frames", "5", "--height", "32", "--width", "32", "--num-steps", "2", "--referee", "None"]
    assert cli.main([*words, *small_size]) == 0
    assert "iterations 2: " in capsys.readouterr().out
    told = json.loads((tmp_path / "curve/curve.json").read_text())
    row = told["iterations"]["2"]["table"]["reward/motion_smoothness"]
    assert row["difference"] != 0  # the weights were there
    assert (tmp_path / "curve/curve.png").is_file()


def test_rewards_in_training_are_drawn_as_running_means():
    points = [(step, float(step % 2)) for step in range(SMOOTHED + 4)]
    steps, means = running(points)
    assert means == [0.5] * 5
    assert steps == [(SMOOTHED - 1) / 2 + k for k in range(5)]
    assert running(points[:3]) == ([1.0], [1 / 3])


def test_where_reward_and_judges_part_is_one_line():
    def row(low, high):
        middle = (low + high) / 2
        return Paired(1.0, 1.0 + middle, middle, low, high, 6, 0.0, 0.0, 0.001 if low * high > 0 else 0.5, 0.1)

    def found(reward, judge):
        table = {"reward/motion_smoothness": row(*reward), "jitter": row(*judge)}
        return Comparison(table, table, Verdict(False, [], 1.0, 1.0, [], [], []))

    up, down, open_ = (0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1)
    assert parting({10: found(up, down), 20: found(up, up)}) == (
        "at iteration 20 reward/motion_smoothness has risen and jitter has got worse: they part"
    )
    assert parting({10: found(up, open_), 20: found(open_, up), 30: found(down, up)}) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "--prompts", "nowhere.txt", "--out", "x"], "no prompts at nowhere.txt"),
        (["sample", "--prompts", "README.md", "--out", "x", "--frames", "6"], "takes 4 n + 1 frames"),
        (["sample", "--prompts", "README.md", "--out", "x", "--lora", "assets"], "it is not the folder of a LoRA"),
        (["sample", "--prompts", "README.md", "--out", "x", "--best-of", "0"], "best_of must be >= 1"),
        (["sample", "--prompts", "README.md", "--out", "x", "--animate", "x.mp4"], "animate must end in .gif"),
        (["evaluate", "--out", "x"], "nothing differs from the base: give lora, best_of or guidance_geometry"),
        (["evaluate", "--out", "x", "--lora", "a=x", "--lora", "a=y"], "candidates need names of their own"),
        (["evaluate", "--out", "x", "--lora", "base=x"], "other than 'base'"),
        (["evaluate", "--out", "x", "--best-of", "1"], "best of 1 is the base itself"),
        (["evaluate", "--out", "x", "--best-of", "2", "--num-prompts", "0"], "num_seeds and num_prompts must be >= 1"),
        (["evaluate", "--out", "x", "--best-of", "2", "--fov", "180"], "fov must be between 0 and 180 degrees"),
        (["evaluate", "--out", "x", "--lora", "a=assets"], "assets has no pytorch_lora_weights.safetensors"),
        (["evaluate", "--out", "x", "--run", "assets"], "assets has no recipe.yaml: it is not the folder of a run"),
        (["score", "nowhere.mp4"], "no video at nowhere.mp4"),
        (["score", "README.md"], "cannot read README.md as a video"),
        (["score", "README.md", "--plot"], "need a folder to write to: give --out"),
        (["score", "README.md", "--frames", "6"], "frames must be 4 n + 1"),
        (["score", "README.md", "--frames", "1"], "one frame has no motion"),
        (["score", "README.md", "--through", "latent", "--height", "60"], "multiples of 8, got 17 of 60 x 64"),
        (["score", "README.md", "--judges", "--referee", "assets"], "no card.json in assets"),
        (["sample", "--prompts", "README.md", "--out", "x", "--height", "60"], "multiples of 16, got 17 of 60 x 64"),
        (["sample", "--prompts", "README.md", "--out", "x", "--width", "40"], "multiples of 16, got 17 of 64 x 40"),
        (["evaluate", "--out", "x", "--best-of", "2", "--frames", "6"], "takes 4 n + 1 frames"),
        (["evaluate", "--out", "x", "--best-of", "2", "--prompts", "nowhere.txt"], "no prompts at nowhere.txt"),
        (["train", RECIPE, "video.frames=16"], "frames must be 4 n + 1"),
        (["train", RECIPE, "video.height=40"], "multiples of 16, got 17 of 40 x 64"),
        (["train", RECIPE, "video.width=0"], "width must be >= 1, got 0"),
        (["evaluate", "--out", "x", "--best-of", "2", "--width", "40"], "multiples of 16, got 17 of 64 x 40"),
        (["train", RECIPE, "video.prompts=nowhere.txt"], "no prompts at nowhere.txt"),
        (["train", RECIPE, "video.lgm=assets/tiny-wan/vae"], "assets/tiny-wan/vae"),
        (["train", RECIPE, "grpo.weights={motion_smothness: 1}"], "did you mean 'motion_smoothness'?"),
        (["train", RECIPE, "mixture.wanted=west"], "a run is of a video or of a mixture"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path):
    more = [f"out={tmp_path}"] if words[0] == "train" else []
    assert cli.main([*words, *more]) == 2
    assert not Path("x").exists()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("vggrpo: ")
    assert message in said


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_an_empty_prompt_file_is_one_line(command, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n  \n")
    more = ["--best-of", "2"] if command == "evaluate" else []
    words = [command, "--prompts", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "out"), *more]
    assert cli.main(words) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said == f"vggrpo: {tmp_path / 'empty.txt'} holds no prompt: write one on each line"


@pytest.mark.parametrize(
    ("asset", "file", "words"),
    [
        ("tiny-geometry", "model.safetensors", ["score", "README.md", "--geometry"]),
        ("tiny-lgm", "lgm.safetensors", ["score", "README.md", "--through", "latent", "--lgm"]),
        ("tiny-lgm", "lgm.safetensors", ["sample", "--prompts", "README.md", "--out", "x", "--lgm"]),
        ("tiny-referee", "model.safetensors", ["evaluate", "--best-of", "2", "--out", "x", "--referee"]),
    ],
)
def test_an_asset_with_other_bytes_than_its_card_says_is_one_line(asset, file, words, tmp_path, capsys):
    folder = tmp_path / asset
    shutil.copytree(ROOT / "assets" / asset, folder)
    weights = (folder / file).read_bytes()
    (folder / file).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert cli.main([*words, str(folder)]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"vggrpo: {folder / file} has sha256 ")
    assert said.endswith("it was changed or damaged; restore it, or build it again")


def test_a_corrupt_and_a_one_frame_video_are_one_line_each(tmp_path, capsys):
    video = (255 * torch.rand(5, 3, 32, 32)).byte()
    write_video(tmp_path / "whole.mp4", video, 8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "corrupt.mp4").write_bytes(whole[: len(whole) // 3])
    write_video(tmp_path / "one.mp4", video[:1], 8)
    size = ["--frames", "5", "--height", "32", "--width", "32"]
    for name, reason in (("corrupt", "cannot read "), ("one", "gives 1 frames, taking one in 1, and 5 are needed")):
        assert cli.main(["score", str(tmp_path / f"{name}.mp4"), *size]) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert reason in said
        assert f"{name}.mp4" in said
    assert cli.main(["score", str(tmp_path / "whole.mp4"), *size]) == 0  # the control


def test_rewards_are_chosen_by_name():
    assert list(chosen_rewards({"motion_smoothness": 1.0})) == ["motion_smoothness"]
    with pytest.raises(ValueError, match=r"grpo\.weights must name the rewards"):
        chosen_rewards(None)


def test_training_scoring_and_the_report_take_one_reward_for_estimated_geometry():
    """Of flow between what counts as motion in exact and in estimated geometry; the control is the exact one."""
    scene = make_clips([7], frames=5, size=(32, 32), supersample=1).geometry
    unit = scene.depth[scene.valid].median()
    scene = replace(scene, scene_flow=torch.full_like(scene.points, 0.03 / 3**0.5) * unit)
    name = "reprojection_consistency"
    wanted = float(ESTIMATED[name](scene))
    assert chosen_rewards({name: 1.0})[name] is ESTIMATED[name]
    assert float(fidelity.REWARDS[name](scene)) == wanted
    said = score(torch.zeros(5, 3, 32, 32), lambda video: scene)[1]
    assert said["rewards"][name] == wanted
    assert said["moving_pixels"] == 0
    assert REWARDS[name](scene).isnan().all()  # all of it moves
    assert fidelity.OF_TRUTH[name](scene).isnan().all()


def test_shipped_prompts_are_what_the_script_writes_and_share_nothing():
    found = {name: read_prompts(ROOT / f"assets/prompts/{name}.txt") for name in FILES}
    assert all(prompts(*FILES[name]) == found[name] for name in FILES)
    assert not set(found["train"]) & set(found["held_out"])
    assert not any("stands still" in prompt for some in found.values() for prompt in some)


def test_a_video_written_is_the_video_read(tmp_path):
    from vggrpo.data import DataConfig, read_video

    video = (torch.linspace(0, 255, 5).view(5, 1, 1, 1) * torch.ones(5, 3, 32, 32)).byte()
    write_video(tmp_path / "a.mp4", video, 8)
    again = read_video(tmp_path / "a.mp4", DataConfig(videos="", frames=5, height=32, width=32))
    assert (again.float() - video.float()).abs().max() < 6
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_time_grid_is_the_models_own_unless_said_otherwise(tmp_path):
    assert own_shift(ROOT / "assets/tiny-wan") == 2.0
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"flow_shift": 5.0, "shift": 1.0}')  # as UniPC has it
    assert own_shift(tmp_path) == 5.0
    (tmp_path / "scheduler/scheduler_config.json").write_text("{}")
    with pytest.raises(ValueError, match="says nothing of a shift"):
        own_shift(tmp_path)


def test_latent_shapes_are_the_vaes():
    assert latent_shape(ROOT / "assets/tiny-wan", 17, 64, 48) == (16, 5, 8, 6)
    with pytest.raises(ValueError, match="multiples of 8, got 17 of 60 x 64"):
        latent_shape(ROOT / "assets/tiny-wan", 17, 60, 64)
