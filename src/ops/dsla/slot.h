// Typed access to a state slot and the checks of arguments that every form of the operator shares.
// Private to src/ops/dsla.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/check.h"
#include "ops/dsla/dsla.h"

namespace dsla {

// The parts of one slot, for shapes see DslaSlotLayout.
struct DslaSlot {
  float* state = nullptr;
  float* norm = nullptr;
  std::byte* ring_k = nullptr;
  std::byte* ring_v = nullptr;
  std::byte* sink_k = nullptr;
  std::byte* sink_v = nullptr;
};

inline DslaSlot SlotAt(const DslaSlotLayout& layout, const DslaStateView& states, int32_t slot) {
  DSLA_DCHECK(slot >= 0);
  std::byte* base = states.base + static_cast<int64_t>(slot) * states.slot_bytes;
  return {reinterpret_cast<float*>(base + layout.state),
          reinterpret_cast<float*>(base + layout.norm),
          base + layout.ring_k,
          base + layout.ring_v,
          base + layout.sink_k,
          base + layout.sink_v};
}

// The dimensions are those this operator is written for.
void CheckDslaShape(const DslaShape& shape);
// The shape fits and no pointer that will be followed is null.
void CheckDslaArgs(const DslaArgs& args);
void CheckDslaFoldArgs(const DslaFoldArgs& args);

// K or V of one cached token and head, in the slot's dtype.
void DslaCopyCachedRow(const PagedKvView& kv, const void* base, int64_t page, int64_t h, int64_t s,
                       std::byte* to);

}  // namespace dsla
