"""The pure parts of the quality benchmark: which cells are run, what counts as a loss, and what the page says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import quality
import quality_table
from quality_table import OURS, Spread, latest, perplexities, render, verdict


def cell(method: str, seed: int, after: float, pattern: str = "0.5", **more: Any) -> dict[str, Any]:
    return {
        "model": "stories260k",
        "method": method,
        "pattern": pattern,
        "seed": seed,
        "reconstruct": False,
        "before": 4.28,
        "after": after,
        "calibration": "c.txt",
        "evaluation": "e.txt",
        "windows": 400,
        "version": "0.0",
    } | more


def test_pairs_are_formed_over_common_seeds_only() -> None:
    cells = [cell("sparsegpt", seed, 18.0 + seed) for seed in range(3)]
    cells += [cell(OURS, seed, 10.0 + seed * seed) for seed in (1, 2, 3)]
    result = verdict(cells, "stories260k", "0.5", False)
    assert result is not None
    assert result.difference == Spread(-7.0, -8.0, -6.0, 2)  # 11 - 19 and 14 - 20
    assert result.seeds_won == 2
    assert result.ours == Spread(44 / 3, 11.0, 19.0, 3)


@pytest.mark.parametrize(
    ("ours", "loses", "lost_to"),
    [
        ([10.0, 10.0], False, ""),
        ([10.0, 17.9], True, "SparseGPT in 1 of 2 seeds and ALPS"),  # 17.8 in the second seed; mean 13.95 > 11.44
        ([11.4, 11.48], True, "ALPS"),
        ([1.0, 17.8], True, "SparseGPT in 1 of 2 seeds"),  # equal is not lower
    ],
)
def test_a_loss_is_any_seed_or_the_rivals_mean(ours: list[float], loses: bool, lost_to: str) -> None:
    cells = [cell("sparsegpt", 0, 18.0), cell("sparsegpt", 1, 17.8)]
    cells += [cell(OURS, seed, value) for seed, value in enumerate(ours)]
    result = verdict(cells, "stories260k", "0.5", False)
    assert result is not None
    assert (result.loses, result.lost_to) == (loses, lost_to)


def test_no_verdict_without_our_method() -> None:
    assert verdict([cell("sparsegpt", 0, 18.0)], "stories260k", "0.5", False) is None


def test_later_lines_replace_earlier_ones() -> None:
    cells = latest([cell("wanda", 0, 20.0), cell("wanda", 1, 19.0), cell("wanda", 0, 18.5)])
    assert perplexities(cells, "stories260k", "wanda", "0.5", False) == {0: 18.5, 1: 19.0}


def test_page_shows_spread_loss_and_reason() -> None:
    cells = [cell("sparsegpt", seed, value) for seed, value in enumerate([17.0, 18.0, 19.0])]
    cells += [cell(OURS, seed, value) for seed, value in enumerate([9.0, 10.0, 20.0])]
    cells += [cell("magnitude", 0, 35.8), cell(OURS, 0, 5.0, reconstruct=True), cell("sparsegpt", 0, 5.1, "0.3")]
    page = render(cells, {"stories260k 0.5": "too few tokens"})
    assert "| 50 % | 35.80 | 18.00 (17.00 to 19.00) | **13.00 (9.00 to 20.00)** | 5.00 |" in page
    assert "- 50 %: loses to SparseGPT in 1 of 3 seeds and ALPS. Reason: too few tokens" in page
    assert "| 50 % | -5.00 (-8.00 to +1.00) | 2 of 3 | 0.722 | 11.44 | 1.136 | 3.037 |" in page
    assert "| 50 % | -12.00 | 1 of 1 | 0.278 | 11.44 | 0.437 | 1.168 |" in page  # reconstructed, seed 0
    assert "| 50 % | sparsegpt | 18.00 (17.00 to 19.00) | 17.88 (17.78 to 17.99) | no, +0.01 |" not in page
    assert "| 50 % | sparsegpt | 18.00 (17.00 to 19.00) | 17.88 (17.78 to 17.99) | no |" in page
    assert "| 30 % | sparsegpt | 5.10 | 5.14 (5.13 to 5.15) | yes |" in page
    assert page.index("| 30 % | -") < page.index("| 50 % |")
    assert "dense 4.2800" in page.lower().replace("dense model:", "dense")


def test_a_loss_without_reason_says_so() -> None:
    page = render([cell("sparsegpt", 0, 5.0), cell(OURS, 0, 6.0)], {})
    assert "Reason: not explained yet" in page


def test_jobs_follow_the_protocol() -> None:
    found = quality.jobs(list(quality.PROTOCOLS), quality.METHODS, [], quality.SEEDS, False)
    stories = [job for job in found if job.model == "stories260k"]
    tiny = [job for job in found if job.model == "tiny-llama"]
    assert len(stories) == 5 * (4 * 5 + 1)  # five patterns; magnitude once, four methods with five seeds
    assert len(tiny) == 6 * (4 * 5 + 1)
    assert not any(job.pattern == "4:8" for job in stories)
    assert len({job.key for job in found}) == len(found)
    assert {job.seed for job in found if job.method == "magnitude"} == {0}
    only = quality.jobs(["stories260k"], [OURS], ["4:8", "2:4"], [7], True)
    assert [(job.pattern, job.seed, job.reconstruct) for job in only] == [("2:4", 7, True)]


def test_results_survive_an_interrupted_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "quality.jsonl"
    quality.append_result(path, cell("wanda", 0, 1.0))
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"model": "stories')
    quality.append_result(path, cell("wanda", 1, 2.0))
    assert [line["after"] for line in quality.read_results(path)] == [1.0, 2.0]
    assert quality.read_results(tmp_path / "none.jsonl") == []


def test_every_published_pattern_is_one_that_is_run() -> None:
    for model, patterns in quality_table.PUBLISHED.items():
        assert set(patterns) <= set(quality.PROTOCOLS[model].patterns)
