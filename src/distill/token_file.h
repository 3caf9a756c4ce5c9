// Token files: the tokens of many documents, one after another, memory-mapped. Little-endian:
//   "DSLATOK1", uint32 bytes per token (2 or 4), uint32 vocabulary size, uint64 documents D,
//   uint64 tokens N, then N tokens, padded with zeros to a multiple of 8, then D uint64: the end of
//   each document, counted in tokens. Ids are below the vocabulary size; documents are not empty.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/mapped_file.h"
#include "base/status.h"

namespace dsla {

class TokenFile {
 public:
  // Checks the sizes against the file and the document ends, not every token. kDataLoss if it is
  // no such file or a damaged one.
  static Expected<TokenFile> Open(const std::string& path);
  // Whether the file begins as a token file does; false if it cannot be read.
  static bool Is(const std::string& path);

  const std::string& path() const { return file_.path(); }
  int64_t vocabulary() const { return vocabulary_; }
  int64_t tokens() const { return tokens_; }
  int64_t documents() const { return documents_; }
  // Document i is tokens [begin(i), end(i)).
  int64_t begin(int64_t i) const { return i == 0 ? 0 : end(i - 1); }
  int64_t end(int64_t i) const;
  int64_t length(int64_t i) const { return end(i) - begin(i); }
  void Read(int64_t begin, std::span<int32_t> out) const;

 private:
  MappedFile file_;
  const std::byte* data_ = nullptr;
  const std::byte* ends_ = nullptr;
  int64_t bytes_per_token_ = 0, vocabulary_ = 0, tokens_ = 0, documents_ = 0;
};

// Writes one, document by document; the file appears when Finish has returned Ok.
class TokenFileWriter {
 public:
  // Errors of all three: kInternal with the system's reason.
  static Expected<TokenFileWriter> Create(const std::string& path, int64_t vocabulary);
  TokenFileWriter(TokenFileWriter&&) noexcept;
  ~TokenFileWriter();

  Status Add(std::span<const int32_t> document);  // empty ones are left out
  Status Finish();

  int64_t tokens() const { return tokens_; }
  int64_t documents() const { return static_cast<int64_t>(ends_.size()); }

 private:
  TokenFileWriter() = default;
  Status Write(const void* data, size_t bytes);
  Status Fail() const;

  std::string path_, temporary_;
  std::FILE* file_ = nullptr;
  int64_t vocabulary_ = 0, tokens_ = 0;
  std::vector<uint64_t> ends_;
};

}  // namespace dsla
