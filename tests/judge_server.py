"""A judge's endpoint, on this machine: as much of OpenAI's protocol as it needs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]


class Server:
    """Answers each request with what `reply` makes of the two answers in it."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Callable[[str, str], Reply] = lambda a, b: said("C")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                text = body["messages"][0]["content"]
                a = text.split("[Answer A]\n")[1].split("\n[End of answer A]")[0]
                b = text.split("[Answer B]\n")[1].split("\n[End of answer B]")[0]
                status, headers, value = outer.reply(a, b)
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, header in headers.items():
                    self.send_header(name, header)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def said(content: str) -> Reply:
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": content}}]}
