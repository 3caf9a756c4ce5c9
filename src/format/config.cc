#include "format/config.h"

#include <cmath>
#include <numbers>

namespace dsla {
namespace {

double Llama3Frequency(double frequency, const RopeConfig& rope) {
  const double wavelength = 2.0 * std::numbers::pi / frequency;
  const double original = rope.original_max_position;
  if (wavelength < original / rope.high_freq_factor) return frequency;
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - smooth) * frequency / rope.factor + smooth * frequency;
}

Status CheckRope(const RopeConfig& rope, int D, const std::string& path) {
  const auto positive = [](double x) { return std::isfinite(x) && x > 0; };
  if (!positive(rope.theta) || rope.theta < 1) {
    return DataLoss("'{}': RoPE base {} is not a number of at least 1", path, rope.theta);
  }
  if (!positive(rope.factor) || rope.factor < 1) {
    return DataLoss("'{}': RoPE scaling factor {} is not a number of at least 1", path,
                    rope.factor);
  }
  if (rope.scaling == RopeScaling::kLlama3) {
    if (!positive(rope.low_freq_factor) || !positive(rope.high_freq_factor) ||
        rope.high_freq_factor <= rope.low_freq_factor) {
      return DataLoss("'{}': RoPE scaling needs 0 < low_freq_factor < high_freq_factor, not {}, {}",
                      path, rope.low_freq_factor, rope.high_freq_factor);
    }
    if (rope.original_max_position <= 0) {
      return DataLoss("'{}': RoPE scaling without original_max_position_embeddings", path);
    }
  }
  if (rope.scaling == RopeScaling::kTable) {
    if (static_cast<int>(rope.divisors.size()) != D / 2) {
      return DataLoss("'{}': {} RoPE divisors for {} pairs", path, rope.divisors.size(), D / 2);
    }
    for (const float divisor : rope.divisors) {
      if (!positive(divisor)) {
        return DataLoss("'{}': RoPE divisor {} is not positive", path, divisor);
      }
    }
  }
  return Status::Ok();
}

}  // namespace

std::vector<double> RopeConfig::Frequencies(int D) const {
  std::vector<double> out(static_cast<size_t>(D / 2));
  for (size_t i = 0; i < out.size(); ++i) {
    const double frequency = std::pow(theta, -2.0 * static_cast<double>(i) / D);
    switch (scaling) {
      case RopeScaling::kNone:
        out[i] = frequency;
        break;
      case RopeScaling::kLinear:
        out[i] = frequency / factor;
        break;
      case RopeScaling::kLlama3:
        out[i] = Llama3Frequency(frequency, *this);
        break;
      case RopeScaling::kTable:
        out[i] = frequency / static_cast<double>(divisors[i]);
        break;
    }
  }
  return out;
}

Status ValidateConfig(const ModelConfig& config, const std::string& path) {
  // Far above any model there is; below them no product of two of these overflows an int.
  struct Limit {
    const char* name;
    int value, max;
  };
  const Limit limits[] = {
      {"layers", config.L, 1024},          {"hidden size", config.C, 32768},
      {"attention heads", config.H, 1024}, {"key-value heads", config.Hkv, 1024},
      {"head size", config.D, 512},        {"feed-forward size", config.ffn, 1 << 20},
      {"vocabulary", config.V, 1 << 22},   {"context length", config.max_position, 1 << 28},
  };
  for (const Limit& limit : limits) {
    if (limit.value < 1 || limit.value > limit.max) {
      return DataLoss("'{}': {} is {}, allowed are 1 to {}", path, limit.name, limit.value,
                      limit.max);
    }
  }
  if (config.H % config.Hkv != 0) {
    return DataLoss("'{}': {} attention heads are not a multiple of {} key-value heads", path,
                    config.H, config.Hkv);
  }
  if (config.D % 2 != 0) return DataLoss("'{}': head size {} is odd", path, config.D);
  if (!(config.norm_eps > 0 && config.norm_eps < 1)) {
    return DataLoss("'{}': RMS norm epsilon {} is not between 0 and 1", path, config.norm_eps);
  }
  if (config.sliding_window < 0) {
    return DataLoss("'{}': sliding window {} is negative", path, config.sliding_window);
  }
  for (const int32_t id : config.eos_ids) {
    if (id < 0 || id >= config.V) {
      return DataLoss("'{}': end token {} is outside the vocabulary of {}", path, id, config.V);
    }
  }
  if (config.bos_id < -1 || config.bos_id >= config.V) {
    return DataLoss("'{}': start token {} is outside the vocabulary of {}", path, config.bos_id,
                    config.V);
  }
  return CheckRope(config.rope, config.D, path);
}

}  // namespace dsla
