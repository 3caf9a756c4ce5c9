// Products of many rows with weights in integers or bf16, internal to this folder.
//
// A panel is kPanelFeatures features of the weight. It is unpacked once for all rows of a task, a
// segment of inputs at a time, into 12-bit integers with a step per feature and segment; the
// activations become 13-bit integers with a scale per row and segment. So the sum of a segment's
// products fits 32 bits, fp32 begins once in 192 inputs (in group_quant_product-inl.h once in 32),
// and the unpacked weights, 24 KB, stay in the L1 cache. What this rounds off is less than bf16
// would: that has 8 bits of a number of any size, these 11 and 12 beside the segment's largest.
#pragma once

#include <cstdint>
#include <limits>

#include "base/exec.h"
#include "ops/linear/group_quant.h"
#include "ops/linear/linear.h"

namespace dsla {

inline constexpr int64_t kPanelFeatures = 64;
inline constexpr int64_t kPanelSegment = 192;  // inputs
inline constexpr int kLargestWeight = 2047, kLargestActivation = 5461;
static_assert(kPanelSegment * kLargestWeight * kLargestActivation <=
              std::numeric_limits<int32_t>::max());
static_assert(kPanelSegment % kQuantGroup == 0);

// Activations: x = scale q up to rounding.
struct PanelRows {
  int16_t* q = nullptr;    // [T, stride]
  float* scale = nullptr;  // [T, segments]
  int64_t stride = 0, segments = 0;

  PanelRows From(int64_t t) const {
    return {q + t * stride, scale + t * segments, stride, segments};
  }
  PanelRows Segment(int64_t s) const {
    return {q + s * kPanelSegment, scale + s, stride, segments};
  }
};
// The inputs [begin, end) of one row x [in], `begin` a multiple of kPanelSegment, to the same
// places of `row`; with the last inputs come the zeros up to its stride.
void RoundPanelPiece(const float* x, int64_t begin, int64_t end, int64_t in, const PanelRows& row);

struct PanelArgs {
  WeightFormat format = WeightFormat::kInt8;
  int64_t out = 0, in = 0;
  // Integers: the blocks of GroupQuantShape. bf16: rows padded with zeros to as many inputs.
  const void* weight = nullptr;
  const float* bias = nullptr;  // [out] or null
  PanelRows x;
  int64_t T = 0;
  float* y = nullptr;  // [T, out]
  int64_t y_stride = 0;
  bool accumulate = false;

  GroupQuantShape quant() const {
    return {.out = out, .in = in, .bits = format == WeightFormat::kInt4 ? 4 : 8};
  }
  int64_t padded() const { return quant().stride(); }  // inputs
};

// A row's result is the same bits whatever T and the number of threads are.
void PanelProduct(const ExecContext& ctx, const PanelArgs& args);

}  // namespace dsla
