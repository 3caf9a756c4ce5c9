// The serving operators on the CPU behind torch's dispatcher: every shape, type and index is
// checked here, as the operators themselves treat a wrong one as our bug and abort.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/dsla/dsla.h"
#include "ops/norm_rope/norm_rope.h"
#include "ops/sampling/sampling.h"
#include "ops/torch/rope_table.h"

namespace dsla {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Dense, on the CPU, of this type and shape (-1: any).
void Check(const char* op, const char* name, const Tensor& x, std::vector<int64_t> shape,
           at::ScalarType type, bool dense = true) {
  TORCH_CHECK(x.is_cpu(), op, ": ", name, " is on ", x.device(), ", expected cpu");
  TORCH_CHECK(x.scalar_type() == type, op, ": ", name, " is ", x.scalar_type(), ", expected ",
              type);
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i)
    same = shape[i] == -1 || shape[i] == x.size(static_cast<int64_t>(i));
  TORCH_CHECK(same, op, ": ", name, " is ", x.sizes(), ", expected ", at::IntArrayRef(shape),
              " (-1: any)");
  TORCH_CHECK(!dense || x.is_contiguous(), op, ": ", name, " is not contiguous");
}

// int32 [n], every value in [low, high).
const int32_t* Indices(const char* op, const char* name, const Tensor& x, int64_t n, int64_t low,
                       int64_t high) {
  Check(op, name, x, {n}, at::kInt);
  const int32_t* values = x.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK(values[i] >= low && values[i] < high, op, ": ", name, "[", i, "] is ", values[i],
                ", expected [", low, ", ", high, ")");
  return values;
}

// int32 [N + 1]: from 0, never falling, up to `total`.
const int32_t* Starts(const char* op, const char* name, const Tensor& x, int64_t N, int64_t total) {
  const int32_t* values = Indices(op, name, x, N + 1, 0, total + 1);
  TORCH_CHECK(values[0] == 0 && values[N] == total && std::is_sorted(values, values + N + 1), op,
              ": ", name, " must rise from 0 to ", total);
  return values;
}

DType KvType(const char* op, const char* name, at::ScalarType type) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, op, ": ", name, " is ", type,
              ", expected fp32 or bf16");
  return type == at::kFloat ? DType::kF32 : DType::kBF16;
}

const float* Data(const Tensor& x) { return x.const_data_ptr<float>(); }

struct Exec {
  Workspace workspace;
  ExecContext ctx{at::get_num_threads(), &workspace};
};

void CheckShape(const char* op, const DslaShape& s) {
  TORCH_CHECK(s.H > 0 && s.Hkv > 0 && s.H % s.Hkv == 0, op, ": ", s.H,
              " query heads are no multiple of ", s.Hkv, " KV heads");
  TORCH_CHECK(s.D > 0 && s.D % 16 == 0 && s.D <= 256, op, ": head dimension ", s.D,
              ", expected a multiple of 16 up to 256");
  TORCH_CHECK(s.F == s.D || s.F == 2 * s.D, op, ": ", s.F, " features per state, expected ", s.D,
              " or ", 2 * s.D);
  TORCH_CHECK(s.states == 1 || s.states == 2, op, ": ", s.states, " states, expected 1 or 2");
  TORCH_CHECK(s.window >= 0 && s.sinks >= 0 && (s.window > 0 || s.sinks == 0), op, ": window ",
              s.window, ", sinks ", s.sinks, ": negative, or sinks without a window");
}

// The parameters of one layer as tensors, and what they say about its shape.
struct Params {
  const Tensor &phi_q, &phi_k, &gate_weight, &gate_bias, &mix, &rope_cos, &rope_sin;

