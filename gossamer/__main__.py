"""`python -m gossamer` is the command `gossamer`."""

from .cli.main import main

main()
