"""A load client for the OpenAI API: one socket per request, every token timed, nothing but the standard library.

Times of a Record are seconds since the start of the run, on the client's monotonic clock.
"""

import asyncio
import dataclasses
import json
import time
import urllib.parse


@dataclasses.dataclass
class Record:
    kind: str
    due: float
    sent: float = 0.0
    status: int = 0  # 0: no answer
    first: float = 0.0  # first token; 0 = none came
    last: float = 0.0
    done: float = 0.0
    chunks: int = 0  # that carried text, or a token's id where `return_token_ids` asks for it
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    levels: list = dataclasses.field(default_factory=list)  # [{"position", "level"}]
    finish: str = ""
    error: str = ""
    retry_after: float = 0.0
    phase: str = ""

    @property
    def ok(self):
        return self.status == 200 and not self.error and self.finish != ""

    @property
    def refused(self):
        return self.status in (429, 503)

    @property
    def ttft(self):
        return self.first - self.due if self.first else None

    @property
    def tpot(self):
        return (self.last - self.first) / (self.completion_tokens - 1) if self.completion_tokens > 1 else None


class HttpError(Exception):
    """The answer was no HTTP/1.1 that this client understands, or it broke off."""


class Response:
    """The status line and headers are read; `lines` gives the body's lines as they come."""

    def __init__(self, reader):
        self.reader = reader
        self.status = 0
        self.headers = {}

    async def read_head(self):
        line = await self.reader.readline()
        parts = line.split(b" ", 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1."):
            raise HttpError("the connection was closed" if not line else f"no status line: {line[:80]!r}")
        self.status = int(parts[1])
        while (line := await self.reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()

    async def pieces(self):
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while True:
                size = int((await self.reader.readline()).split(b";")[0], 16)
                data = await self.reader.readexactly(size)
                await self.reader.readexactly(2)
                if size == 0:
                    return
                yield data
        elif "content-length" in self.headers:
            yield await self.reader.readexactly(int(self.headers["content-length"]))
        else:
            while data := await self.reader.read(1 << 16):
                yield data

    async def body(self):
        return b"".join([piece async for piece in self.pieces()])

    async def lines(self):
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line.rstrip(b"\r")


class Client:
    def __init__(self, base_url, key="", timeout=900.0):
        address = urllib.parse.urlsplit(base_url)
        if address.scheme != "http" or not address.hostname:
            raise SystemExit(f"client: '{base_url}' is not an http:// address")
        self.host, self.port = address.hostname, address.port or 80
        self.key = key
        self.timeout = timeout

    async def open(self, method, path, body=None, limit=1 << 20):
        """A connection with the request sent: (reader, writer)."""
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=limit)
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
        if self.key:
            head += f"Authorization: Bearer {self.key}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        writer.write(head.encode() + b"\r\n" + data)
        await writer.drain()
        return reader, writer

    async def request(self, method, path, body=None):
        """(status, headers, body) of a whole answer."""
        reader, writer = await self.open(method, path, body)
        try:
            response = Response(reader)
            await response.read_head()
            return response.status, response.headers, await response.body()
        finally:
            writer.close()

    async def json(self, path):
        status, _, body = await asyncio.wait_for(self.request("GET", path), 30)
        if status != 200:
            raise HttpError(f"GET {path}: {status} {body[:200].decode(errors='replace')}")
        return json.loads(body)

    async def stream(self, path, body, record, start):
        """Sends one streaming request and fills in the record; errors end up in it."""
        record.sent = time.monotonic() - start
        try:
            await asyncio.wait_for(self._stream(path, body, record, start), self.timeout)
        except (OSError, HttpError, ValueError, asyncio.IncompleteReadError) as error:
            record.error = record.error or f"{type(error).__name__}: {error}"
        except (asyncio.TimeoutError, TimeoutError):
            record.error = f"no end within {self.timeout:.0f} s"
        record.done = time.monotonic() - start
        return record

    async def _stream(self, path, body, record, start):
        reader, writer = await self.open("POST", path, body)
        try:
            response = Response(reader)
            await response.read_head()
            record.status = response.status
            if response.status != 200:
                record.retry_after = float(response.headers.get("retry-after", 0))
                text = (await response.body()).decode(errors="replace")
                record.error = error_message(text)
                return
            async for line in response.lines():
                if line == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    note_event(record, json.loads(line[6:]), time.monotonic() - start)
            record.error = record.error or "the stream ended without [DONE]"
        finally:
            writer.close()


def error_message(text):
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:200]


def note_event(record, event, now):
    if "error" in event:
        record.error = event["error"].get("message", "error event")
        return
    for choice in event.get("choices", []):
        if choice.get("delta", {}).get("content") or choice.get("text") or choice.get("token_ids"):
            record.first = record.first or now
            record.last = now
            record.chunks += 1
        if choice.get("finish_reason"):
            record.finish = choice["finish_reason"]
            # With text held back to the end, or none at all, the end is when the client knows.
            record.first = record.first or now
    if usage := event.get("usage"):
        record.prompt_tokens = usage["prompt_tokens"]
        record.completion_tokens = usage["completion_tokens"]
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        record.levels = (usage.get("dsla") or {}).get("levels", record.levels)


def chat_body(model, messages, max_tokens, tier="auto"):
    return {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "service_tier": tier,
    }


async def play(client, model, requests, messages_of, phase, start, tier="auto", salt="", on_done=None):
    """Sends each request when it is due, whatever became of the others; returns their records in order."""
    begin = time.monotonic() - start

    async def one(request):
        due = begin + request["at"]
        record = Record(kind=request["kind"], due=due, phase=phase)
        body = chat_body(model, messages_of(request), request["max_tokens"], tier)
        if salt:
            body["cache_salt"] = salt
        await asyncio.sleep(max(0.0, due - (time.monotonic() - start)))
        await client.stream("/v1/chat/completions", body, record, start)
        if on_done:
            on_done(record)
        return record

    return await asyncio.gather(*(one(request) for request in requests))


async def sample(client, start, into, period=0.5):
    """Appends what /v1/dsla says to `into` until cancelled; a sample that fails is left out."""
    while True:
        began = time.monotonic()
        try:
            state = await client.json("/v1/dsla")
            state["time"] = time.monotonic() - start
            into.append(state)
        except (OSError, HttpError, ValueError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            pass
        await asyncio.sleep(max(0.0, period - (time.monotonic() - began)))
