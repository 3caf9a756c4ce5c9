// Tokenizing speed. DSLA_BENCH_TOKENIZER names a tokenizer.json and DSLA_BENCH_TEXT a text;
// without them a small byte-level tokenizer reads generated English-like text.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdlib>
#include <random>

#include "base/mapped_file.h"
#include "format/tokenizer/testing.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {
namespace {

std::string FromFile(const char* variable, std::string fallback) {
  const char* path = std::getenv(variable);
  if (path == nullptr) return fallback;
  auto text = ReadTextFile(path, size_t{1} << 30);
  if (text.ok()) return std::move(text).value();
  std::fprintf(stderr, "%s\n", text.status().message().c_str());
  std::exit(2);
}

// Words of Zipf-like frequency, as in a language.
std::string EnglishLike(size_t bytes) {
  std::mt19937 rng(1);
  std::vector<std::string> words(20000);
  for (std::string& word : words) {
    for (size_t n = 1 + rng() % 4 + rng() % 5; n > 0; --n)
      word.push_back("etaoinshrdlucmwfgypbvkjxqz"[rng() % 26]);
  }
  std::string text;
  while (text.size() < bytes) {
    const double u = static_cast<double>(rng()) / 4294967296.0;
    text += words[static_cast<size_t>(std::pow(static_cast<double>(words.size()), u)) - 1];
    text += rng() % 12 == 0 ? ".\n" : " ";
  }
  return text;
}

std::unique_ptr<Tokenizer> Make() {
  auto data = ParseTokenizerJson(FromFile("DSLA_BENCH_TOKENIZER", testing::ByteLevelJson().dump()),
                                 "bench");
  if (data.ok()) {
    auto tokenizer = Tokenizer::Create(std::move(data).value());
    if (tokenizer.ok()) return std::move(tokenizer).value();
    std::fprintf(stderr, "%s\n", tokenizer.status().message().c_str());
  } else {
    std::fprintf(stderr, "%s\n", data.status().message().c_str());
  }
  std::exit(2);
}

void BM_Load(benchmark::State& state) {
  const std::string json = FromFile("DSLA_BENCH_TOKENIZER", testing::ByteLevelJson().dump());
  for (auto _ : state) benchmark::DoNotOptimize(Make());
  state.SetBytesProcessed(static_cast<int64_t>(json.size()) * state.iterations());
}

void BM_Encode(benchmark::State& state) {
  const auto tokenizer = Make();
  const std::string text = FromFile("DSLA_BENCH_TEXT", EnglishLike(size_t{1} << 20));
  size_t tokens = 0;
  for (auto _ : state) {
    const auto ids = tokenizer->Encode(text);
    tokens = ids->size();
  }
  state.SetBytesProcessed(static_cast<int64_t>(text.size()) * state.iterations());
  state.counters["bytes_per_token"] =
      static_cast<double>(text.size()) / static_cast<double>(tokens);
}

// One word that no pre-tokenizer cuts: the worst case.
void BM_EncodeRun(benchmark::State& state) {
  const auto tokenizer = Make();
  const std::string text(static_cast<size_t>(state.range(0)), 'l');
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer->Encode(text));
  state.SetBytesProcessed(state.range(0) * state.iterations());
}

void BM_Decode(benchmark::State& state) {
  const auto tokenizer = Make();
  const std::string text = FromFile("DSLA_BENCH_TEXT", EnglishLike(size_t{1} << 20));
  const auto ids = tokenizer->Encode(text);
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer->Decode(*ids));
  state.SetBytesProcessed(static_cast<int64_t>(text.size()) * state.iterations());
}

BENCHMARK(BM_Load)->Unit(benchmark::kMillisecond);
BENCHMARK(BM_Encode)->Unit(benchmark::kMillisecond);
BENCHMARK(BM_EncodeRun)->Range(1 << 12, 1 << 20)->Unit(benchmark::kMillisecond);
BENCHMARK(BM_Decode)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace dsla

BENCHMARK_MAIN();
