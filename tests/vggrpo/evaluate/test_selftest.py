"""The judges are tried on faults that are known, and a judge that knows nothing does not get through."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from geometry.world import PERTURBATIONS
from vggrpo import cli
from vggrpo.evaluate.judges import judge
from vggrpo.evaluate.panel import BY_REFEREE
from vggrpo.evaluate.selftest import EXPECTED, Version, draw_clips, examine, missed, sights, spearman, table
from vggrpo.evaluate.value import NA, Value

FAULTS = ("pose_jitter", "local_warp", "blur")


@pytest.fixture(scope="module")
def versions():
    """One clip, ten versions of it, by the judges of pixels alone: the command has more of all."""
    return examine(lambda video, prompt: judge(video), draw_clips(61_000_000, 1), FAULTS, lambda line: None)


def test_the_judges_order_faults_by_their_magnitude(versions):
    found = sights(versions)
    assert missed(found) == []
    assert found["sharpness"]["blur"].spearman == -1
    assert "| sampson/stride_1 |" in table(found)


def test_judges_whose_answers_are_shuffled_are_caught(versions):
    """The control: the same numbers, each given to another video."""
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(versions))
        mixed = [replace(version, told=versions[k].told) for version, k in zip(versions, order, strict=True)]
        assert missed(sights(mixed))


def test_a_judge_that_always_says_the_same_is_blind(versions):
    dull = [replace(version, told={"jitter": Value(1.0), "side": Value(NA, "no")}) for version in versions]
    found = sights(dull)
    assert all(seen.blind() for seen in found["jitter"].values())
    assert "| jitter | blind (+0.00) |" in table(found)
    assert "| side | N/A |" in table(found)
    assert [line for line in missed(found) if line.startswith("jitter must rise with pose_jitter")]


def test_what_is_expected_exists(versions):
    names = {*versions[0].told, *BY_REFEREE}
    for fault, judges in EXPECTED.items():
        assert fault in PERTURBATIONS
        assert {name.removeprefix("-") for name in judges} <= names


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, (2, 7)).astype(float).tolist()
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0


def test_versions_without_a_number_are_counted_and_not_ranked():
    values = [0.1, NA, 0.2, 0.3]
    some = [Version(0, "blur" if k else "", float(k), {"x": Value(v)}) for k, v in enumerate(values)]
    seen = sights(some)["x"]["blur"]
    assert seen.spearman == 1
    assert seen.absent == pytest.approx(1 / 3)
    assert math.isnan(sights(some[:3])["x"]["blur"].spearman)


def test_a_self_test_of_nothing_is_refused(capsys):
    assert cli.main(["evaluate", "--self-test", "--clips", "0"]) == 2
    assert capsys.readouterr().err.strip() == "vggrpo: clips must be >= 1 and size >= 32, got 0 and 64"
