#include "ops/linear/packed_weight.h"

#include <algorithm>
#include <cstring>

#include "base/buffer.h"
#include "ops/linear/group_quant.h"

namespace dsla {
namespace {

constexpr int kGroups = kUnitInputs / kQuantGroup;
static_assert(kUnitFeatures == 2 * kQuantBlock);

// The integers of one feature's group, as they are packed.
void ReadGroup(const GroupQuantShape& shape, const uint8_t* q, uint8_t* to) {
  for (int chunk = 0; chunk < shape.bits; ++chunk) std::memcpy(to + 4 * chunk, q + 32 * chunk, 4);
  if (shape.bits == 8) {
    for (int i = 0; i < kQuantGroup; ++i) to[i] ^= 0x80;  // q + 128
    return;
  }
  for (int i = 0; i < kQuantGroup / 2; ++i) {
    to[i + kQuantGroup / 2] = to[i] >> 4;
    to[i] &= 15;
  }
}

// 4 bits of each of 8 consecutive inputs, from bit `shift` on.
uint32_t Word(const uint8_t* q, int shift) {
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i)
    word |= static_cast<uint32_t>(q[i] >> shift & 15) << (16 * (i % 2) + 4 * (i / 2));
  return word;
}

// The groups of one block of 8 features, which are the first or the second half of a tile.
void PackBlock(const PackedShape& shape, const GroupQuantShape& from, const BlockView& block,
               int half, std::byte* tile) {
  for (int64_t group = 0; group < from.groups(); ++group) {
    std::byte* const unit = tile + group / kGroups * shape.unit_bytes();
    const int place = static_cast<int>(group) % kGroups * 2 + half;
    const auto store = [&](int64_t word, uint32_t value) {
      std::memcpy(unit + 4 * word, &value, sizeof(value));
    };
    for (int g = 0; g < kQuantBlock; ++g) {
      uint8_t q[kQuantGroup];
      ReadGroup(from, block.q + group * from.group_bytes() + 4 * g, q);
      for (int plane = 0; plane < shape.planes(); ++plane)
        for (int t = 0; t < 4; ++t)
          store(plane * (kPlaneBytes / 4) + 4 * (4 * g + t) + place, Word(q + 8 * t, 4 * plane));
      const uint32_t d = block.d[group * kQuantBlock + g], m = block.m[group * kQuantBlock + g];
      store(shape.planes() * (kPlaneBytes / 4) + 4 * g + place, d | m << 16);
    }
  }
}

}  // namespace

void PackWeight(const PackedShape& shape, const float* weight, std::byte* to) {
  Buffer<uint8_t> blocks;
  for (int64_t tile = 0; tile < shape.tiles(); ++tile) {
    const int64_t first = tile * kUnitFeatures;
    const GroupQuantShape rounded{.out = std::min<int64_t>(kUnitFeatures, shape.out - first),
                                  .in = shape.in,
                                  .bits = shape.bits};
    blocks.Resize(rounded.bytes());
    GroupQuantize(rounded, 0, rounded.out, weight + first * shape.in, blocks.data());
    std::byte* const at = to + tile * shape.tile_bytes();
    std::memset(at, 0, static_cast<size_t>(shape.tile_bytes()));
    for (int64_t half = 0; half < rounded.blocks(); ++half)
      PackBlock(shape, rounded, ViewBlock(rounded, blocks.data(), half), static_cast<int>(half),
                at);
  }
}

}  // namespace dsla
