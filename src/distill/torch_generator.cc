#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "base/exec.h"
#include "distill/generator.h"
#include "distill/torch_teacher.h"

namespace dsla {

using at::Tensor;
using distill::Heads;
using distill::RopeTables;
using distill::Teacher;
using distill::TeacherLayer;

namespace {

// Steps between questions whether every text has ended: each waits for the device.
constexpr int kAskEvery = 16;

// [B] token ids from logits [B, V] and u [B] in [0, 1).
Tensor Draw(const Tensor& logits, const Tensor& u, const Sampling& sampling) {
  if (sampling.temperature == 0) return logits.argmax(1);
  const auto [p, ids] =
      (logits / sampling.temperature).softmax(1).sort(/*stable=*/true, 1, /*descending=*/true);
  // A token is kept while those before it hold less than top_p: never none of them.
  const Tensor kept = p * (p.cumsum(1) - p).lt(sampling.top_p);
  const Tensor sums = kept.cumsum(1);
  const Tensor target = u.unsqueeze(1) * sums.narrow(1, sums.size(1) - 1, 1);
  const Tensor last = kept.gt(0).sum(1) - 1;  // rounding may put the target behind all of them
  const Tensor place = sums.le(target).sum(1).minimum(last);
  return ids.gather(1, place.unsqueeze(1)).squeeze(1);
}

}  // namespace

struct Generator::Impl {
  distill::Placement placement;
  Teacher teacher;
  std::vector<double> frequencies;
  Tensor stops;              // [V] bool
  std::vector<Tensor> k, v;  // by layer [B, length, Hkv, D]
  Tensor cos, sin;           // [length, D / 2]

  // The hidden states [B, T, C] of ids at positions from `begin` on, which join the cache.
  Tensor Forward(const Tensor& ids, int64_t begin);
};

Tensor Generator::Impl::Forward(const Tensor& ids, int64_t begin) {
  const int64_t T = ids.size(1);
  const RopeTables rope = {cos.narrow(0, begin, T), sin.narrow(0, begin, T)};
  const double eps = teacher.config.norm_eps;
  Tensor h = at::embedding(teacher.embedding, ids);
  for (size_t l = 0; l < teacher.layers.size(); ++l) {
    const TeacherLayer& layer = teacher.layers[l];
    const Heads heads =
        distill::Project(teacher, layer, distill::Norm(h, layer.attn_norm, eps), rope, nullptr);
    k[l].narrow(1, begin, T).copy_(heads.k);
    v[l].narrow(1, begin, T).copy_(heads.v);
    // All of the prompt at once, then one token at a time, which sees all that is cached.
    const Tensor out = at::scaled_dot_product_attention(
        heads.q.transpose(1, 2), k[l].narrow(1, 0, begin + T).transpose(1, 2),
        v[l].narrow(1, 0, begin + T).transpose(1, 2), {}, 0.0, /*is_causal=*/begin == 0,
        std::nullopt, /*enable_gqa=*/true);
    h = distill::MlpBlock(
        teacher, layer,
        h + distill::OutputProjection(layer, out.transpose(1, 2).flatten(2), nullptr));
  }
  return distill::Norm(h, teacher.final_norm, eps);
}

Generator::Generator(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Generator::~Generator() = default;

Expected<std::unique_ptr<Generator>> Generator::Create(const ModelFile& file,
                                                       const GeneratorOptions& options) {
  auto impl = std::make_unique<Impl>();
  DSLA_ASSIGN_OR_RETURN(impl->placement, distill::Place(options.device, options.dtype));
  at::set_num_threads(ThreadCount(options.threads));
  DSLA_ASSIGN_OR_RETURN(impl->teacher, distill::ReadTeacher(file, impl->placement, 0));
  impl->frequencies = file.config().rope.Frequencies(file.config().D);
  DSLA_CHECK(static_cast<int64_t>(options.stops.size()) == file.config().V);
  Tensor stops = at::zeros({file.config().V}, at::kBool);
  std::copy(options.stops.begin(), options.stops.end(), stops.mutable_data_ptr<bool>());
  impl->stops = stops.to(impl->placement.device);
  return std::unique_ptr<Generator>(new Generator(std::move(impl)));
}

std::vector<std::vector<int32_t>> Generator::Generate(
    const std::vector<std::vector<int32_t>>& prompts, const Sampling& sampling,
    const std::function<double(int row, int position)>& uniform) {
  const at::NoGradGuard no_grad;
  Impl& g = *impl_;
  const auto B = static_cast<int64_t>(prompts.size());
  const int64_t P = static_cast<int64_t>(prompts.at(0).size()), T = sampling.length;
  DSLA_CHECK(P > 0 && P < T && sampling.temperature >= 0 && sampling.top_p > 0);
  const ModelConfig& c = g.teacher.config;
  Tensor start = at::empty({B, P}, at::kLong), noise = at::empty({B, T}, at::kFloat);
  for (int64_t row = 0; row < B; ++row) {
    DSLA_CHECK(static_cast<int64_t>(prompts[row].size()) == P);
    std::copy(prompts[row].begin(), prompts[row].end(),
              start.mutable_data_ptr<int64_t>() + row * P);
    for (int64_t t = P; t < T; ++t)  // rounded down: never 1
      noise.mutable_data_ptr<float>()[row * T + t] = static_cast<float>(
          std::floor(uniform(static_cast<int>(row), static_cast<int>(t)) * 0x1p24) * 0x1p-24);
  }
  const c10::Device device = g.placement.device;
  noise = noise.to(device);
  Tensor ids = at::zeros({B, T}, at::TensorOptions(at::kLong).device(device));
  ids.narrow(1, 0, P).copy_(start);
  const Tensor angles =
      at::outer(at::arange(T, at::kDouble), at::tensor(at::ArrayRef<double>(g.frequencies)));
  g.cos = angles.cos().to(device, at::kFloat), g.sin = angles.sin().to(device, at::kFloat);
  const std::vector<int64_t> shape = {B, T, c.Hkv, c.D};
  if (g.k.empty() || g.k[0].sizes() != at::IntArrayRef(shape)) {
    g.k.clear(), g.v.clear();
    for (int l = 0; l < c.L; ++l)
      for (std::vector<Tensor>* cache : {&g.k, &g.v})
        cache->push_back(at::empty(shape, at::TensorOptions(g.placement.type).device(device)));
  }
  Tensor ended = at::zeros({B}, at::TensorOptions(at::kBool).device(device));
  int64_t end = P;
  for (; end < T; ++end) {
    const int64_t begin = end == P ? 0 : end - 1;
    const Tensor hidden = g.Forward(ids.narrow(1, begin, end - begin), begin);
    const Tensor logits =
        at::linear(hidden.select(1, end - begin - 1), g.teacher.head).to(at::kFloat);
    const Tensor next = Draw(logits, noise.select(1, end), sampling);
    ids.select(1, end).copy_(next);
    ended.logical_or_(g.stops.index_select(0, next));
    if ((end - P) % kAskEvery == 0 && ended.all().item().toBool()) break;
  }
  end = std::min(end + 1, T);
  const Tensor host = ids.to(at::kCPU);
  const Tensor stops = g.stops.to(at::kCPU);
  std::vector<std::vector<int32_t>> texts;
  for (int64_t row = 0; row < B; ++row) {
    const int64_t* const from = host.const_data_ptr<int64_t>() + row * T;
    int64_t n = P;
    while (n < end && !stops.const_data_ptr<bool>()[from[n]]) ++n;
    texts.emplace_back(from, from + n);
  }
  return texts;
}

}  // namespace dsla
