"""A server of one process that speaks OpenAI's chat completions, and fails when it is told to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, Any]]


@dataclass
class ChatServer:
    """What the server answers, and what it was asked."""

    url: str = ""
    key: str = ""  # that it asks for
    models: tuple[str, ...] = ("teacher",)
    context: int = 1000  # characters of a message
    failures: list[int] = field(default_factory=list)  # statuses of the next answers
    asked: list[dict[str, Any]] = field(default_factory=list)
    authorization: list[str | None] = field(default_factory=list)
    barrier: threading.Barrier | None = None  # so many requests are answered together

    def answer(self, path: str, body: dict[str, Any], authorization: str | None) -> Answer:
        """Status and JSON of the answer."""
        self.asked.append(body)
        self.authorization.append(authorization)
        if self.failures:
            return self.failures.pop(0), {"error": {"message": "for a while"}}
        if self.key and authorization != f"Bearer {self.key}":
            return 401, {"error": {"message": "Incorrect API key provided"}}
        if path != "/v1/chat/completions" or body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist"}}
        text = body["messages"][0]["content"]
        if len(text) > self.context:
            return 400, {"error": {"message": f"This model's maximum context length is {self.context} characters"}}
        if self.barrier is not None:
            self.barrier.wait(10)
        words = text.split()[: body["max_tokens"]]
        reason = "stop" if len(words) == len(text.split()) else "length"
        return 200, {"choices": [{"message": {"role": "assistant", "content": " ".join(words)}, "finish_reason": reason}]}


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """A server on a free port, which says the message again, a word a token."""
    state = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = state.answer(self.path, body, self.headers.get("Authorization"))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
