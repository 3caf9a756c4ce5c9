#include "distill/torch_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "base/check.h"
#include "distill/torch_layers.h"
#include "ops/training/training_kernels.h"

namespace dsla::distill {
namespace {

// Positions whose logits exist at a time: about 2^27 of them in fp32 are 0.5 GiB.
int64_t Positions(const Tensor& head) {
  return std::max<int64_t>(64, (int64_t{1} << 27) / head.size(0));
}

Tensor LogProbabilities(const Tensor& hidden, const Tensor& head) {
  return at::log_softmax(at::linear(hidden, head), -1, at::kFloat);
}

// *kl [m]: of each row of logits [m, V]. The student's become the gradient by them, times scale
// [m].
void ToKlGradient(const Tensor& teacher, const Tensor& scale, Tensor* student, Tensor* kl) {
  if (HasTrainingKernels(*student) && student->size(1) % 8 == 0) {
    *kl = at::empty_like(scale);
    DSLA_CHECK(TrainingKernels()->kl({teacher.const_data_ptr(), student->mutable_data_ptr(),
                                      scale.const_data_ptr<float>(), kl->mutable_data_ptr<float>(),
                                      student->size(0), static_cast<int>(student->size(1))},
                                     nullptr) == 0);
    return;
  }
  const Tensor log_t = at::log_softmax(teacher, -1, at::kFloat), p_t = log_t.exp();
  Tensor log_s = at::log_softmax(*student, -1, at::kFloat);
  *kl = (log_t - log_s).mul_(p_t).sum(1);
  *student = log_s.exp_().sub_(p_t).mul_(scale.unsqueeze(1)).to(student->scalar_type());
}

Tensor FusedNormalisedError(const Tensor& y, const Tensor& o, const Tensor& counted, Ranks* ranks,
                            Tensor* gradient) {
  const auto fp32 = y.options().dtype(at::kFloat);
  Tensor parts = at::empty({cuda::kTrainingErrorBlocks, 2}, fp32);
  const Tensor rows = counted.defined() ? counted.contiguous() : counted;
  const int64_t width = y.size(-1);
  cuda::TrainingErrorArgs args{y.const_data_ptr(),
                               o.const_data_ptr(),
                               rows.defined() ? rows.const_data_ptr<float>() : nullptr,
                               parts.mutable_data_ptr<float>(),
                               nullptr,
                               nullptr,
                               y.numel() / width,
                               static_cast<int>(width)};
  DSLA_CHECK(TrainingKernels()->error_sums(args, nullptr) == 0);
  const Tensor sums = parts.sum(0);
  Tensor scale = sums.select(0, 1).clone();
  if (ranks != nullptr) ranks->Sum(scale);
  scale.clamp_min_(1e-20).reciprocal_();
  if (gradient != nullptr) {
    *gradient = at::empty_like(y);
    args.scale = scale.const_data_ptr<float>(), args.gradient = gradient->mutable_data_ptr();
    DSLA_CHECK(TrainingKernels()->error_gradient(args, nullptr) == 0);
  }
  return sums.select(0, 0) * scale;
}

}  // namespace

Tensor KlGradient(const Tensor& head, const Tensor& hidden, const Tensor& teacher,
                  const Tensor& counted, int64_t of, double weight, Tensor* gradient) {
  const Tensor student = hidden.detach().flatten(0, 1), target = teacher.flatten(0, 1);
  const int64_t n = student.size(0);
  const auto fp32 = student.options().dtype(at::kFloat);
  Tensor share = counted.defined() ? counted.flatten() : at::ones({n}, fp32);
  share = of > 0 ? share / static_cast<double>(of) : share / share.sum();
  Tensor total = at::zeros({}, fp32), d = at::empty_like(student);
  const int64_t step = Positions(head);
  for (int64_t i = 0; i < n; i += step) {
    const int64_t m = std::min(step, n - i);
    const Tensor w = share.narrow(0, i, m);
    const Tensor scale = w * weight;
    Tensor kl, logits = at::linear(student.narrow(0, i, m), head);
    ToKlGradient(at::linear(target.narrow(0, i, m), head), scale, &logits, &kl);
    total.add_((kl * w).sum());
    d.narrow(0, i, m).copy_(at::matmul(logits, head));
  }
  *gradient = d.view(hidden.sizes());
  return total;
}

Tensor NormalisedError(const Tensor& y, const Tensor& o, const Tensor& counted, Ranks* ranks,
                       Tensor* gradient) {
  if (HasTrainingKernels(y) && HasTrainingKernels(o) && y.size(-1) % 8 == 0)
    return FusedNormalisedError(y.detach().contiguous(), o.contiguous(), counted, ranks, gradient);
  Tensor difference = y.detach().to(at::kFloat).sub(o), reference = o.to(at::kFloat);
  if (counted.defined()) {
    difference = difference * counted.unsqueeze(2);
    reference = reference * counted.unsqueeze(2);
  }
  Tensor scale = reference.square().sum();
  if (ranks != nullptr) ranks->Sum(scale);
  scale.clamp_min_(1e-20).reciprocal_();
  const Tensor error = difference.square().sum() * scale;
  if (gradient != nullptr) *gradient = difference.mul_(scale * 2).to(y.scalar_type());
  return error;
}

Divergence MeasureDivergence(const Tensor& head, const Tensor& hidden, const Tensor& teacher,
                             const Tensor& counted, const Tensor& targets) {
  const Tensor student = hidden.flatten(0, 1), target = teacher.flatten(0, 1);
  const int64_t B = hidden.size(0), n = student.size(0);
  const auto fp32 = student.options().dtype(at::kFloat);
  const Tensor weights = counted.defined() ? counted.flatten() : at::ones({n}, fp32);
  Tensor kl = at::zeros({n}, fp32), sums = at::zeros({4}, fp32.dtype(at::kDouble));
  const int64_t step = Positions(head);
  for (int64_t i = 0; i < n; i += step) {
    const int64_t m = std::min(step, n - i);
    const Tensor log_t = LogProbabilities(target.narrow(0, i, m), head);
    const Tensor log_s = LogProbabilities(student.narrow(0, i, m), head);
    kl.narrow(0, i, m).copy_((log_t.exp() * (log_t - log_s)).sum(1));
    const Tensor best_t = log_t.argmax(1), best_s = log_s.argmax(1);
    sums.select(0, 0).add_((best_t.eq(best_s) * weights.narrow(0, i, m)).sum());
    if (!targets.defined()) continue;
    const Tensor asked = targets.flatten().narrow(0, i, m);
    sums.select(0, 1).add_(best_s.eq(asked).sum());
    sums.select(0, 2).add_(best_t.eq(asked).sum());
    sums.select(0, 3).add_(asked.ge(0).sum());
  }
  kl = (kl * weights).view({B, -1}).to(at::kDouble);
  const Tensor tokens = weights.view({B, -1}).to(at::kDouble).sum(1);
  const Tensor rows = (kl.sum(1) / tokens.clamp_min(1)).cpu();
  Divergence result;
  result.kl = kl.sum().item().toDouble();
  result.tokens = tokens.sum().item().toDouble();
  const Tensor host = sums.cpu();
  const double* const s = host.const_data_ptr<double>();
  result.agree = s[0], result.hits = s[1], result.teacher_hits = s[2], result.asked = s[3];
  result.row_kl.assign(rows.const_data_ptr<double>(), rows.const_data_ptr<double>() + B);
  return result;
}

}  // namespace dsla::distill
