// The formulas are those of dsla_autograd.cc and dsla_autograd_layer.cc. Chunks come first in every
// array, [n, B, Hkv, ...], so that those with queries are a part of all.
#include "ops/dsla/dsla_autograd_fused.h"

#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>

#include "ops/dsla/dsla_autograd_util.h"
#include "ops/training/training_kernels.h"

namespace dsla::autograd {
namespace {

using cuda::kTrainingChunk;
using cuda::TrainingShape;

// Kernels run on libtorch's default stream, as the trainer's other work does.
void Check(int error) { TORCH_CHECK(error == 0, "training kernel: CUDA error ", error); }

const float* Floats(const Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }
const void* Data(const Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

TrainingShape MakeShape(const Tensor& q, const Tensor& k, const Tensor& gate_weight,
                        const DslaLayerOptions& options) {
  const int64_t T = q.size(1), TK = k.size(1), C = kTrainingChunk;
  const int64_t window = options.chunked.window, sinks = std::min(options.chunked.sinks, TK);
  const int64_t enter = TK - window;  // keys before this one enter
  const int64_t length = (std::max(enter, T) + C - 1) / C * C;
  const int64_t key_at = length - enter, query_at = length - T;
  const int64_t begin = sinks < enter ? (key_at + sinks) / C * C : length;
  TrainingShape s{};
  s.B = static_cast<int>(q.size(0)), s.T = static_cast<int>(T), s.TK = static_cast<int>(TK);
  s.H = static_cast<int>(q.size(2)), s.Hkv = static_cast<int>(k.size(2));
  s.D = static_cast<int>(q.size(3)), s.F = static_cast<int>(gate_weight.size(3));
  s.states = static_cast<int>(gate_weight.size(0));
  s.window = static_cast<int>(window), s.sinks = static_cast<int>(sinks);
  s.chunks = static_cast<int>((length - begin) / C);
  s.key_at = static_cast<int>(key_at - begin), s.query_at = static_cast<int>(query_at - begin);
  s.query_chunks = s.chunks - std::max(s.query_at, 0) / kTrainingChunk;
  s.first_key = static_cast<int>(sinks), s.last_key = static_cast<int>(std::max(enter, sinks));
  s.gate_floor = static_cast<float>(options.gate_floor);
  return s;
}

// The operands of a pass's products, and their addresses for the kernels.
struct Operands {
  Tensor a, phi_k, phi_q, k, q, ve, enter, leave;

  static Operands Empty(const TrainingShape& s, const at::TensorOptions& bf16) {
    const auto fp32 = bf16.dtype(at::kFloat);
    const int64_t n = s.chunks, nq = s.query_chunks, G = s.G(), C = kTrainingChunk;
    Operands o;
    o.a = at::empty({n, s.B, s.Hkv, C, s.K()}, fp32);
    o.phi_k = at::empty({n, s.B, s.Hkv, C, s.F}, bf16);
    o.phi_q = at::empty({nq, s.B, s.Hkv, G, C, s.F}, bf16);
    o.k = at::empty({n, s.B, s.Hkv, C, s.K()}, bf16);
    o.q = at::empty({nq, s.B, s.Hkv, G * C, s.K()}, bf16);
    o.ve = at::empty({n, s.B, s.Hkv, C, s.E()}, bf16);
    o.enter = at::empty({n, s.B, s.Hkv, s.K()}, fp32);
    o.leave = at::empty_like(o.enter);
    return o;
  }
  cuda::TrainingOperands Addresses() const {
    return {a.mutable_data_ptr<float>(),
            phi_k.mutable_data_ptr(),
            phi_q.mutable_data_ptr(),
            k.mutable_data_ptr(),
            q.mutable_data_ptr(),
            ve.mutable_data_ptr(),
            enter.mutable_data_ptr<float>(),
            leave.mutable_data_ptr<float>()};
  }
};

// The chunks with queries of an array over all.
Tensor WithQueries(const TrainingShape& s, const Tensor& x) {
  return x.narrow(0, s.chunks - s.query_chunks, s.query_chunks);
}

// Products in bf16 throughout; Product's result is fp32.
Tensor Bf16Product(const Tensor& a, const Tensor& b) {
  std::vector<int64_t> shape(a.sizes().begin(), a.sizes().end());
  shape.back() = b.size(-1);
  return at::bmm(a.flatten(0, -3), b.flatten(0, -3)).view(shape);
}

Tensor MaskedScores(const Tensor& rows, const Tensor& columns) {
  Tensor scores = Bf16Product(rows, columns.transpose(3, 4));
  Check(TrainingKernels()->causal(
      {scores.mutable_data_ptr(), scores.size(0) * scores.size(1) * scores.size(2),
       static_cast<int>(scores.size(3))},
      nullptr));
  return scores;
}

// a^T b over many rows, [h, N, m] and [h, N, n] -> [h, m, n] fp32: in parts, as few and small
// results would leave most of a GPU idle.
Tensor OverRows(const Tensor& a, const Tensor& b) {
  const int64_t h = a.size(0), N = a.size(1);
  int64_t parts = 1;
  while (parts < 64 && N % (2 * parts) == 0 && N / (2 * parts) >= 256) parts *= 2;
  const auto cut = [&](const Tensor& x) {
    return x.contiguous().view({h * parts, N / parts, x.size(2)});
  };
  return Product(cut(a).transpose(1, 2), cut(b)).unflatten(0, {h, parts}).sum(1);
}

// x [B, T, h, D] += rows [h, B T, m] times weight [h, m, D].
void AddProduct(Tensor& x, const Tensor& rows, const Tensor& weight) {
  x = x.contiguous();
  PerHead(x).baddbmm_(rows, weight);  // a view, as x is dense
}

class FusedLayerFunction : public torch::autograd::Function<FusedLayerFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& given_q, const Tensor& k,
                        const Tensor& k_plain, const Tensor& v,
                        const std::optional<Tensor>& given_claim, const Tensor& map_q,
                        const Tensor& map_k, const Tensor& gate_weight, const Tensor& gate_bias,
                        const Tensor& mix, const DslaLayerOptions& options) {
    const Tensor q = given_q.contiguous(), claim = given_claim.value_or(Tensor());
    const TrainingShape s = MakeShape(q, k, gate_weight, options);
    const cuda::TrainingKernels& kernels = *TrainingKernels();
    const auto bf16 = q.options();
    const auto fp32 = bf16.dtype(at::kFloat);

    Operands in = Operands::Empty(s, bf16);
    Tensor products = at::empty({s.chunks, s.B, s.Hkv, s.K(), s.E()}, fp32);
    Tensor entered = at::empty(products.sizes(), bf16), scores, states;
    if (s.chunks > 0) {
      const Tensor y_q = Product(PerHead(q), map_q.to(at::kBFloat16)),
                   y_k = Product(PerHead(k), map_k.to(at::kBFloat16)),
                   z = Product(PerHead(k_plain).to(at::kFloat), JoinStates(gate_weight)),
                   bias = gate_bias.transpose(0, 1).contiguous();
      Check(kernels.prepare({s, Floats(y_q), Floats(y_k), Floats(z), Floats(bias), Floats(mix),
                             Data(v), v.stride(0), v.stride(1), v.stride(2), in.Addresses()},
                            nullptr));
      products = Product(in.k.transpose(3, 4), in.ve);
      Check(kernels.scan({s, Floats(in.enter), Floats(in.leave), products.mutable_data_ptr<float>(),
                          entered.mutable_data_ptr()},
                         nullptr));
      scores = MaskedScores(in.q, WithQueries(s, in.k));
      states = Product(scores, WithQueries(s, in.ve)).add_(Product(in.q, WithQueries(s, entered)));
    }
    Tensor out = at::empty_like(q), window, lse, joined, joined_lse, seed, offset, mask;
    if (s.window > 0) {
      std::tie(window, lse, seed, offset, mask) = at::_flash_attention_forward(
          q, k, v, std::nullopt, std::nullopt, s.T, s.TK, 0.0, /*is_causal=*/false,
          /*return_debug_mask=*/false, Scale(s), s.window - 1, 0);
      joined = at::empty_like(q), joined_lse = at::empty({s.B, s.H, s.T}, fp32);
      lse = lse.contiguous();
    }
    Check(kernels.merge(
        {s, Floats(states), Data(q), Data(k), Data(v), k.stride(0), k.stride(1), k.stride(2),
         v.stride(0), v.stride(1), v.stride(2), Floats(claim), Data(window), Floats(lse),
         Mutable(joined), MutableFloats(joined_lse), out.mutable_data_ptr()},
        nullptr));
    ctx->save_for_backward({q,      k,           v,        k_plain,  claim,    map_q,  map_k,
                            mix,    gate_weight, in.a,     in.phi_k, in.phi_q, in.k,   in.q,
                            in.ve,  in.enter,    in.leave, products, entered,  scores, states,
                            joined, joined_lse,  seed,     offset});
    ctx->saved_data["options"] =
        std::vector<int64_t>{options.chunked.window, options.chunked.sinks};
    ctx->saved_data["floor"] = options.gate_floor;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    CheckOnce("dsla layer");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &k_plain = saved[3],
                 &claim = saved[4], &map_q = saved[5], &map_k = saved[6], &mix = saved[7],
                 &gate_weight = saved[8];
    const Operands in{saved[9],  saved[10], saved[11], saved[12],
                      saved[13], saved[14], saved[15], saved[16]};
    const Tensor &products = saved[17], &entered = saved[18], &scores = saved[19],
                 &states = saved[20], &joined = saved[21], &joined_lse = saved[22];
    DslaLayerOptions options;
    const std::vector<int64_t> numbers = ctx->saved_data["options"].toIntVector();
    options.chunked.window = numbers[0], options.chunked.sinks = numbers[1];
    options.gate_floor = ctx->saved_data["floor"].toDouble();
    const TrainingShape s = MakeShape(q, k, gate_weight, options);
    const cuda::TrainingKernels& kernels = *TrainingKernels();
    const auto bf16 = q.options();
    const auto fp32 = bf16.dtype(at::kFloat);
    const bool need_q = ctx->needs_input_grad(0), need_k = ctx->needs_input_grad(1),
               need_plain = ctx->needs_input_grad(2), need_v = ctx->needs_input_grad(3);
    const bool sinks = s.window > 0 && s.sinks > 0;

    const Tensor d_out = grads[0].contiguous();
    Tensor d_states = at::empty({s.query_chunks, s.B, s.Hkv, s.G() * kTrainingChunk, s.E()}, bf16);
    Tensor d_claim, d_window, shifted, d_q_sinks, d_sinks;
    if (s.window > 0) {
      d_claim = at::empty(claim.sizes(), fp32);
      d_window = at::empty_like(q), shifted = at::empty_like(q);
    }
    if (sinks && (need_q || need_k || need_v)) d_q_sinks = at::empty_like(q);
    if (sinks && (need_k || need_v))
      d_sinks = at::empty({TrainingMergeBlocks(s), s.B, s.Hkv, s.sinks, 2 * s.D}, fp32);
    Check(kernels.merge_backward({s,
                                  Floats(states),
                                  Data(q),
                                  Data(k),
                                  Data(v),
                                  k.stride(0),
                                  k.stride(1),
                                  k.stride(2),
                                  v.stride(0),
                                  v.stride(1),
                                  v.stride(2),
                                  Floats(claim),
                                  Data(joined),
                                  Floats(joined_lse),
                                  Data(d_out),
                                  d_states.mutable_data_ptr(),
                                  MutableFloats(d_claim),
                                  Mutable(d_window),
                                  Mutable(shifted),
                                  Mutable(d_q_sinks),
                                  MutableFloats(d_sinks)},
                                 nullptr));

    Tensor d_q, d_k, d_v, d_plain;
    if (s.window > 0 && (need_q || need_k || need_v)) {
      std::tie(d_q, d_k, d_v) = at::_flash_attention_backward(
          d_window, q, k, v, shifted, joined_lse, Tensor(), Tensor(), s.T, s.TK, 0.0,
          /*is_causal=*/false, saved[23], saved[24], Scale(s), s.window - 1, 0);
      if (d_q_sinks.defined()) d_q.add_(d_q_sinks);
      if (d_sinks.defined()) {
        const Tensor sum = d_sinks.sum(0).transpose(1, 2);  // [B, sinks, Hkv, 2 D]
        d_k.narrow(1, 0, s.sinks).add_(sum.narrow(3, 0, s.D));
        d_v.narrow(1, 0, s.sinks).add_(sum.narrow(3, s.D, s.D));
      }
    } else {
      if (need_q) d_q = at::zeros_like(q);
      if (need_k) d_k = at::zeros(k.sizes(), bf16);
      if (need_v) d_v = at::zeros(v.sizes(), bf16);
    }
    Tensor d_map_q, d_map_k, d_weight, d_bias, d_mix;
    if (s.chunks == 0) {
      d_map_q = at::zeros_like(map_q), d_map_k = at::zeros_like(map_k);
      d_weight = at::zeros_like(gate_weight), d_mix = at::zeros_like(mix);
      d_bias = at::zeros({s.states, s.Hkv, s.F}, fp32);
      if (need_plain) d_plain = at::zeros(k_plain.sizes(), k_plain.options());
      return {d_q, d_k, d_plain, d_v, d_claim, d_map_q, d_map_k, d_weight, d_bias, d_mix, Tensor()};
    }

    const Tensor d_scores = MaskedScores(d_states, WithQueries(s, in.ve));
    const Tensor from_queries = Product(in.q.transpose(3, 4), d_states);
    Tensor d_products = at::empty(products.sizes(), bf16), d_sums = at::empty_like(in.enter);
    Check(kernels.scan_backward(
        {s, Floats(in.enter), Floats(in.leave), Floats(products), Floats(from_queries),
         d_products.mutable_data_ptr(), d_sums.mutable_data_ptr<float>()},
        nullptr));
    const Tensor d_q1 = Product(d_scores, WithQueries(s, in.k)),
                 d_q2 = Product(d_states, WithQueries(s, entered).transpose(3, 4)),
                 d_k1 = Product(d_scores.transpose(3, 4), in.q),
                 d_k2 = Product(in.ve, d_products.transpose(3, 4));
    Tensor d_y_q = at::zeros({s.H, int64_t{s.B} * s.T, s.D}, bf16),
           d_y_k = at::zeros({s.Hkv, int64_t{s.B} * s.TK, s.D}, bf16),
           d_z = at::zeros({s.Hkv, int64_t{s.B} * s.TK, s.K()}, fp32),
           d_mixes = at::empty({s.query_chunks, s.B, s.Hkv, s.G(), s.states}, fp32);
    Check(kernels.gradients(
        {s, in.Addresses(), Floats(mix), Floats(d_q1), Floats(d_q2), Floats(d_k1), Floats(d_k2),
         Floats(d_sums), d_y_q.mutable_data_ptr(), d_y_k.mutable_data_ptr(),
         d_z.mutable_data_ptr<float>(), d_mixes.mutable_data_ptr<float>()},
        nullptr));
    d_mix = d_mixes.sum(at::IntArrayRef{0, 1}).view({s.H, s.states});
    d_map_q = OverRows(PerHead(q), d_y_q);
    d_map_k = OverRows(PerHead(k), d_y_k);
    d_weight = OverRows(PerHead(k_plain).to(at::kFloat), d_z)
                   .unflatten(2, {s.states, s.F})
                   .permute({2, 0, 1, 3});
    d_bias = d_z.sum(1).unflatten(1, {s.states, s.F}).transpose(0, 1);
    if (need_q) AddProduct(d_q, d_y_q, map_q.to(at::kBFloat16).transpose(1, 2));
    if (need_k) AddProduct(d_k, d_y_k, map_k.to(at::kBFloat16).transpose(1, 2));
    if (need_plain) {
      d_plain = FromPerHead(Product(d_z, JoinStates(gate_weight).transpose(1, 2)), s.B, s.TK)
                    .to(k_plain.scalar_type());
    }
    if (need_v) {
      Tensor d_ve = Product(in.k, d_products);
      WithQueries(s, d_ve).add_(Product(scores.transpose(3, 4), d_states));
      const Tensor rows = d_ve.narrow(4, 0, s.D).permute({1, 0, 3, 2, 4}).flatten(1, 2);
      Rows{s.key_at, s.first_key, s.last_key}.Add(d_v, rows, 0, rows.size(1));
    }
    return {d_q, d_k, d_plain, d_v, d_claim, d_map_q, d_map_k, d_weight, d_bias, d_mix, Tensor()};
  }

