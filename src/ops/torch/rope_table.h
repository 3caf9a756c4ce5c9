// RopeTable as an object that torch operators take: torch.classes.dsla.RopeTable(frequencies,
// positions). Immutable, thread-safe.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include "ops/norm_rope/norm_rope.h"

namespace dsla {

class TorchRopeTable : public torch::CustomClassHolder {
 public:
  // frequencies: [D/2] fp64, CPU: angle per position.
  TorchRopeTable(const at::Tensor& frequencies, int64_t positions);

  const RopeTable& table() const { return table_; }
  int64_t positions() const { return table_.positions(); }
  // Copies, [positions, D/2] fp32.
  at::Tensor Cos() const { return Copy(table_.cos()); }
  at::Tensor Sin() const { return Copy(table_.sin()); }

 private:
  at::Tensor Copy(const float* values) const;

  RopeTable table_;
};

}  // namespace dsla
