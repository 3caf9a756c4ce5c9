// Checkpoints, the log, plots and the report.
#include "distill/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/plot.h"
#include "distill/report.h"
#include "distill/run_log.h"
#include "format/testing/file_writers.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::TempDir;

Checkpoint Example(int64_t step, size_t size) {
  Checkpoint checkpoint;
  checkpoint.stage = "align";
  checkpoint.settings = "a = 1\n";
  checkpoint.step = step;
  checkpoint.steps = 100;
  checkpoint.tokens = step * 10;
  checkpoint.seconds = 1.5;
  for (size_t i = 0; i < size; ++i) {
    checkpoint.state.values.push_back(static_cast<float>(i) * 0.1f);
    checkpoint.state.first.push_back(static_cast<float>(step));
    checkpoint.state.second.push_back(1e-20f * static_cast<float>(i));
  }
  checkpoint.state.steps = {1, 2, 3};
  return checkpoint;
}

std::vector<fs::path> Shards(const std::string& folder) {
  std::vector<fs::path> shards;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors") shards.push_back(entry.path());
  return shards;
}

TEST(CheckpointTest, RoundTripInShardsOfAtMost15MiB) {
  TempDir folder;
  const Checkpoint saved = Example(7, 3'000'000);  // 36 MB
  ASSERT_TRUE(SaveCheckpoint(saved, folder.path(), "align").ok());
  const auto shards = Shards(folder.path());
  EXPECT_EQ(shards.size(), 3u);
  for (const auto& shard : shards) EXPECT_LE(fs::file_size(shard), 15u << 20);
  const auto loaded = LoadCheckpoint(folder.path(), "align");
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  ASSERT_TRUE(loaded->has_value());
  const Checkpoint& read = **loaded;
  EXPECT_EQ(read.state.values, saved.state.values);
  EXPECT_EQ(read.state.first, saved.state.first);
  EXPECT_EQ(read.state.second, saved.state.second);
  EXPECT_EQ(read.state.steps, saved.state.steps);
  EXPECT_EQ(read.step, 7);
  EXPECT_EQ(read.tokens, 70);
  EXPECT_EQ(read.settings, "a = 1\n");
  EXPECT_FALSE(read.done);
}

TEST(CheckpointTest, ANewOneReplacesTheOldAndItsShards) {
  TempDir folder;
  ASSERT_TRUE(SaveCheckpoint(Example(1, 10), folder.path(), "align").ok());
  ASSERT_TRUE(SaveCheckpoint(Example(1, 10), folder.path(), "chain").ok());
  ASSERT_TRUE(SaveCheckpoint(Example(2, 10), folder.path(), "align").ok());
  EXPECT_EQ((*LoadCheckpoint(folder.path(), "align"))->step, 2);
  EXPECT_EQ(Shards(folder.path()).size(), 2u);
  EXPECT_EQ((*LoadCheckpoint(folder.path(), "chain"))->step, 1);
  EXPECT_FALSE(LoadCheckpoint(folder.path(), "init")->has_value());
}

TEST(CheckpointTest, WhatDoesNotFitTogetherIsRefused) {
  TempDir folder;
  ASSERT_TRUE(SaveCheckpoint(Example(1, 10), folder.path(), "align").ok());
  const std::string shard = Shards(folder.path())[0].filename();
  const std::string good = testing::ReadFile(folder.path() + "/" + shard);
  std::string flipped = good;
  flipped[flipped.size() - 2] ^= 1;
  folder.Write(shard, flipped);
  EXPECT_THAT(LoadCheckpoint(folder.path(), "align").status().message(),
              HasSubstr("is not the file that"));
  fs::remove(folder.path() + "/" + shard);
  EXPECT_THAT(LoadCheckpoint(folder.path(), "align").status().message(), HasSubstr(shard));
  folder.Write("align.json", "{\"version\": 1}");
  EXPECT_THAT(LoadCheckpoint(folder.path(), "align").status().message(), HasSubstr("align.json"));
  folder.Write("align.json", "{\"version\": 2}");
  EXPECT_THAT(LoadCheckpoint(folder.path(), "align").status().message(), HasSubstr("version"));
}

TEST(FilesTest, AFailedWriteLeavesTheOldFile) {
  TempDir folder;
  const std::string path = folder.path() + "/a.json";
  ASSERT_TRUE(WriteFileAtomically(path, "old").ok());
  // Every write to /dev/full fails for want of space; the temporary file is made to be it.
  fs::create_symlink("/dev/full", fmt::format("{}.tmp.{}", path, ::getpid()));
  EXPECT_EQ(WriteFileAtomically(path, "new").message(),
            fmt::format("cannot write '{}': No space left on device", path));
  EXPECT_EQ(testing::ReadFile(path), "old");
  ASSERT_TRUE(WriteFileAtomically(path, "new").ok());  // nothing is in the way afterwards
  EXPECT_EQ(testing::ReadFile(path), "new");
}

