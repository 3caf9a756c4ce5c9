// The program as a user meets it: what it answers, and that bad input gets one clear line and exit
// code 2.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "format/adapter.h"
#include "format/model_file.h"
#include "model/testing/small_models.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
using testing::Not;
using testing_models::DataPath;

struct Outcome {
  int exit_code = -1;
  std::string out;  // standard output
  std::string err;  // standard error
};

std::string ReadAll(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

class CliTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) /
              testing::UnitTest::GetInstance()->current_test_info()->name();
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    model_ = MakeModel("model");
    adapter_ = (folder_ / "adapter.safetensors").string();
    WriteAdapter(/*top_level=*/2);
  }

  void WriteAdapter(int top_level) {
    auto file = ModelFile::Open(model_);
    ASSERT_TRUE(file.ok()) << file.status().message();
    Adapter adapter = *testing_models::RandomAdapter((*file)->config(), {}, 5);
    adapter.base_fingerprint = (*file)->Fingerprint().value();
    adapter.base_name = "small";
    adapter.top_level = top_level;
    const Status saved = SaveAdapter(adapter, adapter_);
    ASSERT_TRUE(saved.ok()) << saved.message();
  }

  // A small random model with a tokenizer of single printable characters.
  std::string MakeModel(const std::string& name) {
    const fs::path to = folder_ / name;
    fs::create_directories(to);
    for (const char* file : {"config.json", "model.safetensors"}) {
      fs::copy_file(DataPath("models/smollm2/") + file, to / file);
      fs::permissions(to / file, fs::perms::owner_write, fs::perm_options::add);
    }
    nlohmann::json vocabulary;
    for (char c = '!'; c <= '~'; ++c) vocabulary[std::string(1, c)] = c - '!';
    vocabulary["\u0120"] = 94;
    vocabulary["th"] = 95;
    const nlohmann::json tokenizer = {
        {"version", "1.0"},
        {"added_tokens", nlohmann::json::array()},
        {"normalizer", nullptr},
        {"pre_tokenizer",
         {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", true}}},
        {"post_processor", nullptr},
        {"decoder",
         {{"type", "ByteLevel"},
          {"add_prefix_space", true},
          {"trim_offsets", true},
          {"use_regex", true}}},
        {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", {"t h"}}}}};
    std::ofstream(to / "tokenizer.json") << tokenizer.dump();
    return to.string();
  }

  Outcome Dsla(const std::string& arguments, const std::string& input = "") {
    const fs::path out = folder_ / "out", err = folder_ / "err", in = folder_ / "in";
    std::ofstream(in) << input;
    const std::string command = program_ + " " + arguments + " <" + in.string() + " >" +
                                out.string() + " 2>" + err.string();
    const int status = std::system(command.c_str());
    return {.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1,
            .out = ReadAll(out),
            .err = ReadAll(err)};
  }

  std::string Model() const {
    return "--model " + model_ + " --adapter " + adapter_ + " --threads 2 ";
  }

  // One line that contains `message`, nothing on standard output, exit code 2.
  void ExpectRefused(const std::string& arguments, const std::string& message,
                     const std::string& input = "") {
    SCOPED_TRACE(arguments);
    const Outcome outcome = Dsla(arguments, input);
    EXPECT_EQ(outcome.exit_code, 2) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    EXPECT_THAT(outcome.err, HasSubstr(message));
    EXPECT_THAT(outcome.err, testing::StartsWith("dsla: "));
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
  }

  fs::path folder_;
  std::string program_ = DSLA_PROGRAM, model_, adapter_;
};

TEST_F(CliTest, RunsAtEveryLevelAndRaisesInMidAnswer) {
  const Outcome zero = Dsla("run " + Model() + "--json -n 12 the_quick_brown_fox");
  ASSERT_EQ(zero.exit_code, 0) << zero.err;
  const auto json = nlohmann::json::parse(zero.out);
  EXPECT_EQ(json["level"], 0);
  EXPECT_EQ(json["usage"]["prompt_tokens"], 18);
  EXPECT_EQ(json["stats"]["cache_bytes"]["states"], 0);

  const Outcome raised =
      Dsla("run " + Model() +
           "--json --ignore-eos -n 12 --raise-at 4:1 --raise-at 6:2 the_quick_brown_fox");
  ASSERT_EQ(raised.exit_code, 0) << raised.err;
  const auto changes = nlohmann::json::parse(raised.out)["level_changes"];
  ASSERT_EQ(changes.size(), 2u);
  EXPECT_EQ(changes[0]["position"], 18 + 3);
  EXPECT_EQ(changes[1]["to"], 2);
  EXPECT_EQ(nlohmann::json::parse(raised.out)["usage"]["completion_tokens"], 12);

  // A raise at the very start is the level from there on.
  const auto tokens = [&](const std::string& arguments) {
    const Outcome outcome =
        Dsla("run " + Model() + "--json --ignore-eos -n 8 " + arguments + " abc");
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return nlohmann::json::parse(outcome.out)["tokens"];
  };
  EXPECT_EQ(tokens("--tier economy"), tokens("--level 2"));
}

// Where the tokenizer puts a space before the first word of a text, what goes on from a prompt
// keeps its own; the answer of a conversation begins without one.
TEST_F(CliTest, RawTextKeepsTheSpaceBeforeTheReply) {
  const std::string path = model_ + "/tokenizer.json";
  nlohmann::json tokenizer = nlohmann::json::parse(ReadAll(path));
  nlohmann::json& vocabulary = tokenizer["model"]["vocab"];
  vocabulary.erase("\u0120");
  vocabulary["\u2581"] = 94;
  tokenizer["pre_tokenizer"] = {{"type", "Metaspace"},
                                {"replacement", "\u2581"},
                                {"prepend_scheme", "always"},
                                {"split", true}};
  tokenizer["decoder"] = {{"type", "Metaspace"},
                          {"replacement", "\u2581"},
                          {"prepend_scheme", "always"},
                          {"split", true}};
  std::ofstream(path) << tokenizer.dump();
  const auto text = [&](const std::string& arguments) {
    const Outcome outcome =
        Dsla("run " + Model() + "--json --ignore-eos -n 2 --logit-bias 94:100 " + arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return nlohmann::json::parse(outcome.out)["text"].get<std::string>();
  };
  EXPECT_EQ(text("--raw abc"), "  ");
  EXPECT_EQ(text("--chat-template chatml abc"), " ");
}

TEST_F(CliTest, SamplingIsReproducible) {
  const auto text = [&](int seed) {
    return Dsla("run " + Model() + "--ignore-eos -n 16 --temperature 1 --seed " +
                std::to_string(seed) + " abc")
        .out;
  };
  EXPECT_EQ(text(1), text(1));
  EXPECT_NE(text(1), text(2));
}

TEST_F(CliTest, ReadsTextFromAFileAndFromStandardInput) {
  std::ofstream(folder_ / "text.txt") << "hello";
  const auto run = [&](const std::string& arguments, const std::string& input) {
    return Dsla("run " + Model() + "-n 8 --ignore-eos " + arguments, input).out;
  };
  const std::string want = run("hello", "");
  EXPECT_NE(want, "");
  EXPECT_EQ(run("--file " + (folder_ / "text.txt").string(), ""), want);
  EXPECT_EQ(run("--file -", "hello"), want);
  EXPECT_EQ(run("", "hello"), want);
  const fs::path piped = folder_ / "piped";
  const std::string command = "printf hello | " + program_ + " run " + Model() +
                              "-n 8 --ignore-eos --file /dev/stdin >" + piped.string();
  EXPECT_EQ(std::system(command.c_str()), 0);
  EXPECT_EQ(ReadAll(piped), want);
}

TEST_F(CliTest, ControlCEndsItBeforeAnAnswer) {
  // Standard input stays open and says nothing; what SIGINT does not end is killed: 137.
  const std::string in = (folder_ / "fifo").string();
  ASSERT_EQ(::mkfifo(in.c_str(), 0600), 0);
  const auto interrupted = [&](const std::string& arguments) {
    const std::string command = "exec 3<>" + in +
                                "; env --default-signal=INT timeout -s INT -k 3 0.5 " + program_ +
                                " run " + arguments + " <&3 >/dev/null 2>&1";
    const int status = std::system(command.c_str());
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  };
  EXPECT_EQ(interrupted("--file -"), 124);
  EXPECT_EQ(interrupted(Model() + "--chat --chat-template chatml"), 124);
}

TEST_F(CliTest, TheModelsAdviceIsTheDefaultOfSampling) {
  const auto tokens = [&](const std::string& arguments) {
    const Outcome outcome =
        Dsla("run " + Model() + "--json --ignore-eos -n 16 " + arguments + " abc");
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return nlohmann::json::parse(outcome.out)["text"].dump();
  };
  const std::string greedy = tokens("");
  const std::string drawn = tokens("--temperature 3 --top-k 50");
  EXPECT_NE(drawn, greedy);
  std::ofstream(fs::path(model_) / "generation_config.json")
      << R"({"do_sample": true, "temperature": 3, "top_k": 50})";
  EXPECT_EQ(tokens(""), drawn);
  EXPECT_EQ(tokens("--generation-config none"), greedy);
  EXPECT_EQ(tokens("--temperature 0"), greedy) << "what is given goes before it";
  EXPECT_THAT(Dsla("inspect " + model_).out, HasSubstr("sampling       temperature 3, top_k 50\n"));
  EXPECT_EQ(nlohmann::json::parse(Dsla("inspect --json " + model_).out)["sampling"]["top_k"], 50);
  std::ofstream(fs::path(model_) / "generation_config.json") << R"({"top_p": 2})";
  ExpectRefused("run " + Model() + "abc", "generation_config.json': top_p is 2, not in (0, 1]");
}

TEST_F(CliTest, InspectShowsModelAndAdapter) {
  const Outcome outcome = Dsla("inspect --json --tensors " + model_ + " --adapter " + adapter_);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  EXPECT_EQ(json["layers"], 2);
  EXPECT_EQ(json["levels"].size(), 3u);
  EXPECT_EQ(json["adapter"]["ladder"], (std::vector<int>{1, 0}));
  EXPECT_GT(json["tensors"].size(), 10u);
  EXPECT_THAT(Dsla("inspect " + model_ + " --adapter " + adapter_).out, HasSubstr("break-even"));
}

TEST_F(CliTest, EvalAndBenchMeasure) {
  std::ofstream data(folder_ / "data.jsonl");
  for (int i = 0; i < 3; ++i)
    data << nlohmann::json{{"text", std::string(100, static_cast<char>('a' + i))}}.dump() << "\n";
  data.close();
  const Outcome eval = Dsla("eval " + Model() + "--data " + (folder_ / "data.jsonl").string() +
                            " --levels 0,2 --json");
  ASSERT_EQ(eval.exit_code, 0) << eval.err;
  const auto levels = nlohmann::json::parse(eval.out)["levels"];
  EXPECT_NEAR(levels[0]["kl"].get<double>(), 0, 1e-6) << "level 0 against itself";
  EXPECT_GT(levels[1]["kl"].get<double>(), 0);
  EXPECT_EQ(levels[1]["tokens"], 300);
  std::ofstream(folder_ / "text.txt") << std::string(200, 'x');
  const Outcome bench = Dsla("bench " + Model() + "--text " + (folder_ / "text.txt").string() +
                             " --decode 4 --repetitions 1 --format json --kl");
  ASSERT_EQ(bench.exit_code, 0) << bench.err;
  EXPECT_EQ(nlohmann::json::parse(bench.out)["levels"].size(), 2u);
  const std::string depths = "bench " + Model() + "--text " + (folder_ / "text.txt").string() +
                             " --depths 0,70 --prefill 8 --decode 2 --repetitions 1 --format ";
  const auto tests = nlohmann::json::parse(Dsla(depths + "json").out)["tests"];
  EXPECT_EQ(tests.size(), 8u) << "prefill and decode at two depths and two levels";
  const auto served = nlohmann::json::parse(Dsla(depths + "json --serve 3").out)["tests"];
  ASSERT_EQ(served.size(), 12u) << "and serving 3 requests at two depths and two levels";
  EXPECT_EQ(served.back()["test"], "serve");
  EXPECT_EQ(served.back()["first_token_seconds"].size(), 3u);
  EXPECT_THAT(Dsla(depths + "text --serve 3").out, HasSubstr("70 + 2"));
  const std::string csv = Dsla(depths + "csv --batch 1,3").out;
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 13) << csv;
  EXPECT_THAT(csv, HasSubstr(",3,0,2,70,1,"));
}

TEST_F(CliTest, EvalMeasuresRecallWritingPositionsAndControls) {
  std::ofstream data(folder_ / "data.jsonl");
  for (int i = 0; i < 3; ++i) {
    std::string text;
    for (int j = 0; j < 300; ++j) text += static_cast<char>('a' + (i + 1) * j * j % 23);
    data << nlohmann::json{{"text", text}}.dump() << "\n";
  }
  data.close();
  const std::string report = (folder_ / "report.html").string(),
                    eval = "eval " + Model() + "--data " + (folder_ / "data.jsonl").string() +
                           " --levels 1,2 --switch-at 0.5,0.25 --by-position --recall "
                           "--recall-gaps 16 --recall-lengths 128 --recall-depths 0,1 "
                           "--recall-texts 1 --generate --generate-prompt 16 --generate-tokens 4 "
                           "--controls window,random-order --report " +
                           report;
  const Outcome json = Dsla(eval + " --json"), again = Dsla(eval + " --json"), text = Dsla(eval);
  ASSERT_EQ(json.exit_code, 0) << json.err;
  EXPECT_EQ(json.out, again.out) << "seeded";
  const auto all = nlohmann::json::parse(json.out);
  for (const char* part : {"levels", "recall", "controls", "generation"})
    EXPECT_TRUE(all.contains(part)) << json.out.substr(0, 2000);
  EXPECT_THAT(text.out, HasSubstr("random-order"));
  EXPECT_THAT(ReadAll(report), HasSubstr("<svg"));
  ExpectRefused("eval --model none --data none --report " + folder_.string() + "/none/report.html",
                "--report: cannot write");
  ExpectRefused("eval " + Model() + "--data " + (folder_ / "data.jsonl").string() + " --levels 9",
                "9");
  ExpectRefused(
      "eval " + Model() + "--data " + (folder_ / "data.jsonl").string() + " --controls best",
      "best");
}

TEST_F(CliTest, HelpNamesEveryCommandAndOption) {
  const Outcome help = Dsla("--help");
  EXPECT_EQ(help.exit_code, 0);
  for (const char* command : {"run", "inspect", "eval", "bench"}) {
    EXPECT_THAT(help.out, HasSubstr(command));
    EXPECT_EQ(Dsla(std::string(command) + " --help").exit_code, 0);
  }
  EXPECT_THAT(Dsla("run --help").out, HasSubstr("--raise-at"));
  EXPECT_THAT(Dsla("serve --help").out, HasSubstr("dsla serve --config"));
}

TEST_F(CliTest, BadOptionsAreNamed) {
  ExpectRefused("", "subcommand is required");
  ExpectRefused("fly", "no command 'fly'");
  ExpectRefused("evaal", "no command 'evaal' (did you mean 'eval'?)");
  ExpectRefused("--no-such-option", "there is no option '--no-such-option' (see dsla --help)");
  ExpectRefused("run --no-such-option x", "'--no-such-option' (see dsla run --help)");
  ExpectRefused("serve --prot 3 --max-runing=4",
                "there is no option '--prot' (did you mean '--port'?) (see dsla serve --help)");
  ExpectRefused("serve -", "there is no option '-' (see");
  ExpectRefused("serve --temp 1", "(did you mean '--temperature'?)");
  ExpectRefused("serve model.gguf",
                "unexpected argument 'model.gguf' (a model is named by --model) (see dsla serve");
  ExpectRefused("bench --txt x", "there is no option '--txt' (did you mean '--text'?)");
  ExpectRefused("distill write --lenght 5", "(did you mean '--length'?) (see dsla distill write");
  ExpectRefused("run --level x abc", "--level = x (see dsla run --help)");
  ExpectRefused("run " + Model() + "--level 3 abc", "--level 3: the adapter has levels 0 to 2");
  ExpectRefused("run " + Model() + "--level -1 abc", "--level -1: the adapter has levels 0 to 2");
  ExpectRefused("run --model " + model_ + " --adapter none --level 1 abc",
                "has no adapter, so only level 0");
  ExpectRefused("run --model " + model_ + " --adapter none --tier economy abc",
                "has no adapter, so only tier full");
  ExpectRefused("run " + Model() + "--tier best abc",
                "--tier: 'best' is not one of full, auto, economy");
  ExpectRefused("run " + Model() + "--raise-at 5 abc",
                "--raise-at: '5' is not of the form TOKEN:LEVEL");
  ExpectRefused("run " + Model() + "--logit-bias 5 abc",
                "--logit-bias: '5' is not of the form ID:BIAS");
  ExpectRefused("run --seed -1 abc", "--seed: -1 is negative (see dsla run --help)");
  ExpectRefused("serve --max-queued-tokens -1", "--max-queued-tokens: -1 is negative");
  ExpectRefused("serve --slo-ttft 0.0005", "--slo-ttft");
  ExpectRefused("bench --text x --prefill-chunk 0", "--prefill-chunk: 0 is not positive");
  ExpectRefused("run " + Model() + "--raise-at 5:9 abc", "--raise-at 5:9: levels are 0 to 2");
  ExpectRefused("run " + Model() + "--temperature -1 abc", "temperature");
  ExpectRefused("run " + Model() + "--top-p 0 abc", "top_p");
  ExpectRefused("run " + Model() + "--memory lots abc",
                "--memory: 'lots' is not a size such as 512M or 2G");
  ExpectRefused("run " + Model() + "--weights int3 abc",
                "--weights: 'int3' is not one of auto, bf16, fp32, fp8, int8, int4");
  ExpectRefused("run " + Model() + "--weights fp8 --device cpu abc",
                "weights in fp8 are for GPUs of compute capability 9.0");
  ExpectRefused("run " + Model() + "--kv int4 abc", "--kv: 'int4' is not one of bf16, fp32, int8");
  ExpectRefused("run " + Model() + "--device tpu abc",
                "--device tpu: not one of auto, cpu, cuda, cuda:N");
  ExpectRefused("run " + Model() + "--device cuda --weights fp32 abc",
                "--device cuda: weights are held in bf16, fp8, int8 or int4 there and the cache in "
                "bf16, not --weights fp32 and --kv bf16");
  ExpectRefused("run --random-weights abc", "--random-weights: needs a config.json as --model");
  ExpectRefused("run " + Model() + "--context 100000 abc",
                "context of 100000 tokens: the model has 512");
  ExpectRefused("run " + Model() + "--chat-template nope abc", "nope");
  ExpectRefused("bench " + Model() + "--text /dev/null --serve 2", "--serve goes with --depths");
  ExpectRefused("run " + Model() + "--simd sse abc", "--simd: 'sse' is not one of auto, avx2");
  ExpectRefused("run " + Model() + "--prefill-chunk 0 abc", "--prefill-chunk: 0 is not positive");
  ExpectRefused("eval " + Model() + "--data " + folder_.string() + "/none.jsonl", "cannot open");
}

TEST_F(CliTest, AFixedLevelMayBeAnyOfTheLadder) {
  WriteAdapter(/*top_level=*/1);
  ExpectRefused("serve " + Model() + "--port 0 --log-level error --policy fixed --level 9",
                "--level: 9 is above the highest level, 2");
}

TEST_F(CliTest, AReplyFollowsAGrammar) {
  const std::string grammar = (folder_ / "digits.gbnf").string();
  std::ofstream(grammar) << "root ::= [0-9]{3}";
  const Outcome reply = Dsla("run " + Model() + "--grammar " + grammar + " -n 12 abc");
  ASSERT_EQ(reply.exit_code, 0) << reply.err;
  EXPECT_THAT(reply.out, testing::MatchesRegex("[0-9][0-9][0-9]\n"));
  std::ofstream(grammar) << "root ::= (";
  ExpectRefused("run " + Model() + "--grammar " + grammar + " abc", "--grammar: EBNF parser error");
  std::ofstream(grammar) << R"({"type":"array","uniqueItems":true})";
  ExpectRefused("run " + Model() + "--json-schema " + grammar + " abc", "'uniqueItems'");
  ExpectRefused("run " + Model() + "--json-schema none abc", "none");
}

// Before the model is opened: a large one takes long.
TEST_F(CliTest, BadOptionsOfRunAreNamedBeforeTheModelIsLoaded) {
  for (const auto& [arguments, message] :
       std::initializer_list<std::pair<const char*, const char*>>{
           {"--tier best", "--tier"},
           {"--chat-template nope", "nope"},
           {"--max-tokens -1", "--max-tokens: -1 is negative"},
           {"--prefill-chunk 0", "--prefill-chunk: 0 is not positive"},
           {"--temperature -1", "temperature"},
           {"--memory lots", "--memory: 'lots'"},
           {"--chat --json", "--json does not go with --chat"},
           {"--chat --raw", "--raw does not go with --chat"},
           {"--raw --system x", "--system does not go with --raw"},
           {"--raw --chat-template chatml", "--chat-template does not go with --raw"},
           {"--raw --no-thinking", "--no-thinking does not go with --raw"},
           {"--json-schema a --grammar b", "--json-schema does not go with --grammar"},
           {"--chat --file -", "--file -"}})
    ExpectRefused("run --model none " + std::string(arguments) + " abc", message);
}

TEST_F(CliTest, AChatMayBeginWithAPrompt) {
  const Outcome chat =
      Dsla("run " + Model() + "--chat --chat-template chatml --ignore-eos -n 4 abc", "def\n");
  ASSERT_EQ(chat.exit_code, 0) << chat.err;
  EXPECT_EQ(std::count(chat.out.begin(), chat.out.end(), '\n'), 2) << "an answer to each";
  const Outcome one = Dsla("run " + Model() + "--chat-template chatml --ignore-eos -n 4 abc");
  EXPECT_THAT(chat.out, testing::StartsWith(one.out));
}

// The reply is the tokens "t", "h"; read as text it is the one token "th", so that the next turn
// does not continue what is cached.
TEST_F(CliTest, AChatKeepsItsLevelWhereItIsReadAnew) {
  const std::string grammar = (folder_ / "th.gbnf").string();
  std::ofstream(grammar) << "root ::= \"th\"";
  const Outcome chat = Dsla("run " + Model() + "--chat --chat-template chatml --stats --grammar " +
                                grammar + " --logit-bias 95:-100",
                            "abc\n/level 2\ndef\n/level\n/level 1\n");
  ASSERT_EQ(chat.exit_code, 0) << chat.err;
  EXPECT_THAT(chat.err, HasSubstr("> level 2\n"));
  EXPECT_THAT(chat.err, HasSubstr("level   2 of 2\n"));
  EXPECT_THAT(chat.err, HasSubstr("/level takes a number"));
  EXPECT_THAT(chat.err, HasSubstr("level 1: the sequence is at 2 and levels only rise"));
}

TEST_F(CliTest, AChatThatIsFullSaysHowToGoOn) {
  const std::string command = "run " + Model() + "--chat --chat-template chatml -n 4 ";
  const Outcome chat = Dsla(command, std::string(600, 'x') + "\n/clear\nabc\n");
  EXPECT_EQ(chat.exit_code, 0);
  EXPECT_THAT(chat.err, HasSubstr("the context holds 512 (/clear starts over)"));
  EXPECT_EQ(chat.out, Dsla(command, "abc\n").out);
}

TEST_F(CliTest, AnAnswerThatRunsOutOfMemoryEndsItsLine) {
  const Outcome outcome = Dsla("run " + Model() + "--memory 64K --ignore-eos -n 400 abc");
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.out, testing::EndsWith("\n"));
  EXPECT_THAT(outcome.err, HasSubstr("(see --memory and --tier auto)"));
  const Outcome raised = Dsla("run " + Model() + "--tier auto --memory 1K abc");
  EXPECT_EQ(raised.exit_code, 2) << raised.out;
  EXPECT_THAT(raised.err, HasSubstr("(see --memory)"));
}

TEST_F(CliTest, BadPromptsAreRefused) {
  ExpectRefused("run " + Model(), "the prompt is empty");
  ExpectRefused("run " + Model(), "the prompt is empty", " \n\t ");
  ExpectRefused("run " + Model() + std::string(600, 'x'),
                "the prompt has 600 tokens; the context holds 512");
  ExpectRefused("run " + Model() + "--memory 64K " + std::string(300, 'x'), "cache memory");
  ExpectRefused("run " + Model() + "--file " + folder_.string() + "/none.txt", "cannot open");
  ExpectRefused("run " + Model() + "--file " + folder_.string(), "is not a regular file");
}

TEST_F(CliTest, BadFilesAreRefused) {
  ExpectRefused("run --model " + folder_.string() + "/none abc", "none");
  ExpectRefused("run --model /dev/null abc", "/dev/null");
  // An adapter of another model, and one that is damaged.
  ExpectRefused("run --model " + model_ + " --adapter " + DSLA_SOURCE_DIR +
                    "/models/smollm2-135m-instruct.dsla.safetensors abc",
                "smollm2-135m-instruct.dsla.safetensors");
  const std::string other = MakeModel("other");
  std::fstream weights(other + "/model.safetensors",
                       std::ios::in | std::ios::out | std::ios::binary);
  weights.seekp(-2, std::ios::end);
  weights.write("\x01\x3f", 2);
  weights.close();
  ExpectRefused("run --model " + other + " --adapter " + adapter_ + " abc", "adapter");
  fs::resize_file(adapter_, fs::file_size(adapter_) / 2);
  ExpectRefused("run " + Model() + "abc", "adapter.safetensors");
  // Damaged models.
  const std::string truncated = MakeModel("truncated");
  fs::resize_file(truncated + "/model.safetensors",
                  fs::file_size(truncated + "/model.safetensors") - 1000);
  ExpectRefused("run --model " + truncated + " abc", "model.safetensors");
  const std::string unknown = MakeModel("unknown");
  std::string config = ReadAll(unknown + "/config.json");
  config.replace(config.find("LlamaForCausalLM"), 16, "GizmoForCausalLM");
  std::ofstream(unknown + "/config.json") << config;
  ExpectRefused("run --model " + unknown + " abc", "GizmoForCausalLM");
  fs::remove(unknown + "/tokenizer.json");
  const std::string plain = MakeModel("no_tokenizer");
  fs::remove(plain + "/tokenizer.json");
  ExpectRefused("run --model " + plain + " abc", "tokenizer.json");
}

// By the library that the program loads for it.
TEST_F(CliTest, TrainsAnAdapterAndRunsIt) {
  const std::string data = (folder_ / "text.txt").string(),
                    config = (folder_ / "config.toml").string(),
                    trained = (folder_ / "trained.safetensors").string(),
                    texts = (folder_ / "texts.jsonl").string();
  std::ofstream text(data);
  for (int i = 0; i < 4000; ++i) text << static_cast<char>('a' + i * i % 13);
  text.close();
  std::ofstream(config) << "[adapter]\nwindow = 8\nsinks = 2\nrank = 2\n"
                           "[data]\nlengths = [64]\nlength_shares = [1.0]\ntokens_per_step = 128\n"
                           "[align]\ntokens = 256\n[order]\nmethod = \"uniform\"\n"
                           "[chain]\ntokens = 256\n"
                           "[evaluate]\nlength = 64\ndocuments = 2\nrecall = 2\n"
                           "[run]\nthreads = 1\n";
  const Outcome distill = Dsla("distill --model " + model_ + " --config " + config + " --data " +
                               data + " --out " + trained);
  ASSERT_EQ(distill.exit_code, 0) << distill.err;
  const Outcome run =
      Dsla("run --model " + model_ + " --adapter " + trained + " --level 2 --json -n 3 abc");
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(nlohmann::json::parse(run.out)["level"], 2);
  const Outcome write = Dsla("distill write --model " + model_ + " --prompts " + data +
                             " --documents 2 --length 40 --out " + texts + " --threads 1");
  ASSERT_EQ(write.exit_code, 0) << write.err;
  EXPECT_THAT(ReadAll(texts), HasSubstr("\"text\""));
}

// Interrupted once, when it has begun: `timeout` would interrupt the program and its process group.
TEST_F(CliTest, AnInterruptedTrainerSaysWhatItDoes) {
  const std::string err = (folder_ / "err").string(), text = (folder_ / "text.txt").string(),
                    command = "env --default-signal=INT " + program_ + " distill write --model " +
                              model_ + " --prompts " + text +
                              " --documents 1000000 --length 40 --batch 2 --threads 1 --out " +
                              (folder_ / "texts.jsonl").string() + " 2>" + err +
                              " & for i in $(seq 3000); do grep -q tokens/s " + err +
                              " && break; sleep 0.1; done; kill -INT $!; wait $!";
  std::ofstream(text) << std::string(4000, 'a');
  const int status = std::system(command.c_str());
  EXPECT_EQ(WEXITSTATUS(status), 130);
  EXPECT_THAT(ReadAll(err), HasSubstr("once more ends it at once"));
  EXPECT_THAT(ReadAll(err), HasSubstr("interrupted after"));
}

// The program without the libraries that belong beside it: it starts, and names what it misses. Not
// below the build's folder, where they are found.
TEST_F(CliTest, NamesTheLibraryThatIsNotThere) {
  std::string alone = (fs::temp_directory_path() / "dsla_alone_XXXXXX").string();
  ASSERT_NE(::mkdtemp(alone.data()), nullptr);
  fs::copy(DSLA_PROGRAM, alone);
  EXPECT_THAT(ReadAll(DSLA_PROGRAM), Not(HasSubstr("libtorch_cpu.so")));  // linked by them alone
  program_ = fs::path(alone) / fs::path(DSLA_PROGRAM).filename();
  EXPECT_EQ(Dsla("inspect " + model_).exit_code, 0);
  ExpectRefused("run " + Model() + "--weights fp32 abc", "'libdsla_gemm.so', which belongs beside");
  std::ofstream(folder_ / "text.txt") << "some text";
  ExpectRefused("distill --model " + model_ + " --data " + (folder_ / "text.txt").string() +
                    " --out " + (folder_ / "trained.safetensors").string(),
                "'libdsla_trainer.so', which belongs beside");
  fs::remove_all(alone);
}

}  // namespace
}  // namespace dsla
