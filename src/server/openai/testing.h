// An engine, a client and a small server for the tests of the API.
#pragma once

#include <condition_variable>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "format/tokenizer/testing.h"
#include "server/http/router.h"
#include "server/openai/api.h"

namespace dsla::openai::testing {

// Takes requests and does with them what the test says.
class FakeEngine : public Engine {
 public:
  // The last sink may be the last to hold the service, which cancels what it still has to.
  ~FakeEngine() override { jobs_.clear(); }

  std::optional<Rejection> SubmitAll(std::vector<Submission> group) override {
    const std::lock_guard lock(mutex_);
    if (rejection) return rejection;
    groups_.push_back(group.size());
    for (Submission& submission : group) jobs_.push_back(std::move(submission));
    return std::nullopt;
  }
  std::optional<Rejection> Check(const Request&) const override { return std::nullopt; }
  std::optional<Rejection> RefusesAll() const override {
    if (full) return rejection;
    return std::nullopt;
  }
  int LongestReply(int64_t, Tier, int) const override { return longest_reply; }
  void Cancel(const std::string& id) override {
    const std::lock_guard lock(mutex_);
    cancelled_.push_back(id);
    changed_.notify_all();
  }
  void CancelAll() override {}
  EngineState state() const override { return {}; }
  bool device_failed() const override { return false; }
  void SetFinishObserver(FinishObserver) override {}
  void SetPolicy(const PolicyMaker&) override {}
  void SetMaxLevel(int) override {}
  void Drain() override {}

  Submission job(size_t i) const {
    const std::lock_guard lock(mutex_);
    return jobs_.at(i);
  }
  size_t jobs() const {
    const std::lock_guard lock(mutex_);
    return jobs_.size();
  }
  std::vector<size_t> groups() const {  // sizes of what was submitted together
    const std::lock_guard lock(mutex_);
    return groups_;
  }
  // Lets go of the sinks, as an engine does that is done with the requests.
  void Forget() {
    const std::lock_guard lock(mutex_);
    jobs_.clear();
  }
  std::vector<std::string> WaitForCancelled(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return cancelled_.size() >= count; });
    return cancelled_;
  }

  std::optional<Rejection> rejection;  // of whatever is submitted
  int longest_reply = std::numeric_limits<int>::max();
  bool full = false;  // nobody is taken, as `rejection` says

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Submission> jobs_;
  std::vector<size_t> groups_;
  std::vector<std::string> cancelled_;
};

// Keeps what a handler answers.
class FakeResponder : public Responder {
 public:
  bool Respond(HttpResponse response) override {
    const std::lock_guard lock(mutex_);
    if (ended_ || streaming_) return false;
    head_ = std::move(response);
    body_ = head_.body;
    return Close();
  }
  void ExpectStream(HttpResponse head) override {
    const std::lock_guard lock(mutex_);
    early_head_ = std::move(head);
  }
  bool StartStream(HttpResponse head) override {
    const std::lock_guard lock(mutex_);
    if (ended_ || (streaming_ && !opened_early_)) return false;
    if (!std::exchange(opened_early_, false)) {
      streaming_ = true;
      head_ = head;
    }
    body_ += head.body;
    changed_.notify_all();
    return true;
  }
  bool Write(std::string_view chunk) override {
    const std::lock_guard lock(mutex_);
    if (ended_ || !streaming_) return false;
    body_ += chunk;
    return true;
  }
  void End() override {
    const std::lock_guard lock(mutex_);
    Close();
  }
  void OnDisconnect(std::function<void()> callback) override {
    const std::lock_guard lock(mutex_);
    if (!ended_) callback_ = std::move(callback);
  }
  bool gone() const override {
    const std::lock_guard lock(mutex_);
    return ended_;
  }
  void Note(std::string name, std::string value) override {
    const std::lock_guard lock(mutex_);
    notes_[std::move(name)] = std::move(value);
  }

