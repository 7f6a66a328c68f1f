"""A tracking server that can be killed and started again, and a road to it that can be spoilt."""

import contextlib
import math
import socket
import subprocess
import sys
import threading
import time

from tests.cluster import HOST, answers, wait
from tests.test_end_to_end import environment, free_port

INTERNAL_ERROR = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
    b"Content-Length: 47\r\nConnection: close\r\n\r\n"
    b'{"error_code":"INTERNAL_ERROR","message":"sick"}'
)


UNAUTHORIZED = (
    b"HTTP/1.1 401 Unauthorized\r\nContent-Type: text/html\r\n"
    b"Content-Length: 14\r\nConnection: close\r\n\r\n<p>Who is it?\n"
)
SPOILT = {"sick": INTERNAL_ERROR, "strange": UNAUTHORIZED}


class Server:
    """MLflow's, on an SQLite store in ``folder``; its address stays the same."""

    def __init__(self, folder):
        self.folder, self.port, self._process = folder, free_port(), None
        self.address = f"http://{HOST}:{self.port}"

    def start(self):
        with (self.folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "mlflow", "server", "--host", HOST,
                    "--port", str(self.port), "--workers", "1",
                    "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
                    "--artifacts-destination", str(self.folder / "artifacts"),
                ],
                cwd=self.folder,
                env=environment(self.folder, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip
        wait(lambda: answers(self.address))

    def kill(self):
        """As the power does."""
        if self._process:
            subprocess.run(["pkill", "-KILL", "-s", str(self._process.pid)], check=False)
            self._process.wait()
            self._process = None


class Road:
    """Passes connections on to ``port``, one request each, as ``mode`` says.

    ``open`` as they are; ``closed`` none; ``deaf`` loses every other answer, whose request has
    been carried out; ``sick`` answers 500, ``strange`` 401, as a proxy does that does not know us;
    ``slow`` waits ``delay_s`` before every request.
    """

    def __init__(self, port, delay_s=1.5):
        self.mode, self.delay_s, self.passed, self.lost = "open", delay_s, 0, 0
        self.open_for = math.inf  # so many requests; then it is closed
        self.heard = math.inf  # so many answers; then one is lost, and it is closed
        self._port = port
        self._listening = socket.create_server((HOST, 0))
        self.address = f"http://{HOST}:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self):
        self._listening.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listening.accept()
                threading.Thread(target=self._carry, args=(caller,), daemon=True).start()

    def _carry(self, caller):
        with caller, contextlib.suppress(OSError):
            mode = self.mode
            self.open_for -= mode == "open"
            if mode == "closed" or self.open_for < 0:
                return
            request = _message(caller)
            if mode in SPOILT:
                caller.sendall(SPOILT[mode])
                return
            if mode == "slow":
                time.sleep(self.delay_s)
            with socket.create_connection((HOST, self._port)) as server:
                server.sendall(request)
                answer = b"".join(iter(lambda: server.recv(65536), b""))
            self.passed += 1
            self.heard -= 1
            if self.heard < 0:
                self.mode = "closed"
            if self.heard < 0 or (mode == "deaf" and self.passed % 2):
                self.lost += 1
                return
            caller.sendall(answer)


def _message(connection):
    """One whole HTTP request, to be the last of its connection."""
    head = b""
    while b"\r\n\r\n" not in head and (more := connection.recv(65536)):
        head += more
    head, _, body = head.partition(b"\r\n\r\n")
    first, *fields = head.split(b"\r\n")
    names = {field.partition(b":")[0].lower(): field.partition(b":")[2].strip() for field in fields}
    if b"chunked" in names.get(b"transfer-encoding", b""):
        while not body.endswith(b"0\r\n\r\n") and (more := connection.recv(65536)):
            body += more
    while len(body) < int(names.get(b"content-length", 0)) and (more := connection.recv(65536)):
        body += more
    kept = [field for field in fields if not field.lower().startswith(b"connection:")]
    return b"\r\n".join([first, *kept, b"Connection: close"]) + b"\r\n\r\n" + body
