// The element types that weights are stored in, and their exact conversion to fp32. Quantised types
// store blocks of consecutive elements of a row; the layouts are those of the GGUF format, and
// results are bit-equal to the `gguf` Python package's dequantize.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace dsla {

enum class StorageType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ4_K,
  kQ5_K,
  kQ6_K,
};

struct StorageTraits {
  const char* name;
  int block;  // elements per block; a row's length is a multiple of it
  int bytes;  // bytes per block
};
const StorageTraits& Traits(StorageType type);

// From GGUF's number and from safetensors' name; nullopt for types that this build does not read.
std::optional<StorageType> StorageTypeFromGguf(uint32_t number);
std::optional<StorageType> StorageTypeFromSafetensors(std::string_view dtype);

// Converts dst.size() elements, a whole number of blocks; src has exactly their bytes, at any
// alignment. Thread-safe.
void Dequantize(StorageType type, std::span<const std::byte> src, std::span<float> dst);

// No NaN and no Inf.
bool AllFinite(std::span<const float> values);

}  // namespace dsla
