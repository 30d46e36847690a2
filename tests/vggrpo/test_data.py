"""Prompts and videos are read strictly; the cache gives back what the encoders gave, and only to the same question."""

import subprocess
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from vggrpo import data
from vggrpo.bootstrap.captions import draw_captions
from vggrpo.bootstrap.footage import held, kind_of, render_footage
from vggrpo.data import DataConfig, Encoders, encode_clips, read_folder, read_prompts, read_video


def write_video(path, frames, size=(48, 32)):
    """Frame i is grey level 8 i on the left half and 255 - 8 i on the right."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            picture = np.full((height, width, 3), 8 * i, dtype=np.uint8)
            picture[:, width // 2 :] = 255 - 8 * i
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("b", "a"):
        write_video(folder / f"{name}.mp4", 12)
        (folder / f"{name}.txt").write_text(f"video {name}\n")
    return DataConfig(videos=str(folder), frames=5, height=16, width=24, cache=str(tmp_path / "cache"))


class Counting:
    """Encoders that keep the mean colour and the prompt's length, and how often they were asked."""

    def __init__(self, name="one"):
        self.clips, self.name = 0, name

    def encoders(self):
        return Encoders(self.video, self.text, {"vae": self.name})

    def video(self, video):
        self.clips += len(video)
        return video.mean((-2, -1)).movedim(1, 2)[..., None, None]

    def text(self, prompts):
        return torch.tensor([[[float(len(prompt))]] for prompt in prompts])


def test_prompts_and_the_worlds_clips_need_no_video_library():
    code = "import sys, vggrpo.data; sys.exit('av' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_prompts_are_lines(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no prompts at "), (b"", "holds no prompt"), (b" \n\n", "holds no prompt"), (b"\xff\xfe", "is not UTF-8")],
)
def test_bad_prompt_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)
    assert "p.txt" in str(error.value)


@pytest.mark.parametrize(("every", "levels"), [(1, [0, 8, 16]), (2, [0, 16, 32])])
def test_a_videos_first_frames_come_back_in_order(videos, every, levels):
    video = read_video(next(iter(read_folder(videos))), replace(videos, every=every))
    assert video.shape == (5, 3, 16, 24)
    left, right = video[:3, :, :, :8].float().mean((1, 2, 3)), video[:3, :, :, -8:].float().mean((1, 2, 3))
    assert torch.allclose(left, torch.tensor(levels).float(), atol=3)
    assert torch.allclose(right, 255 - torch.tensor(levels).float(), atol=3)


def test_the_middle_is_kept_and_proportions_too():
    video = torch.zeros(1, 3, 20, 40, dtype=torch.uint8)
    video[..., 10:30] = 200  # the middle square of a picture twice as wide as high
    assert (data._cover(video, 20, 20) == 200).all()
    assert (data._cover(video, 10, 10)[..., 1:-1] > 190).all()
    assert data._cover(video, 33, 17).shape == (1, 3, 33, 17)
    assert torch.equal(data._cover(video, 20, 40), video)


def corrupt(folder):
    (folder / "a.mp4").write_bytes(b"not a video at all" * 50)


def cut(folder):
    whole = (folder / "a.mp4").read_bytes()
    (folder / "a.mp4").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (corrupt, r"cannot read .*a\.mp4 as a video"),
        (cut, r"cannot read .*a\.mp4 as a video"),
        (lambda folder: (folder / "a.mp4").write_bytes(b""), r"cannot read .*a\.mp4 as a video"),
        (lambda folder: write_video(folder / "a.mp4", 1), r"a\.mp4 gives 1 frames, taking one in 1, and 5 are needed"),
        (lambda folder: (folder / "a.txt").unlink(), r"no prompts at .*a\.txt"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], r"videos holds no video \(.mp4"),
        (lambda folder: folder.rename(folder.with_name("x")), r"no folder of videos at "),
    ],
)
def test_a_bad_folder_is_one_line_that_names_the_file(videos, tmp_path, break_it, message):
    break_it(tmp_path / "videos")
    with pytest.raises(ValueError, match=message) as error:
        encode_clips(videos, Counting().encoders(), print)
    assert "\n" not in str(error.value)


def test_the_cache_is_what_the_encoders_gave_and_they_are_asked_once(videos, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 1)
    first = Counting()
    found = encode_clips(videos, first.encoders(), print)
    assert found.captions == ("video a", "video b")
    assert first.clips == 2
    direct = first.video(torch.stack([read_video(path, videos) for path in read_folder(videos)]).float() / 255)
    assert torch.allclose(found.z0, direct, atol=1e-6)
    again = Counting()
    assert torch.equal(encode_clips(videos, again.encoders(), print).z0, found.z0)
    assert again.clips == 0


