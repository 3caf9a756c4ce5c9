#include "distill/write.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/clock.h"
#include "base/files.h"
#include "base/mapped_file.h"
#include "base/random.h"
#include "distill/generator.h"
#include "distill/prepare.h"
#include "distill/run_log.h"
#include "distill/token_file.h"
#include "format/sha256.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kPrompts = 0x7072, kTokens = 0x746f;  // streams of random numbers

Status CheckJob(const ModelConfig& config, const WriteJob& job) {
  const auto check = [](bool ok, const char* key, const std::string& rule) {
    return ok ? Status::Ok() : InvalidArgument("{}: {}", key, rule);
  };
  if (job.out.empty()) return InvalidArgument("--out is required");
  DSLA_RETURN_IF_ERROR(check(job.documents > 0, "--documents", "not positive"));
  DSLA_RETURN_IF_ERROR(check(job.batch > 0, "--batch", "not positive"));
  DSLA_RETURN_IF_ERROR(
      check(job.prompts.empty() || job.prompt_tokens > 0, "--prompt-tokens", "not positive"));
  const int prompt = job.prompts.empty() ? 1 : job.prompt_tokens;
  DSLA_RETURN_IF_ERROR(check(job.length > prompt && job.length <= config.max_position, "--length",
                             fmt::format("{} is not in {} to the model's context of {}", job.length,
                                         prompt + 1, config.max_position)));
  DSLA_RETURN_IF_ERROR(check(job.temperature >= 0 && job.temperature <= 100, "--temperature",
                             fmt::format("{} is not in 0 to 100", job.temperature)));
  return check(job.top_p > 0 && job.top_p <= 1, "--top-p",
               fmt::format("{} is not above 0 and at most 1", job.top_p));
}

// Lines appended to a file, all of a call or, where it is cut short, a part that Open cuts off.
class LineFile {
 public:
  LineFile() = default;
  LineFile(LineFile&& other) noexcept
      : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)), lines_(other.lines_) {}
  LineFile& operator=(LineFile&&) = delete;
  ~LineFile() {
    if (fd_ >= 0) ::close(fd_);
  }

  static Expected<LineFile> Open(const std::string& path) {
    LineFile file;
    file.path_ = path;
    file.fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (file.fd_ < 0) return file.Fail();
    struct stat info;
    if (::fstat(file.fd_, &info) != 0) return file.Fail();
    if (!S_ISREG(info.st_mode)) return file;
    int64_t at = 0, end = 0;
    char buffer[1 << 16];
    for (;;) {
      const ssize_t n = ::read(file.fd_, buffer, sizeof buffer);
      if (n < 0) return file.Fail();
      if (n == 0) break;
      for (ssize_t i = 0; i < n; ++i)
        if (buffer[i] == '\n') ++file.lines_, end = at + i + 1;
      at += n;
    }
    if (end < at && ::ftruncate(file.fd_, end) != 0) return file.Fail();
    return file;
  }

  int64_t lines() const { return lines_; }

  Status Append(const std::string& text, int64_t lines) {
    for (size_t done = 0; done < text.size();) {
      const ssize_t n = ::write(fd_, text.data() + done, text.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return Fail();
      done += static_cast<size_t>(n);
    }
    if (::fsync(fd_) != 0 && errno != EINVAL) return Fail();  // a pipe or device has none
    lines_ += lines;
    return Status::Ok();
  }

 private:
  Status Fail() const {
    return Error(StatusCode::kInternal, "cannot write '{}': {}", path_, std::strerror(errno));
  }

  std::string path_;
  int fd_ = -1;
  int64_t lines_ = 0;
};

// The openings that texts may begin with.
class Prompts {
 public:
  static Expected<Prompts> Read(const ExecContext& ctx, const Tokenizer& tokenizer,
                                const WriteJob& job) {
    Prompts prompts;
    prompts.seed_ = static_cast<uint64_t>(job.seed);
    if (job.prompts.empty()) {
      if (!tokenizer.bos_id())
        return InvalidArgument("the model has no BOS token to begin with: name --prompts");
      prompts.bos_ = *tokenizer.bos_id();
      return prompts;
    }
    prompts.length_ = job.prompt_tokens;
    std::string path = job.prompts[0];
    const bool made = job.prompts.size() > 1 || !TokenFile::Is(path);
    if (made) {
      path = job.out + ".prompts.tokens";
      DSLA_RETURN_IF_ERROR(PrepareTokens(ctx, job.prompts, tokenizer, path).status());
    }
    DSLA_ASSIGN_OR_RETURN(prompts.tokens_, TokenFile::Open(path));
    DSLA_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
    Sha256 hash;
    hash.Update(file.bytes());
    prompts.hash_ = hash.HexDigest();
    if (made) ::unlink(path.c_str());  // mapped, so it stays readable
    if (prompts.tokens_->vocabulary() != tokenizer.vocab_size())
      return InvalidArgument("'{}' was made with {} token ids, the model has {}", path,
                             prompts.tokens_->vocabulary(), tokenizer.vocab_size());
    for (int64_t i = 0; i < prompts.tokens_->documents(); ++i)
      if (prompts.tokens_->length(i) > prompts.length_) prompts.documents_.push_back(i);
    if (prompts.documents_.empty())
      return InvalidArgument("'{}': none of {} documents is longer than --prompt-tokens {}",
                             job.prompts[0], prompts.tokens_->documents(), prompts.length_);
    return prompts;
  }

