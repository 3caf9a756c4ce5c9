#include "engine/reply_mask.h"

#include <algorithm>

namespace dsla {

Expected<ReplyMask> ReplyMask::Create(const Grammar& grammar, std::span<const int32_t> end_ids,
                                      bool may_end) {
  DSLA_ASSIGN_OR_RETURN(auto matcher, grammar.NewMatcher());
  ReplyMask mask(std::move(matcher), end_ids);
  DSLA_RETURN_IF_ERROR(mask.Await(may_end));
  return mask;
}

Status ReplyMask::Await(bool may_end) {
  DSLA_RETURN_IF_ERROR(matcher_->Await());
  const std::span<const uint32_t> allowed = matcher_->allowed();
  allowed_.assign(allowed.begin(), allowed.end());
  for (const int32_t id : end_ids_) {
    uint32_t& word = allowed_[static_cast<size_t>(id / 32)];
    const uint32_t bit = uint32_t{1} << id % 32;
    word = may_end && matcher_->may_end() ? word | bit : word & ~bit;
  }
  const bool any = std::ranges::any_of(allowed_, [](uint32_t word) { return word != 0; });
  if (any || complete()) return Status::Ok();
  return InvalidArgument("no token of the model goes on as the grammar demands");
}

}  // namespace dsla
