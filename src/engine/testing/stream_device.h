// A device for tests of the engine that does what it is told in the order of the calls, as the
// stream of a GPU does, but as late as it may: when somebody waits for it. Its model computes
// nothing but remembers in its cache blocks which tokens they hold, and fails the test where it
// reads others than its sequence's.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "model/device.h"

namespace dsla::testing_engine {

// All that the token after a row depends on.
struct RowContext {
  uint64_t link = 0;  // stands for the row's token and all before it
  int32_t token = 0;
  int level = 0;
  int64_t position = 0;  // of the token after it
  const SamplingParams* sampling = nullptr;
};

struct StreamOptions {
  int most_choices = 256;  // 0: there are no steps to begin
  std::function<int32_t(const RowContext&)> choose;
  std::function<void(const char* what, int step)> note = [](const char*, int) {};  // may throw
  std::function<void(const PlacedRows& rows)> begins = [](const PlacedRows&) {};
  // While a step with prompts runs, with what was asked of AwaitNearlyDone.
  std::function<void(int step, double seconds)> nearly_done = [](int, double) {};
  // Before memory is put behind a block, or one is copied; may throw.
  std::function<void()> backs = [] {}, copies = [] {};
  // Of each sequence whose token Forward chooses.
  std::function<void(const SequenceRows& rows)> chooses = [](const SequenceRows&) {};
};

class Stream {
 public:
  void Push(std::function<void()> work) { work_.push_back(std::move(work)); }
  bool RunOne() {
    if (work_.empty()) return false;
    const auto work = std::move(work_.front());
    work_.pop_front();
    work();
    return true;
  }
  void RunAll() {
    while (RunOne()) {
    }
  }

 private:
  std::deque<std::function<void()>> work_;
};

class StreamMemory : public BlockMemory {
 public:
  StreamMemory(Stream* stream, const StreamOptions* options) : stream_(stream), options_(options) {}
  Expected<std::byte*> Reserve(int64_t bytes) override { return HostMemory().Reserve(bytes); }
  void Release(std::byte* begin, int64_t bytes) override {
    stream_->RunAll();
    HostMemory().Release(begin, bytes);
  }
  void Back(std::byte*, int64_t) override { options_->backs(); }
  void GiveBack(std::byte* block, int64_t bytes) override {
    stream_->RunAll();
    HostMemory().GiveBack(block, bytes);
  }
  void Copy(std::span<const BlockCopy> copies, int64_t bytes) override {
    options_->copies();
    const std::vector<BlockCopy> all(copies.begin(), copies.end());
    stream_->Push([=] { HostMemory().Copy(all, bytes); });
  }
  void Zero(std::span<std::byte* const> blocks, int64_t bytes) override {
    const std::vector<std::byte*> all(blocks.begin(), blocks.end());
    stream_->Push([=] { HostMemory().Zero(all, bytes); });
  }

 private:
  Stream* stream_;
  const StreamOptions* options_;
};

class StreamModel : public DeviceModel {
 public:
  StreamModel(const DeviceModelSpec& spec, Stream* stream, const StreamOptions* options)
      : L_(spec.config.L), V_(spec.config.V), stream_(stream), options_(options) {}

  static uint64_t NextLink(uint64_t link, int32_t token) {
    const uint64_t x = (link ^ static_cast<uint64_t>(token + 1)) * 0x9e3779b97f4a7c15;
    return x ^ (x >> 29);
  }

  void Forward(const CacheViews& cache, const PlacedRows& rows, const DeviceLogitsVisitor& visit,
               const LaunchedHook& launched) override {
    EXPECT_TRUE(choices_.empty()) << "steps are under way";
    options_->note("forward", ++steps_);
    Push(cache, rows);
    if (launched) launched();
    options_->note("runs", steps_);
    stream_->RunAll();
    const std::vector<int32_t> chosen = std::move(choices_.front());
    choices_.pop_front();
    for (const LogitsRow& row : rows.wanted) {
      int n = 0;
      while (rows.batch_index[n] != row.sequence) ++n;
      const SequenceRows& of = *rows.sequences[n];
      // Those of rows before the last one are asked for by nobody here.
      const int32_t token = chosen[row.sequence];
      if (of.sampling != nullptr) {
        options_->chooses(of);
        std::vector<TokenLogprob> top;  // the next likeliest is one more, and so on
        for (int i = 0; i < of.top; ++i)
          top.push_back({static_cast<int32_t>((token + i) % V_), -1.f - static_cast<float>(i)});
        const TokenChoice choice{.token = token, .logprob = -1, .top = top};
        visit({&row, 1}, nullptr, &choice);
      } else {
        std::vector<float> logits(V_, 0.f);
        logits[token] = 20;
        visit({&row, 1}, logits.data(), nullptr);
      }
    }
  }
  int most_choices() const override { return options_->most_choices; }
  void Begin(const CacheViews& cache, const PlacedRows& rows) override {
    EXPECT_LT(begun_.size(), 2u);
    options_->note("begin", ++steps_);
    options_->begins(rows);
    Push(cache, rows);
    begun_.push_back(steps_);
  }
  void AwaitNearlyDone(double seconds) override {
    EXPECT_EQ(begun_.size(), 1u);
    options_->nearly_done(begun_.back(), seconds);
  }
  void End(std::span<TokenChoice> choices) override {
    while (choices_.empty() && stream_->RunOne()) {
    }
    const std::vector<int32_t> chosen = std::move(choices_.front());
    choices_.pop_front();
    const int step = begun_.front();
    begun_.pop_front();
    options_->note("end", step);
    ASSERT_EQ(chosen.size(), choices.size());
    for (size_t i = 0; i < choices.size(); ++i) choices[i] = {.token = chosen[i]};
  }
  void Fold(const CacheViews& cache, const SequenceCache& sequence, int layer,
            int32_t slot) override {
    const auto pages = sequence.pages(layer);
    stream_->Push(
        [=, this, pages = std::vector(pages.begin(), pages.end()), last = sequence.length() - 1] {
          *Slot(cache, slot) = Page(cache, pages, last)->link;
        });
  }
  Expected<std::unique_ptr<DeviceModel>> WithAdapter(const DeviceModelSpec&) const override {
    return Unsupported("not of this test");
  }
  int64_t weight_bytes(int) const override { return 0; }
  int64_t step_bytes(int64_t) const override { return 0; }

