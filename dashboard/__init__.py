"""The page that says whether it works, when it will be done, and what it waits for: ``zcinfer dashboard``.

In import order: `units` (figures as text), `charts`, `history` (what a page knows), `words` (what that means), `views`
(each part of the page as a function of a history), `offline`, `throughput` and `page` (Bokeh models and HTML),
`samples` (for programs), `server`.
"""
