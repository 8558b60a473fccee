"""Whether NVIDIA's MPS runs, by which processes on one GPU share one context and compute side by side.

CUDA uses it by itself where its daemon answers; not for starting it (docs/gpu.md).
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

DIRECTORY = "/tmp/nvidia-mps"


def mps(environment: Mapping[str, str] | None = None) -> str:
    """Say whether the daemon answers, in a line.

    Parameters
    ----------
    environment : mapping, optional
        Where CUDA_MPS_PIPE_DIRECTORY is looked up. Default: that of this process, which its workers inherit.

    Notes
    -----
    Connects to the daemon's socket, as CUDA does at the start of each process, and sends nothing. The socket's file
    stays when the daemon ends.
    """
    directory = (os.environ if environment is None else environment).get("CUDA_MPS_PIPE_DIRECTORY") or DIRECTORY
    control = Path(directory) / "control"
    try:
        if not stat.S_ISSOCK(control.stat().st_mode):
            return f"MPS does not run: {control} is no socket"
        with socket.socket(socket.AF_UNIX) as trial:
            trial.settimeout(1)
            trial.connect(str(control))
    except FileNotFoundError:
        return f"MPS does not run: there is no {control}"
    except ConnectionRefusedError:
        return f"MPS does not run: nobody listens at {control}, which an ended daemon has left"
    except OSError as error:
        return f"whether MPS runs is not known: {control}: {error.strerror or error}"
    return f"MPS runs ({directory})"
