#include "eval/recall.h"

#include <algorithm>
#include <utility>

#include "eval/fork.h"
#include "eval/generation.h"

namespace dsla {
namespace {

constexpr int kChunk = 512;
constexpr int kShortest = 64;  // tokens of a key-value text

struct Tally {
  double asked = 0, hits = 0;
  double answers = 0, exact = 0;
  double switched_asked = 0, switched_hits = 0;
  double writings = 0, written = 0;

  void Add(const Tally& other) {
    asked += other.asked, hits += other.hits;
    answers += other.answers, exact += other.exact;
    switched_asked += other.switched_asked, switched_hits += other.switched_hits;
    writings += other.writings, written += other.written;
  }
};

// tallies[question][subject] of one text; subject 0 is level 0.
using TextTallies = std::vector<std::vector<Tally>>;

// One text before several hybrids: each reads the context once, and every question continues it.
class TextRun {
 public:
  TextRun(const ExecContext& ctx, const HybridModel& model, CachePool& pool,
          std::span<const Subject> subjects, const RecallText& text, bool write)
      : ctx_(ctx), teacher_{&model, &pool, 0}, subjects_(subjects), text_(text), write_(write) {
    const int page_size = model.options().page_size;
    shared_ = static_cast<int>(text.context.size()) / page_size * page_size;
  }

  Expected<TextTallies> Run() {
    TextTallies tallies(text_.questions.size(), std::vector<Tally>(1 + subjects_.size()));
    DSLA_ASSIGN_OR_RETURN(const SequenceCache teacher, Read(teacher_));
    DSLA_RETURN_IF_ERROR(AnswerAll(teacher_, teacher, 0, tallies));
    for (size_t i = 0; i < subjects_.size(); ++i) {
      const Subject& subject = subjects_[i];
      {
        DSLA_ASSIGN_OR_RETURN(const SequenceCache read, Read(subject));
        DSLA_RETURN_IF_ERROR(AnswerAll(subject, read, 1 + i, tallies));
      }
      if (subject.model != teacher_.model) continue;
      for (size_t q = 0; q < text_.questions.size(); ++q) {
        DSLA_ASSIGN_OR_RETURN(SequenceCache fork, Fork(teacher_, teacher));
        DSLA_RETURN_IF_ERROR(subject.model->Raise(ctx_, *subject.pool, fork, subject.level));
        DSLA_ASSIGN_OR_RETURN(const Tally tally, Answer(subject, fork, text_.questions[q]));
        tallies[q][1 + i].switched_asked += tally.asked;
        tallies[q][1 + i].switched_hits += tally.hits;
      }
    }
    return tallies;
  }

 private:
  // The context's whole pages.
  Expected<SequenceCache> Read(const Subject& subject) {
    SequenceCache cache = subject.model->NewSequence(*subject.pool, subject.level);
    for (int begin = 0; begin < shared_; begin += kChunk) {
      const int count = std::min(kChunk, shared_ - begin);
      DSLA_RETURN_IF_ERROR(subject.model->Append(
          ctx_, *subject.pool, cache, std::span(text_.context).subspan(begin, count), 0, logits_));
    }
    return cache;
  }

  Expected<SequenceCache> Fork(const Subject& subject, const SequenceCache& read) {
    return ForkSequence(*subject.model, *subject.pool, read, shared_);
  }

  Status AnswerAll(const Subject& subject, const SequenceCache& read, size_t who,
                   TextTallies& tallies) {
    for (size_t q = 0; q < text_.questions.size(); ++q) {
      DSLA_ASSIGN_OR_RETURN(SequenceCache fork, Fork(subject, read));
      DSLA_ASSIGN_OR_RETURN(tallies[q][who], Answer(subject, fork, text_.questions[q]));
      if (!write_ || q > 0) continue;
      DSLA_ASSIGN_OR_RETURN(SequenceCache second, Fork(subject, read));
      DSLA_ASSIGN_OR_RETURN(const bool whole, Write(subject, second, text_.questions[q]));
      tallies[q][who].writings = 1;
      tallies[q][who].written = whole ? 1 : 0;
    }
    return Status::Ok();
  }

  // What is left of the context, then the question's first `count` tokens.
  std::vector<int32_t> Prompt(const RecallQuestion& question, size_t count) const {
    std::vector<int32_t> tokens(text_.context.begin() + shared_, text_.context.end());
    tokens.insert(tokens.end(), question.tokens.begin(),
                  question.tokens.begin() + static_cast<ptrdiff_t>(count));
    return tokens;
  }

  Expected<Tally> Answer(const Subject& subject, SequenceCache& cache,
                         const RecallQuestion& question) {
    const size_t count = question.tokens.size();
    DSLA_RETURN_IF_ERROR(subject.model->Append(ctx_, *subject.pool, cache, Prompt(question, count),
                                               static_cast<int>(count), logits_));
    const int64_t V = subject.model->config().V;
    Tally tally;
    bool whole = false;
    for (size_t i = 0; i < count; ++i) {
      if (question.targets[i] < 0) continue;
      const bool first = i == 0 || question.targets[i - 1] < 0;
      const bool last = i + 1 == count || question.targets[i + 1] < 0;
      const bool hit = LikeliestToken(logits_.span().subspan(static_cast<int64_t>(i) * V, V)) ==
                       question.targets[i];
      whole = (first || whole) && hit;
      tally.asked += 1, tally.hits += hit ? 1 : 0;
      if (last) tally.answers += 1, tally.exact += whole ? 1 : 0;
    }
    return tally;
  }

