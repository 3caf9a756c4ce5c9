#include "grammar/grammar.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <future>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "base/clock.h"
#include "format/tokenizer/tokenizer.h"
#include "grammar/processes.h"

namespace dsla {
namespace {

using grammar_channel::MatcherState;

class CompiledGrammar : public Grammar, public std::enable_shared_from_this<CompiledGrammar> {
 public:
  CompiledGrammar(std::unique_ptr<GrammarProcess> process, int64_t bytes, double match_seconds)
      : process_(std::move(process)), bytes_(bytes), match_seconds_(match_seconds) {}

  Expected<std::unique_ptr<GrammarMatcher>> NewMatcher() const override;
  int64_t bytes() const override { return bytes_; }

  double match_seconds() const { return match_seconds_; }
  const GrammarProcess& process() const { return *process_; }
  MatcherState& state(int matcher) const { return process_->matchers().states[matcher]; }
  void Return(int matcher) const {
    const std::lock_guard lock(mutex_);
    free_.push_back(matcher);
  }
  // Nobody is to use it any more, for that reason.
  Status Break(Status why) const {
    const std::lock_guard lock(mutex_);
    if (broken_.ok()) broken_ = std::move(why);
    return broken_;
  }
  Status broken() const {
    const std::lock_guard lock(mutex_);
    return broken_;
  }

 private:
  Expected<int> Take() const;

  const std::unique_ptr<GrammarProcess> process_;
  const int64_t bytes_;
  const double match_seconds_;
  mutable std::mutex mutex_;  // of what follows
  mutable std::vector<int> free_;
  mutable int used_ = 0;
  mutable Status broken_;
};

// For a process that ends by itself when it has computed for so long: it may have to wait for a
// processor.
double LongestWait(double seconds) { return 2 * seconds + 5; }

class Matcher : public GrammarMatcher {
 public:
  Matcher(std::shared_ptr<const CompiledGrammar> grammar, int index)
      : grammar_(std::move(grammar)), index_(index) {}
  ~Matcher() override {
    // One that is not done may still be written to.
    if (done()) grammar_->Return(index_);
  }

  void Accept(int32_t token) override {
    MatcherState& state = grammar_->state(index_);
    state.token = token;
    state.asked.fetch_add(1, std::memory_order_release);
    asked_at_ = NowSeconds();
    grammar_->process().Wake();
  }

  Status Await() override {
    // Several threads may wait for calls of one process, and one may read another's.
    constexpr double kLook = 0.002;
    const double limit = grammar_->match_seconds();
    const double end = asked_at_ + LongestWait(limit);
    while (!done()) {
      const double left = end - NowSeconds();
      if (left > 0 && grammar_->process().AwaitCall(std::min(left, kLook))) continue;
      if (done()) break;
      return grammar_->Break(
          InvalidArgument("the grammar takes more than {} s, or too much memory, to match one "
                          "token",
                          limit));
    }
    flags_ = grammar_->state(index_).flags;
    if ((flags_ & grammar_channel::kRefused) != 0)
      return InvalidArgument("the grammar cannot be matched any further");
    return Status::Ok();
  }

  std::span<const uint32_t> allowed() const override { return grammar_->process().Mask(index_); }
  bool may_end() const override { return (flags_ & grammar_channel::kMayEnd) != 0; }
  bool complete() const override { return (flags_ & grammar_channel::kComplete) != 0; }

 private:
  bool done() const {
    const MatcherState& state = grammar_->state(index_);
    return state.done.load(std::memory_order_acquire) ==
           state.asked.load(std::memory_order_relaxed);
  }

