"""Paired verdicts: right about made-up videos whose truth is known, and not to be won by freezing or blurring."""

import math

import numpy as np
import pytest

from vggrpo.evaluate.compare import compare, paired, sign_test
from vggrpo.evaluate.report import verdict_line
from vggrpo.evaluate.value import Value


def videos(count=60, sampson=0.5, motion=1.0, sharpness=10.0, missing=0.0, seed=0):
    """Verdicts with the noise that prompts share (seed 7) and a little of their own."""
    shared, own = np.random.default_rng(7), np.random.default_rng(seed)
    told = []
    for _ in range(count):
        level = shared.lognormal(0, 0.5)
        lost = own.random() < missing
        told.append(
            {
                "sampson/stride_4": Value(
                    math.nan if lost else sampson * level + own.normal(0, 0.02), "few" if lost else ""
                ),
                "jitter": Value(level),
                "travel": Value(motion * level),
                "sharpness": Value(sharpness * level),
            }
        )
    return told


PROMPTS = [i // 2 for i in range(60)]


def test_a_real_improvement_passes_and_none_does_not():
    table, matched, told = compare(videos(), videos(sampson=0.4, seed=1), PROMPTS)
    row = table["sampson/stride_4"]
    assert told.passed
    assert told.reasons == []
    assert row.difference == pytest.approx(row.tuned - row.base)
    assert row.low < row.difference < row.high < 0
    assert matched["sampson/stride_4"].pairs == row.pairs == 60
    _, _, same = compare(videos(), videos(seed=1), PROMPTS)
    assert not same.passed
    assert "no judge of geometry improves" in same.reasons[0]
    assert told.sounder == ["sampson/stride_4"]
    assert told.steadier == []


def test_chance_passes_no_oftener_than_it_should_however_many_judges_are_asked():
    """Five judges of nothing but noise: each improves at 95 % in one case of forty, and PASS must not add them up."""
    passed = careless = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        names = ["sampson/a", "sampson/b", "sampson/c", "sfm/reprojection", "referee/reprojection"]

        def draw(rng=rng, names=names):
            kept = {"travel": Value(1.0), "sharpness": Value(1.0)}
            return [{n: Value(float(rng.normal(1, 0.2))) for n in names} | kept for _ in range(12)]

        found = compare(draw(), draw(), range(12))
        passed += found.verdict.passed
        careless += any(found.table[n].high < 0 for n in names)
    assert passed <= 6
    assert careless > 2 * passed  # the control: 95 % intervals alone


def test_a_judge_of_geometry_that_worsens_forbids_a_pass():
    base, tuned = videos(), videos(sampson=0.4, seed=1)
    for k, (a, b) in enumerate(zip(base, tuned, strict=True)):
        a["referee/reprojection"], b["referee/reprojection"] = Value(0.1 + 0.001 * k), Value(0.12 + 0.001 * k)
    told = compare(base, tuned, PROMPTS).verdict
    assert not told.passed
    assert told.reasons == ["referee/reprojection worsens surely"]


def test_sign_tests_are_the_binomials():
    assert sign_test([-1.0] * 5) == pytest.approx(2 / 32)
    assert sign_test([-1.0] * 9 + [1.0]) == pytest.approx(2 * 11 / 1024)
    assert sign_test([1.0, -1.0, 0.0]) == 1


def test_few_prompts_prove_little_however_much_they_agree():
    for count, p in ((1, 1.0), (3, 0.25), (5, 0.0625)):
        of = [k % count for k in range(30)]
        row = paired([{"x": Value(1.0)}] * 30, [{"x": Value(0.5)}] * 30, of, "x")
        assert row.high < 0
        assert row.p == p
        assert not row.improved()
    assert paired([{"x": Value(1.0)}] * 30, [{"x": Value(0.5)}] * 30, [k % 6 for k in range(30)], "x").improved()


def test_a_judge_that_falls_silent_does_not_count_and_the_others_do():
    base = [told | {"referee/reprojection": Value(0.1)} for told in videos()]
    tuned = [
        told | {"referee/reprojection": Value(math.nan, "hardly travels") if k % 3 == 0 else Value(0.05)}
        for k, told in enumerate(videos(sampson=0.4, seed=1))
    ]
    _, _, told = compare(base, tuned, PROMPTS)
    assert told.passed
    assert told.sounder == ["sampson/stride_4"]
    alone = [[{k: v for k, v in one.items() if not k.startswith("sampson")} for one in some] for some in (base, tuned)]
    _, _, told = compare(*alone, PROMPTS)
    assert not told.passed
    assert told.sounder == []


def test_judges_of_what_was_trained_do_not_count_but_may_worsen():
    """Where `epipolar` is a reward, Sampson distances are no judge of it."""
    better = videos(sampson=0.4, seed=1)
    _, _, told = compare(videos(), better, PROMPTS, ["sampson/"])
    assert not told.passed
    assert told.sounder == []
    assert told.taught == ["sampson/stride_4"]
    assert "no judge of geometry improves surely" in told.reasons[0]
    assert "not counted, for it was trained on much the same: sampson/stride_4" in verdict_line(told)
    worse = compare(better, videos(), PROMPTS, ["sampson/"]).verdict
    assert "sampson/stride_4 worsens surely" in worse.reasons
    others = [
        [one | {"referee/reprojection": Value(x)} for one in some] for some, x in ((videos(), 0.2), (better, 0.1))
    ]
    _, _, told = compare(*others, PROMPTS, ["sampson/"])
    assert told.passed  # by a judge that is one
    assert told.sounder == ["referee/reprojection"]
    assert compare(videos(), better, PROMPTS).verdict.taught == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"motion": 0.5}, "not among videos that move as much as before"),
        ({"motion": 0.85}, "motion is 0.85 of the base's"),
        ({"sharpness": 5.0}, "sharpness is 0.50 of the base's"),
        ({"missing": 0.4}, "cannot judge"),
    ],
)
def test_consistency_that_was_bought_does_not_pass(change, reason):
    _, _, told = compare(videos(), videos(sampson=0.4, seed=1, **change), PROMPTS)
    assert not told.passed
    assert any(reason in each for each in told.reasons)


