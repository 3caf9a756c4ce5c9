"""From the records and samples of a run to figures, and from figures to tables."""

import math

TPOT_TARGET = 0.2  # seconds: the default of --slo-tpot


def quantile(values, q):
    """By linear interpolation between order statistics; None of nothing."""
    values = sorted(v for v in values if v is not None)
    if not values:
        return None
    at = q * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def level_of(sample):
    return sample["controller"]["target_level"]


def back_at_zero(samples, after):
    """Seconds from `after` until new requests start at level 0 and go on doing so; None if they never do."""
    later = [s for s in samples if s["time"] >= after]
    if not later or level_of(later[-1]) != 0:
        return None
    since = later[-1]["time"]
    for sample in reversed(later):
        if level_of(sample) != 0:
            break
        since = sample["time"]
    return max(0.0, since - after)


def figures(records, samples):
    """Of one run's burst, and of the way back from it."""
    burst = [r for r in records if r["phase"] == "burst"]
    good = [r for r in burst if r["ok"]]
    begin = min((r["due"] for r in burst), default=0.0)
    end = max((r["done"] for r in good), default=begin)
    seconds = max(end - begin, 1e-9)
    read = sum(r["prompt_tokens"] for r in good)
    written = sum(r["completion_tokens"] for r in good)
    return {
        "requests": len(burst),
        "finished": len(good),
        "refused": sum(r["status"] in (429, 503) for r in burst),
        "failed": sum(not r["ok"] and r["status"] not in (429, 503) for r in burst),
        "seconds": seconds,
        "prompt_tokens": read,
        "cached_tokens": sum(r["cached_tokens"] for r in good),
        "generated_tokens": written,
        "tokens_per_second": (read + written) / seconds,
        "generated_per_second": written / seconds,
        "ttft_p50": quantile([r["ttft"] for r in good], 0.5),
        "ttft_p95": quantile([r["ttft"] for r in good], 0.95),
        "tpot_p50": quantile([r["tpot"] for r in good], 0.5),
        "tpot_p95": quantile([r["tpot"] for r in good], 0.95),
        "tpot_within": sum(r["tpot"] is None or r["tpot"] <= TPOT_TARGET for r in good),
        "e2e_p50": quantile([r["done"] - r["due"] for r in good], 0.5),
        "e2e_p95": quantile([r["done"] - r["due"] for r in good], 0.95),
        "peak_level": max((level_of(s) for s in samples), default=0),
        "raises": samples[-1]["totals"]["raises"] if samples else 0,
        "preemptions": samples[-1]["totals"]["preemptions"] if samples else 0,
        "back_at_zero_seconds": back_at_zero(samples, end),
    }


def number(value, digits=1, unit=""):
    return "–" if value is None else f"{value:.{digits}f}{unit}"


ROWS = (
    ("burst finished after, s", lambda f: number(f["seconds"])),
    ("tokens/s, read and written", lambda f: number(f["tokens_per_second"], 0)),
    ("tokens/s, written", lambda f: number(f["generated_per_second"])),
    ("TTFT p50, s", lambda f: number(f["ttft_p50"], 2)),
    ("TTFT p95, s", lambda f: number(f["ttft_p95"], 2)),
    ("TPOT p50, ms", lambda f: number(f["tpot_p50"] and f["tpot_p50"] * 1e3, 0)),
    ("TPOT p95, ms", lambda f: number(f["tpot_p95"] and f["tpot_p95"] * 1e3, 0)),
    (f"TPOT within {TPOT_TARGET * 1e3:.0f} ms", lambda f: f"{f['tpot_within']} of {f['finished']}"),
    ("finished of sent", lambda f: f"{f['finished']} of {f['requests']}"),
    ("refused", lambda f: str(f["refused"])),
    ("failed", lambda f: str(f["failed"])),
    ("prompt from the prefix cache", lambda f: f"{100 * f['cached_tokens'] / max(1, f['prompt_tokens']):.0f}%"),
    ("highest level", lambda f: str(f["peak_level"])),
    ("raises of running requests", lambda f: str(f["raises"])),
    ("pre-emptions", lambda f: str(f["preemptions"])),
    ("back at level 0 after, s", lambda f: number(f["back_at_zero_seconds"])),
)


def table(names, all_figures, markdown=False, rows=None):
    """One column per run, the first being what the others stand beside. rows: titles, when not all."""
    chosen = [(title, cell) for title, cell in ROWS if rows is None or title in rows]
    lines = [["", *names]] + [[title, *(cell(f) for f in all_figures)] for title, cell in chosen]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = []
    for index, line in enumerate(lines):
        cells = [line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])]
        out.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
        if index == 0 and markdown:
            out.append("| " + " | ".join(["---"] + ["---:"] * len(names)) + " |")
    return "\n".join(out)


def bandwidth_lines(bench):
    """Level 0's decode rate of one sequence beside the machine's limit, from `dsla bench --format json`."""
    level = next(row for row in bench["levels"] if row["level"] == 0)
    limit = bench["read_bytes_per_second"] / level["decode_bytes"]
    return (
        f"Level 0 alone, one sequence after {bench['tokens']} tokens: {level['decode_tokens_per_second']:.1f} tokens/s written, "
        f"{100 * level['decode_share_of_bandwidth']:.0f}% of the {limit:.1f} tokens/s that memory allows\n"
        f"({level['decode_bytes'] / 1e6:.0f} MB per token at {bench['read_bytes_per_second'] / 1e9:.1f} GB/s); "
        f"{level['prefill_tokens_per_second']:.0f} tokens/s read, {100 * level['prefill_share_of_gemm']:.0f}% of the machine's GEMM rate."
    )
