"""A moving picture shows every video at its place, and plays there and back."""

import pytest
import torch
from PIL import Image

from vggrpo.animate import GAP, HEADER, check_animation, frames_of, save_animation

BRIGHTNESS = torch.linspace(0, 1, 5).view(5, 1, 1, 1)


def videos():
    base, tuned = BRIGHTNESS * torch.ones(5, 3, 8, 8), (1 - BRIGHTNESS) * torch.ones(5, 3, 8, 8)
    return [{"base": base, "tuned": tuned}] * 3


def test_frames_show_each_video_at_its_place():
    frames = frames_of(videos(), columns=2, zoom=2)
    assert len(frames) == 5
    for t, frame in enumerate(frames):
        light = round(255 * t / 4)
        assert frame.getpixel((GAP, HEADER))[0] == pytest.approx(light, abs=1)
        assert frame.getpixel((GAP + 18, HEADER))[0] == pytest.approx(255 - light, abs=1)
    assert frames[0].height == HEADER + 2 * (16 + GAP)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_it_is_written_and_moves(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_animation(path, videos())
    with Image.open(path) as picture:
        assert picture.n_frames == 8  # 0 1 2 3 4 3 2 1
        picture.seek(4)
        assert picture.convert("RGB").getpixel((GAP + 1, HEADER + 1))[0] > 240


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"animate must end in \.gif, \.webp, \.png, got a\.mp4"):
        check_animation("a.mp4")
    with pytest.raises(ValueError, match="there is no folder"):
        check_animation(str(tmp_path / "nowhere/a.gif"))
    with pytest.raises(ValueError, match="one length and size"):
        frames_of([{"a": torch.zeros(2, 3, 8, 8), "b": torch.zeros(3, 3, 8, 8)}])
