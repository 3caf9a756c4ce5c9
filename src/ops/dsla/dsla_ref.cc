// The recurrence of dsla.h in fp64, token by token. KV heads have nothing to do with one another: a
// thread takes one after the other.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/exec.h"
#include "base/half.h"
#include "ops/dsla/slot.h"

namespace dsla {
namespace {

double LogSigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }

// Element i of an array of the cache's dtype.
double At(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kF32 ? ToFloat(static_cast<const float*>(data)[i])
                              : ToFloat(static_cast<const bf16*>(data)[i]);
}

// phi(u) [F] for the map M [D, D].
std::vector<double> Features(const std::vector<double>& u, const float* map, int F) {
  const int D = static_cast<int>(u.size());
  std::vector<double> phi(static_cast<size_t>(F)), y(static_cast<size_t>(D));
  for (int d = 0; d < D; ++d)
    for (int e = 0; e < D; ++e)
      y[static_cast<size_t>(e)] += u[static_cast<size_t>(d)] * map[d * D + e];
  for (int half = 0; half < F / D; ++half) {  // softmax(y), then softmax(-y)
    double* out = phi.data() + half * D;
    for (int e = 0; e < D; ++e) out[e] = (half == 0 ? 1 : -1) * y[static_cast<size_t>(e)];
    const double top = *std::max_element(out, out + D);
    double sum = 0;
    for (int e = 0; e < D; ++e) sum += out[e] = std::exp(out[e] - top);
    for (int e = 0; e < D; ++e) out[e] /= sum;
  }
  return phi;
}

// One sequence's slot with its states widened to fp64 for the length of a call.
class RefSlot {
 public:
  RefSlot(const DslaShape& shape, const DslaParams& params, const DslaStateView& states,
          int32_t slot)
      : shape_(shape), params_(params), slot_(SlotAt(MakeSlotLayout(shape), states, slot)) {
    const int64_t n = static_cast<int64_t>(shape.Hkv) * shape.SF();
    state_.assign(slot_.state, slot_.state + n * shape.D);
    norm_.assign(slot_.norm, slot_.norm + n);
  }
  ~RefSlot() {
    for (size_t i = 0; i < state_.size(); ++i) slot_.state[i] = static_cast<float>(state_[i]);
    for (size_t i = 0; i < norm_.size(); ++i) slot_.norm[i] = static_cast<float>(norm_[i]);
  }
  RefSlot(const RefSlot&) = delete;
  RefSlot& operator=(const RefSlot&) = delete;

  // Token t arrives: another one leaves the window and enters the states, t takes its place.
  // k, v point at [D] elements of the cache's dtype of KV head h.
  void Push(int h, int64_t t, const void* k, const void* v) {
    const int W = shape_.window, S = shape_.sinks;
    if (W == 0) {
      Enter(h, t, k, v);
      return;
    }
    const int64_t row = RowBytes();
    const int64_t ring = (static_cast<int64_t>(h) * W + t % W) * row;
    if (t - W >= S) Enter(h, t - W, slot_.ring_k + ring, slot_.ring_v + ring);
    std::memcpy(slot_.ring_k + ring, k, static_cast<size_t>(row));
    std::memcpy(slot_.ring_v + ring, v, static_cast<size_t>(row));
    if (t < S) {
      const int64_t sink = (static_cast<int64_t>(h) * S + t) * row;
      std::memcpy(slot_.sink_k + sink, k, static_cast<size_t>(row));
      std::memcpy(slot_.sink_v + sink, v, static_cast<size_t>(row));
    }
  }

  // The output [D] of query head h at time t, after Push of its KV head.
  std::vector<double> Output(int h, int64_t t, const float* q, const float* claim) const {
    const int D = shape_.D;
    double denominator = 0;
    std::vector<double> out = Linear(h, q, &denominator);
    if (shape_.window == 0) return out;
    double lse = 0;
    const std::vector<double> win = Window(h, t, q, &lse);
    const double w = denominator < kDslaEpsilon ? 0 : 1 / (1 + std::exp(lse - *claim));
    for (int d = 0; d < D; ++d) {
      const size_t i = static_cast<size_t>(d);
      out[i] = w * out[i] + (1 - w) * win[i];
    }
    return out;
  }

