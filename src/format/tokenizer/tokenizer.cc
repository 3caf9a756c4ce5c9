#include "format/tokenizer/tokenizer.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "format/tokenizer/added_tokens.h"
#include "format/tokenizer/bpe.h"
#include "format/tokenizer/build_bpe.h"
#include "format/tokenizer/normalize.h"
#include "format/tokenizer/pre_tokenize.h"
#include "format/tokenizer/utf8.h"
#include "format/tokenizer/vocabulary.h"

namespace dsla {
namespace {

constexpr size_t kMaxTextBytes = size_t{64} << 20;  // normalized it still has 32-bit positions
constexpr size_t kMaxKeptBytes = size_t{8} << 20;   // larger buffers are not kept between calls
constexpr size_t kMaxKeptScratches = 64;

struct Scratch {
  PreTokenizer::Scratch words;
  Bpe::Scratch bpe;
  std::vector<AddedTokenMatcher::Segment> raw, normalized;
  std::string text;  // the input with ill-formed parts replaced
  std::string chunk;
};

// Scratch memory for as many callers as there are at once; each keeps a warm word cache from call
// to call.
class ScratchPool {
 public:
  std::unique_ptr<Scratch> Take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Scratch>();
    std::unique_ptr<Scratch> scratch = std::move(free_.back());
    free_.pop_back();
    return scratch;
  }
  void Give(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard lock(mutex_);
    if (free_.size() < kMaxKeptScratches) free_.push_back(std::move(scratch));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

// The added tokens that are looked for in the text as it is, or in the normalized text by their own
// normalized form.
std::vector<AddedToken> Pick(const std::vector<AddedToken>& added, bool normalized,
                             const Normalizer& normalizer) {
  std::vector<AddedToken> picked;
  for (AddedToken token : added) {
    if (token.normalized != normalized) continue;
    if (normalized) normalizer.Apply(&token.text);
    if (!token.text.empty()) picked.push_back(std::move(token));
  }
  return picked;
}

std::vector<AddedToken> PickControl(const std::vector<AddedToken>& added) {
  std::vector<AddedToken> picked;
  for (const AddedToken& token : added) {
    if (token.special && !token.text.empty()) picked.push_back(token);
  }
  return picked;
}

}  // namespace

struct Tokenizer::Impl {
  Impl(TokenizerData description, Vocabulary checked, BuiltBpe built, PreTokenizer cutter)
      : data(std::move(description)),
        vocabulary(std::move(checked)),
        bpe(std::move(built.bpe)),
        cut_at_spaces(built.cut_at_spaces),
        normalizer(std::move(data.normalizer)),
        pre_tokenizer(std::move(cutter)),
        raw_added(Pick(vocabulary.added(), false, normalizer)),
        normalized_added(Pick(vocabulary.added(), true, normalizer)),
        control(PickControl(vocabulary.added())) {}

  Status EncodeText(std::string_view text, const EncodeOptions& options, Scratch* s,
                    std::vector<int32_t>* out) const;
  Status EncodeChunk(std::string_view chunk, bool at_start, Scratch* s,
                     std::vector<int32_t>* out) const;
  void EncodeWord(std::string_view word, Scratch* s, std::vector<int32_t>* out) const;

