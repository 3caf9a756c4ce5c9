// Weights in groups of 32 consecutive inputs of one output feature, internal to this folder.
//   w = d q + m, d and m fp16; int8: q in [-127, 127], int4: q in [0, 15]
// int8 takes for each group the closer of two: m = 0 and 127 steps to the largest |w|, or m in the
// middle and 240 steps, a multiple of 15, from the least w to the greatest. So int4 keeps the
// groups of GGUF's Q4_1 and int8 those of Q8_0 without loss, as long as a group uses both ends of
// its range, as such files do, and int8 those of Q4_1 up to the rounding of m.
//
// Products multiply integers: activations are rounded to 15 bits with a scale per group of 32 (the
// same groups); the sums of 32 products are exact, and fp32 begins at their scaling. (One byte of
// activations would cost .003 nats of KL on SmolLM2-135M, more than 4-bit weights do, and decode is
// bound by the weights' bytes either way. Two bytes a piece, multiplied as bytes, took 1.8 times
// the time of 16-bit products at 64 rows of int8 on AVX2.)
//
// Layout: blocks of 8 features. A block holds the d of its groups, [groups][8], then their m,
// [groups][8], zeros up to a multiple of 64 bytes, then the q, [groups][chunks of 4 inputs][8
// features][4]; int4 has two chunks in a byte, chunk c in the low and c + 4 in the high half. So
// one 32-byte load holds 4 inputs of 8 features, whose products sum up in 8 lanes, one per feature.
#pragma once

#include <cstdint>

namespace dsla {

inline constexpr int kQuantGroup = 32;  // inputs
inline constexpr int kQuantBlock = 8;   // features
// Numbers below have no reciprocal in fp32 and count as zeros.
inline constexpr float kTiny = 1e-34f;

struct GroupQuantShape {
  int64_t out = 0, in = 0;
  int bits = 8;  // 8 or 4

  int64_t groups() const { return (in + kQuantGroup - 1) / kQuantGroup; }
  int64_t stride() const { return groups() * kQuantGroup; }  // inputs, padded
  int64_t blocks() const { return (out + kQuantBlock - 1) / kQuantBlock; }
  int64_t group_bytes() const { return bits == 8 ? 256 : 128; }  // the q of a block's group
  int64_t header_bytes() const { return (groups() * 2 * kQuantBlock * 2 + 63) / 64 * 64; }
  int64_t block_bytes() const { return header_bytes() + groups() * group_bytes(); }
  int64_t bytes() const { return blocks() * block_bytes(); }
};

// A block's parts.
struct BlockView {
  const uint16_t* d;
  const uint16_t* m;
  const uint8_t* q;
};
inline BlockView ViewBlock(const GroupQuantShape& shape, const uint8_t* weight, int64_t block) {
  const uint8_t* at = weight + block * shape.block_bytes();
  const auto* d = reinterpret_cast<const uint16_t*>(at);
  return {d, d + shape.groups() * kQuantBlock, at + shape.header_bytes()};
}

// weight [end - begin, in], the features [begin, end) -> their blocks of `to`, 64-byte aligned,
// shape.bytes(); begin is a multiple of kQuantBlock, and so is end unless it is shape.out. Features
// and inputs that fill up blocks and groups are zero.
void GroupQuantize(const GroupQuantShape& shape, int64_t begin, int64_t end, const float* weight,
                   uint8_t* to);

// Features [begin, end) as fp32 rows, `stride` >= shape.in floats apart.
void GroupDequantize(const GroupQuantShape& shape, const uint8_t* from, int64_t begin, int64_t end,
                     float* to, int64_t stride);

// Activations in groups: x = scale q up to rounding, q in [-16256, 16256], the inputs 0, 2, 1, 3 of
// every four: as the even and the odd bytes of the weights; sum = scale * (sum of the group's q).
struct QuantRows {
  int16_t* q = nullptr;    // [T, stride]
  float* scale = nullptr;  // [T, groups]
  float* sum = nullptr;    // [T, groups]

  QuantRows From(const GroupQuantShape& shape, int64_t t) const {
    return {q + t * shape.stride(), scale + t * shape.groups(), sum + t * shape.groups()};
  }
};
// The inputs [begin, end) of one row x, `begin` a multiple of kQuantGroup, to the same places of
// `row`; a group is filled up with zeros.
void QuantizePiece(const float* x, int64_t begin, int64_t end, const QuantRows& row);

struct GroupQuantArgs {
  GroupQuantShape shape;
  const uint8_t* weight = nullptr;
  const float* bias = nullptr;  // [out] or null
  QuantRows x;
  int64_t T = 0;
  float* y = nullptr;  // [T, out]
  int64_t y_stride = 0;
  bool accumulate = false;
};

// y of the features of blocks [begin, end), all T rows. A row's result is the same bits whatever T
// and the range are.
void GroupQuantProduct(const GroupQuantArgs& args, int64_t begin, int64_t end);

}  // namespace dsla
