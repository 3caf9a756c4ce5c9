// Times the elementwise CUDA kernels of a decoder layer and the choice of tokens: median time of a
// call within a CUDA graph of many, the bytes that it must move, and the share of the bandwidth of
// a device copy of the same run that it reaches. Calls rotate over up to 64 sets of buffers, more
// than the L2 cache holds where T is large; one row's buffers are found there, as in a real step,
// where the kernel before has just written them.
//
//   elementwise_gpu [--only "norm C4096"]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "gpu_timing.cuh"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"
#include "ops/sampling/cuda/sampling_cuda.h"

namespace dsla {
namespace {

// One buffer of each of `sets` sets, of the pattern 0x3c: 0.0115 in fp32 and in bf16.
class Sets {
 public:
  Sets(int sets, int64_t bytes) : bytes_((bytes + 255) / 256 * 256), memory_(sets * bytes_) {
    CheckCuda(cudaMemset(memory_.as<void>(), 0x3c, static_cast<size_t>(memory_.bytes())));
  }
  template <typename T>
  T* at(int set) const {
    return reinterpret_cast<T*>(memory_.as<std::byte>() + set * bytes_);
  }
  float* floats(int set) const { return at<float>(set); }
  void* operator[](int set) const { return at<std::byte>(set); }

 private:
  int64_t bytes_;
  DeviceBytes memory_;
};

struct Bench {
  cudaStream_t stream;
  double copy_bandwidth = 0;  // bytes read and written per second
  const char* only = "";

  bool Wanted(const std::string& name) const { return name.find(only) != std::string::npos; }

