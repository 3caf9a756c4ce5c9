#include "format/tokenizer/pre_tokenize.h"

#include <utility>

#include "format/tokenizer/normalize.h"
#include "format/tokenizer/utf8.h"

namespace dsla {
namespace {

using Span = PreTokenizer::Span;
using Step = PreTokenizerStep;
using Words = PreTokenizer::Words;

void Add(size_t begin, size_t end, std::vector<Span>* out) {
  if (begin < end) out->push_back({begin, end});
}

void CutDigits(std::string_view text, Span span, bool individual, std::vector<Span>* out) {
  size_t from = span.begin;  // of what is not yet in *out
  bool in_number = false;
  for (size_t i = span.begin; i < span.end;) {
    const utf8::Decoded d = utf8::Decode(text.substr(i));
    const bool numeric = utf8::IsNumeric(d.code_point);
    if (numeric != in_number || (numeric && individual)) {
      Add(from, i, out);
      from = i;
      in_number = numeric;
    }
    i += static_cast<size_t>(d.length);
  }
  Add(from, span.end, out);
}

// A match, or what lies between two: together they cover a piece of text, in order.
struct Part {
  Span span;
  bool delimiter;
};

// Which neighbouring parts are one word.
void Join(const std::vector<Part>& parts, Step::Behavior behavior, std::vector<Span>* out) {
  const size_t first = out->size();
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    const bool previous =
        i > 0 && parts[i - 1].delimiter;  // whether the part before is a delimiter
    bool extend = false;
    switch (behavior) {
      case Step::Behavior::kRemoved:
        if (part.delimiter) continue;
        break;
      case Step::Behavior::kIsolated:
        break;
      case Step::Behavior::kMergedWithPrevious:
        extend = part.delimiter && !previous;
        break;
      case Step::Behavior::kMergedWithNext:
        extend = !part.delimiter && previous;
        break;
      case Step::Behavior::kContiguous:
        extend = part.delimiter == previous;
        break;
    }
    if (extend && out->size() > first) {
      out->back().end = part.span.end;
    } else {
      out->push_back(part.span);
    }
  }
}

void Metaspace(const Step& step, bool at_start, const Words& in, Words* out) {
  for (const Span& span : in.spans) {
    const size_t begin = out->text.size();
    const std::string_view piece =
        std::string_view(in.text).substr(span.begin, span.end - span.begin);
    const bool wanted = step.prepend == Step::Prepend::kAlways ||
                        (step.prepend == Step::Prepend::kFirst && at_start && span.begin == 0);
    if (wanted && piece[0] != ' ' && !piece.starts_with(step.replacement))
      out->text += step.replacement;
    AppendWithReplaced(piece, " ", step.replacement, &out->text);
    size_t from = begin;
    if (step.split) {
      for (size_t hit; (hit = out->text.find(step.replacement, from + 1)) != std::string::npos;
           from = hit) {
        Add(from, hit, &out->spans);
      }
    }
    Add(from, out->text.size(), &out->spans);
  }
}

void PrefixSpace(const Words& in, Words* out) {
  for (const Span& span : in.spans) {
    const size_t begin = out->text.size();
    if (in.text[span.begin] != ' ') out->text += ' ';
    out->text.append(in.text, span.begin, span.end - span.begin);
    Add(begin, out->text.size(), &out->spans);
  }
}

void MatchLiteral(std::string_view pattern, std::string_view text, std::vector<Span>* matches) {
  size_t pos = 0;
  for (size_t hit; (hit = text.find(pattern, pos)) != text.npos; pos = hit + pattern.size()) {
    matches->push_back({hit, hit + pattern.size()});
  }
}

// The parts of a piece that begins at `offset` and has the given matches.
void MakeParts(const std::vector<Span>& matches, size_t size, size_t offset, bool invert,
               std::vector<Part>* parts) {
  parts->clear();
  size_t pos = 0;
  for (const Span& match : matches) {
    if (pos < match.begin) parts->push_back({{offset + pos, offset + match.begin}, invert});
    parts->push_back({{offset + match.begin, offset + match.end}, !invert});
    pos = match.end;
  }
  if (pos < size) parts->push_back({{offset + pos, offset + size}, invert});
}

}  // namespace

Expected<PreTokenizer> PreTokenizer::Create(std::vector<PreTokenizerStep> steps) {
  PreTokenizer result;
  result.patterns_.resize(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].kind != Step::Kind::kSplit) continue;
    if (steps[i].pattern.empty()) return DataLoss("a Split pre-tokenizer has an empty pattern");
    if (steps[i].literal) continue;
    DSLA_ASSIGN_OR_RETURN(result.patterns_[i], Pattern::Compile(steps[i].pattern));
  }
  result.steps_ = std::move(steps);
  return result;
}

Status PreTokenizer::MatchRegex(const Pattern& pattern, std::string_view text, Scratch* scratch,
                                std::vector<Span>* matches) {
  size_t pos = 0;
  while (pos < text.size()) {
    DSLA_ASSIGN_OR_RETURN(const bool found, scratch->matcher.Find(pattern, text, pos));
    if (!found) break;
    const size_t begin = scratch->matcher.begin(), end = scratch->matcher.end();
    if (end > begin) matches->push_back({begin, end});
    // An empty match cuts nothing here: no expression of a known family has any.
    pos = end > begin           ? end
          : begin < text.size() ? begin + static_cast<size_t>(utf8::LengthOf(text[begin]))
                                : text.size();
  }
  return Status::Ok();
}

Status PreTokenizer::Split(size_t index, Scratch* scratch) const {
  const Step& step = steps_[index];
  std::vector<Span> matches;
  std::vector<Part> parts;
  for (const Span& span : scratch->now.spans) {
    const std::string_view piece =
        std::string_view(scratch->now.text).substr(span.begin, span.end - span.begin);
    matches.clear();
    if (step.literal) {
      MatchLiteral(step.pattern, piece, &matches);
    } else {
      DSLA_RETURN_IF_ERROR(MatchRegex(patterns_[index], piece, scratch, &matches));
    }
    MakeParts(matches, piece.size(), span.begin, step.invert, &parts);
    Join(parts, step.behavior, &scratch->next.spans);
  }
  return Status::Ok();
}

Status PreTokenizer::Run(bool at_start, Scratch* scratch) const {
  Words& now = scratch->now;
  Words& next = scratch->next;
  now.spans.clear();
  Add(0, now.text.size(), &now.spans);
  for (size_t i = 0; i < steps_.size(); ++i) {
    next.text.clear();
    next.spans.clear();
    switch (steps_[i].kind) {
      case Step::Kind::kDigits:
        for (const Span& span : now.spans)
          CutDigits(now.text, span, steps_[i].individual, &next.spans);
        break;
      case Step::Kind::kSplit:
        DSLA_RETURN_IF_ERROR(Split(i, scratch));
        break;
      case Step::Kind::kMetaspace:
        Metaspace(steps_[i], at_start, now, &next);
        break;
      case Step::Kind::kPrefixSpace:
        PrefixSpace(now, &next);
        break;
    }
    const bool rewrites =
        steps_[i].kind == Step::Kind::kMetaspace || steps_[i].kind == Step::Kind::kPrefixSpace;
    if (rewrites) std::swap(now.text, next.text);
    std::swap(now.spans, next.spans);
  }
  return Status::Ok();
}

}  // namespace dsla
