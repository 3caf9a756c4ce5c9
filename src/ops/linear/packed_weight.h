// Weights in groups of 32 inputs (group_quant.h), the same values, in the order in which a GPU's
// kernels read them: units of 16 features x 64 inputs, those of 16 features one after the other.
//   unit: planes of 4 bits, [planes][32 lanes][4 words], then [8][4] pairs (d, m) of fp16
// The integers are q with int4, q + 128 with int8, whose first plane has the lower 4 bits. Lane 4 g
// + t has of features g and g + 8 the inputs 8 t to 8 t + 7 of each of the two groups, as the A
// operands of mma.m16n8k16 take them; its words, and the pairs of g, are those of (feature g, group
// 0), (g + 8, 0), (g, 1), (g + 8, 1). Of a word's inputs 0, 2, 4, 6 lie 4 bits apart in its lower
// half, 1, 3, 5, 7 in its upper one: a shift and a mask leave two that stand side by side.
// Features and inputs that fill up units are zeros with d and m of zero.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsla {

inline constexpr int kUnitFeatures = 16, kUnitInputs = 64;
inline constexpr int kPlaneBytes = 512, kUnitScaleBytes = 128;

struct PackedShape {
  int64_t out = 0, in = 0;
  int bits = 4;  // 8 or 4

  constexpr int planes() const { return bits / 4; }
  constexpr int64_t unit_bytes() const { return planes() * kPlaneBytes + kUnitScaleBytes; }
  constexpr int64_t units() const { return (in + kUnitInputs - 1) / kUnitInputs; }  // of a tile
  constexpr int64_t tile_bytes() const { return units() * unit_bytes(); }  // of 16 features
  constexpr int64_t tiles() const { return (out + kUnitFeatures - 1) / kUnitFeatures; }
  constexpr int64_t bytes() const { return tiles() * tile_bytes(); }
};

// weight [out, in], rounded as Linear does it -> shape.bytes(), 4-byte aligned.
void PackWeight(const PackedShape& shape, const float* weight, std::byte* to);

}  // namespace dsla
