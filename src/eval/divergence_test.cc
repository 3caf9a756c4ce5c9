#include "eval/divergence.h"

#include <gtest/gtest.h>

#include <cmath>

namespace dsla {
namespace {

TEST(DivergenceTest, MatchesTheFormulaWorkedByHand) {
  const std::vector<float> p = {std::log(.5f), std::log(.25f), std::log(.25f)};
  const std::vector<float> q = {std::log(.25f) + 3, std::log(.5f) + 3,
                                std::log(.25f) + 3};  // a shift changes nothing
  const RowDivergence row = Divergence(p, q);
  EXPECT_NEAR(row.kl, .5 * std::log(2.) - .25 * std::log(2.), 1e-6);
  EXPECT_FALSE(row.agree);
  EXPECT_NEAR(Divergence(p, p).kl, 0, 1e-12);
  EXPECT_TRUE(Divergence(p, p).agree);
}

TEST(DivergenceTest, VanishingProbabilitiesContributeNothing) {
  const std::vector<float> p = {0.f, -200.f}, q = {0.f, 0.f};
  EXPECT_NEAR(Divergence(p, q).kl, std::log(2.), 1e-6);
}

}  // namespace
}  // namespace dsla
