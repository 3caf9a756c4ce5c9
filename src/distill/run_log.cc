#include "distill/run_log.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "base/clock.h"
#include "base/mapped_file.h"

namespace dsla {

Expected<RunLog> RunLog::Open(const std::string& path, bool quiet) {
  RunLog log;
  log.path_ = path;
  log.quiet_ = quiet;
  log.terminal_ = ::isatty(STDERR_FILENO) != 0;
  log.file_ = std::fopen(path.c_str(), "a");
  if (log.file_ == nullptr)
    return Error(StatusCode::kInternal, "cannot write '{}': {}", path, std::strerror(errno));
  return log;
}

RunLog::RunLog(RunLog&& other) noexcept
    : path_(std::move(other.path_)),
      file_(std::exchange(other.file_, nullptr)),
      quiet_(other.quiet_),
      terminal_(other.terminal_),
      line_open_(std::exchange(other.line_open_, false)),
      last_(other.last_) {}

RunLog::~RunLog() {
  if (file_ == nullptr) return;
  ClearLine();
  std::fclose(file_);
}

Status RunLog::Event(const std::string& event, nlohmann::json fields) {
  fields["event"] = event;
  fields["time"] = std::chrono::duration_cast<std::chrono::seconds>(
                       std::chrono::system_clock::now().time_since_epoch())
                       .count();
  const std::string line = fields.dump() + "\n";
  // A line that a full disk cut short is no JSON; the next one begins a line of its own.
  if (std::fwrite(line.data(), 1, line.size(), file_) != line.size() || std::fflush(file_) != 0)
    return Error(StatusCode::kInternal, "cannot write '{}': {}", path_, std::strerror(errno));
  return Status::Ok();
}

void RunLog::ClearLine() {
  if (line_open_) fmt::print(stderr, "\r\033[K");
  line_open_ = false;
}

void RunLog::Say(const std::string& line) {
  if (quiet_) return;
  ClearLine();
  fmt::print(stderr, "{}\n", line);
}

void RunLog::Progress(const std::string& stage, double share, const std::string& detail,
                      double seconds_left) {
  if (quiet_) return;
  const double now = NowSeconds();
  if (now - last_ < (terminal_ ? 0.2 : 10)) return;
  last_ = now;
  share = std::clamp(share, 0.0, 1.0);
  constexpr int kWidth = 24;
  const int filled = static_cast<int>(share * kWidth);
  const std::string line = fmt::format("{:8} [{}{}] {:3.0f}%  {}  {} left", stage,
                                       std::string(filled, '#'), std::string(kWidth - filled, '.'),
                                       share * 100, detail, FormatDuration(seconds_left));
  if (terminal_) {
    fmt::print(stderr, "\r{}\033[K", line);
    line_open_ = true;
  } else {
    fmt::print(stderr, "{}\n", line);
  }
}

Expected<std::vector<nlohmann::json>> ReadLog(const std::string& path) {
  DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, size_t{1} << 30));
  std::vector<nlohmann::json> events;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    auto json = nlohmann::json::parse(text.begin() + static_cast<ptrdiff_t>(begin),
                                      text.begin() + static_cast<ptrdiff_t>(end), nullptr,
                                      /*allow_exceptions=*/false);
    begin = end + 1;
    // A line can be cut short by a kill or a full disk; the run went on after it.
    if (json.is_object() && json.contains("event")) events.push_back(std::move(json));
  }
  return events;
}

std::string FormatDuration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  const auto s = static_cast<int64_t>(std::llround(seconds));
  if (s < 60) return fmt::format("{} s", s);
  if (s < 3600) return fmt::format("{}:{:02}", s / 60, s % 60);
  return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
}

double SecondsLeft(double elapsed, double share) {
  if (share <= 0) return std::numeric_limits<double>::infinity();
  return elapsed * (1 / share - 1);
}

}  // namespace dsla
