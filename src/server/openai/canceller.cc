#include "server/openai/canceller.h"

#include <utility>

namespace dsla::openai {

Canceller::Canceller(Engine* engine) : engine_(engine), thread_([this] { Run(); }) {}

Canceller::~Canceller() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void Canceller::Cancel(std::vector<std::string> ids) {
  if (ids.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    for (std::string& id : ids) ids_.push_back(std::move(id));
  }
  wake_.notify_one();
}

void Canceller::Run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stop_ || !ids_.empty(); });
    if (stop_) return;
    const std::vector<std::string> ids = std::exchange(ids_, {});
    lock.unlock();
    for (const std::string& id : ids) engine_->Cancel(id);
    lock.lock();
  }
}

}  // namespace dsla::openai
