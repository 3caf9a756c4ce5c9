"""Starts `dsla serve` on a free port of this machine, waits until it is ready, and stops it."""

import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PROGRAM = ROOT / "build/release/dsla"


def reserve_port():
    """A bound socket whose port the system gives to nobody who asks for a free one; who names it may still listen on it, as
    this socket does not and both allow addresses to be used again."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


class Server:
    """`arguments`: of `dsla serve`, besides the address. SystemExit with the log's end when it does not start."""

    def __init__(self, arguments, log, program=PROGRAM, start_timeout=600):
        if not os.access(program, os.X_OK):
            raise SystemExit(f"{program} is not there: run ./quickstart --no-run first")
        self.reserved = reserve_port()
        self.port = self.reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = pathlib.Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.command = [str(program), "serve", "--host", "127.0.0.1", "--port", str(self.port), *map(str, arguments)]
        self.start_timeout = start_timeout
        self.process = None

    def __enter__(self):
        with open(self.log, "wb") as log:
            # Measured now, unless its arguments say otherwise: no figure is to hang on what an earlier start kept.
            environment = {"DSLA_CALIBRATION": "measure", **os.environ}
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def pid(self):
        return self.process.pid

    def _wait_ready(self):
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SystemExit(f"dsla serve ended with exit code {self.process.returncode}:\n{self.log_end()}")
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as reply:
                    if reply.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass  # not listening yet, or 503 while it loads
            time.sleep(0.1)
        raise SystemExit(f"dsla serve was not ready after {self.start_timeout} s:\n{self.log_end()}")

    def log_end(self, lines=15):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def terminate(self, timeout=60):
        """SIGTERM, then its exit code; None if it is still there after the timeout."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self):
        if self.process and self.process.poll() is None and self.terminate(20) is None:
            self.process.kill()
            self.process.wait()
        self.reserved.close()
