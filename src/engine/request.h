// What a client asks of the engine and what comes back, free of HTTP and of torch.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "cache/level_history.h"
#include "grammar/grammar.h"
#include "ops/sampling/sampling.h"

namespace dsla {

// full: level 0 throughout. auto: the controller decides, within the server's bounds. economy: the
// ladder's top rung (Adapter::top_level). exact: one level throughout.
enum class Tier { kFull, kAuto, kEconomy, kExact };
const char* Name(Tier tier);

struct Request {
  std::string id;               // unique among running requests; appears in logs
  std::vector<int32_t> prompt;  // at least one token, each in [0, V)
  SamplingParams sampling;
  int max_tokens = 16;  // >= 0; 0 only with prompt_logprobs
  int min_tokens = 0;   // no stop id or stop string ends the reply earlier
  bool ignore_eos = false;
  bool continues = false;          // the reply's text goes on from the prompt's (a completion, or a
                                   // message continued): SentencePiece keeps a leading space
  std::vector<int32_t> shown_ids;  // control tokens that give their text all the same
  std::vector<int32_t> stop_ids;   // besides the model's own end tokens
  std::vector<std::string> stop;   // none empty; the reply ends before the first one
  // That the reply follows; null: none. End tokens and stop_ids come where it may end only, and the
  // reply ends where nothing else may follow, also before min_tokens or with ignore_eos. A stop
  // string or max_tokens may end it earlier.
  std::shared_ptr<const Grammar> grammar;
  int top_logprobs = -1;         // -1: none; n >= 0: the chosen token's and the n likeliest
  bool prompt_logprobs = false;  // of every prompt token; such a request does not read the prefix
                                 // cache
  Tier tier = Tier::kAuto;
  int level = 0;           // with Tier::kExact
  std::string cache_salt;  // prefix-cache entries are shared among equal salts only
  double deadline = 0;     // NowSeconds() at which it is given up; 0 = none
};

// One token of the reply.
struct TokenOutput {
  int32_t token = 0;
  std::string text;               // what it adds, whole code points; often empty: text is held
                                  // back while it may be part of a code point or a stop string
  float logprob = 0;              // where logprobs were asked for
  std::vector<TokenLogprob> top;  // likeliest first
  int level = 0;                  // at which it was made
};

// Of one prompt token; the first has none.
struct PromptLogprob {
  int32_t token = 0;
  float logprob = 0;
  std::vector<TokenLogprob> top;
};

enum class FinishReason { kStop, kLength, kContext, kCancelled };
const char* Name(FinishReason reason);

// How a request ended. On an error `status` says why and the tokens sent so far stand.
struct RequestResult {
  std::string id;    // the request's
  int replica = -1;  // of several engines: which one had it
  Status status;
  Tier tier = Tier::kAuto;  // as asked for
  FinishReason finish = FinishReason::kStop;
  int32_t stop_token = -1;  // the token or
  std::string stop_string;  // the string that ended it
  std::string tail_text;    // held-back text that belongs to the reply after all
  int prompt_tokens = 0;
  int cached_tokens = 0;  // prompt tokens whose keys and values came from the prefix cache
  int generated_tokens = 0;
  int preemptions = 0;
  LevelHistory levels;             // at least one entry once it ran
  double queue_seconds = 0;        // from Submit to its first step
  double first_token_seconds = 0;  // from Submit; 0 = none was made
  double total_seconds = 0;
};

// Receives a request's events on the engine's thread, so it must not block or call the engine.
class RequestSink {
 public:
  virtual ~RequestSink() = default;
  // Of several engines the one that gets the request, from 0; before all else, within Submit.
  virtual void OnPlaced(int /*replica*/) {}
  virtual void OnPromptLogprobs(std::vector<PromptLogprob> logprobs) = 0;  // at most once, first
  virtual void OnToken(TokenOutput token) = 0;             // may come while the next step runs
  virtual void OnFinish(const RequestResult& result) = 0;  // exactly once, last
};

}  // namespace dsla
