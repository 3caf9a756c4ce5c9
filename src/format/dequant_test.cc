#include "format/dequant.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "format/safetensors.h"

namespace dsla {
namespace {

const StorageType kAll[] = {StorageType::kF32,  StorageType::kF16,  StorageType::kBF16,
                            StorageType::kQ4_0, StorageType::kQ4_1, StorageType::kQ5_0,
                            StorageType::kQ5_1, StorageType::kQ8_0, StorageType::kQ4_K,
                            StorageType::kQ5_K, StorageType::kQ6_K};

// Random blocks, with zero, subnormal and extreme scales, and the gguf package's result
// (tools/make_dequant_goldens.py).
TEST(Dequant, BitEqualToGgufPackage) {
  const auto file = SafetensorsFile::Open(std::string(DSLA_SOURCE_DIR) +
                                          "/src/format/testdata/dequant.safetensors");
  ASSERT_TRUE(file.ok()) << file.status().message();
  std::map<std::string, std::span<const std::byte>> tensors;
  for (const auto& tensor : file->tensors()) tensors[tensor.name] = tensor.data;
  for (const StorageType type : kAll) {
    const std::string name = Traits(type).name;
    ASSERT_TRUE(tensors.contains(name + ".stored")) << name;
    const auto expected = tensors[name + ".values"];
    std::vector<float> values(expected.size() / 4);
    ASSERT_GE(values.size(), 512u) << name;
    Dequantize(type, tensors[name + ".stored"], values);
    for (size_t i = 0; i < values.size(); ++i) {
      ASSERT_EQ(std::memcmp(&values[i], expected.data() + 4 * i, 4), 0)
          << name << " element " << i << " is " << values[i];
    }
  }
}

TEST(Dequant, EveryF16) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    float value = 0;
    Dequantize(StorageType::kF16, std::as_bytes(std::span(&half, 1)), std::span(&value, 1));
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const float sign = half & 0x8000 ? -1.f : 1.f;
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(value), mantissa != 0) << bits;
      EXPECT_EQ(std::isinf(value), mantissa == 0) << bits;
      EXPECT_EQ(std::signbit(value), sign < 0) << bits;
    } else {
      const float expected =
          exponent == 0 ? sign * std::ldexp(static_cast<float>(mantissa), -24)
                        : sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
      EXPECT_EQ(value, expected) << bits;
      EXPECT_EQ(std::signbit(value), sign < 0) << bits;
    }
  }
}

TEST(Dequant, TypesByName) {
  std::string names;
  for (uint32_t number = 0; number < 64; ++number) {
    const auto type = StorageTypeFromGguf(number);
    if (type) names += std::to_string(number) + Traits(*type).name + " ";
  }
  EXPECT_EQ(names, "0F32 1F16 2Q4_0 3Q4_1 6Q5_0 7Q5_1 8Q8_0 12Q4_K 13Q5_K 14Q6_K 30BF16 ");
  EXPECT_EQ(StorageTypeFromSafetensors("BF16"), StorageType::kBF16);
  EXPECT_EQ(StorageTypeFromSafetensors("Q4_0"), std::nullopt);
}

TEST(Dequant, AllFiniteSeesEveryPlace) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (size_t at = 0; at < 37; ++at) {
      std::vector<float> values(37, std::numeric_limits<float>::max());
      EXPECT_TRUE(AllFinite(values));
      values[at] = bad;
      EXPECT_FALSE(AllFinite(values)) << at;
    }
  }
  EXPECT_TRUE(AllFinite({}));
}

}  // namespace
}  // namespace dsla
