// What the functions of dsla_autograd.h share: types, products, and rows cut out of a padded
// stream. Internal.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace dsla::autograd {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline at::ScalarType SumType(const Tensor& operand) {
  return operand.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// An input that may be missing, as torch::autograd::Function takes it.
inline std::optional<Tensor> Given(const Tensor& x) {
  return x.defined() ? std::optional<Tensor>(x) : std::nullopt;
}

inline void CheckOperand(const char* op, const char* name, const Tensor& x, int64_t dim) {
  TORCH_CHECK(x.defined(), op, ": ", name, " is not given");
  TORCH_CHECK(x.dim() == dim, op, ": ", name, " has ", x.dim(), " dimensions, expected ", dim);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat ||
                  x.scalar_type() == at::kDouble,
              op, ": ", name, " is ", x.scalar_type(), ", expected bf16, fp32 or fp64");
}

// x has this shape, type and the device of `like`.
inline void CheckTensor(const char* op, const char* name, const Tensor& x, at::IntArrayRef shape,
                        at::ScalarType type, const Tensor& like) {
  TORCH_CHECK(x.defined(), op, ": ", name, " is not given");
  TORCH_CHECK(x.sizes() == shape, op, ": ", name, " is ", x.sizes(), ", expected ", shape);
  TORCH_CHECK(x.scalar_type() == type, op, ": ", name, " is ", x.scalar_type(), ", expected ",
              type);
  TORCH_CHECK(x.device() == like.device(), op, ": ", name, " is on ", x.device(), ", expected ",
              like.device());
}

// Backward passes here are not themselves differentiable.
inline void CheckOnce(const char* op) {
  TORCH_CHECK(!at::GradMode::is_enabled(), op, ": differentiable once only (create_graph is set)");
}

// a [..., m, k] times b [..., k, n], batch dimensions equal; sums and result in the sum type.
inline Tensor Product(const Tensor& a, const Tensor& b) {
  const at::ScalarType sum = SumType(a);
  std::vector<int64_t> shape(a.sizes().begin(), a.sizes().end());
  shape.back() = b.size(-1);
  Tensor a3 = a.reshape({-1, a.size(-2), a.size(-1)}), b3 = b.reshape({-1, b.size(-2), b.size(-1)});
  if (a3.scalar_type() == sum) return at::bmm(a3, b3).view(shape);
  if (a3.is_cuda()) return at::bmm(a3, b3, sum).view(shape);
  // The CPU has no bf16 product with an fp32 result.
  return at::bmm(a3.to(sum), b3.to(sum)).view(shape);
}

// [B, T, h, D] -> [h, B T, D], the operand of a product per head.
inline Tensor PerHead(const Tensor& x) { return x.permute({2, 0, 1, 3}).flatten(1, 2); }
// [h, B T, D] -> [B, T, h, D], a view.
inline Tensor FromPerHead(const Tensor& x, int64_t B, int64_t T) {
  return x.unflatten(1, {B, T}).permute({1, 2, 0, 3});
}
// [states, Hkv, D, F] -> [Hkv, D, states F], as one product makes the logits of all gates.
inline Tensor JoinStates(const Tensor& weight) { return weight.permute({1, 2, 0, 3}).flatten(2); }

// A stream of rows along dimension 1 in which x's rows [first, last) stand at `at` + first, ...,
// and everything else is zero.
struct Rows {
  int64_t at = 0, first = 0, last = 0;

  // Which rows of x lie in [begin, end) of the stream: lo == hi if none.
  void Clip(int64_t begin, int64_t end, int64_t* lo, int64_t* hi) const {
    *lo = std::max(begin, at + first);
    *hi = std::max(*lo, std::min(end, at + last));
  }
  // Rows [begin, end) of the stream.
  Tensor Take(const Tensor& x, int64_t begin, int64_t end) const {
    int64_t lo, hi;
    Clip(begin, end, &lo, &hi);
    if (lo == hi) {
      std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
      shape[1] = end - begin;
      return at::zeros(shape, x.options());
    }
    Tensor rows = x.narrow(1, lo - at, hi - lo);
    if (lo == begin && hi == end) return rows;
    std::vector<int64_t> pad(2 * static_cast<size_t>(x.dim() - 1), 0);
    pad[pad.size() - 2] = lo - begin;
    pad[pad.size() - 1] = end - hi;
    return at::constant_pad_nd(rows, pad);
  }
  // The part of x that stands in [begin, end), and the same rows of `rows`, which holds that range.
  void Put(Tensor& x, const Tensor& rows, int64_t begin, int64_t end) const {
    int64_t lo, hi;
    Clip(begin, end, &lo, &hi);
    if (lo < hi) x.narrow(1, lo - at, hi - lo).copy_(rows.narrow(1, lo - begin, hi - lo));
  }
  void Add(Tensor& x, const Tensor& rows, int64_t begin, int64_t end) const {
    int64_t lo, hi;
    Clip(begin, end, &lo, &hi);
    if (lo < hi) x.narrow(1, lo - at, hi - lo).add_(rows.narrow(1, lo - begin, hi - lo));
  }
};

}  // namespace dsla::autograd