  DslaShape Shape(const char* op, int64_t window, int64_t sinks, double gate_floor,
                  DType kv_dtype) const {
    Check(op, "phi_q", phi_q, {-1, -1, -1}, at::kFloat);
    const int64_t H = phi_q.size(0), D = phi_q.size(1);
    Check(op, "phi_q", phi_q, {H, D, D}, at::kFloat);
    Check(op, "phi_k", phi_k, {-1, D, D}, at::kFloat);
    const int64_t Hkv = phi_k.size(0);
    Check(op, "gate_weight", gate_weight, {-1, Hkv, D, -1}, at::kFloat);
    const int64_t states = gate_weight.size(0), F = gate_weight.size(3);
    Check(op, "gate_bias", gate_bias, {states, Hkv, F}, at::kFloat);
    Check(op, "mix", mix, {H, states}, at::kFloat);
    Check(op, "rope_cos", rope_cos, {-1, D / 2}, at::kFloat);
    Check(op, "rope_sin", rope_sin, {rope_cos.size(0), D / 2}, at::kFloat);
    constexpr int64_t kMost = 1 << 20;
    TORCH_CHECK(window <= kMost && sinks <= kMost, op, ": window ", window, ", sinks ", sinks,
                ": above ", kMost);
    const DslaShape shape{static_cast<int>(H),           static_cast<int>(Hkv),
                          static_cast<int>(D),           static_cast<int>(F),
                          static_cast<int>(states),      static_cast<int>(window),
                          static_cast<int>(sinks),       kv_dtype,
                          static_cast<float>(gate_floor)};
    CheckShape(op, shape);
    TORCH_CHECK(gate_floor < 0 && shape.gate_floor * (kDslaChunk / 2) >= -80.f, op, ": gate floor ",
                gate_floor, ", expected [-2.5, 0)");
    return shape;
  }
  DslaParams Pointers() const {
    return {Data(phi_q), Data(phi_k),    Data(gate_weight), Data(gate_bias),
            Data(mix),   Data(rope_cos), Data(rope_sin)};
  }
};

DslaStateView States(const char* op, const Tensor& states, const Tensor& slots, int64_t N,
                     const DslaShape& shape) {
  Check(op, "states", states, {-1, -1}, at::kByte);
  const int64_t bytes = states.size(1), needed = MakeSlotLayout(shape).bytes;
  std::byte* base = reinterpret_cast<std::byte*>(states.data_ptr<uint8_t>());
  TORCH_CHECK(bytes >= needed && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(base) % 64 == 0, op,
              ": states has ", bytes, " bytes per slot, expected at least ", needed,
              ", slots aligned to 64 bytes");
  const int32_t* first = Indices(op, "slots", slots, N, 0, states.size(0));
  std::vector<int32_t> sorted(first, first + N);
  std::sort(sorted.begin(), sorted.end());
  TORCH_CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), op,
              ": slots holds a slot twice");
  return {base, bytes};
}

// [pages, Hkv, page_size, D], dense within a page, K and V alike.
PagedKvView Pages(const char* op, const Tensor& k, const Tensor& v) {
  const DType dtype = KvType(op, "k_pages", k.scalar_type());
  Check(op, "k_pages", k, {-1, -1, -1, -1}, k.scalar_type(), false);
  Check(op, "v_pages", v, k.sizes().vec(), k.scalar_type(), false);
  const int64_t Hkv = k.size(1), page_size = k.size(2), D = k.size(3);
  const std::vector<int64_t> dense = {k.stride(0), page_size * D, D, 1};
  TORCH_CHECK(Hkv > 0 && page_size > 0 && k.strides() == dense && v.strides() == dense, op,
              ": k_pages and v_pages must be dense within a page and have the same page stride");
  return {k.data_ptr(),          v.data_ptr(),        k.stride(0), static_cast<int>(page_size),
          static_cast<int>(Hkv), static_cast<int>(D), dtype};
}

// Page tables that hold tokens[n] tokens of sequence n.
PageTables Tables(const char* op, const Tensor& page_start, const Tensor& pages,
                  const Tensor& k_pages, const std::vector<int64_t>& tokens) {
  TORCH_CHECK(pages.dim() == 1, op, ": pages is ", pages.sizes(), ", expected one dimension");
  const int64_t N = static_cast<int64_t>(tokens.size()), page_size = k_pages.size(2);
  const PageTables tables = {Starts(op, "page_start", page_start, N, pages.size(0)),
                             Indices(op, "pages", pages, pages.size(0), 0, k_pages.size(0))};
  for (int64_t n = 0; n < N; ++n) {
    const int64_t held = (tables.page_start[n + 1] - tables.page_start[n]) * page_size;
    TORCH_CHECK(held >= tokens[static_cast<size_t>(n)], op, ": sequence ", n, " has pages for ",
                held, " tokens, expected ", tokens[static_cast<size_t>(n)]);
  }
  return tables;
}

constexpr int64_t kMaxPosition = int64_t{1} << 30;

