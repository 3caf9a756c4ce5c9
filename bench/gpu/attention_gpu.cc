// Times the CUDA softmax attention: medians over CUDA events, beside a device copy of the same run.
// Decode rotates over more than 400 MB of pages in shuffled order, so that no key is found in the
// L2 cache, and is replayed from a CUDA graph, as a server does. Prefill is one causal sequence
// with a plan made before, as all layers but the first have it; fa3 reads keys and values from the
// pages, fa3rows from rows beside the queries, as a model's projections leave them.
//
//   attention_gpu [--only "decode H32 Hkv8"] [--form fa2|fa3|fa3rows]
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gpu_timing.cuh"
#include "ops/attention/cuda/attention_cuda.h"

namespace dsla {
namespace {

constexpr int kPage = 64;

struct Setup {
  const char* name;
  int H, Hkv, D;
};

// Pages of random keys and values and a table of them in shuffled order.
struct Pool {
  Pool(const Setup& s, int64_t pages) : k(Bytes(s, pages)), v(k.bytes()), table(Shuffled(pages)) {
    const DeviceBytes random(RandomBf16(int64_t{1} << 24, 1));
    for (const DeviceBytes* to : {&k, &v})
      for (int64_t at = 0; at < to->bytes(); at += random.bytes())
        CheckCuda(cudaMemcpy(to->as<std::byte>() + at, random.as<void>(),
                             size_t(std::min(random.bytes(), to->bytes() - at)),
                             cudaMemcpyDeviceToDevice));
  }
  PagedKvView View(const Setup& s) const {
    return {k.as<void>(), v.as<void>(), int64_t{s.Hkv} * kPage * s.D, kPage, s.Hkv,
            s.D,          DType::kBF16};
  }
  static int64_t Bytes(const Setup& s, int64_t pages) { return pages * s.Hkv * kPage * s.D * 2; }
  static std::vector<int32_t> Shuffled(int64_t pages) {
    std::vector<int32_t> table(static_cast<size_t>(pages));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(2));
    return table;
  }

  DeviceBytes k, v, table;
};

template <typename Args>
void SetCommon(Args& a, const Setup& s, const Pool& pool, const DeviceBytes& q,
               const DeviceBytes& out, const DeviceBytes& workspace) {
  a.kv = pool.View(s);
  a.H = s.H;
  a.scale = 1 / std::sqrt(static_cast<float>(s.D));
  a.q = q.as<void>();
  a.q_stride = s.H * s.D;
  a.out = out.as<void>();
  a.workspace = workspace.as<void>();
  a.workspace_bytes = workspace.bytes();
}

void BenchDecode(const Setup& s, int N, int length, cudaStream_t stream, double copy_rate,
                 const char* only) {
  const std::string name = std::string("decode ") + s.name + " N " + std::to_string(N) +
                           " length " + std::to_string(length);
  if (name.find(only) == std::string::npos) return;
  const int64_t pages = int64_t{N} * ((length + kPage - 1) / kPage);
  const int sets = static_cast<int>((int64_t{400} << 20) / (2 * Pool::Bytes(s, pages))) + 1;
  size_t free = 0, total = 0;
  CheckCuda(cudaMemGetInfo(&free, &total));
  if (2 * Pool::Bytes(s, sets * pages) > static_cast<int64_t>(free / 10 * 9)) {
    std::printf("%-44s does not fit\n", name.c_str());
    return;
  }
  const Pool pool(s, sets * pages);
  std::vector<int32_t> start;
  for (int64_t i = 0; i <= N; ++i) start.push_back(static_cast<int32_t>(i * pages / N));
  const DeviceBytes d_start(start), pos(std::vector<int32_t>(size_t(N), length - 1)),
      rows(std::vector<int32_t>{N}), q(RandomBf16(int64_t{N} * s.H * s.D, 3)), out(q.bytes()),
      workspace(cuda::DecodeAttentionWorkspaceBytes(N, s.H, s.Hkv, s.D));
  cuda::DecodeAttentionArgs a;
  SetCommon(a, s, pool, q, out, workspace);
  a.N = N;
  a.rows = rows.as<int32_t>();
  a.pos = pos.as<int32_t>();
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < sets; ++i) {
    a.tables = {d_start.as<int32_t>(), pool.table.as<int32_t>() + i * pages};
    CheckCuda(cuda::DecodeAttention(a, stream));
  }
  CheckCuda(cudaStreamEndCapture(stream, &graph));
  CheckCuda(cudaGraphInstantiate(&exec, graph, 0));
  const double seconds =
      MedianSeconds(stream, 21, [&](int) { CheckCuda(cudaGraphLaunch(exec, stream)); }) / sets;
  CheckCuda(cudaGraphExecDestroy(exec));
  CheckCuda(cudaGraphDestroy(graph));
  const double bytes = double(N) * s.D * (double(length) * s.Hkv * 4 + s.H * 4);
  std::printf("%-44s %9.1f us %9.1f MB %7.0f GB/s, share of copy %5.1f%%\n", name.c_str(),
              seconds * 1e6, bytes * 1e-6, bytes / seconds * 1e-9,
              100 * bytes / seconds / copy_rate);
  std::fflush(stdout);
}