def test_an_interval_is_the_bootstraps_over_prompts():
    """With every prompt twice, copies of the same video make no difference more certain."""
    base, tuned = videos(30), videos(30, sampson=0.45, seed=1)
    once = paired(base, tuned, range(30), "sampson/stride_4")
    twice = paired(base + base, tuned + tuned, [*range(30), *range(30)], "sampson/stride_4")
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=0.15)
    careless = paired(base + base, tuned + tuned, range(60), "sampson/stride_4")
    assert careless.high - careless.low < 0.85 * (once.high - once.low)  # the control


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        differences = rng.normal(-0.1, 0.3, 25)
        base = [{"x": Value(0.0)} for _ in differences]
        tuned = [{"x": Value(float(d))} for d in differences]
        row = paired(base, tuned, range(25), "x")
        hits += row.low <= -0.1 <= row.high
    assert 0.88 < hits / 200 < 0.99


def test_what_nobody_can_judge_is_nan_and_not_a_number():
    row = paired([{"x": Value(math.nan, "few")}] * 3, [{"x": Value(1.0)}] * 3, range(3), "x")
    assert math.isnan(row.difference)
    assert (row.pairs, row.base_na, row.tuned_na) == (0, 1.0, 0.0)
    assert not row.improved()


def test_a_base_that_does_not_move_cannot_be_compared_with_and_passes_nobody():
    told = compare(videos(motion=0.0), videos(sampson=0.4, motion=0.0, seed=1), PROMPTS).verdict
    assert math.isnan(told.motion)
    assert not told.passed


def test_videos_that_are_not_pairs_are_refused():
    with pytest.raises(ValueError, match="videos must come in pairs, got 2 and 1"):
        compare(videos(2), videos(1), [0, 1])
