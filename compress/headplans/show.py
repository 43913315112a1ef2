"""A heads stage's part of the report as table rows and lines."""

from __future__ import annotations

from typing import Any


def plan_rows(stage: dict[str, Any]) -> list[tuple[str, ...]]:
    """Per length: density, bytes, predicted eFLOPs per generated token; two bytes per value."""
    from ..report import human_bytes, percent

    rows: list[tuple[str, ...]] = []
    for length, cost in stage["plan"]["made"]["cost"].items():
        sparse, dense = cost["plan"], cost["dense"]
        rows.append(
            (
                f"{int(length):,}",
                percent(cost["kv_bytes"] / cost["dense_kv_bytes"]),
                human_bytes(cost["kv_bytes"]),
                human_bytes(cost["dense_kv_bytes"]),
                f"{sparse['eflops'] / sparse['tokens']:.3g}",
                f"{dense['eflops'] / dense['tokens']:.3g}",
            )
        )
    return rows


def layer_rows(stage: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(head, rows): the share each layer keeps at every length."""
    from ..report import percent

    lengths = list(stage["layers_density"][0])
    rows = [
        (str(layer), *(percent(shares[length]) for length in lengths))
        for layer, shares in enumerate(stage["layers_density"])
    ]
    return ("layer", *lengths), rows


def candidate_rows(stage: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every plan that was judged."""
    chosen = stage["chosen"]
    return [
        (
            found["name"],
            f"{found['kl']:.4f}",
            f"{found['loss']:.4f}",
            "-" if found["probe"] is None else f"{100 * found['probe']['accuracy']:.0f} %",
            "yes" if number == chosen else "",
        )
        for number, found in enumerate(stage["candidates"])
    ]


def plan_lines(stage: dict[str, Any]) -> list[str]:
    """What the plan was made and chosen by."""
    made = stage["plan"]["made"]
    validation, calibration = made["validation"], made["calibration"]
    lines = [
        f"calibration: {calibration['dataset']} ({calibration['text']}), {calibration['counted']} counted, "
        f"{sum(calibration['sequences'].values())} sequences",
        f"held out: {validation['sequences']} sequences of {validation['length']} tokens of {validation['dataset']}; "
        f"dense loss {validation['dense_loss']:.4f}, with the plan {validation['loss']:.4f}",
    ]
    if made["solver"] is not None:
        gap = made["solver"]["gap"]
        said = f"{gap:.1e} above the LP bound" if gap < 1 else "without a useful bound"
        lines.append(f"solver: {made['solver']['status']}, {said}")
    probe = validation["dense_probe"]
    if probe is not None:
        counts = "counts" if validation["probe_counts"] else "does not count: the dense model cannot do it"
        lines.append(f"retrieval probe: dense {100 * probe['accuracy']:.0f} %; it {counts}")
    if "prefill" in made:
        found = made["prefill"]
        lines.append(
            f"prefill {found['method']}: {100 * found['recall']:.1f} % of the attention mass with "
            f"{100 * found['density']:.1f} % of the pairs, at {found['length']} tokens"
        )
    return lines
