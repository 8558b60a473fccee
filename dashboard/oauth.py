"""Logging in by OAuth, as Panel does it: for people on a list. Not for passwords (`access`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import panel
from panel.auth import OAuthProvider
from tornado.web import HTTPError

__all__ = ["Listed", "configure"]


class Listed(OAuthProvider):  # type: ignore[misc]
    """Panel's OAuth, which lets in whoever has an account; this one those whose names are given.

    Parameters
    ----------
    users : tuple of str
        As the provider names them: most by e-mail address, GitHub by login.
    templates : str
        Paths of Panel's ``logout_template`` and ``error_template``.
    """

    def __init__(self, users: tuple[str, ...], **templates: str):
        self._users = users
        super().__init__(**templates)

    @property
    def get_user_async(self) -> Callable[[Any], Any]:
        """What Bokeh asks before it answers a page, a download or a websocket."""
        ask = super().get_user_async

        async def get_user(handler: Any) -> str | None:
            user: str | None = await ask(handler)
            if user is not None and user not in self._users:
                raise HTTPError(403, "%s is not on the list", user)
            return user

        return get_user


def configure(options: Mapping[str, Any]) -> None:
    """Set options of Panel's (``oauth_provider``, ``oauth_key`` ...) for this process."""
    for name, value in options.items():
        setattr(panel.config, name, value)
