#include "distill/prepare.h"

#include <mutex>
#include <string_view>

#include "base/mapped_file.h"
#include "distill/token_file.h"
#include "format/text_file.h"
#include "format/tokenizer/utf8.h"

namespace dsla {
namespace {

// Documents that are tokenised at a time, by several threads.
constexpr size_t kBatchBytes = 4 << 20;

class Preparer {
 public:
  Preparer(const ExecContext& ctx, const Tokenizer& tokenizer, TokenFileWriter writer,
           const std::function<void(int64_t, int64_t)>& progress)
      : ctx_(ctx), tokenizer_(tokenizer), writer_(std::move(writer)), progress_(progress) {}

  Status AddFile(const std::string& path);
  Status Finish() { return writer_.Finish(); }
  PrepareResult result() const { return {writer_.documents(), writer_.tokens()}; }
  int64_t total_bytes = 0;

 private:
  Status AddDocument(std::string text, const std::string& where);
  Status Flush();

  const ExecContext& ctx_;
  const Tokenizer& tokenizer_;
  TokenFileWriter writer_;
  const std::function<void(int64_t, int64_t)>& progress_;
  std::vector<std::string> pending_, places_;
  size_t pending_bytes_ = 0;
  int64_t done_bytes_ = 0;
};

Status Preparer::AddDocument(std::string text, const std::string& where) {
  if (text.find('\0') != std::string::npos) return DataLoss("{}: holds NUL bytes: no text", where);
  if (!utf8::IsValid(text)) return DataLoss("{}: not UTF-8", where);
  pending_bytes_ += text.size();
  pending_.push_back(std::move(text));
  places_.push_back(where);
  return pending_bytes_ >= kBatchBytes ? Flush() : Status::Ok();
}

Status Preparer::Flush() {
  std::vector<std::vector<int32_t>> ids(pending_.size());
  std::mutex mutex;
  Status first_error;
  ParallelFor(ctx_, static_cast<int64_t>(pending_.size()), [&](int64_t i, int) {
    Status status;
    try {  // nothing may leave a parallel section by exception
      auto encoded = tokenizer_.Encode(pending_[i], {.add_bos = false, .parse_special = false});
      if (encoded.ok())
        ids[i] = std::move(encoded).value();
      else
        status = InvalidArgument("{}: {}", places_[i], encoded.status().message());
    } catch (const std::bad_alloc&) {
      status = ResourceExhausted("{}: out of memory", places_[i]);
    }
    if (status.ok()) return;
    const std::lock_guard lock(mutex);
    if (first_error.ok()) first_error = status;
  });
  DSLA_RETURN_IF_ERROR(first_error);
  for (const auto& document : ids) DSLA_RETURN_IF_ERROR(writer_.Add(document));
  done_bytes_ += static_cast<int64_t>(pending_bytes_);
  if (progress_) progress_(done_bytes_, total_bytes);
  pending_.clear();
  places_.clear();
  pending_bytes_ = 0;
  return Status::Ok();
}

Status Preparer::AddFile(const std::string& path) {
  const int64_t tokens_before = writer_.tokens();
  DSLA_RETURN_IF_ERROR(
      ForEachText(path, [&](std::string_view text, const std::string& where) -> Expected<bool> {
        DSLA_RETURN_IF_ERROR(AddDocument(std::string(text), where));
        return true;
      }));
  DSLA_RETURN_IF_ERROR(Flush());
  if (writer_.tokens() == tokens_before) return InvalidArgument("'{}' holds no text", path);
  return Status::Ok();
}

}  // namespace

Expected<PrepareResult> PrepareTokens(const ExecContext& ctx,
                                      const std::vector<std::string>& inputs,
                                      const Tokenizer& tokenizer, const std::string& output,
                                      const std::function<void(int64_t, int64_t)>& progress) {
  if (inputs.empty()) return InvalidArgument("no data files are named");
  DSLA_ASSIGN_OR_RETURN(TokenFileWriter writer,
                        TokenFileWriter::Create(output, tokenizer.vocab_size()));
  Preparer preparer(ctx, tokenizer, std::move(writer), progress);
  for (const std::string& path : inputs) {
    DSLA_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
    preparer.total_bytes += static_cast<int64_t>(file.bytes().size());
  }
  for (const std::string& path : inputs) DSLA_RETURN_IF_ERROR(preparer.AddFile(path));
  DSLA_RETURN_IF_ERROR(preparer.Finish());
  return preparer.result();
}

}  // namespace dsla
