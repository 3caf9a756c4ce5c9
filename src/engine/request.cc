#include "engine/request.h"

namespace dsla {

const char* Name(Tier tier) {
  switch (tier) {
    case Tier::kFull:
      return "full";
    case Tier::kAuto:
      return "auto";
    case Tier::kEconomy:
      return "economy";
    case Tier::kExact:
      return "exact";
  }
  return "unknown";
}

const char* Name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kContext:
      return "context";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

}  // namespace dsla
