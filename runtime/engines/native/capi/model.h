// What the C API's functions work on.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "assembly.h"
#include "bundle_folder.h"
#include "calls.h"
#include "column_cache.h"
#include "coreinfer_engine.h"
#include "file_source.h"

namespace coreinfer {

// A whole file in memory, which stays as long as its owner.
struct FileBytes {
  std::shared_ptr<const void> owner;
  const uint8_t* data = nullptr;
  size_t num_bytes = 0;
};

}  // namespace coreinfer

struct coreinfer_ffn {
  std::shared_ptr<const coreinfer::Ffn> ffn;
  std::shared_ptr<const coreinfer::Ffn> whole;  // of experts that are named alone: the FFN that they are experts of
  coreinfer::FileBytes file;
  std::vector<std::shared_ptr<void>> memory;  // of what was copied
  coreinfer::FileSource source{};             // where memory is limited: what layers or experts are read from
};

// Members are freed in the opposite order: the decoder and what works with it first, what they read last.
struct coreinfer_model {
  std::unique_ptr<const coreinfer::BundleFolder> bundle;  // none where the caller opened the files
  coreinfer::FileBytes base;
  coreinfer::Memory memory;
  std::map<int, coreinfer_ffn> packs;  // of the bundle, COREINFER_DENSE among them
  coreinfer_ffn ffn;                   // in use
  int max_neurons = 0;                 // of a layer's FFN, or of each of its experts
  std::unique_ptr<coreinfer::Decoder> decoder;
  std::unique_ptr<coreinfer::ColumnCache> columns;
  coreinfer::Buffer<float> logits;  // (padded vocabulary), where the caller has no room for them
  coreinfer::Turn turn;
};

namespace coreinfer {

// `options` as given, 0 for defaults. Throws Failure, and std::invalid_argument: an option is wrong.
std::unique_ptr<coreinfer_model> open_model(const std::string& folder, const coreinfer_options& options);

// A cluster's pack, or the dense FFN, opened and checked if that has not been done. Throws Failure.
const coreinfer_ffn& pack_of(coreinfer_model& model, int cluster);

// Have an FFN be read from the file that it lies in, part by part. Throws as read_from_file does.
void read_in_parts(coreinfer_ffn& ffn, const std::string& path);

// Threads as given, or by default a physical core each. Throws std::invalid_argument.
int num_threads_of(int given);

// `thresholds`: null to read all inputs. Throws std::invalid_argument.
void use_ffn(coreinfer_model& model, const coreinfer_ffn& ffn, std::shared_ptr<TokenShares> thresholds);

// Append tokens to a sequence, as coreinfer_forward does. Throws std::invalid_argument, PoolFull and Failure.
struct PassOptions {
  bool all_logits = false, screened = false;
  coreinfer_watcher watcher = nullptr;
  void* user = nullptr;
};
void read_tokens(coreinfer_model& model, int sequence, const int32_t* ids, size_t num_ids, const PassOptions& options,
                 float* logits);
// Room for one row of logits.
float* own_logits(coreinfer_model& model);

}  // namespace coreinfer
