#!/usr/bin/env python3
"""Times requests to a server that runs already: one prompt of given token ids at each level, streamed, and then several at
once. Prints seconds to the first token, seconds in all, and tokens per second.

Usage: serve_request.py [--url URL] [--prompt TOKENS] [--reply TOKENS] [--levels K ...] [--together N]
"""

import argparse
import asyncio
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "serving"))

import client as load_client


def body_of(args, seed, tokens, level):
    return {
        "prompt": [(seed * 7919 + i * 104729) % 40000 + 5 for i in range(tokens)], "max_tokens": args.reply,
        "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True, "dsla": {"level": level},
    }


async def ask(args, bodies):
    """The records of requests that are sent at once; `first` is also of a token without text."""
    client, start = load_client.Client(args.url), time.monotonic()
    records = await asyncio.gather(
        *(client.stream("/v1/completions", body, load_client.Record("request", due=0.0), start) for body in bodies)
    )
    for record in records:
        if not record.ok:
            raise SystemExit(record.error or f"status {record.status}")
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--reply", type=int, default=256)
    parser.add_argument("--levels", type=int, nargs="*", default=[0])
    parser.add_argument("--together", type=int, default=0, help="then so many requests at once, of a quarter of the prompt")
    args = parser.parse_args()

    for seed, level in enumerate(args.levels):
        for repetition in range(2):
            (record,) = asyncio.run(ask(args, [body_of(args, 2 * seed + repetition, args.prompt, level)]))
            print(
                f"level {level}: {record.prompt_tokens} tokens in, {record.completion_tokens} out: first after "
                f"{record.first:.3f} s, all in {record.done:.3f} s, {1e3 * (record.tpot or 0):.2f} ms a token",
                flush=True,
            )
    for level in args.levels if args.together else []:
        bodies = [body_of(args, 100 + 1000 * level + i, args.prompt // 4, level) for i in range(args.together)]
        records = asyncio.run(ask(args, bodies))
        seconds = max(record.done for record in records)
        tokens = sum(record.completion_tokens for record in records)
        print(f"level {level}: {args.together} at once: {seconds:.2f} s, {tokens / seconds:.0f} tokens/s out", flush=True)


if __name__ == "__main__":
    main()
