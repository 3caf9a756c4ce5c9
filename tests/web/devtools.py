"""A headless Chromium driven through its DevTools protocol, with the standard library alone.

Browser starts Chromium with a profile of its own and ends it; Page is one tab. Only what the tests here need: one
thread, text frames, calls that wait for their answer.
"""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class DevToolsError(Exception):
    pass


def find_chromium():
    """The program named by DSLA_CHROMIUM, else the first known one on the path, else None."""
    named = os.environ.get("DSLA_CHROMIUM")
    if named:
        return named if os.access(named, os.X_OK) else None
    return next((found for found in map(shutil.which, NAMES) if found), None)


class WebSocket:
    """RFC 6455, the client's side: masked text frames out, text messages in."""

    def __init__(self, url, timeout):
        address, _, path = url.removeprefix("ws://").partition("/")
        host, _, port = address.partition(":")
        self.socket = socket.create_connection((host, int(port)), timeout)
        self.buffer = b""
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET /{path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self.buffer:
            self._receive()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise DevToolsError(f"no WebSocket at {url}: {head.splitlines()[0].decode()}")

    def _receive(self):
        data = self.socket.recv(1 << 16)
        if not data:
            raise DevToolsError("the browser closed the connection")
        self.buffer += data

    def _take(self, size):
        while len(self.buffer) < size:
            self._receive()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def send(self, text, opcode=1):
        data = text if isinstance(text, bytes) else text.encode()
        if len(data) < 126:
            head = struct.pack("!BB", 0x80 | opcode, 0x80 | len(data))
        elif len(data) < 1 << 16:
            head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, len(data))
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, len(data))
        mask = os.urandom(4)
        self.socket.sendall(head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))

    def receive(self, timeout):
        """The next text message; TimeoutError when none comes in time."""
        self.socket.settimeout(timeout)
        message = b""
        while True:
            first, second = self._take(2)
            size = second & 0x7F
            if size == 126:
                (size,) = struct.unpack("!H", self._take(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", self._take(8))
            data = self._take(size)
            opcode = first & 0x0F
            if opcode == 8:
                raise DevToolsError("the browser closed the connection")
            if opcode == 9:
                self.send(data, opcode=10)
            if opcode in (0, 1):
                message += data
                if first & 0x80:
                    return message.decode()

    def close(self):
        self.socket.close()


class Page:
    """One tab. `errors`: uncaught exceptions, console errors and failed loads, as they happened."""

    def __init__(self, url, timeout):
        self.timeout = timeout
        self.errors = []
        self.received = {}  # url: bytes as sent by the server
        self.next_id = 0
        self.urls = {}
        self.socket = WebSocket(url, timeout)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.next_id += 1
        self.socket.send(json.dumps({"id": self.next_id, "method": method, "params": params}))
        deadline = time.monotonic() + self.timeout
        while True:
            message = json.loads(self.socket.receive(max(0.01, deadline - time.monotonic())))
            if message.get("id") == self.next_id:
                if "error" in message:
                    raise DevToolsError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message)

    def _note(self, message):
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['text']} ({params['entry'].get('url', '')})")
            case "Network.requestWillBeSent":
                self.urls[params["requestId"]] = params["request"]["url"]
            case "Network.loadingFinished" if params["requestId"] in self.urls:
                self.received[self.urls[params["requestId"]]] = int(params["encodedDataLength"])

    def open(self, url):
        result = self.call("Page.navigate", url=url)
        if result.get("errorText"):
            raise DevToolsError(f"{url}: {result['errorText']}")
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression):
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise DevToolsError(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return result["result"].get("value")

    def wait(self, condition, timeout=None):
        """Until a JavaScript expression is true; DevToolsError names it when it never becomes so."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise DevToolsError(f"never became true: {condition}")
            time.sleep(0.05)

    def key(self, key, text=""):
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **extra)


class Browser:
    def __init__(self, program=None, timeout=30):
        self.program = program or find_chromium()
        self.timeout = timeout
        if not self.program:
            raise DevToolsError("no Chromium")

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(prefix="dsla-web-", ignore_cleanup_errors=True)
        # Its sandbox needs privileges that containers lack; the only page it opens is ours.
        self.process = subprocess.Popen(
            [
                self.program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--no-first-run", "--disable-extensions", "--disable-background-networking",
                "--disable-component-update", "--remote-debugging-port=0", f"--user-data-dir={self.profile.name}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self.port = self._port()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _port(self):
        # Chromium writes the port it chose to this file of its profile.
        path = os.path.join(self.profile.name, "DevToolsActivePort")
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise DevToolsError(f"{self.program} ended with exit code {self.process.returncode}")
            if os.path.exists(path):
                with open(path) as file:
                    first = file.readline().strip()
                if first:
                    return int(first)
            time.sleep(0.05)
        raise DevToolsError(f"{self.program} did not open its DevTools port within {self.timeout} s")

    def page(self):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            return Page(json.load(reply)["webSocketDebuggerUrl"], self.timeout)

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.profile.cleanup()
