// Element types of tensors that operators read and write.
#pragma once

#include <cstdint>

namespace dsla {

enum class DType : uint8_t {
  kF32,
  kBF16,
  kI8  // integers in [-127, 127] that share a scale: rows of a KV cache (ops/views.h)
};

constexpr int64_t SizeOf(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kBF16 ? 2 : 1;
}
constexpr const char* Name(DType dtype) {
  return dtype == DType::kF32 ? "fp32" : dtype == DType::kBF16 ? "bf16" : "int8";
}

}  // namespace dsla
