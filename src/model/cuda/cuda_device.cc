// The device that the program opens: OpenDevice (model/device.h) finds DslaOpenCudaDevice here.
#include <algorithm>
#include <vector>

#include "model/cuda/cuda_memory.h"
#include "model/cuda/cuda_model.h"
#include "ops/linear/cuda/linear_cuda.h"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"
#include "ops/sampling/cuda/sampling_cuda.h"

namespace dsla::cuda {
namespace {

constexpr int kLeastMajor = 8;  // compute capability
// Packed weights are also held in bf16, for steps of many rows, where the two take this part of the
// free memory at most.
constexpr int64_t kBothShare = 4;

class CudaDevice : public Device {
 public:
  CudaDevice(int index, const cudaDeviceProp& property, const DriverApi& driver,
             cudaStream_t stream)
      : index_(index),
        name_(fmt::format("cuda:{} ({})", index, property.name)),
        has_fp8_(property.major == 9 && property.minor == 0),
        stream_(stream),
        memory_(driver, index, stream),
        gemm_(std::make_shared<Gemm>(stream)) {}

  const std::string& name() const override { return name_; }
  BlockMemory& memory() override { return memory_; }
  int64_t free_bytes() const override {
    cudaSetDevice(index_);
    size_t free = 0, total = 0;
    Check(cudaMemGetInfo(&free, &total), "asking for free memory");
    return static_cast<int64_t>(free);
  }
  void Synchronize() override {
    cudaSetDevice(index_);
    Check(cudaStreamSynchronize(stream_), "waiting for the device");
  }

  DeviceLimits Measure() override {
    cudaSetDevice(index_);
    constexpr int64_t kBytes = int64_t{1} << 30, kSize = 8192;
    DeviceLimits limits;
    {
      const DeviceBuffer from(kBytes), to(kBytes);
      limits.copy_bytes_per_second =
          2.0 * kBytes / Fastest([&] {
            Check(cudaMemcpyAsync(to.as(), from.as(), kBytes, cudaMemcpyDeviceToDevice, stream_),
                  "copying");
          });
    }
    // Zeros would draw less power, and run faster, than numbers do.
    std::vector<uint16_t> numbers(kSize * kSize);
    for (size_t i = 0; i < numbers.size(); ++i)
      numbers[i] = static_cast<uint16_t>(0x3c00 + i * 2654435761u % 0x300);
    Matrix weight;
    weight.out = weight.in = kSize;
    weight.data.Grow(weight.bytes());
    const DeviceBuffer x(weight.bytes()), y(weight.bytes());
    for (const DeviceBuffer* const of : {static_cast<const DeviceBuffer*>(&weight.data), &x}) {
      Check(cudaMemcpy(of->as(), numbers.data(), static_cast<size_t>(weight.bytes()),
                       cudaMemcpyHostToDevice),
            "copying");
    }
    limits.gemm_flops = 2.0 * kSize * kSize * kSize /
                        Fastest([&] { gemm_->Run(weight, x.as(), kSize, kSize, y.as(), kSize); });
    return limits;
  }

  // Of a small model the launches decide, and adapters are merged into bf16 alone.
  bool Prefers(const ModelConfig& c, WeightFormat format) const override {
    const int64_t qkv = int64_t{2} * (c.H + 2 * c.Hkv) * c.D * c.C;
    return IsPacked(format) && qkv > kMostMergedBytes && HasRoomForBoth(c, format);
  }

