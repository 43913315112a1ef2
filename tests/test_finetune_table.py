"""The page of fine-tuning: which lines count, and when a claim holds; the search of learning rates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import finetune_quality
from finetune_table import chosen, render


def cell(method: str, rate: float, seed: int, heldout: float, test: float, **more) -> dict:
    found = {
        "task": "stories-gsm8k", "method": method, "rank": 2, "learning_rate": rate, "seed": seed, "tokens": 1000,
        "base_quant": None, "heldout": heldout, "test": test, "before": 9.0, "seconds": 3.0, "trained": 12, "peak": 5e6,
        "file": 2000, "version": "0",
    }  # fmt: skip
    return found | more


def test_the_test_text_does_not_choose_the_rate_and_later_lines_count():
    cells = [cell("lora", 0.1, 0, 2.0, 1.0), cell("lora", 0.01, 0, 1.0, 7.0), cell("lora", 0.01, 1, 1.5, 8.0)]
    cells.append(cell("lora", 0.01, 0, 1.1, 9.0))
    assert [(c["seed"], c["test"]) for c in chosen(cells, 2, "lora")] == [(0, 9.0), (1, 8.0)]
    cells.append(cell("lora", 0.1, 1, 0.5, 2.0))  # seeds after the first choose no rate
    assert [c["test"] for c in chosen(cells, 2, "lora")] == [9.0, 8.0]
    assert chosen(cells, 2, "full") == chosen(cells, 1, "lora") == []


@pytest.mark.parametrize(("ours", "verdict"), [(4.0, "the claim holds"), (8.1, "the claim fails")])
def test_claims_are_paired_over_seeds(ours, verdict):
    cells = [cell("lora", 0.01, seed, 1.0, 8.0 + seed) for seed in range(3)]
    cells += [cell("spiel-ag", 0.02, seed, 1.0, ours + seed + 0.01 * seed) for seed in range(3)]
    cells += [cell("base", 0.0, 0, None, 50.0), cell("spiel-ag", 0.02, 0, 1.0, 3.0, base_quant="nf4")]
    page = render(cells, {"stories-gsm8k": ("stories260k", 1000)}, 256, 200)
    (line,) = [line for line in page.splitlines() if line.startswith("- rank 2, spiel-ag - lora")]
    assert line.endswith(f"3 seeds: {verdict}")
    assert "Untouched: 50.000" in page
    assert "| 2 | lora | 12 | 1.20% | 0.01 (edge) |" in page
    assert page.index("1,000 tokens\n") < page.index("beside a base in nf4")


@pytest.mark.parametrize(
    ("tried", "following"),
    [
        ({0.001: 3.0, 0.002: 2.0, 0.005: 2.5}, None),
        ({0.001: 3.0, 0.002: 2.0}, 0.005),
        ({0.003: 2.0, 0.01: 2.5}, 0.002),  # a rate that is none of the ladder's
        ({0.5: 2.0, 0.2: 2.5}, None),  # the ladder ends
    ],
)
def test_the_search_goes_on_while_the_best_rate_is_the_last(tried, following):
    cells = [cell("lora", rate, 0, loss, 1.0) for rate, loss in tried.items()]
    like = finetune_quality.Job("stories-gsm8k", "lora", 2, 0.002, 0, 1000)
    assert finetune_quality.next_rate(cells, like) == following


def test_what_has_no_rank_is_run_once_and_stands_last():
    words = ["--tasks", "stories-gsm8k", "--methods", "base", "lora", "full", "--seeds", "0", "--rates", "0.01"]
    done: list[dict] = []
    for job in finetune_quality.jobs(finetune_quality._options(words), done):
        done.append(cell(job.method, job.learning_rate, job.seed, 1.0, 5.0, rank=job.rank, tokens=job.tokens))
    assert [(c["method"], c["rank"]) for c in done] == [("base", 0), ("full", 0), ("lora", 1), ("lora", 2)]
    page = render(done, {"stories-gsm8k": ("stories260k", 1000)}, 256, 200)
    assert page.index("| 1 | lora |") < page.index("| 2 | lora |") < page.index("| - | full |")
