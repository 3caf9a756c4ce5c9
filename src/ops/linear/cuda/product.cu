// The products of linear_cuda.h, by the kernel for their number of rows.
#include "base/check.h"
#include "ops/linear/cuda/product.cuh"

namespace dsla::cuda {
namespace {

void CheckProduct(const ProductParams& p) {
  DSLA_CHECK(p.out > 0 && p.in > 0 && p.in % 8 == 0 && p.x_stride % 8 == 0 && p.T >= 0);
  if (p.T == 0) return;
  DSLA_CHECK(p.weight && p.x && (p.y || p.split == 0) && (p.claim || p.split == p.results()));
  DSLA_CHECK(reinterpret_cast<uintptr_t>(p.weight) % 16 == 0);
  DSLA_CHECK(reinterpret_cast<uintptr_t>(p.x) % 16 == 0);
}

int Launch(const ProductPair& pair, Stream stream) {
  const int T = pair.of[0].T;
  if (T == 0) return cudaSuccess;
  const bool skinny = T <= kMostSkinnyRows || pair.of[0].bits < 16;
  return skinny ? LaunchSkinny(pair, stream) : LaunchTiled(pair, stream);
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

ProductParams Params(const ProductArgs& a) {
  DSLA_CHECK(!a.gated || (a.out % 2 == 0 && !a.add));
  DSLA_CHECK(a.bits == 16 || a.bits == 8 || a.bits == 4);
  DSLA_CHECK(a.scale ? a.bits == 8 && a.in % kRoundedInputs == 0
                     : a.bits == 16 || !a.gated || a.out % (2 * kUnitFeatures) == 0);
  ProductParams p = Common(a);
  p.bits = a.bits;
  p.scale = a.scale;
  p.out = a.out;
  p.gated = a.gated;
  p.split = p.results();
  p.y = a.y;
  p.y_stride = a.y_stride;
  p.y_f32 = a.y_f32;
  p.add = a.add;
  CheckProduct(p);
  return p;
}

ProductParams Params(const AdapterInArgs& a) {
  DSLA_CHECK(a.r >= 0 && a.H >= 0 && a.first_row && (a.H == 0 || a.claim_bias));
  ProductParams p = Common(a);
  p.bits = 16;
  p.out = a.r + a.H;
  p.split = a.r;
  p.y = a.low_rank;
  p.y_stride = a.r;
  p.claim = a.claim;
  p.claim_bias = a.claim_bias;
  CheckProduct(p);
  return p;
}

}  // namespace

int SmallProduct(const ProductArgs& args, Stream stream) { return Launch({Params(args)}, stream); }

int AdapterIn(const AdapterInArgs& args, Stream stream) { return Launch({Params(args)}, stream); }

int JointProduct(const ProductArgs& product, const AdapterInArgs& adapter, Stream stream) {
  // A block whose product has no rows leaves without a wait, so one of them must have all.
  DSLA_CHECK(product.first_row == nullptr && !product.gated && product.bits == 16);
  DSLA_CHECK(product.in == adapter.in && product.T == adapter.T);
  return Launch({Params(product), Params(adapter)}, stream);
}

}  // namespace dsla::cuda