  const std::shared_ptr<const CompiledGrammar> grammar_;
  const int index_;
  double asked_at_ = 0;
  uint32_t flags_ = 0;
};

Expected<int> CompiledGrammar::Take() const {
  const std::lock_guard lock(mutex_);
  DSLA_RETURN_IF_ERROR(broken_);
  if (!free_.empty()) {
    const int matcher = free_.back();
    free_.pop_back();
    return matcher;
  }
  if (used_ == grammar_channel::kMaxMatchers)
    return Error(StatusCode::kUnavailable, "{} replies follow this grammar already", used_);
  process_->matchers().used.store(used_ + 1, std::memory_order_release);
  return used_++;
}

Expected<std::unique_ptr<GrammarMatcher>> CompiledGrammar::NewMatcher() const {
  DSLA_ASSIGN_OR_RETURN(const int index, Take());
  std::unique_ptr<GrammarMatcher> matcher = std::make_unique<Matcher>(shared_from_this(), index);
  matcher->Accept(grammar_channel::kBegin);
  DSLA_RETURN_IF_ERROR(matcher->Await());
  return matcher;
}

// As kVocabulary's file. What has no bytes is never allowed: control tokens but for those given.
std::string VocabularyOf(const Tokenizer& tokenizer, int64_t V,
                         std::span<const int32_t> control_tokens) {
  std::string file;
  const auto write = [&](const auto& value) {
    file.append(reinterpret_cast<const char*>(&value), sizeof(value));
  };
  write(V);
  for (int32_t id = 0; id < V; ++id) {
    const bool none =
        tokenizer.IsSpecial(id) && std::ranges::find(control_tokens, id) == control_tokens.end();
    const std::string_view bytes = none ? std::string_view() : tokenizer.TokenBytes(id);
    write(static_cast<uint32_t>(bytes.size()));
    file += bytes;
  }
  for (const int32_t id : control_tokens) write(id);
  return file;
}

// So many may go on at once.
class Turns {
 public:
  explicit Turns(int count) : left_(count) {}
  bool Take(double seconds) {
    std::unique_lock lock(mutex_);
    const auto time = std::chrono::duration<double>(seconds);
    if (!given_back_.wait_for(lock, time, [&] { return left_ > 0; })) return false;
    --left_;
    return true;
  }
  void GiveBack() {
    {
      const std::lock_guard lock(mutex_);
      ++left_;
    }
    given_back_.notify_one();
  }

 private:
  std::mutex mutex_;
  std::condition_variable given_back_;
  int left_;
};

using GrammarPtr = std::shared_ptr<const CompiledGrammar>;
using Result = Expected<GrammarPtr>;

class Compiler : public GrammarCompiler {
 public:
  Compiler(const Tokenizer& tokenizer, int64_t V, const GrammarOptions& options)
      : options_(options),
        processes_(VocabularyOf(tokenizer, V, options.control_tokens), V),
        turns_(options.compile_at_once) {
    DSLA_CHECK(options.max_text_bytes <= grammar_channel::kMaxText);
  }

  Expected<std::shared_ptr<const Grammar>> Compile(const GrammarSpec& spec) override {
    if (spec.text.size() > options_.max_text_bytes) {
      return InvalidArgument("the grammar has {} bytes, at most {} are allowed", spec.text.size(),
                             options_.max_text_bytes);
    }
    std::promise<Result> promise;
    std::shared_future<Result> known;
    if (!Find(spec, promise, known)) {
      Result compiled = Error(StatusCode::kResourceExhausted, "out of memory for a grammar");
      try {
        compiled = CompileNew(spec);
      } catch (const std::bad_alloc&) {  // whoever waits must hear of it
      }
      Settle(spec, compiled);
      promise.set_value(std::move(compiled));
    }
    DSLA_ASSIGN_OR_RETURN(const GrammarPtr grammar, known.get());
    DSLA_RETURN_IF_ERROR(grammar->broken());
    return std::shared_ptr<const Grammar>(grammar);
  }

 private:
  // Of a grammar that is known, or is being compiled now.
  struct Entry {
    GrammarSpec spec;
    std::shared_future<Result> result;
    int64_t bytes = 0;
    bool settled = false;
  };
  using Entries = std::list<Entry>;  // most recently used first

