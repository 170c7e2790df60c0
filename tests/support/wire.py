"""The way to a store over a bad network: a TCP proxy that cuts connections and answers that the store is busy."""

from __future__ import annotations

import contextlib
import socket
import threading


class Wire:
    """A TCP proxy in front of a server on loopback, which cuts connections and answers that it is overloaded.

    Attributes:
        faults: For each connection to come: how many bytes of answers pass before it is cut; -1: a 503; None: no fault.
        seen: Faults that happened.
        busy: The body of the 503, in the words of the store.
    """

    def __init__(self, server_port: int, busy: bytes = b"") -> None:
        self.server_port = server_port
        self.busy = busy
        self.faults: list[int | None] = []
        self.seen = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                fault = self.faults.pop(0) if self.faults else None
                threading.Thread(target=self._connect, args=(client, fault), daemon=True).start()

    def _connect(self, client: socket.socket, fault: int | None) -> None:
        if fault == -1:
            self.seen += 1
            client.recv(1 << 16)
            head = f"HTTP/1.1 503 Slow Down\r\nContent-Length: {len(self.busy)}\r\nConnection: close\r\n\r\n"
            client.sendall(head.encode() + self.busy)
            client.close()
            return
        server = socket.create_connection(("127.0.0.1", self.server_port))
        threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
        self._pump(server, client, fault)

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                if limit is not None and passed + len(data) > limit:
                    self.seen += 1
                    sink.sendall(data[: limit - passed])
                    break
                sink.sendall(data)
                passed += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread of the other direction
            end.close()

    def close(self) -> None:
        self.listener.close()
