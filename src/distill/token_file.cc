#include "distill/token_file.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace dsla {
namespace {

constexpr char kMagic[8] = {'D', 'S', 'L', 'A', 'T', 'O', 'K', '1'};

struct Header {
  char magic[8];
  uint32_t bytes_per_token, vocabulary;
  uint64_t documents, tokens;
};
static_assert(sizeof(Header) == 32);

int64_t BytesPerToken(int64_t vocabulary) { return vocabulary <= 65536 ? 2 : 4; }

}  // namespace

bool TokenFile::Is(const std::string& path) {
  char magic[8] = {};
  std::FILE* const file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) return false;
  const size_t n = std::fread(magic, 1, sizeof magic, file);
  std::fclose(file);
  return n == sizeof magic && std::memcmp(magic, kMagic, sizeof magic) == 0;
}

Expected<TokenFile> TokenFile::Open(const std::string& path) {
  TokenFile tokens;
  DSLA_ASSIGN_OR_RETURN(tokens.file_, MappedFile::Open(path));
  const std::span<const std::byte> bytes = tokens.file_.bytes();
  Header header;
  if (bytes.size() < sizeof header) return DataLoss("'{}' is no token file", path);
  std::memcpy(&header, bytes.data(), sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0)
    return DataLoss("'{}' is no token file", path);
  const uint64_t limit = bytes.size();  // neither count can be larger, so no product overflows
  if ((header.bytes_per_token != 2 && header.bytes_per_token != 4) || header.documents > limit ||
      header.tokens > limit)
    return DataLoss("'{}': damaged header", path);
  const uint64_t data = (header.tokens * header.bytes_per_token + 7) / 8 * 8;
  if (sizeof header + data + 8 * header.documents != bytes.size())
    return DataLoss("'{}' has {} bytes; its header says {}", path, bytes.size(),
                    sizeof header + data + 8 * header.documents);
  tokens.bytes_per_token_ = header.bytes_per_token;
  tokens.vocabulary_ = header.vocabulary;
  tokens.tokens_ = static_cast<int64_t>(header.tokens);
  tokens.documents_ = static_cast<int64_t>(header.documents);
  tokens.data_ = bytes.data() + sizeof header;
  tokens.ends_ = tokens.data_ + data;
  int64_t last = 0;
  for (int64_t i = 0; i < tokens.documents_; ++i) {
    const int64_t end = tokens.end(i);
    if (end <= last || end > tokens.tokens_)
      return DataLoss("'{}': document {} ends at token {}, after {} of {}", path, i, end, last,
                      tokens.tokens_);
    last = end;
  }
  if (last != tokens.tokens_)
    return DataLoss("'{}': its documents end at token {} of {}", path, last, tokens.tokens_);
  return tokens;
}

int64_t TokenFile::end(int64_t i) const {
  uint64_t end;
  std::memcpy(&end, ends_ + 8 * i, sizeof end);
  return static_cast<int64_t>(end);
}

void TokenFile::Read(int64_t begin, std::span<int32_t> out) const {
  DSLA_CHECK(begin >= 0 && begin + static_cast<int64_t>(out.size()) <= tokens_);
  const std::byte* const from = data_ + begin * bytes_per_token_;
  if (bytes_per_token_ == 4) {
    std::memcpy(out.data(), from, 4 * out.size());
    return;
  }
  for (size_t i = 0; i < out.size(); ++i) {
    uint16_t id;
    std::memcpy(&id, from + 2 * i, sizeof id);
    out[i] = id;
  }
}

Expected<TokenFileWriter> TokenFileWriter::Create(const std::string& path, int64_t vocabulary) {
  TokenFileWriter writer;
  writer.path_ = path;
  writer.temporary_ = fmt::format("{}.tmp.{}", path, ::getpid());
  writer.vocabulary_ = vocabulary;
  writer.file_ = std::fopen(writer.temporary_.c_str(), "wb");
  if (writer.file_ == nullptr) return writer.Fail();
  const Header empty{};
  DSLA_RETURN_IF_ERROR(writer.Write(&empty, sizeof empty));
  return writer;
}

TokenFileWriter::TokenFileWriter(TokenFileWriter&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::move(other.temporary_)),
      file_(std::exchange(other.file_, nullptr)),
      vocabulary_(other.vocabulary_),
      tokens_(other.tokens_),
      ends_(std::move(other.ends_)) {}

TokenFileWriter::~TokenFileWriter() {
  if (file_ == nullptr) return;
  std::fclose(file_);
  ::unlink(temporary_.c_str());
}

Status TokenFileWriter::Fail() const {
  return Error(StatusCode::kInternal, "cannot write '{}': {}", path_, std::strerror(errno));
}

Status TokenFileWriter::Write(const void* data, size_t bytes) {
  return std::fwrite(data, 1, bytes, file_) == bytes ? Status::Ok() : Fail();
}

Status TokenFileWriter::Add(std::span<const int32_t> document) {
  if (document.empty()) return Status::Ok();
  if (BytesPerToken(vocabulary_) == 4) {
    DSLA_RETURN_IF_ERROR(Write(document.data(), 4 * document.size()));
  } else {
    std::vector<uint16_t> narrow(document.begin(), document.end());
    DSLA_RETURN_IF_ERROR(Write(narrow.data(), 2 * narrow.size()));
  }
  tokens_ += static_cast<int64_t>(document.size());
  ends_.push_back(static_cast<uint64_t>(tokens_));
  return Status::Ok();
}

Status TokenFileWriter::Finish() {
  const int64_t bytes = tokens_ * BytesPerToken(vocabulary_), padding = (8 - bytes % 8) % 8;
  const char zeros[8] = {};
  DSLA_RETURN_IF_ERROR(Write(zeros, static_cast<size_t>(padding)));
  DSLA_RETURN_IF_ERROR(Write(ends_.data(), 8 * ends_.size()));
  Header header{{},
                static_cast<uint32_t>(BytesPerToken(vocabulary_)),
                static_cast<uint32_t>(vocabulary_),
                ends_.size(),
                static_cast<uint64_t>(tokens_)};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  if (std::fseek(file_, 0, SEEK_SET) != 0) return Fail();
  DSLA_RETURN_IF_ERROR(Write(&header, sizeof header));
  if (std::fflush(file_) != 0 || ::fsync(::fileno(file_)) != 0) return Fail();
  if (std::fclose(std::exchange(file_, nullptr)) != 0 ||
      std::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const Status failed = Fail();
    ::unlink(temporary_.c_str());
    return failed;
  }
  return Status::Ok();
}

}  // namespace dsla
