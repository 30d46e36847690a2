"""A report says what was found, shows it, and cannot be broken by a prompt."""

import torch

from vggrpo.evaluate.compare import Comparison, Paired, Verdict
from vggrpo.evaluate.report import Shown, markdown, overview, page, rows, scatter, strips, write_report

NAN = float("nan")
TABLE = {
    "sampson/stride_4": Paired(0.5, 0.4, -0.1, -0.15, -0.05, 20, 0.0, 0.1, 0.001, 0.01),
    "jitter": Paired(1.0, 1.2, 0.2, 0.1, 0.3, 20, 0.0, 0.0, 0.001, 0.01),
    "survival": Paired(0.5, 0.6, 0.1, 0.05, 0.15, 20, 0.0, 0.0, 0.001, 0.01),
    "flicker": Paired(NAN, NAN, NAN, NAN, NAN, 0, 1.0, 1.0, NAN, NAN),
}
TOLD = Verdict(False, ["motion is 0.50 of the base's, less than 0.9"], 0.5, 1.0, [], [], [])
FOUND = {"ours": Comparison(TABLE, TABLE, TOLD), "best of <4>": Comparison(TABLE, TABLE, TOLD)}


def test_a_row_says_it_all_and_nothing_is_made_up():
    found = {row[0]: row for row in rows(TABLE, TABLE)}
    assert found["sampson/stride_4"][1:6] == ("0.5", "0.4", "-0.1", "[-0.15, -0.05]", "0.01")
    assert found["flicker"][1:8] == ("-", "-", "-", "-", "-", "0", "-")
    assert found["flicker"][8] == "100% / 100%"
    assert "NOT PASSED: motion is 0.50 of the base's" in markdown("t", FOUND)
    passed = Comparison(TABLE, TABLE, Verdict(True, [], 1.0, 1.0, ["sampson/stride_4"], ["jitter"], []))
    assert "**ours**: PASS: " in markdown("t", {"ours": passed})
    assert "sounder: sampson/stride_4; steadier: jitter" in markdown("t", {"ours": passed})


def test_one_table_holds_all_candidates_and_says_which_way_is_better():
    found = {row[0]: row for row in overview(FOUND)}
    assert len(found["jitter"]) == 2 + len(FOUND)
    assert found["sampson/stride_4"][2] == "-0.1 [-0.15, -0.05] (better) (10% N/A)"
    assert found["jitter"][2] == "+0.2 [+0.1, +0.3] (worse)"
    assert found["survival"][2] == "+0.1 [+0.05, +0.15] (better)"
    assert found["flicker"][1:3] == ("- (100% N/A)", "- (100% N/A)")


def test_the_page_stands_alone_and_marks_better_and_worse(tmp_path):
    videos = {name: torch.rand(17, 3, 16, 16) for name in ("base", "ours", "best of <4>")}
    one = Shown("<script>alert(1)</script> & co", videos)
    text = page("a < b", FOUND, [one], scatter({"base": [(1.0, 0.5), (NAN, 0.2)], "ours": []}, "sampson/stride_4"))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "best of <4>" not in text
    assert "http" not in text.replace("data:image", "")
    assert text.count('class="better"') == 2 * (2 + 4)  # in the overview, and twice in each table
    assert text.count('class="worse"') == 2 + 4
    write_report(tmp_path / "new", "t", FOUND, [one])
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.md", "report.html"}


def test_strips_show_first_and_last_frame_base_above():
    base, tuned = torch.zeros(9, 3, 4, 4), torch.ones(9, 3, 4, 4)
    base[-1] = 0.5
    picture = strips(Shown("", {"base": base, "ours": tuned}), shown=3, zoom=1)
    assert picture.size == (12, 8)
    assert picture.getpixel((0, 0)) == (0, 0, 0)
    assert picture.getpixel((11, 0)) == (128, 128, 128)
    assert picture.getpixel((0, 7)) == (255, 255, 255)
