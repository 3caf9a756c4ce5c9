#include "format/adapter.h"

#include <charconv>
#include <map>
#include <optional>
#include <set>

#include "format/adapter_layout.h"
#include "format/dequant.h"
#include "format/json.h"
#include "format/safetensors.h"
#include "format/sha256.h"

namespace dsla {
namespace {

using nlohmann::json;

template <typename T>
std::optional<T> ParseNumber(const std::string& text) {
  T value{};
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, value);
  if (result.ec != std::errc() || result.ptr != end) return std::nullopt;
  return value;
}

bool IsHexDigest(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

class AdapterReader {
 public:
  AdapterReader(const SafetensorsFile& file, const ModelConfig& base)
      : file_(file), base_(base), where_(fmt::format("'{}'", file.path())) {}

  Status Run(Adapter* out) {
    DSLA_RETURN_IF_ERROR(CheckFormat());
    DSLA_RETURN_IF_ERROR(ReadText("base_fingerprint", &out->base_fingerprint));
    if (!IsHexDigest(out->base_fingerprint)) {
      return DataLoss("{}: base_fingerprint is not a SHA-256 digest", where_);
    }
    DSLA_RETURN_IF_ERROR(ReadText("base_name", &out->base_name));
    out->base_name = Printable(out->base_name);
    DSLA_RETURN_IF_ERROR(ReadLadder(out));
    AdapterLayer common;
    DSLA_RETURN_IF_ERROR(ReadCommon(&common));
    out->layers.assign(static_cast<size_t>(base_.L), common);
    DSLA_RETURN_IF_ERROR(ReadOverrides(out));
    for (const auto& [key, value] : file_.metadata()) {
      if (!known_.contains(key)) return DataLoss("{}: unknown key '{}'", where_, Printable(key));
    }
    for (const SafetensorsTensor& tensor : file_.tensors()) tensors_[tensor.name] = &tensor;
    for (int l = 0; l < base_.L; ++l) {
      DSLA_RETURN_IF_ERROR(ReadLayer(l, &out->layers[static_cast<size_t>(l)]));
    }
    if (!tensors_.empty()) {
      return DataLoss("{}: unexpected tensor '{}'", where_, Printable(tensors_.begin()->first));
    }
    return Status::Ok();
  }

 private:
  AdapterDims Dims() const { return {base_.C, base_.H, base_.Hkv, base_.D}; }

  const std::string* Find(const char* key) {
    known_.insert(key);
    const auto it = file_.metadata().find(key);
    return it == file_.metadata().end() ? nullptr : &it->second;
  }
  Status ReadText(const char* key, std::string* out) {
    const std::string* text = Find(key);
    if (text == nullptr) return DataLoss("{}: no {} in the metadata", where_, key);
    *out = *text;
    return Status::Ok();
  }
  template <typename T>
  Status Read(const char* key, T* out) {
    std::string text;
    DSLA_RETURN_IF_ERROR(ReadText(key, &text));
    const auto value = ParseNumber<T>(text);
    if (!value) return DataLoss("{}: {} '{}' is not a number", where_, key, Printable(text));
    *out = *value;
    return Status::Ok();
  }

  Status CheckFormat() {
    const std::string* format = Find("format");
    if (format == nullptr || *format != kAdapterFormat) {
      return DataLoss("{}: not an adapter (its metadata has no format '{}')", where_,
                      kAdapterFormat);
    }
    int version = 0, divisor = 0;
    std::string feature_map;
    DSLA_RETURN_IF_ERROR(Read("version", &version));
    if (version != kAdapterVersion) {
      return Unsupported("{}: adapter format version {}, this build reads {}", where_, version,
                         kAdapterVersion);
    }
    DSLA_RETURN_IF_ERROR(Read("gate_divisor", &divisor));
    if (divisor != kGateDivisor) {
      return Unsupported("{}: gate_divisor {}, known is {}", where_, divisor, kGateDivisor);
    }
    DSLA_RETURN_IF_ERROR(ReadText("feature_map", &feature_map));
    if (feature_map != kFeatureMap) {
      return Unsupported("{}: feature_map '{}', known is '{}'", where_, Printable(feature_map),
                         kFeatureMap);
    }
    return Status::Ok();
  }

  Status ReadLadder(Adapter* out) {
    std::string text;
    DSLA_RETURN_IF_ERROR(ReadText("ladder", &text));
    DSLA_ASSIGN_OR_RETURN(const json list, ParseJson(text, file_.path(), 1));
    if (!list.is_array()) return DataLoss("{}: ladder is not a list", where_);
    for (const json& item : list) {
      if (!item.is_number_unsigned() || item.get<uint64_t>() > 1024) {
        return DataLoss("{}: ladder is not a list of layer numbers", where_);
      }
      out->ladder.push_back(item.get<int>());
    }
    DSLA_RETURN_IF_ERROR(Read("top_level", &out->top_level));
    return CheckLadder(out->ladder, out->top_level, base_.L, where_);
  }

  Status ReadCommon(AdapterLayer* layer) {
    DSLA_RETURN_IF_ERROR(Read("window", &layer->window));
    DSLA_RETURN_IF_ERROR(Read("sinks", &layer->sinks));
    DSLA_RETURN_IF_ERROR(Read("states", &layer->states));
    DSLA_RETURN_IF_ERROR(Read("features", &layer->features));
    DSLA_RETURN_IF_ERROR(Read("rank", &layer->rank));
    DSLA_RETURN_IF_ERROR(Read("gate_floor", &layer->gate_floor));
    return CheckAdapterSettings(*layer, Dims(), where_);
  }

  // {"3": {"window": 256, "gate_floor": -2.25}, ...}
  Status ReadOverrides(Adapter* out) {
    const std::string* text = Find("layers");
    if (text == nullptr) return Status::Ok();
    DSLA_ASSIGN_OR_RETURN(const json object, ParseJson(*text, file_.path(), 2));
    if (!object.is_object()) return DataLoss("{}: layers is not an object", where_);
    for (const auto& item : object.items()) {
      const auto number = ParseNumber<int>(item.key());
      if (!number || *number < 0 || *number >= base_.L) {
        return DataLoss("{}: layers names layer '{}' of {}", where_, Printable(item.key()),
                        base_.L);
      }
      const std::string where = fmt::format("{}: layer {}", where_, *number);
      if (!item.value().is_object()) return DataLoss("{}: not an object", where);
      AdapterLayer* layer = &out->layers[static_cast<size_t>(*number)];
      for (const auto& setting : item.value().items()) {
        DSLA_RETURN_IF_ERROR(Override(setting.key(), setting.value(), where, layer));
      }
      DSLA_RETURN_IF_ERROR(CheckAdapterSettings(*layer, Dims(), where));
    }
    return Status::Ok();
  }

  static Status Override(const std::string& key, const json& value, const std::string& where,
                         AdapterLayer* layer) {
    if (key == "gate_floor" && value.is_number()) {
      layer->gate_floor = value.get<float>();
      return Status::Ok();
    }
    static const std::map<std::string, int AdapterLayer::*> kIntegers = {
        {"window", &AdapterLayer::window}, {"sinks", &AdapterLayer::sinks},
        {"states", &AdapterLayer::states}, {"features", &AdapterLayer::features},
        {"rank", &AdapterLayer::rank},
    };
    const auto it = kIntegers.find(key);
    if (it == kIntegers.end() && key != "gate_floor") {
      return DataLoss("{}: unknown setting '{}'", where, Printable(key));
    }
    if (it == kIntegers.end() || !value.is_number_unsigned() ||
        value.get<uint64_t>() > (uint64_t{1} << 30)) {
      return DataLoss("{}: {} is not a number that it may be", where, key);
    }
    layer->*it->second = value.get<int>();
    return Status::Ok();
  }

  Status ReadLayer(int l, AdapterLayer* layer) {
    for (const AdapterTensor& wanted : AdapterTensors(*layer, Dims())) {
      const std::string name = fmt::format("layers.{}.{}", l, wanted.suffix);
      const auto it = tensors_.find(name);
      if (it == tensors_.end()) return DataLoss("{}: tensor '{}' is missing", where_, name);
      const SafetensorsTensor& tensor = *it->second;
      tensors_.erase(it);
      if (tensor.shape != wanted.shape) {
        return DataLoss("{}: tensor '{}' has shape [{}], the model needs [{}]", where_, name,
                        fmt::join(tensor.shape, ", "), fmt::join(wanted.shape, ", "));
      }
      const auto type = StorageTypeFromSafetensors(tensor.dtype);
      if (!type || *type == StorageType::kF16) {
        return Unsupported("{}: tensor '{}' is {} (supported: F32, BF16)", where_, name,
                           tensor.dtype);
      }
      std::vector<float>& values = layer->*wanted.values;
      values.resize(tensor.data.size() / static_cast<size_t>(Traits(*type).bytes));
      Dequantize(*type, tensor.data, values);
      if (!AllFinite(values)) {
        return DataLoss("{}: tensor '{}' holds NaN or Inf", where_, name);
      }
    }
    return Status::Ok();
  }

  const SafetensorsFile& file_;
  const ModelConfig& base_;
  const std::string where_;
  std::set<std::string> known_;                              // keys of format version 1
  std::map<std::string, const SafetensorsTensor*> tensors_;  // not yet read
};

}  // namespace

Expected<std::shared_ptr<const Adapter>> ParseAdapter(std::span<const std::byte> bytes,
                                                      const std::string& path,
                                                      const ModelConfig& base) {
  DSLA_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Parse(bytes, path));
  auto adapter = std::make_shared<Adapter>();
  DSLA_RETURN_IF_ERROR(AdapterReader(file, base).Run(adapter.get()));
  Sha256 hash;
  hash.Update(bytes);
  adapter->id = hash.HexDigest().substr(0, 16);
  return std::shared_ptr<const Adapter>(std::move(adapter));
}

Expected<std::shared_ptr<const Adapter>> Adapter::Open(const std::string& path,
                                                       const ModelConfig& base) {
  DSLA_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  return ParseAdapter(file.bytes(), path, base);
}

Status Adapter::CheckBase(const std::string& fingerprint, const std::string& model_path) const {
  if (fingerprint == base_fingerprint) return Status::Ok();
  return InvalidArgument(
      "the adapter belongs to another model: {} (fingerprint {}), not '{}' (fingerprint {})",
      base_name, base_fingerprint.substr(0, 16), model_path, fingerprint.substr(0, 16));
}

}  // namespace dsla
