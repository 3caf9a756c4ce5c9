// Which tokens may be next in a reply that follows a grammar: those that the grammar allows, and
// the tokens that end the reply where it may end.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "grammar/grammar.h"

namespace dsla {

// Not thread-safe.
class ReplyMask {
 public:
  // Of a reply that begins; end_ids: that end it, whatever else they are. Errors: those of
  // NewMatcher, and of Await.
  static Expected<ReplyMask> Create(const Grammar& grammar, std::span<const int32_t> end_ids,
                                    bool may_end);

  // The reply goes on with this token. Returns at once; Await is to be called before anything else.
  void Accept(int32_t token) { matcher_->Accept(token); }
  // may_end: as far as the request goes. kInvalidArgument: the grammar takes too long, or there is
  // no token with which the reply could go on.
  Status Await(bool may_end);

  // [ceil(V / 32)], see GrammarMatcher.
  std::span<const uint32_t> allowed() const { return allowed_; }
  bool complete() const { return matcher_->complete(); }  // nothing may follow but an end

 private:
  ReplyMask(std::unique_ptr<GrammarMatcher> matcher, std::span<const int32_t> end_ids)
      : matcher_(std::move(matcher)), end_ids_(end_ids.begin(), end_ids.end()) {}

  std::unique_ptr<GrammarMatcher> matcher_;
  std::vector<int32_t> end_ids_;
  std::vector<uint32_t> allowed_;
};

}  // namespace dsla
