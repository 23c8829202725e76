// A bundle's manifest, and its files checked against it.
#pragma once

#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "model_record.h"
#include "tensor_file.h"
#include "whole_file.h"

namespace coreinfer {

struct ClusterRecord {
  std::string file, label;       // no file: thin, it decodes with the dense FFN
  std::vector<int> num_neurons;  // of each layer
};

// A mapped file and its tensors.
struct MappedTensors {
  MappedTensors(const std::string& name, std::unique_ptr<const WholeFile> mapped)
      : file(std::move(mapped)), tensors(name, file->data(), file->num_bytes()) {}
  const std::unique_ptr<const WholeFile> file;
  TensorFile tensors;
};

class BundleFolder {
 public:
  // Reads the manifest. `spares_memory`: pages of files that are only checked are let go of. Throws Failure, and
  // std::invalid_argument: fields of the manifest are missing or wrong.
  BundleFolder(const std::string& folder, bool checks_sums, bool spares_memory);

  // Each throws as above, and where a file is not as the manifest lists it.
  std::shared_ptr<MappedTensors> base() const;
  std::shared_ptr<MappedTensors> dense() const;
  std::shared_ptr<MappedTensors> pack(int cluster) const;
  // The pack that a cluster decodes with, or COREINFER_DENSE.
  int weights_of(int cluster) const;
  // Of a mixture: the experts of each layer that a cluster has.
  std::vector<std::vector<int>> experts(int cluster) const;

  const std::string& folder() const { return folder_; }
  const ModelRecord& model() const { return model_; }
  const std::vector<ClusterRecord>& clusters() const { return clusters_; }
  const std::string& ffn_format() const { return ffn_format_; }  // of the FFN's weights, as the manifest names it
  bool has_dense() const;
  bool narrows_experts() const;  // whether packs of a mixture have weights of their own, of narrower experts
  bool is_end(int32_t token_id) const { return end_ids_.count(token_id) > 0; }

 private:
  std::unique_ptr<const WholeFile> open(const std::string& name) const;
  std::shared_ptr<MappedTensors> open_tensors(const std::string& name) const;
  void read_clusters();
  void read_end_ids();

  std::string folder_;
  bool checks_sums_, spares_memory_;
  Json manifest_;
  ModelRecord model_;
  std::string ffn_format_;
  std::vector<ClusterRecord> clusters_;
  std::unordered_set<int32_t> end_ids_;
};

}  // namespace coreinfer
