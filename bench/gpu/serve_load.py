#!/usr/bin/env python3
"""Loads a server that runs already with clients that each send their next request when they have the last one's reply, all
at the same level (-1: as the server chooses). Prompts are token ids that no other prompt begins with, of a random length, as
replies are. Prints tokens per second, and median / 95th percentile of the time to the first token and of the time per token
after it, of what begins after a fifth of the time.

Usage: serve_load.py [--url URL] [--clients N] [--seconds S] [--prompt LEAST MOST] [--reply LEAST MOST] [--levels K ...]
"""

import argparse
import http.client
import json
import multiprocessing
import random
import threading
import time
import urllib.parse

PROCESSES = 12  # one alone could not read the streams of many clients in time


def stream(address, body):
    """Returns the times at which tokens came; RuntimeError for what is no reply."""
    connection = http.client.HTTPConnection(*address, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read().decode()}")
    times = []
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            if event["choices"]:
                times.append(time.perf_counter())
    connection.close()
    return times


def one_client(args, address, seed, level, end, results, errors):
    numbers = random.Random(seed)
    while time.perf_counter() < end:
        tokens, reply = numbers.randint(*args.prompt), numbers.randint(*args.reply)
        prompt = [numbers.randint(5, 40000) for _ in range(16)]
        prompt += [(i * 104729 + tokens) % 40000 + 5 for i in range(tokens - len(prompt))]
        body = {"prompt": prompt, "max_tokens": reply, "temperature": 0, "ignore_eos": True, "stream": True}
        if level >= 0:
            body["dsla"] = {"level": level}
        begin = time.perf_counter()
        try:
            results.append((begin, stream(address, body)))
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            errors.append(str(error))
            return


def clients(args, address, seeds, level, end, queue):
    results, errors = [], []
    threads = [
        threading.Thread(target=one_client, args=(args, address, seed, level, end, results, errors)) for seed in seeds
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put((results, errors))


def shares(values):
    """Median and 95th percentile, in ms."""
    values = sorted(values)
    if not values:
        return "- / -"
    return " / ".join(f"{1e3 * values[min(len(values) - 1, int(share * len(values)))]:.1f}" for share in (0.5, 0.95))


def load(args, address, level):
    begin = time.perf_counter()
    counted, end = begin + 0.2 * args.seconds, begin + args.seconds
    queue = multiprocessing.Queue()
    seeds = [1000 * (level + 1) + i for i in range(args.clients)]
    groups = [seeds[i::PROCESSES] for i in range(min(PROCESSES, args.clients))]
    processes = [
        multiprocessing.Process(target=clients, args=(args, address, group, level, end, queue)) for group in groups
    ]
    for process in processes:
        process.start()
    results, errors = [], []
    for _ in processes:
        some, failed = queue.get()
        results += some
        errors += failed
    for process in processes:
        process.join()
    tokens = sum(counted <= t < end for _, times in results for t in times)
    whole = [(first, times) for first, times in results if first >= counted and times]
    print(
        f"level {level}: {args.clients} clients, {tokens / (end - counted):.0f} tokens/s out, {len(whole)} requests; first token "
        f"after {shares(times[0] - first for first, times in whole)} ms, "
        f"{shares((t[-1] - t[0]) / (len(t) - 1) for _, t in whole if len(t) > 1)} ms a token",
        flush=True,
    )
    if errors:
        raise SystemExit(f"{len(errors)} requests failed, the first: {errors[0]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--prompt", type=int, nargs=2, default=[2000, 7900], metavar=("LEAST", "MOST"))
    parser.add_argument("--reply", type=int, nargs=2, default=[64, 256], metavar=("LEAST", "MOST"))
    parser.add_argument("--levels", type=int, nargs="*", default=[0])
    args = parser.parse_args()
    target = urllib.parse.urlparse(args.url)
    for level in args.levels:
        load(args, (target.hostname, target.port), level)


if __name__ == "__main__":
    main()
