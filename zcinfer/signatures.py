"""Signatures of copies: an HMAC of an archive's seal with the user's Ray token, which machines of one user have.

Not for archives in a registry, of which the registry itself knows who wrote them (`seals`).
"""

from __future__ import annotations

import hashlib
import hmac
from contextlib import suppress
from typing import Any

from . import config
from .errors import UntrustedArchive
from .files import parse_json
from .keeper import has_token, token_path


def _key() -> bytes:
    return token_path(config.get("ray.token-file")).read_bytes().strip()


def sign(seal: str) -> str:
    """Signature of an archive, by its seal."""
    return hmac.new(_key(), f"zcinfer archive {seal}".encode(), hashlib.sha256).hexdigest()


def check_signature(signed: bytes, seal: str, place: str, upload: str) -> None:
    """Raise `UntrustedArchive` unless this content of a copy's last file has this user's signature of that seal."""
    given = config.get("ray.token-file")
    found: Any = None
    with suppress(ValueError, LookupError, TypeError):
        found = parse_json(signed)["signature"]
    known = isinstance(found, str) and found.isascii() and has_token(given)
    if not known or not hmac.compare_digest(found, sign(seal)):
        token = token_path(given) if has_token(given) else "there is none yet"
        raise UntrustedArchive(
            f"{place}/{upload} was not signed with the token of this machine ({token}), or was altered. Its skeleton "
            "is a pickle: opening it runs code from it. If it is yours, copy the token of the machine that wrote it "
            "(mode 0600) and set zcinfer.ray.token-file; if you trust who can write there: zcinfer put "
            f"{place} --name NAME --trust."
        )
