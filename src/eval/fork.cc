#include "eval/fork.h"

#include <utility>
#include <vector>

namespace dsla {

Expected<SequenceCache> ForkSequence(const HybridModel& model, CachePool& pool,
                                     const SequenceCache& from, int tokens) {
  SequenceCache fork = model.NewSequence(pool, from.level());
  if (tokens == 0) return fork;
  const int page_size = model.options().page_size;
  DSLA_CHECK(tokens % page_size == 0 && tokens <= from.length());
  DSLA_CHECK(from.level() == 0 || tokens == from.length());
  std::vector<std::vector<int32_t>> pages(from.layers());
  for (int layer = 0; layer < from.layers(); ++layer) {
    if (from.is_dsla(layer)) continue;
    const auto shared = from.pages(layer).first(static_cast<size_t>(tokens / page_size));
    pages[layer].assign(shared.begin(), shared.end());
  }
  DSLA_RETURN_IF_ERROR(fork.Adopt(tokens, std::move(pages)));
  std::vector<int32_t> copied, to;
  for (int layer = 0; layer < from.layers(); ++layer) {
    if (!from.is_dsla(layer)) continue;
    copied.push_back(from.slot(layer));
    to.push_back(fork.slot(layer));
  }
  pool.CopyBlocks(BlockKind::kSlot, copied, to);
  return fork;
}

Expected<SequenceCache> ForkAnywhere(const ExecContext& ctx, const HybridModel& model,
                                     CachePool& pool, const SequenceCache& from,
                                     std::span<const int32_t> text, int tokens) {
  DSLA_CHECK(from.level() == 0 && static_cast<size_t>(tokens) <= text.size());
  const int whole = tokens / model.options().page_size * model.options().page_size;
  DSLA_ASSIGN_OR_RETURN(SequenceCache fork, ForkSequence(model, pool, from, whole));
  if (whole < tokens) {
    Buffer<float> logits;
    DSLA_RETURN_IF_ERROR(model.Append(
        ctx, pool, fork,
        text.subspan(static_cast<size_t>(whole), static_cast<size_t>(tokens - whole)), 0, logits));
  }
  return fork;
}

}  // namespace dsla
