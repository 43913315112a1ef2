"""`gossamer` commands on one model, in as many processes as wanted."""

from __future__ import annotations

from pathlib import Path

from processes import Done, Launcher, Running
from tiny import digests

SIZES = ("--nsamples", "5", "--seqlen", "32", "--eval-windows", "3", "--format", "both")
SLABS = "import gossamer.compress.sums as sums; sums.SLAB = 16"  # several slabs in matrices this small
SPILL = ("--max-memory", "1")


class Group:
    """`gossamer` commands on one model, in as many processes as wanted."""

    def __init__(self, launcher: Launcher, model: Path) -> None:
        self.launcher, self.model = launcher, model

    def words(self, out: Path, *more: str | Path) -> list[str | Path]:
        texts = ["--calibration", self.model / "calibration.txt", "--eval", self.model / "heldout.txt"]
        return ["compress", self.model, "-o", out, *texts, *SIZES, *more]

    def begin(
        self,
        count: int,
        words: list[str | Path],
        before: dict[int, str] | None = None,
        fail: dict[int, str] | None = None,
    ) -> list[Running]:
        """`before`: rank -> Python to run first; `fail`: rank -> failpoint."""
        code = {rank: f"{SLABS}\n{(before or {}).get(rank, '')}" for rank in range(count)}
        points = {rank: {"GOSSAMER_FAILPOINT": point} for rank, point in (fail or {}).items()}
        return self.launcher.start_group(count, *words, before=code, of_rank=points)

    def run(self, count: int, out: Path, *more: str | Path, **options) -> list[Done]:
        return [process.wait() for process in self.begin(count, self.words(out, *more), **options)]

    def finished(self, count: int, out: Path, *more: str | Path, **options) -> dict[str, str]:
        """Digests of OUT after a run that must succeed."""
        for done in self.run(count, out, *more, **options):
            assert done.returncode == 0, done.stderr
        return digests(out)


def one_error(all_done: list[Done]) -> str:
    """The only error line of all processes; all ended with 2 and without a traceback."""
    assert [done.returncode for done in all_done] == [2] * len(all_done), [done.stderr for done in all_done]
    assert not any("Traceback" in done.stderr for done in all_done)
    (error,) = [line for done in all_done for line in done.errors()]
    return error
