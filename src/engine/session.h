// Session: one sequence run step by step: prefill in chunks, decode token by token, raises between
// steps. What `dsla run` is made of. Not thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "cache/cache_pool.h"
#include "engine/request.h"
#include "model/hybrid_model.h"
#include "ops/sampling/sampling.h"

namespace dsla {

// One raise as it happened.
struct LevelChange {
  int position = 0;  // tokens cached at the switch
  int from = 0;
  int to = 0;
  double seconds = 0;  // spent folding
};

struct SessionOptions {
  int level = 0;            // from the start
  int prefill_chunk = 512;  // rows per prefill step
  Products products = Products::kFastest;
  // Tier auto: instead of failing when the cache memory is used up, raise the level, up to
  // `auto_top_level`.
  bool auto_raise = false;
  int auto_top_level = 0;
};

struct GenerateOptions {
  SamplingParams sampling;
  int max_tokens = 256;
  std::vector<int32_t> stop_ids;           // any of these ends the reply and is not part of it
  std::shared_ptr<const Grammar> grammar;  // that the reply follows, see Request
  struct Raise {
    int after_tokens;  // generated tokens after which it happens
    int level;
  };
  std::vector<Raise> raises;  // by after_tokens
  // Called with each token as soon as it is chosen; false cancels.
  std::function<bool(int32_t token, float logprob)> on_token;
};

struct GenerateResult {
  std::vector<int32_t> tokens;
  FinishReason finish = FinishReason::kStop;
  double seconds_to_first_token = 0;  // since Generate was called
  double decode_seconds = 0;          // of the steps after the first token, folds not included
  int decode_steps = 0;
};

struct CacheBytes {
  int64_t pages = 0;   // KV pages of softmax layers
  int64_t states = 0;  // state slots of DSLA layers: states, window rings, sinks
  int64_t total() const { return pages + states; }
};

class Session {
 public:
  // The model and the pool must outlive the session. ctx.workspace is the session's alone.
  Session(const HybridModel* model, CachePool* pool, const ExecContext& ctx,
          const SessionOptions& options);

  // Runs tokens through the model, chunk by chunk. `after_step`, if given, is called with the
  // tokens done so far; false cancels. Errors: kInvalidArgument when they do not fit the context,
  // kResourceExhausted when the cache memory is used up (the tokens up to there are in the cache),
  // kCancelled.
  Status Prefill(std::span<const int32_t> tokens,
                 const std::function<bool(int done)>& after_step = {});

  // Raises to `level` by folding; recorded in level_changes().
  Status Raise(int level);

  // Replies to what was prefilled. The last token chosen is not run through the model yet: prefill
  // it with what follows.
  Expected<GenerateResult> Generate(const GenerateOptions& options);

  std::span<const int32_t> tokens() const { return tokens_; }  // run through the model so far
  int length() const { return cache_.length(); }
  int level() const { return cache_.level(); }
  CacheBytes cache_bytes() const;
  const std::vector<LevelChange>& level_changes() const { return level_changes_; }
  std::span<float> logits() { return logits_.span(); }  // [V] of the last row

 private:
  Status ReserveOrRaise(int count);
  Status Step(std::span<const int32_t> tokens);

  const HybridModel* model_;
  CachePool* pool_;
  ExecContext ctx_;
  SessionOptions options_;
  SequenceCache cache_;
  std::vector<int32_t> tokens_;
  std::vector<LevelChange> level_changes_;
  Buffer<float> logits_;
};

}  // namespace dsla
