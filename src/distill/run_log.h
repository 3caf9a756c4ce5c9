// The log of a run: JSON lines in a file, and progress for people on standard error.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/status.h"

namespace dsla {

class RunLog {
 public:
  // Appends to `path`. With `quiet` nothing goes to standard error. Errors: kInternal.
  static Expected<RunLog> Open(const std::string& path, bool quiet);
  RunLog(RunLog&&) noexcept;
  ~RunLog();

  // One line, with the event's name and the Unix time. kInternal if it cannot be written.
  Status Event(const std::string& event, nlohmann::json fields = nlohmann::json::object());
  // A line for people.
  void Say(const std::string& line);
  // How far a stage is: on a terminal one line that is written over, else a line every 10 seconds.
  void Progress(const std::string& stage, double share, const std::string& detail,
                double seconds_left);

 private:
  RunLog() = default;
  void ClearLine();

  std::string path_;
  std::FILE* file_ = nullptr;
  bool quiet_ = false, terminal_ = false, line_open_ = false;
  double last_ = 0;
};

// The objects of a log, in order. A last line that was cut short is left out. kDataLoss, kNotFound.
Expected<std::vector<nlohmann::json>> ReadLog(const std::string& path);

std::string FormatDuration(double seconds);  // "1:05:09", "4:07", "12 s"; "?" where not finite
// What is left of a stage after `elapsed` seconds, `share` of it done; not finite before any is.
double SecondsLeft(double elapsed, double share);

}  // namespace dsla