// T rows of N sequences, and how many tokens each stands at afterwards.
RaggedRows RowsOf(const char* op, const Tensor& row_start, const Tensor& pos, int64_t T,
                  std::vector<int64_t>* tokens) {
  TORCH_CHECK(pos.dim() == 1, op, ": pos is ", pos.sizes(), ", expected one dimension");
  const int64_t N = pos.size(0);
  RaggedRows rows{static_cast<int>(N), Starts(op, "row_start", row_start, N, T),
                  Indices(op, "pos", pos, N, 0, kMaxPosition)};
  for (int n = 0; n < rows.N; ++n) tokens->push_back(rows.pos[n] + int64_t{rows.count(n)});
  return rows;
}

void CheckPositions(const char* op, const std::vector<int64_t>& tokens, const Tensor& rope_cos) {
  for (const int64_t n : tokens)
    TORCH_CHECK(n <= rope_cos.size(0), op, ": ", n, " tokens, but rope_cos has ", rope_cos.size(0),
                " positions");
}

int64_t SlotBytes(int64_t H, int64_t Hkv, int64_t D, int64_t F, int64_t states, int64_t window,
                  int64_t sinks, at::ScalarType kv_dtype) {
  constexpr char kOp[] = "dsla::slot_bytes";
  for (const int64_t x : {H, Hkv, D, F, states, window, sinks})
    TORCH_CHECK(x >= 0 && x <= 1 << 20, kOp, ": ", x, " is out of range");
  DslaShape shape;
  shape.H = static_cast<int>(H), shape.Hkv = static_cast<int>(Hkv), shape.D = static_cast<int>(D);
  shape.F = static_cast<int>(F), shape.states = static_cast<int>(states);
  shape.window = static_cast<int>(window), shape.sinks = static_cast<int>(sinks);
  shape.kv_dtype = KvType(kOp, "kv_dtype", kv_dtype);
  CheckShape(kOp, shape);
  return MakeSlotLayout(shape).bytes;
}

Tensor Forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& claim,
               const Tensor& states, const Tensor& slots, const Tensor& row_start,
               const Tensor& pos, const Tensor& phi_q, const Tensor& phi_k,
               const Tensor& gate_weight, const Tensor& gate_bias, const Tensor& mix,
               const Tensor& rope_cos, const Tensor& rope_sin, int64_t window, int64_t sinks,
               double gate_floor) {
  constexpr char kOp[] = "dsla::forward";
  const Params params{phi_q, phi_k, gate_weight, gate_bias, mix, rope_cos, rope_sin};
  DslaArgs args;
  args.shape = params.Shape(kOp, window, sinks, gate_floor, KvType(kOp, "k", k.scalar_type()));
  args.params = params.Pointers();
  const int64_t H = args.shape.H, Hkv = args.shape.Hkv, D = args.shape.D;
  Check(kOp, "q", q, {-1, H, D}, at::kFloat);
  const int64_t T = q.size(0);
  Check(kOp, "k", k, {T, Hkv, D}, k.scalar_type());
  Check(kOp, "v", v, {T, Hkv, D}, k.scalar_type());
  TORCH_CHECK(claim.has_value() == (window > 0), kOp,
              ": claim must be given exactly if there is a window");
  if (claim) Check(kOp, "claim", *claim, {T, H}, at::kFloat);
  std::vector<int64_t> tokens;
  args.rows = RowsOf(kOp, row_start, pos, T, &tokens);
  CheckPositions(kOp, tokens, rope_cos);
  args.states = States(kOp, states, slots, args.rows.N, args.shape);
  args.slots = slots.const_data_ptr<int32_t>();
  args.q = Data(q);
  args.q_stride = H * D;
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.claim = claim ? Data(*claim) : nullptr;
  Tensor out = at::empty_like(q);
  args.out = out.data_ptr<float>();
  Exec exec;
  if (T > 0) DslaForwardCpu(exec.ctx, args);
  return out;
}