 private:
  struct Entry {  // of one token in a page
    uint64_t link;
    int64_t token;
  };
  // A sequence's rows as the stream sees them: the host's objects may be gone by then.
  struct Rows {
    int batch_index = 0, feed = -1, level = 0, position = 0;
    std::vector<int32_t> tokens;
    std::vector<std::vector<int32_t>> pages;  // by layer; empty: it is in a slot
    std::vector<int32_t> slots;
    bool samples = false;
    SamplingParams sampling;
  };

  static uint64_t* Slot(const CacheViews& cache, int32_t slot) {
    return reinterpret_cast<uint64_t*>(cache.slots.base + slot * cache.slots.slot_bytes);
  }
  static Entry* Page(const CacheViews& cache, const std::vector<int32_t>& pages, int position) {
    const int size = cache.pages.page_size;
    auto* const page = static_cast<std::byte*>(cache.pages.k) +
                       pages.at(position / size) * cache.pages.page_stride * 2;
    return reinterpret_cast<Entry*>(page) + position % size;
  }

  void Push(const CacheViews& cache, const PlacedRows& placed) {
    std::vector<Rows> all;
    for (int n = 0; n < placed.N(); ++n) {
      const SequenceRows& of = *placed.sequences[n];
      Rows& rows = all.emplace_back();
      rows.batch_index = placed.batch_index[n];
      rows.feed = of.feed;
      rows.level = of.cache->level();
      rows.position = of.cache->length();
      rows.tokens.assign(of.tokens.begin(), of.tokens.end());
      for (int layer = 0; layer < L_; ++layer) {
        const auto pages = of.cache->pages(layer);
        rows.pages.emplace_back(pages.begin(), pages.end());
        rows.slots.push_back(of.cache->slot(layer));
      }
      rows.samples = of.sampling != nullptr;
      if (rows.samples) rows.sampling = *of.sampling;
    }
    stream_->Push([this, cache, all = std::move(all)] {
      std::vector<int32_t> chosen(all.size());
      for (const Rows& rows : all) chosen[rows.batch_index] = Run(cache, rows);
      chosen_ = chosen;
      choices_.push_back(std::move(chosen));
    });
  }

  int32_t Run(const CacheViews& cache, const Rows& rows) const {
    uint64_t link = 0;
    for (int layer = 0; layer < L_; ++layer) {
      const uint64_t last =
          rows.slots[layer] >= 0 ? *Slot(cache, rows.slots[layer]) : ReadPages(cache, rows, layer);
      if (layer == 0) link = last;
      EXPECT_EQ(last, link) << "layers stand at different tokens";
    }
    int position = rows.position;
    int32_t token = 0;
    for (const int32_t known : rows.tokens) {
      token = rows.feed < 0 ? known : chosen_.at(rows.feed);
      link = NextLink(link, token);
      for (int layer = 0; layer < L_; ++layer) {
        if (rows.slots[layer] >= 0) {
          *Slot(cache, rows.slots[layer]) = link;
        } else {
          *Page(cache, rows.pages[layer], position) = {link, token};
        }
      }
      ++position;
    }
    return options_->choose({.link = link,
                             .token = token,
                             .level = rows.level,
                             .position = position,
                             .sampling = rows.samples ? &rows.sampling : nullptr});
  }

  // The last link of what a layer's pages hold, which must be one chain.
  uint64_t ReadPages(const CacheViews& cache, const Rows& rows, int layer) const {
    uint64_t link = 0;
    for (int position = 0; position < rows.position; ++position) {
      const Entry& entry = *Page(cache, rows.pages[layer], position);
      link = NextLink(link, static_cast<int32_t>(entry.token));
      EXPECT_EQ(entry.link, link) << "position " << position;
    }
    return link;
  }

  const int L_;
  const int64_t V_;
  Stream* stream_;
  const StreamOptions* options_;
  int steps_ = 0;
  std::deque<int> begun_;                     // and not ended
  std::vector<int32_t> chosen_;               // by the last step that ran
  std::deque<std::vector<int32_t>> choices_;  // of steps that ran and nobody has asked for
};

class StreamDevice : public Device {
 public:
  explicit StreamDevice(const StreamOptions* options) : options_(options) {}
  const std::string& name() const override { return name_; }
  BlockMemory& memory() override { return memory_; }
  int64_t free_bytes() const override { return int64_t{1} << 30; }
  void Synchronize() override { stream_.RunAll(); }
  DeviceLimits Measure() override { return {}; }
  Expected<std::unique_ptr<DeviceModel>> Load(const DeviceModelSpec& spec, const TensorReader&,
                                              const ParallelRunner&) override {
    return std::unique_ptr<DeviceModel>(new StreamModel(spec, &stream_, options_));
  }

 private:
  const std::string name_ = "stream";
  const StreamOptions* options_;
  Stream stream_;
  StreamMemory memory_{&stream_, options_};
};

}  // namespace dsla::testing_engine
