"""A small OpenAI-compatible server, run as a process of its own; what it does is chosen by the model's name.

Prints its port when it listens.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

gone = threading.Event()
"""Set when a client hung up during an endless reply."""


def piece(text: str | None, finish: str | None = None) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def json(self, status: int, value: Any) -> None:
        self.answer(status, "application/json", json.dumps(value).encode())

    def start(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def raw(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def event(self, value: Any) -> None:
        self.raw(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")

    def done(self) -> None:
        self.raw(b"data: [DONE]\n\n")
        self.raw(b"")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.json(404, {"error": {"message": f"no route {self.path}"}})
            return
        getattr(self, "mode_" + request["model"], self.unknown)(request)

    def unknown(self, request: dict[str, Any]) -> None:
        self.json(404, {"error": {"message": f"model '{request['model']}' not found"}})

    def mode_echo(self, request: dict[str, Any]) -> None:
        """The request and its key, as JSON, in pieces."""
        text = json.dumps({"request": request, "key": self.headers.get("Authorization")})
        self.start()
        self.raw(b": a comment\n\n")
        self.event(piece(""))
        for start in range(0, len(text), 7):
            self.event(piece(text[start : start + 7]))
        self.event(piece(None, "stop"))
        self.event({"choices": [], "usage": {"total_tokens": 3}})
        self.done()

    def mode_unicode(self, request: dict[str, Any]) -> None:
        """Line separators inside JSON, CRLF line ends, and events that are split anywhere."""
        data = b"".join(
            b"data:" + json.dumps(value, ensure_ascii=False).encode() + b"\r\n\r\n"
            for value in (piece("a\u2028b\x85"), piece("é🎉"), piece(None, "stop"))
        )
        self.start()
        for start in range(0, len(data), 3):
            self.raw(data[start : start + 3])
        self.raw(b"")

    def mode_plain(self, request: dict[str, Any]) -> None:
        self.json(200, {"choices": [{"message": {"role": "assistant", "content": "all at once"}}]})

    def mode_fails(self, request: dict[str, Any]) -> None:
        self.json(500, {"error": {"message": "out of\nmemory", "type": "server_error"}})

    def mode_failstext(self, request: dict[str, Any]) -> None:
        self.answer(503, "text/html", b"<h1>Loading model</h1>")

    def mode_failsdetail(self, request: dict[str, Any]) -> None:
        self.json(422, {"detail": "max_tokens too large"})

    def mode_locked(self, request: dict[str, Any]) -> None:
        self.json(401, {"error": "wrong key"})

    def mode_failslate(self, request: dict[str, Any]) -> None:
        self.start()
        self.event(piece("so far"))
        self.event({"error": {"message": "the context is full"}})
        self.done()

    def mode_breaks(self, request: dict[str, Any]) -> None:
        """The connection closes inside a chunk."""
        self.start()
        self.event(piece("half a"))
        self.wfile.write(b"ff\r\ndata: {")
        self.wfile.flush()
        self.close_connection = True

    def mode_cut(self, request: dict[str, Any]) -> None:
        """The stream ends properly, the reply does not."""
        self.start()
        self.event(piece("half a"))
        self.raw(b"")

    def mode_hangs(self, request: dict[str, Any]) -> None:
        self.start()
        self.event(piece("well"))
        time.sleep(30)

    def mode_silent(self, request: dict[str, Any]) -> None:
        time.sleep(30)

    def mode_website(self, request: dict[str, Any]) -> None:
        self.answer(200, "text/html", b"<html>Welcome</html>")

    def mode_strange(self, request: dict[str, Any]) -> None:
        self.start()
        self.event(["not", "an", "object"])
        self.done()

    def mode_endless(self, request: dict[str, Any]) -> None:
        self.start()
        try:
            while True:
                self.event(piece("on and "))
                time.sleep(0.01)
        except OSError:
            gone.set()
            self.close_connection = True

    def mode_gone(self, request: dict[str, Any]) -> None:
        """Whether the client of the endless reply hung up, waiting for it a while."""
        self.json(200, {"choices": [{"message": {"content": str(gone.wait(10))}}]})


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
