"""Who may look at the page: on which address it listens, by which names it is called, and who has to log in.

Not for serving it (`server`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from zcinfer.errors import SettingsError

__all__ = ["LOOPBACK", "Access"]

LOOPBACK = "127.0.0.1"
_LOCAL = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Access:
    """Who may look at the page.

    Parameters
    ----------
    host : str
        Address to listen on. Any but this machine's own needs ``passwords``.
    port : int
        0: any that is free.
    origins : tuple of str
        HOST:PORT by which browsers may call it, where it listens beyond this machine.
    passwords : str or dict of str to str, optional
        One for all, or by name.

    Raises
    ------
    SettingsError
        It would be open to other machines without authentication, or nobody could call it.
    """

    host: str = LOOPBACK
    port: int = 0
    origins: tuple[str, ...] = ()
    passwords: str | dict[str, str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.host in _LOCAL:
            return
        if not self.passwords:
            raise SettingsError(
                f"the dashboard would be open to whoever reaches {self.host}: give --password-file, or leave out "
                "--host and look through `ssh -L`."
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
        file = Path(path)
        try:
            if file.stat().st_mode & 0o077:
                raise SettingsError(f"{file} can be read by others: chmod 600 it, and choose another password.")
            text = file.read_text().strip()
        except OSError as error:
            raise SettingsError(f"the password's file cannot be read: {error}") from error
        if not text.startswith("{"):
            if not text:
                raise SettingsError(f"{file} is empty: write a password into it.")
            return text
        try:
            found = json.loads(text)
        except ValueError as error:
            raise SettingsError(f"{file} is not JSON: {error}") from error
        if not found or not all(isinstance(value, str) and value for value in found.values()):
            raise SettingsError(f'{file}: write {{"name": "password", ...}}')
        return dict(found)
