#!/usr/bin/env python3
"""`dsla serve` as a process, on a small random model: signals, exit codes, too few descriptors, a full disk, a full cache.
Standard library alone."""

import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock

from serving import KEY, call, chat, check, completions, events, finish, log_of_start, parse_arguments, serving, server, wait_for

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "load"))

import small_model  # noqa: E402

ONE = ["--threads", "1"]  # the model is too small for more
LEAST_MEMORY = small_model.LAYERS * 64 * 2 * small_model.KV_HEADS * small_model.D * 2  # bf16 K and V of a page of 64 tokens in every layer
DESCRIPTORS = 64  # of the server that runs out of them


def refused(program, model, arguments, words, environment=None):
    """The program must end with exit code 2 and one last line on standard error that has all of `words`."""
    command = [program, "serve", "--model", model, *([] if "--port" in arguments else ["--port", "0"]), *arguments]
    shown = " ".join(map(str, arguments)) or environment
    try:
        # Without a network a name's resolver would wait for longer.
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60,
                                env={**os.environ, "RES_OPTIONS": "timeout:1 attempts:1", **(environment or {})})  # fmt: skip
    except subprocess.TimeoutExpired:
        return check(False, f"{shown}: serves")
    lines = result.stderr.strip().splitlines() or [""]
    good = result.returncode == 2 and lines[-1].startswith("dsla: ") and all(word in lines[-1] for word in words)
    return check(good, f"{shown}: {result.returncode}, {lines[-1]!r}")


