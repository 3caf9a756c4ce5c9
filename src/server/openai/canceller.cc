#include "server/openai/canceller.h"

#include <utility>

namespace dsla::openai {

void Canceller::Cancel(std::vector<std::string> ids) {
  if (ids.empty()) return;
  thread_.Post([engine = engine_, ids = std::move(ids)] {
    for (const std::string& id : ids) engine->Cancel(id);
  });
}

}  // namespace dsla::openai
