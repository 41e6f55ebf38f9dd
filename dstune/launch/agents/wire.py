"""Messages between agents: one JSON object per line, over a TCP connection. Both ends prove that they know the secret of the
run, and every line carries an authentication code (HMAC), so a stranger can neither join nor alter a message."""

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
MALFORMED = "it sent something that is not a message of an agent"


class Link:
    """One end of a connection. It never blocks: `receive` returns what has arrived, `send` queues what cannot go out yet.

    role: `LEADER` or `AGENT`, the role of this end. `closed` is empty while the connection is open, then holds the reason.
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

    @property
    def has_unsent(self) -> bool:
        """Whether the network has not taken all of what was sent."""
        return bool(self._unsent)

    def send(self, message: Message) -> None:
        """Queue `message` and send as much as the network takes now."""
        if not self._key:
            self._waiting.append(message)
            return
        text = json.dumps(message).encode()
        self._write(self._authentication_code(self._role, text) + b" " + text + b"\n")

    def receive(self) -> list[Message]:
        """Return the messages that have arrived since the last call; set `closed` once the connection has ended."""
        self._write(b"")
        end_reason = ""
        while not self.closed:
            try:
                data = self._sock.recv(65536)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                end_reason = error.strerror or str(error)
                break
            if not data:
                end_reason = "its connection was closed"
                break
            self._received += data
            if len(self._received) > (LONGEST_LINE if self.is_proven else LONGEST_GREETING):
                break
        messages = self._parse_lines()
        limit = LONGEST_LINE if self.is_proven else LONGEST_GREETING
        if len(self._received) > limit:
            end_reason = MALFORMED
        if end_reason:
            self.close(end_reason)
        return messages

    def close(self, reason: str) -> None:
        self.closed = self.closed or reason
        with suppress(OSError):
            self._sock.close()

    def _parse_lines(self) -> list[Message]:
        """Take the complete lines from what was received; return their messages."""
        messages: list[Message] = []
        while not self.closed and b"\n" in self._received:
            line, _, self._received = self._received.partition(b"\n")
            if not self._key:
                self._greet(line)
                continue
            code, _, text = line.partition(b" ")
            if not hmac.compare_digest(code, self._authentication_code(self._peer_role, text)):
                self.close("it does not know the secret of this run")
                break
            self.is_proven = True
            try:
                message = json.loads(text)
            except ValueError:
                self.close(MALFORMED)
                break
            if isinstance(message, dict) and message:
                messages.append(message)
        return messages

    def _greet(self, line: bytes) -> None:
        """Derive the key of this connection from the nonces of both ends, and send an empty message to prove the key."""
        own_nonce = self._nonce.encode()
        if len(line) != len(own_nonce):
            self.close(MALFORMED)
            return
        nonces = own_nonce + line if self._role == LEADER else line + own_nonce
        self._key = hmac.digest(self._secret, b"dstune agents " + nonces, hashlib.sha256)
        waiting, self._waiting = self._waiting, []
        for message in ({}, *waiting):
            self.send(message)

    def _authentication_code(self, sender: bytes, text: bytes) -> bytes:
        """Return the code of the next message of `sender`. Messages are counted, so that none can be repeated or dropped."""
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