  // Whether somebody has compiled it, or is doing so; else the caller is to, and to keep the
  // promise.
  bool Find(const GrammarSpec& spec, std::promise<Result>& promise,
            std::shared_future<Result>& result) {
    const std::lock_guard lock(mutex_);
    const auto found = FindEntry(spec);
    if (found != entries_.end()) {
      entries_.splice(entries_.begin(), entries_, found);
      result = found->result;
      return true;
    }
    result = promise.get_future().share();
    entries_.push_front({.spec = spec, .result = result});
    return false;
  }

  // Few: they are at most cache_entries and those being compiled.
  Entries::iterator FindEntry(const GrammarSpec& spec) {
    return std::ranges::find_if(entries_, [&](const Entry& entry) { return entry.spec == spec; });
  }

  // What is wrong with a grammar is kept, too; what is wrong with the moment is not.
  void Settle(const GrammarSpec& spec, const Result& result) {
    const std::lock_guard lock(mutex_);
    const auto entry = FindEntry(spec);
    if (!result.ok() && result.status().code() != StatusCode::kInvalidArgument) {
      entries_.erase(entry);
      return;
    }
    entry->settled = true;
    entry->bytes = static_cast<int64_t>(spec.text.size()) + (result.ok() ? (*result)->bytes() : 0);
    bytes_ += entry->bytes;
    ++settled_;
    for (auto last = entries_.end(); last != entries_.begin() && TooMuch();) {
      --last;
      if (!last->settled) continue;
      bytes_ -= last->bytes;
      --settled_;
      last = entries_.erase(last);
    }
  }
  bool TooMuch() const {
    return bytes_ > options_.cache_bytes || settled_ > options_.cache_entries;
  }

  Result CompileNew(const GrammarSpec& spec) {
    if (!turns_.Take(options_.wait_seconds))
      return Error(StatusCode::kResourceExhausted, "other grammars are being compiled");
    Result result = CompileNow(spec);
    turns_.GiveBack();
    return result;
  }

  Result CompileNow(const GrammarSpec& spec) {
    DSLA_ASSIGN_OR_RETURN(auto process, processes_.Start(spec, options_));
    const auto bytes = process->AwaitAnswer(LongestWait(options_.compile_seconds));
    if (!bytes.ok()) return WhyNot(bytes.status());
    auto grammar = std::make_shared<const CompiledGrammar>(
        std::move(process), *bytes + kProcessBytes, options_.match_seconds);
    // Masks of the first token are the ones that show what it takes.
    DSLA_RETURN_IF_ERROR(grammar->NewMatcher().status());
    return grammar;
  }

  Status WhyNot(const Status& status) const {
    if (status.code() == StatusCode::kInvalidArgument) return status;
    if (status.message() == "it has ended" || status.code() == StatusCode::kDeadlineExceeded) {
      return InvalidArgument("the grammar takes more than {} s or {} MiB to compile",
                             options_.compile_seconds, options_.process_bytes >> 20);
    }
    return status;
  }

  // What a process has of its own besides the grammar, about.
  static constexpr int64_t kProcessBytes = int64_t{4} << 20;

  const GrammarOptions options_;
  GrammarProcesses processes_;
  Turns turns_;
  std::mutex mutex_;  // of what follows
  Entries entries_;
  int64_t bytes_ = 0;  // of the settled ones
  int settled_ = 0;
};

}  // namespace

std::string RegexOfChoices(std::span<const std::string> choices) {
  std::string regex;
  for (const std::string& choice : choices) {
    if (!regex.empty()) regex += '|';
    regex += "(?:";
    for (const char c : choice) {
      if (std::string_view(R"(\^$.[]|()?*+{})").find(c) != std::string_view::npos) regex += '\\';
      regex += c;
    }
    regex += ')';
  }
  return regex;
}

std::unique_ptr<GrammarCompiler> GrammarCompiler::Create(const Tokenizer& tokenizer, int64_t V,
                                                         const GrammarOptions& options) {
  return std::make_unique<Compiler>(tokenizer, V, options);
}

}  // namespace dsla
