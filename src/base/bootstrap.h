// How far the mean of a few documents may be from that of all such documents.
#pragma once

#include <cstdint>
#include <span>

namespace dsla {

struct Estimate {
  double mean = 0;
  double low = 0, high = 0;  // 95% interval
};

// sum(values) / sum(weights), each pair one document's sum and its weight (tokens, or 1 where the
// values are means already), and the bounds that 95% of 2,000 bootstrap resamples of the documents
// keep (Efron, Annals of Statistics 1979). A function of the arguments alone. Documents of weight 0
// do not count; without any other all three numbers are 0. The interval of a single document is its
// value.
Estimate Bootstrap(std::span<const double> values, std::span<const double> weights, uint64_t seed);

}  // namespace dsla
