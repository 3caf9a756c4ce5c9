#!/usr/bin/env python3
"""Times requests to a server that runs already: one prompt of given token ids at each level, streamed, and then several at
once. Prints seconds to the first token, seconds in all, and tokens per second.

Usage: serve_request.py [--url URL] [--prompt TOKENS] [--reply TOKENS] [--levels K ...] [--together N]
"""

import argparse
import http.client
import json
import threading
import time
import urllib.parse


def ask(url, body, result):
    target = urllib.parse.urlparse(url)
    connection = http.client.HTTPConnection(target.hostname, target.port, timeout=600)
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read().decode()}")
    first, tokens = None, 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        if first is None:
            first = time.perf_counter() - begin
        tokens += len(json.loads(line[6:])["choices"]) > 0
    result.append((first, time.perf_counter() - begin, tokens))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--reply", type=int, default=256)
    parser.add_argument("--levels", type=int, nargs="*", default=[0])
    parser.add_argument("--together", type=int, default=0, help="then so many requests at once, of a quarter of the prompt")
    args = parser.parse_args()

    def body(seed, tokens, level):
        return {
            "prompt": [(seed * 7919 + i * 104729) % 40000 + 5 for i in range(tokens)],
            "max_tokens": args.reply,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "dsla": {"level": level},
        }

    for seed, level in enumerate(args.levels):
        for repetition in range(2):
            result = []
            ask(args.url, body(2 * seed + repetition, args.prompt, level), result)
            first, total, tokens = result[0]
            print(
                f"level {level}: {args.prompt} tokens in, {tokens} out: first after {first:.3f} s, all in {total:.3f} s, "
                f"{1e3 * (total - first) / max(1, tokens - 1):.2f} ms a token",
                flush=True,
            )
    for level in args.levels if args.together else []:
        result = []
        threads = [
            threading.Thread(target=ask, args=(args.url, body(100 + 1000 * level + i, args.prompt // 4, level), result))
            for i in range(args.together)
        ]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
        tokens = sum(r[2] for r in result)
        print(f"level {level}: {args.together} at once: {seconds:.2f} s, {tokens / seconds:.0f} tokens/s out", flush=True)


if __name__ == "__main__":
    main()
