"""Who may look at the page: on which address it listens, by which names it is called, and who has to log in.

Not for serving it (`server`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zcinfer.errors import SettingsError

__all__ = ["LOOPBACK", "Access", "OAuth"]

LOOPBACK = "127.0.0.1"
_LOCAL = ("127.0.0.1", "localhost")

# Options of Panel's that an OAuth file may have, and those of them that it must
_OAUTH = {
    *("oauth_provider", "oauth_key", "oauth_secret", "oauth_redirect_uri", "oauth_extra_params"),
    *("oauth_refresh_tokens", "oauth_jwt_user", "oauth_expiry"),
}
_NEEDED = {"oauth_provider", "oauth_key", "oauth_secret"}


@dataclass(frozen=True)
class OAuth:
    """Logging in with an account elsewhere.

    Parameters
    ----------
    options : dict
        Panel's, by their names there: ``oauth_provider``, ``oauth_key``, ``oauth_secret`` ...
    users : tuple of str
        Who may look: names as the provider gives them, most by e-mail address, GitHub by login.

    Raises
    ------
    SettingsError
        An option is missing, or unknown, or nobody may look.
    """

    options: dict[str, Any] = field(repr=False, hash=False)
    users: tuple[str, ...]

    def __post_init__(self) -> None:
        missing, unknown = sorted(_NEEDED - self.options.keys()), sorted(self.options.keys() - _OAUTH)
        if missing or unknown:
            what = f"{', '.join(missing)} missing" if missing else f"{', '.join(unknown)} unknown"
            raise SettingsError(f"OAuth: {what}. It takes {', '.join(sorted(_OAUTH))} of Panel's options, and users")
        if not self.users:
            raise SettingsError(
                'OAuth: anybody with an account could log in. Say who may, as in "users": ["ann@example.org"]'
            )

    @classmethod
    def from_file(cls, path: str) -> OAuth:
        """Options and users from a JSON object in a file.

        Raises
        ------
        SettingsError
            It cannot be read, others can read it, or it does not hold what it must.
        """
        found = _json(Path(path), _secret(Path(path)))
        users = found.pop("users", [])
        if not isinstance(users, list) or not all(isinstance(user, str) and user for user in users):
            raise SettingsError(f'{path}: write "users": ["name", ...]')
        return cls(found, tuple(users))


@dataclass(frozen=True)
class Access:
    """Who may look at the page.

    Parameters
    ----------
    host : str
        Address to listen on. Any but this machine's own needs ``passwords`` or ``oauth``.
    port : int
        0: any that is free.
    origins : tuple of str
        HOST:PORT by which browsers may call it, where it listens beyond this machine.
    passwords : str or dict of str to str, optional
        One for all, or by name.
    oauth : OAuth, optional
        In their place.

    Raises
    ------
    SettingsError
        It would be open to other machines without authentication, or nobody could call it.
    """

    host: str = LOOPBACK
    port: int = 0
    origins: tuple[str, ...] = ()
    passwords: str | dict[str, str] | None = field(default=None, repr=False)
    oauth: OAuth | None = None

    def __post_init__(self) -> None:
        if self.passwords and self.oauth:
            raise SettingsError("the dashboard asks for passwords or for OAuth, and not for both: give one of them")
        if self.host in _LOCAL:
            return
        if not (self.passwords or self.oauth):
            raise SettingsError(
                f"the dashboard would be open to whoever reaches {self.host}: give --password-file or --oauth-file, or "
                "leave out --host and look through `ssh -L`."
            )
        if not self.origins:
            raise SettingsError(
                f"the dashboard listens on {self.host}: say by which HOST:PORT browsers call it, with --origin (as in "
                "--origin node7:8788). Pages of other sites are refused."
            )

    def allowed(self, port: int) -> list[str]:
        """Values of a request's Host that are answered, and Origins of a websocket."""
        return [*(f"{name}:{port}" for name in _LOCAL), *self.origins]

    @staticmethod
    def passwords_from(path: str) -> str | dict[str, str]:
        """Passwords of a file: one alone, or a JSON object of names and passwords.

        Raises
        ------
        SettingsError
            It cannot be read, others can read it, or it holds none.
        """
        text = _secret(Path(path))
        if not text.startswith("{"):
            return text
        found = _json(Path(path), text)
        if not found or not all(isinstance(value, str) and value for value in found.values()):
            raise SettingsError(f'{path}: write {{"name": "password", ...}}')
        return dict(found)


def _secret(file: Path) -> str:
    """Text of a file that nobody else can read."""
    try:
        if file.stat().st_mode & 0o077:
            raise SettingsError(f"{file} can be read by others: chmod 600 it, and put another secret into it.")
        text = file.read_text().strip()
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error}") from error
    if not text:
        raise SettingsError(f"{file} is empty: write what it is to hold into it.")
    return text


def _json(file: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"{file} holds no JSON object")
    return found