  Expected<std::unique_ptr<DeviceModel>> Load(const DeviceModelSpec& spec, const TensorReader& read,
                                              const ParallelRunner& parallel) override {
    const ModelConfig& c = spec.config;
    if (c.D != 64 && c.D != 128) return Unsupported("{}: head dim {}: have 64 and 128", name_, c.D);
    if (c.C % 8 != 0 || c.ffn % 8 != 0) {
      return Unsupported("{}: model width {} and MLP width {}: have multiples of 8", name_, c.C,
                         c.ffn);
    }
    if (c.C > kMaxNormWidth || c.V >= kMaxVocabulary) {
      return Unsupported("{}: model width {} and vocabulary {}: have up to {} and below {}", name_,
                         c.C, c.V, kMaxNormWidth, kMaxVocabulary);
    }
    const bool fp8 = spec.weights == WeightFormat::kFp8;
    if (fp8) DSLA_RETURN_IF_ERROR(CheckFp8(c));
    cudaSetDevice(index_);
    if (spec.adapter != nullptr) DSLA_RETURN_IF_ERROR(CheckAdapter(spec));
    const bool both =
        IsPacked(spec.weights) && spec.also_unpacked && HasRoomForBoth(c, spec.weights);
    const bool room = fp8 || (IsPacked(spec.weights) && !both);
    const int64_t bytes = WeightBytes(c, spec.weights) + (room ? Gemm::kRoomBytes : 0);
    if (bytes > free_bytes()) {
      return ResourceExhausted("{}: the weights take {} bytes in {}, and {} are free", name_, bytes,
                               Name(spec.weights), free_bytes());
    }
    try {
      if (room) gemm_->MakeRoom();
      DSLA_ASSIGN_OR_RETURN(auto weights, UploadWeights(index_, spec, both, read, parallel));
      auto adapter = UploadAdapter(spec, *weights, stream_);
      return std::unique_ptr<DeviceModel>(
          new CudaModel(index_, stream_, gemm_, spec, std::move(weights), std::move(adapter)));
    } catch (const std::bad_alloc&) {
      return ResourceExhausted("{}: out of memory while the model was copied to it", name_);
    } catch (const DeviceError& error) {
      return Error(StatusCode::kInternal, "{}", error.what());
    }
  }

 private:
  Status CheckFp8(const ModelConfig& c) const {
    if (!has_fp8_) return Unsupported("{}: weights in fp8 take compute capability 9.0", name_);
    if (c.C % kRoundedInputs != 0 || c.ffn % kRoundedInputs != 0 ||
        c.H * c.D % kRoundedInputs != 0) {
      return Unsupported(
          "{}: weights in fp8, model width {}, {} heads of {} and MLP width {}: have multiples of "
          "{}",
          name_, c.C, c.H, c.D, c.ffn, kRoundedInputs);
    }
    return Status::Ok();
  }
  bool HasRoomForBoth(const ModelConfig& config, WeightFormat format) const {
    const int64_t both = WeightBytes(config, format) + WeightBytes(config, WeightFormat::kBF16);
    return kBothShare * both <= free_bytes();
  }
  // Seconds of the fastest of a few runs.
  template <typename F>
  double Fastest(F&& run) {
    cudaEvent_t begin = nullptr, end = nullptr;
    Check(cudaEventCreate(&begin), "creating an event");
    Check(cudaEventCreate(&end), "creating an event");
    float best = 0;
    for (int pass = 0; pass < 6; ++pass) {
      Check(cudaEventRecord(begin, stream_), "timing");
      run();
      Check(cudaEventRecord(end, stream_), "timing");
      Check(cudaEventSynchronize(end), "timing");
      float milliseconds = 0;
      Check(cudaEventElapsedTime(&milliseconds, begin, end), "timing");
      best = pass == 0 ? milliseconds : std::min(best, milliseconds);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return 1e-3 * best;
  }

  int index_;
  std::string name_;
  bool has_fp8_;         // products of rows and weights in fp8 with a scale each
  cudaStream_t stream_;  // as long as the program
  CudaBlockMemory memory_;
  std::shared_ptr<Gemm> gemm_;
};

Expected<std::shared_ptr<Device>> Open(int index) {
  DSLA_ASSIGN_OR_RETURN(const DriverApi driver, DriverApi::Load());
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess || count == 0) {
    return NotFound("no GPU: {}", cudaGetErrorString(found));
  }
  if (index >= count) return NotFound("this machine has {} GPUs", count);
  cudaDeviceProp property;
  Check(cudaGetDeviceProperties(&property, index), "asking for a GPU's properties");
  if (property.major < kLeastMajor) {
    return Unsupported("cuda:{} ({}): compute capability {}.{}: needs {}.0", index, property.name,
                       property.major, property.minor, kLeastMajor);
  }
  Check(cudaSetDevice(index), "choosing a GPU");
  cudaStream_t stream = nullptr;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  return std::shared_ptr<Device>(std::make_shared<CudaDevice>(index, property, driver, stream));
}

}  // namespace
}  // namespace dsla::cuda

extern "C" DSLA_CUDA_EXPORT void DslaOpenCudaDevice(int index,
                                                    std::shared_ptr<dsla::Device>* device,
                                                    dsla::Status* status) {
  try {
    auto opened = dsla::cuda::Open(index);
    *status = opened.status();
    if (opened.ok()) *device = std::move(opened).value();
  } catch (const std::exception& error) {
    *status = dsla::Error(dsla::StatusCode::kUnavailable, "{}", error.what());
  }
}
