#!/usr/bin/env python3
"""Loads a server that runs already with clients that each send their next request when they have the last one's reply, all
at the same level (-1: as the server chooses). Prompts are token ids that no other prompt begins with, of a random length, as
replies are; or, with --documents N, questions of 32 tokens behind one of N documents of such lengths. Prints tokens per second, and median / 95th percentile of the time to the first token and of the time per token
after it, of what begins after a fifth of the time. Tokens count as evenly spread over a reply.

Usage: serve_load.py [--url URL] [--clients N] [--seconds S] [--prompt LEAST MOST] [--reply LEAST MOST] [--levels K ...]
                     [--documents N]
"""

import argparse
import asyncio
import concurrent.futures
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "serving"))

import client as load_client

PROCESSES = 12  # one alone could not read the streams of many clients in time
QUESTION = 32  # tokens, of one about a document


def text(numbers, lengths):
    """Token ids that no other text begins with."""
    tokens = numbers.randint(*lengths)
    beginning = [numbers.randint(5, 40000) for _ in range(16)]
    return beginning + [(i * 104729 + tokens) % 40000 + 5 for i in range(tokens - len(beginning))]


def question(numbers, args):
    document = text(random.Random(numbers.randrange(args.documents)), args.prompt)
    return document + text(numbers, (QUESTION, QUESTION))


async def one_client(args, seed, level, start):
    """Returns the records of a client's requests, the last of which may be an error."""
    numbers = random.Random(seed)
    client = load_client.Client(args.url)
    records = []
    while time.monotonic() < start + args.seconds and (not records or records[-1].ok):
        prompt = question(numbers, args) if args.documents else text(numbers, args.prompt)
        reply = numbers.randint(*args.reply)
        body = {
            "prompt": prompt, "max_tokens": reply, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }
        if level >= 0:
            body["dsla"] = {"level": level}
        record = load_client.Record("load", due=time.monotonic() - start)
        records.append(await client.stream("/v1/completions", body, record, start))
    return records


async def some_clients(args, seeds, level, start):
    return sum(await asyncio.gather(*(one_client(args, seed, level, start) for seed in seeds)), [])


def process(args, seeds, level, start):
    return asyncio.run(some_clients(args, seeds, level, start))


def tokens_within(record, begin, end):
    if not record.completion_tokens:
        return 0
    inside = min(record.last, end) - max(record.first, begin)
    return record.completion_tokens * max(0, inside) / max(record.last - record.first, 1e-9)


def shares(values):
    """Median and 95th percentile, in ms."""
    values = sorted(values)
    if not values:
        return "- / -"
    return " / ".join(f"{1e3 * values[min(len(values) - 1, int(share * len(values)))]:.1f}" for share in (0.5, 0.95))


def load(args, level):
    start = time.monotonic()
    seeds = [1000 * (level + 1) + i for i in range(args.clients)]
    count = min(PROCESSES, args.clients)
    with concurrent.futures.ProcessPoolExecutor(count) as pool:
        parts = [pool.submit(process, args, seeds[i::count], level, start) for i in range(count)]
        records = sum((part.result() for part in parts), [])
    counted = 0.2 * args.seconds
    tokens = sum(tokens_within(record, counted, args.seconds) for record in records)
    later = [record for record in records if record.ok and record.due >= counted]
    print(
        f"level {level}: {args.clients} clients, {tokens / (args.seconds - counted):.0f} tokens/s out, {len(later)} requests; "
        f"first token after {shares(r.ttft for r in later)} ms, {shares(r.tpot for r in later if r.tpot)} ms a token",
        flush=True,
    )
    errors = [record.error or f"status {record.status}" for record in records if not record.ok]
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
    parser.add_argument("--documents", type=int, default=0, help="that all clients ask about (0: every prompt is another)")
    args = parser.parse_args()
    for level in args.levels:
        load(args, level)


if __name__ == "__main__":
    main()