  // call(set) enqueues one call that moves `bytes` at least.
  void Time(const std::string& name, int sets, double bytes,
            const std::function<int(int)>& call) const {
    // Enough calls that the graph's own launch does not count.
    const int calls = (64 + sets - 1) / sets * sets;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) CheckCuda(call(i % sets));
    CheckCuda(cudaStreamEndCapture(stream, &graph));
    CheckCuda(cudaGraphInstantiate(&exec, graph, 0));
    const double seconds =
        MedianSeconds(stream, 11, [&](int) { CheckCuda(cudaGraphLaunch(exec, stream)); }) / calls;
    CheckCuda(cudaGraphExecDestroy(exec));
    CheckCuda(cudaGraphDestroy(graph));
    std::printf("%-36s %8.2f us %9.3f MB  share of copy %5.1f%%\n", name.c_str(), seconds * 1e6,
                bytes * 1e-6, 100 * bytes / copy_bandwidth / seconds);
    std::fflush(stdout);
  }
};

int SetsFor(double bytes) { return static_cast<int>(std::clamp(400e6 / bytes, 2., 64.)); }

struct Model {
  int C, ffn, H, Hkv, D, V;
};

DeviceBytes Ints(int n, const std::function<int(int)>& value) {
  std::vector<int32_t> x;
  for (int i = 0; i < n; ++i) x.push_back(value(i));
  return DeviceBytes(x);
}

void BenchEmbed(const Bench& b, const Model& m, int T, const std::string& size) {
  const double bytes = double(T) * m.C * 6;
  if (!b.Wanted("embed" + size)) return;
  const int sets = SetsFor(bytes);
  const Sets embedding(1, int64_t{m.V} * m.C * 2), hidden(sets, int64_t{T} * m.C * 4);
  const DeviceBytes tokens = Ints(T * sets, [&](int i) { return int(i * 7919LL % m.V); });
  b.Time("embed" + size, sets, bytes, [&](int i) {
    return cuda::EmbedRows({.tokens = tokens.as<int32_t>() + i * T,
                            .embedding = embedding[0],
                            .T = T,
                            .C = m.C,
                            .hidden = hidden.floats(i)},
                           b.stream);
  });
}

void BenchNorm(const Bench& b, const Model& m, int T, const std::string& size) {
  const double bytes = double(T) * m.C * 12 + m.C * 4;
  if (!b.Wanted("norm" + size)) return;
  const int sets = SetsFor(bytes);
  const Sets hidden(sets, int64_t{T} * m.C * 4), delta(sets, int64_t{T} * m.C * 2),
      normed(sets, int64_t{T} * m.C * 2), weight(1, int64_t{m.C} * 4);
  b.Time("norm" + size, sets, bytes, [&](int i) {
    cuda::AddRmsNormArgs args;
    args.hidden = hidden.floats(i);
    args.delta = delta[i];
    args.weight = weight.floats(0);
    args.eps = 1e-5f;
    args.T = T;
    args.C = m.C;
    args.normed = normed[i];
    return cuda::AddRmsNorm(args, b.stream);
  });
}

void BenchSilu(const Bench& b, const Model& m, int T, const std::string& size) {
  const double bytes = double(T) * m.ffn * 6;
  if (!b.Wanted("silu" + size)) return;
  const int sets = SetsFor(bytes);
  const Sets gate_up(sets, int64_t{T} * m.ffn * 4), out(sets, int64_t{T} * m.ffn * 2);
  b.Time("silu" + size, sets, bytes,
         [&](int i) { return cuda::SiluMul(gate_up[i], T, m.ffn, out[i], b.stream); });
}

constexpr int kPage = 64, kPositions = 4096;

// One sequence's prompt of T rows, or, with `decode`, T sequences of one row each. All rows go to
// pages, whose writes count; V is read and not written back.
void BenchRope(const Bench& b, const Model& m, int T, bool decode, bool norm,
               const std::string& size) {
  const std::string name =
      std::string(decode ? "rope decode" : "rope prefill") + (norm ? " norm" : "") + size;
  const int heads = m.H + 2 * m.Hkv;
  const double bytes = double(T) * m.D * (2 * heads + 2 * (m.H + m.Hkv) + 4 * m.Hkv) +
                       double(decode ? 1 : T) * m.D * 4;
  if (!b.Wanted(name)) return;
  const int sets = SetsFor(bytes), N = decode ? T : 1, pages_each = kPositions / kPage;
  // In decode each sequence writes to one page; the others of its table are the same one.
  const int pages = decode ? N : pages_each;
  const int64_t page_elements = int64_t{m.Hkv} * kPage * m.D;
  const Sets qkv(sets, int64_t{T} * heads * m.D * 2), k(sets, pages * page_elements * 2),
      v(sets, pages * page_elements * 2), angles(1, int64_t{kPositions} * m.D * 2),
      weight(1, int64_t{m.D} * 4);
  const DeviceBytes positions = Ints(T, [&](int t) { return decode ? 1000 : t; }),
                    sequence = Ints(T, [&](int t) { return decode ? t : 0; }),
                    start = Ints(N + 1, [&](int n) { return n * pages_each; }),
                    table = Ints(N * pages_each,
                                 [&](int i) { return decode ? i / pages_each : i * 37 % 64; }),
                    softmax_rows = Ints(1, [&](int) { return T; });
  b.Time(name, sets, bytes, [&](int i) {
    cuda::RopeKvArgs args;
    args.qkv = qkv[i];
    if (norm) args.q_norm = args.k_norm = weight.floats(0);
    args.eps = 1e-6f;
    args.rope_cos = args.rope_sin = angles.floats(0);
    args.positions = positions.as<int32_t>();
    args.T = T;
    args.H = m.H;
    args.Hkv = m.Hkv;
    args.D = m.D;
    args.softmax_rows = softmax_rows.as<int32_t>();
    args.sequence = sequence.as<int32_t>();
    args.tables = {start.as<int32_t>(), table.as<int32_t>()};
    args.kv = {k[i], v[i], page_elements, kPage, m.Hkv, m.D, DType::kBF16};
    return cuda::RopeKv(args, b.stream);
  });
}

// Random logits, as a step makes them: `spread` is their deviation. seen: tokens in the prompt of a
// request that penalises repetition; top: how many of the likeliest it asks for. Rows with edits
// are edited anew each time, where they lie, which costs no other time.
void BenchChoose(const Bench& b, const Model& m, int T, const std::string& what, float spread,
                 const SamplingParams& params, int seen = 0, int top = 0) {
  const std::string name = "choose " + what + " V" + std::to_string(m.V) + " T" + std::to_string(T);
  const double bytes = double(T) * m.V * 4;
  if (!b.Wanted(name)) return;
  const int sets = SetsFor(bytes);
  const Sets logits(sets, int64_t{T} * m.V * 4),
      choices(sets, int64_t{T} * static_cast<int64_t>(sizeof(cuda::RowChoice))),
      likeliest(sets, int64_t{T} * cuda::kMostTop * static_cast<int64_t>(sizeof(TokenLogprob)));
  std::vector<float> values(static_cast<size_t>(T) * m.V);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> pool(1 << 16);
  for (float& value : pool) value = normal(random);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = pool[(i * 40503 + i / 65536) % pool.size()];
  for (int set = 0; set < sets; ++set)
    CheckCuda(cudaMemcpy(logits[set], values.data(), values.size() * 4, cudaMemcpyHostToDevice));
  std::vector<cuda::RowSampling> rows;
  std::vector<LogitEdit> edits(static_cast<size_t>(T) * static_cast<size_t>(seen) + 1);
  for (int t = 0; t < T; ++t) {
    rows.push_back(cuda::RowSamplingOf(params, t));
    rows.back().first_edit = t * seen;
    rows.back().edits = seen;
    rows.back().top = top;
    for (int i = 0; i < seen; ++i)  // in no order
      edits[static_cast<size_t>(t * seen + i)] = {
          .token = static_cast<int32_t>((int64_t{i} * 40503 + t) % m.V), .outputs = i % 3};
  }
  const DeviceBytes sampling(rows), sent(edits), workspace(cuda::ChooseWorkspaceBytes(T, m.V));
  b.Time(name, sets, bytes, [&](int i) {
    return cuda::Choose({.logits = logits.floats(i),
                         .T = T,
                         .V = m.V,
                         .rows = sampling.as<cuda::RowSampling>(),
                         .edits = sent.as<LogitEdit>(),
                         .choices = choices.at<cuda::RowChoice>(i),
                         .top = likeliest.at<TokenLogprob>(i),
                         .workspace = workspace.as<void>(),
                         .workspace_bytes = workspace.bytes()},
                        b.stream);
  });
}

int Main(int argc, char** argv) {
  Bench b;
  for (int i = 1; i + 1 < argc; ++i)
    if (std::strcmp(argv[i], "--only") == 0) b.only = argv[i + 1];
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::fprintf(stderr, "elementwise_gpu: no CUDA device here\n");
    return 1;
  }
  cudaDeviceProp device;
  CheckCuda(cudaGetDeviceProperties(&device, 0));
  CheckCuda(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking));
  b.copy_bandwidth = CopyBandwidth(b.stream);
  std::printf("%s: copy %.0f GB/s (read and written)\n", device.name, b.copy_bandwidth * 1e-9);
  const Model wide{4096, 11008, 32, 32, 128, 128256}, small{576, 1536, 9, 3, 64, 49152};
  for (const Model& m : {wide, small})
    for (const int T : {1, 32, 256, 4096}) {
      const auto size = [&](const char* what, int n) {
        return std::string(" ") + what + std::to_string(n) + " T" + std::to_string(T);
      };
      BenchEmbed(b, m, T, size("C", m.C));
      BenchNorm(b, m, T, size("C", m.C));
      BenchSilu(b, m, T, size("ffn", m.ffn));
      if (T <= 256) BenchRope(b, m, T, true, false, size("H", m.H));
      if (T >= 256) BenchRope(b, m, T, false, false, size("H", m.H));
      BenchRope(b, m, T, T <= 256, true, size("H", m.H));
      if (T > 256) continue;
      // Of a spread of 3 some hundred tokens have the most of the mass, of 1 thousands.
      BenchChoose(b, m, T, "greedy", 3, {.temperature = 0});
      BenchChoose(b, m, T, "temperature", 3, {});
      BenchChoose(b, m, T, "top-k", 3, {.top_k = 50});
      BenchChoose(b, m, T, "top-p", 3, {.top_p = 0.9f});
      BenchChoose(b, m, T, "top-p flat", 1, {.top_p = 0.9f});
      BenchChoose(b, m, T, "top-k top-p", 3, {.top_k = 50, .top_p = 0.9f});
      BenchChoose(b, m, T, "min-p", 3, {.min_p = 0.05f});
      const SamplingParams penalty{.temperature = 0, .repetition_penalty = 1.001f};
      BenchChoose(b, m, T, "greedy 500 edits", 3, penalty, 500);
      BenchChoose(b, m, T, "greedy 8000 edits", 3, penalty, 8000);
      BenchChoose(b, m, T, "greedy top 20", 3, {.temperature = 0}, 0, 20);
      BenchChoose(b, m, T, "top-p 500 edits top 5", 3,
                  {.top_p = 0.9f, .repetition_penalty = 1.001f}, 500, 5);
    }
  CheckCuda(cudaStreamDestroy(b.stream));
  return 0;
}

}  // namespace
}  // namespace dsla

int main(int argc, char** argv) { return dsla::Main(argc, argv); }
