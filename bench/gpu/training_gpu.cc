// The speed of training on a GPU: of a layer's operator, forward and back, and of whole steps.
//
//   training_gpu                      one layer's operator, several shapes
//   training_gpu --model CONFIG.json  steps of align and chain, random weights and tokens
//   ... --profile                     with the GPU's time by kernel
//
// Milliseconds are medians of wall-clock times of calls that end with a wait for the GPU.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "distill/network.h"
#include "distill/torch_device.h"
#include "ops/dsla/dsla_autograd.h"

namespace dsla {
namespace {

using at::Tensor;

void Wait() { at::zeros({1}, at::kCUDA).item<float>(); }

double MedianMs(const std::function<void()>& call, int runs = 5) {
  call();
  std::vector<double> times;
  for (int i = 0; i < runs; ++i) {
    Wait();
    const auto start = std::chrono::steady_clock::now();
    call();
    Wait();
    times.push_back(
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
            .count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Prints the kernels that a call's GPU time goes to.
void Profile(const std::function<void()>& call) {
  namespace profiler = torch::autograd::profiler;
  const profiler::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  const std::set<torch::profiler::impl::ActivityType> activities = {
      torch::profiler::impl::ActivityType::CUDA};
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  call();
  Wait();
  const auto result = profiler::disableProfiler();
  struct Kernel {
    double ms = 0;
    int calls = 0;
  };
  std::map<std::string, Kernel> kernels;
  double all = 0;
  for (const auto& event : result->events()) {
    if (event.deviceType() != c10::kCUDA) continue;
    Kernel& kernel = kernels[event.name()];
    kernel.ms += static_cast<double>(event.durationNs()) * 1e-6, ++kernel.calls;
    all += static_cast<double>(event.durationNs()) * 1e-6;
  }
  std::vector<std::pair<std::string, Kernel>> sorted(kernels.begin(), kernels.end());
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return a.second.ms > b.second.ms; });
  std::printf("  GPU time %.2f ms\n", all);
  for (size_t i = 0; i < std::min<size_t>(sorted.size(), 32); ++i)
    std::printf("  %8.3f ms %5d  %.110s\n", sorted[i].second.ms, sorted[i].second.calls,
                sorted[i].first.c_str());
}

struct Shape {
  int64_t B, T, H, Hkv, D, F, window;
};

void TimeLayer(const Shape& s, bool profile) {
  const auto bf16 = at::TensorOptions(at::kBFloat16).device(at::kCUDA);
  const auto fp32 = bf16.dtype(at::kFloat);
  const Tensor q = at::randn({s.B, s.T, s.H, s.D}, bf16),
               k = at::randn({s.B, s.T, s.Hkv, s.D}, bf16), v = at::randn_like(k),
               claim = at::randn({s.B, s.T, s.H}, fp32), d = at::randn_like(q) * 1e-3;
  const auto leaf = [&](at::IntArrayRef shape) {
    return (at::randn(shape, fp32) * 0.1).set_requires_grad(true);
  };
  const DslaLayerParams params{leaf({s.H, s.D, s.D}), leaf({s.Hkv, s.D, s.D}),
                               leaf({2, s.Hkv, s.D, s.F}), leaf({2, s.Hkv, s.F}), leaf({s.H, 2})};
  const DslaLayerOptions fused{.chunked = {.window = s.window, .sinks = 4}};
  DslaLayerOptions composed = fused;
  composed.chunked.chunk = 62;  // what the fused kernels do not know
  composed.chunked.segment = 8192;
  const auto run = [&](const DslaLayerOptions& options, bool inputs, bool backward) {
    const auto given = [&](const Tensor& x) { return x.detach().set_requires_grad(inputs); };
    const at::AutoGradMode grad(backward);
    const Tensor out = DslaLayer(given(q), given(k), k, given(v), claim, params, options);
    if (backward) torch::autograd::backward({out}, {d});
  };
  std::printf("B %ld T %ld H %ld Hkv %ld D %ld F %ld W %ld:", s.B, s.T, s.H, s.Hkv, s.D, s.F,
              s.window);
  for (const auto& [name, options] : {std::pair("fused", fused), std::pair("composed", composed)}) {
    std::printf(" %s %.2f forward, %.2f with parameters' gradients, %.2f with all;", name,
                MedianMs([&] { run(options, false, false); }),
                MedianMs([&] { run(options, false, true); }),
                MedianMs([&] { run(options, true, true); }));
  }
  std::printf(" ms\n");
  if (profile) Profile([&] { run(fused, true, true); });
}

int TimeSteps(const std::string& path, bool profile) {
  const auto fail = [](const Status& status) {
    return std::fprintf(stderr, "%s\n", status.message().c_str()), 1;
  };
  const auto file = ModelFile::OpenRandom(path);
  if (!file.ok()) return fail(file.status());
  const ModelConfig& config = (*file)->config();
  const auto layout = ParameterLayout::Create(config, {.window = 256, .states = 2});
  if (!layout.ok()) return fail(layout.status());
  const auto network = Network::Create(**file, *layout, {.device = "cuda"});
  if (!network.ok()) return fail(network.status());
  (*network)->SetValues(layout->Start({}, 1));
  std::printf("%s\n", (*network)->device_name().c_str());
  std::mt19937 random(1);
  for (const auto& [rows, length] :
       {std::pair(64, 1024), std::pair(24, 1024), std::pair(16, 4096)}) {
    TokenBatch batch;
    batch.rows = rows, batch.length = length;
    for (int i = 0; i < rows * length; ++i)
      batch.ids.push_back(static_cast<int32_t>(random() % config.V));
    const auto report = [&](const char* name, const std::function<void()>& step) {
      const double ms = MedianMs(step, 3);
      std::printf("%s %d x %d: %.1f ms, %.0f tokens/s\n", name, rows, length, ms,
                  rows * length / ms * 1e3);
      if (profile && length == 1024 && rows == 64) Profile(step);
    };
    report("align", [&] {
      (*network)->Align(batch);
      (*network)->Update({});
      (*network)->TakeLosses();
    });
    for (const int level : {8, 15, 22, config.L}) {
      ChainStep step;
      for (int l = 0; l < level; ++l) step.converted.push_back((l * 7) % config.L);
      report(("chain " + std::to_string(level)).c_str(), [&] {
        (*network)->Chain(batch, step);
        (*network)->Update({});
        (*network)->TakeLosses();
      });
    }
  }
  return 0;
}

int Main(int argc, char** argv) {
  bool profile = false;
  std::string model;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--profile") == 0)
      profile = true;
    else if (std::strcmp(argv[i], "--model") == 0 && i + 1 < argc)
      model = argv[++i];
    else
      return std::fprintf(stderr, "unknown argument '%s'\n", argv[i]), 2;
  }
  const auto device = distill::OpenDevice("cuda");
  if (!device.ok()) return std::fprintf(stderr, "%s\n", device.status().message().c_str()), 1;
  if (!model.empty()) return TimeSteps(model, profile);
  for (const Shape& shape : {Shape{64, 1024, 9, 3, 64, 64, 256}, Shape{16, 4096, 9, 3, 64, 64, 256},
                             Shape{8, 1024, 32, 32, 128, 128, 256}})
    TimeLayer(shape, profile);
  return 0;
}

}  // namespace
}  // namespace dsla

int main(int argc, char** argv) { return dsla::Main(argc, argv); }