TEST(RunLogTest, ALineCutShortIsLeftOut) {
  TempDir folder;
  const std::string path = folder.path() + "/log.jsonl";
  {
    auto log = RunLog::Open(path, true);
    ASSERT_TRUE(log.ok());
    ASSERT_TRUE(log->Event("step", {{"loss", 0.5}}).ok());
  }
  folder.Write("log.jsonl", testing::ReadFile(path) + "{\"event\": \"st");
  const auto events = ReadLog(path);
  ASSERT_TRUE(events.ok());
  ASSERT_EQ(events->size(), 1u);
  EXPECT_EQ((*events)[0]["loss"], 0.5);
  EXPECT_THAT(RunLog::Open("/dev/full/x", true).status().message(), HasSubstr("/dev/full/x"));
  auto full = RunLog::Open("/dev/full", true);
  ASSERT_TRUE(full.ok());
  EXPECT_EQ(full->Event("step").message(), "cannot write '/dev/full': No space left on device");
}

TEST(RunLogTest, Durations) {
  EXPECT_EQ(FormatDuration(12.4), "12 s");
  EXPECT_EQ(FormatDuration(247), "4:07");
  EXPECT_EQ(FormatDuration(3909), "1:05:09");
  EXPECT_EQ(FormatDuration(SecondsLeft(10, 0.25)), "30 s");
  EXPECT_EQ(FormatDuration(SecondsLeft(10, 0)), "?") << "nothing is done yet";
  EXPECT_EQ(FormatDuration(std::numeric_limits<double>::infinity()), "?");
}

TEST(PlotTest, LinesMarkersAndEscapedText) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::string svg =
      LinePlot({{"a<b", {{0, 1}, {1, 100}, {2, nan}, {3, -1}, {4, 10}}, true}},
               {.title = "T & U", .x_label = "x", .y_label = "y", .log_y = true});
  EXPECT_THAT(svg, HasSubstr("T &amp; U"));
  EXPECT_THAT(svg, HasSubstr("a&lt;b"));
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
  size_t circles = 0;
  for (size_t at = svg.find("<circle"); at != std::string::npos; at = svg.find("<circle", at + 1))
    ++circles;
  EXPECT_EQ(circles, 3u);  // what is not positive has no place on a log scale
  EXPECT_THAT(LinePlot({}, {}), HasSubstr("</svg>"));
}

TEST(ReportTest, SaysWhatTheRunFolderHolds) {
  TempDir folder;
  folder.Write("log.jsonl",
               R"({"event":"run","model":"m.gguf","fingerprint":"0123456789abcdef0","parameters":7}
{"event":"step","stage":"align","step":10,"steps":20,"tokens":100,"loss":0.9,"lr":1,"tokens_per_second":5}
{"event":"step","stage":"align","step":20,"steps":20,"tokens":200,"loss":0.25,"lr":1,"tokens_per_second":9}
{"event":"done","stage":"align","seconds":61}
)");
  folder.Write("order.json",
               R"({"method":"greedy","ladder":[1,0],"single":[0.2,0.1],"cost":[0.1,0.4]})");
  folder.Write("evaluate.json", R"({"documents":3,"length":64,"packed":false,"held_out":true,
"switched_at":32,"levels":[{"level":1,"kl":0.0123,"kl_low":0.01,"kl_high":0.02,"agreement":0.95,
"kl_suffix":0.02,"kl_switched":0.021}],"recall":[{"kind":"copy","length":80,"gap":16,
"teacher":0.5,"levels":[{"level":1,"accuracy":0.4}]}]})");
  const Status status = WriteReport(folder.path());
  ASSERT_TRUE(status.ok()) << status.message();
  const std::string markdown = testing::ReadFile(folder.path() + "/report.md");
  // Cells are padded to columns; what they say is what matters here.
  std::string rows;
  for (const char c : markdown) {
    if (c != ' ' || rows.empty() || rows.back() != ' ') rows += c;
  }
  EXPECT_THAT(rows, HasSubstr("| 1 | 0.0123 | 0.0100 to 0.0200 | 0.950 | 0.0200 | 0.0210 |"));
  EXPECT_THAT(rows, HasSubstr("| align | 20 of 20 | 200 | 1:01 | 9 | 0.2500 |"));
  EXPECT_THAT(rows, HasSubstr("| copy, gap 16 | 80 | 0.500 | 0.400 |"));
  EXPECT_THAT(markdown, HasSubstr("Least sensitive first: 1 0."));
  const std::string html = testing::ReadFile(folder.path() + "/report.html");
  EXPECT_THAT(html, HasSubstr("<svg"));
  EXPECT_THAT(html, Not(HasSubstr("http-equiv")));
  folder.Write("evaluate.json", "{}");
  EXPECT_FALSE(WriteReport(folder.path()).ok());
  EXPECT_FALSE(WriteReport(folder.path() + "/none").ok());
}

}  // namespace
}  // namespace dsla
