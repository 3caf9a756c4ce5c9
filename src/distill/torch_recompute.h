// Gradient checkpointing (Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory
// Cost", 2016): of a part of the network only its input is kept, and the backward pass runs it
// again. Internal to the room.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace dsla::distill {

// body(h), without what its backward pass would keep. `body` runs twice, the second time within the
// backward pass, and must give the same both times; leaves that it uses get their gradients there.
// Differentiable once.
std::vector<at::Tensor> Recompute(const at::Tensor& h,
                                  std::function<std::vector<at::Tensor>(const at::Tensor&)> body);

}  // namespace dsla::distill
