// Reference and CPU against goldens made by tools/dsla_golden.py, which describes the files: numpy,
// fp64, another formula (an explicit matrix of weights instead of a recurrence).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "ops/dsla/dsla_testing.h"
#include "ops/simd/each_target.h"

namespace dsla {
namespace {

struct Golden {
  DslaShape shape;
  int tokens = 0;
  std::vector<float> phi_q, phi_k, gate_weight, gate_bias, mix, cos, sin, q, k, v, claim, out,
      state, norm;

  explicit Golden(const std::string& name) {
    const std::string path =
        std::string(DSLA_SOURCE_DIR) + "/src/ops/dsla/testdata/golden_" + name + ".bin";
    std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                         &std::fclose);
    if (!file) {
      ADD_FAILURE() << "cannot open " << path;
      return;
    }
    int32_t n[8];
    EXPECT_EQ(std::fread(n, sizeof(int32_t), 8, file.get()), 8u);
    shape.H = n[0];
    shape.Hkv = n[1];
    shape.D = n[2];
    shape.F = n[3];
    shape.states = n[4];
    shape.window = n[5];
    shape.sinks = n[6];
    tokens = n[7];
    shape.kv_dtype = DType::kF32;
    shape.gate_floor = -2.5f;
    const auto read = [&](std::vector<float>& x, int64_t count) {
      x.resize(static_cast<size_t>(count));
      EXPECT_EQ(std::fread(x.data(), sizeof(float), x.size(), file.get()), x.size()) << path;
    };
    const int64_t H = shape.H, Hkv = shape.Hkv, D = shape.D, F = shape.F, T = tokens;
    read(phi_q, H * D * D);
    read(phi_k, Hkv * D * D);
    read(gate_weight, shape.states * Hkv * D * F);
    read(gate_bias, shape.states * Hkv * F);
    read(mix, H * shape.states);
    for (std::vector<float>* table : {&cos, &sin}) read(*table, T * D / 2);
    read(q, T * H * D);
    for (std::vector<float>* cache : {&k, &v}) read(*cache, T * Hkv * D);
    read(claim, T * H);
    read(out, T * H * D);
    read(state, Hkv * shape.SF() * D);
    read(norm, Hkv * shape.SF());
    EXPECT_EQ(std::fgetc(file.get()), EOF) << path;
  }

  // Runs `forward` over all tokens, `step` per call, and compares.
  template <typename Forward>
  void Check(int step, Forward&& forward) const {
    TestPool pool(shape, 1);
    pool.Reset(0);
    std::vector<float> got(out.size());
    const int32_t slot = 0;
    for (int32_t pos = 0; pos < tokens; pos += step) {
      const int32_t row_start[] = {0, std::min(step, tokens - pos)};
      DslaArgs args;
      args.shape = shape;
      args.params = {phi_q.data(), phi_k.data(), gate_weight.data(), gate_bias.data(),
                     mix.data(),   cos.data(),   sin.data()};
      args.rows = {1, row_start, &pos};
      args.slots = &slot;
      args.states = pool.View();
      args.q_stride = int64_t{shape.H} * shape.D;
      args.q = q.data() + pos * args.q_stride;
      args.k = k.data() + int64_t{pos} * shape.Hkv * shape.D;
      args.v = v.data() + int64_t{pos} * shape.Hkv * shape.D;
      args.claim = shape.window > 0 ? claim.data() + int64_t{pos} * shape.H : nullptr;
      args.out = got.data() + pos * args.q_stride;
      forward(args);
    }
    ExpectClose(got, out, DslaTolerance(shape));
    ExpectClose(pool.State(0), state, DslaTolerance(shape));
    ExpectClose(pool.Norm(0), norm, DslaTolerance(shape));
  }
};

class DslaGolden : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(All, DslaGolden, testing::Values("window", "states", "single"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(DslaGolden, Reference) {
  Golden(GetParam()).Check(1000, [](const DslaArgs& args) { DslaForwardRef(args); });
}

TEST_P(DslaGolden, Cpu) {
  const Golden golden(GetParam());
  ForEachTarget([&] {
    Workspace workspace;
    for (const int step : {1, 17, 1000}) {
      SCOPED_TRACE("tokens per call: " + std::to_string(step));
      golden.Check(step, [&](const DslaArgs& args) { DslaForwardCpu({2, &workspace}, args); });
    }
  });
}

}  // namespace
}  // namespace dsla