void Fold(const Tensor& k_pages, const Tensor& v_pages, const Tensor& page_start,
          const Tensor& pages, const Tensor& pos, const Tensor& states, const Tensor& slots,
          const Tensor& phi_q, const Tensor& phi_k, const Tensor& gate_weight,
          const Tensor& gate_bias, const Tensor& mix, const Tensor& rope_cos,
          const Tensor& rope_sin, int64_t window, int64_t sinks, double gate_floor) {
  constexpr char kOp[] = "dsla::fold";
  const Params params{phi_q, phi_k, gate_weight, gate_bias, mix, rope_cos, rope_sin};
  DslaFoldArgs args;
  args.kv = Pages(kOp, k_pages, v_pages);
  args.shape = params.Shape(kOp, window, sinks, gate_floor, args.kv.dtype);
  args.params = params.Pointers();
  TORCH_CHECK(args.kv.Hkv == args.shape.Hkv && args.kv.D == args.shape.D, kOp, ": k_pages is ",
              k_pages.sizes(), ", expected ", args.shape.Hkv, " heads of ", args.shape.D);
  TORCH_CHECK(pos.dim() == 1, kOp, ": pos is ", pos.sizes(), ", expected one dimension");
  args.rows.N = static_cast<int>(pos.size(0));
  args.rows.pos = Indices(kOp, "pos", pos, pos.size(0), 0, kMaxPosition);
  const std::vector<int64_t> tokens(args.rows.pos, args.rows.pos + args.rows.N);
  CheckPositions(kOp, tokens, rope_cos);
  args.tables = Tables(kOp, page_start, pages, k_pages, tokens);
  args.states = States(kOp, states, slots, args.rows.N, args.shape);
  args.slots = slots.const_data_ptr<int32_t>();
  Exec exec;
  if (args.rows.N > 0) DslaFoldCpu(exec.ctx, args);
}

std::tuple<Tensor, Tensor> PagedAttention(const Tensor& q, const Tensor& k_pages,
                                          const Tensor& v_pages, const Tensor& page_start,
                                          const Tensor& pages, const Tensor& row_start,
                                          const Tensor& pos, double scale, int64_t sliding_window) {
  constexpr char kOp[] = "dsla::paged_attention";
  PagedAttentionArgs args;
  args.kv = Pages(kOp, k_pages, v_pages);
  Check(kOp, "q", q, {-1, -1, args.kv.D}, at::kFloat);
  const int64_t T = q.size(0), H = q.size(1);
  TORCH_CHECK(H > 0 && H % args.kv.Hkv == 0, kOp, ": ", H, " query heads are no multiple of ",
              args.kv.Hkv, " KV heads");
  TORCH_CHECK(args.kv.D > 0 && args.kv.D % 8 == 0 && args.kv.D <= 256, kOp, ": head dimension ",
              args.kv.D, ", expected a multiple of 8 up to 256");
  TORCH_CHECK(sliding_window >= 0 && sliding_window < kMaxPosition, kOp, ": sliding_window ",
              sliding_window, " is out of range");
  std::vector<int64_t> tokens;
  args.rows = RowsOf(kOp, row_start, pos, T, &tokens);
  args.tables = Tables(kOp, page_start, pages, k_pages, tokens);
  args.H = static_cast<int>(H);
  args.scale = static_cast<float>(scale);
  args.sliding_window = static_cast<int>(sliding_window);
  args.q = Data(q);
  args.q_stride = H * args.kv.D;
  Tensor out = at::empty_like(q), lse = at::empty({T, H}, q.options());
  args.out = out.data_ptr<float>();
  args.lse = lse.data_ptr<float>();
  Exec exec;
  if (T > 0) PagedAttentionCpu(exec.ctx, args);
  return {out, lse};
}

Tensor RmsNormOp(const Tensor& x, const Tensor& weight, double eps) {
  constexpr char kOp[] = "dsla::rms_norm";
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, kOp, ": x is ", x.sizes(), ", expected [..., C]");
  Check(kOp, "x", x, x.sizes().vec(), at::kFloat);
  Check(kOp, "weight", weight, {x.size(-1)}, at::kFloat);
  Tensor out = at::empty_like(x);
  Exec exec;
  RmsNorm(exec.ctx, Data(x), Data(weight), static_cast<float>(eps), x.numel() / x.size(-1),
          x.size(-1), out.data_ptr<float>());
  return out;
}

