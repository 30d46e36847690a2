"""The embedded video model is trained, sampled, scored and evaluated by the commands that a user types."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from geometry.world import make_clips
from launch.prompts import FILES, prompts
from rewards import ESTIMATED, REWARDS
from vggrpo import cli
from vggrpo.build import build, chosen_rewards
from vggrpo.check import check
from vggrpo.checkpoint import load_checkpoint
from vggrpo.data import read_prompts, write_video
from vggrpo.policy.wan import latent_shape, own_shift
from vggrpo.recipe import load_recipe
from vggrpo.sample import SampleConfig, best, load_models, sample_videos
from vggrpo.score import score
from vggrpo.signals import Interrupted, Signals
from vggrpo.stitch import fidelity

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "launch/recipes/tiny.yaml")
# Groups of three: in a group of two, two rewards that disagree cancel exactly.
SMALL = [
    *("grpo.group_size=3", "grpo.beta=0.1", "sampling.num_steps=3", "sampling.window.size=1", "sampling.window.stop=2"),
    *("video.frames=5", "video.height=32", "video.width=32"),
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
    assert chosen.candidates["motion_smoothness"][0] == pytest.approx(base.rewards["motion_smoothness"], abs=1e-5)


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
    assert cli.main(["sample", "--prompts", str(few), "--out", str(out), "--lora", str(tuned), *size]) == 0
    assert {path.name for path in out.iterdir()} == {
        *(f"{n:03d}.{kind}" for n in range(2) for kind in ("mp4", "npz", "ply", "safetensors")), "samples.json",
    }  # fmt: skip
    assert len(json.loads((out / "samples.json").read_text())) == 2
    capsys.readouterr()
    size = ["--frames", "5", "--height", "32", "--width", "32"]
    for through in ("rgb", "latent"):
        scored = tmp_path / through
        how = ["--through", through, "--out", str(scored), "--plot", "--judges"]
        assert cli.main(["score", "--videos", str(out), *size, *how]) == 0
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [one["video"] for one in said] == ["000", "001"]
        assert -1 <= said[0]["rewards"]["camera_motion_floor"] <= 0
        assert (scored / "000.png").is_file()
    report = tmp_path / "report"
    how = [
        f"--sampling.{word.removeprefix('--')}" if word.startswith("--") else word
        for word in [*size, "--num-steps", "2"]
    ]
    how += ["--sampling.prompts", str(few), "--sampling.out", str(report), "--sampling.lora", str(tuned)]
    assert cli.main(["evaluate", *how]) == 0
    assert {path.name for path in report.iterdir()} == {"videos.jsonl", "report.json", "report.md", "report.html"}
    assert len((report / "videos.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "--prompts", "nowhere.txt", "--out", "x"], "no prompts at nowhere.txt"),
        (["sample", "--prompts", "README.md", "--out", "x", "--frames", "6"], "takes 4 n + 1 frames"),
        (["sample", "--prompts", "README.md", "--out", "x", "--lora", "assets"], "it is not the folder of a LoRA"),
        (["sample", "--prompts", "README.md", "--out", "x", "--best-of", "0"], "best_of and guide_every must be >= 1"),
        (["score", "--videos", "nowhere.mp4"], "no video at nowhere.mp4"),
        (["score", "--videos", "README.md"], "cannot read README.md as a video"),
        (["score", "--videos", "README.md", "--plot"], "need a folder to write to: give --out"),
        (["train", RECIPE, "video.frames=16"], "frames must be 4 n + 1"),
        (["train", RECIPE, "video.height=40"], "height must be a multiple of 16, got 40"),
        (["train", RECIPE, "video.prompts=nowhere.txt"], "no prompts at nowhere.txt"),
        (["train", RECIPE, "video.lgm=assets/tiny-wan/vae"], "assets/tiny-wan/vae"),
        (["train", RECIPE, "grpo.weights={motion_smothness: 1}"], "did you mean 'motion_smoothness'?"),
        (["train", RECIPE, "mixture.wanted=west"], "a run is of a video or of a mixture"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path):
    more = [f"out={tmp_path}"] if words[0] == "train" else []
    assert cli.main([*words, *more]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("vggrpo: ")
    assert message in said


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
    said = score(torch.zeros(5, 3, 32, 32), lambda video: scene, judges=False)[1]
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
