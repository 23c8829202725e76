// What the C API's functions work on.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "assembly.h"
#include "bundle_folder.h"
#include "calls.h"
#include "coreinfer.h"
#include "layer_store.h"

// Members are freed in the opposite order: the decoder first, what it reads last.
struct coreinfer_model {
  struct Pack {
    std::shared_ptr<coreinfer::MappedTensors> file;
    std::shared_ptr<const coreinfer::Ffn> ffn;
    std::shared_ptr<coreinfer::LayerSource> source;  // where memory is limited
  };

  coreinfer::BundleFolder bundle;
  std::shared_ptr<coreinfer::MappedTensors> base;
  coreinfer::Memory memory;
  std::map<int, Pack> packs;  // COREINFER_DENSE among them
  std::unique_ptr<coreinfer::Decoder> decoder;
  coreinfer::Buffer<float> logits;  // (padded vocabulary)
  coreinfer::Turn turn;
};

namespace coreinfer {

// `options` as given, 0 for defaults. Throws Failure, and std::invalid_argument: an option is wrong.
std::unique_ptr<coreinfer_model> open_model(const std::string& folder, const coreinfer_options& options);

// A cluster's pack, or the dense FFN, opened and checked if that has not been done. Throws Failure.
const coreinfer_model::Pack& pack_of(coreinfer_model& model, int cluster);

}  // namespace coreinfer