def test_an_interrupted_encoding_goes_on_where_it_stopped(videos, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "SHARD", 1)
    encode_clips(videos, Counting().encoders(), print)
    next((tmp_path / "cache").rglob("00001.safetensors")).unlink()
    again = Counting()
    assert len(encode_clips(videos, again.encoders(), print).z0) == 2
    assert again.clips == 1


@pytest.mark.parametrize("change", ["encoder", "frames", "height", "every", "negative", "caption", "video", "none"])
def test_whatever_changes_the_result_changes_the_key(videos, tmp_path, change):
    encode_clips(videos, Counting().encoders(), print)
    other, config = Counting("two" if change == "encoder" else "one"), videos
    if change in ("frames", "height", "every", "negative"):
        value = {"frames": {"frames": 9}, "height": {"height": 32}, "every": {"every": 2}}
        config = replace(videos, **value.get(change, {"negative_prompt": "blurry"}))
    if change == "caption":
        (tmp_path / "videos/a.txt").write_text("another caption")
    if change == "video":
        write_video(tmp_path / "videos/a.mp4", 11)
    encode_clips(config, other.encoders(), print)
    assert other.clips == (0 if change == "none" else 2)


def test_the_worlds_clips_come_with_their_captions(tmp_path):
    counting = Counting()
    config = DataConfig(first_seed=3, num_clips=2, cache=str(tmp_path))
    found = encode_clips(config, counting.encoders(), print)
    video = torch.cat(list(render_footage([3, 4]))).float() / 255
    assert torch.allclose(found.z0, counting.video(video), atol=1e-6)
    assert found.text.flatten().tolist() == [float(len(caption)) for caption in found.captions]
    assert all(caption.startswith("The camera") for caption in found.captions)


def test_training_never_sees_what_is_kept_for_tests():
    """Of each scene some commands, with their pace, are kept; the model knows all parts of such a caption."""
    sizes = {"scenes": 6, "num_clips": 600}
    known, kept = DataConfig(**sizes), DataConfig(first_seed=10_000, unseen=True, **sizes)

    def told(config):
        captions = draw_captions(config.seeds, 6)
        ways = ("camera", "direction", "pace")
        return {(*(c.facts[way] for way in ways), c.text.partition("There are")[2]) for c in captions}

    seen, unseen = told(known), told(kept)
    assert not seen & unseen
    assert {scene for *_, scene in seen} == {scene for *_, scene in unseen}
    ways = {(*command[:2], command[3]) for command in seen}
    assert any((*command[:2], command[3]) in ways for command in unseen), "captions are kept, not whole commands"
    assert {command[:3] for command in unseen} <= {command[:3] for command in seen}
    assert len({command[:1] for command in unseen}) >= 8
    leaked = told(replace(kept, unseen=False))
    assert leaked & seen, "control: other seeds alone would keep nothing apart"


def test_shared_scenes_are_another_cache(tmp_path):
    counting = Counting()
    config = DataConfig(num_clips=1, scenes=2, cache=str(tmp_path))
    found = encode_clips(config, counting.encoders(), print)
    video = torch.cat(list(render_footage([0], scenes=2))).float() / 255
    assert torch.allclose(found.z0, counting.video(video), atol=1e-6)
    other = encode_clips(replace(config, scenes=None), counting.encoders(), print)
    assert not torch.equal(other.z0, found.z0)


def test_clips_that_would_shake_sway_in_its_place_and_the_others_are_the_same(tmp_path):
    counting = Counting()
    config = DataConfig(num_clips=4, scenes=2, cache=str(tmp_path))
    shaken, swaying = (encode_clips(replace(config, sway=sway), counting.encoders(), print) for sway in (0.0, 1.0))
    same = [torch.equal(a, b) for a, b in zip(shaken.z0, swaying.z0, strict=True)]
    assert same == [kind_of(seed)[1] == 0 for seed in config.seeds]
    assert sum(same) == 2
    assert [held(0.8, 2.0), held(0.8, 0.0), held(0.0, 2.0)] == [(0.0, 2.0), (0.8, 0.0), (0.0, 0.0)]
    assert shaken.captions == swaying.captions


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scenes": 0}, "scenes must be None or >= 1"),
        ({"sway": -1.0}, "sway must be >= 0"),
        ({"sway": 1.0, "videos": "x"}, "the world's alone"),
        ({"unseen": True}, "give scenes"),
        ({"frames": 16, "videos": "x"}, r"4 n \+ 1 .* got 16"),
        ({"height": 32}, "have 17 frames"),
        ({"every": 0}, "every"),
    ],
)
def test_an_impossible_size_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**wrong)
