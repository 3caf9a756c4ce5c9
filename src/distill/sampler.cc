#include "distill/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace dsla {
namespace {

constexpr int kLongLength = 2048;  // sequences from here on may be kept inside one document
constexpr int kMinGap = 64;

}  // namespace

int64_t TokenBatch::Counted(int begin) const {
  const std::vector<int32_t>& ends = all_rows > 0 ? all_counts : counts;
  const int64_t n = all_rows > 0 ? all_rows : rows, first = std::max(begin, count_from);
  if (ends.empty()) return n * std::max<int64_t>(0, length - first);
  int64_t counted = 0;
  for (const int32_t end : ends) counted += std::max<int64_t>(0, end - first);
  return counted;
}

TokenBatch PartOf(const TokenBatch& batch, int part, int parts) {
  DSLA_CHECK(batch.all_rows == 0 && batch.rows >= parts && part >= 0 && part < parts);
  const int64_t first = int64_t{batch.rows} * part / parts,
                last = int64_t{batch.rows} * (part + 1) / parts;
  TokenBatch own = batch;
  own.rows = static_cast<int>(last - first);
  own.all_rows = batch.rows;
  own.all_counts = batch.counts;
  const auto cut = [&](std::vector<int32_t>& values, int64_t row) {
    if (!values.empty()) values = {values.begin() + first * row, values.begin() + last * row};
  };
  cut(own.ids, batch.length);
  cut(own.targets, batch.length);
  cut(own.counts, 1);
  return own;
}

const char* Name(Recall kind) {
  switch (kind) {
    case Recall::kCopy:
      return "copy";
    case Recall::kKeyValue:
      return "key-value";
    case Recall::kNeedle:
      return "needle";
  }
  return "?";
}

std::string BatchOrigin::text() const {
  return fmt::format("{} x {} tokens, {}", rows, length, recall ? "recall" : "text");
}

Sampler::Sampler(const TokenFile& tokens, int64_t first, int64_t last, SamplerOptions options)
    : tokens_(&tokens),
      options_(std::move(options)),
      first_(first),
      last_(last),
      begin_(tokens.begin(first)),
      end_(tokens.end(last - 1)) {
  for (const int length : options_.lengths) {
    LongDocuments found;
    int64_t starts = 0;
    for (int64_t i = first_; i < last_ && length >= kLongLength; ++i) {
      if (tokens.length(i) < length) continue;
      starts += tokens.length(i) - length + 1;
      found.documents.push_back(i);
      found.starts.push_back(starts);
    }
    long_documents_.push_back(std::move(found));
  }
}

Expected<Sampler> Sampler::Create(const TokenFile& tokens, int64_t first, int64_t last,
                                  const SamplerOptions& options) {
  DSLA_CHECK(!options.lengths.empty() && options.lengths.size() == options.length_shares.size());
  const int longest = *std::max_element(options.lengths.begin(), options.lengths.end());
  const int64_t count = last > first ? tokens.end(last - 1) - tokens.begin(first) : 0;
  if (count < longest)
    return InvalidArgument("'{}' has {} tokens here, fewer than one sequence of {}", tokens.path(),
                           count, longest);
  return Sampler(tokens, first, last, options);
}

int32_t Sampler::AnyToken(Random& random) const {
  // Neither control tokens, which stand first, nor the rarest, which stand last.
  const int64_t V = tokens_->vocabulary();
  return static_cast<int32_t>(random.Between(V / 49, std::max<int64_t>(V / 49, V * 4 / 5 - 1)));
}

void Sampler::Fill(Random& random, int32_t* ids, int length) const {
  if (length <= 0) return;
  // Text that is shorter than what is asked comes again from its start.
  for (int done = 0; done < length;) {
    const int64_t n = std::min<int64_t>(length - done, end_ - begin_);
    const int64_t at = random.Between(begin_, end_ - n);
    tokens_->Read(at, {ids + done, static_cast<size_t>(n)});
    done += static_cast<int>(n);
  }
}

int Sampler::RowText(Random& random, int32_t* ids, int length) const {
  if (options_.separate) {
    // A document by its share of the tokens, from a random place if it is longer than the row.
    const int64_t at = random.Between(begin_, end_ - 1);
    int64_t low = first_, high = last_ - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (tokens_->end(middle) > at)
        high = middle;
      else
        low = middle + 1;
    }
    const int64_t n = std::min<int64_t>(length, tokens_->length(low));
    const int64_t from = random.Between(tokens_->begin(low), tokens_->end(low) - n);
    tokens_->Read(from, {ids, static_cast<size_t>(n)});
    std::fill(ids + n, ids + length, 0);
    return static_cast<int>(n);
  }
  const auto which = std::find(options_.lengths.begin(), options_.lengths.end(), length);
  if (which != options_.lengths.end()) {
    const LongDocuments& found = long_documents_[which - options_.lengths.begin()];
    if (!found.documents.empty() && random.Uniform() < options_.long_share) {
      const int64_t pick = random.Between(0, found.starts.back() - 1);
      const auto i =
          std::upper_bound(found.starts.begin(), found.starts.end(), pick) - found.starts.begin();
      const int64_t offset = pick - (i == 0 ? 0 : found.starts[i - 1]);
      tokens_->Read(tokens_->begin(found.documents[i]) + offset,
                    {ids, static_cast<size_t>(length)});
      return length;
    }
  }
  Fill(random, ids, length);
  return length;
}

