#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include "ops/linear/linear_gemm.h"

namespace dsla {
namespace {

at::Tensor View(const void* data, int64_t rows, int64_t cols, int64_t stride, at::ScalarType type) {
  // libtorch reads strides as they are; a single row's stride only has to be a valid leading
  // dimension.
  const int64_t sizes[] = {rows, cols}, strides[] = {stride < cols ? cols : stride, 1};
  return at::from_blob(const_cast<void*>(data), sizes, strides, type);
}

// libtorch's thread count is a property of the process (MKL's) and of the calling thread
// (OpenMP's): setting it is not free, so only a change is passed on.
void UseOneThread() {
  if (at::get_num_threads() != 1) at::set_num_threads(1);
}

}  // namespace
}  // namespace dsla

// A Gemm: LoadGemm (linear_gemm.h) finds it here.
extern "C" void DslaGemm(const dsla::GemmArgs& a) {
  using dsla::View;
  const c10::InferenceMode guard;
  dsla::UseOneThread();
  const at::Tensor x = View(a.x, a.T, a.in, a.x_stride, at::kFloat);
  const at::Tensor w = View(a.w, a.out, a.in, a.w_stride, at::kFloat);
  at::Tensor y = View(a.y, a.T, a.out, a.y_stride, at::kFloat);
  if (a.accumulate)
    at::addmm_out(y, y, x, w.t());
  else
    at::mm_out(y, x, w.t());
}
