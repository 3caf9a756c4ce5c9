// Batches of training and validation tokens. Each is a function of the seed, the stream and the
// step alone, so a resumed run sees the batches that an uninterrupted one would have seen.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "distill/network.h"
#include "distill/token_file.h"

namespace dsla {

// What keeps batches of different uses apart.
enum class Stream : uint64_t { kStart = 1, kAlign, kOrder, kChain, kEvaluate };

enum class Recall { kCopy, kKeyValue, kNeedle };
const char* Name(Recall kind);

struct SamplerOptions {
  uint64_t seed = 1;
  std::vector<int> lengths;  // tokens; with shares of the steps
  std::vector<double> length_shares;
  int tokens_per_step = 0;
  bool separate = false;  // one document a row, the rest padding; else rows run over document ends
  double long_share = 0, recall_share = 0;
};

// Where the batch of a step comes from, for messages.
struct BatchOrigin {
  int length = 0, rows = 0;
  bool recall = false;

  std::string text() const;  // "16 x 1024 tokens, recall"
};

class Sampler {
 public:
  // Draws from documents [first, last) of `tokens`, which must outlive it. kInvalidArgument if they
  // hold fewer tokens than the longest sequence.
  static Expected<Sampler> Create(const TokenFile& tokens, int64_t first, int64_t last,
                                  const SamplerOptions& options);

  TokenBatch Training(Stream stream, int64_t step) const;
  BatchOrigin Origin(Stream stream, int64_t step) const;

  // `rows` sequences of text; `index` tells one batch of a stream from another.
  TokenBatch Text(Stream stream, uint64_t index, int rows, int length) const;
  // Text in which something must be recalled. With gap 0 the distance is drawn, log-uniform from 64
  // to what fits; else the repeated part of a copy begins so many tokens behind the first's end.
  TokenBatch RecallBatch(Recall kind, Stream stream, uint64_t index, int rows, int length,
                         int gap = 0) const;

 private:
  Sampler(const TokenFile& tokens, int64_t first, int64_t last, SamplerOptions options);
  int RowText(Random& random, int32_t* ids,
              int length) const;                              // tokens that are none of the padding
  void Fill(Random& random, int32_t* ids, int length) const;  // any text
  int32_t AnyToken(Random& random) const;
  void Copy(Random& random, int32_t* ids, int32_t* targets, int length, int gap) const;
  void KeyValue(Random& random, int32_t* ids, int32_t* targets, int length) const;
  void Needle(Random& random, int32_t* ids, int32_t* targets, int length) const;

  const TokenFile* tokens_;
  SamplerOptions options_;
  int64_t first_, last_;  // documents
  int64_t begin_, end_;   // tokens
  // For each length the documents that hold a whole sequence, and how many starts they offer up to
  // and including each.
  struct LongDocuments {
    std::vector<int64_t> documents, starts;
  };
  std::vector<LongDocuments> long_documents_;
};

}  // namespace dsla