  TokenizerData data;  // without its tokens, which are in `vocabulary`
  Vocabulary vocabulary;
  Bpe bpe;
  bool cut_at_spaces;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  AddedTokenMatcher raw_added, normalized_added;
  AddedTokenMatcher control;  // by the texts as they are
  mutable ScratchPool scratches;
};

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

Expected<std::unique_ptr<Tokenizer>> Tokenizer::Create(TokenizerData data) {
  auto pre_tokenizer = PreTokenizer::Create(std::move(data.pre_tokenizer));
  if (!pre_tokenizer.ok()) {
    return Error(pre_tokenizer.status().code(), "{}: {}", data.source,
                 pre_tokenizer.status().message());
  }
  for (const NormalizerStep& step : data.normalizer) {
    if (step.kind == NormalizerStep::Kind::kReplace && step.pattern.empty()) {
      return DataLoss("{}: a Replace normalizer has an empty pattern", data.source);
    }
  }
  DSLA_ASSIGN_OR_RETURN(Vocabulary vocabulary, Vocabulary::Create(&data));
  DSLA_ASSIGN_OR_RETURN(BuiltBpe built, BuildBpe(data, vocabulary));
  data.merges = {};
  data.scores = {};
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::make_unique<const Impl>(
      std::move(data), std::move(vocabulary), std::move(built), std::move(pre_tokenizer).value())));
}

void Tokenizer::Impl::EncodeWord(std::string_view word, Scratch* s,
                                 std::vector<int32_t>* out) const {
  if (!cut_at_spaces) {
    bpe.Encode(word, &s->bpe, out);
    return;
  }
  const auto mark = [&](size_t at) { return word.substr(at, kSpaceMark.size()) == kSpaceMark; };
  for (size_t begin = 0; begin < word.size();) {
    size_t end = begin;
    while (mark(end)) end += kSpaceMark.size();
    end = std::min(word.find(kSpaceMark, end), word.size());
    const size_t before = out->size();
    bpe.Encode(word.substr(begin, end - begin), &s->bpe, out);
    // Unknown characters fuse across the cut, as it is not the border of a word.
    const int32_t unk = bpe.symbols().fuse_unk ? bpe.symbols().unk_id : -1;
    if (begin > 0 && unk >= 0 && out->size() > before && (*out)[before] == unk &&
        (*out)[before - 1] == unk) {
      out->erase(out->begin() + static_cast<ptrdiff_t>(before));
    }
    begin = end;
  }
}

Status Tokenizer::Impl::EncodeChunk(std::string_view chunk, bool at_start, Scratch* s,
                                    std::vector<int32_t>* out) const {
  s->words.now.text.assign(chunk);
  DSLA_RETURN_IF_ERROR(pre_tokenizer.Run(at_start, &s->words));
  const std::string_view text = s->words.now.text;
  for (const PreTokenizer::Span& span : s->words.now.spans) {
    EncodeWord(text.substr(span.begin, span.end - span.begin), s, out);
  }
  return Status::Ok();
}

Status Tokenizer::Impl::EncodeText(std::string_view text, const EncodeOptions& options, Scratch* s,
                                   std::vector<int32_t>* out) const {
  raw_added.Cut(text, options.parse_special, &s->raw);
  for (const auto& outer : s->raw) {
    if (outer.id >= 0) {
      out->push_back(outer.id);
      continue;
    }
    s->chunk.assign(text.substr(outer.begin, outer.end - outer.begin));
    normalizer.Apply(&s->chunk);
    normalized_added.Cut(s->chunk, options.parse_special, &s->normalized);
    for (const auto& inner : s->normalized) {
      if (inner.id >= 0) {
        out->push_back(inner.id);
        continue;
      }
      const std::string_view chunk =
          std::string_view(s->chunk).substr(inner.begin, inner.end - inner.begin);
      DSLA_RETURN_IF_ERROR(
          EncodeChunk(chunk, !options.continues && outer.begin == 0 && inner.begin == 0, s, out));
    }
  }
  return Status::Ok();
}

