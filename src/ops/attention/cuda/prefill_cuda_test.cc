// Prefill attention on the GPU against the fp64 reference, in each of its forms.
#include <future>
#include <tuple>

#include "ops/attention/cuda/attention_cuda_testing.cuh"

namespace dsla {
namespace {

enum class Kernel { kFa2, kHopperPages, kHopperRows };

// What the bounds below need, in fp64, of weights p_i and values v_i: [T, H, D] of
// out = sum p_i v_i, abs = sum p_i |v_i| and walk = sqrt(sum p_i^2 v_i^2), and [T, H] of
// spread = sqrt(sum p_i^2).
struct Expected {
  Expected(const Case& c, const Batch& batch, int window) {
    std::vector<float> keys, sizes, squares;
    for (const bf16 x : batch.k) keys.push_back(ToFloat(x));
    for (const bf16 x : batch.v) {
      sizes.push_back(std::abs(ToFloat(x)));
      squares.push_back(ToFloat(x) * ToFloat(x));  // exact
    }
    std::vector<float> lse(static_cast<size_t>(batch.T() * c.H)), sharp_lse(lse);
    const auto attend = [&](const auto& values, float sharp, float* lse_of) {
      return std::async(std::launch::async, [&batch, &keys, &values, window, sharp, lse_of] {
        return batch.Attend(keys, values, window, sharp * batch.scale(), lse_of);
      });
    };
    auto size = attend(sizes, 1, lse.data());
    auto square = attend(squares, 2, sharp_lse.data());  // weights p_i^2 / sum p_i^2
    out = batch.Reference(window);
    abs = size.get();
    walk = square.get();
    for (size_t i = 0; i < lse.size(); ++i)
      spread.push_back(std::exp(0.5f * sharp_lse[i] - lse[i]));
    for (size_t i = 0; i < walk.size(); ++i)
      walk[i] = std::sqrt(walk[i]) * spread[i / static_cast<size_t>(c.D)];
  }
  std::vector<float> out, abs, walk, spread;
};

// How far an element may be off. u = 2^-8 is the most that rounding to bf16 changes a number by,
// relative to it.
// - Each weight is rounded: at most u abs. The roundings are independent, each with a standard
//   deviation of at most u / sqrt(3) of its term, so where that is less, 5 standard deviations of
//   the sum: 5 / sqrt(3) u walk. (Over a binade the deviation is 0.74 of that, so 5 are 6.8.)
// - FA2 divides by the sum of the rounded weights, so that v_i - out stands for v_i. Where it
//   splits keys it rounds each part's result, at most u abs in all; values are independent, of
//   mean 0 and variance 1, so that the parts' squares add up to spread^2 on average.
// - fp32: every weight has the relative error of its score and exp2 (2^-22), and the sums theirs.
// - The result is rounded: u of it.
double Allowed(const Expected& e, size_t i, const Case& c, Kernel kernel, int keys) {
  constexpr double u = UnitRoundoff(DType::kBF16);
  const double abs = e.abs[i], out = std::abs(e.out[i]), walk = e.walk[i];
  const double spread = e.spread[i / static_cast<size_t>(c.D)], five = 5 / std::sqrt(3);
  double weights = std::min(abs, five * walk);
  if (kernel == Kernel::kFa2)
    weights = std::min(2 * abs + out, five * std::hypot(walk + spread * out, spread)) / (1 - u);
  const double error = u * weights + (SumsError(c, keys) + 0x1p-22) * (abs + out);
  return error + u * (out + error);
}

void ExpectNear(const std::vector<float>& got, const Case& c, const Batch& batch, int window,
                Kernel kernel) {
  const Expected want(c, batch, window);
  ASSERT_GE(got.size(), want.out.size());  // the buffer has room for a row of every sequence
  for (int n = 0; n < batch.N(); ++n) {
    const auto at = static_cast<size_t>(n), row = static_cast<size_t>(c.H * c.D);
    int64_t off = 0;
    double most = 0;
    size_t worst = 0;
    for (size_t i = size_t(batch.row_start[at]) * row; i < size_t(batch.row_start[at + 1]) * row;
         ++i) {
      const double allowed = Allowed(want, i, c, kernel, batch.keys(n));
      double excess = std::abs(double{got[i]} - double{want.out[i]}) / allowed;
      if (!std::isfinite(excess)) excess = std::numeric_limits<double>::infinity();
      if (excess > 1) ++off;
      if (excess <= most) continue;
      most = excess;
      worst = i;
    }
    EXPECT_EQ(off, 0) << "elements of sequence " << n << " are off, the worst in row "
                      << worst / row - size_t(batch.row_start[at]) << " at position "
                      << batch.pos[at] << ": got " << got[worst] << ", want " << want.out[worst]
                      << ", " << most << " times what is allowed; sum p |v| " << want.abs[worst]
                      << ", sqrt(sum p^2 v^2) " << want.walk[worst];
  }
}

class PrefillCudaTest : public ::testing::TestWithParam<std::tuple<Case, Kernel>> {
 protected:
  void SetUp() override {
    if (!HaveGpu()) GTEST_SKIP() << "SKIPPED: no CUDA device here";
    if (kernel() != Kernel::kFa2 && !cuda::PrefillOnHopper())
      GTEST_SKIP() << "SKIPPED: the device here is not of compute capability 9.0";
  }
  Case c() const { return std::get<0>(GetParam()); }
  Kernel kernel() const { return std::get<1>(GetParam()); }
  // The kernel that a window leaves.
  Kernel KernelOf(int window) const { return window > 0 ? Kernel::kFa2 : kernel(); }
  void Choose(Gpu& gpu, const Batch& batch, int window) const {
    gpu.prefill.sliding_window = window;
    gpu.prefill.form =
        KernelOf(window) == Kernel::kFa2 ? cuda::PrefillForm::kFa2 : cuda::PrefillForm::kHopper;
    if (kernel() == Kernel::kHopperPages) return;
    gpu.prefill.k = gpu.new_k.as<void>();
    gpu.prefill.v = gpu.new_v.as<void>();
    // The pages are then not read.
    if (KernelOf(window) != Kernel::kHopperRows || batch.N() > 1 || batch.pos[0] > 0) return;
    gpu.k.Poison();
    gpu.v.Poison();
  }
};

TEST_P(PrefillCudaTest, Prefill) {
  const Case c = this->c();
  if (KernelOf(c.window) != kernel()) GTEST_SKIP() << "windows are FA2's";
  std::vector<Sequence> many;  // more of a plan than one launch carries
  for (int i = 0; i < 400; ++i) many.push_back({i % 41, i % 3});
  const std::vector<std::vector<Sequence>> batches{
      {{0, 1}},
      {{0, 63}},
      {{0, 257}},
      {{0, 1000}},
      {{0, 500}, {0, 0}, {0, 5}, {0, 193}, {0, 700}},
      {{4080, 17}},  // few rows: keys are split
      {{0, 65}, {1, 64}, {64, 0}, {0, 1}, {4000, 97}, {100, 130}, {31, 2}},
      many};
  for (const auto& sequences : batches) {
    SCOPED_TRACE(std::to_string(sequences.size()) + " sequences, first rows " +
                 std::to_string(sequences[0].rows));
    const Batch batch(c, sequences, 6);
    Gpu gpu(c, batch);
    Choose(gpu, batch, c.window);
    const DeviceBytes workspace(gpu.prefill_bytes);
    const std::vector<float> out = gpu.Prefill(workspace, true);
    ExpectNear(out, c, batch, c.window, kernel());
    EXPECT_TRUE(SameBits(out, gpu.Prefill(workspace, false))) << "the kept plan differs";
    const DeviceBytes other(gpu.prefill_bytes);
    EXPECT_TRUE(SameBits(out, gpu.Prefill(other, true))) << "two runs differ";
  }
}

TEST_P(PrefillCudaTest, OfLayersWithOtherWindows) {
  const Case c = this->c();
  const Batch batch(c, {{3000, 9}, {0, 40}}, 7);
  Gpu gpu(c, batch);
  const DeviceBytes workspace(gpu.prefill_bytes);
  bool new_plan = true;
  for (const int window : {0, 100, 0, 1}) {
    SCOPED_TRACE("window " + std::to_string(window));
    Choose(gpu, batch, window);
    ExpectNear(gpu.Prefill(workspace, new_plan), c, batch, window, KernelOf(window));
    new_plan = false;
  }
}

// Keys and values of a sequence, NaN, reach no other sequence.
TEST_P(PrefillCudaTest, NeighbourDoesNotLeak) {
  const Case c = this->c();
  if (KernelOf(c.window) != kernel()) GTEST_SKIP() << "windows are FA2's";
  for (const int cached : {0, 70}) {
    SCOPED_TRACE(std::to_string(cached) + " cached");
    Batch batch(c, {{cached, 200}, {cached, 150}, {cached, 90}}, 9);
    const auto run = [&] {
      Gpu gpu(c, batch);
      Choose(gpu, batch, c.window);
      return gpu.Prefill(DeviceBytes(gpu.prefill_bytes), true);
    };
    const std::vector<float> clean = run();
    ExpectNear(clean, c, batch, c.window, kernel());
    batch.Poison(1);
    const std::vector<float> out = run();
    const auto row = static_cast<size_t>(c.H * c.D);
    for (const size_t n : {0, 2}) {
      const auto begin = static_cast<int64_t>(size_t(batch.row_start[n]) * row);
      const auto end = static_cast<int64_t>(size_t(batch.row_start[n + 1]) * row);
      EXPECT_TRUE(std::equal(out.begin() + begin, out.begin() + end, clean.begin() + begin))
          << "sequence " << n << " depends on its neighbour";
    }
    EXPECT_TRUE(AllNaN(std::span(out).subspan(size_t(batch.row_start[1]) * row, 150 * row)))
        << "the poison was not read at all";
  }
}

TEST(PrefillCuda, Chooses) {
  if (!HaveGpu()) GTEST_SKIP() << "SKIPPED: no CUDA device here";
  const Case c{"", 32, 2, 64, 64, 0, Scores::kNormal};
  struct Choice {
    Sequence sequence;
    int window;
    bool hopper;
  };
  for (const auto& [sequence, window, hopper] : {Choice{{0, 127}, 0, false},
                                                 {{0, 128}, 0, true},
                                                 {{0, 512}, 100, false},
                                                 {{1000, 192}, 0, false},     // 32 tiles and heads
                                                 {{1000, 1920}, 0, true}}) {  // 320
    SCOPED_TRACE(std::to_string(sequence.cached) + " cached, " + std::to_string(sequence.rows) +
                 " rows, window " + std::to_string(window));
    const Batch batch(c, {sequence}, 8);
    Gpu gpu(c, batch);
    gpu.prefill.sliding_window = window;
    const auto run = [&](cuda::PrefillForm form) {
      gpu.prefill.form = form;
      return gpu.Prefill(DeviceBytes(gpu.prefill_bytes), true);
    };
    const std::vector<float> chosen = run(cuda::PrefillForm::kChoose);
    const std::vector<float> fa2 = run(cuda::PrefillForm::kFa2);
    const bool takes_hopper = hopper && cuda::PrefillOnHopper();
    EXPECT_EQ(SameBits(chosen, fa2), !takes_hopper);  // the two round at different places
    if (takes_hopper) {
      EXPECT_TRUE(SameBits(chosen, run(cuda::PrefillForm::kHopper)));
    }
  }
}

std::string Name(const ::testing::TestParamInfo<std::tuple<Case, Kernel>>& info) {
  const char* const kernels[] = {"fa2", "hopper_pages", "hopper_rows"};
  return std::string(std::get<0>(info.param).name) + "_" +
         kernels[static_cast<int>(std::get<1>(info.param))];
}
INSTANTIATE_TEST_SUITE_P(Shapes, PrefillCudaTest,
                         ::testing::Combine(kCases,
                                            ::testing::Values(Kernel::kFa2, Kernel::kHopperPages,
                                                              Kernel::kHopperRows)),
                         Name);

}  // namespace
}  // namespace dsla
