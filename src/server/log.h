// Structured log: an event's name and fields, as text or as JSON lines, to standard error or a
// file.
//
// Write formats on the caller's thread and hands the line to a writer thread; when that one cannot
// keep up, the oldest lines are given up rather than the server be held. A line that cannot be
// written (disk full) is lost, nothing else. Thread-safe.
//
// At level info no line holds text of a prompt or a reply.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/status.h"

namespace dsla {

enum class LogLevel { kDebug, kInfo, kWarning, kError };
Expected<LogLevel> ParseLogLevel(std::string_view name);  // "debug", "info", "warning", "error"

struct LogField {
  std::string name;
  std::variant<std::string, int64_t, double, bool> value;
};

struct LogOptions {
  std::string file;  // empty: standard error
  bool json = false;
  LogLevel level = LogLevel::kInfo;
};

class Log {
 public:
  static Expected<std::unique_ptr<Log>> Open(const LogOptions& options);
  ~Log();  // writes what is left

  void Write(LogLevel level, std::string_view event, const std::vector<LogField>& fields = {});
  void Flush();          // returns when all that was written before is out
  void Reopen();         // the file by its name, after it was moved away; thread-safe
  int64_t lost() const;  // lines that could not be written

  // One line, without its end. `seconds`: since 1970. In JSON a field named time, level or event,
  // as what every line has, becomes field_time and so on.
  static std::string Format(bool json, double seconds, LogLevel level, std::string_view event,
                            const std::vector<LogField>& fields);

 private:
  struct Impl;
  explicit Log(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsla
