#!/usr/bin/env python3
"""`dsla serve --replicas 2` on the CPU: the same replies as of one engine, prefixes, clients that leave, the end, and what the
log, the metrics and /v1/dsla say. On a small random model, and the policies on the default one. Standard library alone."""

import json
import pathlib
import re
import sys
import tempfile
import threading

from admin_test import ARGUMENTS, change
from program_test import long_request, long_stream, read_all, refused
from serving import call, chat, check, completions, finish, log_of_start, parse_arguments, serving, wait_for

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "load"))

import small_model  # noqa: E402

TWO = ["--replicas", 2, "--threads", 2]


def state(running):
    return call(running, "GET", "/v1/dsla").json


def requests(running, count):
    """The log's lines of so many completions, in order; they are written behind the answers."""

    def found():
        lines = [json.loads(line) for line in running.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["event"] == "request" and line.get("path") == "/v1/completions"]

    wait_for(lambda: len(found()) >= count)
    return found()


def in_parallel(running, bodies):
    replies = [None] * len(bodies)

    def ask(i):
        replies[i] = completions(running, **bodies[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def check_refusals(program, model):
    refused(program, model, ["--replicas", "2", "--device", "cuda:0"], ["--replicas: 2", "cuda:0,cuda:1"])
    refused(program, model, ["--replicas", "1000"], ["--replicas", "64"])
    refused(program, model, ["--device", "cuda:0,cpu"], ["'cpu'", "cuda:N"])
    refused(program, model, ["--replicas", "2", "--memory", "100K"], ["--memory: 100K", "2 replicas"])


def check_replies(program, model):
    """One client's prompts of many lengths, greedy and drawn, some with several replies."""
    bodies = [
        {"prompt": f"Request {i}: " + "word " * (3 * i), "max_tokens": 24, "temperature": i % 2, "seed": i, "n": 1 + i % 3, "ignore_eos": True}
        for i in range(12)
    ]
    answers = {}
    for count in (1, 2):
        arguments = ["--replicas", count, "--threads", 2, "--deterministic", "--log-format", "json"]
        with serving(program, "--model", model, *arguments) as running:
            answers[count] = [reply.json.get("choices") for reply in in_parallel(running, bodies)]
            placed = [line.get("replica") for line in requests(running, 12)]
            if count == 1:
                check(placed == [None] * 12 and "replicas" not in state(running), "one engine: no replica is named")
                check("engine=" not in call(running, "GET", "/metrics").body.decode(), "nor in the metrics")
                continue
            check({"0", "1"} <= set(",".join(placed).split(",")), f"two: both have some: {placed}")
            batch = {"prompt": ["one", "two", "three", "four"], "max_tokens": 4}
            check(len(completions(running, **batch).json["choices"]) == 4, "a list of prompts has all its replies")
            check(requests(running, 13)[-1]["replica"] == "0,1", "and is shared")
            check_counts(running)
    check(None not in answers[2] and answers[1] == answers[2], "every reply is that of one engine, bit for bit")


def check_counts(running):
    now = state(running)
    replicas = now["replicas"]
    finished = [replica["totals"]["finished"] for replica in replicas]
    check(len(replicas) == 2 and sum(finished) == now["totals"]["finished"] == 28, f"/v1/dsla has sums and each one's: {finished}")
    budgets = [replica["memory"]["budget_bytes"] for replica in replicas]
    check(budgets[0] == budgets[1] == now["memory"]["budget_bytes"] // 2, "the memory is shared")
    metrics = call(running, "GET", "/metrics").body.decode()
    generated = [float(value) for value in re.findall(r'^dsla_generated_tokens_total\{engine="\d"\} (\S+)$', metrics, re.MULTILINE)]
    check(len(generated) == 2 and sum(generated) == now["totals"]["generated_tokens"], f"the metrics have a sample of each: {generated}")
    check(re.search(r'^dsla_requests_total\{finish="length",tier="auto"\} 28$', metrics, re.MULTILINE), "and count requests together")


def check_prefixes(program, model):
    with serving(program, "--model", model, *TWO, "--log-format", "json") as running:
        prompts = ["An old story. " * 60, "A new one. " * 70]
        for turn in range(4):
            for prompt in prompts:
                cached = completions(running, prompt=f"{prompt} Turn {turn}", max_tokens=2).json["usage"]["prompt_tokens_details"]["cached_tokens"]
                check((cached > 500) == (turn > 0), f"turn {turn}: {cached} cached tokens")
        placed = [line["replica"] for line in requests(running, 8)]
        check(placed == ["0", "1"] * 4, f"each prefix stays where it is: {placed}")


def check_leaving(program, model):
    with serving(program, "--model", model, *TWO, "--log-format", "json") as running:
        streams = [long_stream(running) for _ in range(2)]
        check(wait_for(lambda: all(replica["running"]["count"] for replica in state(running)["replicas"])), "two long requests of 8 replies: both have some")
        streams[0].close()
        check(wait_for(lambda: state(running)["running"]["count"] == 8), "one client leaves: its replies end, wherever they are")
        streams[1].close()
        check(wait_for(lambda: state(running)["idle"]), "and the other's")
        lines = requests(running, 2)
        check([line["status"] for line in lines] == [499, 499] and all("replica" in line for line in lines), "the log says who had them")


def check_queue(program, model):
    """The bound of the queue is of both together: 3 wait, whoever runs."""
    with serving(program, "--model", model, *TWO, "--max-running", 1, "--max-queued", 3) as running:
        held = [long_request(running, replies=1, stream=False) for _ in range(2)]
        check(wait_for(lambda: state(running)["running"]["count"] == 2), "two long requests run")
        held += [long_request(running, replies=1, stream=False) for _ in range(3)]
        check(wait_for(lambda: state(running)["queue"]["requests"] == 3), "three wait")
        replies = [completions(running, prompt=f"Request {i}", max_tokens=1) for i in range(4)]
        check([reply.error[:2] for reply in replies] == [(429, "queue_full")] * 4, "the rest are told to come again")
        for connection in held:
            connection.close()
        check(wait_for(lambda: state(running)["idle"]), "nobody is left")
        check(completions(running, prompt="x", max_tokens=1).status == 200, "and there is room again")


def check_drain(program, model):
    with serving(program, "--model", model, *TWO, "--drain-timeout", "0.3") as running:
        readers = [read_all(long_stream(running)) for _ in range(2)]
        code = running.terminate(30)
        check(code == 0, f"SIGTERM with work at both: exit code {code}")
        for thread, _ in readers:
            thread.join(20)
        ends = [received[0][-300:] if received else b"" for _, received in readers]
        check(all(b'"code":"shutting_down"' in end for end in ends), "every stream ends with an error event")


def check_policies(program):
    with serving(program, *ARGUMENTS, "--replicas", 2, "--log-format", "json") as running:
        check(log_of_start(running).count('"calibrated"') == 1, "two of a kind are measured once")
        check(call(running, "GET", "/ready").json == {"status": "ok"}, "both are up")
        for command, level in (({"level": 7}, "7"), ({"policy": "slo"}, "0")):
            check(change(running, command).status == 200, f"{command}")
            for text in ("Say hi.", "Say something else."):
                reply = chat(running, text, max_tokens=2)
                check(reply.headers["X-Dsla-Level"] == level, f"holds for all: level {reply.headers['X-Dsla-Level']}")
        finished = [replica["totals"]["finished"] for replica in state(running)["replicas"]]
        check(finished == [2, 2], f"both have had two, by turns: {finished}")


def main():
    arguments = parse_arguments(__doc__)
    with tempfile.TemporaryDirectory() as name:
        model = pathlib.Path(name) / "model"
        small_model.write(model)
        check_refusals(arguments.program, model)
        for part in (check_replies, check_prefixes, check_leaving, check_queue, check_drain):
            part(arguments.program, model)
        check_policies(arguments.program)
    finish()


if __name__ == "__main__":
    main()