Expected<std::vector<int32_t>> Tokenizer::Encode(std::string_view text,
                                                 const EncodeOptions& options) const {
  const TokenizerData& data = impl_->data;
  if (text.size() > kMaxTextBytes) {
    return InvalidArgument("text of {} bytes is longer than the {} that can be tokenized at once",
                           text.size(), kMaxTextBytes);
  }
  std::vector<int32_t> ids;
  if (!options.add_bos.has_value()) {
    ids = data.prefix;
  } else if (*options.add_bos) {
    if (!data.bos_id)
      return InvalidArgument("{}: the tokenizer has no BOS token to add", data.source);
    ids.push_back(*data.bos_id);
  }
  std::unique_ptr<Scratch> scratch = impl_->scratches.Take();
  if (!utf8::IsValid(text)) {
    scratch->text.clear();
    utf8::AppendReplaced(text, &scratch->text);
    text = scratch->text;
  }
  const Status status = impl_->EncodeText(text, options, scratch.get(), &ids);
  if (text.size() <= kMaxKeptBytes) impl_->scratches.Give(std::move(scratch));
  if (!status.ok()) return Error(status.code(), "{}: {}", data.source, status.message());
  if (!options.add_bos.has_value()) ids.insert(ids.end(), data.suffix.begin(), data.suffix.end());
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, const DecodeOptions& options) const {
  IncrementalDecoder decoder(*this, options);
  std::string out;
  for (const int32_t id : ids) decoder.Append(id, /*shown=*/false, &out);
  return out + decoder.Finish();
}

int32_t Tokenizer::vocab_size() const { return impl_->vocabulary.size(); }
std::optional<int32_t> Tokenizer::bos_id() const { return impl_->data.bos_id; }
std::optional<int32_t> Tokenizer::eos_id() const { return impl_->data.eos_id; }
std::optional<int32_t> Tokenizer::pad_id() const { return impl_->data.pad_id; }
std::optional<int32_t> Tokenizer::unk_id() const { return impl_->data.unk_id; }
const std::vector<int32_t>& Tokenizer::prefix() const { return impl_->data.prefix; }
const std::vector<int32_t>& Tokenizer::suffix() const { return impl_->data.suffix; }

std::string_view Tokenizer::TokenText(int32_t id) const {
  return id >= 0 && id < vocab_size() ? std::string_view(impl_->vocabulary.text(id))
                                      : std::string_view();
}
std::string_view Tokenizer::TokenBytes(int32_t id) const {
  return id >= 0 && id < vocab_size() ? std::string_view(impl_->vocabulary.bytes(id))
                                      : std::string_view();
}
bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < vocab_size() && impl_->vocabulary.special(id);
}
std::optional<int32_t> Tokenizer::TokenToId(std::string_view text) const {
  return impl_->vocabulary.Find(text);
}

std::vector<Tokenizer::Spelling> Tokenizer::FindControlTokens(std::string_view text) const {
  std::vector<AddedTokenMatcher::Segment> segments;
  impl_->control.Cut(text, /*parse_special=*/true, &segments);
  std::vector<Spelling> found;
  for (const auto& segment : segments) {
    if (segment.id >= 0) found.push_back({segment.id, segment.begin, segment.end});
  }
  return found;
}

IncrementalDecoder::IncrementalDecoder(const Tokenizer& tokenizer, const DecodeOptions& options)
    : tokenizer_(tokenizer), options_(options) {}

void IncrementalDecoder::Append(int32_t id, bool shown, std::string* out) {
  if (options_.skip_special && !shown && tokenizer_.IsSpecial(id)) return;
  std::string_view bytes = tokenizer_.TokenBytes(id);
  if (bytes.empty()) return;
  if (at_start_) {
    at_start_ = false;
    if (tokenizer_.impl_->data.strip_leading_space && !options_.continues && bytes[0] == ' ')
      bytes.remove_prefix(1);
  }
  if (!held_.empty()) {
    held_.append(bytes);
    bytes = held_;
  }
  const size_t left = utf8::AppendComplete(bytes, out);
  held_ = std::string(bytes.substr(bytes.size() - left));
}

std::string IncrementalDecoder::Push(int32_t id, bool shown) {
  std::string out;
  Append(id, shown, &out);
  return out;
}

std::string IncrementalDecoder::Finish() {
  std::string out;
  utf8::AppendReplaced(held_, &out);
  held_.clear();
  at_start_ = true;
  return out;
}

}  // namespace dsla
