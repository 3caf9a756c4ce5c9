#include "model/cuda/gemm.h"

#include <algorithm>

#include "model/cuda/cublas_util.h"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"

namespace dsla::cuda {
namespace {

constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;  // what cuBLAS advises for Hopper

// The form of a weight that T rows are multiplied by.
struct Form {
  const void* data;
  int bits;
};
Form FormFor(const Matrix& weight, int64_t T) {
  if (weight.unpacked.bytes() > 0 && !PrefersPacked(T, weight.bits()))
    return {weight.unpacked.as(), 16};
  return {weight.data.as(), weight.bits()};
}

// Rows of which weights in fp8 are multiplied as they are; more are rounded to fp8, too.
bool IsFewRows(int64_t T) { return T <= kFewPackedRows; }

ProductArgs Product(const Matrix& weight, const void* x, int64_t x_stride, int64_t T, void* y,
                    int64_t y_stride) {
  const Form form = FormFor(weight, T);
  return {.weight = form.data,
          .bits = form.bits,
          .scale = weight.fp8() ? weight.scale.as<float>() : nullptr,
          .out = static_cast<int>(weight.out),
          .in = static_cast<int>(weight.in),
          .x = x,
          .x_stride = x_stride,
          .T = static_cast<int>(T),
          .y = y,
          .y_stride = y_stride};
}

}  // namespace

Gemm::Gemm(cudaStream_t stream)
    : stream_(stream), workspace_(kWorkspaceBytes), fp8_(stream, workspace_) {
  CheckCublas(cublasCreate(&handle_), "starting");
  CheckCublas(cublasSetStream(handle_, stream), "setting the stream");
  CheckCublas(cublasSetWorkspace(handle_, workspace_.as(), static_cast<size_t>(kWorkspaceBytes)),
              "setting the workspace");
}

Gemm::~Gemm() { cublasDestroy(handle_); }

void Gemm::Run(const Matrix& weight, const void* x, int64_t x_stride, int64_t T, void* y,
               int64_t y_stride, Out type, const int32_t* from) {
  if (weight.fp8() && !IsFewRows(T)) {
    DSLA_CHECK(from == nullptr);
    MultiplyRounded(weight, x, x_stride, T, y, y_stride, type);
    return;
  }
  const Form form = FormFor(weight, T);
  if (from != nullptr || PrefersSmallProduct(weight.out, weight.in, T, form.bits)) {
    ProductArgs args = Product(weight, x, x_stride, T, y, y_stride);
    args.y_f32 = type == Out::kF32;
    args.add = from != nullptr;
    args.first_row = from;
    Check(SmallProduct(args, stream_), "a small product");
    return;
  }
  if (form.bits == 16)
    Multiply(form.data, weight.out, weight.in, x, x_stride, T, y, y_stride, type);
  else
    MultiplyUnpacked(weight, x, x_stride, T, y, y_stride, type);
}

// Some features at a time.
void Gemm::MultiplyUnpacked(const Matrix& weight, const void* x, int64_t x_stride, int64_t T,
                            void* y, int64_t y_stride, Out type) {
  const int64_t most = kRoomBytes / (2 * weight.in) / kUnitFeatures * kUnitFeatures;
  const int64_t y_bytes = type == Out::kBf16 ? 2 : 4;
  DSLA_CHECK(most > 0 && room_.bytes() == kRoomBytes);
  for (int64_t begin = 0; begin < weight.out; begin += most) {
    const int64_t features = std::min(most, weight.out - begin);
    Check(UnpackWeight({.weight = weight.data.as(),
                        .bits = weight.bits(),
                        .out = static_cast<int>(weight.out),
                        .in = static_cast<int>(weight.in),
                        .begin = static_cast<int>(begin),
                        .rows = static_cast<int>(features),
                        .to = room_.as()},
                       stream_),
          "unpacking a weight");
    Multiply(room_.as(), features, weight.in, x, x_stride, T,
             static_cast<std::byte*>(y) + y_bytes * begin, y_stride, type);
  }
}

// Some rows at a time.
void Gemm::MultiplyRounded(const Matrix& weight, const void* x, int64_t x_stride, int64_t T,
                           void* y, int64_t y_stride, Out type) {
  const int64_t most = kRoomBytes / (weight.in + 4) / kMostRowsUnit * kMostRowsUnit;
  const int64_t y_bytes = type == Out::kBf16 ? 2 : 4;
  DSLA_CHECK(most > 0 && room_.bytes() == kRoomBytes);
  auto* const scale = room_.as<float>(most * weight.in);
  for (int64_t begin = 0; begin < T; begin += most) {
    const int64_t rows = std::min(most, T - begin);
    Check(RoundRows({.x = static_cast<const std::byte*>(x) + 2 * x_stride * begin,
                     .x_stride = x_stride,
                     .T = static_cast<int>(rows),
                     .in = static_cast<int>(weight.in),
                     .to = room_.as(),
                     .scale = scale},
                    stream_),
          "rounding rows");
    fp8_.Run({weight.data.as(), weight.scale.as<float>(), weight.out},
             {room_.as(), scale, Rows(rows)}, weight.in,
             static_cast<std::byte*>(y) + y_bytes * y_stride * begin, y_stride, type == Out::kF32);
  }
}

void Gemm::Multiply(const void* weight, int64_t out, int64_t in, const void* x, int64_t x_stride,
                    int64_t T, void* y, int64_t y_stride, Out type) {
  const float one = 1, zero = 0;
  // Column-major: y^T [out, T] = (W^T)^T [out, in] x^T [in, T].
  CheckCublas(
      cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(out),
                   static_cast<int>(Rows(T)), static_cast<int>(in), &one, weight, CUDA_R_16BF,
                   static_cast<int>(in), x, CUDA_R_16BF, static_cast<int>(x_stride), &zero, y,
                   type == Out::kBf16 ? CUDA_R_16BF : CUDA_R_32F, static_cast<int>(y_stride),
                   CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
      "a product");
}

void Gemm::RunJoint(const Matrix& weight, void* y, int64_t y_stride, const AdapterInArgs& adapter) {
  if (FormFor(weight, adapter.T).bits == 16 &&
      PrefersJointProduct(weight.out, weight.in, adapter.T)) {
    const ProductArgs args = Product(weight, adapter.x, adapter.x_stride, adapter.T, y, y_stride);
    Check(JointProduct(args, adapter, stream_), "a product and the adapter's first");
    return;
  }
  Run(weight, adapter.x, adapter.x_stride, adapter.T, y, y_stride);
  Check(AdapterIn(adapter, stream_), "the adapter's first product");
}

void Gemm::RunGated(const Matrix& gate_up, const void* x, int64_t T, void* room, void* y) {
  const int64_t ffn = gate_up.out / 2;
  const int bits = FormFor(gate_up, T).bits;
  const bool can = gate_up.fp8() ? IsFewRows(T) : bits == 16 || ffn % kUnitFeatures == 0;
  if (can && PrefersSmallProduct(gate_up.out, gate_up.in, T, bits)) {
    ProductArgs args = Product(gate_up, x, gate_up.in, T, y, ffn);
    args.gated = true;
    Check(SmallProduct(args, stream_), "a small product with its activation");
    return;
  }
  Run(gate_up, x, gate_up.in, T, room, gate_up.out);
  Check(SiluMul(room, static_cast<int>(T), static_cast<int>(ffn), y, stream_), "activation");
}

}  // namespace dsla::cuda
