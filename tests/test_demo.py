"""`make rewards` leaves behind what it promises, and its numbers say what the README says."""

import importlib.util
import json
import math

import av
import pytest

from benchmarks import demo
from geometry.world import PERTURBATIONS
from rewards import PAPER, REWARDS


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The demo's folder, with one static and one dynamic clip."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CLIPS", (demo.CLIPS[0], demo.CLIPS[-1]))
        demo.main(["--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def versions(out):
    return json.loads((out / "scores.json").read_text())["versions"]


def test_every_version_has_a_video_that_decodes(out):
    for name in ("truth", *PERTURBATIONS):
        with av.open(str(out / f"{name}.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) == 17, name


def test_the_contact_sheet_is_a_picture(out):
    assert (out / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")


def test_every_score_is_finite(versions):
    assert set(versions) == {"truth", *PERTURBATIONS}
    for name, version in versions.items():
        assert set(version["scores"]) == set(REWARDS)
        for reward, scores in version["scores"].items():
            assert len(scores) == 2, (name, reward)
            assert all(x is not None and math.isfinite(x) for x in scores), (name, reward)


def below(versions, name, reward):
    """Whether a version scores lower than the truth in every clip."""
    pairs = zip(versions[name]["scores"][reward], versions["truth"]["scores"][reward], strict=True)
    return all(spoilt < true for spoilt, true in pairs)


def test_a_frozen_video_loses_to_the_truth_by_the_motion_floor_alone(versions):
    assert below(versions, "frozen", "camera_motion_floor")
    assert not any(below(versions, "frozen", reward) for reward in PAPER)  # the control: the paper's two do not see it


def test_each_reward_of_the_paper_sees_its_own_faults_and_not_the_others(versions):
    assert below(versions, "pose_jitter", "motion_smoothness")
    assert not below(versions, "depth_flicker", "motion_smoothness")
    assert below(versions, "depth_flicker", "reprojection_consistency")
    assert not any(below(versions, "blur", reward) for reward in REWARDS)


def test_an_out_that_is_a_file_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(SystemExit, match=r"^demo: --out must be a folder, and .* cannot be one: [^\n]*$"):
            demo.main(["--out", str(path)])


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install vggrpo\[train\]"):
        demo.main(["--out", str(tmp_path)])
