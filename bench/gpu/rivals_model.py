#!/usr/bin/env python3
"""Times Hugging Face transformers on a Llama of random weights, on the same card: a decode step of N sequences at given
contexts by generate() with a static cache, which compiles it and replays CUDA graphs (its fastest documented form), and a
whole prompt with SDPA. What `dsla bench --random-weights` is measured beside.

Usage: rivals_model.py CONFIG.json [--context N ...] [--batch N ...] [--prefill T ...]
(needs PyTorch with CUDA and transformers)
"""

import argparse
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def median_ms(run, repeats):
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def decode_ms(model, batch, context):
    """Of one step: the difference between a long and a short reply."""
    prompt = torch.randint(10, 30000, (batch, context), device="cuda")

    def reply(tokens):
        begin = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            cache_implementation="static",
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    short, long = 16, 80
    reply(long)  # compiles
    return 1e3 * statistics.median(reply(long) - reply(short) for _ in range(3)) / (long - short)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--context", type=int, nargs="*", default=[])
    parser.add_argument("--batch", type=int, nargs="*", default=[1])
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.config)
    torch.set_default_device("cuda")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    torch.set_default_device("cpu")
    with torch.inference_mode():
        for tokens in args.prefill:
            prompt = torch.ones((1, tokens), dtype=torch.long, device="cuda")

            def read():
                model(input_ids=prompt, use_cache=True, logits_to_keep=1)

            read()
            print(f"prefill {tokens}: {median_ms(read, 3):.1f} ms", flush=True)
        for batch in args.batch:
            for context in args.context:
                try:
                    print(f"decode N {batch} context {context}: {decode_ms(model, batch, context):.2f} ms", flush=True)
                except RuntimeError as error:
                    print(f"decode N {batch} context {context}: {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
