"""The model of the fault harness: small, and it says which blocks it has computed. Imported by the workers too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

BLOCKS, ROWS, WIDTH = int(os.environ.get("ZCINFER_FAULTS_BLOCKS", "400")), 200, 64
BATCH = 64
# Blocks of equal rows become small chunks; every tenth is of noise, which no codec makes smaller
NOISY = 10


class Counted(torch.nn.Module):
    """A linear layer that writes the first column of each block's first batch, its number, to a file."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.log = str(log)
        self.layer = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A block is three batches of 64 rows and one of 8; two rows are tried when the job is made
        if len(x) == ROWS % BATCH:
            with open(self.log, "a") as log:
                log.write(f"{int(x[0, 0])}\n")
        return self.layer(x)


def build() -> torch.nn.Module:
    """For `zcinfer put counted:build`."""
    return Counted(Path(os.environ["ZCINFER_FAULTS_LOG"])).eval()


def rows() -> np.ndarray:
    """Of all blocks, ``(BLOCKS * ROWS, WIDTH)`` float32; the first column is the block's number."""
    x = np.empty((BLOCKS, ROWS, WIDTH), np.float32)
    x[:] = (np.arange(BLOCKS) / BLOCKS)[:, None, None]
    x[::NOISY] = np.random.default_rng(0).random((len(x[::NOISY]), ROWS, WIDTH), dtype=np.float32)
    x[:, :, 0] = np.arange(BLOCKS)[:, None]
    return x.reshape(-1, WIDTH)
