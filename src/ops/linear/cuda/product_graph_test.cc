// Layers of products and elementwise steps as a CUDA graph replays them.
#include <cmath>

#include "ops/linear/cuda/product_testing.cuh"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"

namespace dsla {
namespace {

using ProductGraphTest = GpuTest;

// Layers as a decode step runs them, in which each kernel reads what the one before it wrote.
class Layers {
 public:
  Layers(int C, int ffn, int r, int T, int first)
      : C_(C),
        ffn_(ffn),
        r_(r),
        T_(T),
        norm_(Random(C, 1)),
        up_(Values(int64_t{kLayers} * 2 * ffn * C, 2, Scale(C))),
        down_(Values(int64_t{kLayers} * C * ffn, 3, Scale(ffn))),
        in_(Values(int64_t{r + kHeads} * C, 4, Scale(C))),
        out_(Values(int64_t{2} * ffn * r, 5, Scale(r))),
        bias_(Random(kHeads, 6)),
        start_(Random(int64_t{T} * C, 7)),
        first_(std::vector<int32_t>{first}),
        hidden(int64_t{T} * C * 4),
        claim(int64_t{T} * kHeads * 4),
        normed_(int64_t{T} * C * 2),
        gate_up_(int64_t{T} * ffn * 4),
        activation_(int64_t{T} * ffn * 2),
        delta_(int64_t{T} * C * 2),
        low_(int64_t{T} * r * 2) {}

  // Anew: all that kernels write is NaN but the start.
  void Reset() {
    for (DeviceBytes* p : {&claim, &normed_, &gate_up_, &activation_, &delta_, &low_}) p->Poison();
    hidden.Write(start_.data());
  }

  template <typename AfterEach>
  void Run(cudaStream_t stream, const AfterEach& after_each) {
    const auto done = [&](int error) {
      CheckCuda(error);
      after_each();
    };
    const auto norm = [&](bool add) {
      done(cuda::AddRmsNorm({.hidden = hidden.as<float>(),
                             .delta = add ? delta_.as<void>() : nullptr,
                             .weight = norm_.as<float>(),
                             .eps = 1e-5f,
                             .T = T_,
                             .C = C_,
                             .normed = normed_.as<void>()},
                            stream));
    };
    for (int l = 0; l < kLayers; ++l) {
      norm(l > 0);
      const cuda::ProductArgs up = Weight(up_, l, 2 * ffn_, C_, normed_, gate_up_);
      const cuda::AdapterInArgs in{.weight = in_.as<void>(),
                                   .in = C_,
                                   .r = r_,
                                   .H = kHeads,
                                   .x = normed_.as<void>(),
                                   .x_stride = C_,
                                   .T = T_,
                                   .first_row = first_.as<int32_t>(),
                                   .low_rank = low_.as<void>(),
                                   .claim = claim.as<float>(),
                                   .claim_bias = bias_.as<float>()};
      if (l % 2 == 0) {
        done(cuda::SmallProduct(up, stream));
        done(cuda::AdapterIn(in, stream));
      } else {
        done(cuda::JointProduct(up, in, stream));
      }
      cuda::ProductArgs add = Weight(out_, 0, 2 * ffn_, r_, low_, gate_up_);
      add.add = true;
      add.first_row = first_.as<int32_t>();
      done(cuda::SmallProduct(add, stream));
      done(cuda::SiluMul(gate_up_.as<void>(), T_, ffn_, activation_.as<void>(), stream));
      done(cuda::SmallProduct(Weight(down_, l, C_, ffn_, activation_, delta_), stream));
      norm(true);
      cuda::ProductArgs gated = Weight(up_, l, 2 * ffn_, C_, normed_, activation_);
      gated.y_stride = ffn_;
      gated.gated = true;
      done(cuda::SmallProduct(gated, stream));
      done(cuda::SmallProduct(Weight(down_, l, C_, ffn_, activation_, delta_), stream));
    }
  }

 private:
  static constexpr int kLayers = 6, kHeads = 9;
  static float Scale(int n) { return 2 / std::sqrt(static_cast<float>(n)); }
  cuda::ProductArgs Weight(const DeviceBytes& weight, int l, int out, int in, const DeviceBytes& x,
                           const DeviceBytes& y) const {
    return {.weight = weight.as<uint16_t>() + int64_t{l} * out * in,
            .out = out,
            .in = in,
            .x = x.as<void>(),
            .x_stride = in,
            .T = T_,
            .y = y.as<void>(),
            .y_stride = out};
  }

  int C_, ffn_, r_, T_;
  DeviceBytes norm_, up_, down_, in_, out_, bias_;
  std::vector<float> start_;
  DeviceBytes first_;

 public:
  DeviceBytes hidden, claim;

 private:
  DeviceBytes normed_, gate_up_, activation_, delta_, low_;
};

// Replayed from a graph, where kernels start early, it equals a chain with a wait after each.
TEST_F(ProductGraphTest, ReplaysEqualSingleLaunches) {
  struct {
    int C, ffn, T, first;
  } const cases[] = {{576, 1536, 1, 1},     {576, 1536, 1, 0},     {576, 1536, 7, 3},
                     {576, 1536, 32, 0},    {576, 1536, 33, 0},    {576, 1536, 64, 10},
                     {576, 1536, 256, 100}, {576, 1536, 256, 256}, {4096, 2816, 1, 0},
                     {4096, 2816, 8, 8},    {4096, 2816, 16, 4},   {4096, 2816, 128, 70}};
  cudaStream_t stream;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const auto& c : cases) {
    SCOPED_TRACE(testing::Message() << "C " << c.C << ", T " << c.T << ", from row " << c.first);
    Layers layers(c.C, c.ffn, 16, c.T, c.first);
    layers.Reset();
    CheckCuda(cudaDeviceSynchronize());
    layers.Run(stream, [&] { CheckCuda(cudaStreamSynchronize(stream)); });
    const std::vector<uint16_t> want = ReadBits(layers.hidden), claim = ReadBits(layers.claim);
    for (const float value : ReadAll<float>(layers.hidden)) ASSERT_FALSE(std::isnan(value));

    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    layers.Run(stream, [] {});
    CheckCuda(cudaStreamEndCapture(stream, &graph));
    CheckCuda(cudaGraphInstantiate(&exec, graph, 0));
    for (int replay = 0; replay < 50; ++replay) {
      layers.Reset();
      CheckCuda(cudaDeviceSynchronize());
      CheckCuda(cudaGraphLaunch(exec, stream));
      CheckCuda(cudaStreamSynchronize(stream));
      ASSERT_EQ(ReadBits(layers.hidden), want) << "replay " << replay;
      ASSERT_EQ(ReadBits(layers.claim), claim) << "replay " << replay;
    }
    CheckCuda(cudaGraphExecDestroy(exec));
    CheckCuda(cudaGraphDestroy(graph));
  }
  CheckCuda(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace dsla