 private:
  int64_t RowBytes() const { return shape_.D * SizeOf(shape_.kv_dtype); }
  std::vector<double> Row(const void* data) const {
    std::vector<double> row(static_cast<size_t>(shape_.D));
    for (size_t d = 0; d < row.size(); ++d)
      row[d] = At(data, shape_.kv_dtype, static_cast<int64_t>(d));
    return row;
  }

  void Enter(int h, int64_t s, const void* k, const void* v) {
    const int D = shape_.D, F = shape_.F;
    const std::vector<double> key = Row(k), value = Row(v);
    std::vector<double> unrotated(static_cast<size_t>(D));
    const int half = D / 2;
    for (int d = 0; d < half; ++d) {
      const double c = params_.rope_cos[s * half + d], sn = params_.rope_sin[s * half + d];
      const double lo = key[static_cast<size_t>(d)], hi = key[static_cast<size_t>(d + half)];
      unrotated[static_cast<size_t>(d)] = lo * c + hi * sn;
      unrotated[static_cast<size_t>(d + half)] = hi * c - lo * sn;
    }
    const auto phi = Features(key, params_.phi_k + static_cast<int64_t>(h) * D * D, F);
    for (int i = 0; i < shape_.states; ++i) {
      const int64_t head = static_cast<int64_t>(i) * shape_.Hkv + h;
      const float* U = params_.gate_weight + head * D * F;
      const float* bias = params_.gate_bias + head * F;
      std::vector<double> x(bias, bias + F);
      for (int d = 0; d < D; ++d)
        for (int f = 0; f < F; ++f)
          x[static_cast<size_t>(f)] += unrotated[static_cast<size_t>(d)] * U[d * F + f];
      for (int f = 0; f < F; ++f) {
        const double a = std::max(LogSigmoid(x[static_cast<size_t>(f)]) / kDslaGateDivisor,
                                  double{shape_.gate_floor});
        const double decay = std::exp(a), gain = -std::expm1(a) * phi[static_cast<size_t>(f)];
        const int64_t row = static_cast<int64_t>(h) * shape_.SF() + i * F + f;
        double* S = state_.data() + row * D;
        for (int d = 0; d < D; ++d) S[d] = decay * S[d] + gain * value[static_cast<size_t>(d)];
        double& z = norm_[static_cast<size_t>(row)];
        z = decay * z + gain;
      }
    }
  }

  std::vector<double> Linear(int h, const float* q, double* denominator) const {
    const int D = shape_.D, F = shape_.F;
    const auto phi = Features({q, q + D}, params_.phi_q + static_cast<int64_t>(h) * D * D, F);
    std::vector<double> out(static_cast<size_t>(D));
    *denominator = 0;
    for (int f = 0; f < shape_.SF(); ++f) {
      const double weight =
          params_.mix[h * shape_.states + f / F] * phi[static_cast<size_t>(f % F)];
      const int64_t row = static_cast<int64_t>(h / shape_.G()) * shape_.SF() + f;
      *denominator += weight * norm_[static_cast<size_t>(row)];
      for (int d = 0; d < D; ++d)
        out[static_cast<size_t>(d)] += weight * state_[static_cast<size_t>(row * D + d)];
    }
    for (double& x : out) x /= *denominator + kDslaEpsilon;
    return out;
  }

