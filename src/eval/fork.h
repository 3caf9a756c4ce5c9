// A second sequence with the same past, so that several continuations of one text need its tokens
// run once.
#pragma once

#include <span>

#include "base/exec.h"
#include "base/status.h"
#include "cache/cache_pool.h"
#include "cache/sequence_cache.h"
#include "model/hybrid_model.h"

namespace dsla {

// A sequence at `from`'s level that holds `from`'s first `tokens` tokens: shares its pages, copies
// its slots. `tokens` is a multiple of the page size; above level 0, where states stand at one
// place only, it is all of `from` or 0. kResourceExhausted when there is no room for the slots.
Expected<SequenceCache> ForkSequence(const HybridModel& model, CachePool& pool,
                                     const SequenceCache& from, int tokens);

// At level 0, anywhere: forks at the last whole page and runs what is left of the first `tokens` of
// `text`, whose beginning `from` holds.
Expected<SequenceCache> ForkAnywhere(const ExecContext& ctx, const HybridModel& model,
                                     CachePool& pool, const SequenceCache& from,
                                     std::span<const int32_t> text, int tokens);

}  // namespace dsla
