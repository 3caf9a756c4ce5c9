#include "format/chat/jinja_text.h"

#include <gtest/gtest.h>

namespace dsla::jinja {
namespace {

using Ranges = std::vector<Text::Range>;

Text Mixed() {  // ab CD ef, with CD foreign
  Text text("ab");
  text.Append(Text("CD", true));
  text.Append(Text("ef"));
  return text;
}

TEST(JinjaText, PartsAndJoinsKeepTheMarks) {
  const Text text = Mixed();
  EXPECT_EQ(text.bytes(), "abCDef");
  EXPECT_EQ(text.foreign(), (Ranges{{2, 4}}));
  EXPECT_EQ(text.Sub(3).bytes(), "Def");
  EXPECT_EQ(text.Sub(3).foreign(), (Ranges{{0, 1}}));
  EXPECT_EQ(text.Sub(0, 2).foreign(), Ranges{});
  EXPECT_EQ(text.Sub(9).bytes(), "");
  EXPECT_EQ(text.Sub(std::string_view(text.bytes()).substr(1, 2)).foreign(), (Ranges{{1, 2}}));
  Text twice("x", true);
  twice.Append(Text("y", true));
  EXPECT_EQ(twice.foreign(), (Ranges{{0, 2}}));
  EXPECT_TRUE(Text("x", true) == Text("x"));
}

TEST(JinjaText, RunsAreMappedByThemselves) {
  const Text doubled =
      Mixed().MapRuns([](std::string_view run) { return std::string(run) + std::string(run); });
  EXPECT_EQ(doubled.bytes(), "ababCDCDefef");
  EXPECT_EQ(doubled.foreign(), (Ranges{{4, 8}}));
}

}  // namespace
}  // namespace dsla::jinja
