// The operators as torch operators, namespace `dsla` (README.md lists their schemas): from Python
// by torch.ops.load_library on libdsla_ops_torch.so, from C++ by linking dsla_ops_torch.
#pragma once

namespace dsla {

// Registration happens when the library is loaded. A program that links it and uses no other symbol
// of it calls this, so that the linker does not leave the library out.
void RegisterTorchOps();

}  // namespace dsla