TokenBatch Sampler::Text(Stream stream, uint64_t index, int rows, int length) const {
  TokenBatch batch;
  batch.rows = rows, batch.length = length;
  batch.ids.resize(static_cast<size_t>(rows) * length);
  for (int row = 0; row < rows; ++row) {
    Random random(options_.seed,
                  {static_cast<uint64_t>(stream), index, 1, static_cast<uint64_t>(row)});
    const int n = RowText(random, batch.ids.data() + static_cast<size_t>(row) * length, length);
    batch.counts.push_back(n);
  }
  if (std::all_of(batch.counts.begin(), batch.counts.end(), [&](int n) { return n == length; }))
    batch.counts.clear();
  return batch;
}

void Sampler::Copy(Random& random, int32_t* ids, int32_t* targets, int length, int gap) const {
  const int m = std::min(96, length / 4), room = length - 2 * m;
  if (gap == 0) {
    const double low = std::min(kMinGap, room), high = std::max<double>(low, room);
    gap = static_cast<int>(low * std::pow(high / low, random.Uniform()));
  }
  gap = std::clamp(gap, 0, room);
  Fill(random, ids, length);
  // Anywhere in the row, so that not only its start is ever copied.
  const int at = static_cast<int>(random.Between(0, room - gap)), again = at + m + gap;
  for (int i = 0; i < m; ++i) ids[at + i] = ids[again + i] = AnyToken(random);
  // The first tokens of the copy say what is to be copied.
  for (int i = std::min(8, m / 2); i + 1 < m; ++i) targets[again + i] = ids[again + i + 1];
}

void Sampler::KeyValue(Random& random, int32_t* ids, int32_t* targets, int length) const {
  constexpr int kKey = 2, kValue = 2, kPair = kKey + kValue;
  const int pairs = std::clamp(length / 32, 1, 32), block = pairs * kPair;
  Fill(random, ids, length);
  std::vector<int32_t> table(block);
  for (int32_t& id : table) id = AnyToken(random);
  std::vector<int> order(pairs);
  std::iota(order.begin(), order.end(), 0);
  for (int i = pairs - 1; i > 0; --i) std::swap(order[i], order[random.Between(0, i)]);
  const int last = length - 2 * block;  // where the table may begin at most
  const int at = static_cast<int>(random.Between(0, std::max(0, last)));
  std::copy(table.begin(), table.end(), ids + at);
  int32_t* const questions = ids + length - block;
  int32_t* const answers = targets + length - block;
  for (int i = 0; i < pairs; ++i) {
    std::copy_n(table.data() + order[i] * kPair, kPair, questions + i * kPair);
    for (int j = 0; j < kValue; ++j)
      answers[i * kPair + kKey - 1 + j] = questions[i * kPair + kKey + j];
  }
}

void Sampler::Needle(Random& random, int32_t* ids, int32_t* targets, int length) const {
  const int needle = std::min(24, length / 4), prompt = needle / 3;
  Fill(random, ids, length);
  const int end = length - needle;
  const int at = static_cast<int>(random.Between(0, std::max(0, end - needle)));
  for (int i = 0; i < needle; ++i) ids[at + i] = ids[end + i] = AnyToken(random);
  for (int i = prompt - 1; i + 1 < needle; ++i) targets[end + i] = ids[end + i + 1];
}

TokenBatch Sampler::RecallBatch(Recall kind, Stream stream, uint64_t index, int rows, int length,
                                int gap) const {
  TokenBatch batch;
  batch.rows = rows, batch.length = length;
  batch.ids.resize(static_cast<size_t>(rows) * length);
  batch.targets.assign(batch.ids.size(), -1);
  for (int row = 0; row < rows; ++row) {
    Random random(options_.seed, {static_cast<uint64_t>(stream), index,
                                  2 + static_cast<uint64_t>(kind), static_cast<uint64_t>(row)});
    int32_t* const ids = batch.ids.data() + static_cast<size_t>(row) * length;
    int32_t* const targets = batch.targets.data() + static_cast<size_t>(row) * length;
    if (kind == Recall::kCopy) Copy(random, ids, targets, length, gap);
    if (kind == Recall::kKeyValue) KeyValue(random, ids, targets, length);
    if (kind == Recall::kNeedle) Needle(random, ids, targets, length);
  }
  return batch;
}

BatchOrigin Sampler::Origin(Stream stream, int64_t step) const {
  Random random(options_.seed, {static_cast<uint64_t>(stream), static_cast<uint64_t>(step)});
  const double all =
      std::accumulate(options_.length_shares.begin(), options_.length_shares.end(), 0.0);
  double pick = random.Uniform() * all;
  size_t i = 0;
  while (i + 1 < options_.lengths.size() && pick >= options_.length_shares[i])
    pick -= options_.length_shares[i++];
  BatchOrigin origin;
  origin.length = options_.lengths[i];
  origin.rows = std::max(1, options_.tokens_per_step / origin.length);
  origin.recall = random.Uniform() < options_.recall_share;
  return origin;
}

TokenBatch Sampler::Training(Stream stream, int64_t step) const {
  const BatchOrigin origin = Origin(stream, step);
  const auto index = static_cast<uint64_t>(step);
  if (!origin.recall) return Text(stream, index, origin.rows, origin.length);
  Random random(options_.seed, {static_cast<uint64_t>(stream), index, 100});
  // Copies half the time: they come in all distances.
  const uint64_t kind = random.Below(4);
  return RecallBatch(kind < 2    ? Recall::kCopy
                     : kind == 2 ? Recall::kKeyValue
                                 : Recall::kNeedle,
                     stream, index, origin.rows, origin.length);
}

}  // namespace dsla
