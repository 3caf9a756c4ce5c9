// The products of linear_cuda.h, by the kernel for their number of rows.
#include "base/check.h"
#include "ops/linear/cuda/product.cuh"

namespace dsla::cuda {
namespace {

int Launch(const ProductParams& p, Stream stream) {
  DSLA_CHECK(p.out > 0 && p.in > 0 && p.in % 8 == 0 && p.x_stride % 8 == 0 && p.T >= 0);
  if (p.T == 0) return cudaSuccess;
  DSLA_CHECK(p.weight && p.x && (p.y || p.split == 0) && (p.claim || p.split == p.results()));
  DSLA_CHECK(reinterpret_cast<uintptr_t>(p.weight) % 16 == 0);
  DSLA_CHECK(reinterpret_cast<uintptr_t>(p.x) % 16 == 0);
  return p.T <= kMostSkinnyRows ? LaunchSkinny(p, stream) : LaunchTiled(p, stream);
}

// What both have.
template <typename Args>
ProductParams Common(const Args& a) {
  ProductParams p{};
  p.weight = static_cast<const __nv_bfloat16*>(a.weight);
  p.x = static_cast<const __nv_bfloat16*>(a.x);
  p.x_stride = a.x_stride;
  p.in = a.in;
  p.T = a.T;
  p.first_row = a.first_row;
  return p;
}

}  // namespace

int SmallProduct(const ProductArgs& a, Stream stream) {
  DSLA_CHECK(!a.gated || (a.out % 2 == 0 && !a.add));
  ProductParams p = Common(a);
  p.out = a.out;
  p.gated = a.gated;
  p.split = p.results();
  p.y = a.y;
  p.y_stride = a.y_stride;
  p.y_f32 = a.y_f32;
  p.add = a.add;
  return Launch(p, stream);
}

int AdapterIn(const AdapterInArgs& a, Stream stream) {
  DSLA_CHECK(a.r >= 0 && a.H >= 0 && a.first_row && (a.H == 0 || a.claim_bias));
  ProductParams p = Common(a);
  p.out = a.r + a.H;
  p.split = a.r;
  p.y = a.low_rank;
  p.y_stride = a.r;
  p.clear = true;
  p.claim = a.claim;
  p.claim_bias = a.claim_bias;
  return Launch(p, stream);
}

}  // namespace dsla::cuda
