// Every operator called through torch's dispatcher, boxed as Python does it, equals the direct
// call.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gmock/gmock.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <string>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/dsla/dsla.h"
#include "ops/dsla/dsla_autograd.h"
#include "ops/norm_rope/norm_rope.h"
#include "ops/sampling/sampling.h"
#include "ops/torch/register.h"
#include "ops/torch/rope_table.h"

namespace dsla {
namespace {

using at::Tensor;
using c10::IValue;
using ::testing::HasSubstr;

// Calls dsla::<name>; missing trailing arguments take the schema's defaults.
std::vector<IValue> Call(const std::string& name, std::vector<IValue> stack) {
  RegisterTorchOps();
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("dsla::" + name).c_str(), "");
  const auto& arguments = op.schema().arguments();
  for (size_t i = stack.size(); i < arguments.size(); ++i)
    stack.push_back(arguments[i].default_value().value());
  op.callBoxed(&stack);
  return stack;
}

std::string CallError(const std::string& name, std::vector<IValue> stack) {
  try {
    Call(name, std::move(stack));
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "none";
}

void ExpectSame(const IValue& got, const Tensor& want) {
  ASSERT_TRUE(got.isTensor());
  EXPECT_EQ(got.toTensor().sizes().vec(), want.sizes().vec());
  EXPECT_TRUE(at::equal(got.toTensor(), want));
}

Tensor Ints(std::vector<int> values) { return at::tensor(values, at::kInt); }
const float* Data(const Tensor& x) { return x.const_data_ptr<float>(); }
const int32_t* Indices(const Tensor& x) { return x.const_data_ptr<int32_t>(); }

class TorchOps : public ::testing::Test {
 protected:
  static constexpr uint64_t kSeed = 7;
  void SetUp() override {
    std::printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
    at::manual_seed(kSeed);
    phi_q_ = at::randn({kH, kD, kD}), phi_k_ = at::randn({kHkv, kD, kD});
    gate_weight_ = at::randn({2, kHkv, kD, kF}), gate_bias_ = at::randn({2, kHkv, kF});
    mix_ = at::randn({kH, 2}).softmax(1);
    const int64_t half = kD / 2;
    frequencies_ = at::pow(100., at::arange(half, at::kDouble) / -static_cast<double>(half));
    const Tensor angle = at::arange(64, at::kDouble).unsqueeze(1) * frequencies_;
    rope_cos_ = angle.cos().to(at::kFloat), rope_sin_ = angle.sin().to(at::kFloat);
  }

  static constexpr int kH = 4, kHkv = 2, kD = 16, kF = 32, kW = 8, kS = 2;
  static constexpr double kFloor = -2.25;
  DslaShape shape_{kH, kHkv, kD, kF, 2, kW, kS, DType::kBF16, static_cast<float>(kFloor)};
  Tensor phi_q_, phi_k_, gate_weight_, gate_bias_, mix_, frequencies_, rope_cos_, rope_sin_;

  std::vector<IValue> ParamValues() const {
    return {phi_q_, phi_k_, gate_weight_, gate_bias_, mix_, rope_cos_, rope_sin_, kW, kS, kFloor};
  }
  DslaParams Params() const {
    return {Data(phi_q_), Data(phi_k_),    Data(gate_weight_), Data(gate_bias_),
            Data(mix_),   Data(rope_cos_), Data(rope_sin_)};
  }
  Tensor Pool(int64_t slots) const {
    return at::zeros({slots, MakeSlotLayout(shape_).bytes}, at::kByte);
  }
  static DslaStateView View(const Tensor& pool) {
    return {reinterpret_cast<std::byte*>(pool.data_ptr<uint8_t>()), pool.size(1)};
  }
  Workspace workspace_;
  ExecContext ctx_{1, &workspace_};
};

std::vector<IValue> Join(std::vector<IValue> a, const std::vector<IValue>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TEST_F(TorchOps, ForwardWritesTheStatesInPlace) {
  const int64_t bytes = Call("slot_bytes", {kH, kHkv, kD, kF, 2, kW, kS, at::kBFloat16})[0].toInt();
  EXPECT_EQ(bytes, MakeSlotLayout(shape_).bytes);
  const Tensor pool = Pool(3), expected_pool = Pool(3);
  for (const int step : {0, 1}) {  // a prompt of 21 and of 9 tokens, then one token and 3
    const Tensor row_start = step == 0 ? Ints({0, 21, 30}) : Ints({0, 1, 4}),
                 pos = step == 0 ? Ints({0, 0}) : Ints({21, 9}), slots = Ints({2, 0});
    const int64_t T = step == 0 ? 30 : 4;
    const Tensor q = at::randn({T, kH, kD}), claim = at::randn({T, kH}),
                 k = at::randn({T, kHkv, kD}).to(at::kBFloat16),
                 v = at::randn({T, kHkv, kD}).to(at::kBFloat16);
    const auto got =
        Call("forward", Join({q, k, v, claim, pool, slots, row_start, pos}, ParamValues()));
    Tensor out = at::empty_like(q);
    DslaArgs args;
    args.shape = shape_, args.params = Params();
    args.rows = {2, Indices(row_start), Indices(pos)};
    args.slots = Indices(slots), args.states = View(expected_pool);
    args.q = Data(q), args.q_stride = kH * kD;
    args.k = k.const_data_ptr(), args.v = v.const_data_ptr(), args.claim = Data(claim);
    args.out = out.data_ptr<float>();
    DslaForwardCpu(ctx_, args);
    ExpectSame(got[0], out);
    ExpectSame(pool, expected_pool);
    EXPECT_GT(at::count_nonzero(pool.select(0, 2)).item<int64_t>(), 0);
  }
}

TEST_F(TorchOps, FoldAndPagedAttention) {
  const Tensor k = at::randn({5, kHkv, 16, kD}).to(at::kBFloat16),
               v = at::randn({5, kHkv, 16, kD}).to(at::kBFloat16);
  const Tensor page_start = Ints({0, 3, 4}), pages = Ints({4, 0, 2, 1}), slots = Ints({1, 0});
  const PagedKvView kv{k.data_ptr(), v.data_ptr(), k.stride(0), 16, kHkv, kD, DType::kBF16};
  const PageTables tables{Indices(page_start), Indices(pages)};

  const Tensor pos = Ints({40, 11}), pool = Pool(2), expected_pool = Pool(2);
  Call("fold", Join({k, v, page_start, pages, pos, pool, slots}, ParamValues()));
  DslaFoldArgs fold;
  fold.shape = shape_, fold.params = Params();
  fold.rows = {2, nullptr, Indices(pos)};
  fold.tables = tables, fold.kv = kv, fold.slots = Indices(slots);
  fold.states = View(expected_pool);
  DslaFoldCpu(ctx_, fold);
  ExpectSame(pool, expected_pool);
  EXPECT_GT(at::count_nonzero(pool.select(0, 0)).item<int64_t>(), 0);

  const Tensor row_start = Ints({0, 6, 7}), q = at::randn({7, kH, kD});
  const auto got = Call("paged_attention", {q, k, v, page_start, pages, row_start, pos, 0.25, 20});
  Tensor out = at::empty_like(q), lse = at::empty({7, kH});
  PagedAttentionArgs args;
  args.rows = {2, Indices(row_start), Indices(pos)};
  args.tables = tables, args.kv = kv, args.H = kH, args.scale = 0.25f, args.sliding_window = 20;
  args.q = Data(q), args.q_stride = kH * kD;
  args.out = out.data_ptr<float>(), args.lse = lse.data_ptr<float>();
  PagedAttentionCpu(ctx_, args);
  ExpectSame(got[0], out);
  ExpectSame(got[1], lse);
}

TEST_F(TorchOps, NormRopeLinearSample) {
  const Tensor x = at::randn({2, 3, 40}), weight = at::randn({40});
  Tensor out = at::empty_like(x);
  RmsNorm(ctx_, Data(x), Data(weight), 1e-5f, 6, 40, out.data_ptr<float>());
  ExpectSame(Call("rms_norm", {x, weight, 1e-5})[0], out);

  const auto table = c10::make_intrusive<TorchRopeTable>(frequencies_, 64);
  EXPECT_TRUE(at::allclose(table->Cos(), rope_cos_, 0, 1e-7));
  EXPECT_TRUE(at::allclose(table->Sin(), rope_sin_, 0, 1e-7));
  const Tensor rows = at::randn({5, kH, kD}), expected = rows.clone(), norm = at::randn({kD}),
               positions = Ints({3, 0, 63, 7, 7});
  Call("rope", {rows, positions, table, norm, 1e-6});
  NormRope(ctx_, {.x = expected.data_ptr<float>(),
                  .stride = kH * kD,
                  .T = 5,
                  .heads = kH,
                  .positions = Indices(positions),
                  .table = &table->table(),
                  .norm_weight = Data(norm),
                  .norm_eps = 1e-6f});
  ExpectSame(rows, expected);

  const Tensor w = at::randn({12, 40}), a = at::randn({3, 40}), b = at::randn({12, 3}),
               bias = at::randn({12});
  a.set_requires_grad(true);
  const Tensor y = Call("linear", {x, w, bias, a, b})[0].toTensor();
  EXPECT_TRUE(at::allclose(y, at::linear(x, w + at::matmul(b, a), bias), 1e-4, 1e-4));
  const Tensor grad = torch::autograd::grad({y.sum()}, {a})[0];
  EXPECT_TRUE(at::allclose(grad, at::outer(b.sum(0), x.flatten(0, 1).sum(0)), 1e-4, 1e-4));
  ExpectSame(Call("linear", {x, w})[0], at::linear(x, w));

  const Tensor logits = at::randn({4, 50}), seeds = at::tensor(std::vector<int64_t>{1, 2, 3, 4}),
               at_position = at::tensor(std::vector<int64_t>{0, 9, 9, 1000});
  const auto drawn = Call("sample", {logits, seeds, at_position, 0.8, 20, 0.9, 0.01});
  for (int64_t n = 0; n < 4; ++n) {
    SamplingParams params;
    params.temperature = 0.8f, params.top_k = 20, params.top_p = 0.9f, params.min_p = 0.01f;
    params.seed = static_cast<uint64_t>(n + 1);
    Tensor row = logits[n].clone();
    const auto choice =
        Sampler(params, 50).Sample({row.data_ptr<float>(), 50}, at_position[n].item<int64_t>());
    ASSERT_TRUE(choice.ok());
    EXPECT_EQ(drawn[0].toTensor()[n].item<int64_t>(), choice->token);
    EXPECT_EQ(drawn[1].toTensor()[n].item<float>(), choice->logprob);
  }
}

// The trained operators: values, and gradients that come back through the dispatcher.
TEST_F(TorchOps, TrainingFormHasAutograd) {
  const int64_t T = 30, TK = 41;
  const Tensor q = at::randn({2, T, kH, kD}), k = at::randn({2, TK, kHkv, kD}),
               v = at::randn({2, TK, kHkv, kD}), claim = at::randn({2, T, kH});
  const Tensor k_plain =
      Call("rotate", {k, rope_cos_.narrow(0, 0, TK), rope_sin_.narrow(0, 0, TK), true})[0]
          .toTensor();
  ExpectSame(k_plain, DslaRope(k, rope_cos_.narrow(0, 0, TK), rope_sin_.narrow(0, 0, TK), true));
  const std::vector<Tensor> trained = {phi_q_, phi_k_, gate_weight_, gate_bias_, mix_};
  for (const Tensor& p : trained) p.set_requires_grad(true);

  const Tensor fq = Call("features", {q, phi_q_, true})[0].toTensor(),
               fk = Call("features", {k, phi_k_, true})[0].toTensor(),
               a = Call("gates", {k_plain, gate_weight_, gate_bias_, kFloor})[0].toTensor();
  const auto lin = Call("chunked", {fq, mix_.softmax(1), fk, a, v, IValue(), IValue(), kW, kS});
  const auto win = Call("window_attention", {q, k, v, kW, kS});
  const Tensor merged = Call("merge", {lin[0], lin[1], win[0], win[1], claim})[0].toTensor();
  const Tensor layer = Call("layer", {q, k, k_plain, v, claim, phi_q_, phi_k_, gate_weight_,
                                      gate_bias_, mix_, kW, kS, kFloor})[0]
                           .toTensor();
  const Tensor want =
      DslaLayer(q, k, k_plain, v, claim, {phi_q_, phi_k_, gate_weight_, gate_bias_, mix_},
                {{.window = kW, .sinks = kS}, kFloor});
  ExpectSame(merged, want);
  ExpectSame(layer, want);
  const auto expected = torch::autograd::grad({want.square().sum()}, trained);
  const auto of_layer = torch::autograd::grad({layer.square().sum()}, trained);
  const auto of_parts = torch::autograd::grad({merged.square().sum()}, trained);
  for (size_t i = 0; i < trained.size(); ++i) {
    EXPECT_GT(expected[i].abs().max().item<float>(), 0);
    ExpectSame(of_layer[i], expected[i]);
    ExpectSame(of_parts[i], expected[i]);
  }
}

TEST_F(TorchOps, RefusesWhatDoesNotFit) {
  const Tensor q = at::randn({4, kH, kD}), claim = at::randn({4, kH}),
               k = at::randn({4, kHkv, kD}).to(at::kBFloat16), pool = Pool(2);
  auto forward = [&](std::vector<IValue> head) {
    return CallError("forward", Join(std::move(head), ParamValues()));
  };
  const Tensor start = Ints({0, 4}), pos = Ints({0}), slot = Ints({1});
  EXPECT_EQ(forward({q, k, k, claim, pool, slot, start, pos}), "none");
  EXPECT_THAT(forward({q, k, k.narrow(0, 0, 3), claim, pool, slot, start, pos}),
              HasSubstr("v is [3, 2, 16], expected [4, 2, 16]"));
  EXPECT_THAT(forward({q, k, k, IValue(), pool, slot, start, pos}),
              HasSubstr("claim must be given"));
  EXPECT_THAT(forward({q, k, k, claim, pool.narrow(1, 0, 64).contiguous(), slot, start, pos}),
              HasSubstr("64 bytes per slot"));
  EXPECT_THAT(forward({q, k, k, claim, pool, Ints({2}), start, pos}),
              HasSubstr("slots[0] is 2, expected [0, 2)"));
  EXPECT_THAT(forward({q, k, k, claim, pool, Ints({1, 1}), Ints({0, 2, 4}), Ints({0, 0})}),
              HasSubstr("a slot twice"));
  EXPECT_THAT(forward({q, k, k, claim, pool, slot, Ints({0, 3}), pos}),
              HasSubstr("row_start must rise from 0 to 4"));
  EXPECT_THAT(forward({q, k, k, claim, pool, slot, start, Ints({61})}),
              HasSubstr("65 tokens, but rope_cos has 64 positions"));
  EXPECT_THAT(forward({q.to(at::kDouble), k, k, claim, pool, slot, start, pos}),
              HasSubstr("q is Double, expected Float"));

  const Tensor pages = at::randn({2, kHkv, 16, kD});
  EXPECT_THAT(CallError("paged_attention",
                        {q, pages, pages, Ints({0, 1}), Ints({2}), start, Ints({0}), 1., 0}),
              HasSubstr("pages[0] is 2"));
  EXPECT_THAT(CallError("paged_attention",
                        {q, pages, pages, Ints({0, 1}), Ints({0}), start, Ints({13}), 1., 0}),
              HasSubstr("has pages for 16 tokens, expected 17"));
  EXPECT_THAT(CallError("slot_bytes", {kH, 3, kD, kF, 2, kW, kS, at::kBFloat16}),
              HasSubstr("4 query heads are no multiple of 3 KV heads"));
  EXPECT_THAT(CallError("rms_norm", {q, at::randn({3}), 1e-5}), HasSubstr("weight is [3]"));
  const auto table = c10::make_intrusive<TorchRopeTable>(frequencies_, 8);
  EXPECT_THAT(CallError("rope", {q.clone(), Ints({0, 1, 2, 8}), table}),
              HasSubstr("positions[3] is 8, expected [0, 8)"));
  const Tensor ids = at::zeros({1}, at::kLong);
  EXPECT_THAT(CallError("sample", {at::full({1, 4}, NAN), ids, ids}), HasSubstr("row 0"));
  EXPECT_THAT(CallError("sample", {at::randn({1, 4}), ids, ids, -1.}), HasSubstr("temperature"));
  EXPECT_THAT(CallError("linear", {q, at::randn({5, 3})}), HasSubstr("expected [..., in]"));
}

}  // namespace
}  // namespace dsla