  std::vector<double> Window(int h, int64_t t, const float* q, double* lse) const {
    const int D = shape_.D, W = shape_.window, S = shape_.sinks, g = h / shape_.G();
    struct Key {
      const std::byte *k, *v;
      double score;
    };
    std::vector<Key> keys;
    const int64_t row = RowBytes();
    for (int64_t s = 0; s <= t; ++s) {
      if (s < S) {
        const int64_t at = (static_cast<int64_t>(g) * S + s) * row;
        keys.push_back({slot_.sink_k + at, slot_.sink_v + at, 0});
      } else if (s > t - W) {
        const int64_t at = (static_cast<int64_t>(g) * W + s % W) * row;
        keys.push_back({slot_.ring_k + at, slot_.ring_v + at, 0});
      }
    }
    double top = -INFINITY, sum = 0;
    for (Key& key : keys) {
      for (int d = 0; d < D; ++d) key.score += double{q[d]} * At(key.k, shape_.kv_dtype, d);
      key.score /= std::sqrt(static_cast<double>(D));
      top = std::max(top, key.score);
    }
    std::vector<double> out(static_cast<size_t>(D));
    for (const Key& key : keys) {
      const double p = std::exp(key.score - top);
      sum += p;
      for (int d = 0; d < D; ++d) out[static_cast<size_t>(d)] += p * At(key.v, shape_.kv_dtype, d);
    }
    for (double& x : out) x /= sum;
    *lse = top + std::log(sum);
    return out;
  }

  const DslaShape& shape_;
  const DslaParams& params_;
  const DslaSlot slot_;
  std::vector<double> state_;  // [Hkv, SF, D]
  std::vector<double> norm_;   // [Hkv, SF]
};

}  // namespace

void DslaForwardRef(const DslaArgs& args) {
  CheckDslaArgs(args);
  const DslaShape& shape = args.shape;
  const int64_t kv_row = shape.D * SizeOf(shape.kv_dtype);
  for (int n = 0; n < args.rows.N; ++n) {
    if (args.rows.count(n) == 0) continue;
    RefSlot slot(shape, args.params, args.states, args.slots[n]);
    ParallelFor({.threads = ThreadCount(0)}, shape.Hkv, [&](int64_t task, int) {
      const int kv_head = static_cast<int>(task), G = shape.G();
      for (int i = 0; i < args.rows.count(n); ++i) {
        const int64_t row = args.rows.row_start[n] + i, t = args.rows.pos[n] + i;
        const int64_t at = (row * shape.Hkv + kv_head) * kv_row;
        slot.Push(kv_head, t, static_cast<const std::byte*>(args.k) + at,
                  static_cast<const std::byte*>(args.v) + at);
        for (int h = kv_head * G; h < (kv_head + 1) * G; ++h) {
          const float* q = args.q + row * args.q_stride + static_cast<int64_t>(h) * shape.D;
          const float* claim = args.claim ? args.claim + row * shape.H + h : nullptr;
          const auto out = slot.Output(h, t, q, claim);
          std::copy(out.begin(), out.end(), args.out + (row * shape.H + h) * shape.D);
        }
      }
    });
  }
}

void DslaFoldRef(const DslaFoldArgs& args) {
  CheckDslaFoldArgs(args);
  const DslaShape& shape = args.shape;
  const auto bytes = static_cast<size_t>(shape.D * SizeOf(shape.kv_dtype));
  for (int n = 0; n < args.rows.N; ++n) {
    DslaResetSlot(shape, args.states, args.slots[n]);
    RefSlot slot(shape, args.params, args.states, args.slots[n]);
    ParallelFor({.threads = ThreadCount(0)}, shape.Hkv, [&](int64_t task, int) {
      const int h = static_cast<int>(task);
      std::vector<std::byte> k(bytes), v(bytes);
      for (int64_t t = 0; t < args.rows.pos[n]; ++t) {
        const int64_t page = args.tables.pages[args.tables.page_start[n] + t / args.kv.page_size];
        DslaCopyCachedRow(args.kv, args.kv.k, page, h, t % args.kv.page_size, k.data());
        DslaCopyCachedRow(args.kv, args.kv.v, page, h, t % args.kv.page_size, v.data());
        slot.Push(h, t, k.data(), v.data());
      }
    });
  }
}

}  // namespace dsla
