// Times the products of a decode step, SmallProduct beside cuBLAS: of each shape and number of
// rows, the median time of a call within a CUDA graph of many, and the share of the bandwidth of a
// device copy of the same run that it reaches; the same of weights of 8 and 4 bits, beside
// unpacking them for cuBLAS; of a product with an adapter's first one, JointProduct beside
// AdapterIn after the better of those two; and of a layer's four products one after the other,
// without and with the elementwise steps between them (of which SmallProduct does the activation
// itself). Calls rotate over weights of more than 400 MB in all, so that they come from memory, not
// from the L2 cache.
//
//   linear_gpu [--only "small qkv"] [--rows 8]
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "gpu_timing.cuh"
#include "ops/linear/cuda/linear_cuda.h"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"

namespace dsla {
namespace {

constexpr int64_t kPoolBytes = int64_t{3} << 29;  // 1.6 GB

void CheckBlas(cublasStatus_t status) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "cuBLAS: %s\n", cublasGetStatusString(status));
  std::abort();
}

class Bench {
 public:
  Bench() : pool_(kPoolBytes), x_(kArrayBytes), y_(kArrayBytes), workspace_(kWorkspaceBytes) {
    CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CheckBlas(cublasCreate(&blas_));
    CheckBlas(cublasSetStream(blas_, stream));
    CheckBlas(cublasSetWorkspace(blas_, workspace_.as<void>(), size_t{kWorkspaceBytes}));
    const std::vector<bf16> values = RandomBf16(1 << 24, 1);
    const size_t bytes = values.size() * 2;
    for (const DeviceBytes* const to : {&pool_, &x_, &y_})
      for (int64_t at = 0; at < to->bytes(); at += int64_t(bytes))
        CheckCuda(cudaMemcpy(to->as<char>() + at, values.data(), bytes, cudaMemcpyHostToDevice));
    copy_bandwidth = CopyBandwidth(stream);
  }
  ~Bench() {
    cublasDestroy(blas_);
    cudaStreamDestroy(stream);
  }

  bool Wanted(const std::string& name) const { return name.find(only) != std::string::npos; }

