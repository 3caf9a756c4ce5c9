#!/usr/bin/env python3
"""Writes lm_eval_reference.json: the tasks of lm_eval_tasks.py by lm-evaluation-harness's own transformers backend, in fp32,
on the same model file. Run by hand where torch, transformers, gguf and lm_eval are installed."""

import argparse
import json
import pathlib
import tempfile

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM

import lm_eval_tasks


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path, help="the GGUF file")
    arguments = parser.parse_args()
    folder, name = str(arguments.model.parent), arguments.model.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    backend = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1, dtype="float32")
    with tempfile.TemporaryDirectory() as data:
        results = lm_eval.simple_evaluate(model=backend, tasks=lm_eval_tasks.tasks(data), bootstrap_iters=0)
    reference = {"lm_eval": lm_eval.__version__, "transformers": transformers.__version__, **lm_eval_tasks.summary(results)}
    path = pathlib.Path(__file__).parent / "lm_eval_reference.json"
    path.write_text(json.dumps(reference, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(reference["scores"], indent=1))


if __name__ == "__main__":
    main()
