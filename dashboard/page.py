"""One open page: a Bokeh document whose parts follow a history; or a file of its own, for a report.

All HTML is in one column of one source; the browser puts in its place what has changed. Not for what the parts say
(`views`), nor for whom they are sent to (`server`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bokeh.document import Document
from bokeh.embed import file_html
from bokeh.events import DocumentReady
from bokeh.models import ColumnDataSource, CustomJS
from bokeh.resources import INLINE
from markupsafe import Markup

from .history import History
from .offline import alone
from .throughput import Throughput
from .views import PARTS, parts, template
from .words import sentence

__all__ = ["Page", "report", "title"]

_START = "window.zcinfer.start({source, figure})"


def title(history: History) -> str:
    """Title of the page: the state, for a tab that nobody looks at."""
    said = sentence(history)
    done, total = sum(run.done for run in history.active), sum(run.total for run in history.active)
    return f"{100 * done // total} % {said.lead}" if total else said.lead


class Page:
    """The document of one browser tab.

    Parameters
    ----------
    document : bokeh.document.Document
        Empty; it is filled here.
    history : History
    shown : dict of str to Markup
        `zcinfer.dashboard.views.parts` of it.
    """

    def __init__(self, document: Document, history: History, shown: dict[str, Markup]):
        self._document = document
        self._shown = {**shown, "age": Markup("-")}
        self._names = list(self._shown)
        self._sequence = history.sequence
        self.source = ColumnDataSource({"name": self._names, "html": list(map(str, self._shown.values()))})
        self._throughput = Throughput(history)
        document.template = template("page")
        document.template_variables.update(sections=shown, recorded=False, at=history.now, notes=())
        document.title = title(history)
        # A document follows the models that its roots refer to, and this one is shown nowhere
        self._throughput.figure.tags = [self.source]
        document.add_root(self._throughput.figure)
        self.source.js_on_change("patching", CustomJS(code="window.zcinfer.update()"))
        document.js_on_event(
            DocumentReady, CustomJS(args={"source": self.source, "figure": self._throughput.figure}, code=_START)
        )

    def update(self, history: History, shown: dict[str, Markup], age: str) -> None:
        """Send what has changed since the last call, unless the page is paused.

        Parameters
        ----------
        history : History
        shown : dict of str to Markup
            `zcinfer.dashboard.views.parts` of it.
        age : str
            Seconds, and whatever makes it differ from the last: the page takes it as a sign of life.
        """
        if "paused" in self.source.tags:
            return
        fresh = {**shown, "age": Markup(age)} if history.sequence != self._sequence else {"age": Markup(age)}
        changes = [
            (place, str(fresh[name]))
            for place, name in enumerate(self._names)
            if name in fresh and fresh[name] != self._shown[name]
        ]
        self._shown |= fresh
        if history.sequence != self._sequence:
            self._sequence = history.sequence
            self._throughput.update(history)
            if (new := title(history)) != self._document.title:
                self._document.title = new
        if changes:
            self.source.patch({"html": changes})


def report(history: History, notes: Sequence[str] = ()) -> str:
    """The page as it is now, as one HTML file that asks no network for anything, now or years later.

    Parameters
    ----------
    history : History
    notes : sequence of str
        Sentences that a reader must know.
    """
    shown = parts(history)
    document = Document()
    throughput = Throughput(history)
    document.add_root(throughput.figure)
    document.js_on_event(
        DocumentReady, CustomJS(args={"source": throughput.source, "figure": throughput.figure}, code=_START)
    )
    variables: dict[str, Any] = {"sections": shown, "recorded": True, "at": history.now or 0.0, "notes": notes}
    assert set(shown) == set(PARTS)
    html = str(
        file_html(
            document,
            INLINE,
            title(history),
            template=template("page"),
            template_variables=variables,
            suppress_callback_warning=True,
        )
    )
    return alone(html)
