#include "format/tokenizer/normalize.h"

#include <unicode/bytestream.h>

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace dsla {
namespace {

using Kind = NormalizerStep::Kind;

const icu::Normalizer2* Form(Kind kind) {
  UErrorCode error = U_ZERO_ERROR;
  const icu::Normalizer2* form = nullptr;
  if (kind == Kind::kNfc) form = icu::Normalizer2::getNFCInstance(error);
  if (kind == Kind::kNfd) form = icu::Normalizer2::getNFDInstance(error);
  if (kind == Kind::kNfkc) form = icu::Normalizer2::getNFKCInstance(error);
  if (kind == Kind::kNfkd) form = icu::Normalizer2::getNFKDInstance(error);
  DSLA_CHECK(U_SUCCESS(error));  // the data is part of the library
  return form;
}

std::string ApplyForm(const icu::Normalizer2& form, const std::string& text) {
  UErrorCode error = U_ZERO_ERROR;
  std::string out;
  out.reserve(text.size());
  icu::StringByteSink<std::string> sink(&out);
  form.normalizeUTF8(0, icu::StringPiece(text.data(), static_cast<int32_t>(text.size())), sink,
                     nullptr, error);
  DSLA_CHECK(U_SUCCESS(error));
  return out;
}

bool IsAscii(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

}  // namespace

Normalizer::Normalizer(std::vector<NormalizerStep> steps)
    : steps_(std::move(steps)), forms_(steps_.size()) {
  for (size_t i = 0; i < steps_.size(); ++i) {
    const icu::Normalizer2* form = Form(steps_[i].kind);
    if (form == nullptr) continue;
    if (!known_) {
      UErrorCode error = U_ZERO_ERROR;
      auto known = std::make_unique<icu::UnicodeSet>(u"[:age=9.0:]", error);
      DSLA_CHECK(U_SUCCESS(error));
      known->freeze();
      known_ = std::move(known);
    }
    forms_[i] = std::make_unique<const icu::FilteredNormalizer2>(*form, *known_);
  }
}

void Normalizer::Apply(std::string* text) const {
  for (size_t i = 0; i < steps_.size() && !text->empty(); ++i) {
    if (steps_[i].kind == Kind::kPrepend) {
      text->insert(0, steps_[i].content);
    } else if (steps_[i].kind == Kind::kReplace) {
      std::string out;
      out.reserve(text->size() + text->size() / 2);
      AppendWithReplaced(*text, steps_[i].pattern, steps_[i].content, &out);
      *text = std::move(out);
    } else if (!IsAscii(*text)) {  // every form leaves ASCII alone
      *text = ApplyForm(*forms_[i], *text);
    }
  }
}

void AppendWithReplaced(std::string_view text, std::string_view from, std::string_view to,
                        std::string* out) {
  size_t pos = 0;
  for (size_t hit; (hit = text.find(from, pos)) != text.npos; pos = hit + from.size()) {
    out->append(text.substr(pos, hit - pos)).append(to);
  }
  out->append(text.substr(pos));
}

}  // namespace dsla
