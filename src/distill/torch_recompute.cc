#include "distill/torch_recompute.h"

#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

namespace dsla::distill {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Body : torch::CustomClassHolder {
  explicit Body(std::function<std::vector<Tensor>(const Tensor&)> run) : run(std::move(run)) {}
  std::function<std::vector<Tensor>(const Tensor&)> run;
};

class RecomputeFunction : public torch::autograd::Function<RecomputeFunction> {
 public:
  // `leaf` needs a gradient, so that the outputs do, whether h does or only leaves in the body.
  static variable_list forward(AutogradContext* ctx, const Tensor& h, const Tensor& /*leaf*/,
                               const c10::intrusive_ptr<Body>& body) {
    ctx->save_for_backward({h});
    ctx->saved_data["body"] = c10::IValue::make_capsule(body);
    ctx->set_materialize_grads(false);
    return body->run(h);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "recompute: differentiable once only");
    const auto body = c10::static_intrusive_pointer_cast<Body>(ctx->saved_data["body"].toCapsule());
    Tensor h = ctx->get_saved_variables()[0].detach();
    h.set_requires_grad(ctx->needs_input_grad(0));
    variable_list outputs, roots, gradients;
    {
      const at::AutoGradMode with_grad(true);
      outputs = body->run(h);
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      gradients.push_back(grads[i]);
    }
    if (!roots.empty()) torch::autograd::backward(roots, gradients);
    return {h.grad(), Tensor(), Tensor()};
  }
};

}  // namespace

std::vector<Tensor> Recompute(const Tensor& h,
                              std::function<std::vector<Tensor>(const Tensor&)> body) {
  Tensor leaf = at::zeros({}, h.options().dtype(at::kFloat));
  leaf.set_requires_grad(true);
  return RecomputeFunction::apply(h, leaf, c10::make_intrusive<Body>(std::move(body)));
}

}  // namespace dsla::distill
