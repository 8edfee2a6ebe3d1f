"""A small OpenAI-compatible endpoint: real HTTP, and replies that a test can predict."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Peer(ThreadingHTTPServer):
    """Replies `said(text)` to the text of a request; fails the first `failures` requests with `status`.

    With `respond` it decides instead: called with the number of the request (from 0) and its body, it returns
    a status and an object or bytes to send, and headers if it likes; None for the usual reply.
    """

    def __init__(self, failures=0, status=503, script=None, respond=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.status, self.script, self.respond = failures, status, script, respond
        self.bodies, self.headers, self.lock = [], [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def said(self, text):
        return self.script(text)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.bodies) - 1
        decided = self.server.respond(number, body) if self.server.respond else None
        if decided is not None:
            return self.reply(*decided)
        if number < self.server.failures:
            return self.reply(self.server.status, {"error": "busy"})
        said = self.server.said(body["messages"][0]["content"][1]["text"])
        return self.reply(
            200,
            {
                "choices": [{"message": {"content": said}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            },
        )

    def reply(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass
