#include "format/dequant.h"

#include <array>
#include <bit>
#include <cstring>

#include "base/check.h"
#include "base/half.h"

// Every value is one multiplication, or one multiplication and one addition, each rounded to fp32
// (the build never contracts them into an fma): that is what makes results equal bit for bit
// everywhere. The loops are plain so that the compiler vectorises them.
namespace dsla {
namespace {

constexpr std::array<StorageTraits, 11> kTraits = {{
    {"F32", 1, 4},
    {"F16", 1, 2},
    {"BF16", 1, 2},
    {"Q4_0", 32, 18},
    {"Q4_1", 32, 20},
    {"Q5_0", 32, 22},
    {"Q5_1", 32, 24},
    {"Q8_0", 32, 34},
    {"Q4_K", 256, 144},
    {"Q5_K", 256, 176},
    {"Q6_K", 256, 210},
}};

// ToFloat(f16) without branches, so that loops vectorise: shift the bits into place and let one
// multiplication by 2^112 rebase the exponent, which is exact for subnormals too; Inf and NaN get
// the exponent back.
float WidenF16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(sign | scaled | special);
}

float LoadF16(const uint8_t* p) { return WidenF16(static_cast<uint16_t>(p[0] | p[1] << 8)); }

void BlockF16(const uint8_t* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, src + 2 * i, 2);
    dst[i] = WidenF16(bits);
  }
}

void BlockBF16(const uint8_t* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, src + 2 * i, 2);
    dst[i] = ToFloat(bf16{bits});
  }
}

// d f16, 16 bytes of two 4-bit values: the low halves are elements 0..15, the high ones 16..31.
void BlockQ4_0(const uint8_t* src, float* dst) {
  const float d = LoadF16(src);
  for (int i = 0; i < 16; ++i) {
    dst[i] = d * static_cast<float>((src[2 + i] & 15) - 8);
    dst[i + 16] = d * static_cast<float>((src[2 + i] >> 4) - 8);
  }
}

// d f16, m f16, 4-bit values as in Q4_0.
void BlockQ4_1(const uint8_t* src, float* dst) {
  const float d = LoadF16(src), m = LoadF16(src + 2);
  for (int i = 0; i < 16; ++i) {
    dst[i] = d * static_cast<float>(src[4 + i] & 15) + m;
    dst[i + 16] = d * static_cast<float>(src[4 + i] >> 4) + m;
  }
}

// Bit i of the 32-bit field is the fifth bit of element i.
void UnpackQ5(const uint8_t* high, const uint8_t* low, int values[32]) {
  uint32_t bits;
  std::memcpy(&bits, high, 4);
  for (int i = 0; i < 16; ++i) {
    values[i] = (low[i] & 15) | static_cast<int>((bits >> i & 1) << 4);
    values[i + 16] = (low[i] >> 4) | static_cast<int>((bits >> (i + 16) & 1) << 4);
  }
}

// d f16, fifth bits, 4-bit values.
void BlockQ5_0(const uint8_t* src, float* dst) {
  const float d = LoadF16(src);
  int values[32];
  UnpackQ5(src + 2, src + 6, values);
  for (int i = 0; i < 32; ++i) dst[i] = d * static_cast<float>(values[i] - 16);
}

// d f16, m f16, fifth bits, 4-bit values.
void BlockQ5_1(const uint8_t* src, float* dst) {
  const float d = LoadF16(src), m = LoadF16(src + 2);
  int values[32];
  UnpackQ5(src + 4, src + 8, values);
  for (int i = 0; i < 32; ++i) dst[i] = d * static_cast<float>(values[i]) + m;
}

// d f16, 32 signed bytes.
void BlockQ8_0(const uint8_t* src, float* dst) {
  const float d = LoadF16(src);
  for (int i = 0; i < 32; ++i) dst[i] = d * static_cast<float>(static_cast<int8_t>(src[2 + i]));
}

// The 12 bytes of Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima. The first four of each
// lie in the low 6 bits of bytes 0..3 and 4..7; the others have their low 4 bits in bytes 8..11 and
// their high 2 in the tops of the former.
struct ScaleMin {
  float scale[8], min[8];
};
ScaleMin UnpackScales(const uint8_t* p, float d, float dmin) {
  ScaleMin out;
  for (int i = 0; i < 4; ++i) {
    out.scale[i] = d * static_cast<float>(p[i] & 63);
    out.min[i] = dmin * static_cast<float>(p[i + 4] & 63);
    out.scale[i + 4] = d * static_cast<float>((p[i + 8] & 15) | (p[i] >> 6 << 4));
    out.min[i + 4] = dmin * static_cast<float>((p[i + 8] >> 4) | (p[i + 4] >> 6 << 4));
  }
  return out;
}

// d f16, dmin f16, 12 bytes of scales, 128 bytes: 32 bytes hold two sub-blocks of 32, low halves
// first.
void BlockQ4_K(const uint8_t* src, float* dst) {
  const ScaleMin s = UnpackScales(src + 4, LoadF16(src), LoadF16(src + 2));
  for (int pair = 0; pair < 4; ++pair) {
    const uint8_t* q = src + 16 + 32 * pair;
    float* out = dst + 64 * pair;
    for (int i = 0; i < 32; ++i) {
      out[i] = s.scale[2 * pair] * static_cast<float>(q[i] & 15) - s.min[2 * pair];
    }
    for (int i = 0; i < 32; ++i) {
      out[i + 32] = s.scale[2 * pair + 1] * static_cast<float>(q[i] >> 4) - s.min[2 * pair + 1];
    }
  }
}

// As Q4_K, with 32 bytes of fifth bits before the values: bit j of byte i belongs to element i of
// sub-block j.
void BlockQ5_K(const uint8_t* src, float* dst) {
  const ScaleMin s = UnpackScales(src + 4, LoadF16(src), LoadF16(src + 2));
  const uint8_t* high = src + 16;
  for (int j = 0; j < 8; ++j) {
    const uint8_t* q = src + 48 + 32 * (j / 2);
    const int shift = j % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      const int value = (q[i] >> shift & 15) | (high[i] >> j & 1) << 4;
      dst[32 * j + i] = s.scale[j] * static_cast<float>(value) - s.min[j];
    }
  }
}

// 128 bytes of low 4 bits, 64 of high 2 bits, 16 signed scales (one per 16 elements), d f16. Each
// half of the block takes 64 low bytes (elements i and i + 64 share byte i) and 32 high bytes.
void BlockQ6_K(const uint8_t* src, float* dst) {
  const float d = LoadF16(src + 208);
  for (int j = 0; j < 8; ++j) {
    const int half = j / 4, quarter = j % 4;
    const uint8_t* low = src + 64 * half + 32 * (quarter % 2);
    const uint8_t* high = src + 128 + 32 * half;
    const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
    for (int i = 0; i < 32; ++i) {
      const float scale = d * static_cast<float>(static_cast<int8_t>(src[192 + 2 * j + i / 16]));
      const int value = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
      dst[32 * j + i] = scale * static_cast<float>(value - 32);
    }
  }
}

template <void (*Block)(const uint8_t*, float*)>
void Blocks(const StorageTraits& traits, const uint8_t* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; i += traits.block, src += traits.bytes) Block(src, dst + i);
}

}  // namespace

const StorageTraits& Traits(StorageType type) { return kTraits[static_cast<size_t>(type)]; }

std::optional<StorageType> StorageTypeFromGguf(uint32_t number) {
  switch (number) {
    case 0:
      return StorageType::kF32;
    case 1:
      return StorageType::kF16;
    case 2:
      return StorageType::kQ4_0;
    case 3:
      return StorageType::kQ4_1;
    case 6:
      return StorageType::kQ5_0;
    case 7:
      return StorageType::kQ5_1;
    case 8:
      return StorageType::kQ8_0;
    case 12:
      return StorageType::kQ4_K;
    case 13:
      return StorageType::kQ5_K;
    case 14:
      return StorageType::kQ6_K;
    case 30:
      return StorageType::kBF16;
    default:
      return std::nullopt;
  }
}

std::optional<StorageType> StorageTypeFromSafetensors(std::string_view dtype) {
  if (dtype == "F32") return StorageType::kF32;
  if (dtype == "F16") return StorageType::kF16;
  if (dtype == "BF16") return StorageType::kBF16;
  return std::nullopt;
}

void Dequantize(StorageType type, std::span<const std::byte> src_bytes, std::span<float> dst_span) {
  const StorageTraits& traits = Traits(type);
  const int64_t n = static_cast<int64_t>(dst_span.size());
  DSLA_CHECK(n % traits.block == 0);
  DSLA_CHECK(static_cast<int64_t>(src_bytes.size()) == n / traits.block * traits.bytes);
  const auto* src = reinterpret_cast<const uint8_t*>(src_bytes.data());
  float* dst = dst_span.data();
  if (n == 0) return;
  switch (type) {
    case StorageType::kF32:
      std::memcpy(dst, src, static_cast<size_t>(n) * 4);
      return;
    case StorageType::kF16:
      return BlockF16(src, dst, n);
    case StorageType::kBF16:
      return BlockBF16(src, dst, n);
    case StorageType::kQ4_0:
      return Blocks<BlockQ4_0>(traits, src, dst, n);
    case StorageType::kQ4_1:
      return Blocks<BlockQ4_1>(traits, src, dst, n);
    case StorageType::kQ5_0:
      return Blocks<BlockQ5_0>(traits, src, dst, n);
    case StorageType::kQ5_1:
      return Blocks<BlockQ5_1>(traits, src, dst, n);
    case StorageType::kQ8_0:
      return Blocks<BlockQ8_0>(traits, src, dst, n);
    case StorageType::kQ4_K:
      return Blocks<BlockQ4_K>(traits, src, dst, n);
    case StorageType::kQ5_K:
      return Blocks<BlockQ5_K>(traits, src, dst, n);
    case StorageType::kQ6_K:
      return Blocks<BlockQ6_K>(traits, src, dst, n);
  }
}

bool AllFinite(std::span<const float> values) {
  uint32_t bad = 0;
  for (const float value : values) {
    bad |= static_cast<uint32_t>((std::bit_cast<uint32_t>(value) & 0x7f800000u) == 0x7f800000u);
  }
  return bad == 0;
}

}  // namespace dsla
