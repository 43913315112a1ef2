"""Option types that several commands share, and the panels of the help page.

Defaults of the recipe are written in one place, `compress/recipe.py`: an option that was not given stays None and is
left out of the recipe. The texts shown as defaults here are compared with the recipe by a test. Every option is also
accepted with underscores (`--max_memory`): the whole application normalises them, see `main.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

PRUNING = "Pruning"
HEADS = "Head plan"
TRAINING = "Training"
ACTIVATION = "Activation sparsity"
DATA = "Data"
OUTPUT = "Output"
MACHINE = "Machine"
ADVANCED = "Advanced"

_DATA_FORMS = (
    "a text, JSONL or Parquet file, a folder of them, a dataset id[:config][:split][:column], wikitext2, c4, ptb"
)


def examples(*commands: str) -> str:
    """The Examples section that closes every help page."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  $ {command}" for command in commands)])


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id or a local model folder.", show_default=False)]
NewFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder to create.", show_default=False)]

Out = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The folder to write.", show_default=False)]
FileFormat = Annotated[
    Optional[str],
    typer.Option(
        "--format",
        metavar="sparse|dense|both",
        help="What to write. \\[default: sparse]",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything, print the plan, write nothing.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with a run that was cut off, after what it had finished.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is in OUT.", rich_help_panel=OUTPUT, show_default=False)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=OUTPUT, show_default=False)
]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="No progress on stderr.", rich_help_panel=OUTPUT, show_default=False)
]

Revision = Annotated[
    Optional[str], typer.Option(metavar="REV", help="Branch, tag or commit of a hub model.", rich_help_panel=ADVANCED)
]
Token = Annotated[
    Optional[str],
    typer.Option(
        metavar="TOKEN",
        help="Access token for a private hub model; default: the one you logged in with.",
        rich_help_panel=ADVANCED,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Only for sources you trust.",
        rich_help_panel=ADVANCED,
        show_default=False,
    ),
]

Device = Annotated[
    Optional[str],
    typer.Option(
        metavar="NAME", help="auto, cpu, cuda or cuda:N. \\[default: auto]", rich_help_panel=MACHINE, show_default=False
    ),
]
Dtype = Annotated[
    Optional[str],
    typer.Option(
        metavar="NAME",
        help="Arithmetic of the model's forward pass: auto, float32, bfloat16, float16. \\[default: auto]",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
MaxMemory = Annotated[
    Optional[str],
    typer.Option(
        metavar="SIZE",
        help="Hidden states beyond this are kept on disk. \\[default: 8GiB]",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]

Data = Annotated[str, typer.Option(metavar="DATA", help=f"Text to evaluate on: {_DATA_FORMS}.", rich_help_panel=DATA)]
Calibration = Annotated[
    Optional[str],
    typer.Option(
        metavar="DATA",
        help=f"Text whose activations guide the pruning: {_DATA_FORMS}. \\[default: c4, where the method needs text]",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Evaluation = Annotated[
    Optional[str],
    typer.Option(
        "--eval",
        metavar="DATA",
        help="Text for the perplexity before and after; same forms. \\[default: wikitext2]",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
SequenceLength = Annotated[
    Optional[int],
    typer.Option(
        metavar="N",
        help="Tokens per window. \\[default: the model's positions, at most 2048]",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Windows = Annotated[
    Optional[int],
    typer.Option(
        metavar="N",
        help="Evaluate the first so many windows only. \\[default: all]",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
NoEvaluation = Annotated[
    bool, typer.Option("--no-eval", help="Skip the evaluation.", rich_help_panel=DATA, show_default=False)
]
