// Products in fp8 against fp64 sums over the same rounded numbers.
#include "model/cuda/fp8_gemm.h"

#include <algorithm>
#include <cmath>

#include "ops/linear/cuda/product_testing.cuh"

namespace dsla {
namespace {

class Fp8GemmTest : public GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    cudaDeviceProp property;
    if (IsSkipped()) return;
    CheckCuda(cudaGetDeviceProperties(&property, 0));
    if (property.major != 9 || property.minor != 0)
      GTEST_SKIP() << "SKIPPED: takes compute capability 9.0";
  }
};

// Rows in e4m3, on the device and as what they stand for.
struct Rounded {
  Rounded(int rows, int in, uint32_t seed, float scale)
      : rows(rows), rounded(Values(int64_t{rows} * in, seed, scale), rows, in) {
    const auto bytes = ReadAll<uint8_t>(rounded.data);
    const auto of_row = ReadAll<float>(rounded.scale);
    for (size_t i = 0; i < bytes.size(); ++i)
      values.push_back(FromE4m3(bytes[i]) * of_row[i / static_cast<size_t>(in)]);
  }
  cuda::Fp8Gemm::Operand operand() const {
    return {rounded.data.as<void>(), rounded.scale.as<float>(), rows};
  }

  int rows;
  RoundedRows rounded;
  std::vector<float> values;
};

TEST_F(Fp8GemmTest, EqualsReference) {
  cudaStream_t stream = nullptr;
  CheckCuda(cudaStreamCreate(&stream));
  const cuda::DeviceBuffer workspace(int64_t{32} << 20);
  cuda::Fp8Gemm gemm(stream, workspace);
  for (const Shape shape : {Shape{64, 64}, Shape{960, 576}, Shape{576, 1536}, Shape{4096, 1024}})
    for (const int T : {1, 2, 16, 17, 64, 192}) {
      SCOPED_TRACE(testing::Message() << shape << ", T " << T);
      const int out = shape.out, in = shape.in, stride = out + 8;
      const Rounded weight(out, in, 3, 0.05f), x(T, in, 4, 2);
      CheckCuda(cudaDeviceSynchronize());
      for (const bool f32 : {false, true}) {
        const DeviceBytes y(int64_t{T} * stride * (f32 ? 4 : 2));
        gemm.Run(weight.operand(), x.operand(), in, y.as<void>(), stride, f32);
        CheckCuda(cudaStreamSynchronize(stream));
        const std::vector<float> got = f32 ? ReadAll<float>(y) : Floats(ReadBits(y));
        double squares = 0, errors = 0;
        for (int t = 0; t < T; ++t)
          for (int o = 0; o < out; ++o) {
            double sum = 0, magnitude = 0;
            for (int i = 0; i < in; ++i) {
              const double term = double{weight.values[static_cast<size_t>(o * in + i)]} *
                                  double{x.values[static_cast<size_t>(t * in + i)]};
              sum += term;
              magnitude += std::fabs(term);
            }
            const double error = got[static_cast<size_t>(t * stride + o)] - sum;
            // The sum keeps 14 bits from each 32 terms to the next ones; the result may be rounded.
            ASSERT_LE(std::fabs(error), in / 32 * 0x1p-14 * magnitude + 0x1p-8 * std::fabs(sum))
                << "row " << t << ", feature " << o;
            squares += sum * sum;
            errors += error * error;
          }
        EXPECT_LE(std::sqrt(errors / squares), 0.01);
      }
    }
  CheckCuda(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace dsla
