#include "base/memory_limit.h"

#include <filesystem>
#include <fstream>

namespace dsla {
namespace {

namespace fs = std::filesystem;

// The smaller of two limits, 0 standing for none.
int64_t Least(int64_t a, int64_t b) { return a == 0 || (b != 0 && b < a) ? b : a; }

// The least number in the files `name` from the group's folder up to the mount. In a container the
// group may be named as the host sees it: only the mount's own folder is there then.
int64_t LeastOnPath(const fs::path& mount, fs::path group, const char* name) {
  int64_t least = 0;
  while (true) {
    std::ifstream file(mount / group / name);  // "max" where there is no limit
    int64_t limit = 0;
    if (file >> limit && limit > 0) least = Least(least, limit);
    if (group.empty()) return least;
    group = group.parent_path();
  }
}

}  // namespace

int64_t CgroupMemoryLimit(const std::string& root) {
  const fs::path mount = fs::path(root) / "sys/fs/cgroup";
  std::ifstream groups(fs::path(root) / "proc/self/cgroup");
  int64_t least = 0;
  // Lines of number:controllers:path; version 2 names no controllers.
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const fs::path group = fs::path(line.substr(second + 1)).relative_path();
    if (controllers.empty()) {
      least = Least(least, LeastOnPath(mount, group, "memory.max"));
    } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
      least = Least(least, LeastOnPath(mount / "memory", group, "memory.limit_in_bytes"));
    }
  }
  return least;
}

}  // namespace dsla
