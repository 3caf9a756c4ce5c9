#!/usr/bin/env python3
"""Bad inputs and faults against the real server: each must get the stated answer, and a good request must work after all
of them. Standard library alone, and curl where it is installed."""

import json
import shutil
import socket
import subprocess
import threading
import time

from serving import KEY, call, chat, check, completions, events, finish, parse_arguments, serving

CONTEXT = 1024
LONG = CONTEXT - 10  # tokens of a reply
ARGUMENTS = [
    "--context", CONTEXT, "--memory", "64M", "--max-body", "1M", "--read-timeout", "2", "--max-queued", "4",
    "--max-running", "2",
]  # fmt: skip


def raw(running, data, timeout=20, wait=None):
    """What comes back for these bytes until the server closes."""
    with socket.create_connection(("127.0.0.1", running.port), timeout) as connection:
        connection.sendall(data)
        received = b""
        with_end = time.monotonic() + (wait or timeout)
        while time.monotonic() < with_end:
            try:
                part = connection.recv(1 << 16)
            except (TimeoutError, ConnectionResetError):
                break
            if not part:
                break
            received += part
        return received


def status_of(received):
    return int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/1.1 ") else None


def expect(running, body, code, param=None, path="/v1/completions", status=400, what=None):
    reply = call(running, "POST", path, body)
    shown = what or (body if isinstance(body, str) else json.dumps(body))
    check(reply.error == (status, code, param), f"{shown[:90]!r}: {reply.error}")
    return reply


def check_json(running):
    bodies = ["", "{", '{"prompt":"x"} x', "\ufeff{}", '{"temperature":NaN}', '{"temperature":Infinity}',
              b'{"prompt":"\xff"}', '{"prompt":"\\ud800"}', '{"prompt":"a","prompt":"b"}']  # fmt: skip
    for body in bodies:
        expect(running, body, "invalid_json", what=repr(body))
    deep = '{"prompt":"x","deep":' + "[" * 100000 + "]" * 100000 + "}"
    expect(running, deep, "json_too_deep", what="100000 brackets")
    keys = json.dumps({"prompt": "x", **{str(i): 0 for i in range(20000)}})
    expect(running, keys, "json_too_deep", what="20000 keys")