void RopeOp(const Tensor& x, const Tensor& positions,
            const c10::intrusive_ptr<TorchRopeTable>& table, const OptionalTensor& norm_weight,
            double norm_eps) {
  constexpr char kOp[] = "dsla::rope";
  const int64_t D = table->table().D();
  Check(kOp, "x", x, {-1, -1, D}, at::kFloat, false);
  const int64_t T = x.size(0), heads = x.size(1);
  TORCH_CHECK(x.stride(2) == 1 && x.stride(1) == D && (T <= 1 || x.stride(0) >= heads * D), kOp,
              ": x is not dense within a row");
  RopeArgs args;
  args.positions = Indices(kOp, "positions", positions, T, 0, table->positions());
  if (norm_weight) {
    Check(kOp, "norm_weight", *norm_weight, {D}, at::kFloat);
    args.norm_weight = Data(*norm_weight);
    args.norm_eps = static_cast<float>(norm_eps);
  }
  args.x = x.data_ptr<float>();
  args.stride = x.stride(0);
  args.T = T;
  args.heads = static_cast<int>(heads);
  args.table = &table->table();
  Exec exec;
  if (T > 0 && heads > 0) NormRope(exec.ctx, args);
}

std::tuple<Tensor, Tensor> Sample(const Tensor& logits, const Tensor& seeds,
                                  const Tensor& positions, double temperature, int64_t top_k,
                                  double top_p, double min_p) {
  constexpr char kOp[] = "dsla::sample";
  Check(kOp, "logits", logits, {-1, -1}, at::kFloat);
  const int64_t N = logits.size(0), V = logits.size(1);
  Check(kOp, "seeds", seeds, {N}, at::kLong);
  Check(kOp, "positions", positions, {N}, at::kLong);
  TORCH_CHECK(V > 0 && V < kMaxPosition, kOp, ": logits is ", logits.sizes());
  TORCH_CHECK(top_k >= 0, kOp, ": top_k ", top_k, " is negative");
  SamplingParams params;
  params.temperature = static_cast<float>(temperature);
  params.top_k = static_cast<int32_t>(std::min(top_k, V));
  params.top_p = static_cast<float>(top_p);
  params.min_p = static_cast<float>(min_p);
  const Status valid = Validate(params, V);
  TORCH_CHECK(valid.ok(), kOp, ": ", valid.message());
  Tensor tokens = at::empty({N}, seeds.options()), logprobs = at::empty({N}, logits.options());
  std::vector<float> row(static_cast<size_t>(V));  // a sampler writes to its logits while it runs
  for (int64_t n = 0; n < N; ++n) {
    const int64_t position = positions.const_data_ptr<int64_t>()[n];
    TORCH_CHECK(position >= 0, kOp, ": positions[", n, "] is ", position);
    params.seed = static_cast<uint64_t>(seeds.const_data_ptr<int64_t>()[n]);
    std::copy_n(Data(logits) + n * V, V, row.begin());
    const auto choice = Sampler(params, V).Sample(row, position);
    TORCH_CHECK(choice.ok(), kOp, ": row ", n, ": ", choice.status().message());
    tokens.data_ptr<int64_t>()[n] = choice->token;
    logprobs.data_ptr<float>()[n] = choice->logprob;
  }
  return {tokens, logprobs};
}

// No tensor among its arguments, so no dispatch key.
TORCH_LIBRARY_IMPL(dsla, CompositeExplicitAutograd, m) { m.impl("slot_bytes", SlotBytes); }

TORCH_LIBRARY_IMPL(dsla, CPU, m) {
  m.impl("forward", Forward);
  m.impl("fold", Fold);
  m.impl("paged_attention", PagedAttention);
  m.impl("rms_norm", RmsNormOp);
  m.impl("rope", RopeOp);
  m.impl("sample", Sample);
}

}  // namespace

TorchRopeTable::TorchRopeTable(const Tensor& frequencies, int64_t positions) {
  constexpr char kOp[] = "dsla.RopeTable";
  Check(kOp, "frequencies", frequencies, {-1}, at::kDouble);
  TORCH_CHECK(frequencies.size(0) > 0 && positions > 0 && positions < kMaxPosition, kOp, ": ",
              frequencies.size(0), " frequencies, ", positions, " positions");
  table_ = RopeTable(
      {frequencies.const_data_ptr<double>(), static_cast<size_t>(frequencies.size(0))}, positions);
}

Tensor TorchRopeTable::Copy(const float* values) const {
  Tensor out = at::empty({positions(), table_.D() / 2}, at::kFloat);
  std::copy_n(values, out.numel(), out.data_ptr<float>());
  return out;
}

}  // namespace dsla
