"""A bucket on loopback: as much of Google Cloud Storage as gcsfs, google-cloud-storage, tensorstore and
array_record ask for, in memory.

Suffix ranges, generations and their preconditions are answered as the service does, since readers rely on
them: array_record reads the end of a shard first, tensorstore commits a checkpoint's index only over the
generation that it read.
"""

from __future__ import annotations

import base64
import contextlib
import email
import email.policy
import hashlib
import itertools
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import google_crc32c

ENDPOINTS = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
"""Read by gcsfs and google-cloud-storage, by tensorstore, and by array_record."""


@dataclass
class Stored:
    """An object."""

    data: bytes
    generation: int


@dataclass
class Bucket:
    """The service: objects by bucket and name, and what was asked."""

    objects: dict[tuple[str, str], Stored] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    before: Callable[[str, str], None] = lambda method, path: None
    """Called with every request before it is answered."""
    sessions: dict[str, tuple[str, str, dict[str, str], bytearray]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1_700_000_000_000_000))

    def put(self, bucket: str, name: str, data: bytes) -> Stored:
        stored = Stored(bytes(data), next(self.numbers))
        self.objects[bucket, name] = stored
        return stored

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        return sorted(name for held, name in self.objects if held == bucket and name.startswith(prefix))

    def content(self, prefix: str) -> dict[str, bytes]:
        """Objects below `BUCKET/FOLDER/` by what follows."""
        bucket, _, folder = prefix.partition("/")
        return {
            name.removeprefix(folder): self.objects[bucket, name].data for name in self.names(bucket, folder)
        }


