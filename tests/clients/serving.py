"""What the client tests share: a `dsla serve` on the default model, plain HTTP calls, and counted checks.

Each test is a script with --program; exit code 77 (skipped) where what it drives is not installed.
"""

import argparse
import contextlib
import http.client
import json
import pathlib
import re
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "bench/serving"))

import server  # noqa: E402

SKIPPED = 77
KEY, ADMIN_KEY = "clients-key", "clients-admin-key"

failures = []


def check(condition, what):
    print(f"{'ok  ' if condition else 'FAIL'}  {what}", flush=True)
    if not condition:
        failures.append(what)
    return condition


def finish():
    print(f"{len(failures)} failed" if failures else "all passed", flush=True)
    sys.exit(1 if failures else 0)


def skip(why):
    print(f"skipped: {why}", flush=True)
    sys.exit(SKIPPED)


def parse_arguments(description, **more):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--program", type=pathlib.Path, default=server.PROGRAM)
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()


@contextlib.contextmanager
def serving(program, *arguments):
    """A ready server with the API key KEY and the admin key ADMIN_KEY; its log's end is shown when a check failed."""
    with tempfile.TemporaryDirectory() as folder:
        keys = ["--api-key", KEY, "--admin-key", ADMIN_KEY]
        with server.Server([*keys, *arguments], f"{folder}/log", program) as running:
            yield running
            if failures:
                print(f"the server's log ends:\n{running.log_end(20)}", flush=True)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return met


def log_of_start(running):
    """The log up to the line that says `ready`, which a thread of its own writes behind the answers."""
    wait_for(lambda: re.search(r' ready |"event":"ready"', running.log.read_text()))
    return running.log.read_text()


class Reply:
    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """(status, code, param), or (status, None, None) where the body is no error."""
        try:
            error = self.json["error"]
            return self.status, error["code"], error["param"]
        except (ValueError, KeyError, TypeError):
            return self.status, None, None


def call(running, method, path, body=None, headers=None, timeout=120):
    """body: bytes or text as they are, anything else as JSON."""
    if body is not None and not isinstance(body, (bytes, str)):
        body = json.dumps(body)
    if isinstance(body, str):
        body = body.encode()
    sent = {"Authorization": f"Bearer {KEY}"}
    if body is not None:
        sent["Content-Type"] = "application/json"
    sent.update(headers or {})
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=timeout)
    try:
        connection.request(method, path, body, {name: value for name, value in sent.items() if value is not None})
        return Reply(connection.getresponse())
    finally:
        connection.close()


def completions(running, **fields):
    return call(running, "POST", "/v1/completions", fields)


def chat(running, content="Say hi.", **fields):
    return call(running, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})


def events(body):
    """The data of each event of a stream, the last one "[DONE]" where it ended well. Comments may stand between them."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == "", "a stream ends with an empty line"
    blocks = [block for block in blocks if not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks), "every event is one data line"
    return [block.removeprefix("data: ") for block in blocks]
