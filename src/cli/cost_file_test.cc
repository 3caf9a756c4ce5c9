#include "cli/cost_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

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

  std::string Text() const {
    std::ifstream in(file_.path);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  const CostModel model_ =
      CostModel::FromCoefficients(2, {0.1, 2, 3, 4}, {5, 6, 7, 8}, {9, 1.0 / 3});
  const CostRecord record_{.cost = {.model = model_,
                                    .usual = {.prefill = 2, .decode = 0.3, .fold = 1},
                                    .measured_at = 1700000000}};
  fs::path folder_;
  CostFile file_;
};

TEST_F(CostFileTest, GivesBackWhatWasWritten) {
  EXPECT_EQ(file_.Read().status().code(), StatusCode::kNotFound);
  EXPECT_TRUE(file_.CheckWritable().ok());
  EXPECT_TRUE(fs::is_empty(folder_)) << "asking leaves nothing";
  ASSERT_TRUE(file_.Write(record_).ok());
  const auto read = file_.Read();
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->cost.model.ToJson(), model_.ToJson());
  EXPECT_EQ(read->cost.usual.decode, 0.3);
  EXPECT_EQ(read->cost.measured_at, 1700000000);
  EXPECT_FALSE(read->doubted);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1) << "and no part of it";
}

TEST_F(CostFileTest, NothingElseIsTaken) {
  ASSERT_TRUE(file_.Write(record_).ok());
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
  EXPECT_FALSE(other.Write(record_).ok());
}

TEST_F(CostFileTest, WhatIsKnownOfAMeasurementMayBeMissingButNotWrong) {
  const auto put = [&](const std::string& more) {
    Put(fmt::format(R"({{"measured_with": "this", "cost_model": {}{}}})", model_.ToJson(), more));
  };
  put("");
  const auto read = file_.Read();
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->cost.measured_at, 0);
  EXPECT_EQ(read->cost.usual.prefill, 1);
  for (const char* more :
       {R"(, "measured_at": "today")", R"(, "measured_at": -1)", R"(, "measured_at": 1e300)",
        R"(, "measured_at": 18446744073709551615)", R"(, "usual": 1)", R"(, "usual": {})",
        R"(, "usual": {"prefill": 1, "decode": 0, "fold": 1})",
        R"(, "doubted": {"prefill": 1, "decode": "1", "fold": 1})"}) {
    put(more);
    EXPECT_EQ(file_.Read().status().code(), StatusCode::kDataLoss) << more;
  }
}

TEST_F(CostFileTest, ADoubtIsOfTheModelThatWasServed) {
  const CostFactors factors{.prefill = 4, .decode = 3, .fold = 1};
  EXPECT_TRUE(file_.Doubt(model_, factors).ok());
  EXPECT_FALSE(fs::exists(file_.path)) << "there is nothing to doubt";
  Put("{");
  EXPECT_TRUE(file_.Doubt(model_, factors).ok());
  EXPECT_EQ(Text(), "{") << "which is measured anew as it is";

  // A server beside this one has measured anew.
  ASSERT_TRUE(file_.Write({.cost = {.model = model_.Scaled(factors), .usual = {}}}).ok());
  const std::string anew = Text();
  EXPECT_TRUE(file_.Doubt(model_, factors).ok());
  EXPECT_EQ(Text(), anew);

  ASSERT_TRUE(file_.Write(record_).ok());
  EXPECT_TRUE(file_.Doubt(model_, factors).ok());
  const auto read = file_.Read();
  ASSERT_TRUE(read.ok() && read->doubted) << read.status().message();
  EXPECT_EQ(read->doubted->prefill, 4);
  EXPECT_EQ(read->cost.model.ToJson(), model_.ToJson()) << "the rest stays";
  EXPECT_EQ(read->cost.usual.decode, 0.3);
  EXPECT_TRUE(file_.Doubt(model_, {}).ok());
  EXPECT_EQ(file_.Read()->doubted->prefill, 4) << "the first to doubt says why";
}

TEST_F(CostFileTest, WhatCannotBeMarkedStays) {
  ASSERT_TRUE(file_.Write(record_).ok());
  const std::string text = Text();
  // A directory where the new file would be written: root, too, cannot.
  const fs::path part = fmt::format("{}.tmp.{}", file_.path, getpid());
  fs::create_directory(part);
  const Status status = file_.Doubt(model_, {.prefill = 4, .decode = 1, .fold = 1});
  EXPECT_THAT(status.message(), HasSubstr("cannot write '" + file_.path));
  EXPECT_EQ(Text(), text);
  fs::remove(part);
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
