"""Ratios of the last runs that were committed, and whether those of a new run have fallen by a third.

Not for times: those are another machine's. Quick runs are compared with quick runs, and whole ones with whole ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zcinfer.errors import SettingsError

FALLEN = 1 / 3
FILE = "ratios.json"


def ratios(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those bars of a run that are ratios, and so mean the same on another machine."""
    bars: Mapping[str, Mapping[str, Any]] = results.get("bars", {})
    return {name: {"found": one["found"], "most": one["most"]} for name, one in bars.items() if not one.get("unit")}


def keep(path: Path, name: str, results: Mapping[str, Any]) -> None:
    """Put a run's ratios into the file that is committed."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept.setdefault(name, {})[_kind(results)] = {"on": results["on"]["when"], "ratios": ratios(results)}
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def fallen(path: Path, name: str, results: Mapping[str, Any]) -> list[str]:
    """What has fallen by a third or more since, in sentences.

    Raises
    ------
    SettingsError
        There is nothing to compare with.
    """
    kept = json.loads(path.read_text()) if path.exists() else {}
    try:
        before = kept[name][_kind(results)]
    except KeyError:
        raise SettingsError(
            f"{path} has no ratios of a {_kind(results)} run of {name!r}: commit those of one with --docs first"
        ) from None
    new, said = ratios(results), []
    for bar, old in before["ratios"].items():
        if bar not in new:
            continue  # a part that was not asked for
        found, was = new[bar]["found"], old["found"]
        if found > was / (1 - FALLEN) if old["most"] else found < was * (1 - FALLEN):
            said.append(f"{name}: {bar}: {found:.3g}, and was {was:.3g} on {before['on']}")
    return said


def _kind(results: Mapping[str, Any]) -> str:
    return "quick" if results["quick"] else "whole"
