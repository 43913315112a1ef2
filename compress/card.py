"""The model card: what was done, with which command and recipe, what it cost, and how to load the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .checkpoint import atomic_write_text
from .page import PICTURE
from .report import Report, percent

if TYPE_CHECKING:
    from .plan import Plan


def write_card(folder: Path, report: Report, plan: Plan) -> None:
    """Write README.md (model card) and recipe.yaml into `folder`."""
    recipe = plan.recipe.to_yaml()
    atomic_write_text(folder / "recipe.yaml", recipe)
    atomic_write_text(folder / "README.md", card_text(report, recipe, plan.recipe.export.format))


def card_text(report: Report, recipe: str, file_format: str) -> str:
    """The card as Markdown with the hub's YAML front matter."""
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(report), sort_keys=False) + "---",
        f"# {report['output']}",
        f"`{_base_name(report)}` made sparse with Gossamer: "
        f"{percent(report['sparsity']['prunable'])} of the prunable weights are zero.",
        _table(report),
        f"![error and sparsity of every kind of matrix]({PICTURE})" if report["layers"] else "",
        "## Load it",
        _attached(report),
        _loading(file_format, bool(_attached(report))),
        "## How it was made",
        f"```bash\n{report['command']}\n```" if report["command"] else "Through the Python API, with this recipe:",
        f"```yaml\n{recipe}```",
        _details(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: Report) -> dict[str, Any]:
    matter: dict[str, Any] = {"library_name": "transformers", "tags": ["gossamer", "sparse", "pruning"]}
    name = _base_name(report)
    if "/" in report["model"] and not Path(report["model"]).exists():
        matter["base_model"] = name
    return matter


def _base_name(report: Report) -> str:
    """A hub id as it is, a local folder by its last part only."""
    return report["model"] if not Path(report["model"]).exists() else Path(report["model"]).resolve().name


def _table(report: Report) -> str:
    rows = ["| | before | after |", "|---|---|---|"]
    rows += [f"| {what} | {before} | {after} |" for what, before, after in report.rows()]
    return "\n".join(rows) + "\n\n" + "\n".join(f"- {line}" for line in report.footer())


def _attached(report: Report) -> str:
    """What the checkpoint holds beside its weights, and how it is run with that; empty where there is nothing."""
    stages = {stage["stage"]: stage for stage in report["stages"]}  # of a kind, the last one counts
    lines = []
    if "activation" in stages:
        made = stages["activation"]
        lines.append(
            f"- an activation policy ({made['method']}): decode skips {percent(made['sparsity'])} of the linear weights"
        )
    if "heads" in stages:
        plan = stages["heads"]["plan"]
        kept = ", ".join(f"{percent(share)} at {length} tokens" for length, share in plan["density"].items())
        lines.append(f"- a head plan ({plan['made']['method']}): of the keys and values it keeps {kept}")
    if not lines:
        return ""
    said = "Beside its weights this checkpoint has\n\n" + "\n".join(lines)
    return said + "\n\nand runs with them by\n\n```python\nimport gossamer\n\nmodel = gossamer.load(PATH)\n```"


def _loading(file_format: str, attached: bool) -> str:
    dense = (
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        "model = AutoModelForCausalLM.from_pretrained(PATH)\n```"
    )
    if file_format == "dense":
        lead = "Plain transformers loads the weights alone, and runs without them" if attached else ""
        return (lead or "This is an ordinary checkpoint with zeros in it") + ":\n\n" + dense
    sparse = (
        "```python\nimport gossamer  # registers the sparse format with transformers\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained(PATH, variant="sparse")  # or: gossamer.load(PATH)\n```\n\n'
        'Without `import gossamer`, asking for `variant="sparse"` gives random weights and only a warning: '
        "transformers does not know the format by itself."
    )
    if file_format == "both":
        lead = ", and then runs with its weights alone" if attached else ""
        return sparse + f"\n\nThe dense file loads without Gossamer{lead}:\n\n" + dense
    return sparse + "\n\nFor tools that know dense files only: `gossamer convert PATH DENSE --to dense`."


def _details(report: Report) -> str:
    environment = report["environment"]
    return (
        f"Gossamer {report['gossamer']}, torch {environment['torch']}, transformers {environment['transformers']}, "
        f"{environment['threads']} threads. Every figure, layer by layer: `report.json` and `report.html`."
    )
