#include "ops/linear/packed_weight.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/buffer.h"
#include "base/half.h"
#include "ops/linear/group_quant.h"

namespace dsla {
namespace {

// Weight (o, k), found by what the header says of the form.
float Unpacked(const PackedShape& shape, const std::vector<std::byte>& packed, int64_t o,
               int64_t k) {
  const std::byte* const unit =
      packed.data() + o / 16 * shape.tile_bytes() + k / 64 * shape.unit_bytes();
  const int64_t g = o % 8, t = k % 32 / 8, i = k % 8, place = k % 64 / 32 * 2 + o % 16 / 8;
  const auto word = [&](int64_t at) {
    uint32_t value = 0;
    std::memcpy(&value, unit + 4 * at, sizeof(value));
    return value;
  };
  int q = shape.bits == 8 ? -128 : 0;
  for (int plane = 0; plane < shape.planes(); ++plane) {
    const uint32_t four = word(128 * plane + 4 * (4 * g + t) + place) >> (16 * (i % 2) + i / 2 * 4);
    q += static_cast<int>(four & 15) << (4 * plane);
  }
  const uint32_t dm = word(128 * shape.planes() + 4 * g + place);
  return std::fma(static_cast<float>(q), ToFloat(f16{static_cast<uint16_t>(dm)}),
                  ToFloat(f16{static_cast<uint16_t>(dm >> 16)}));
}

// To the bit those that the CPU multiplies by; what fills up units has no scale.
TEST(PackedWeightTest, HoldsTheGroupsValues) {
  std::mt19937 random(20250102);
  std::normal_distribution<float> normal(0.01f, 0.02f);
  for (const int bits : {4, 8}) {
    for (const auto& [out, in] : {std::pair<int64_t, int64_t>(48, 576),
                                  {16, 64},
                                  {1, 8},
                                  {57, 104},
                                  {9, 200},
                                  {40, 32},
                                  {33, 160}}) {
      SCOPED_TRACE(testing::Message() << bits << " bits, [" << out << ", " << in << "]");
      std::vector<float> weight(static_cast<size_t>(out * in));
      for (float& w : weight) w = normal(random);
      const PackedShape shape{.out = out, .in = in, .bits = bits};
      std::vector<std::byte> packed(static_cast<size_t>(shape.bytes()), std::byte{0xff});
      PackWeight(shape, weight.data(), packed.data());

      const GroupQuantShape groups{.out = out, .in = in, .bits = bits};
      Buffer<uint8_t> stored(groups.bytes());
      GroupQuantize(groups, 0, out, weight.data(), stored.data());
      std::vector<float> want(weight.size());
      GroupDequantize(groups, stored.data(), 0, out, want.data(), in);
      for (int64_t o = 0; o < 16 * shape.tiles(); ++o)
        for (int64_t k = 0; k < groups.stride(); ++k) {
          const float got = Unpacked(shape, packed, o, k);
          if (o < out && k < in) {
            ASSERT_EQ(got, want[static_cast<size_t>(o * in + k)]) << o << ", " << k;
          } else if (o >= out) {
            ASSERT_EQ(got, 0.f) << o << ", " << k;
          }
        }
    }
  }
}

}  // namespace
}  // namespace dsla
