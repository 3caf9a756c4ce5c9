#!/usr/bin/env python3
"""The requests of a burst and the calm after it, as a JSON trace. The same arguments give the same bytes. With --distinct the
burst is prompts that share nothing."""

import argparse
import hashlib
import json
import pathlib
import random
import sys

LICENSES = pathlib.Path("/usr/share/common-licenses")
# One licence or more, of 7,200 to 7,700 tokens with the vocabularies of Llama's family, in Debian 12 and in Ubuntu 24.04. None
# begins like another.
DOCUMENTS = (
    "GPL-3",
    "LGPL-2.1+LGPL-3",
    "GFDL-1.3+Apache-2.0",
    "MPL-1.1+CC0-1.0",
    "LGPL-2+Artistic+BSD",
    "GFDL-1.2+GPL-1",
    "GPL-2+MPL-2.0",
    "LGPL-3+LGPL-2.1",
    "Apache-2.0+GFDL-1.3",
    "CC0-1.0+MPL-1.1",
    "Artistic+BSD+LGPL-2",
    "GPL-1+GFDL-1.2",
    "MPL-2.0+GPL-2",
)
SHORT = ("Artistic", "BSD")  # short chats quote paragraphs of these
BURST = 30.0  # seconds in which its requests arrive
REPLY = 320  # tokens of an answer about a document
PROMPT, DISTINCT_REPLY, RATE = (2000, 7900), (64, 256), 60.0  # of distinct prompts: words, tokens, requests a second
QUESTIONS = (
    "Summarise the text above in a few sentences.",
    "What must somebody do who passes the work on?",
    "Which sentence of the text above matters most to a user, and why?",
    "What does the text above say about warranty?",
)
CHATS = (
    "Explain how a rainbow forms.",
    "Write a short story about a lighthouse.",
    "List five uses of a paper clip.",
    "How do I boil an egg?",
    "What is the difference between a lake and a pond?",
    "Give me three names for a sailing boat.",
)
WORDS = "the of and to in is you that it he was for on are as with his they at be this have from or one had by but not".split()


def load(name):
    """The text of a licence; SystemExit names the file when it cannot be read."""
    try:
        return (LICENSES / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"trace: cannot read {LICENSES / name}: {error}") from None


def document(names):
    """Licences joined by +, one after the other."""
    return "\n\n".join(load(name) for name in names.split("+"))


def paragraphs(names):
    found = []
    for name in names:
        found += [" ".join(part.split()) for part in load(name).split("\n\n")]
    return [part for part in found if 80 <= len(part) <= 1200]


def document_request(name, question, at, tokens):
    return {"at": round(at, 3), "kind": "document", "text": name, "question": question, "max_tokens": tokens}


def chat_request(rng, parts, at, tokens):
    request = {"at": round(at, 3), "kind": "chat", "question": rng.choice(CHATS), "max_tokens": tokens}
    if rng.random() < 0.5:
        request["quote"] = rng.choice(parts)
        request["question"] = "Say this in simpler words."
    return request


def calm_requests(rng, parts, calm, gap, tokens):
    return [chat_request(rng, parts, gap * i, tokens) for i in range(int(calm / gap))]


def as_trace(seed, burst, after, calm):
    used = sorted({name for r in burst if "text" in r for name in r["text"].split("+")})
    return {
        "seed": seed,
        "files": {name: hashlib.sha256(load(name).encode()).hexdigest() for name in used},
        "burst": burst,
        "calm": after,
        "calm_seconds": calm,
    }


def make_trace(seed=1, documents=12, questions=2, chats=24, burst=BURST, calm=60.0, calm_gap=4.0, document_tokens=REPLY, chat_tokens=48):
    """`documents` texts with `questions` each and `chats` short ones within `burst` seconds, then short ones every
    `calm_gap` seconds for `calm` seconds, counted from the end of the burst's work."""
    rng = random.Random(seed)
    names = [DOCUMENTS[i % len(DOCUMENTS)] for i in range(documents)]
    parts = paragraphs(SHORT)
    work = [(name, QUESTIONS[(i + q) % len(QUESTIONS)]) for i, name in enumerate(names) for q in range(questions)]
    rng.shuffle(work)
    jobs = [("document", item) for item in work] + [("chat", None)] * chats
    rng.shuffle(jobs)
    # Points of a Poisson process, given how many there are, are uniform.
    times = sorted(rng.uniform(0, burst) for _ in jobs)
    first = times[0] if times else 0.0
    requests = []
    for at, (kind, item) in zip(times, jobs):
        if kind == "document":
            requests.append(document_request(*item, at - first, document_tokens))
        else:
            requests.append(chat_request(rng, parts, at - first, chat_tokens))
    return as_trace(seed, requests, calm_requests(rng, parts, calm, calm_gap, chat_tokens), calm)


