#!/usr/bin/env python3
"""A large upload to `dstune serve --no-inference`: its memory, its speed, and what the server reads of one without a key.

usage: python benchmarks/uploads.py [--megabytes 1024]

Prints a line of JSON: the largest memory of the server before and during the upload and its download, as the kernel counts it
(MiB); seconds; whether the content comes back as it went; and of an upload of the same size without a key the bytes that the client
could send before the server hung up, and those that the server's process read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 1 << 20


def head(host: str, port: int, key: str, size: int) -> bytes:
    return (
        f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {size}\r\n\r\n"
    ).encode()


def upload(host: str, port: int, key: str, megabytes: int) -> tuple[bytes, int, str]:
    """Return the answer, how many bytes of the file were sent, and their digest."""
    form_start = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    )
    form_end = b"\r\n--x--\r\n"
    digest, sent, answer = hashlib.sha256(), 0, b""
    block = os.urandom(CHUNK)
    with socket.create_connection((host, port)) as connection:
        connection.settimeout(120)
        try:
            connection.sendall(head(host, port, key, len(form_start) + megabytes * CHUNK + len(form_end)) + form_start)
            for number in range(megabytes):
                piece = number.to_bytes(8, "big") + block[8:]
                view = memoryview(piece)
                while view:
                    count = connection.send(view)
                    sent += count
                    view = view[count:]
                digest.update(piece)
            connection.sendall(form_end)
        except ConnectionError:
            pass
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:
            pass
    return answer, sent, digest.hexdigest()


def download(host: str, port: int, key: str, file: str) -> str:
    path = f"/v1/files/{file}/content"
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n"
    digest, seen = hashlib.sha256(), b""
    with socket.create_connection((host, port)) as connection:
        connection.sendall(request.encode())
        while b"\r\n\r\n" not in seen:
            seen += connection.recv(65536)
        digest.update(seen.split(b"\r\n\r\n", 1)[1])
        while piece := connection.recv(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def peak(pid: int) -> float:
    """Return the largest resident memory of a process since the last call, in MiB."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    assert match is not None
    return int(match[1]) / 1024


def main(megabytes: int) -> int:
    with tempfile.TemporaryDirectory(prefix="dstune-uploads-") as folder:
        state = Path(folder) / "state"
        command = [
            sys.executable, "-m", "dstune", "serve", "--no-inference", "--jobs", "elsewhere", "--port", "0", "--state",
            str(state), "--max-file-bytes", str(2 * megabytes * CHUNK),
        ]  # fmt: skip
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            lines = iter(server.stdout.readline, "")
            address = next(match for line in lines if (match := re.match(r"http://([\d.]+):(\d+)/", line)))
            host, port, key = address[1], int(address[2]), (state / "key").read_text().strip()
            process = psutil.Process(server.pid)
            upload(host, port, key, 8)  # what the first upload loads
            mib_before, read = peak(server.pid), process.io_counters().read_chars
            _, refused, _ = upload(host, port, "nothing", megabytes)
            read = process.io_counters().read_chars - read
            began = time.monotonic()
            answer, _, digest = upload(host, port, key, megabytes)
            seconds = time.monotonic() - began
            file = json.loads(answer.split(b"\r\n\r\n", 1)[1])["id"]
            returned = download(host, port, key, file)
            result = {
                "megabytes": megabytes, "seconds": round(seconds, 1), "memory_before": round(mib_before, 1),
                "memory_peak": round(peak(server.pid), 1), "same": returned == digest, "sent_without_a_key": refused,
                "read_without_a_key": read,
            }  # fmt: skip
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    print(json.dumps(result))
    return 0 if result["same"] else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    sys.exit(main(parser.parse_args().megabytes))
