// A whole layer in one function on a GPU in bf16: batched products of libtorch, and between them
// the kernels of ops/training, one pass where the composition of dsla_autograd_layer.cc takes many.
// Internal.
#pragma once

#include "ops/dsla/dsla_autograd.h"

namespace dsla::autograd {

// Whether FusedLayer is written for it and its kernels are there.
bool FusedLayerTakes(const at::Tensor& q, const DslaLayerParams& params,
                     const DslaLayerOptions& options);

// DslaLayer of checked arguments.
at::Tensor FusedLayer(const at::Tensor& q, const at::Tensor& k, const at::Tensor& k_plain,
                      const at::Tensor& v, const at::Tensor& claim, const DslaLayerParams& params,
                      const DslaLayerOptions& options);

// What DslaRope computes, likewise; without a gradient.
bool FusedRopeTakes(const at::Tensor& x);
at::Tensor FusedRotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                       bool inverse);

}  // namespace dsla::autograd