  const std::string& hash() const { return hash_; }

  std::vector<int32_t> Of(int64_t document) const {
    if (!tokens_) return {bos_};
    Random random(seed_, {kPrompts, static_cast<uint64_t>(document)});
    std::vector<int32_t> ids(length_);
    tokens_->Read(tokens_->begin(documents_[random.Below(documents_.size())]), ids);
    return ids;
  }

 private:
  std::optional<TokenFile> tokens_;
  std::vector<int64_t> documents_;
  std::string hash_;
  int length_ = 1;
  int32_t bos_ = 0;
  uint64_t seed_ = 0;
};

// Whether `out` may be begun or gone on with.
Status CheckRecord(const WriteJob& job, const std::string& settings) {
  const std::string record = job.out + ".json";
  if (!fs::exists(job.out)) return WriteFileAtomically(record, settings);
  if (!fs::exists(record))
    return InvalidArgument("'{}' is there already and was not written by dsla distill write",
                           job.out);
  DSLA_ASSIGN_OR_RETURN(const std::string before, ReadTextFile(record, 1 << 20));
  if (before != settings)
    return InvalidArgument("'{}' was written with other settings (see '{}'): name another --out",
                           job.out, record);
  return Status::Ok();
}

}  // namespace

Expected<WriteOutcome> WriteTexts(const ExecContext& ctx, const ModelFile& model,
                                  const WriteJob& job) {
  DSLA_RETURN_IF_ERROR(CheckJob(model.config(), job));
  DSLA_ASSIGN_OR_RETURN(TokenizerData data, model.ReadTokenizer());
  DSLA_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Create(std::move(data)));
  DSLA_ASSIGN_OR_RETURN(const Prompts prompts, Prompts::Read(ctx, *tokenizer, job));
  DSLA_ASSIGN_OR_RETURN(const std::string fingerprint, model.Fingerprint());
  const nlohmann::json settings = {{"model", fingerprint},
                                   {"prompts", prompts.hash()},
                                   {"prompt_tokens", job.prompts.empty() ? 1 : job.prompt_tokens},
                                   {"documents", job.documents},
                                   {"length", job.length},
                                   {"batch", job.batch},
                                   {"temperature", job.temperature},
                                   {"top_p", job.top_p},
                                   {"seed", job.seed},
                                   {"dtype", job.dtype}};
  DSLA_RETURN_IF_ERROR(CheckRecord(job, settings.dump(1) + "\n"));
  DSLA_ASSIGN_OR_RETURN(LineFile file, LineFile::Open(job.out));
  DSLA_ASSIGN_OR_RETURN(RunLog log, RunLog::Open("/dev/null", job.quiet));
  WriteOutcome outcome;
  outcome.documents = file.lines();
  outcome.finished = outcome.documents >= job.documents;
  if (outcome.finished) return outcome;

  GeneratorOptions options;
  options.device = job.device, options.dtype = job.dtype, options.threads = job.threads;
  for (int32_t id = 0; id < model.config().V; ++id)
    options.stops.push_back(tokenizer->IsSpecial(id));
  DSLA_ASSIGN_OR_RETURN(const auto generator, Generator::Create(model, options));
  const Sampling sampling{job.length, job.temperature, job.top_p};
  const double begin_time = NowSeconds();
  const int64_t before = file.lines();
  int64_t tokens = 0;
  // A batch that was begun is made again whole, so that its texts come out as before.
  for (int64_t begin = before / job.batch * job.batch; begin < job.documents; begin += job.batch) {
    if (job.interrupted && job.interrupted()) return outcome;
    const int64_t end = std::min(begin + job.batch, job.documents);
    std::vector<std::vector<int32_t>> openings;
    for (int64_t i = begin; i < end; ++i) openings.push_back(prompts.Of(i));
    const auto texts = generator->Generate(openings, sampling, [&](int row, int position) {
      return Random(static_cast<uint64_t>(job.seed),
                    {kTokens, static_cast<uint64_t>(begin + row), static_cast<uint64_t>(position)})
          .Uniform();
    });
    std::string lines;
    const int64_t first = file.lines() - begin;  // texts of this batch that are in the file
    for (int64_t i = first; i < end - begin; ++i) {
      const nlohmann::json line = {{"text", tokenizer->Decode(texts[i], {.skip_special = true})}};
      lines += line.dump() + "\n";
      tokens += static_cast<int64_t>(texts[i].size());
    }
    DSLA_RETURN_IF_ERROR(file.Append(lines, end - begin - first));
    outcome.documents = file.lines();
    const double seconds = NowSeconds() - begin_time;
    log.Progress(
        "write", static_cast<double>(end) / static_cast<double>(job.documents),
        fmt::format("{} texts  {:.0f} tokens/s", end, static_cast<double>(tokens) / seconds),
        seconds / static_cast<double>(end - before) * static_cast<double>(job.documents - end));
  }
  log.Say(fmt::format("wrote {}: {} texts, {} tokens now", job.out, file.lines(), tokens));
  outcome.finished = true;
  return outcome;
}

}  // namespace dsla
