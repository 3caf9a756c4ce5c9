// Decode attention on the GPU against the fp64 reference.
#include "ops/attention/cuda/attention_cuda_testing.cuh"

namespace dsla {
namespace {

class AttentionCudaTest : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!HaveGpu()) GTEST_SKIP() << "SKIPPED: no CUDA device here";
  }
};

TEST_P(AttentionCudaTest, Decode) {
  const Case c = GetParam();
  const std::vector<std::vector<Sequence>> batches{
      {{4096, 1}},  // alone: cut into the most parts
      {{0, 1}, {62, 1}, {63, 1}, {64, 1}, {4096, 1}, {15, 1}, {16, 1}, {999, 1}, {2047, 1}},
      std::vector<Sequence>(70, {300, 1})};
  for (const auto& sequences : batches) {
    SCOPED_TRACE(std::to_string(sequences.size()) + " sequences");
    const Batch batch(c, sequences, 1);
    Gpu gpu(c, batch);
    const std::vector<float> out = gpu.Decode();
    batch.ExpectNear(out, c.window, DecodeTolerance);
    EXPECT_TRUE(SameBits(out, gpu.Decode())) << "two runs differ";
  }
}

TEST_P(AttentionCudaTest, DecodeLeavesOtherRowsAlone) {
  const Case c = GetParam();
  const Batch batch(c, {{40, 1}, {700, 1}, {5, 1}, {90, 1}}, 2);
  Gpu gpu(c, batch);
  const std::vector<float> all = gpu.Decode();
  std::vector<int32_t> pos = batch.pos, rows{3};
  pos[1] = -1;
  gpu.pos.Write(pos.data());
  gpu.rows.Write(rows.data());
  const std::vector<float> out = gpu.Decode();
  const auto row = static_cast<size_t>(c.H * c.D);
  for (const size_t n : {0, 2})
    EXPECT_TRUE(std::equal(out.begin() + int64_t(n * row), out.begin() + int64_t((n + 1) * row),
                           all.begin() + int64_t(n * row)))
        << "row " << n << " depends on rows that are left out";
  EXPECT_TRUE(AllNaN(std::span(out).subspan(row, row))) << "a padding row was written";
  EXPECT_TRUE(AllNaN(std::span(out).subspan(3 * row))) << "a row behind *rows was written";
}

TEST_P(AttentionCudaTest, DecodeReplayedWithOtherLengths) {
  const Case c = GetParam();
  // One graph; lengths, tables and rows of three batches in turn over the same buffers.
  const std::vector<Batch> batches{{c, {{3000, 1}, {20, 1}, {64, 1}}, 3},
                                   {c, {{17, 1}, {2500, 1}, {500, 1}}, 4},
                                   {c, {{127, 1}, {128, 1}, {2800, 1}}, 5}};
  size_t pages = 0, elements = 0;
  for (const Batch& b : batches) {
    pages = std::max(pages, b.pages().size());
    elements = std::max(elements, b.k.size());
  }
  Gpu gpu(c, batches[0]);
  const DeviceBytes k(static_cast<int64_t>(elements * 2)), v(static_cast<int64_t>(elements * 2));
  const DeviceBytes table(static_cast<int64_t>(pages * 4)), workspace(gpu.decode_bytes);
  gpu.decode.kv.k = k.as<void>();
  gpu.decode.kv.v = v.as<void>();
  gpu.decode.tables.pages = table.as<int32_t>();
  gpu.decode.workspace = workspace.as<void>();
  gpu.decode.workspace_bytes = workspace.bytes();
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  CheckCuda(cuda::DecodeAttention(gpu.decode, stream));
  CheckCuda(cudaStreamEndCapture(stream, &graph));
  CheckCuda(cudaGraphInstantiate(&exec, graph, 0));
  const auto copy = [](void* to, const auto& from) {
    CheckCuda(cudaMemcpy(to, from.data(), from.size() * sizeof(from[0]), cudaMemcpyHostToDevice));
  };
  for (const Batch& b : batches) {
    copy(k.as<void>(), b.k);
    copy(v.as<void>(), b.v);
    copy(table.as<void>(), b.pages());
    copy(gpu.page_start.as<void>(), b.page_start());
    copy(gpu.pos.as<void>(), b.pos);
    std::vector<bf16> q;
    for (const float x : b.q) q.push_back(ToBf16(x));
    copy(gpu.q.as<void>(), q);
    std::vector<float> first;
    for (int replay = 0; replay < 2; ++replay) {
      gpu.out.Poison();
      CheckCuda(cudaDeviceSynchronize());
      CheckCuda(cudaGraphLaunch(exec, stream));
      CheckCuda(cudaStreamSynchronize(stream));
      const std::vector<float> out = gpu.Out();
      b.ExpectNear(out, c.window, DecodeTolerance);
      if (replay == 0) first = out;
      EXPECT_TRUE(SameBits(out, first)) << "two replays differ";
    }
  }
  CheckCuda(cudaGraphExecDestroy(exec));
  CheckCuda(cudaGraphDestroy(graph));
  CheckCuda(cudaStreamDestroy(stream));
}

INSTANTIATE_TEST_SUITE_P(Shapes, AttentionCudaTest, kCases,
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace dsla
