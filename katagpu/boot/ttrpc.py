"""A client of ttRPC, gRPC's small sibling that Kata's agent speaks (containerd/ttrpc, PROTOCOL.md).

A frame is a header of 10 bytes (length, stream, type, flags; big-endian) and a protobuf message:
`Request` and `Response` of its request.proto. Unary calls only.
"""

from __future__ import annotations

import socket
import struct
import time

from katagpu.boot import protobuf
from katagpu.errors import StepError, TookTooLong

_HEADER = struct.Struct(">IIBB")
_REQUEST, _RESPONSE = 1, 2
LARGEST = 4 << 20  # bytes of one message, "any larger size should be rejected"

# google.rpc.Code
CODES = ("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
         "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
         "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
         "UNAUTHENTICATED")


class CallFailed(StepError):
    """The server answered a call with an error; `code` is a google.rpc.Code."""

    def __init__(self, method: str, code: int, said: str) -> None:
        self.code = code
        name = CODES[code] if code < len(CODES) else f"code {code}"
        super().__init__(f"{method}: {name}: {said}" if said else f"{method}: {name}")


class Client:
    """Calls over a connected stream socket, one at a time. The socket stays the caller's."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = -1
        self._unread = bytearray()

    def call(self, service: str, method: str, payload: bytes, *, timeout: float) -> bytes:
        """The answer's message.

        Raises `CallFailed` on an error of the server, `TookTooLong` after `timeout` seconds (the
        next call may still be answered), `StepError` when the connection ends or is no ttRPC.
        """
        name = f"{service}/{method}"
        deadline = time.monotonic() + timeout
        self._stream += 2  # a client's are odd
        request = protobuf.encode({
            1: service, 2: method, 3: payload, 4: int(timeout * 1e9)})
        if len(request) > LARGEST:
            raise StepError(f"{name}: a request of {len(request)} bytes is too large for ttRPC")
        try:
            self._connection.settimeout(timeout)
            self._connection.sendall(
                _HEADER.pack(len(request), self._stream, _REQUEST, 0) + request)
            while True:
                stream, kind, data = self._frame(deadline)
                # Others answer a call that was given up, or are of a newer protocol.
                if stream == self._stream and kind == _RESPONSE:
                    break
        except TimeoutError:
            raise TookTooLong(f"{name}: no answer within {timeout:.0f} s") from None
        except (EOFError, OSError) as failure:
            raise StepError(f"{name}: the connection broke: {failure}") from None
        fields = protobuf.decode(data)
        status = protobuf.message(fields, 1)
        code = protobuf.integer(status, 1)
        if code:
            raise CallFailed(name, code, protobuf.text(status, 2))
        return protobuf.raw(fields, 2)

    def _frame(self, deadline: float) -> tuple[int, int, bytes]:
        """Stream, type and data of the next frame; what has come of one stays when time is up."""
        self._fill(_HEADER.size, deadline)
        length, stream, kind, _flags = _HEADER.unpack_from(self._unread)
        if length > LARGEST:
            raise StepError(f"no ttRPC: a frame of {length} bytes")
        self._fill(_HEADER.size + length, deadline)
        data = bytes(self._unread[_HEADER.size:_HEADER.size + length])
        del self._unread[:_HEADER.size + length]
        return stream, kind, data

    def _fill(self, count: int, deadline: float) -> None:
        while len(self._unread) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._connection.settimeout(left)
            data = self._connection.recv(65536)
            if not data:
                raise EOFError("the server closed it")
            self._unread += data
