#include "eval/recall.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "eval/fork.h"
#include "eval/generation.h"
#include "model/testing/small_models.h"

namespace dsla {
namespace {

using testing::HasSubstr;
using testing_models::SmallModel;

constexpr int64_t kVocabulary = 49152;
// Marks text: random tokens are never so low.
const std::vector<int32_t> kFiller = {1, 2, 3, 4, 5, 6, 7};

bool IsText(int32_t token) { return token < 8; }

// Where in `context` the question's prompt and its answers stand.
int Find(const RecallText& text, const RecallQuestion& question) {
  const auto at = std::search(text.context.begin(), text.context.end(), question.tokens.begin(),
                              question.tokens.end());
  return at == text.context.end() ? -1 : static_cast<int>(at - text.context.begin());
}

TEST(RecallTasksTest, ACopyComesAgainAtItsGap) {
  for (const int gap : {0, 64, 6000}) {
    SCOPED_TRACE(gap);
    const RecallTask task = CopyTask(gap);
    const RecallText text = MakeRecallText(task, kFiller, kVocabulary, 1, 0);
    ASSERT_EQ(text.questions.size(), 1u);
    const RecallQuestion& question = text.questions[0];
    const int at = Find(text, question);
    ASSERT_GE(at, 0);
    EXPECT_EQ(static_cast<int>(text.context.size()) - at, 96 + gap);
    EXPECT_EQ(static_cast<int>(text.context.size() + question.tokens.size()) + 1, task.length);
    for (size_t i = 0; i < question.tokens.size(); ++i) {
      EXPECT_FALSE(IsText(question.tokens[i]));
      if (i < 7)
        EXPECT_EQ(question.targets[i], -1);
      else
        EXPECT_EQ(question.targets[i], text.context[at + i + 1]);
    }
    EXPECT_EQ(std::count_if(text.context.begin(), text.context.end(), IsText), 16 + gap);
  }
}

TEST(RecallTasksTest, EveryPairOfATableIsAskedOnce) {
  const RecallTask task = KeyValueTask(1024);
  const RecallText text = MakeRecallText(task, kFiller, kVocabulary, 1, 3);
  const RecallQuestion& question = text.questions.at(0);
  const auto table = std::find_if_not(text.context.begin(), text.context.end(), IsText);
  ASSERT_EQ(std::count_if(table, table + 128, IsText), 0);
  EXPECT_EQ(text.context.size() + question.tokens.size() + 1, 1024u);
  std::vector<int> seen(32, 0);
  for (int i = 0; i < 32; ++i) {
    const auto asked = question.tokens.begin() + 4 * i;
    int pair = 0;
    while (pair < 32 && !std::equal(asked, asked + 2, table + 4 * pair)) ++pair;
    ASSERT_LT(pair, 32);
    ++seen[pair];
    EXPECT_EQ(question.targets[4 * i], -1);
    EXPECT_EQ(question.targets[4 * i + 1], table[4 * pair + 2]);
    EXPECT_EQ(question.targets[4 * i + 2], table[4 * pair + 3]);
    if (i < 31) {
      EXPECT_EQ(question.targets[4 * i + 3], -1);
    }
  }
  EXPECT_EQ(seen, std::vector<int>(32, 1));
}

TEST(RecallTasksTest, NeedlesStandAtTheirDepths) {
  const RecallTask task = NeedleTask(1024, {0, .5, 1});
  const RecallText text = MakeRecallText(task, kFiller, kVocabulary, 1, 0);
  ASSERT_EQ(text.questions.size(), 3u);
  EXPECT_EQ(text.context.size(), 1000u);
  const int places[] = {0, 488, 976};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Find(text, text.questions[i]), places[i]);
    EXPECT_EQ(std::count(text.questions[i].targets.begin(), text.questions[i].targets.end(), -1),
              7);
  }
  EXPECT_FALSE(NeedlesFit(1024, std::vector<double>{0, .01}));
  EXPECT_FALSE(NeedlesFit(40, std::vector<double>{0}));
}

TEST(RecallTasksTest, TextsDependOnSeedAndNumberAlone) {
  const RecallTask task = CopyTask(64);
  const auto context = [&](uint64_t seed, int index) {
    return MakeRecallText(task, kFiller, kVocabulary, seed, index).context;
  };
  EXPECT_EQ(context(1, 0), context(1, 0));
  EXPECT_NE(context(1, 0), context(1, 1));
  EXPECT_NE(context(1, 0), context(2, 0));
}

TEST(RecallTasksTest, WhatDoesNotFitIsLeftOutAndWrongNumbersAreNamed) {
  const auto tasks = RecallTasks({}, 1024);
  ASSERT_TRUE(tasks.ok());
  std::vector<std::string> titles;
  for (const RecallTask& task : *tasks) titles.push_back(task.Title());
  EXPECT_THAT(titles, testing::ElementsAre("copy, gap 64", "copy, gap 512",
                                           "key-value, 1024 tokens", "needle, 1024 tokens"));
  EXPECT_THAT(RecallTasks({}, 100).status().message(), HasSubstr("a context of 100 tokens"));
  RecallOptions options;
  options.depths = {2};
  EXPECT_THAT(RecallTasks(options, 8192).status().message(), HasSubstr("a depth of 2"));
  options = {};
  options.lengths = {63};
  EXPECT_THAT(RecallTasks(options, 8192).status().message(), HasSubstr("63 tokens is under 64"));
}

