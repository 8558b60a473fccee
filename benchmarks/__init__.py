"""Benchmarks: one file a question, run by ``zcinfer bench``; installed as ``zcinfer.benchmarks``.

``benchmark`` is what each of them is, ``running`` runs one or all, ``measure`` has the clock, ``tables``,
``figures`` and ``pages`` what is shown. Not for users' programs: names here change without notice.
"""
