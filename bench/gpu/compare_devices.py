#!/usr/bin/env python3
"""Greedy replies of the server on a GPU against those on the CPU, both with bf16 weights: 20 prompts, short ones and
pieces of a long text, at the levels given in turn. Replies must be the same token by token. Where they first differ, it
counts as a near-tie if the CPU's log probability of the GPU's token is within MARGIN nats of its own choice (bf16 products
move logits by some hundredths); what follows such a place is not compared. Exit status 1 if any other difference is found.

Usage: compare_devices.py PROGRAM [--model GGUF] [--text FILE] [--levels 0 8 15 22] [--tokens 48] [--margin 0.1]
"""

import argparse
import json
import pathlib
import sys
import tempfile
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "serving"))

import server

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about autumn.",
    "Explain how a hash table works.",
    "List three uses of linear algebra.",
    "Translate to German: Where is the station?",
    "What causes the tides?",
    "Give me a recipe for pancakes.",
    "Summarise the plot of Hamlet in two sentences.",
    "Write a Python function that reverses a list.",
    "Why is the sky blue?",
]


def ask(url, body):
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["logprobs"]


def replies(device, options, prompts, args):
    options = ["--device", device, "--weights", "bf16", "--no-ui", *options]
    with tempfile.TemporaryDirectory() as folder, server.Server(options, f"{folder}/log", args.program) as running:
        return [
            ask(running.url, {"prompt": prompt, "max_tokens": args.tokens, "temperature": 0, "logprobs": 5, "dsla": {"level": level}})
            for prompt, level in prompts
        ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--model")
    parser.add_argument("--adapter")
    parser.add_argument("--text", default="/usr/share/common-licenses/GPL-3")
    parser.add_argument("--levels", type=int, nargs="*", default=[0, 8, 15, 22])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--margin", type=float, default=0.1)
    args = parser.parse_args()
    options = [o for name in ("model", "adapter") if getattr(args, name) for o in (f"--{name}", getattr(args, name))]
    with open(args.text, encoding="utf-8") as file:
        text = file.read()
    questions = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS]
    pieces = [text[2000 * i : 2000 * i + 3000 + 500 * i] for i in range(10)]
    prompts = [(p, args.levels[i % len(args.levels)]) for i, p in enumerate(questions + pieces)]
    cpu = replies("cpu", options, prompts, args)
    gpu = replies("cuda", options, prompts, args)
    same = ties = compared = 0
    bad = []
    for (prompt, level), want, got in zip(prompts, cpu, gpu):
        differ = next((i for i, (a, b) in enumerate(zip(want["tokens"], got["tokens"])) if a != b), None)
        if differ is None and len(want["tokens"]) == len(got["tokens"]):
            same += 1
            compared += len(want["tokens"])
            continue
        differ = differ if differ is not None else min(len(want["tokens"]), len(got["tokens"])) - 1
        compared += differ
        other = want["top_logprobs"][differ].get(got["tokens"][differ])
        gap = None if other is None else want["token_logprobs"][differ] - other
        tie = gap is not None and gap <= args.margin
        ties += tie
        line = f"level {level}, {prompt[:40]!r}: token {differ}: {want['tokens'][differ]!r}, on the GPU {got['tokens'][differ]!r}, gap {gap}"
        print(("near-tie: " if tie else "differs: ") + line)
        if not tie:
            bad.append(line)
    print(f"{len(prompts)} prompts: {same} the same, {ties} up to a near-tie, {len(bad)} differ; {compared} tokens compared")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
