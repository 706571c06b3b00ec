"""The page of a run that is still going on, on this machine alone: a browser that has it open sees
it anew every few seconds.

Nothing is written into the run and no script runs in the browser: the page asks to be fetched
again. It is drawn only where the run has moved on, and never for more than a twentieth of the time,
which belongs to the training. Left out: what is on the page (page.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from vise_fast.report import page
from vise_fast.report.stored_run import read
from vise_fast.system.errors import DataError, EnvironmentFault

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
REFRESH = 10
"""Seconds between two looks of a browser."""
SHARE = 20
"""Drawing takes at most one part in so many of the time."""
WAITING = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="refresh" content="{refresh}"><title>VISE training report</title></head>
<body><p>No step is finished yet. This page asks again by itself.</p></body></html>
"""


class Pages:
    """The page of one run, drawn where it has changed."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory = directory
        self.clock = clock
        self.drawn = 0
        self._lock = Lock()
        self._page = ""
        self._state: Any = None
        self._rest_until = -1.0

    def current(self) -> str:
        """The page as HTML; the last one where nothing changed or drawing has had its share."""
        with self._lock:
            state = self._seen()
            if state != self._state and self.clock() >= self._rest_until:
                self._draw()
                self._state = state
            return self._page

    def _seen(self) -> list[tuple[int, int] | None]:
        """Size and time of change of the files that say how far it is."""
        found: list[tuple[int, int] | None] = []
        for name in ("metrics.jsonl", "evaluation.json", "adapter/adapter_config.json"):
            path = self.directory / name
            known = path.stat() if path.exists() else None
            found.append(None if known is None else (known.st_size, known.st_mtime_ns))
        return found

    def _draw(self) -> None:
        begun = self.clock()
        try:
            run = read(self.directory)
            plots = page.curves(run, page.silent)
            self._page = page.render(run, plots, refresh=0 if run.after else REFRESH)
        except DataError:  # no step yet, or a file that is being written
            self._page = self._page or WAITING.format(refresh=REFRESH)
        self.drawn += 1
        self._rest_until = self.clock() + SHARE * (self.clock() - begun)


def server(directory: Path, port: int) -> ThreadingHTTPServer:
    """Answers on loopback alone; port 0: any that is free. Raises EnvironmentFault where it is
    taken.
    """
    pages = Pages(directory)

    class Handler(BaseHTTPRequestHandler):
        """One page at one address; other names for this machine are refused, so that no other
        site's script can read it.
        """

        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in NAMES:
                self.send_error(403)
            elif self.path != "/":
                self.send_error(404)
            else:
                self._send(pages.current().encode())

        def _send(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Says nothing of requests."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as fault:
        raise EnvironmentFault(
            f"port {port} cannot be used: {fault.strerror or fault}; give another with --port"
        ) from None