  // The stream has stood still for long.
  void Comment() {
    const std::lock_guard lock(mutex_);
    DSLA_CHECK(early_head_ && !ended_ && !streaming_);
    streaming_ = opened_early_ = true;
    head_ = *early_head_;
    body_ += kSseComment;
  }
  // The client leaves.
  void Disconnect() {
    std::function<void()> callback;
    {
      const std::lock_guard lock(mutex_);
      if (ended_) return;
      ended_ = true;
      callback = std::exchange(callback_, nullptr);
      changed_.notify_all();
    }
    if (callback) callback();
  }
  void WaitForEnd() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_; });
  }
  HttpResponse head() const {
    const std::lock_guard lock(mutex_);
    return head_;
  }
  std::string body() const {
    const std::lock_guard lock(mutex_);
    return body_;
  }
  bool streaming() const {
    const std::lock_guard lock(mutex_);
    return streaming_;
  }
  std::string note(const std::string& name) const {
    const std::lock_guard lock(mutex_);
    const auto found = notes_.find(name);
    return found == notes_.end() ? "" : found->second;
  }

 private:
  bool Close() {
    ended_ = true;
    callback_ = nullptr;
    changed_.notify_all();
    return true;
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  HttpResponse head_{.status = 0, .headers = {}, .body = {}};
  std::string body_;
  bool streaming_ = false;
  std::optional<HttpResponse> early_head_;
  bool opened_early_ = false;
  bool ended_ = false;
  std::function<void()> callback_;
  std::map<std::string, std::string> notes_;
};

// A grammar that the handlers take for one.
class FakeGrammar : public Grammar {
 public:
  Expected<std::unique_ptr<GrammarMatcher>> NewMatcher() const override {
    return InvalidArgument("not to be matched");
  }
  int64_t bytes() const override { return 1; }
};

class FakeCompiler : public GrammarCompiler {
 public:
  Expected<std::shared_ptr<const Grammar>> Compile(const GrammarSpec& spec) override {
    specs.push_back(spec);
    if (!status.ok()) return status;
    return grammar;
  }
  Status status;
  std::shared_ptr<const Grammar> grammar = std::make_shared<FakeGrammar>();
  std::vector<GrammarSpec> specs;
};

inline std::unique_ptr<Tokenizer> NewTokenizer(Expected<TokenizerData> data) {
  DSLA_CHECK(data.ok());
  auto tokenizer = Tokenizer::Create(std::move(data).value());
  DSLA_CHECK(tokenizer.ok());
  return std::move(tokenizer).value();
}
inline std::unique_ptr<Tokenizer> SmallTokenizer() {
  return NewTokenizer(ParseTokenizerJson(dsla::testing::ByteLevelJson().dump(), "t.json"));
}
inline std::unique_ptr<Tokenizer> SentencePieceTokenizer() {
  return NewTokenizer(FromGgufVocab(dsla::testing::SentencePieceVocab()));
}

// The API over a FakeEngine: ids, times and the context are fixed.
struct TestApi {
  explicit TestApi(int max_context = 100, std::unique_ptr<Tokenizer> with = SmallTokenizer())
      : tokenizer(std::move(with)) {
    context.engine = &engine;
    context.tokenizer = tokenizer.get();
    context.model_names = {"small", "alias"};
    context.model_root = "small.gguf";
    context.ladder.max_level = 4;
    context.ladder.top_level = 3;
    context.limits.max_context = max_context;
    context.unix_time = [] { return int64_t{1700000000}; };
    context.random_seed = 1;
    auto chatml = ChatTemplateByName("chatml");
    DSLA_CHECK(chatml.ok());
    context.chat_template = *chatml;
  }

  std::shared_ptr<FakeResponder> Call(const std::string& method, const std::string& path,
                                      std::string body = "", HttpHeaders headers = {}) {
    if (!router) {
      router = std::make_unique<Router>();
      RegisterApi(*router, context);
    }
    const Router::Match match = router->Find(method, path);
    DSLA_CHECK(match.route);
    auto request = std::make_shared<HttpRequest>();
    request->method = method;
    request->path = path;
    request->body = std::move(body);
    request->headers = std::move(headers);
    request->request_id = "req";
    request->path_params = match.params;
    auto responder = std::make_shared<FakeResponder>();
    match.route->handler(request, responder);
    return responder;
  }
  std::shared_ptr<FakeResponder> Completions(std::string body) {
    return Call("POST", "/v1/completions", std::move(body));
  }
  std::shared_ptr<FakeResponder> Chat(std::string body) {
    return Call("POST", "/v1/chat/completions", std::move(body));
  }

  FakeEngine engine;
  std::unique_ptr<Tokenizer> tokenizer;
  ApiContext context;
  std::unique_ptr<Router> router;
};

// A token that adds `text`.
inline TokenOutput Token(int32_t id, std::string text, float logprob = 0,
                         std::vector<TokenLogprob> top = {}) {
  TokenOutput token;
  token.token = id;
  token.text = std::move(text);
  token.logprob = logprob;
  token.top = std::move(top);
  return token;
}

inline RequestResult Finished(FinishReason finish, int prompt_tokens, int generated_tokens) {
  RequestResult result;
  result.finish = finish;
  result.prompt_tokens = prompt_tokens;
  result.generated_tokens = generated_tokens;
  result.levels = {{0, 0}};
  return result;
}

}  // namespace dsla::openai::testing
