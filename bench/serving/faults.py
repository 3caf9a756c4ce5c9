"""What a server meets besides good requests: bad ones with the answer each must get, clients that leave, read slowly or
say nothing. Every function returns "" or one line that says what went wrong."""

import asyncio
import json
import socket

import client as load_client

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat(**fields):
    return json.dumps({"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4, **fields}).encode()


def completion(**fields):
    return json.dumps({"prompt": "Hello", "max_tokens": 4, **fields}).encode()


# (name, method, path, body, statuses that are right)
BAD_REQUESTS = (
    ("not JSON", "POST", CHAT, b"{", {400}),
    ("trailing bytes", "POST", CHAT, chat() + b"x", {400}),
    ("not UTF-8", "POST", COMPLETIONS, b'{"prompt":"\xff\xfe"}', {400}),
    ("lone surrogate", "POST", COMPLETIONS, b'{"prompt":"\\ud800"}', {400}),
    ("deep nesting", "POST", CHAT, b"[" * 100000 + b"]" * 100000, {400}),
    ("no messages", "POST", CHAT, b'{"messages":[]}', {400}),
    ("image", "POST", CHAT, b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}', {400}),
    ("unknown model", "POST", CHAT, chat(model="no-such-model"), {404}),
    ("number as text", "POST", COMPLETIONS, completion(max_tokens="5"), {400}),
    ("negative count", "POST", COMPLETIONS, completion(max_tokens=-1), {400}),
    ("large number", "POST", COMPLETIONS, b'{"prompt":"a","max_tokens":1e999}', {400}),
    ("temperature", "POST", COMPLETIONS, completion(temperature=-3), {400}),
    ("too many replies", "POST", COMPLETIONS, completion(n=100000), {400}),
    ("empty prompt", "POST", COMPLETIONS, completion(prompt=""), {400}),
    ("empty lists", "POST", COMPLETIONS, completion(prompt=[[]]), {400}),
    ("unknown token", "POST", COMPLETIONS, completion(prompt=[1 << 30]), {400}),
    ("too long", "POST", COMPLETIONS, completion(prompt="word " * 20000), {400}),
    ("empty stop", "POST", COMPLETIONS, completion(stop=[""]), {400}),
    ("unknown tier", "POST", CHAT, chat(service_tier="gold"), {400}),
    ("unknown level", "POST", CHAT, chat(dsla={"level": 100000}), {400}),
    ("tools", "POST", CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), {400}),
    ("unknown path", "GET", "/v1/nothing", None, {404}),
    ("wrong method", "DELETE", CHAT, None, {405}),
)

# (name, bytes sent, statuses that are right; 0: the connection is closed without an answer)
BAD_BYTES = (
    ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {0, 400}),
    ("large header", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Large: " + b"a" * 100000 + b"\r\n\r\n", {0, 431}),
    ("long address", b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {0, 414, 431}),
    (
        "two lengths",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        {0, 400},
    ),
    (
        "negative chunk",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\nab\r\n",
        {0, 400},
    ),
    (
        "endless body",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n",
        {0, 413},
    ),
    ("wrong type", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}", {415}),
)

GONE = (OSError, load_client.HttpError, asyncio.IncompleteReadError, ValueError)


async def bad_request(client, rng):
    name, method, path, body, right = rng.choice(BAD_REQUESTS)
    try:
        status, _, answer = await client.request(method, path, body)
    except GONE as error:
        return f"bad request '{name}': no answer ({error})"
    if status not in right:
        return f"bad request '{name}': {status} instead of {sorted(right)}: {answer[:120]!r}"
    if "message" not in json.loads(answer).get("error", {}):
        return f"bad request '{name}': {status} without an error object"
    return ""


async def bad_bytes(client, rng):
    name, data, right = rng.choice(BAD_BYTES)
    reader, writer = await asyncio.open_connection(client.host, client.port)
    status = 0
    try:
        writer.write(data)
        await writer.drain()
        response = load_client.Response(reader)
        await response.read_head()
        status = response.status
    except GONE:
        pass  # closed, perhaps while it was still being sent to
    finally:
        writer.close()
    return "" if status in right else f"bad bytes '{name}': {status} instead of {sorted(right)}"


async def leave(client, rng, model, text):
    """A client that goes away: in the middle of its request, while its prompt is read, or in the middle of the reply."""
    body = load_client.chat_body(model, [{"role": "user", "content": text}], 200)
    data = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {client.host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection(client.host, client.port)
    kind = rng.randrange(3)
    try:
        writer.write(head + (data[: len(data) // 2] if kind == 0 else data))
        await writer.drain()
        if kind == 1:
            await asyncio.sleep(rng.uniform(0, 1))
        elif kind == 2:
            for _ in range(rng.randrange(1, 8)):
                if not await asyncio.wait_for(reader.readline(), 120):
                    break
    except (OSError, asyncio.TimeoutError):
        pass
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()  # RST instead of FIN
        writer.close()
    return ""


async def slow_reader(client, rng, model):
    """Takes a few bytes at a time, with the smallest receive buffer; then goes."""
    body = load_client.chat_body(model, [{"role": "user", "content": "Count from one to a thousand."}], 400)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(raw, (client.host, client.port))
        data = json.dumps(body).encode()
        await loop.sock_sendall(
            raw,
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data,
        )
        for _ in range(rng.randrange(5, 30)):
            if not await asyncio.wait_for(loop.sock_recv(raw, 64), 120):
                break
            await asyncio.sleep(0.2)
    except (OSError, asyncio.TimeoutError):
        pass  # the server may give up on it
    finally:
        raw.close()
    return ""


async def say_nothing(client, rng):
    """Connects, perhaps sends half a request line, and waits."""
    _, writer = await asyncio.open_connection(client.host, client.port)
    try:
        if rng.random() < 0.5:
            writer.write(b"GET /hea")
            await writer.drain()
        await asyncio.sleep(rng.uniform(0.5, 4))
    except OSError:
        pass
    finally:
        writer.close()
    return ""
