"""What a job did, and what it found. Not for what is kept on disk (`records`)."""

from __future__ import annotations

from dataclasses import dataclass

from .records import Nonfinite


@dataclass(frozen=True)
class Report:
    """What a job did.

    Attributes
    ----------
    target : str
        Path of the zarr array.
    shape : tuple of int
    rows, blocks : int
        In all.
    computed : int
        Blocks computed by this run; the others were there.
    seconds : float
        Of this run.
    failed : tuple of int
        Rows that failed, in all runs: they are NaN.
    in_parts : tuple of (int, int)
        Rows that failed together alone, from first to last: each half of them worked.
    checked : int
        Blocks in which NaN and infinite values were counted.
    nonfinite : tuple of Nonfinite
        What was counted, by block and array, where there was any.
    """

    target: str
    shape: tuple[int, ...]
    rows: int
    blocks: int
    computed: int
    seconds: float
    failed: tuple[int, ...] = ()
    in_parts: tuple[tuple[int, int], ...] = ()
    checked: int = 0
    nonfinite: tuple[Nonfinite, ...] = ()

    def findings(self) -> list[str]:
        """What was found beside the results, in sentences; nothing where all is well."""
        said = []
        if self.failed:
            listed = ", ".join(f"{row:,}" for row in self.failed[:5]) + (", ..." if len(self.failed) > 5 else "")
            said.append(
                f"{len(self.failed):,} of {self.rows:,} rows failed and are NaN: {listed} (zcinfer.failures tells why)"
            )
        if self.in_parts:
            said.append(f"{len(self.in_parts):,} times rows failed together that did not in halves, which were taken")
        for array in dict.fromkeys(counts.array for counts in self.nonfinite):
            found = [counts for counts in self.nonfinite if counts.array == array]
            nan, infinite = sum(counts.nan for counts in found), sum(counts.inf for counts in found)
            blocks = ", ".join(str(counts.block) for counts in found[:5]) + (", ..." if len(found) > 5 else "")
            said.append(
                f"{array}: {nan:,} NaN and {infinite:,} infinite values, in {len(found):,} of {self.checked:,} blocks "
                f"that were checked ({blocks})"
            )
        return said
