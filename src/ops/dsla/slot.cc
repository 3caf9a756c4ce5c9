#include "ops/dsla/slot.h"

#include <cstring>

#include "base/half.h"

namespace dsla {
namespace {

int64_t AlignUp(int64_t bytes) { return (bytes + 63) / 64 * 64; }

void CheckParams(const DslaParams& params) {
  DSLA_CHECK(params.phi_q && params.phi_k && params.gate_weight && params.gate_bias && params.mix);
  DSLA_CHECK(params.rope_cos && params.rope_sin);
}

void CheckStates(const DslaShape& shape, const DslaStateView& states, int N, const int32_t* slots) {
  if (N == 0) return;
  DSLA_CHECK(states.base && slots);
  DSLA_CHECK(reinterpret_cast<uintptr_t>(states.base) % 64 == 0 && states.slot_bytes % 64 == 0);
  DSLA_CHECK(states.slot_bytes >= MakeSlotLayout(shape).bytes);
}

}  // namespace

DslaSlotLayout MakeSlotLayout(const DslaShape& shape) {
  const int64_t kv = SizeOf(shape.kv_dtype), heads = shape.Hkv;
  const int64_t ring = heads * shape.window * shape.D * kv,
                sinks = heads * shape.sinks * shape.D * kv;
  DslaSlotLayout layout;
  layout.state = 0;
  layout.norm = AlignUp(layout.state + heads * shape.SF() * shape.D * 4);
  layout.ring_k = AlignUp(layout.norm + heads * shape.SF() * 4);
  layout.ring_v = AlignUp(layout.ring_k + ring);
  layout.sink_k = AlignUp(layout.ring_v + ring);
  layout.sink_v = AlignUp(layout.sink_k + sinks);
  layout.bytes = AlignUp(layout.sink_v + sinks);
  return layout;
}

void DslaResetSlot(const DslaShape& shape, const DslaStateView& states, int32_t slot) {
  const DslaSlotLayout layout = MakeSlotLayout(shape);
  DSLA_CHECK(slot >= 0 && states.slot_bytes >= layout.bytes);
  // The ring and the sinks too, so that a slot's bytes depend on nothing but its tokens.
  std::memset(states.base + static_cast<int64_t>(slot) * states.slot_bytes, 0,
              static_cast<size_t>(layout.bytes));
}

void CheckDslaShape(const DslaShape& shape) {
  DSLA_CHECK(shape.H > 0 && shape.Hkv > 0 && shape.H % shape.Hkv == 0);
  // 16: the widest fp32 vector, so that no row of channels has a remainder.
  DSLA_CHECK(shape.D > 0 && shape.D % 16 == 0 && shape.D <= 256);
  DSLA_CHECK(shape.F == shape.D || shape.F == 2 * shape.D);
  DSLA_CHECK(shape.states == 1 || shape.states == 2);
  DSLA_CHECK(shape.window >= 0 && shape.sinks >= 0 && (shape.window > 0 || shape.sinks == 0));
  // Half a chunk of gates at the floor is the largest exponent; fp32 ends at 88.
  DSLA_CHECK(shape.gate_floor < 0 && shape.gate_floor * (kDslaChunk / 2) >= -80.f);
}

void CheckDslaArgs(const DslaArgs& args) {
  CheckDslaShape(args.shape);
  CheckParams(args.params);
  const int N = args.rows.N;
  CheckStates(args.shape, args.states, N, args.slots);
  if (N == 0) return;
  DSLA_CHECK(args.rows.row_start && args.rows.pos);
  if (args.rows.row_start[N] == args.rows.row_start[0]) return;
  DSLA_CHECK(args.q && args.k && args.v && args.out);
  DSLA_CHECK(args.q_stride >= static_cast<int64_t>(args.shape.H) * args.shape.D);
  DSLA_CHECK(args.shape.window == 0 || args.claim);
}

void CheckDslaFoldArgs(const DslaFoldArgs& args) {
  CheckDslaShape(args.shape);
  CheckParams(args.params);
  const int N = args.rows.N;
  CheckStates(args.shape, args.states, N, args.slots);
  if (N == 0) return;
  DSLA_CHECK(args.rows.pos && args.tables.page_start && args.tables.pages);
  DSLA_CHECK(args.kv.k && args.kv.v && args.kv.page_size > 0);
  DSLA_CHECK(args.kv.Hkv == args.shape.Hkv && args.kv.D == args.shape.D);
  DSLA_CHECK(args.kv.D <= kMaxHeadDim);
  DSLA_CHECK(DslaRowType(args.kv.dtype) == args.shape.kv_dtype);
}

void DslaCopyCachedRow(const PagedKvView& kv, const void* base, int64_t page, int64_t h, int64_t s,
                       std::byte* to) {
  const auto* bytes = static_cast<const std::byte*>(base);
  const auto* row = bytes + kv.Row(page, h, s) * SizeOf(kv.dtype);
  if (kv.dtype != DType::kI8) {
    std::memcpy(to, row, static_cast<size_t>(kv.D * SizeOf(kv.dtype)));
    return;
  }
  float scale;
  std::memcpy(&scale, bytes + kv.Scale(page, h, s), sizeof(scale));
  for (int d = 0; d < kv.D; ++d) {
    const bf16 x = ToBf16(scale * static_cast<float>(static_cast<int8_t>(row[d])));
    std::memcpy(to + d * 2, &x, sizeof(x));
  }
}

}  // namespace dsla