 private:
  static double Scale(const TrainingShape& s) { return 1 / std::sqrt(static_cast<double>(s.D)); }
  static void* Mutable(const Tensor& x) { return x.defined() ? x.mutable_data_ptr() : nullptr; }
  static float* MutableFloats(const Tensor& x) {
    return x.defined() ? x.mutable_data_ptr<float>() : nullptr;
  }
};

bool OnGpuInBf16(const Tensor& x) {
  return x.is_cuda() && x.scalar_type() == at::kBFloat16 && TrainingKernels() != nullptr;
}

}  // namespace

bool FusedLayerTakes(const Tensor& q, const DslaLayerParams& params,
                     const DslaLayerOptions& options) {
  const Tensor& weight = params.gate_weight;
  return OnGpuInBf16(q) && options.chunked.balanced && options.chunked.chunk == kTrainingChunk &&
         cuda::TrainingTakes(static_cast<int>(q.size(3)), static_cast<int>(weight.size(3)),
                             static_cast<int>(weight.size(0)),
                             static_cast<int>(options.chunked.sinks));
}

Tensor FusedLayer(const Tensor& q, const Tensor& k, const Tensor& k_plain, const Tensor& v,
                  const Tensor& claim, const DslaLayerParams& params,
                  const DslaLayerOptions& options) {
  return FusedLayerFunction::apply(q, k, k_plain, v, Given(claim), params.phi_q, params.phi_k,
                                   params.gate_weight, params.gate_bias,
                                   params.mix.softmax(1).contiguous(), options);
}

bool FusedRopeTakes(const Tensor& x) { return OnGpuInBf16(x) && x.size(3) % 4 == 0; }

Tensor FusedRotate(const Tensor& given, const Tensor& cos, const Tensor& sin, bool inverse) {
  const Tensor x = given.stride(3) == 1 ? given : given.contiguous();
  const Tensor c = cos.contiguous(), s = sin.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  Check(TrainingKernels()->rope(
      {Data(x), x.stride(0), x.stride(1), x.stride(2), Floats(c), Floats(s), y.mutable_data_ptr(),
       static_cast<int>(x.size(0)), static_cast<int>(x.size(1)), static_cast<int>(x.size(2)),
       static_cast<int>(x.size(3)), inverse},
      nullptr));
  return y;
}

}  // namespace dsla::autograd
