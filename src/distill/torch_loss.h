// Losses with their gradients in one pass, so that no whole [tokens, V] is ever kept. Internal to
// the room.
#pragma once

#include <ATen/core/Tensor.h>

#include "distill/network.h"

namespace dsla::distill {

using at::Tensor;

// Mean over the counted positions of KL(softmax(head teacher) || softmax(head hidden)), fp32
// scalar. hidden, teacher [B, T, C] after the final norm; counted [B, T] 0 or 1, undefined: all.
// *gradient: `weight` times its derivative by hidden, of hidden's type. Logits exist for a few
// thousand positions at a time. `of`: how many positions the mean is over, where these are a part
// of those that several ranks hold, so that the sum over the ranks is the mean; 0: the counted
// ones here.
Tensor KlGradient(const Tensor& head, const Tensor& hidden, const Tensor& teacher,
                  const Tensor& counted, int64_t of, double weight, Tensor* gradient);

// ||y - o||^2 / ||o||^2 over the counted positions of y, o [B, T, C]; *gradient (may be null): by
// y. With `ranks` (null: alone) ||o||^2 is of all of them, so that the sum over the ranks is the
// error of the whole batch.
Tensor NormalisedError(const Tensor& y, const Tensor& o, const Tensor& counted, Ranks* ranks,
                       Tensor* gradient);

// targets [B, T] int64, -1: nothing asked; undefined: no recall.
Divergence MeasureDivergence(const Tensor& head, const Tensor& hidden, const Tensor& teacher,
                             const Tensor& counted, const Tensor& targets);

}  // namespace dsla::distill