def check_transport(running):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    large = raw(running, f"{head}Content-Length: 2000000\r\n\r\n".encode())
    check(status_of(large) == 413 and b"request_too_large" in large, "a body too large by its length: 413")
    chunks = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    flood = raw(running, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks * 20)
    check(status_of(flood) in (413, None), f"a flood of chunks: {status_of(flood)}, or closed while it was sent")
    many = raw(running, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20000 + b"\r\n")
    check(status_of(many) in (431, None), f"20000 headers: {status_of(many)}")
    check(status_of(raw(running, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")) == 414, "a URI of 9000 bytes: 414")
    both = f"{head}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()
    for name, data in {
        "a negative chunk size": f"{head}Transfer-Encoding: chunked\r\n\r\n-2\r\n".encode(),
        "Content-Length and Transfer-Encoding": both,
        "a bad version": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        "nonsense": b"\x00\x01\x02\r\n\r\n",
    }.items():
        check(status_of(raw(running, data)) == 400, f"{name}: 400 and closed")
    started = time.monotonic()
    slow = raw(running, b"GET /health HTTP/1.1\r\nHost:")
    seconds = time.monotonic() - started
    check(status_of(slow) in (408, None) and 1 < seconds < 9, f"a head that never ends: {status_of(slow)} after {seconds:.1f} s")


def check_routes(running):
    reply = call(running, "POST", "/v1/completions", "x=1", {"Content-Type": "application/x-www-form-urlencoded"})
    check(reply.error[:2] == (415, "unsupported_media_type"), "a form: 415")
    check(call(running, "GET", "/v1/nothing").error[:2] == (404, "unknown_path"), "an unknown path: 404")
    reply = call(running, "GET", "/v1/completions")
    check(reply.status == 405 and "POST" in reply.headers["Allow"], "a wrong method: 405 with Allow")
    for value in (None, "Bearer nope", f"Basic {KEY}", f"Bearer {KEY.upper()}", "Bearer " + "x" * 10000):
        reply = call(running, "GET", "/v1/models", headers={"Authorization": value})
        check(reply.error[:2] == (401, "invalid_api_key"), f"Authorization {str(value)[:20]}: 401")
        check(bool(reply.headers["WWW-Authenticate"]), "with WWW-Authenticate")
    check(call(running, "GET", "/v1/models").headers["X-Request-Id"] is not None, "every answer has X-Request-Id")
    check(call(running, "HEAD", "/health", headers={"Authorization": None}).status == 200, "HEAD /health without a key")
    expect(running, {"model": "gpt-4", "prompt": "x"}, "model_not_found", "model", status=404)


def check_fields(running):
    def bad(code, param=None, **fields):
        expect(running, {"prompt": "x", **fields}, code, param)

    for value in ("5", True, 1.5, [5]):
        bad("invalid_type", "max_tokens", max_tokens=value)
    expect(running, '{"prompt":"x","max_tokens":1e999}', "decimal_out_of_range", "max_tokens")
    bad("integer_out_of_range", "max_tokens", max_tokens=2**64)
    bad("integer_below_min_value", "max_tokens", max_tokens=-1)
    bad("integer_above_max_value", "n", n=17)
    bad("integer_above_max_value", "best_of", best_of=17)
    bad("integer_above_max_value", "n", n=5)  # more than may wait
    bad("integer_above_max_value", "max_tokens", n=4, max_tokens=10**6)
    for name, value in {"temperature": -1, "top_p": 1.5, "min_p": 2, "presence_penalty": 3, "frequency_penalty": -3}.items():
        check(completions(running, prompt="x", **{name: value}).error[::2] == (400, name), f"{name} {value}: 400")
    bad("integer_below_min_value", "top_k", top_k=-2)
    bad("integer_out_of_range", "seed", seed=2**63)
    bad("integer_above_max_value", "logprobs", logprobs=21)
    bad("array_above_max_length", "stop", stop=["a"] * 17)
    bad("invalid_value", "stop", stop="")
    bad("string_above_max_length", "stop", stop="a" * 500000)
    bad("invalid_value", "logit_bias", logit_bias={"10000000": 1})
    bad("decimal_above_max_value", "logit_bias.5", logit_bias={"5": 101})
    for prompt, param in (("", "prompt"), ([], "prompt"), ([[]], "prompt[0]")):
        expect(running, {"prompt": prompt}, "invalid_value", param)
    expect(running, {"prompt": ["a", 5]}, "invalid_type", "prompt[1]")
    expect(running, {"prompt": [-1]}, "integer_below_min_value", "prompt[0]")
    expect(running, {"prompt": [10**8]}, "integer_above_max_value", "prompt[0]")
    for name in ("prompt_embeds", "guided_json", "allowed_token_ids"):
        bad("unsupported_parameter", name, **{name: "x"})
    bad("unsupported_parameter", "suffix", suffix="x")
    bad("invalid_value", "service_tier", service_tier="gold")
    bad("invalid_value", "stream_options", stream_options={"include_usage": True})
    reply = completions(running, prompt="x", max_tokens=1, some_new_field={"a": 1})
    check(reply.status == 200, "an unknown field is ignored")


def check_lengths(running):
    reply = expect(running, {"prompt": [1] * CONTEXT, "max_tokens": 1}, "context_length_exceeded", what="a prompt of the whole context")
    error = reply.json["error"]
    check(error.get("n_prompt_tokens") == CONTEXT and error.get("n_ctx") == CONTEXT, "with both counts")
    expect(running, {"prompt": "x", "max_tokens": CONTEXT}, "context_length_exceeded", what="a reply of the whole context")
    check(completions(running, prompt=[1] * (CONTEXT - 1), max_tokens=1).status == 200, "the context filled to the last token")


def check_chat(running):
    def bad(code, param, messages, **fields):
        expect(running, {"messages": messages, **fields}, code, param, path="/v1/chat/completions")

    good = [{"role": "user", "content": "x"}]
    bad("invalid_value", "messages", [])
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    bad("unsupported_feature", "messages[0].content[0].type", [{"role": "user", "content": image}])
    bad("missing_required_parameter", "messages[0].tool_call_id", [{"role": "tool", "content": "x"}])
    bad("invalid_value", "top_logprobs", good, top_logprobs=3)
    bad("missing_required_parameter", "tools[0].function", good, tools=[{"type": "function"}])
    tool = {"type": "function", "function": {"name": "f"}}
    bad("unsupported_parameter", "tools", good, tools=[tool])
    bad("unsupported_parameter", "functions", good, functions=[tool["function"]])
    bad("unsupported_parameter", "chat_template", good, chat_template="{{ 1 }}")
    bad("invalid_value", "response_format.type", good, response_format={"type": "xml"})
    for grammar in ("[a", "(" * 20000, "(a|b|[c-z]+){1,5000}x"):
        bad("invalid_grammar", "structured_outputs.regex", good, structured_outputs={"regex": grammar})
    # A token takes too long after some 85 letters, and no reply ends before 300.
    slow = "root ::= " + "a " * 300 + "\na ::= a a a | [a-z] | [a-z] [a-z]"
    bad("invalid_grammar", "grammar", good, grammar=slow)
    bad("invalid_grammar", "json_schema", good, json_schema={"type": "string", "not": {}})
    bad("invalid_grammar", "json_schema", good, json_schema={"enum": ["x" * 70000]})
    marker = {"messages": [{"role": "user", "content": "<|im_end|>"}]}
    tokens = call(running, "POST", "/tokenize", marker).json["tokens"]
    plain = call(running, "POST", "/tokenize", {"prompt": "<|im_end|>", "parse_special": True}).json["tokens"]
    empty = call(running, "POST", "/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json["tokens"]
    check(len(plain) == 1 and tokens.count(plain[0]) == empty.count(plain[0]), "a marker in a message is plain text")
    check(chat(running, "<|im_end|>", max_tokens=1).status == 200, "and it is served")


def running_now(running):
    state = call(running, "GET", "/v1/dsla").json
    return state["running"]["count"] + state["queue"]["requests"]


def wait_idle(running, seconds):
    deadline = time.monotonic() + seconds
    while running_now(running) > 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    return running_now(running) == 0


def generated(running):
    return call(running, "GET", "/v1/dsla").json["totals"]["generated_tokens"]


def long_request(stream, tokens=LONG):
    body = json.dumps({"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def check_faults(running):
    for stream in (True, False):
        before = generated(running)
        connection = socket.create_connection(("127.0.0.1", running.port), 20)
        connection.sendall(long_request(stream))
        deadline = time.monotonic() + 20
        while (runs := running_now(running)) == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        check(runs > 0, "a long request runs")
        connection.close()
        cancelled = wait_idle(running, 60) and generated(running) - before < LONG
        check(cancelled, f"the client leaves ({'stream' if stream else 'whole'}): cancelled")
    reply = completions(running, prompt="Once", max_tokens=900, ignore_eos=True, timeout=0.3)
    check(reply.error[:2] == (504, "timeout"), f"out of time before the first byte: {reply.error}")
    # Long after its first token on any machine, and before its end: of four replies two run at a time.
    reply = completions(running, prompt="Once", max_tokens=900, ignore_eos=True, n=4, timeout=4, stream=True)
    last = json.loads(events(reply.body)[-1])
    check(reply.status == 200 and last.get("error", {}).get("code") == "timeout", "out of time after it: an error event")


def check_queue(running):
    replies = []
    threads = [
        threading.Thread(target=lambda: replies.append(completions(running, prompt="Once", max_tokens=100, ignore_eos=True)))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [reply for reply in replies if reply.status == 429]
    check(len(refused) > 0 and all(reply.status in (200, 429) for reply in replies), f"{len(refused)} of 16 at once: 429, the others 200")
    for reply in refused[:1]:
        check(reply.error[1] == "queue_full", "its code")
        check(int(reply.headers["Retry-After"]) >= 1 and float(reply.headers["retry-after-ms"]) > 0, "it says when to come again")


def check_curl(running):
    if not shutil.which("curl"):
        print("note: curl is not installed")
        return
    command = ["curl", "-sS", "--max-time", "60", f"{running.url}/v1/chat/completions", "-H", f"Authorization: Bearer {KEY}",
               "-H", "Content-Type: application/json", "-d"]  # fmt: skip
    fields = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 4, "stream": True}
    streamed = subprocess.run([*command, json.dumps(fields)], capture_output=True).stdout
    check(events(streamed)[-1] == "[DONE]", "curl reads a stream")
    expected = subprocess.run([*command, json.dumps(fields), "-H", "Expect: 100-continue"], capture_output=True).stdout
    check(events(expected)[-1] == "[DONE]", "and with Expect: 100-continue")


def main():
    arguments = parse_arguments(__doc__)
    with serving(arguments.program, *ARGUMENTS) as running:
        for part in (check_json, check_transport, check_routes, check_fields, check_lengths, check_chat, check_faults,
                     check_queue, check_curl):  # fmt: skip
            print(f"-- {part.__name__}", flush=True)
            part(running)
        check(wait_idle(running, 10), "nothing is left running")
        check(chat(running, max_tokens=4).status == 200, "after all that a good request is served")
        connection = socket.create_connection(("127.0.0.1", running.port), 60)
        connection.sendall(long_request(True, 50))
        check(b"200 OK" in connection.recv(1 << 16), "a stream begins")
        stopped = []
        stopper = threading.Thread(target=lambda: stopped.append(running.terminate(60)))
        stopper.start()
        received = b""
        while part := connection.recv(1 << 16):
            received += part
        connection.close()
        stopper.join()
        check(b"[DONE]" in received, "SIGTERM: the stream under way ends well")
        check(stopped == [0], f"and the server's exit code is {stopped}")
    finish()


if __name__ == "__main__":
    main()
