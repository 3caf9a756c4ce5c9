// Times the CUDA kernels of the dual-state operator: medians over CUDA events, beside a device copy
// of the same run, with the bytes and operations that a call must move and do and the share of the
// nearer limit that it reaches. Decode rotates over more than 200 MB of slots, so that no state is
// found in the L2 cache, and is replayed from a CUDA graph, as a server does.
//
//   dsla_gpu [--tflops 780] [--only "prefill H32"] [--wave 128] [--kernels]
//
// --tflops is the rate of a large bf16 matrix product on this card (bench/gpu/rivals.py measures
// it). --wave does only waves of so many chunks, not those that the operator chooses. --kernels
// also prints the time of each kernel, between events, so that none overlaps another, and of a
// prompt the sum of those that come after the features of keys and the gates are there.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gpu_timing.cuh"
#include "ops/dsla/cuda/prefill_trace.h"

namespace dsla {
namespace {

struct Machine {
  double bytes_per_second = 0, flops = 0;
  const char* only = "";  // lines whose name has this
  int wave = 0;           // 0: several
  bool kernels = false;
};

void Report(const char* what, double seconds, double bytes, double flops, const Machine& m) {
  const double by_bytes = bytes / m.bytes_per_second, by_flops = flops / m.flops;
  std::printf("%-46s %9.1f us %9.1f MB %8.2f GFLOP  limit %8.1f us (%s)  share %5.1f%%\n", what,
              seconds * 1e6, bytes * 1e-6, flops * 1e-9, std::max(by_bytes, by_flops) * 1e6,
              by_bytes > by_flops ? "memory" : "matrix",
              100 * std::max(by_bytes, by_flops) / seconds);
  std::fflush(stdout);
}

// The time of each kernel of a call, those of the same name together: medians over calls.
void ReportKernels(cudaStream_t stream, const std::function<void()>& run) {
  struct Mark {
    const char* kernel;
    cudaEvent_t event;
  };
  std::vector<Mark> marks;
  const auto mark = [](const char* kernel, cudaStream_t on, void* to) {
    cudaEvent_t event;
    CheckCuda(cudaEventCreate(&event));
    CheckCuda(cudaEventRecord(event, on));
    static_cast<std::vector<Mark>*>(to)->push_back({kernel, event});
  };
  std::vector<std::string> names;
  std::map<std::string, std::vector<float>> times;
  for (int repeat = 0; repeat < 7; ++repeat) {
    mark("", stream, &marks);
    cuda::SetLaunchTrace(mark, &marks);
    run();
    cuda::SetLaunchTrace(nullptr, nullptr);
    CheckCuda(cudaStreamSynchronize(stream));
    std::map<std::string, float> sums;
    for (size_t i = 1; i < marks.size(); ++i) {
      float ms = 0;
      CheckCuda(cudaEventElapsedTime(&ms, marks[i - 1].event, marks[i].event));
      sums[marks[i].kernel] += ms * 1e3f;
      if (std::find(names.begin(), names.end(), marks[i].kernel) == names.end())
        names.push_back(marks[i].kernel);
    }
    for (const auto& [name, us] : sums) times[name].push_back(us);
    for (const Mark& m : marks) CheckCuda(cudaEventDestroy(m.event));
    marks.clear();
  }
  std::printf("   ");
  float prepared = 0;
  for (const std::string& name : names) {
    std::vector<float>& t = times[name];
    std::sort(t.begin(), t.end());
    std::printf(" %s %.1f", name.c_str(), t[t.size() / 2]);
    if (name != "plan" && name != "prepare") prepared += t[t.size() / 2];
  }
  std::printf(" us");
  if (times.count("prepare") > 0) std::printf("; after prepare %.1f", prepared);
  std::printf("\n");
  std::fflush(stdout);
}

struct Setup {
  const char* name;
  int H, Hkv, D, F, window, sinks, states = 2;
};
DslaShape Shape(const Setup& c) {
  DslaShape s;
  s.H = c.H;
  s.Hkv = c.Hkv;
  s.D = c.D;
  s.F = c.F;
  s.states = c.states;
  s.window = c.window;
  s.sinks = c.sinks;
  s.gate_floor = -2.25f;
  return s;
}

// Slots of zeros with the layout of `shape`.
struct Pool {
  Pool(const DslaShape& shape, int slots)
      : bytes(MakeSlotLayout(shape).bytes), memory(bytes * slots) {
    CheckCuda(cudaMemset(memory.as<void>(), 0, static_cast<size_t>(memory.bytes())));
  }
  DslaStateView View() const { return {memory.as<std::byte>(), bytes}; }
  int64_t bytes;
  DeviceBytes memory;
};

// T rows of random values through one layer: the buffers and the arguments but for the rows.
struct Call {
  Call(const DslaShape& s, const GpuLayer& layer, const Pool& pool, int T, int64_t workspace_bytes)
      : q(RandomBf16(int64_t{T} * s.H * s.D, 1)),
        k(RandomBf16(int64_t{T} * s.Hkv * s.D, 2)),
        v(RandomBf16(int64_t{T} * s.Hkv * s.D, 3)),
        claim(std::vector<float>(static_cast<size_t>(int64_t{T} * s.H), 4.f)),
        out(int64_t{T} * s.H * s.D * 2),
        workspace(workspace_bytes) {
    args.shape = s;
    args.layout = MakeSlotLayout(s);
    args.weights = layer.weights();
    args.T = T;
    args.states = pool.View();
    args.q = q.as<void>();
    args.k = k.as<void>();
    args.v = v.as<void>();
    args.q_stride = s.H * s.D;
    args.k_stride = args.v_stride = s.Hkv * s.D;
    args.claim = s.window > 0 ? claim.as<float>() : nullptr;
    args.out = out.as<void>();
    args.workspace = workspace.as<void>();
    args.workspace_bytes = workspace.bytes();
  }
  const DeviceBytes q, k, v, claim, out, workspace;
  cuda::DslaCudaArgs args;
};

void BenchDecode(const Setup& setup, int N, cudaStream_t stream, const Machine& m) {
  const std::string name = std::string("decode ") + setup.name + " N " + std::to_string(N);
  if (name.find(m.only) == std::string::npos) return;
  const DslaShape s = Shape(setup);
  const GpuLayer layer(s, TestGates::kTrained, 8192, 1);
  const int64_t slot_bytes = MakeSlotLayout(s).bytes;
  const int sets = static_cast<int>((int64_t{400} << 20) / (slot_bytes * N)) + 2;
  const Pool pool(s, sets * N);
  std::vector<int32_t> slots, pos(static_cast<size_t>(N), 5000);
  std::mt19937 rng(3);
  for (int i = 0; i < sets * N; ++i) slots.push_back(i);
  std::shuffle(slots.begin(), slots.end(), rng);
  const DeviceBytes d_slots(slots), d_pos(pos);
  Call call(s, layer, pool, N, cuda::DecodeWorkspaceBytes(s, N));
  cuda::DslaCudaArgs& a = call.args;
  a.rows.N = N;
  a.rows.pos = d_pos.as<int32_t>();
  // One graph of all sets, so that launches cost what they cost in a captured step of many layers.
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < sets; ++i) {
    a.slots = d_slots.as<int32_t>() + i * N;
    CheckCuda(cuda::Decode(a, stream));
  }
  CheckCuda(cudaStreamEndCapture(stream, &graph));
  CheckCuda(cudaGraphInstantiate(&exec, graph, 0));
  const double seconds =
      MedianSeconds(stream, 21, [&](int) { CheckCuda(cudaGraphLaunch(exec, stream)); }) / sets;
  CheckCuda(cudaGraphExecDestroy(exec));
  CheckCuda(cudaGraphDestroy(graph));
  const double states = double(s.Hkv) * s.SF() * (s.D + 1) * 8,
               window = double(s.Hkv) * (s.window + s.sinks) * s.D * 4,
               rows = double(2 * s.H + 4 * s.Hkv) * s.D * 2,
               weights = double(s.Hkv * s.SF() + (s.H + s.Hkv) * s.D) * s.D * 2;
  const double flops =
      N * (double(s.Hkv) * (4.0 * s.D * s.SF() + 2.0 * s.D * s.D) +
           double(s.H) * (2.0 * s.D * s.D + 2.0 * s.D * s.SF() + 4.0 * s.D * (s.window + s.sinks)));
  Report(name.c_str(), seconds, N * (states + window + rows) + weights, flops, m);
}

// What is printed of waves of so many chunks, of which 0 leaves the choice to the operator.
std::string NameOfWave(int chunks) {
  return chunks > 0 ? " wave " + std::to_string(chunks) : std::string();
}

void BenchPrefill(const Setup& setup, int T, int wave, cudaStream_t stream, const Machine& m) {
  const int chunks = std::min(wave, cuda::MaxChunks(1, T));
  const std::string name =
      std::string("prefill ") + setup.name + " T " + std::to_string(T) + NameOfWave(chunks);
  if (name.find(m.only) == std::string::npos) return;
  const DslaShape s = Shape(setup);
  const GpuLayer layer(s, TestGates::kTrained, T, 1);
  const Pool pool(s, 1);
  const std::vector<int32_t> row_start{0, T}, pos{0}, slots{0};
  const DeviceBytes d_start(row_start), d_pos(pos), d_slots(slots);
  Call call(s, layer, pool, T, cuda::PrefillWorkspaceBytes(s, 1, T, chunks));
  cuda::DslaCudaArgs& a = call.args;
  a.rows = {1, d_start.as<int32_t>(), d_pos.as<int32_t>()};
  a.slots = d_slots.as<int32_t>();
  const double seconds =
      MedianSeconds(stream, 11, [&](int) { CheckCuda(cuda::Prefill(a, stream)); });
  const double bytes = double(T) * (2 * s.H + 2 * s.Hkv) * s.D * 2;
  const double flops =
      double(T) * (double(s.Hkv) * (4.0 * s.D * s.SF() + 2.0 * s.D * s.D) +
                   double(s.H) * (2.0 * s.D * s.D + 2.0 * s.D * s.SF() + 64.0 * (s.SF() + s.D) +
                                  4.0 * s.D * (s.window + s.sinks)));
  Report(name.c_str(), seconds, bytes, flops, m);
  if (m.kernels) ReportKernels(stream, [&] { CheckCuda(cuda::Prefill(a, stream)); });
}

void BenchFold(const Setup& setup, int T, int wave, cudaStream_t stream, const Machine& m) {
  const int chunks = std::min(wave, cuda::MaxChunks(1, T));
  const std::string name =
      std::string("fold ") + setup.name + " T " + std::to_string(T) + NameOfWave(chunks);
  if (name.find(m.only) == std::string::npos) return;
  const DslaShape s = Shape(setup);
  const GpuLayer layer(s, TestGates::kTrained, T, 1);
  const Pool pool(s, 1);
  const int page = 64, pages = (T + page - 1) / page;
  std::vector<int32_t> pos{T}, start{0, pages}, table, slots{0};
  for (int i = 0; i < pages; ++i) table.push_back(i);
  std::mt19937 rng(4);
  std::shuffle(table.begin(), table.end(), rng);
  const DeviceBytes d_pos(pos), d_start(start), d_table(table), d_slots(slots);
  const int64_t stride = int64_t{s.Hkv} * page * s.D;
  const DeviceBytes k(RandomBf16(stride * pages, 1)), v(RandomBf16(stride * pages, 2));
  const DeviceBytes workspace(cuda::FoldWorkspaceBytes(s, 1, T, chunks));
  cuda::DslaCudaFoldArgs a;
  a.shape = s;
  a.layout = MakeSlotLayout(s);
  a.weights = layer.weights();
  a.rows.N = 1;
  a.rows.pos = d_pos.as<int32_t>();
  a.T = T;
  a.tables = {d_start.as<int32_t>(), d_table.as<int32_t>()};
  a.kv = {k.as<void>(), v.as<void>(), stride, page, s.Hkv, s.D, DType::kBF16};
  a.slots = d_slots.as<int32_t>();
  a.states = pool.View();
  a.workspace = workspace.as<void>();
  a.workspace_bytes = workspace.bytes();
  const double seconds = MedianSeconds(stream, 11, [&](int) { CheckCuda(cuda::Fold(a, stream)); });
  const double bytes = double(T) * s.Hkv * s.D * 4;
  const double flops = double(T) * s.Hkv * (4.0 * s.D * s.SF() + 2.0 * s.D * s.D);
  Report(name.c_str(), seconds, bytes, flops, m);
  if (m.kernels) ReportKernels(stream, [&] { CheckCuda(cuda::Fold(a, stream)); });
}

int Main(int argc, char** argv) {
  Machine m;
  m.flops = 780e12;
  for (int i = 1; i < argc; ++i)
    if (std::strcmp(argv[i], "--kernels") == 0)
      m.kernels = true;
    else if (i + 1 == argc)
      break;
    else if (std::strcmp(argv[i], "--tflops") == 0)
      m.flops = std::atof(argv[++i]) * 1e12;
    else if (std::strcmp(argv[i], "--only") == 0)
      m.only = argv[++i];
    else if (std::strcmp(argv[i], "--wave") == 0)
      m.wave = std::atoi(argv[++i]);
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::fprintf(stderr, "dsla_gpu: no CUDA device here\n");
    return 1;
  }
  cudaDeviceProp device;
  CheckCuda(cudaGetDeviceProperties(&device, 0));
  cudaStream_t stream;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  m.bytes_per_second = CopyBandwidth(stream);
  std::printf("%s: copy %.0f GB/s (read and written), matrix limit %.0f TFLOP/s\n", device.name,
              m.bytes_per_second * 1e-9, m.flops * 1e-12);
  const Setup wide{"H32 D128 F128x2 W256", 32, 32, 128, 128, 256, 4};
  const Setup bare{"H32 D128 F128x2 W0", 32, 32, 128, 128, 0, 0};
  const Setup grouped{"H32 Hkv8 D128 F128x2 W256", 32, 8, 128, 128, 256, 4};
  const Setup small{"H9 Hkv3 D64 F128x2 W64", 9, 3, 64, 128, 64, 4};
  const Setup small_bare{"H9 Hkv3 D64 F128x2 W0", 9, 3, 64, 128, 0, 0};
  const Setup shipped{"H9 Hkv3 D64 F64x1 W320", 9, 3, 64, 64, 320, 4, 1};
  for (int N : {1, 8, 32, 64, 128, 256}) BenchDecode(shipped, N, stream, m);
  for (const Setup& s : {wide, bare, grouped, small})
    for (int N : {1, 8, 32, 128}) BenchDecode(s, N, stream, m);
  for (const Setup& s : {wide, bare, grouped, small, small_bare, shipped})
    for (int T : {2048, 3072, 4096, 8192, 65536})
      for (int wave : m.wave > 0 ? std::vector<int>{m.wave} : std::vector<int>{32, 0})
        BenchPrefill(s, T, wave, stream, m);
  for (const Setup& s : {wide, grouped, small, shipped})
    for (int T : {8192, 65536})
      for (int wave : m.wave > 0 ? std::vector<int>{m.wave} : std::vector<int>{16, 0})
        BenchFold(s, T, wave, stream, m);
  return 0;
}

}  // namespace
}  // namespace dsla

int main(int argc, char** argv) { return dsla::Main(argc, argv); }
