#include "server/log.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/async.h>
#include <spdlog/async_logger.h>
#include <spdlog/sinks/base_sink.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <ctime>
#include <mutex>
#include <nlohmann/json.hpp>

namespace dsla {
namespace {

constexpr size_t kQueueLines = 8192;
constexpr std::array<const char*, 4> kLevelNames = {"debug", "info", "warning", "error"};

int OpenForAppending(const std::string& path) {
  return open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0640);
}

// Writes lines to a descriptor. Never throws: a full disk must not end the server.
class LineSink : public spdlog::sinks::base_sink<std::mutex> {
 public:
  LineSink(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  ~LineSink() override {
    if (!path_.empty()) close(fd_);
  }

  void Reopen() {
    if (path_.empty()) return;
    const int fd = OpenForAppending(path_);
    if (fd < 0) return;  // the old file goes on
    const std::lock_guard lock(mutex_);
    close(fd_);
    fd_ = fd;
  }
  int64_t lost() const { return lost_.load(); }

  // Until so many lines have come, or for a while.
  void WaitFor(int64_t lines) {
    std::unique_lock lock(mutex_);
    arrived_.wait_for(lock, std::chrono::seconds(2), [&] { return lines_ >= lines; });
  }

 protected:
  void sink_it_(const spdlog::details::log_msg& message) override {
    ++lines_;
    arrived_.notify_all();
    std::string line(message.payload.data(), message.payload.size());
    line += '\n';
    std::string_view rest = line;
    while (!rest.empty()) {
      const ssize_t written = write(fd_, rest.data(), rest.size());
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) {
        lost_.fetch_add(1);
        return;
      }
      rest.remove_prefix(static_cast<size_t>(written));
    }
  }
  void flush_() override {}

 private:
  int fd_;  // guarded by the base's mutex
  const std::string path_;
  std::atomic<int64_t> lost_{0};
  std::condition_variable arrived_;
  int64_t lines_ = 0;  // guarded by the base's mutex
};

std::string TimeText(double seconds) {
  const auto whole = static_cast<std::time_t>(seconds);
  std::tm utc{};
  gmtime_r(&whole, &utc);
  return fmt::format("{:04d}-{:02d}-{:02d}T{:02d}:{:02d}:{:02d}.{:03d}Z", utc.tm_year + 1900,
                     utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec,
                     static_cast<int>((seconds - std::floor(seconds)) * 1000));
}

// What a JSON line has beside its fields, which a field of that name must not replace.
bool IsOfEveryLine(std::string_view name) {
  return name == "time" || name == "level" || name == "event";
}

// As it may stand after "name=": quoted where it holds more than plain characters.
std::string TextValue(const std::string& value) {
  bool plain = !value.empty();
  for (const char c : value) plain &= c > 0x20 && c < 0x7f && c != '"' && c != '=' && c != '\\';
  if (plain) return value;
  return nlohmann::json(value).dump(-1, ' ', /*ensure_ascii=*/true,
                                    nlohmann::json::error_handler_t::replace);
}

}  // namespace

Expected<LogLevel> ParseLogLevel(std::string_view name) {
  for (size_t i = 0; i < kLevelNames.size(); ++i) {
    if (name == kLevelNames[i]) return static_cast<LogLevel>(i);
  }
  return InvalidArgument("--log-level: '{}' is not one of debug, info, warning, error", name);
}

std::string Log::Format(bool json, double seconds, LogLevel level, std::string_view event,
                        const std::vector<LogField>& fields) {
  const char* level_name = kLevelNames[static_cast<size_t>(level)];
  if (json) {
    nlohmann::ordered_json line = {
        {"time", TimeText(seconds)}, {"level", level_name}, {"event", event}};
    for (const LogField& field : fields) {
      const std::string name = IsOfEveryLine(field.name) ? "field_" + field.name : field.name;
      std::visit([&](const auto& value) { line[name] = value; }, field.value);
    }
    return line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  }
  std::string line = fmt::format("{} {:<7} {}", TimeText(seconds), level_name, event);
  for (const LogField& field : fields) {
    line += fmt::format(" {}=", field.name);
    if (const auto* text = std::get_if<std::string>(&field.value)) {
      line += TextValue(*text);
    } else if (const auto* number = std::get_if<double>(&field.value)) {
      line += fmt::format("{:.6g}", *number);
    } else if (const auto* integer = std::get_if<int64_t>(&field.value)) {
      line += fmt::format("{}", *integer);
    } else {
      line += std::get<bool>(field.value) ? "true" : "false";
    }
  }
  return line;
}

struct Log::Impl {
  LogOptions options;
  std::shared_ptr<LineSink> sink;
  std::shared_ptr<spdlog::details::thread_pool> pool;
  std::shared_ptr<spdlog::async_logger> logger;
  std::atomic<int64_t> lines{0};
};

Log::Log(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Log::~Log() {
  impl_->pool.reset();    // joins, after the queue is empty
  impl_->logger.reset();  // lines had it, too: the last one is let go of here
}

Expected<std::unique_ptr<Log>> Log::Open(const LogOptions& options) {
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  int fd = STDERR_FILENO;
  if (!options.file.empty()) {
    fd = OpenForAppending(options.file);
    if (fd < 0)
      return InvalidArgument("--log-file: cannot write '{}': {}", options.file,
                             std::strerror(errno));
  }
  impl->sink = std::make_shared<LineSink>(fd, options.file);
  impl->pool = std::make_shared<spdlog::details::thread_pool>(kQueueLines, 1);
  impl->logger = std::make_shared<spdlog::async_logger>(
      "dsla", impl->sink, impl->pool, spdlog::async_overflow_policy::overrun_oldest);
  impl->logger->set_level(spdlog::level::trace);
  return std::unique_ptr<Log>(new Log(std::move(impl)));
}

void Log::Write(LogLevel level, std::string_view event, const std::vector<LogField>& fields) {
  if (level < impl_->options.level) return;
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  const std::string line = Format(impl_->options.json, now, level, event, fields);
  impl_->lines.fetch_add(1);
  // As it is: nothing in a line may be taken for a format.
  impl_->logger->log(spdlog::source_loc{}, spdlog::level::info, spdlog::string_view_t(line));
}

void Log::Flush() {
  impl_->sink->WaitFor(impl_->lines.load() - static_cast<int64_t>(impl_->pool->overrun_counter()));
}

void Log::Reopen() { impl_->sink->Reopen(); }

int64_t Log::lost() const {
  return impl_->sink->lost() + static_cast<int64_t>(impl_->pool->overrun_counter());
}

}  // namespace dsla
