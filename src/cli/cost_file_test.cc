#include "cli/cost_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>

namespace dsla {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class CostFileTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) / "cost_file_test";
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    file_ = {.path = folder_ / "cost.json", .measured_with = "this"};
  }

  void Put(const std::string& text) const { std::ofstream(file_.path) << text; }

  const CostModel model_ = CostModel::FromCoefficients(2, {1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10});
  fs::path folder_;
  CostFile file_;
};

TEST_F(CostFileTest, GivesBackWhatWasWritten) {
  EXPECT_EQ(file_.Read().status().code(), StatusCode::kNotFound);
  EXPECT_TRUE(file_.CheckWritable().ok());
  EXPECT_TRUE(fs::is_empty(folder_)) << "asking leaves nothing";
  ASSERT_TRUE(file_.Write(model_).ok());
  const auto read = file_.Read();
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->ToJson(), model_.ToJson());
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1) << "and no part of it";
}

TEST_F(CostFileTest, NothingElseIsTaken) {
  ASSERT_TRUE(file_.Write(model_).ok());
  CostFile other = file_;
  other.measured_with = "that";
  EXPECT_EQ(other.Read().status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(other.Read().status().message(),
            "'" + file_.path + "' was measured with this, which is not what is served: that");
  for (const char* text : {"", "{", "[]", "{}", R"({"measured_with": "this"})",
                           R"({"measured_with": "this", "cost_model": {"layers": 2}})"}) {
    Put(text);
    EXPECT_EQ(file_.Read().status().code(), StatusCode::kDataLoss) << text;
    EXPECT_THAT(file_.Read().status().message(), HasSubstr(file_.path));
  }
  other.path = folder_ / "none" / "cost.json";
  EXPECT_THAT(other.CheckWritable().message(), HasSubstr("cannot write"));
  EXPECT_FALSE(other.Write(model_).ok());
}

TEST_F(CostFileTest, KeptByWhatItWasMeasuredWith) {
  std::map<std::string, std::string> variables;
  const auto path = [&](const char* with) {
    return KeptCostPath(with, [&](const char* name) {
      const auto it = variables.find(name);
      return it == variables.end() ? nullptr : it->second.c_str();
    });
  };
  EXPECT_EQ(path("a"), "");
  variables["HOME"] = "/home/me";
  EXPECT_THAT(path("a"), testing::StartsWith("/home/me/.cache/dsla/cost-"));
  EXPECT_EQ(path("a"), path("a"));
  EXPECT_NE(path("a"), path("b"));
  variables["XDG_CACHE_HOME"] = "relative";
  EXPECT_THAT(path("a"), testing::StartsWith("/home/me/")) << "which the specification ignores";
  variables["XDG_CACHE_HOME"] = "/var/cache";
  EXPECT_THAT(path("a"), testing::StartsWith("/var/cache/dsla/cost-"));
}

}  // namespace
}  // namespace dsla
