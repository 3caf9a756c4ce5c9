// A read-only memory map of a whole file. Movable; unmapped at the end. Safe to read from any
// thread.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "base/status.h"

namespace dsla {

class MappedFile {
 public:
  // Errors: kNotFound (with the system's reason) if it cannot be opened, kInvalidArgument if it is
  // not a regular file.
  static Expected<MappedFile> Open(const std::string& path);

  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Part of a mapped file whose memory is not needed for now: it is read again from the file when it
// is looked at.
void ReleasePages(std::span<const std::byte> mapped);

// The whole file as text. `max_bytes` bounds what is read; a larger file is an error.
Expected<std::string> ReadTextFile(const std::string& path, size_t max_bytes);

}  // namespace dsla
