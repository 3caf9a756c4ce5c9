#include "base/shared_library.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace dsla {
namespace {

using testing::HasSubstr;

TEST(SharedLibraryTest, FindsAFunctionOfASystemLibrary) {
  const auto cosine = LibraryFunction("libm.so.6", "cos");
  ASSERT_TRUE(cosine.ok()) << cosine.status().message();
  EXPECT_EQ(reinterpret_cast<double (*)(double)>(*cosine)(0), 1);
  EXPECT_EQ(*LibraryFunction("libm.so.6", "cos"), *cosine);
}

TEST(SharedLibraryTest, AFileOfTheBuildIsBesideTheProgram) {
  EXPECT_EQ(BesideProgram("shared_library_test").front(), '/');
  EXPECT_EQ(BesideProgram("no_such_file"), "no_such_file");
}

TEST(SharedLibraryTest, NamesWhatIsNotThere) {
  const Status library = LibraryFunction("libdsla_none.so", "DslaNone").status();
  EXPECT_EQ(library.code(), StatusCode::kUnavailable);
  EXPECT_THAT(library.message(), HasSubstr("'libdsla_none.so', which belongs beside the program"));
  EXPECT_THAT(library.message(), HasSubstr("No such file"));
  const Status function = LibraryFunction("libm.so.6", "DslaNone").status();
  EXPECT_EQ(function.code(), StatusCode::kUnavailable);
  EXPECT_EQ(function.message(), "'libm.so.6' has no DslaNone: it is not of this build");
}

}  // namespace
}  // namespace dsla
