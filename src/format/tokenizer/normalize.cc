#include "format/tokenizer/normalize.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>

#include <algorithm>

#include "base/check.h"

namespace dsla {
namespace {

const icu::Normalizer2& Form(NormalizerStep::Kind kind) {
  UErrorCode error = U_ZERO_ERROR;
  const icu::Normalizer2* form = nullptr;
  switch (kind) {
    case NormalizerStep::Kind::kNfd:
      form = icu::Normalizer2::getNFDInstance(error);
      break;
    case NormalizerStep::Kind::kNfkc:
      form = icu::Normalizer2::getNFKCInstance(error);
      break;
    case NormalizerStep::Kind::kNfkd:
      form = icu::Normalizer2::getNFKDInstance(error);
      break;
    default:
      form = icu::Normalizer2::getNFCInstance(error);
  }
  DSLA_CHECK(U_SUCCESS(error));  // the data is part of the library
  return *form;
}

void ApplyForm(NormalizerStep::Kind kind, std::string* text) {
  // Every form leaves ASCII alone.
  if (std::all_of(text->begin(), text->end(),
                  [](char c) { return static_cast<unsigned char>(c) < 0x80; }))
    return;
  const icu::Normalizer2& form = Form(kind);
  UErrorCode error = U_ZERO_ERROR;
  std::string out;
  out.reserve(text->size());
  icu::StringByteSink<std::string> sink(&out);
  form.normalizeUTF8(0, icu::StringPiece(text->data(), static_cast<int32_t>(text->size())), sink,
                     nullptr, error);
  DSLA_CHECK(U_SUCCESS(error));
  *text = std::move(out);
}

}  // namespace

void AppendWithReplaced(std::string_view text, std::string_view from, std::string_view to,
                        std::string* out) {
  size_t pos = 0;
  for (size_t hit; (hit = text.find(from, pos)) != text.npos; pos = hit + from.size()) {
    out->append(text.substr(pos, hit - pos)).append(to);
  }
  out->append(text.substr(pos));
}

void Normalize(std::span<const NormalizerStep> steps, std::string* text) {
  for (const NormalizerStep& step : steps) {
    if (text->empty()) return;
    if (step.kind == NormalizerStep::Kind::kPrepend) {
      text->insert(0, step.content);
    } else if (step.kind == NormalizerStep::Kind::kReplace) {
      std::string out;
      out.reserve(text->size() + text->size() / 2);
      AppendWithReplaced(*text, step.pattern, step.content, &out);
      *text = std::move(out);
    } else {
      ApplyForm(step.kind, text);
    }
  }
}

}  // namespace dsla
