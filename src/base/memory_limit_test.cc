#include "base/memory_limit.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace dsla {
namespace {

namespace fs = std::filesystem;

class MemoryLimitTest : public ::testing::Test {
 protected:
  MemoryLimitTest()
      : root_(fs::path(::testing::TempDir()) / "dsla_memory_limit" /
              ::testing::UnitTest::GetInstance()->current_test_info()->name()) {
    fs::remove_all(root_);
  }
  void Write(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text << "\n";
  }
  int64_t Limit() { return CgroupMemoryLimit(root_.string()); }

  const fs::path root_;
};

TEST_F(MemoryLimitTest, NoneWithoutGroups) {
  EXPECT_EQ(Limit(), 0);
  Write("proc/self/cgroup", "nonsense\n0:\n:");
  EXPECT_EQ(Limit(), 0);
}

// A service of systemd, or a group within a container's.
TEST_F(MemoryLimitTest, TheLeastOnThePathOfVersion2) {
  Write("proc/self/cgroup", "0::/system.slice/dsla.service");
  Write("sys/fs/cgroup/system.slice/dsla.service/memory.max", "max");
  Write("sys/fs/cgroup/system.slice/memory.max", "max");
  EXPECT_EQ(Limit(), 0);
  Write("sys/fs/cgroup/system.slice/memory.max", "3000");
  EXPECT_EQ(Limit(), 3000);
  Write("sys/fs/cgroup/system.slice/dsla.service/memory.max", "2000");
  EXPECT_EQ(Limit(), 2000);
  Write("sys/fs/cgroup/memory.max", "1000");
  EXPECT_EQ(Limit(), 1000);
  Write("sys/fs/cgroup/system.slice/other.service/memory.max", "10");
  EXPECT_EQ(Limit(), 1000);
}

TEST_F(MemoryLimitTest, AContainersOwnRoot) {
  Write("proc/self/cgroup", "0::/");
  Write("sys/fs/cgroup/memory.max", "4000");
  EXPECT_EQ(Limit(), 4000);
}

TEST_F(MemoryLimitTest, Version1) {
  Write("proc/self/cgroup",
        "9:name=systemd:/\n4:cpu,memory:/a/b\n3:memory_other:/c\n1:cpu:/\n0::/");
  Write("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712");
  EXPECT_EQ(Limit(), 9223372036854771712);
  Write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "5000");
  EXPECT_EQ(Limit(), 5000);
  Write("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "10");
  EXPECT_EQ(Limit(), 5000);
}

// The host's name of the group, which is not below the container's mount.
TEST_F(MemoryLimitTest, AGroupThatIsNotThere) {
  Write("proc/self/cgroup", "4:memory:/docker/0123");
  Write("sys/fs/cgroup/memory/memory.limit_in_bytes", "7000");
  EXPECT_EQ(Limit(), 7000);
}

}  // namespace
}  // namespace dsla