def check_refusals(program, folder, model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(program, model, ["--port", port], [f"127.0.0.1:{port}"])
    refused(program, model, ["--host", "203.0.113.7"], ["203.0.113.7"])
    refused(program, model, ["--host", "no-such-host.invalid"], ["--host", "no-such-host.invalid"])
    refused(program, model, ["--host", ""], ["--host", "empty"])
    refused(program, model, [], ["--host", "empty"], {"DSLA_HOST": ""})
    for origin in ("example.org", "https://example.org/", "https://"):
        refused(program, model, ["--cors-origin", origin], ["--cors-origin", f"'{origin}'"])
    config = folder / "config.toml"
    for text, words in {
        "max-runing = 3\n": ["max-runing", "max-running"],
        "max-running = 'many'\n": ["max-running"],
        "max-running = \n": ["config.toml"],
    }.items():
        config.write_text(text)
        refused(program, model, ["--config", config], words)
    refused(program, model, ["--config", folder / "none.toml"], ["none.toml"])
    refused(program, model, ["--config", folder], ["--config", str(folder), "directory"])
    refused(program, model, [], ["DSLA_MAX_RUNING"], {"DSLA_MAX_RUNING": "3"})
    refused(program, model, ["--max-body", "1M", "--max-body-total", "1K"], ["--max-body-total"])
    refused(program, model, ["--tls-cert", "x.pem"], ["--tls-key"])
    refused(program, model, ["--api-key-file", folder / "none"], ["none"])
    refused(program, model, ["--log-file", folder / "none" / "log"], ["log"])
    refused(program, model, ["--max-level", "3"], ["--max-level", "no adapter"])
    refused(program, model, ["--default-tier", "economy"], ["--default-tier", "needs an adapter"])
    refused(program, model, ["--level", "3"], ["--level: 3", "--policy fixed"])
    refused(program, model, ["--policy", "fixed", "--level", "3"], ["--level: 3", "no adapter"])
    refused(program, model, ["--model-name", ""], ["--model-name"])
    refused(program, model, ["--temperature", "-1"], ["temperature"])
    refused(program, folder / "none", ["--chat-template", "nope"], ["'nope'"])
    refused(program, model, ["--memory", "lots"], ["--memory: 'lots'"])
    refused(program, model, ["--memory", "1K"], ["--memory", "1K", str(LEAST_MEMORY)])
    refused(program, model, ["--memory", LEAST_MEMORY - 1], ["--memory", str(LEAST_MEMORY)])
    refused(program, folder / "nothing", [], ["nothing"])
    broken = folder / "broken"
    small_model.write(broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    for name, data in {"truncated": whole[: len(whole) // 2], "of a huge header": b"\xff" * 8 + whole[8:], "empty": b""}.items():
        weights.write_bytes(data)
        refused(program, broken, [], ["model.safetensors"])
        print(f"      (weights {name})", flush=True)


def check_before_measuring(program, folder):
    """What is wrong is said before the seconds in which the default model's levels are measured."""
    for arguments, words in {
        ("--policy", "fixed", "--level", "31"): "--level: 31 is above the highest level",
        ("--max-batch-tokens", "1"): "max_batch_tokens 1",
        ("--snapshot-stride", "100"): "snapshot_stride 100",
        ("--cost-model", folder / "none" / "cost.json"): "--cost-model: cannot write",
    }.items():
        command = [program, "serve", "--port", "0", *arguments]
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
        last = result.stderr.strip().splitlines()[-1]
        check(result.returncode == 2 and words in last, f"{' '.join(map(str, arguments))}: {result.returncode}, {last!r}")
        check(" calibrated " not in result.stderr, "before anything is measured")


def long_request(running, tokens=14000, replies=8, stream=True):
    """A connection with a request that takes seconds."""
    connection = socket.create_connection(("127.0.0.1", running.port), 60)
    connection.sendall(request_bytes(prompt="Once", max_tokens=tokens, n=replies, ignore_eos=True, stream=stream))
    return connection


def request_bytes(**fields):
    body = json.dumps(fields)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def long_stream(running):
    """A connection on which a reply of seconds has begun."""
    connection = long_request(running)
    check(b"200 OK" in connection.recv(1 << 12), "a long stream begins")
    return connection


def read_all(connection):
    """In a thread, so that the server never waits for it; the result is the list's one entry once the server has closed."""
    result = []

    def read():
        data = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(1 << 16):
                data += part
        result.append(data)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread, result


def check_second_signal(program, model):
    with serving(program, "--model", model, *ONE, "--drain-timeout", 60) as running:
        reader, _ = read_all(long_stream(running))
        running.process.send_signal(signal.SIGTERM)
        check(wait_for(lambda: call(running, "GET", "/ready").status == 503), "SIGTERM: /ready says 503")
        check(call(running, "GET", "/live").status == 200, "and /live 200: no restart is wanted")
        reply = completions(running, prompt="x", max_tokens=1)
        check(reply.error[:2] == (503, "shutting_down"), f"a new request is refused: {reply.error}")
        check(reply.headers["Retry-After"] is not None, "with Retry-After")
        check(running.process.poll() is None, "what runs goes on")
        running.process.send_signal(signal.SIGTERM)
        code = running.process.wait(40)
        check(code == 1, f"a second SIGTERM ends it before its drain limit, exit code {code}")
        reader.join(20)


def check_drain_limit(program, model):
    with serving(program, "--model", model, *ONE, "--drain-timeout", "0.3") as running:
        reader, received = read_all(long_stream(running))
        whole_reader, whole = read_all(long_request(running, replies=1, stream=False))
        check(wait_for(lambda: call(running, "GET", "/v1/dsla").json["running"]["count"] == 9), "and a long reply without a stream")
        started = time.monotonic()
        code = running.terminate(30)
        seconds = time.monotonic() - started
        check(code == 0 and 0.2 < seconds, f"SIGTERM with a drain limit of 0.3 s: exit code {code} after {seconds:.1f} s")
        reader.join(20)
        whole_reader.join(20)
        end = received[0][-300:] if received else b""
        check(b'"code":"shutting_down"' in end and end.endswith(b"\r\n0\r\n\r\n"), f"the stream ends with an error event: {end}")
        head, _, body = whole[0].partition(b"\r\n\r\n") if whole else (b"", b"", b"")
        check(b" 503 " in head[:16] and b"shutting_down" in body, f"the other gets 503: {head[:40]} {body}")
        check("drain_timeout" in running.log_end(20), "and the log says so")
    with serving(program, "--model", model, *ONE) as running:
        head, _, body = request_bytes(prompt="x", max_tokens=1).partition(b"\r\n\r\n")
        upload = socket.create_connection(("127.0.0.1", running.port), 60)
        upload.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        check(b"100 Continue" in upload.recv(1 << 12), "a body is asked for")
        upload.sendall(body[:-5])
        running.process.send_signal(signal.SIGTERM)
        check(wait_for(lambda: call(running, "GET", "/ready").status == 503), "SIGTERM while a body is being sent")
        upload.sendall(body[-5:])
        answer = upload.recv(1 << 12)
        check(b" 503 " in answer[:16], f"gives it a status: {answer[:40]}")
        check(running.process.wait(20) == 0, "and then ends the program, exit code 0")
    with serving(program, "--model", model, *ONE) as running:
        check(running.terminate(20) == 0, "SIGTERM with nothing to do: exit code 0")
    with serving(program, "--model", model, *ONE) as running:
        running.process.send_signal(signal.SIGINT)
        check(running.process.wait(20) == 0, "Control-C too")


def with_context(folder, tokens):
    """A small model whose config.json allows so many."""
    small_model.write(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": tokens}))
    return folder


def check_long_step(program, folder):
    """A prompt in one step of many seconds, which no cancel ends."""
    model, tokens = with_context(folder / "long", 65536), 65000
    options = ["--max-batch-tokens", tokens, "--memory", "256M", "--drain-timeout", "0.3"]
    with serving(program, "--model", model, *ONE, *options) as running:
        connection = socket.create_connection(("127.0.0.1", running.port), 60)
        connection.sendall(request_bytes(prompt=[5] * tokens, max_tokens=1))
        reader, _ = read_all(connection)
        check(wait_for(lambda: call(running, "GET", "/v1/dsla").json["running"]["count"] == 1), "a long step")
        code = running.terminate(60)
        check(code == 1, f"is not waited for after SIGTERM: exit code {code}")
        check("stopped_in_a_step" in running.log_end(20), "and the log says so")
        reader.join(20)


def check_no_memory(program, folder):
    """Addresses for all but the tables of a context that long."""
    model = with_context(folder / "large", 200_000_000)
    command = ["sh", "-c", 'ulimit -v 6000000; exec "$@"', "sh", program, "serve", "--model", model, *ONE, "--port", "0"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    line = (result.stderr.strip().splitlines() or [""])[-1]
    check(result.returncode == 2 and line.startswith("dsla: out of memory"), f"too little memory to load: {result.returncode}, {line!r}")


def check_hangup_and_pipe(program, folder, model):
    log = folder / "serve.log"
    with serving(program, "--model", model, *ONE, "--log-file", log) as running:
        check(wait_for(lambda: "ready" in log.read_text()), "the log goes to its file")
        rotated = folder / "serve.log.1"
        log.rename(rotated)
        running.process.send_signal(signal.SIGHUP)
        check(wait_for(lambda: log.exists() and "log_reopened" in log.read_text()), "SIGHUP: the log's name is opened again")
        running.process.send_signal(signal.SIGPIPE)
        check(completions(running, prompt="x", max_tokens=2).status == 200, "SIGPIPE: nothing happens")
        check(wait_for(lambda: "/v1/completions" in log.read_text()), "requests are logged in the new file")
        check("/v1/completions" not in rotated.read_text(), "and not in the old one")


def check_start(program, model):
    """What the log says at the start of options that cannot be met and of variables that are not meant."""
    service = {"DSLA_PORT": "tcp://10.0.0.1:8080", "DSLA_SERVICE_HOST": "10.0.0.1", "DSLA_PORT_8080_TCP_ADDR": "10.0.0.1"}
    with unittest.mock.patch.dict(os.environ, service):
        with serving(program, "--model", model, *ONE, "--max-running", 500, "--max-batch-tokens", 128, "--log-format", "json") as running:
            check(call(running, "GET", "/ready").status == 200, "beside a Service named dsla in Kubernetes: serves")
            lines = [json.loads(line) for line in log_of_start(running).splitlines()]
    found = {line["event"]: line for line in lines}
    ignored, lowered = found.get("variable_ignored", {}), found.get("max_running_lowered", {})
    check(ignored.get("name") == "DSLA_PORT", f"and says that DSLA_PORT is not its port: {ignored}")
    check((lowered.get("level"), lowered.get("asked"), lowered.get("used")) == ("warning", 500, 64), f"--max-running 500 in steps of 128: {lowered}")


def check_address(program, model):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        print("note: no IPv6 here")
        return
    command = [program, "serve", "--model", model, *ONE, "--host", "::1", "--port", "0", "--log-format", "json"]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
        url = next(line["url"] for line in map(json.loads, process.stderr) if line["event"] == "listening")
        process.terminate()
    check(url.startswith("http://[::1]:"), f"an IPv6 address in the URL that is logged: {url}")


def check_open_address(program, model):
    """Who can be reached by others without a key is told so."""
    def warned(*arguments):
        command = [program, "serve", "--model", model, *ONE, "--port", "0", "--log-format", "json", *arguments]
        with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
            events = []
            for line in map(json.loads, process.stderr):
                events.append(line["event"])
                if line["event"] == "ready":
                    break
            process.terminate()
        return "no_api_keys" in events

    check(warned("--host", "0.0.0.0"), "an address that others reach without a key is warned of")
    check(not warned("--host", "0.0.0.0", "--api-key", "k"), "with keys it is not")
    check(not warned(), "nor is one that only this machine reaches")


def check_sampling(program, model):
    with serving(program, "--model", model, *ONE, "--temperature", "0") as running:
        texts = {completions(running, prompt="x", max_tokens=20).json["choices"][0]["text"] for _ in range(4)}
        check(len(texts) == 1, f"requests that name no temperature get the server's: {len(texts)} texts of 4")
        texts = {completions(running, prompt="x", max_tokens=20, temperature=1).json["choices"][0]["text"] for _ in range(4)}
        check(len(texts) > 1, f"those that name one get theirs: {len(texts)} texts of 4")


def check_generation_config(program, folder):
    """What a model's makers advise holds for requests that say nothing of theirs, unless options do."""
    advised = folder / "advised"
    small_model.write(advised)
    (advised / "generation_config.json").write_text('{"do_sample": false, "temperature": 2}')

    def texts(*arguments, **fields):
        with serving(program, "--model", advised, *ONE, *arguments) as running:
            made = {completions(running, prompt="x", max_tokens=20, ignore_eos=True, **fields).json["choices"][0]["text"] for _ in range(4)}
            return len(made), "generation_config" in log_of_start(running).replace("generation-config", "")

    check(texts() == (1, True), "generation_config.json: greedy, and the log says so")
    check(texts(temperature=1)[0] > 1, "a request's temperature goes before it")
    check(texts("--temperature", 1)[0] > 1, "and so does the server's option")
    check(texts("--generation-config", "none") == (4, False), "none: it is not asked")
    (advised / "generation_config.json").write_text('{"top_p": 2}')
    refused(program, advised, [], ["generation_config.json", "top_p"])


def check_full_disk(program, model):
    with serving(program, "--model", model, *ONE, "--log-file", "/dev/full") as running:
        for _ in range(20):
            reply = completions(running, prompt="x", max_tokens=2)
        check(reply.status == 200 and call(running, "GET", "/ready").status == 200, "no room for the log: served all the same")
        check(running.terminate(20) == 0, "and stopped as always")


def check_descriptors(program, model, folder):
    with contextlib.ExitStack() as stack:
        running = server.Server(["--model", model, *ONE, "--keep-alive", "60", "--read-timeout", "60"], folder / "few.log", program)
        running.command = ["sh", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "sh", *running.command]
        stack.enter_context(running)
        idle = [socket.create_connection(("127.0.0.1", running.port), 20)]
        # No connection is left that might end and so let another one in.
        check(wait_for(lambda: connections(idle[0]) == 1), "there is one connection")
        idle += [socket.create_connection(("127.0.0.1", running.port), 20) for _ in range(DESCRIPTORS + 20)]
        check(wait_for(lambda: "cannot accept" in running.log.read_text()), "out of descriptors: the log says so")
        time_before = process_seconds(running.pid)
        idle[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        check(b"200" in idle[0].recv(1 << 12), "those who are in are served")
        check(running.log.read_text().count("cannot accept") == 1, "it is said once")
        check(process_seconds(running.pid) - time_before < 1, "and it does not spin")
        for connection in idle:
            connection.close()
        check(call(running, "GET", "/health").status == 200, "with descriptors free again, everybody is")


def connections(connection):
    """What the server says of them on this one."""
    connection.sendall(f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
    response = http.client.HTTPResponse(connection)
    response.begin()
    return int(re.search(rb"^dsla_http_connections (\d+)$", response.read(), re.MULTILINE)[1])


def process_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def together(running, count, **fields):
    replies = [None] * count

    def ask(i):
        replies[i] = completions(running, prompt=f"Request {i}:", ignore_eos=True, temperature=0, **fields)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def preemptions(running):
    return call(running, "GET", "/v1/dsla").json["totals"]["preemptions"]


def check_least_memory(program, model):
    with serving(program, "--model", model, *ONE, "--memory", LEAST_MEMORY) as running:
        check(completions(running, prompt="x", max_tokens=4).status == 200, f"{LEAST_MEMORY} bytes of cache hold a short request")
        reply = completions(running, prompt="x", max_tokens=80)
        check(reply.error[:2] == (400, "request_too_large_for_cache"), f"and no longer one: {reply.error}")


# Of the small model a page takes 8 KiB in each of 8 layers, so that a request of 460 tokens takes 512 KiB in the end: all
# have room to begin, two to end.
TIGHT = ["--memory", "1M", "--no-prefix-cache"]
TIGHT_TOKENS = 1025  # of one request at most: the last one is not cached


def check_preemption(program, model):
    with serving(program, "--model", model, *ONE, *TIGHT, "--deterministic") as running:
        reply = completions(running, prompt="x", max_tokens=8000)
        check(reply.error[:2] == (400, "request_too_large_for_cache"), f"more than the cache can hold: {reply.error}")
        warned = [line for line in running.log.read_text().splitlines() if "small_cache" in line]
        room = f"at most {TIGHT_TOKENS} at level 0"
        check(len(warned) == 1 and room in warned[0] and "--memory" in warned[0], f"which was said at the start: {warned}")
        reply = chat(running, ignore_eos=True)
        usage = reply.json.get("usage", {})
        check(usage.get("total_tokens") == TIGHT_TOKENS, f"a chat without max_tokens is as long as fits: {reply.status}, {usage}")
        prompts = [f"Request {i}:" for i in range(6)]
        fields = {"ignore_eos": True, "temperature": 0, "max_tokens": 450}
        alone = [completions(running, prompt=prompt, **fields).json["choices"][0]["text"] for prompt in prompts]
        check(preemptions(running) == 0, "one after another: nobody is pre-empted")
        crowd = completions(running, prompt=prompts, **fields)  # in one request, so that all are there at once
        check(preemptions(running) > 0, f"six at once in memory for two: {preemptions(running)} pre-emptions")
        check([choice["text"] for choice in crowd.json["choices"]] == alone, "every reply is, bit for bit, that of the request alone")
        held = lambda: call(running, "GET", "/v1/dsla").json["memory"]["page_bytes"]  # noqa: E731
        check(wait_for(lambda: held() == 0), "and nothing is held afterwards")
    # Nobody may be pre-empted: who would not have room to the end waits until there is.
    with serving(program, "--model", model, *ONE, *TIGHT, "--max-preemptions", 0) as running:
        crowd = together(running, 6, max_tokens=450, stream=True)
        ends = [events(reply.body)[-1] for reply in crowd]
        check(ends == ["[DONE]"] * 6, f"past the cap: all six have their replies: {set(ends)}")
        check(all(reply.status == 200 for reply in crowd), "in their streams")
        check(preemptions(running) == 0, "and nobody was pre-empted")
        check(completions(running, prompt="x", max_tokens=4).status == 200, "the server goes on")


def main():
    arguments = parse_arguments(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = folder / "model"
        small_model.write(model)
        for part in (
            lambda: check_refusals(arguments.program, folder, model),
            lambda: check_before_measuring(arguments.program, folder),
            lambda: check_second_signal(arguments.program, model),
            lambda: check_drain_limit(arguments.program, model),
            lambda: check_long_step(arguments.program, folder),
            lambda: check_no_memory(arguments.program, folder),
            lambda: check_hangup_and_pipe(arguments.program, folder, model),
            lambda: check_start(arguments.program, model),
            lambda: check_address(arguments.program, model),
            lambda: check_open_address(arguments.program, model),
            lambda: check_sampling(arguments.program, model),
            lambda: check_generation_config(arguments.program, folder),
            lambda: check_full_disk(arguments.program, model),
            lambda: check_descriptors(arguments.program, model, folder),
            lambda: check_least_memory(arguments.program, model),
            lambda: check_preemption(arguments.program, model),
        ):
            part()
    finish()


if __name__ == "__main__":
    main()
