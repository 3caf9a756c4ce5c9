#include "distill/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "base/files.h"
#include "base/mapped_file.h"
#include "format/json.h"
#include "format/safetensors.h"
#include "format/safetensors_writer.h"
#include "format/sha256.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kShardFloats = (15 << 20) / 4 - 4096;  // the header takes its part of 15 MiB
constexpr int kVersion = 1;

struct Array {
  const char* name;
  std::vector<float> OptimizerState::*values;
};
constexpr Array kArrays[] = {{"values", &OptimizerState::values},
                             {"first", &OptimizerState::first},
                             {"second", &OptimizerState::second},
                             {"steps", &OptimizerState::steps}};

Expected<std::string> HashOf(const std::string& path) {
  DSLA_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  Sha256 hash;
  hash.Update(file.bytes());
  return hash.HexDigest();
}

// Files of this checkpoint name that the manifest does not name: what an earlier one left.
void RemoveOthers(const std::string& folder, const std::string& name,
                  const std::set<std::string>& keep) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string file = entry.path().filename().string();
    if (file.starts_with(name + "-") && file.find(".safetensors") != std::string::npos &&
        !keep.contains(file))
      fs::remove(entry.path(), error);
  }
}

}  // namespace

Status SaveCheckpoint(const Checkpoint& checkpoint, const std::string& folder,
                      const std::string& name) {
  DSLA_RETURN_IF_ERROR(MakeDirectories(folder));
  nlohmann::json sizes, shards = nlohmann::json::array();
  std::set<std::string> files;
  std::vector<TensorToWrite> tensors;
  int64_t room = kShardFloats;
  const auto flush = [&]() -> Status {
    if (tensors.empty()) return Status::Ok();
    const std::string file =
        fmt::format("{}-{:08}-{}.safetensors", name, checkpoint.step, files.size());
    const std::string path = folder + "/" + file;
    DSLA_RETURN_IF_ERROR(
        WriteSafetensors(path, {{"stage", checkpoint.stage}}, tensors, DType::kF32));
    DSLA_ASSIGN_OR_RETURN(const std::string hash, HashOf(path));
    shards.push_back({{"file", file}, {"sha256", hash}});
    files.insert(file);
    tensors.clear();
    room = kShardFloats;
    return Status::Ok();
  };
  for (const Array& array : kArrays) {
    const std::vector<float>& values = checkpoint.state.*array.values;
    const auto size = static_cast<int64_t>(values.size());
    sizes[array.name] = size;
    for (int64_t begin = 0; begin < size;) {
      const int64_t n = std::min(room, size - begin);
      tensors.push_back({fmt::format("{}.{}", array.name, begin),
                         {n},
                         {values.data() + begin, static_cast<size_t>(n)}});
      begin += n;
      room -= n;
      if (room == 0) DSLA_RETURN_IF_ERROR(flush());
    }
  }
  DSLA_RETURN_IF_ERROR(flush());
  const nlohmann::json manifest = {{"version", kVersion},
                                   {"stage", checkpoint.stage},
                                   {"settings", checkpoint.settings},
                                   {"step", checkpoint.step},
                                   {"steps", checkpoint.steps},
                                   {"tokens", checkpoint.tokens},
                                   {"seconds", checkpoint.seconds},
                                   {"done", checkpoint.done},
                                   {"sizes", sizes},
                                   {"shards", shards}};
  DSLA_RETURN_IF_ERROR(
      WriteFileAtomically(fmt::format("{}/{}.json", folder, name), manifest.dump(1) + "\n"));
  RemoveOthers(folder, name, files);
  return Status::Ok();
}

Expected<std::optional<Checkpoint>> LoadCheckpoint(const std::string& folder,
                                                   const std::string& name) {
  const std::string path = fmt::format("{}/{}.json", folder, name);
  if (!fs::exists(path)) return std::optional<Checkpoint>();
  DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, 16 << 20));
  DSLA_ASSIGN_OR_RETURN(const nlohmann::json json, ParseJson(text, path));
  Checkpoint checkpoint;
  try {
    if (json.at("version") != kVersion)
      return Error(StatusCode::kUnsupported, "'{}': unknown version", path);
    checkpoint.stage = json.at("stage");
    checkpoint.settings = json.at("settings");
    checkpoint.step = json.at("step");
    checkpoint.steps = json.at("steps");
    checkpoint.tokens = json.at("tokens");
    checkpoint.seconds = json.at("seconds");
    checkpoint.done = json.at("done");
    for (const Array& array : kArrays) {
      const int64_t size = json.at("sizes").at(array.name);
      if (size < 0 || size > (int64_t{1} << 34)) return DataLoss("'{}': a wrong size", path);
      (checkpoint.state.*array.values).resize(size);
    }
    int64_t found = 0, wanted = 0;
    for (const auto& shard : json.at("shards")) {
      const std::string file = shard.at("file");
      if (file.find('/') != std::string::npos) return DataLoss("'{}': a wrong shard name", path);
      const std::string shard_path = folder + "/" + file;
      DSLA_ASSIGN_OR_RETURN(const std::string hash, HashOf(shard_path));
      if (hash != shard.at("sha256"))
        return DataLoss("'{}' is not the file that '{}' names", shard_path, path);
      DSLA_ASSIGN_OR_RETURN(const SafetensorsFile tensors, SafetensorsFile::Open(shard_path));
      for (const SafetensorsTensor& tensor : tensors.tensors()) {
        const size_t dot = tensor.name.find('.');
        for (const Array& array : kArrays) {
          if (tensor.name.substr(0, dot) != array.name) continue;
          std::vector<float>& values = checkpoint.state.*array.values;
          const size_t begin = std::stoul(tensor.name.substr(dot + 1)),
                       n = tensor.data.size() / sizeof(float);
          if (tensor.dtype != "F32" || begin > values.size() || n > values.size() - begin)
            return DataLoss("'{}': tensor {} does not fit", shard_path, tensor.name);
          std::memcpy(values.data() + begin, tensor.data.data(), tensor.data.size());
          found += static_cast<int64_t>(n);
        }
      }
    }
    for (const Array& array : kArrays)
      wanted += static_cast<int64_t>((checkpoint.state.*array.values).size());
    if (found != wanted) return DataLoss("'{}': {} numbers of {}", path, found, wanted);
  } catch (const std::exception& error) {  // nlohmann's and stoul's: a key or a type is wrong
    return DataLoss("'{}': {}", path, Printable(error.what()));
  }
  return std::optional<Checkpoint>(std::move(checkpoint));
}

}  // namespace dsla