void BenchPrefill(const Setup& s, int N, int T, cudaStream_t stream, const char* only,
                  const std::string& form) {
  std::string name = std::string("prefill ") + s.name;
  if (N > 1) name += " N " + std::to_string(N);
  name += " T " + std::to_string(T);
  if (name.find(only) == std::string::npos) return;
  const int pages = (T + kPage - 1) / kPage;
  const Pool pool(s, int64_t{N} * pages);
  std::vector<int32_t> row_start, page_start, pos(size_t(N), 0);
  for (int n = 0; n <= N; ++n) {
    row_start.push_back(n * T);
    page_start.push_back(n * pages);
  }
  const int64_t stride = int64_t{s.H + 2 * s.Hkv} * s.D;
  const DeviceBytes d_start(row_start), d_pos(pos), d_pages(page_start),
      qkv(RandomBf16(N * T * stride, 3)), out(int64_t{N} * T * s.H * s.D * 2),
      workspace(cuda::PrefillAttentionWorkspaceBytes(N, int64_t{N} * T, s.H, s.Hkv, s.D));
  cuda::PrefillAttentionArgs a;
  SetCommon(a, s, pool, qkv, out, workspace);
  a.q_stride = stride;
  a.rows = {N, d_start.as<int32_t>(), d_pos.as<int32_t>()};
  a.host_row_start = row_start.data();
  a.host_pos = pos.data();
  a.tables = {d_pages.as<int32_t>(), pool.table.as<int32_t>()};
  const double flops = 2.0 * N * T * (T + 1.0) * s.H * s.D;
  for (const std::string name_of_form : {"fa2", "fa3", "fa3rows"}) {
    if (!form.empty() && form != name_of_form) continue;
    if (name_of_form != "fa2" && !cuda::PrefillOnHopper()) continue;
    if (name_of_form == "fa3rows" && N > 1) continue;  // those are read from the pages
    a.form = name_of_form == "fa2" ? cuda::PrefillForm::kFa2 : cuda::PrefillForm::kHopper;
    a.k_stride = a.v_stride = stride;
    a.k = name_of_form == "fa3rows" ? qkv.as<bf16>() + int64_t{s.H} * s.D : nullptr;
    a.v = name_of_form == "fa3rows" ? qkv.as<bf16>() + int64_t{s.H + s.Hkv} * s.D : nullptr;
    CheckCuda(cuda::PrefillAttention(a, /*new_plan=*/true, stream));
    const double seconds = MedianSeconds(
        stream, 11, [&](int) { CheckCuda(cuda::PrefillAttention(a, /*new_plan=*/false, stream)); });
    std::printf("%-32s %-8s %9.3f ms %9.1f GFLOP %7.0f TFLOP/s\n", name.c_str(),
                name_of_form.c_str(), seconds * 1e3, flops * 1e-9, flops / seconds * 1e-12);
    std::fflush(stdout);
  }
}

int Main(int argc, char** argv) {
  const char *only = "", *form = "";
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--only") == 0) only = argv[i + 1];
    if (std::strcmp(argv[i], "--form") == 0) form = argv[i + 1];
  }
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::fprintf(stderr, "attention_gpu: no CUDA device here\n");
    return 1;
  }
  cudaDeviceProp device;
  CheckCuda(cudaGetDeviceProperties(&device, 0));
  cudaStream_t stream;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const double copy_rate = CopyBandwidth(stream);
  std::printf("%s: copy %.0f GB/s (read and written)\n", device.name, copy_rate * 1e-9);
  const Setup setups[] = {
      {"H32 Hkv32 D128", 32, 32, 128}, {"H32 Hkv8 D128", 32, 8, 128}, {"H9 Hkv3 D64", 9, 3, 64}};
  for (const Setup& s : setups)
    for (const int N : {1, 8, 32, 128})
      for (const int length : {1024, 8192, 32768})
        BenchDecode(s, N, length, stream, copy_rate, only);
  for (const Setup& s : setups)
    for (const int T : {256, 512, 1024, 2048, 4096, 8192, 32768})
      BenchPrefill(s, 1, T, stream, only, form);
  for (const Setup& s : setups)
    for (const int T : {128, 256, 512, 1024}) BenchPrefill(s, 8, T, stream, only, form);
  return 0;
}

}  // namespace
}  // namespace dsla

int main(int argc, char** argv) { return dsla::Main(argc, argv); }
