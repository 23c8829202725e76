// From a manifest's record and mapped files to weights in place, family by family.
#pragma once

#include <memory>
#include <vector>

#include "model_record.h"
#include "tensor_file.h"
#include "weights.h"

namespace coreinfer {

// What weights lie in besides the mapped files.
using Memory = std::vector<std::shared_ptr<const std::vector<float>>>;

// Everything but the FFN. Throws std::invalid_argument: the base does not hold what the model needs. Unsupported: the
// config asks for something that the engine does not compute.
ModelWeights assemble_model(const ModelRecord& record, const TensorFile& base, Memory& memory);

// The dense FFN or a cluster's pack. Throws as above.
Ffn assemble_ffn(const ModelRecord& record, const TensorFile& file, const std::vector<int>& num_neurons);
// The dense FFN of a mixture, or a pack in which each expert is narrowed; one that lists experts has these alone. Throws as
// above. `num_neurons`: of each layer, in equal parts of the experts that are there.
Ffn assemble_experts(const ModelRecord& record, const TensorFile& file, const std::vector<int>& num_neurons);
// A cluster's pack of a mixture: some of the dense FFN's experts, by their numbers in each layer. Throws
// std::invalid_argument: there are no such layers or experts.
Ffn keep_experts(const Ffn& all, const std::vector<std::vector<int>>& experts);

}  // namespace coreinfer