class Refused(Exception):  # noqa: N818 (an answer, not an error)
    """An answer other than what was asked for."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def _handler(service: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # of a client that was killed
                super().handle()

        def log_message(self, *arguments: Any) -> None:
            pass

        def _answer(self) -> None:
            body = self._body()
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
            try:
                service.before(self.command, urllib.parse.unquote(self.path))
                with service.lock:
                    service.requests.append((self.command, self.path))
                    self._route(url.path, query, body)
            except Refused as refused:
                said = {"error": {"code": refused.status, "message": str(refused), "errors": []}}
                self._send(refused.status, json.dumps(said).encode())

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _answer  # noqa: N815

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _send(self, status: int, data: bytes = b"", **headers: str) -> None:
            data = b"" if status in (204, 304) else data  # which have none: it would be the next answer
            self.send_response(status)
            named = {"Content_Type": "application/json", "Content_Length": str(len(data))} | headers
            for name, value in named.items():
                self.send_header(name.replace("_", "-"), value)
            with contextlib.suppress(ConnectionError):  # gcsfs asks two questions and drops the later answer
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode())

        def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
            if path.startswith("/batch"):
                self._batch(body)
            elif match := re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", path):
                self._upload(match[1], query, body)
            elif match := re.fullmatch(
                r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", path
            ):
                source, target = _names(match[1], match[2]), _names(match[3], match[4])
                held = self._found(source)
                self._check(target, query)
                stored = service.put(*target, held.data)
                size, about = str(len(held.data)), _about(*target, stored)
                done = {"done": True, "totalBytesRewritten": size, "objectSize": size, "resource": about}
                self._json(done if "/rewriteTo/" in path else about)
            elif match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", path):
                self._object(_names(match[1], match[2]), query, "download" in path)
            elif match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", path):
                self._list(match[1], query)
            elif match := re.fullmatch(r"/storage/v1/b/([^/]+)(/storageLayout)?", path):
                self._json({"kind": "storage#bucket", "name": match[1], "id": match[1], "location": "US"})
            elif match := re.fullmatch(r"/([^/]+)/(.+)", path):  # the XML API
                self._object(_names(match[1], match[2]), {"alt": "media"} | query, True)
            else:
                raise Refused(404, f"this stub has no {path}")

        def _found(self, place: tuple[str, str]) -> Stored:
            stored = service.objects.get(place)
            if stored is None:
                raise Refused(404, f"No such object: {place[0]}/{place[1]}")
            return stored

        def _check(self, place: tuple[str, str], query: dict[str, str]) -> None:
            """Preconditions, before anything is changed."""
            stored = service.objects.get(place)
            now = stored.generation if stored else 0
            for name, header, wanted in (
                ("ifGenerationMatch", "x-goog-if-generation-match", True),
                ("ifGenerationNotMatch", "x-goog-if-generation-not-match", False),
            ):
                given = query.get(name) or self.headers.get(header)
                if given is not None and (int(given) == now) is not wanted:
                    raise Refused(412 if wanted or self.command != "GET" else 304, "precondition")

        def _object(self, place: tuple[str, str], query: dict[str, str], media: bool) -> None:
            if self.command == "PUT":
                self._check(place, query)
                raise Refused(501, "this stub writes through /upload")
            stored = self._found(place)
            self._check(place, query)
            if self.command == "DELETE":
                del service.objects[place]
                self._send(204)
            elif query.get("alt") == "media" or media:
                self._media(stored)
            else:
                self._json(_about(*place, stored))

        def _media(self, stored: Stored) -> None:
            data, total = stored.data, len(stored.data)
            headers = {
                "Content_Type": "application/octet-stream",
                "ETag": f'"{stored.generation}"',
                "X_Goog_Generation": str(stored.generation),
                "X_Goog_Metageneration": "1",
                "X_Goog_Hash": f"crc32c={_crc(data)}",
                "X_Goog_Stored_Content_Length": str(total),
                "X_Goog_Stored_Content_Encoding": "identity",
            }
            match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
            if match is None:
                self._send(200, data, **headers)
                return
            if match[1]:
                first = int(match[1])
                last = min(int(match[2]), total - 1) if match[2] else total - 1
            else:
                first, last = max(total - int(match[2]), 0), total - 1
            if first >= total:
                self._send(416, b"", Content_Range=f"bytes */{total}")
                return
            self._send(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{total}", **headers)

        def _list(self, bucket: str, query: dict[str, str]) -> None:
            prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
            items, folders = [], set()
            for name in service.names(bucket, prefix):
                if not query.get("startOffset", "") <= name or name >= query.get("endOffset", "\U0010ffff"):
                    continue
                rest = name.removeprefix(prefix)
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(_about(bucket, name, service.objects[bucket, name]))
            self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

        def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
            kind = query.get("uploadType")
            if "upload_id" in query:
                self._resumed(query["upload_id"], body)
            elif kind == "resumable":
                name = query.get("name") or json.loads(body)["name"]
                self._check((bucket, name), query)
                number = str(next(service.numbers))
                service.sessions[number] = (bucket, name, query, bytearray())
                host = self.headers["Host"]
                where = (
                    f"http://{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
                )
                self._send(200, b"{}", Location=where, X_GUploader_UploadID=number)
            else:
                name = query.get("name", "")
                if kind == "multipart":
                    head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                    described, media = _parts(head + body)
                    name, body = json.loads(described).get("name", name), media
                self._check((bucket, name), query)
                self._json(_about(bucket, name, service.put(bucket, name, body)))

        def _resumed(self, number: str, body: bytes) -> None:
            bucket, name, query, held = service.sessions[number]
            held += body
            total = (self.headers.get("Content-Range") or f"bytes 0-0/{len(held)}").rpartition("/")[2]
            if total == "*" or int(total) > len(held):
                seen = {"Range": f"bytes=0-{len(held) - 1}"} if held else {}
                self._send(308, b"", **seen)
                return
            self._check((bucket, name), query)
            self._json(_about(bucket, name, service.put(bucket, name, bytes(held))))

        def _batch(self, body: bytes) -> None:
            """Deletions, several in one request."""
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            answers = []
            for part in _parts(head + body):
                method, path = part.split(b" ", 2)[:2]
                match = re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/?]+)(?:\?.*)?", path.decode())
                assert match is not None, part
                assert method == b"DELETE"
                gone = service.objects.pop(_names(match[1], match[2]), None)
                status = "204 No Content" if gone else "404 Not Found"
                answers.append(f"Content-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
            text = "".join(f"--answer\r\n{answer}" for answer in answers) + "--answer--\r\n"
            self._send(200, text.encode(), Content_Type="multipart/mixed; boundary=answer")

    return Handler


def _names(bucket: str, name: str) -> tuple[str, str]:
    return urllib.parse.unquote(bucket), urllib.parse.unquote(name)


def _parts(message: bytes) -> list[bytes]:
    parsed = email.message_from_bytes(message, policy=email.policy.HTTP)
    return [part.get_payload(decode=True) or b"" for part in parsed.iter_parts()]  # type: ignore[attr-defined]


def _crc(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def _about(bucket: str, name: str, stored: Stored) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{stored.generation}",
        "name": name,
        "bucket": bucket,
        "generation": str(stored.generation),
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "storageClass": "STANDARD",
        "size": str(len(stored.data)),
        "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
        "crc32c": _crc(stored.data),
        "etag": str(stored.generation),
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
    }


@contextlib.contextmanager
def serve() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Serves an empty service.

    Yields:
        the service, and the environment under which this project's libraries ask it.
    """
    service = Bucket()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(service))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    anonymous = {
        "FSSPEC_GS_TOKEN": "anon",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
        "GOOGLE_CLOUD_PROJECT": "none",
        "NO_GCE_CHECK": "true",
        # Whether a bucket has folders of its own is asked over gRPC, which this stub does not speak.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    try:
        yield service, {**os.environ, **anonymous, **dict.fromkeys(ENDPOINTS, url)}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """For trying things out: prints the environment and serves until it is killed."""
    with serve() as (_, environment):
        print(" ".join(f"{name}={environment[name]}" for name in ENDPOINTS), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