def make_distinct(seed=1, count=100, prompt=PROMPT, reply=DISTINCT_REPLY, rate=RATE, calm=60.0, calm_gap=4.0, chat_tokens=48):
    """`count` prompts of `prompt` (least, most) words of which none begins like another, with replies of `reply` tokens, that
    arrive as a Poisson process of `rate` a second; then the calm as above."""
    rng = random.Random(seed)
    requests, at = [], 0.0
    for _ in range(count):
        requests.append(
            {"at": round(at, 4), "kind": "distinct", "words": rng.randint(*prompt), "seed": rng.getrandbits(53),
             "question": "Go on.", "max_tokens": rng.randint(*reply)}
        )
        at += rng.expovariate(rate)
    return as_trace(seed, requests, calm_requests(rng, paragraphs(SHORT), calm, calm_gap, chat_tokens), calm)


def check_files(trace):
    """SystemExit if a text is not the one that the trace was made with."""
    for name, digest in trace["files"].items():
        if hashlib.sha256(load(name).encode()).hexdigest() != digest:
            raise SystemExit(f"trace: {LICENSES / name} is not the text that the trace was made with")


def messages_of(request):
    """The chat messages of a request."""
    if "text" in request:
        head = document(request["text"])
    elif "words" in request:  # each a token, or next to one, in the vocabularies of Llama's family
        head = " ".join(random.Random(request["seed"]).choices(WORDS, k=request["words"]))
    else:
        head = request.get("quote", "")
    content = f"{head}\n\n{request['question']}" if head else request["question"]
    return [{"role": "user", "content": content}]


def dump(trace):
    return json.dumps(trace, indent=1, ensure_ascii=False) + "\n"


def scaled(scale, burst=BURST, **arguments):
    """The default trace with `scale` times the requests, at the same rate."""
    return make_trace(
        documents=max(1, round(12 * scale)), chats=max(1, round(24 * scale)), burst=max(5.0, burst * scale), **arguments
    )


def add_arguments(parser):
    """What a made trace can be given."""
    parser.add_argument("--seed", type=int, default=1, help="of the trace (1)")
    parser.add_argument("--scale", type=float, default=1.0, help="times the requests of the burst, at the same rate (1)")
    parser.add_argument("--burst", type=float, default=BURST, help=f"seconds in which they arrive, at scale 1 ({BURST:.0f})")
    parser.add_argument("--document-tokens", type=int, default=REPLY, help=f"tokens of an answer about a document ({REPLY})")
    parser.add_argument("--calm", type=float, default=60.0, help="seconds of calm after the burst (60)")
    parser.add_argument("--distinct", type=int, default=0, help="a burst of so many prompts that share nothing instead (0: as above)")
    parser.add_argument("--prompt", type=int, nargs=2, default=PROMPT, metavar=("LEAST", "MOST"), help="their words, a token each (2000 7900)")
    parser.add_argument("--reply", type=int, nargs=2, default=DISTINCT_REPLY, metavar=("LEAST", "MOST"), help="tokens of their replies (64 256)")
    parser.add_argument("--rate", type=float, default=RATE, help=f"how many of them arrive a second, on average ({RATE:.0f})")


def of_arguments(args):
    if args.distinct > 0:
        if args.rate <= 0 or not 0 < args.prompt[0] <= args.prompt[1] or not 0 < args.reply[0] <= args.reply[1]:
            raise SystemExit("trace: --rate is above 0, and so are --prompt and --reply, LEAST no more than MOST")
        return make_distinct(args.seed, args.distinct, args.prompt, args.reply, args.rate, args.calm)
    return scaled(args.scale, burst=args.burst, seed=args.seed, calm=args.calm, document_tokens=args.document_tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--out", type=pathlib.Path, help="file to write; without it, to standard output")
    args = parser.parse_args()
    text = dump(of_arguments(args))
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