  // Seconds of one of the calls(i), i < count, of a graph of all.
  double Time(int count, const std::function<void(int)>& call) const {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < count; ++i) call(i);
    CheckCuda(cudaStreamEndCapture(stream, &graph));
    CheckCuda(cudaGraphInstantiate(&exec, graph, 0));
    const double seconds =
        MedianSeconds(stream, 7, [&](int) { CheckCuda(cudaGraphLaunch(exec, stream)); });
    CheckCuda(cudaGraphExecDestroy(exec));
    CheckCuda(cudaGraphDestroy(graph));
    return seconds / count;
  }

  void* x() const { return x_.as<void>(); }
  void* y() const { return y_.as<void>(); }
  const int32_t* zero() const { return zero_.as<int32_t>(); }
  const std::byte* weights() const { return pool_.as<std::byte>(); }

  void Small(const void* weight, int out, int in, const void* x, int64_t x_stride, int T, void* y,
             bool f32 = false, bool gated = false, int bits = 16) const {
    CheckCuda(cuda::SmallProduct({.weight = weight,
                                  .bits = bits,
                                  .out = out,
                                  .in = in,
                                  .x = x,
                                  .x_stride = x_stride,
                                  .T = T,
                                  .y = y,
                                  .y_stride = gated ? out / 2 : out,
                                  .y_f32 = f32,
                                  .gated = gated},
                                 stream));
  }
  void Blas(const void* weight, int out, int in, const void* x, int64_t x_stride, int T, void* y,
            bool f32 = false, int64_t y_stride = 0) const {
    const float one = 1, zero = 0;
    CheckBlas(cublasGemmEx(
        blas_, CUBLAS_OP_T, CUBLAS_OP_N, out, T, in, &one, weight, CUDA_R_16BF, in, x, CUDA_R_16BF,
        static_cast<int>(x_stride), &zero, y, f32 ? CUDA_R_32F : CUDA_R_16BF,
        static_cast<int>(y_stride == 0 ? out : y_stride), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }
  // By cuBLAS, of some features in bf16 at a time.
  void Unpacked(const void* weight, int bits, int out, int in, const void* x, int T, void* y,
                bool f32) const {
    const int most = static_cast<int>(kUnpackedBytes / (2 * in) / 16 * 16);
    for (int begin = 0; begin < out; begin += most) {
      const int rows = std::min(most, out - begin);
      CheckCuda(cuda::UnpackWeight({.weight = weight,
                                    .bits = bits,
                                    .out = out,
                                    .in = in,
                                    .begin = begin,
                                    .rows = rows,
                                    .to = unpacked_.as<void>()},
                                   stream));
      Blas(unpacked_.as<void>(), rows, in, x, in, T,
           static_cast<std::byte*>(y) + int64_t{f32 ? 4 : 2} * begin, f32, out);
    }
  }

  cudaStream_t stream;
  double copy_bandwidth = 0;  // bytes read and written per second
  const char* only = "";
  int rows = 0;  // 0: all

 private:
  static constexpr int64_t kArrayBytes = 1 << 27, kWorkspaceBytes = 1 << 25;
  static constexpr int64_t kUnpackedBytes = 1 << 26;  // as src/model/cuda/gemm.cc has it
  cublasHandle_t blas_ = nullptr;
  DeviceBytes pool_, x_, y_, workspace_, unpacked_{kUnpackedBytes}, zero_{std::vector<int32_t>{0}};
};

struct Shape {
  const char* name;
  int out, in;
  bool f32 = false;
};
// A product beside an adapter's first: [out, in] and [r + H, in].
struct Joint {
  const char* name;
  int out, in, r, H;
};
struct Model {
  const char* name;
  int C, ffn, qkv;
  std::vector<Shape> shapes;
  std::vector<Joint> joint;
};

void TimeShape(const Bench& b, const Model& model, const Shape& s, int T) {
  const std::string name = std::string(model.name) + " " + s.name;
  if (!b.Wanted(name)) return;
  const int64_t weight = int64_t{2} * s.out * s.in;
  const double bytes = double(weight) + T * (2. * s.in + (s.f32 ? 4. : 2.) * s.out);
  const int64_t wanted = std::clamp(int64_t{400000000}, 10 * weight, 4000 * weight);
  const int count = static_cast<int>(std::min(kPoolBytes, wanted) / weight);
  const auto at = [&](int i) { return b.weights() + i * weight; };
  const double small =
      b.Time(count, [&](int i) { b.Small(at(i), s.out, s.in, b.x(), s.in, T, b.y(), s.f32); });
  const double blas =
      b.Time(count, [&](int i) { b.Blas(at(i), s.out, s.in, b.x(), s.in, T, b.y(), s.f32); });
  const auto share = [&](double seconds) { return 100 * bytes / seconds / b.copy_bandwidth; };
  std::printf("%-15s [%5d,%6d] T %3d %9.2f us %5.1f%%  cuBLAS %9.2f us %5.1f%%%s\n", name.c_str(),
              s.out, s.in, T, small * 1e6, share(small), blas * 1e6, share(blas),
              cuda::PrefersSmallProduct(s.out, s.in, T) ? "" : ", taken");
  std::fflush(stdout);
}

void TimePacked(const Bench& b, const Model& model, const Shape& s, int T, int bits) {
  const std::string name = std::string(model.name) + " " + s.name;
  if (!b.Wanted(name)) return;
  const int64_t weight = PackedShape{.out = s.out, .in = s.in, .bits = bits}.bytes();
  const double bytes = double(weight) + T * (2. * s.in + (s.f32 ? 4. : 2.) * s.out);
  const int64_t wanted = std::clamp(int64_t{400000000}, 10 * weight, 4000 * weight);
  const int count = static_cast<int>(std::min(kPoolBytes, wanted) / weight);
  const auto at = [&](int i) { return b.weights() + i * weight; };
  const double small = b.Time(count, [&](int i) {
    b.Small(at(i), s.out, s.in, b.x(), s.in, T, b.y(), s.f32, false, bits);
  });
  const double unpacked =
      b.Time(count, [&](int i) { b.Unpacked(at(i), bits, s.out, s.in, b.x(), T, b.y(), s.f32); });
  std::printf("%-15s [%5d,%6d] T %3d %9.2f us %5.1f%%, %d bits, unpacked %9.2f us%s\n",
              name.c_str(), s.out, s.in, T, small * 1e6, 100 * bytes / small / b.copy_bandwidth,
              bits, unpacked * 1e6,
              cuda::PrefersSmallProduct(s.out, s.in, T, bits) ? "" : ", taken");
  std::fflush(stdout);
}

void TimeJoint(const Bench& b, const Model& model, const Joint& s, int T) {
  const std::string name = std::string(model.name) + " " + s.name;
  if (!b.Wanted(name)) return;
  const int64_t main = int64_t{2} * s.out * s.in, bytes = main + int64_t{2} * (s.r + s.H) * s.in;
  const int count =
      static_cast<int>(std::min(kPoolBytes, std::max(4 * bytes, int64_t{400000000})) / bytes);
  constexpr int64_t kPart = 1 << 24;
  auto* const y = static_cast<std::byte*>(b.y());
  const auto main_args = [&](int i) -> cuda::ProductArgs {
    return {.weight = b.weights() + i * bytes,
            .out = s.out,
            .in = s.in,
            .x = b.x(),
            .x_stride = s.in,
            .T = T,
            .y = y,
            .y_stride = s.out};
  };
  const auto adapter = [&](int i) -> cuda::AdapterInArgs {
    return {.weight = b.weights() + i * bytes + main,
            .in = s.in,
            .r = s.r,
            .H = s.H,
            .x = b.x(),
            .x_stride = s.in,
            .T = T,
            .first_row = b.zero(),
            .low_rank = y + 2 * kPart,
            .claim = reinterpret_cast<float*>(y + 3 * kPart),
            .claim_bias = reinterpret_cast<const float*>(b.weights())};
  };
  const double joint = b.Time(
      count, [&](int i) { CheckCuda(cuda::JointProduct(main_args(i), adapter(i), b.stream)); });
  const double small = b.Time(count, [&](int i) {
    CheckCuda(cuda::SmallProduct(main_args(i), b.stream));
    CheckCuda(cuda::AdapterIn(adapter(i), b.stream));
  });
  const double blas = b.Time(count, [&](int i) {
    b.Blas(main_args(i).weight, s.out, s.in, b.x(), s.in, T, y);
    CheckCuda(cuda::AdapterIn(adapter(i), b.stream));
  });
  std::printf("%-15s [%5d,%6d] + %3d T %3d %9.2f us, apart %9.2f us, cuBLAS %9.2f us%s\n",
              name.c_str(), s.out, s.in, s.r + s.H, T, joint * 1e6, small * 1e6, blas * 1e6,
              cuda::PrefersJointProduct(s.out, s.in, T) ? "" : ", taken");
  std::fflush(stdout);
}

// A layer's products, each of what the one before it gave.
void TimeLayer(const Bench& b, const Model& m, int T) {
  const std::string name = std::string(m.name) + " layer";
  if (!b.Wanted(name)) return;
  const int64_t C = m.C, ffn = m.ffn, qkv = m.qkv;
  const int64_t bytes = 2 * C * (qkv + C + 3 * ffn);
  const int count = static_cast<int>(std::max(int64_t{400000000} / bytes, int64_t{3}));
  // Places in the arrays x and y: rows of all activations, and the residual stream.
  const auto place = [](void* base, int64_t at) { return static_cast<std::byte*>(base) + at; };
  constexpr int64_t kPart = 1 << 24;
  void *const normed = place(b.x(), 0), *const delta = place(b.x(), kPart),
              *const attention = place(b.x(), 2 * kPart), *const gate_up = place(b.x(), 3 * kPart),
              *const activation = place(b.x(), 5 * kPart);
  auto* const hidden = reinterpret_cast<float*>(place(b.y(), 0));
  const auto* const norm_weight = reinterpret_cast<const float*>(place(b.y(), kPart));

  enum class Products { kSmall, kBlas };
  const auto layer = [&](int i, Products how, bool steps) {
    const std::byte* at = b.weights() + i * bytes;
    const auto product = [&](int64_t out, int64_t in, const void* x, int64_t stride, void* y,
                             bool gated = false) {
      const int o = static_cast<int>(out), n = static_cast<int>(in);
      if (how == Products::kBlas)
        b.Blas(at, o, n, x, stride, T, y);
      else
        b.Small(at, o, n, x, stride, T, y, false, gated);
      at += 2 * out * in;
    };
    const auto norm = [&] {
      if (steps)
        CheckCuda(cuda::AddRmsNorm({.hidden = hidden,
                                    .delta = delta,
                                    .weight = norm_weight,
                                    .eps = 1e-5f,
                                    .T = T,
                                    .C = m.C,
                                    .normed = normed},
                                   b.stream));
    };
    norm();
    product(qkv, C, steps ? normed : delta, C, attention);
    product(C, C, attention, qkv, delta);
    norm();
    const bool gated = steps && how == Products::kSmall;
    product(2 * ffn, C, steps ? normed : delta, C, gated ? activation : gate_up, gated);
    if (steps && !gated) CheckCuda(cuda::SiluMul(gate_up, T, m.ffn, activation, b.stream));
    product(C, ffn, steps ? activation : gate_up, steps ? ffn : 2 * ffn, delta);
  };
  for (const bool steps : {false, true}) {
    const auto time = [&](Products how) {
      return b.Time(count, [&](int i) { layer(i, how, steps); });
    };
    const double small = time(Products::kSmall), blas = time(Products::kBlas);
    const auto share = [&](double seconds) {
      return 100 * double(bytes) / seconds / b.copy_bandwidth;
    };
    std::printf("%-15s %-16s T %3d %9.2f us %5.1f%%  cuBLAS %9.2f us %5.1f%%\n", name.c_str(),
                steps ? "norms and silu" : "products alone", T, small * 1e6, share(small),
                blas * 1e6, share(blas));
    std::fflush(stdout);
  }
}

int Main(int argc, char** argv) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::fprintf(stderr, "linear_gpu: no CUDA device here\n");
    return 1;
  }
  Bench b;
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], "--only") == 0) b.only = argv[i + 1];
    if (std::strcmp(argv[i], "--rows") == 0) b.rows = std::atoi(argv[i + 1]);
  }
  cudaDeviceProp device;
  CheckCuda(cudaGetDeviceProperties(&device, 0));
  std::printf("%s: copy %.0f GB/s (read and written)\n", device.name, b.copy_bandwidth * 1e-9);
  const Model models[] = {{"large",
                           4096,
                           11008,
                           12288,
                           {{"qkv", 12288, 4096},
                            {"o", 4096, 4096},
                            {"gate_up", 22016, 4096},
                            {"down", 4096, 11008},
                            {"head", 32000, 4096, true},
                            {"adapter_in", 96, 4096, true},
                            {"adapter_out", 4096, 64}},
                           {{"joint_qkv", 12288, 4096, 64, 32}, {"joint_o", 4096, 4096, 64, 0}}},
                          {"medium",
                           1024,
                           3072,
                           4096,
                           {{"qkv", 4096, 1024},
                            {"o", 1024, 2048},
                            {"gate_up", 6144, 1024},
                            {"down", 1024, 3072},
                            {"adapter_in", 80, 1024, true},
                            {"adapter_out", 2048, 64}},
                           {{"joint_qkv", 4096, 1024, 64, 16}}},
                          {"small",
                           576,
                           1536,
                           960,
                           {{"qkv", 960, 576},
                            {"o", 576, 576},
                            {"gate_up", 3072, 576},
                            {"down", 576, 1536},
                            {"head", 49152, 576, true},
                            {"adapter_in", 57, 576, true},
                            {"adapter_out", 576, 48}},
                           {{"joint_qkv", 960, 576, 48, 9}, {"joint_o", 576, 576, 48, 0}}}};
  for (const Model& m : models)
    for (const int T : {1, 4, 8, 16, 32, 64, 128, 256}) {
      if (b.rows != 0 && b.rows != T) continue;
      for (const Shape& s : m.shapes) {
        TimeShape(b, m, s, T);
        if (std::strncmp(s.name, "adapter", 7) == 0) continue;  // in bf16 always
        for (const int bits : {8, 4}) TimePacked(b, m, s, T, bits);
      }
      for (const Joint& s : m.joint) TimeJoint(b, m, s, T);
      TimeLayer(b, m, T);
    }
  return 0;
}

}  // namespace
}  // namespace dsla

int main(int argc, char** argv) { return dsla::Main(argc, argv); }
