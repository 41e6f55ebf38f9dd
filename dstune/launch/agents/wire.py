"""Messages between agents: JSON objects, one a line, over a TCP connection whose both ends prove that they know the secret of
the run. Every line carries a code that nobody else can compute, so a stranger can neither join nor change a message."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
LONGEST_LINE = 1 << 20
LONGEST_GREETING = 200
"""Bytes that a peer may send before it has proven anything."""
LEADER, AGENT = b"leader", b"agent"


class Link:
    """One end of a connection. Never blocks: `receive` returns what has arrived, `send` queues what cannot go out yet.

    role: of this end, `LEADER` or `AGENT`. `closed` is empty while the connection is open, then the reason.
    """

    def __init__(self, sock: socket.socket, secret: str, role: bytes):
        self._sock, self._secret = sock, secret.encode()
        self._role, self._peer_role = role, AGENT if role == LEADER else LEADER
        self._nonce = secrets.token_hex(16)
        self._key = b""
        self._received, self._unsent = b"", b""
        self._waiting: list[Message] = []
        self._counts = {role: 0, self._peer_role: 0}
        self.is_proven = False
        """Whether the peer has proven that it knows the secret."""
        self.closed = ""
        sock.setblocking(False)
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._write(f"{self._nonce}\n".encode())

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message) -> None:
        """Queue `message` and send as much as the network takes now."""
        if not self._key:
            self._waiting.append(message)
            return
        text = json.dumps(message).encode()
        self._write(self._code(self._role, text) + b" " + text + b"\n")

    def receive(self) -> list[Message]:
        """Return the messages that have arrived since the last call; sets `closed` at the end of the connection."""
        self._write(b"")
        ended = ""
        while not self.closed:
            try:
                data = self._sock.recv(65536)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                ended = error.strerror or str(error)
                break
            if not data:
                ended = "its connection was closed"
                break
            self._received += data
            if len(self._received) > (LONGEST_LINE if self.is_proven else LONGEST_GREETING):
                break
        messages = self._messages()
        limit = LONGEST_LINE if self.is_proven else LONGEST_GREETING
        if len(self._received) > limit:
            ended = "it sends what no agent sends"
        if ended:
            self.close(ended)
        return messages

    def close(self, reason: str) -> None:
        self.closed = self.closed or reason
        with suppress(OSError):
            self._sock.close()

    def _messages(self) -> list[Message]:
        messages: list[Message] = []
        while not self.closed and b"\n" in self._received:
            line, _, self._received = self._received.partition(b"\n")
            if not self._key:
                self._greet(line)
                continue
            code, _, text = line.partition(b" ")
            if not hmac.compare_digest(code, self._code(self._peer_role, text)):
                self.close("it does not know the secret of this run")
                break
            self.is_proven = True
            try:
                message = json.loads(text)
            except ValueError:
                self.close("it sends what no agent sends")
                break
            if isinstance(message, dict) and message:
                messages.append(message)
        return messages

    def _greet(self, line: bytes) -> None:
        """Make the key of this connection from the nonces of both ends, and prove it with an empty message."""
        own_nonce = self._nonce.encode()
        if len(line) != len(own_nonce):
            self.close("it sends what no agent sends")
            return
        nonces = own_nonce + line if self._role == LEADER else line + own_nonce
        self._key = hmac.digest(self._secret, b"dstune agents " + nonces, hashlib.sha256)
        waiting, self._waiting = self._waiting, []
        for message in ({}, *waiting):
            self.send(message)

    def _code(self, sender: bytes, text: bytes) -> bytes:
        self._counts[sender] += 1
        content = sender + b" %d " % self._counts[sender] + text
        return hmac.new(self._key, content, hashlib.sha256).hexdigest().encode()

    def _write(self, data: bytes) -> None:
        self._unsent += data
        while self._unsent and not self.closed:
            try:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self.close(error.strerror or str(error))


def connect(address: str, port: int, secret: str, seconds: float) -> Link:
    """Connect to the leader. Raises OSError."""
    return Link(socket.create_connection((address, port), timeout=seconds), secret, AGENT)
