"""Patterns: exact counts by rank, ties, parsing, and the errors that users see."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import RecipeError
from gossamer.pruning.pattern import NM, Block, Unstructured, parse_pattern
from gossamer.pruning.selection import cheapest_counts, keep_all_but, keep_all_but_per_row, spread

SHAPES = [(1, 1), (6, 20), (7, 16), (5, 13), (32, 24)]
SPARSITIES = [0.0, 0.1, 0.3, 0.5, 0.7, 0.97]


def tied_scores(rows: int, cols: int, kinds: int = 3) -> torch.Tensor:
    return torch.randint(0, kinds, (rows, cols), generator=torch.Generator().manual_seed(rows * cols)).float()


def lowest_by_sorting(row: list[float], zeros: int) -> set[int]:
    """Independent rule: among equal scores the higher index goes first."""
    return set(sorted(range(len(row)), key=lambda j: (row[j], -j))[:zeros])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kinds", [1, 3, 10_000])
def test_matrix_scope_takes_exactly_the_lowest(shape: tuple[int, int], sparsity: float, kinds: int) -> None:
    scores = tied_scores(*shape, kinds)
    pattern = Unstructured(sparsity, "matrix")
    zeros = round(sparsity * shape[0] * shape[1])
    assert pattern.zeros(*shape) == zeros
    gone = set((~pattern.mask(scores)).flatten().nonzero().flatten().tolist())
    assert gone == lowest_by_sorting(scores.flatten().tolist(), zeros)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kinds", [1, 3, 10_000])
def test_row_scope_takes_the_lowest_of_each_row(shape: tuple[int, int], sparsity: float, kinds: int) -> None:
    scores = tied_scores(*shape, kinds)
    gone = ~Unstructured(sparsity, "row").mask(scores)
    counts = gone.sum(1).tolist()
    assert sum(counts) == round(sparsity * shape[0] * shape[1])
    assert max(counts) - min(counts) <= 1
    for row, line, count in zip(scores.tolist(), gone, counts, strict=True):
        assert set(line.nonzero().flatten().tolist()) == lowest_by_sorting(row, count)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (3, 5), (4, 4)])
def test_nm_keeps_the_highest_of_each_group(keep: int, group: int) -> None:
    scores = tied_scores(7, 3 * group)
    mask = NM(keep, group).mask(scores)
    assert int((~mask).sum()) == NM(keep, group).zeros(7, 3 * group) == 7 * 3 * (group - keep)
    for row, line in zip(scores.tolist(), mask, strict=True):
        for start in range(0, len(row), group):
            gone = set((~line[start : start + group]).nonzero().flatten().tolist())
            assert gone == lowest_by_sorting(row[start : start + group], group - keep)


def test_block_takes_whole_blocks_of_lowest_sum() -> None:
    scores = torch.tensor([[1.0, 1, 9, 0], [1, 1, 0, 0], [2, 0, 3, 3], [0, 0, 3, 3]])
    # Sums of the 2x2 blocks: 4, 9, 2, 12. Half of four blocks: those with 2 and 4 go.
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(Block(2, 2, 0.5).mask(scores), expected)
    assert Block(2, 2, 0.3).zeros(4, 4) == 4  # round(1.2) blocks
    assert Block(2, 4, 0.5).zero_blocks(6, 20) == round(0.5 * 15)


def test_equal_scores_keep_the_lower_index() -> None:
    ones = torch.ones(2, 4)
    left = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(NM(2, 4).mask(ones), left)
    assert torch.equal(Unstructured(0.5, "row").mask(ones), left)
    assert Unstructured(0.5, "matrix").mask(ones).flatten().tolist() == [True] * 4 + [False] * 4
    assert Block(1, 2, 0.5).mask(ones).flatten().tolist() == [True] * 4 + [False] * 4


def test_spread_sums_and_differs_by_one() -> None:
    for total in range(40):
        parts = spread(total, 7)
        assert int(parts.sum()) == total
        assert int(parts.max() - parts.min()) <= 1


def test_selection_at_both_ends() -> None:
    scores = torch.randn(3, 5)
    assert keep_all_but(scores, 0).all()
    assert not keep_all_but(scores, 15).any()
    mask = keep_all_but_per_row(scores, torch.tensor([0, 5, 2]))
    assert mask.sum(1).tolist() == [5, 0, 3]


def test_count_pattern_is_exact() -> None:
    for rows, cols in [(7, 16), (997, 1009), (4096, 11008)]:
        for zeros in (0, 1, rows * cols // 3, rows * cols - 1, rows * cols):
            assert Unstructured.for_count(zeros, rows, cols).zeros(rows, cols) == zeros


@pytest.mark.parametrize("text", ["0.5", "0.0", "0.3", "2:4", "1:4", "16:32", "block:4x8:0.5", "block:2x4:0.97"])
def test_text_round_trip(text: str) -> None:
    assert str(parse_pattern(text)) == text
    assert parse_pattern(str(parse_pattern(text))) == parse_pattern(text)


def test_text_defaults() -> None:
    assert parse_pattern("block:4x8") == Block(4, 8, 0.5)
    assert parse_pattern("0.5", "matrix") == Unstructured(0.5, "matrix")
    assert parse_pattern("1:4").sparsity == 0.75


@pytest.mark.parametrize(
    "text",
    [
        "",
        "half",
        "1.0",
        "-0.1",
        "nan",
        "inf",
        "4:2",
        "0:4",
        "0:0",
        "2:4:8",
        "block:4",
        "block:0x4",
        "block:4x4:1",
        "50%",
    ],
)
def test_bad_text_is_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_pattern(text)


def test_bad_scope_names_the_allowed() -> None:
    with pytest.raises(RecipeError, match="row, matrix, model"):
        parse_pattern("0.5", "layer")


def test_divisibility_error_names_layer_and_way_out() -> None:
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.down_proj.*172.*8") as caught:
        NM(4, 8).check(64, 172, "model.layers.0.mlp.down_proj")
    assert "--exclude down_proj" in str(caught.value.hint)
    NM(2, 4).check(64, 172, "model.layers.0.mlp.down_proj")
    with pytest.raises(RecipeError, match="block:4x8"):
        Block(4, 8).check(64, 172, "down_proj")


def test_model_scope_has_no_mask_of_its_own() -> None:
    with pytest.raises(ValueError, match="for_count"):
        Unstructured(0.5, "model").mask(torch.ones(2, 2))


@pytest.mark.parametrize("kinds", [1, 3, 10_000])
@pytest.mark.parametrize("zeros", [0, 1, 6, 7, 20, 34, 35])
def test_the_cheapest_rows_lose_one_more(kinds: int, zeros: int) -> None:
    scores = tied_scores(7, 5, kinds)
    least, more = divmod(zeros, 7)
    following = [sorted(row)[least] if least < 5 else 0.0 for row in scores.tolist()]
    cheapest = sorted(range(7), key=lambda r: (following[r], -r))[:more]
    assert cheapest_counts(scores, zeros).tolist() == [least + (r in cheapest) for r in range(7)]
