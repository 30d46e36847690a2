"""A report says what was found, shows it, and cannot be broken by a prompt."""

import torch

from vggrpo.evaluate.compare import Paired, Verdict
from vggrpo.evaluate.report import Pair, markdown, page, rows, strips, write_report

NAN = float("nan")
TABLE = {
    "sampson/stride_4": Paired(0.5, 0.4, -0.1, -0.15, -0.05, 20, 0.0, 0.1),
    "jitter": Paired(1.0, 1.2, 0.2, 0.1, 0.3, 20, 0.0, 0.0),
    "flicker": Paired(NAN, NAN, NAN, NAN, NAN, 0, 1.0, 1.0),
}
TOLD = Verdict(False, ["motion is 0.50 of the base's, less than 0.9"], 0.5, 1.0)


def test_a_row_says_it_all_and_nothing_is_made_up():
    found = {row[0]: row for row in rows(TABLE, TABLE)}
    assert found["sampson/stride_4"][1:5] == ("0.5", "0.4", "-0.1", "[-0.15, -0.05]")
    assert found["flicker"][1:7] == ("-", "-", "-", "-", "0", "-")
    assert "NOT PASSED: motion is 0.50 of the base's" in markdown("t", TABLE, TABLE, TOLD)
    assert "PASS:" in markdown("t", TABLE, TABLE, Verdict(True, [], 1.0, 1.0)).splitlines()[2]


def test_the_page_stands_alone_and_marks_better_and_worse(tmp_path):
    pair = Pair("<script>alert(1)</script> & co", torch.rand(17, 3, 16, 16), torch.rand(17, 3, 16, 16))
    text = page("a < b", TABLE, TABLE, TOLD, [pair])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text
    assert text.count('class="better"') == text.count('class="worse"') == 2
    write_report(tmp_path / "new", "t", TABLE, TABLE, TOLD, [pair])
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.md", "report.html"}


def test_strips_show_first_and_last_frame_base_above():
    base, tuned = torch.zeros(9, 3, 4, 4), torch.ones(9, 3, 4, 4)
    base[-1] = 0.5
    picture = strips(Pair("", base, tuned), shown=3, zoom=1)
    assert picture.size == (12, 8)
    assert picture.getpixel((0, 0)) == (0, 0, 0)
    assert picture.getpixel((11, 0)) == (128, 128, 128)
    assert picture.getpixel((0, 7)) == (255, 255, 255)