  // Whether the first answer comes out whole.
  Expected<bool> Write(const Subject& subject, SequenceCache& cache,
                       const RecallQuestion& question) {
    const auto asked = [](int32_t target) { return target >= 0; };
    const auto begin = std::find_if(question.targets.begin(), question.targets.end(), asked);
    const auto end = std::find_if_not(begin, question.targets.end(), asked);
    auto next = begin;
    DSLA_ASSIGN_OR_RETURN(
        const std::vector<int32_t> written,
        WriteGreedily(ctx_, subject, cache,
                      Prompt(question, static_cast<size_t>(begin - question.targets.begin()) + 1),
                      static_cast<int>(end - begin),
                      [&](int32_t token) { return token == *next++; }));
    return std::equal(begin, end, written.begin(), written.end());
  }

  const ExecContext& ctx_;
  const Subject teacher_;
  std::span<const Subject> subjects_;
  const RecallText& text_;
  bool write_;
  int shared_ = 0;
  Buffer<float> logits_;
};

RecallScore Score(const std::vector<Tally>& texts, uint64_t seed) {
  const auto share = [&](double Tally::*part, double Tally::*whole) {
    std::vector<double> values, weights;
    for (const Tally& text : texts) {
      values.push_back(text.*part);
      weights.push_back(text.*whole);
    }
    return Bootstrap(values, weights, seed);
  };
  Tally all;
  for (const Tally& text : texts) all.Add(text);
  return {.accuracy = share(&Tally::hits, &Tally::asked),
          .exact = share(&Tally::exact, &Tally::answers),
          .has_switched = all.switched_asked > 0,
          .switched = share(&Tally::switched_hits, &Tally::switched_asked),
          .has_written = all.writings > 0,
          .written = share(&Tally::written, &Tally::writings)};
}

// The questions numbered [first, last) of every text of a task.
RecallCell Cell(const RecallTask& task, double depth, const std::vector<TextTallies>& texts,
                size_t first, size_t last, uint64_t seed) {
  RecallCell cell{.task = task,
                  .depth = depth,
                  .texts = static_cast<int>(texts.size()),
                  .asked = 0,
                  .scores = {}};
  for (size_t who = 0; who < texts[0][0].size(); ++who) {
    std::vector<Tally> tallies(texts.size());
    for (size_t t = 0; t < texts.size(); ++t)
      for (size_t q = first; q < last; ++q) tallies[t].Add(texts[t][q][who]);
    if (who == 0)
      for (const Tally& tally : tallies) cell.asked += static_cast<int64_t>(tally.asked);
    cell.scores.push_back(Score(tallies, seed));
  }
  return cell;
}

}  // namespace

Expected<std::vector<RecallTask>> RecallTasks(const RecallOptions& options, int max_positions) {
  if (options.texts < 1) return InvalidArgument("recall: {} texts of each task", options.texts);
  std::vector<RecallTask> tasks;
  for (const int gap : options.gaps) {
    if (gap < 0) return InvalidArgument("recall: a gap of {} tokens", gap);
    if (CopyTask(gap).length <= max_positions) tasks.push_back(CopyTask(gap));
  }
  for (const double depth : options.depths)
    if (!(depth >= 0 && depth <= 1))
      return InvalidArgument("recall: a depth of {} is not in [0, 1]", depth);
  for (const int length : options.lengths) {
    if (length < kShortest)
      return InvalidArgument("recall: a text of {} tokens is under {}", length, kShortest);
    if (length > max_positions) continue;
    tasks.push_back(KeyValueTask(length));
    if (NeedlesFit(length, options.depths)) tasks.push_back(NeedleTask(length, options.depths));
  }
  if (tasks.empty())
    return InvalidArgument("recall: no gap or length fits a context of {} tokens", max_positions);
  return tasks;
}

Expected<std::vector<RecallCell>> MeasureRecall(
    const ExecContext& ctx, const HybridModel& model, CachePool& pool,
    std::span<const Subject> subjects, std::span<const int32_t> filler,
    const RecallOptions& options, const std::function<void(int64_t done, int64_t all)>& progress) {
  DSLA_ASSIGN_OR_RETURN(const std::vector<RecallTask> tasks,
                        RecallTasks(options, model.max_positions()));
  const int64_t all = static_cast<int64_t>(tasks.size()) * options.texts;
  int64_t done = 0;
  std::vector<RecallCell> cells;
  for (const RecallTask& task : tasks) {
    std::vector<TextTallies> texts;
    for (int index = 0; index < options.texts; ++index) {
      const RecallText text = MakeRecallText(task, filler, model.config().V, options.seed, index);
      TextRun run(ctx, model, pool, subjects, text, options.write);
      DSLA_ASSIGN_OR_RETURN(TextTallies tallies, run.Run());
      texts.push_back(std::move(tallies));
      if (progress) progress(++done, all);
    }
    const size_t questions = texts[0].size();
    cells.push_back(Cell(task, -1, texts, 0, questions, options.seed));
    for (size_t q = 0; q < questions && task.kind == RecallKind::kNeedle; ++q)
      cells.push_back(Cell(task, task.depths[q], texts, q, q + 1, options.seed));
  }
  return cells;
}

}  // namespace dsla
