"""A stand-in for the hub, on this machine: it keeps what it is sent, as the real client sends it."""

import base64
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

from huggingface_hub import HfApi, constants


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as logging in, creating a repository and one commit ask for."""

    def do_POST(self):
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = b"".join(self.chunks()) if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kept, path = self.server.kept, self.path.split("?")[0]
        kept.append((path, body))
        answer = {}
        if path.endswith("/create"):
            answer = {"url": f"http://127.0.0.1/me/{json.loads(body)['name']}"}
        elif "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            answer = {"files": [file | {"shouldIgnore": False} for file in files]}
        elif "/commit/" in path:
            answer = {"commitUrl": "http://127.0.0.1/me/merged/commit/0", "commitOid": "0" * 40, "success": True}
        self.reply(200, answer)

    def do_GET(self):
        there = self.path.endswith("/whoami-v2")
        self.reply(*((200, {"name": "me"}) if there else (404, {"error": "nothing here"})))

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def reply(self, code, answer):
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def stand_in(monkeypatch):
    """Lets the real client speak with it; gives the requests, (path, body) each."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.kept = []
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.trainer.hf_api", HfApi)  # its own knows the real hub's address
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.kept
    finally:
        server.shutdown()
        server.server_close()


def files_sent(kept):
    """The content of each file in the commits, by name."""
    commits = [json.loads(line) for path, body in kept if "/commit/" in path for line in body.splitlines()]
    sent = {line["value"]["path"]: line["value"]["content"] for line in commits if line["key"] == "file"}
    return {name: base64.b64decode(content) for name, content in sent.items()}
