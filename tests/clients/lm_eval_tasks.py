"""Tasks of our own for lm-evaluation-harness, one of each kind that a completions server meets."""

import json
import pathlib

CHOICES = [
    ("The capital of France is", ["Paris", "London", "Madrid", "Rome"], 0),
    ("The opposite of hot is", ["warm", "cold", "sunny", "dry"], 1),
    ("A triangle has", ["two sides", "three sides", "four sides", "nine sides"], 1),
    ("Water freezes at a temperature of zero degrees", ["Fahrenheit", "Kelvin", "Celsius", "north"], 2),
    ("The sun rises in the", ["west", "north", "south", "east"], 3),
    ("Cows give us", ["milk", "wool", "honey", "silk"], 0),
    ("The planet closest to the sun is", ["Venus", "Mercury", "Mars", "Jupiter"], 1),
    ("Two plus two equals", ["three", "five", "four", "seven"], 2),
    ("The author of Romeo and Juliet is William", ["Wordsworth", "Blake", "Faulkner", "Shakespeare"], 3),
    ("Bees make", ["honey", "milk", "cheese", "wine"], 0),
    ("A year has twelve", ["weeks", "months", "days", "hours"], 1),
    ("The largest ocean is the", ["Atlantic", "Arctic", "Pacific", "Indian"], 2),
]
ENDINGS = [
    ("Once upon a time there was a little girl who lived in a small house at the edge of the", "forest"),
    ("The doctor looked at the patient and said that he should stay in", "bed"),
    ("She opened the book and began to", "read"),
    ("He was so hungry that he ate the whole", "cake"),
    ("In the morning they had bread and butter for", "breakfast"),
    ("The dog wagged its", "tail"),
    ("The children went to school by", "bus"),
    ("The naïve café owner served crème brûlée and a cup of", "coffee"),
]
BEGINNINGS = [
    ("The days of the week are Monday, Tuesday,", "Wednesday"),
    ("1, 2, 3, 4, 5,", "6"),
    ("The capital of France is", "Paris"),
    ("January, February, March,", "April"),
]
NAMES = ("dsla_choices", "dsla_endings", "dsla_answers")


def tasks(folder):
    """The tasks as configurations that lm_eval.simple_evaluate takes; their data go into `folder`."""

    def data(name, rows):
        path = pathlib.Path(folder) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}

    mean = {"aggregation": "mean", "higher_is_better": True}
    return [
        {
            **data("dsla_choices", [{"text": t, "choices": c, "answer": a} for t, c, a in CHOICES]),
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        {
            **data("dsla_endings", [{"text": t, "ending": e} for t, e in ENDINGS]),
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{' ' + ending}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", **mean},
            ],
        },
        {
            **data("dsla_answers", [{"text": t, "answer": a} for t, a in BEGINNINGS]),
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [",", ".", "\n"], "max_gen_toks": 8, "temperature": 0.0, "do_sample": False},
            "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    ]


def summary(results):
    """What is compared: scores, and of every example the log-likelihoods or the text."""
    samples = {}
    for name in NAMES:
        samples[name] = []
        for sample in sorted(results["samples"][name], key=lambda one: one["doc_id"]):
            replies = sample["filtered_resps"]
            samples[name].append([r if isinstance(r, str) else [float(r[0]), str(r[1]) == "True"] for r in replies])
    scores = {
        name: {key: value for key, value in results["results"][name].items() if isinstance(value, float) and "stderr" not in key}
        for name in NAMES
    }
    return {"scores": scores, "samples": samples}
