// What libdsla_trainer.so exports: LoadTrainer (trainer.h) finds it here.
#include "distill/controls.h"
#include "distill/trainer.h"

extern "C" const dsla::Trainer* DslaTrainer() {
  static constexpr dsla::Trainer kTrainer{
      .distill = dsla::Distill, .run_controls = dsla::RunControls, .write_texts = dsla::WriteTexts};
  return &kTrainer;
}
