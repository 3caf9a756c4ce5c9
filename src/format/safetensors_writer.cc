#include "format/safetensors_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/half.h"

namespace dsla {
namespace {

// A file that exists under its own name only after Commit.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path)
      : path_(path), temporary_(fmt::format("{}.tmp.{}", path, ::getpid())) {
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd_ < 0) Fail();
  }
  ~AtomicFile() {
    if (fd_ >= 0) ::close(fd_);
    if (!committed_) ::unlink(temporary_.c_str());
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void Write(const void* data, size_t size) {
    const char* p = static_cast<const char*>(data);
    while (error_ == 0 && size > 0) {
      const ssize_t n = ::write(fd_, p, size);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return Fail();
      p += n;
      size -= static_cast<size_t>(n);
    }
  }
  Status Commit() {
    if (error_ == 0 && ::fsync(fd_) != 0) Fail();
    if (error_ == 0 && ::rename(temporary_.c_str(), path_.c_str()) != 0) Fail();
    if (error_ != 0) {
      return Error(StatusCode::kInternal, "cannot write '{}': {}", path_, std::strerror(error_));
    }
    committed_ = true;
    return Status::Ok();
  }

 private:
  void Fail() { error_ = errno; }

  const std::string path_, temporary_;
  int fd_ = -1;
  int error_ = 0;
  bool committed_ = false;
};

void WriteValues(std::span<const float> values, DType dtype, AtomicFile* file) {
  if (dtype == DType::kF32) return file->Write(values.data(), values.size_bytes());
  std::vector<bf16> rounded(values.size());
  for (size_t i = 0; i < values.size(); ++i) rounded[i] = ToBf16(values[i]);
  file->Write(rounded.data(), rounded.size() * sizeof(bf16));
}

}  // namespace

Status WriteSafetensors(const std::string& path, const std::map<std::string, std::string>& metadata,
                        const std::vector<TensorToWrite>& tensors, DType dtype) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t at = 0;
  for (const TensorToWrite& tensor : tensors) {
    int64_t elements = 1;
    for (const int64_t size : tensor.shape) elements *= size;
    DSLA_CHECK(elements == static_cast<int64_t>(tensor.values.size()));
    const int64_t end = at + elements * SizeOf(dtype);
    DSLA_CHECK(!header.contains(tensor.name));
    header[tensor.name] = {{"dtype", dtype == DType::kF32 ? "F32" : "BF16"},
                           {"shape", tensor.shape},
                           {"data_offsets", {at, end}}};
    at = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // aligns the data
  const uint64_t size = text.size();
  AtomicFile file(path);
  file.Write(&size, sizeof(size));
  file.Write(text.data(), text.size());
  for (const TensorToWrite& tensor : tensors) WriteValues(tensor.values, dtype, &file);
  return file.Commit();
}

}  // namespace dsla
