// Element types of tensors that operators read and write.
#pragma once

#include <cstdint>

namespace dsla {

enum class DType : uint8_t { kF32, kBF16 };

constexpr int64_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
constexpr const char* Name(DType dtype) { return dtype == DType::kF32 ? "fp32" : "bf16"; }

}  // namespace dsla