// Random weights recall nothing, so what is compared is one way of running with another: level 0 as
// a subject with level 0 itself, and a first answer written freely with the teacher-forced one.
class RecallRunTest : public testing::Test {
 protected:
  std::vector<int32_t> Filler() {
    std::vector<int32_t> filler;
    for (int32_t i = 0; i < 90; ++i) filler.push_back(i * 7 % 96);
    return filler;
  }
  SmallModel small_{"smollm2", true};
};

TEST_F(RecallRunTest, LevelZeroAsASubjectScoresAsLevelZero) {
  const Subject subjects[] = {{&small_.model(), &small_.pool(), 0},
                              {&small_.model(), &small_.pool(), 2}};
  RecallOptions options;
  options.lengths = {256};
  options.gaps = {64};
  options.depths = {0, 1};
  options.texts = 2;
  options.write = true;
  int64_t last = 0;
  const auto cells = MeasureRecall(small_.ctx(), small_.model(), small_.pool(), subjects, Filler(),
                                   options, [&](int64_t done, int64_t all) {
                                     EXPECT_EQ(all, 6);
                                     last = done;
                                   });
  ASSERT_TRUE(cells.ok()) << cells.status().message();
  EXPECT_EQ(last, 6);
  // A copy, a table, and needles as a whole and by depth.
  ASSERT_EQ(cells->size(), 5u);
  EXPECT_EQ((*cells)[0].asked, 2 * 88);
  EXPECT_EQ((*cells)[1].asked, 2 * 8 * 2);
  EXPECT_EQ((*cells)[2].asked, 2 * 2 * 16);
  EXPECT_EQ((*cells)[3].asked, 2 * 16);
  EXPECT_EQ((*cells)[4].depth, 1);
  for (const RecallCell& cell : *cells) {
    ASSERT_EQ(cell.scores.size(), 3u);
    EXPECT_EQ(cell.scores[1].accuracy.mean, cell.scores[0].accuracy.mean);
    EXPECT_EQ(cell.scores[1].switched.mean, cell.scores[0].accuracy.mean);
    EXPECT_FALSE(cell.scores[0].has_switched);
    EXPECT_TRUE(cell.scores[2].has_switched);
    for (const RecallScore& score : cell.scores) EXPECT_LE(score.exact.mean, score.accuracy.mean);
  }
  EXPECT_TRUE((*cells)[0].scores[0].has_written);
}

// A fork of a hybrid in mid-text goes on as the original does, and leaves it as it was.
TEST_F(RecallRunTest, AForkGoesOnAsTheOriginal) {
  const std::vector<int32_t> text = Filler();
  SequenceCache original = small_.NewSequence(1);
  small_.Run(original, {text.begin(), text.begin() + 64});
  auto fork = ForkSequence(small_.model(), small_.pool(), original, 64);
  ASSERT_TRUE(fork.ok()) << fork.status().message();
  const std::vector<float> forked = small_.Run(*fork, {text.begin() + 64, text.end()});
  EXPECT_EQ(small_.Run(original, {text.begin() + 64, text.end()}), forked);

  SequenceCache level0 = small_.NewSequence(0);
  small_.Run(level0, text);
  auto middle = ForkAnywhere(small_.ctx(), small_.model(), small_.pool(), level0, text, 70);
  ASSERT_TRUE(middle.ok());
  EXPECT_EQ(middle->length(), 70);
  SequenceCache alone = small_.NewSequence(0);
  const auto a = WriteGreedily(small_.ctx(), {&small_.model(), &small_.pool(), 0}, alone,
                               std::span(text).first(71), 8);
  const auto b = WriteGreedily(small_.ctx(), {&small_.model(), &small_.pool(), 0}, *middle,
                               std::span(text).subspan(70, 1), 8);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(*a, *b);
}

TEST_F(RecallRunTest, WritingAtLevelZeroIsTheSameAsLevelZero) {
  const std::vector<std::vector<int32_t>> documents = {Filler(), {3, 1, 4, 1, 5, 9, 2, 6}};
  const Subject subjects[] = {{&small_.model(), &small_.pool(), 0},
                              {&small_.model(), &small_.pool(), 2}};
  const auto report = MeasureGeneration(small_.ctx(), small_.model(), small_.pool(), subjects,
                                        documents, {.prompt = 40, .tokens = 12, .seed = 1});
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->documents, 2);
  ASSERT_EQ(report->scores.size(), 3u);
  EXPECT_EQ(report->scores[1].same.mean, 12);
  EXPECT_EQ(report->scores[1].identical.mean, 1);
  EXPECT_EQ(report->scores[1].same_switched.mean, 12);
  EXPECT_LT(report->scores[2].same.mean, 12);
  EXPECT_EQ(report->scores[1].repetition.mean, report->scores[0].repetition.mean);
  EXPECT_EQ(MeasureGeneration(small_.ctx(), small_.model(), small_.pool(), subjects, documents,
                              {.prompt = 512, .tokens = 300, .seed = 1})
                .status()
                .message(),
            "generation: a prompt of 256 and 300 tokens to write exceed the context 512");
}

TEST(GenerationTest, RepetitionIsTheShareOfRunsSeenBefore) {
  EXPECT_EQ(RepetitionRate(std::vector<int32_t>{1, 2, 3, 4}), 0);
  EXPECT_EQ(RepetitionRate(std::vector<int32_t>{1, 2, 3, 4, 5, 6}), 0);
  EXPECT_DOUBLE_EQ(RepetitionRate(std::vector<int32_t>{1, 1, 1, 1, 1, 1, 1}), 0.75);
  EXPECT_DOUBLE_EQ(RepetitionRate(std::vector<int32_t>{1, 2, 3, 4, 9, 1, 2, 3, 4}), 1. / 6);
}

}  // namespace
}  // namespace dsla
