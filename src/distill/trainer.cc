#include "distill/trainer.h"

#include "base/shared_library.h"

namespace dsla {

Expected<const Trainer*> LoadTrainer() {
  DSLA_ASSIGN_OR_RETURN(void* const get, LibraryFunction("libdsla_trainer.so", "DslaTrainer"));
  return reinterpret_cast<const Trainer* (*)()>(get)();
}

}  // namespace dsla
