// dsla run: one prompt, or a conversation in the terminal.
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "base/mapped_file.h"
#include "cli/commands.h"
#include "cli/reply.h"
#include "cli/sampling_args.h"
#include "engine/prompt.h"
#include "grammar/grammar.h"

namespace dsla {
namespace {

struct RunArgs {
  ModelArgs model;
  std::vector<std::string> prompt;
  std::string file;
  std::string system;
  std::string chat_template;
  bool chat = false;
  bool raw = false;
  bool no_thinking = false;
  std::string tier = "full";
  int level = 0;
  std::vector<std::string> raise_at;
  int max_tokens = 256;
  int prefill_chunk = 512;
  bool ignore_eos = false;
  std::string json_schema, grammar;  // paths
  SamplingArgs sampling;
  std::vector<std::string> logit_bias;
  bool stats = false;
  bool json = false;
};

// `form`, "TOKEN:LEVEL" or "ID:BIAS" -> the two numbers.
template <typename A, typename B>
Status ParsePair(const char* option, const char* form, const std::string& text, A& a, B& b) {
  const size_t colon = text.find(':');
  if (colon != std::string::npos) {
    const char* begin = text.data();
    const auto left = std::from_chars(begin, begin + colon, a);
    const auto right = std::from_chars(begin + colon + 1, begin + text.size(), b);
    if (left.ec == std::errc() && left.ptr == begin + colon && right.ec == std::errc() &&
        right.ptr == begin + text.size()) {
      return Status::Ok();
    }
  }
  return InvalidArgument("{}: '{}' is not of the form {}", option, text, form);
}

// What to answer: the file's text, then the prompt given as words; or standard input when neither
// is given.
Expected<std::string> ReadPrompt(const RunArgs& args) {
  constexpr size_t kMaxPromptBytes = size_t{64} << 20;
  std::string text;
  std::error_code absent;  // reading it says so
  const bool from_stdin = args.file == "-" || (args.file.empty() && args.prompt.empty());
  if (from_stdin) {
    if (args.file.empty() && ::isatty(STDIN_FILENO) != 0) {
      return InvalidArgument(
          "no prompt: give it as words, with --file or on standard input, or use --chat");
    }
    text.assign(std::istreambuf_iterator<char>(std::cin), {});
  } else if (std::filesystem::is_fifo(args.file, absent)) {  // such as a shell's <(command) names
    std::ifstream pipe(args.file, std::ios::binary);
    text.assign(std::istreambuf_iterator<char>(pipe), {});
  } else if (!args.file.empty()) {
    DSLA_ASSIGN_OR_RETURN(text, ReadTextFile(args.file, kMaxPromptBytes));
  }
  for (size_t i = 0; i < args.prompt.size(); ++i) {
    text += i > 0 ? " " : (text.empty() ? "" : "\n\n");
    text += args.prompt[i];
  }
  if (text.find_first_not_of(" \t\r\n") == std::string::npos)
    return InvalidArgument("the prompt is empty");
  return text;
}

// What can be said before the model is loaded, which may take long.
Status CheckArgs(const RunArgs& args) {
  if (args.chat && args.file == "-")
    return InvalidArgument("--chat: reads what is said from standard input, so not '--file -'");
  for (const auto& [given, name] : {std::pair(args.raw, "--raw"), std::pair(args.json, "--json")}) {
    if (args.chat && given) return InvalidArgument("{} does not go with --chat", name);
  }
  for (const auto& [given, name] : {std::pair(!args.system.empty(), "--system"),
                                    std::pair(!args.chat_template.empty(), "--chat-template"),
                                    std::pair(args.no_thinking, "--no-thinking")}) {
    if (args.raw && given)
      return InvalidArgument("{} does not go with --raw, which has no chat template", name);
  }
  if (!args.json_schema.empty() && !args.grammar.empty())
    return InvalidArgument("--json-schema does not go with --grammar");
  if (args.tier != "full" && args.tier != "auto" && args.tier != "economy")
    return InvalidArgument("--tier: '{}' is not one of full, auto, economy", args.tier);
  if (args.prefill_chunk < 1)
    return InvalidArgument("--prefill-chunk: {} is not positive", args.prefill_chunk);
  if (args.max_tokens < 0) return InvalidArgument("--max-tokens: {} is negative", args.max_tokens);
  if (!args.chat_template.empty())
    DSLA_RETURN_IF_ERROR(ChatTemplateByName(args.chat_template).status());
  return Validate(args.sampling.params, 0);  // --logit-bias is not part of it yet
}

// The template for the model's conversations, or none for plain completion.
Expected<std::optional<PromptTemplate>> ChooseTemplate(const RunArgs& args,
                                                       const LoadedModel& loaded) {
  if (args.raw) return std::optional<PromptTemplate>();
  if (!args.chat_template.empty()) {
    DSLA_ASSIGN_OR_RETURN(ChatTemplate named, ChatTemplateByName(args.chat_template));
    return std::optional<PromptTemplate>(std::move(named));
  }
  const std::string source = loaded.file->chat_template();
  if (source.empty()) return std::optional<PromptTemplate>();
  DSLA_ASSIGN_OR_RETURN(PromptTemplate chosen, ChoosePromptTemplate(source));
  return std::optional<PromptTemplate>(std::move(chosen));
}

Expected<SessionOptions> ChooseLevel(const RunArgs& args, const LoadedModel& loaded) {
  SessionOptions options;
  options.prefill_chunk = args.prefill_chunk;
  const AdapterInfo* adapter = loaded.model->adapter();
  const int top = adapter == nullptr ? 0 : adapter->top_level;
  if (args.tier != "full" && adapter == nullptr) {
    return InvalidArgument("--tier {}: '{}' has no adapter, so only tier full", args.tier,
                           loaded.file->path());
  }
  options.level = args.tier == "economy" ? top : args.level;
  options.auto_raise = args.tier == "auto";
  options.auto_top_level = top;
  const int max = loaded.model->max_level();
  if (options.level < 0 || options.level > max) {
    return max == 0
               ? InvalidArgument("--level {}: '{}' has no adapter, so only level 0", options.level,
                                 loaded.file->path())
               : InvalidArgument("--level {}: the adapter has levels 0 to {}", options.level, max);
  }
  return options;
}

// What the reply is to follow, or nothing.
Expected<std::shared_ptr<const Grammar>> MakeGrammar(const RunArgs& args,
                                                     const LoadedModel& loaded) {
  std::shared_ptr<const Grammar> grammar;
  if (args.json_schema.empty() && args.grammar.empty()) return grammar;
  const bool schema = !args.json_schema.empty();
  const char* const option = schema ? "--json-schema" : "--grammar";
  GrammarSpec spec{.kind = schema ? GrammarSpec::Kind::kJsonSchema : GrammarSpec::Kind::kEbnf};
  const GrammarOptions options;
  DSLA_ASSIGN_OR_RETURN(
      spec.text, ReadTextFile(schema ? args.json_schema : args.grammar, options.max_text_bytes));
  const auto compiler =
      GrammarCompiler::Create(*loaded.tokenizer, loaded.model->config().V, options);
  auto compiled = compiler->Compile(spec);
  if (!compiled.ok())
    return Error(compiled.status().code(), "{}: {}", option, compiled.status().message());
  return compiled;
}

Expected<GenerateOptions> MakeGenerateOptions(const RunArgs& args, const LoadedModel& loaded) {
  GenerateOptions options;
  options.sampling = args.sampling.With(loaded.model->config().sampling);
  for (const std::string& text : args.logit_bias) {
    int32_t id = 0;
    float bias = 0;
    DSLA_RETURN_IF_ERROR(ParsePair("--logit-bias", "ID:BIAS", text, id, bias));
    options.sampling.logit_bias.emplace_back(id, bias);
  }
  DSLA_RETURN_IF_ERROR(Validate(options.sampling, loaded.model->config().V));
  options.max_tokens = args.max_tokens;
  DSLA_ASSIGN_OR_RETURN(options.grammar, MakeGrammar(args, loaded));
  if (!args.ignore_eos) {
    options.stop_ids = loaded.model->config().eos_ids;
    if (const auto eos = loaded.tokenizer->eos_id()) options.stop_ids.push_back(*eos);
  }
  for (const std::string& text : args.raise_at) {
    GenerateOptions::Raise raise{};
    DSLA_RETURN_IF_ERROR(
        ParsePair("--raise-at", "TOKEN:LEVEL", text, raise.after_tokens, raise.level));
    if (raise.level < 0 || raise.level > loaded.model->max_level()) {
      return InvalidArgument("--raise-at {}: levels are 0 to {}", text, loaded.model->max_level());
    }
    if (raise.after_tokens < 0)
      return InvalidArgument("--raise-at {}: the token count is negative", text);
    options.raises.push_back(raise);
  }
  std::stable_sort(options.raises.begin(), options.raises.end(),
                   [](const auto& a, const auto& b) { return a.after_tokens < b.after_tokens; });
  return options;
}

Expected<std::vector<int32_t>> EncodePrompt(const RunArgs& args, const LoadedModel& loaded,
                                            const std::optional<PromptTemplate>& chat_template,
                                            const std::vector<ChatMessage>& messages) {
  if (!chat_template) return loaded.tokenizer->Encode(messages.back().content);
  return EncodeChat(*loaded.tokenizer, *chat_template, messages,
                    {.enable_thinking = !args.no_thinking});
}

constexpr char kChatHelp[] =
    "/level N  raise the running conversation to level N      /stats  figures of the last answer\n"
    "/clear    start over                                     /quit   leave (or Ctrl-D)\n";

// "/level N": raises the conversation, and says where it stands.
void RaiseTo(const std::string& line, Session* session) {
  const char* const end = line.data() + line.size();
  const char* const number = line.data() + std::min(line.size(), std::strlen("/level "));
  int level = 0;
  const auto [rest, error] = std::from_chars(number, end, level);
  if (session == nullptr || error != std::errc() || rest != end) {
    fmt::print(stderr, "/level takes a number, once the conversation has begun\n");
    return;
  }
  const Status raised = session->Raise(level);
  fmt::print(stderr, "{}\n", raised.ok() ? fmt::format("level {}", level) : raised.message());
}

// The terminal conversation: each turn continues the cached one. `first` is the first turn's text;
// empty: it is asked for.
Status Chat(const RunArgs& args, const LoadedModel& loaded, const std::string& first,
            const SessionOptions& session_options, const GenerateOptions& generate_options) {
  DSLA_ASSIGN_OR_RETURN(const auto chat_template, ChooseTemplate(args, loaded));
  if (!chat_template)
    return InvalidArgument("--chat: '{}' has no chat template; name one with --chat-template",
                           loaded.file->path());
  DSLA_ASSIGN_OR_RETURN(CachePool pool, loaded.NewPool());
  std::unique_ptr<Session> session;
  std::vector<ChatMessage> messages;
  Reply reply;
  const auto clear = [&] {
    session.reset();
    messages.clear();
    if (!args.system.empty()) messages.push_back({"system", args.system});
  };
  const auto say = [&](const std::string& text) -> Status {
    messages.push_back({"user", text});
    DSLA_ASSIGN_OR_RETURN(const auto prompt, EncodePrompt(args, loaded, chat_template, messages));
    auto answer = Answer(loaded, pool, session, session_options, prompt, generate_options,
                         /*chat=*/true, /*stream=*/true);
    if (!answer.ok()) {
      fmt::print(stderr, "{} (/clear starts over)\n", answer.status().message());
      messages.pop_back();
      return Status::Ok();
    }
    reply = std::move(answer).value();
    messages.push_back({"assistant", reply.text});
    if (args.stats) PrintStats(loaded, *session, reply);
    return Status::Ok();
  };
  clear();
  fmt::print(stderr, "{}, level {} of {}. /help lists the commands.\n", loaded.model->config().name,
             session_options.level, loaded.model->max_level());
  if (!first.empty()) DSLA_RETURN_IF_ERROR(say(first));
  for (std::string line;;) {
    fmt::print(stderr, "> ");
    if (!std::getline(std::cin, line)) break;
    if (line.empty()) continue;
    if (line == "/quit") break;
    if (line == "/help") {
      fmt::print(stderr, "{}", kChatHelp);
    } else if (line == "/clear") {
      clear();
    } else if (line == "/stats") {
      if (session != nullptr) PrintStats(loaded, *session, reply);
    } else if (line == "/level" || line.starts_with("/level ")) {
      RaiseTo(line, session.get());
    } else if (line.front() == '/') {
      fmt::print(stderr, "no such command: {}\n{}", line, kChatHelp);
    } else {
      DSLA_RETURN_IF_ERROR(say(line));
    }
  }
  return Status::Ok();
}

Status Run(const RunArgs& args) {
  DSLA_RETURN_IF_ERROR(CheckArgs(args));
  std::string text;
  if (!args.chat || !args.file.empty() || !args.prompt.empty()) {
    DSLA_ASSIGN_OR_RETURN(text, ReadPrompt(args));
  }
  DSLA_ASSIGN_OR_RETURN(const LoadedModel loaded,
                        LoadModel(args.model, /*sequences=*/1, args.prefill_chunk));
  DSLA_ASSIGN_OR_RETURN(const SessionOptions session_options, ChooseLevel(args, loaded));
  DSLA_ASSIGN_OR_RETURN(const GenerateOptions generate_options, MakeGenerateOptions(args, loaded));
  if (args.chat) return Chat(args, loaded, text, session_options, generate_options);

  std::vector<ChatMessage> messages;
  if (!args.system.empty()) messages.push_back({"system", args.system});
  messages.push_back({"user", std::move(text)});
  DSLA_ASSIGN_OR_RETURN(const auto chat_template, ChooseTemplate(args, loaded));
  DSLA_ASSIGN_OR_RETURN(const auto prompt, EncodePrompt(args, loaded, chat_template, messages));
  DSLA_ASSIGN_OR_RETURN(CachePool pool, loaded.NewPool());
  std::unique_ptr<Session> session;
  DSLA_ASSIGN_OR_RETURN(const Reply reply,
                        Answer(loaded, pool, session, session_options, prompt, generate_options,
                               /*chat=*/chat_template.has_value(), /*stream=*/!args.json));
  if (args.json) {
    fmt::print("{}\n", ReplyJson(loaded, *session, reply)
                           .dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
  } else if (args.stats) {
    PrintStats(loaded, *session, reply);
  }
  if (reply.result.finish == FinishReason::kCancelled)
    return Status(StatusCode::kCancelled, "interrupted");
  return Status::Ok();
}

void AddSampling(CLI::App& command, RunArgs& args) {
  const auto group = "Sampling";
  args.sampling.params.temperature = 0;  // a plain run answers the same every time
  args.sampling.AddTo(command, group);
  command.add_option("--logit-bias", args.logit_bias, "added to a token's logit; may be repeated")
      ->type_name("ID:BIAS")
      ->allow_extra_args(false)
      ->group(group);
  command
      .add_option("--seed", args.sampling.params.seed, "draws depend on it and the position alone")
      ->check(NotNegative())
      ->capture_default_str()
      ->group(group);
}

}  // namespace

void AddRun(CLI::App& app, Command& chosen) {
  auto args = std::make_shared<RunArgs>();
  CLI::App& command = *app.add_subcommand("run", "answer a prompt, or chat in the terminal");
  command.footer(
      "Examples:\n"
      "  dsla run \"What is the capital of France?\"\n"
      "  dsla run --file report.txt --tier economy --stats \"Summarise this.\"\n"
      "  dsla run --file report.txt --raise-at 20:22 --stats \"Summarise this.\"   (switch layers "
      "in mid-answer)\n"
      "  dsla run --chat");
  const auto group = "Prompt";
  command.add_option("PROMPT", args->prompt, "the prompt; with --file, it follows the file's text")
      ->group(group);
  command
      .add_option("-f,--file", args->file, "read text from a file, or from standard input with '-'")
      ->type_name("PATH")
      ->group(group);
  command.add_option("-s,--system", args->system, "system message")
      ->type_name("TEXT")
      ->group(group);
  command
      .add_flag("--chat", args->chat,
                "converse in the terminal; PROMPT and --file, if given, are the first turn")
      ->group(group);
  command.add_flag("--raw", args->raw, "continue the text as it is, without a chat template")
      ->group(group);
  command
      .add_option("--chat-template", args->chat_template,
                  "use this template instead of the model's own")
      ->type_name("NAME")
      ->group(group);
  command
      .add_flag("--no-thinking", args->no_thinking,
                "let the answer begin at once where the model may think before it (Qwen3)")
      ->group(group);

  const auto levels = "Level";
  auto* level =
      command.add_option("-l,--level", args->level, "how many layers run as DSLA from the start")
          ->type_name("N")
          ->capture_default_str()
          ->group(levels);
  command
      .add_option("--tier", args->tier,
                  "full (level 0), economy (the adapter's top level), or auto (rises only when "
                  "--memory is used up)")
      ->type_name("TIER")
      ->capture_default_str()
      ->excludes(level)
      ->group(levels);
  command
      .add_option("--raise-at", args->raise_at,
                  "raise to LEVEL after TOKEN generated tokens; may be repeated")
      ->type_name("TOKEN:LEVEL")
      ->allow_extra_args(false)
      ->group(levels);

  const auto output = "Output";
  command.add_option("-n,--max-tokens", args->max_tokens, "longest reply in tokens")
      ->type_name("N")
      ->capture_default_str()
      ->group(output);
  command.add_flag("--ignore-eos", args->ignore_eos, "do not stop at the model's end token")
      ->group(output);
  command
      .add_option("--json-schema", args->json_schema,
                  "the reply is JSON that this schema describes")
      ->type_name("PATH")
      ->group(output);
  command
      .add_option("--grammar", args->grammar,
                  "the reply follows this grammar, in the EBNF of llama.cpp")
      ->type_name("PATH")
      ->group(output);
  command
      .add_flag("--stats", args->stats,
                "print times, rates, cache bytes and levels to standard error")
      ->group(output);
  command.add_flag("--json", args->json, "print one JSON object instead of streaming text")
      ->group(output);
  AddSampling(command, *args);
  args->model.AddTo(command);
  command.add_option("--prefill-chunk", args->prefill_chunk, "prompt tokens per step")
      ->type_name("N")
      ->capture_default_str()
      ->group("Model");

  command.callback([args, &chosen] {
    chosen = [args] {
      const Status status = Run(*args);
      return status.ok() ? 0 : Fail(status);
    };
  });
}

}  // namespace dsla
