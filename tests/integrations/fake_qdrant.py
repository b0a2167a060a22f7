"""What the clinic assistants ask of a Qdrant server over HTTP, answered by qdrant-client's own embedded mode.

It is no Qdrant: it shows that `url=` reaches a server through the real client, with the requests a server would get.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

from pydantic import TypeAdapter
from qdrant_client import QdrantClient, models


class FakeQdrant:
    """The collections, and the requests that came."""

    def __init__(self) -> None:
        self.client = QdrantClient(":memory:")
        self.requests: list[str] = []
        self.lock = threading.Lock()  # the embedded mode is for one caller at a time

    def answer(self, method: str, path: str, body: dict) -> object:
        """The result of one request; `KeyError` where this fake does not know it."""
        self.requests.append(f"{method} {path}")
        if (method, path) == ("GET", "/"):
            return None
        name, rest = re.fullmatch(r"/collections/(\w+)(/.*)?", path).groups()
        with self.lock:
            return getattr(self, KNOWN[method, rest])(name, body)

    def exists(self, name: str, body: dict) -> object:
        return {"exists": self.client.collection_exists(name)}

    def create(self, name: str, body: dict) -> object:
        wanted = models.CreateCollection.model_validate(body)
        return self.client.create_collection(
            name, vectors_config=wanted.vectors, sparse_vectors_config=wanted.sparse_vectors
        )

    def drop(self, name: str, body: dict) -> object:
        return self.client.delete_collection(name)

    def info(self, name: str, body: dict) -> object:
        return self.client.get_collection(name).model_dump(mode="json")

    def index(self, name: str, body: dict) -> object:
        return {"operation_id": 0, "status": "completed"}  # the embedded mode has none

    def upsert(self, name: str, body: dict) -> object:
        points: models.PointsList | models.PointsBatch
        points = TypeAdapter(models.PointsList | models.PointsBatch).validate_python(body)
        given = points.points if isinstance(points, models.PointsList) else points.batch
        return self.client.upsert(name, given).model_dump(mode="json")

    def query(self, name: str, body: dict) -> object:
        wanted = models.QueryRequest.model_validate(body)
        found = self.client.query_points(
            name,
            query=wanted.query,
            using=wanted.using,
            prefetch=wanted.prefetch,
            query_filter=wanted.filter,
            limit=wanted.limit or 10,
            with_payload=bool(wanted.with_payload),
            with_vectors=bool(wanted.with_vector),
        )
        return found.model_dump(mode="json")


KNOWN = {
    ("GET", None): "info",
    ("GET", "/exists"): "exists",
    ("PUT", None): "create",
    ("DELETE", None): "drop",
    ("PUT", "/index"): "index",
    ("PUT", "/points"): "upsert",
    ("POST", "/points/query"): "query",
}


@contextmanager
def serve() -> Iterator[tuple[str, FakeQdrant]]:
    """The server's address and what it holds."""
    fake = FakeQdrant()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                result = fake.answer(self.command, self.path.split("?")[0], json.loads(body or b"{}"))
                status, reply = 200, {"title": "fake", "version": version("qdrant-client"), "result": result}
            except Exception as error:
                status, reply = 500, {"status": {"error": repr(error)}}
            text = json.dumps({"status": "ok", "time": 0.0, **reply}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST = do_DELETE = handle_any

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", fake
        finally:
            server.shutdown()
